"""LoRAs that requests choose: beside stock diffusers' `set_adapters`, and engines with the same merged."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sdfast import drop_in
from sdfast.call import Given
from sdfast.errors import CheckpointError, ExportError, RequestError
from sdfast.experts import halves
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.lora import with_loras
from sdfast.export.recipe import Recipe
from sdfast.infotext import infotext_of, parse
from sdfast.loop import Rows
from sdfast.loras import LoraScales
from sdfast.manifest import Manifest, read_manifest
from sdfast.pipeline import Pipeline
from sdfast.request import Hires, Request
from sdfast.server.studio import info_of
from tests.conftest import EAGER_SMALL, FLAT_SIZES
from tests.export import loras
from tests.export.loras import kohya, kohya_xl, peft, random_changes, write
from tests.fakes import FakeEngine
from tests.test_image_to_image import image
from tests.test_pipeline import PROMPT, assert_same, ours, seeded, stock

SIDE = 32
TWO_KINDS = loras.ATTENTION + r"|^conv_in$"
ONE = {"text_encoder": 0.4, "unet": -0.9}


def files_of(checkpoint: Path, place: Path, names: Any = kohya) -> dict[str, Path]:
    """One that changes every kind of layer, text encoders' among them, and one of other layers and rank."""
    every = write(place / "oil.safetensors", random_changes(checkpoint, seed=1), peft)
    other = random_changes(checkpoint, TWO_KINDS, ranks=(2,), alphas=(3.0,), seed=2)
    return {"oil": every, "ink": write(place / "ink.v2.safetensors", other, names)}


def on_request(files: Mapping[str, Path]) -> list[dict[str, Any]]:
    return [{"source": file, "on_request": True, "name": name} for name, file in files.items()]


@pytest.fixture(scope="module")
def files(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files_of(tiny_sd, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def engine(tiny_sd: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = EAGER_SMALL.model_copy(update={"loras": Recipe.make(loras=on_request(files)).loras})
    return export(tiny_sd, tmp_path_factory.mktemp("chosen") / "engine", recipe)


@pytest.fixture(scope="module")
def pipe(engine: Path) -> Pipeline:
    return ours(engine)


def with_adapters(pipe: Any, files: Mapping[str, Path]) -> Any:
    for name, file in files.items():
        pipe.load_lora_weights(str(file), adapter_name=name)
    return pipe


@pytest.fixture(scope="module")
def reference(tiny_sd: Path, files: dict[str, Path]) -> Any:
    return with_adapters(stock(tiny_sd), files)


def drawn(pipe: Any, **call: Any) -> torch.Tensor:
    call = {"prompt": PROMPT, "num_inference_steps": 3, "height": SIDE, "width": SIDE, **call}
    latents: torch.Tensor = pipe(**call, output_type="latent", generator=seeded(0)).images
    return latents


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() > 0.01 * other.norm())


@pytest.mark.parametrize(
    ("names", "weights"),
    [(["oil", "ink"], [0.7, -0.5]), ("ink", None), (["oil"], [ONE]), (["oil", "ink"], 0.6)],
)
def test_equals_stock_diffusers(reference: Any, engine: Path, names: Any, weights: Any) -> None:
    """By the drop-in, with the same calls."""
    own = drop_in.StableDiffusionPipeline(ours(engine).engine)
    own.set_progress_bar_config(disable=True)
    own.scheduler = reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config)
    for side in (own, reference):
        side.set_adapters(names, weights)
    expected = drawn(reference)
    assert_same(expected, drawn(own))
    own.disable_lora()
    assert own.get_active_adapters() == [] and far(drawn(own), expected)
    own.enable_lora()
    assert_same(expected, drawn(own))


@pytest.mark.slow
def test_sdxl_equals_stock_diffusers(tiny_sdxl: Path, tmp_path: Path) -> None:
    files = files_of(tiny_sdxl, tmp_path, kohya_xl)
    reference = with_adapters(stock(tiny_sdxl, "StableDiffusionXLPipeline"), files)
    own = ours(export(tiny_sdxl, tmp_path / "engine", Recipe.make(backend="eager", loras=on_request(files))))
    own.scheduler = reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config)
    reference.set_adapters(["oil", "ink"], [ONE | {"text_encoder_2": ONE["text_encoder"]}, 0.5])
    call = {"height": 64, "width": 64}
    assert_same(drawn(reference, **call), drawn(own, loras={"oil": (0.4, -0.9), "ink": 0.5}, **call))


def test_equals_engines_with_the_same_merged(
    tiny_sd: Path, files: dict[str, Path], pipe: Pipeline, tmp_path: Path
) -> None:
    """And the plain checkpoint, where nothing is asked for."""
    scales = {"oil": 0.8, "ink": -0.5}
    merged = [{"source": files[name], "scale": scale} for name, scale in scales.items()]
    recipe = EAGER_SMALL.model_copy(update={"loras": Recipe.make(loras=merged).loras})
    expected = drawn(ours(export(tiny_sd, tmp_path / "merged", recipe)))
    assert_same(expected, drawn(pipe, loras=scales))
    plain = drawn(ours(export(tiny_sd, tmp_path / "plain", EAGER_SMALL)))
    assert_same(plain, drawn(pipe))
    assert_same(plain, drawn(pipe, loras={"oil": 0.0}))
    assert far(expected, plain)


def test_one_may_be_merged_and_another_chosen(
    tiny_sd: Path, files: dict[str, Path], pipe: Pipeline, tmp_path: Path
) -> None:
    given = [{"source": files["oil"], "scale": 0.8}, {"source": files["ink"], "on_request": True}]
    engine = export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", sizes=["32x32"], loras=given))
    own = ours(engine)
    assert own.engine.manifest.model.loras == ("ink.v2",)  # by its file's name
    assert_same(drawn(pipe, loras={"oil": 0.8, "ink": 0.3}), drawn(own, loras={"ink.v2": 0.3}))
    told = [
        str(one) for one in (*own.engine.manifest.checkpoint.loras, *own.engine.manifest.checkpoint.chosen)
    ]
    assert told == [f"{files['oil']}, scale 0.8", f"ink.v2, of {files['ink']}, as requests choose"]


def request_of(seed: int = 0, **given: Any) -> Request:
    fields = {
        "prompts": (PROMPT,),
        "negative_prompts": (None,),
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 3,
    }
    return Request.make(**{**fields, "seed": seed, **given})


def test_rows_of_different_loras_share_a_batch(pipe: Pipeline) -> None:
    """Each of them is the picture that it is alone."""
    asked = [
        request_of(loras={"oil": 1.0}),
        request_of(loras={"ink": (0.5, -2.0)}, seed=3, guidance_scale=1.0),
        request_of(),
        request_of(loras={"oil": -0.4, "ink": 0.7}, seed=4),
    ]
    alone = [pipe.generate(one, output_type="latent").images[0] for one in asked]
    rows = Rows(pipe.engine, [row for one in asked for row in pipe.prepare(one).rows], SIDE, SIDE)
    while rows.active:
        rows.tick()
    for expected, got in zip(alone, rows.latents, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert far(alone[0], alone[2])


def test_a_prompt_is_remembered_for_each_scale(pipe: Pipeline) -> None:
    """Of the text encoders and of the U-Net, whose keys and values a LoRA changes."""
    first, *others = (
        pipe.prompts.encode([(PROMPT, None)], None, *reading_with(pipe, **scales))[0][0].context
        for scales in ({"oil": 1.0}, {"oil": 0.5}, {"oil": (1.0, 0.5)}, {"oil": (0.5, 1.0)}, {"ink": 1.0})
    )
    assert all(far(first, other) for other in others)
    again = pipe.prompts.encode([(PROMPT, None)], None, *reading_with(pipe, oil=1.0))[0][0].context
    assert again is first


def reading_with(pipe: Pipeline, **scales: Any) -> tuple[Any, LoraScales]:
    from sdfast.prompts import Reading

    return Reading(), LoraScales.of(pipe.engine.manifest.model, request_of(loras=scales))


def test_threads_may_share_an_engine(pipe: Pipeline) -> None:
    """What one tells a network is not what another one's rows get."""
    hidden = torch.randn(1, 77, pipe.engine.manifest.model.text_width)

    def contexts(scale: float) -> list[torch.Tensor]:
        inputs = {"hidden_states": hidden, "loras": torch.tensor([[scale, -scale]])}
        return [pipe.engine.call("context", inputs)["context"] for _ in range(50)]

    expected = [contexts(scale)[0] for scale in (0.5, 2.0)]
    with ThreadPoolExecutor(2) as pool:
        for alone, several in zip(expected, pool.map(contexts, (0.5, 2.0)), strict=True):
            assert all(torch.equal(one, alone) for one in several)


def test_over_an_image_and_in_a_second_pass(pipe: Pipeline) -> None:
    """A second pass has the first one's, unless it has its own."""
    call = {"image": image(1).resize((SIDE, SIDE)), "strength": 0.7}
    assert far(drawn(pipe, loras={"oil": 1.0}, **call), drawn(pipe, **call))
    hires = {"height": SIDE, "width": SIDE, "strength": 0.7}
    same, none, own = (
        drawn(pipe, height=16, width=16, loras={"oil": 1.0}, hires={**hires, **further})
        for further in ({}, {"loras": {}}, {"loras": {"oil": 1.0}})
    )
    assert torch.equal(same, own) and far(none, same)


def test_prompt_embeds_have_them_too(pipe: Pipeline) -> None:
    hidden = torch.randn(
        1, 77, pipe.engine.manifest.model.text_width, generator=torch.Generator().manual_seed(1)
    )
    call = {"prompt": None, "prompt_embeds": hidden, "guidance_scale": 1.0}
    assert far(drawn(pipe, loras={"oil": (0.0, 1.0)}, **call), drawn(pipe, **call))
    assert_same(drawn(pipe, loras={"oil": (9.0, 0.0)}, **call), drawn(pipe, **call))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "inductor"])
def test_other_backends_equal_eager(flat_sd: Path, tmp_path: Path, backend: str) -> None:
    files = files_of(flat_sd, tmp_path)
    sizes = FLAT_SIZES if backend == "onnx" else ["16x16"]
    recipes = [Recipe.make(backend=kind, sizes=sizes, loras=on_request(files)) for kind in (backend, "eager")]
    own, eager = (ours(export(flat_sd, tmp_path / one.backend, one)) for one in recipes)
    for scales in ({}, {"oil": 0.8}, {"oil": (0.5, -0.5), "ink": 1.0}):
        call = {"loras": scales, "height": 16, "width": 16}
        assert_same(drawn(eager, **call), drawn(own, **call))


@pytest.mark.slow
def test_through_torch_compile(flat_sd: Path, tmp_path: Path) -> None:
    """Scales are data: nothing is compiled for others."""
    recipe = EAGER_SMALL.model_copy(
        update={"loras": Recipe.make(loras=on_request(files_of(flat_sd, tmp_path))).loras}
    )
    folder = export(flat_sd, tmp_path / "engine", recipe)
    eager, compiled = ours(folder), Pipeline.from_engine(folder, compile=True)
    for scales in ({}, {"oil": 0.8}, {"ink": 1.0}):
        assert_same(drawn(eager, loras=scales), drawn(compiled, loras=scales))


def test_what_is_not_touched_is_kept(
    tiny_sd: Path, engine: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Another name changes the manifest alone; another LoRA, of the U-Net alone, leaves the text encoder."""
    place = tmp_path / "engine"

    def made(given: list[dict[str, Any]]) -> tuple[Manifest, list[str]]:
        recipe = EAGER_SMALL.model_copy(update={"loras": Recipe.make(loras=given).loras})
        built = Stages()
        export(tiny_sd, place, recipe, progress=built)
        return read_manifest(place), [name for name, note in built.ended if "kept" not in note]

    attention = random_changes(tiny_sd, r"attn1\.to_q$", components=["unet"], ranks=(1,))
    third = write(tmp_path / "third.safetensors", attention, peft)
    oil = on_request({"oil": files["oil"]})
    first, built = made(oil)
    assert {"unet", "context", "time_shift", "text_encoder"} <= set(built)
    renamed, built = made([{**oil[0], "name": "paint"}])
    assert renamed.model.loras == ("paint",) and renamed.modules == first.modules
    assert not {"unet", "context", "time_shift", "text_encoder", "vae_decoder"} & set(built)
    more, built = made([*oil, {"source": third, "on_request": True}])
    assert more.model.loras == ("oil", "third")
    assert "unet" in built and "vae_decoder" not in built
    write(third, [replace(change, down=-change.down) for change in attention], peft)
    _, built = made([*oil, {"source": third, "on_request": True}])
    assert "unet" in built and "text_encoder" not in built
    alone, built = made([{"source": third, "on_request": True}])
    inputs = {name: module.inputs for name, module in alone.modules.items()}
    assert "loras" not in (*inputs["context"], *inputs["time_shift"], *inputs["text_encoder"])
    assert far(drawn(ours(place), loras={"third": 2.0}), drawn(ours(place)))


class Stages:
    """Which stages ended, with what was said of them."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str]] = []

    def begin(self, stage: str) -> None:
        """A stage begins."""

    def end(self, stage: Any) -> None:
        self.ended.append((stage.name, stage.note))

    def say(self, message: str) -> None:
        """Something worth a line."""


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, PROMPT),
        ({"oil": 0.0}, PROMPT),
        ({"oil": 0.8, "ink": (1.0, -0.5)}, f"{PROMPT} <lora:oil:0.8> <lora:ink:1:-0.5>"),
        ({"oil": (0.5, 0.5), "ink": (0.0, 0.5)}, f"{PROMPT} <lora:oil:0.5> <lora:ink:0:0.5>"),
    ],
)
def test_parameters_tell_them_as_automatic1111_does(pipe: Pipeline, given: Any, told: str) -> None:
    request = request_of(loras=given)
    text = infotext_of(request, pipe.schedule_of(request), 0, model="m", weights={})
    assert parse(str(text)).prompt == told


def test_parameters_tell_those_of_a_second_pass(pipe: Pipeline) -> None:
    hires = Hires.make(height=64, width=64, loras={"ink": 1.0})
    request = request_of(loras={"oil": 1.0}, hires=hires)
    text = infotext_of(request, pipe.schedule_of(request), 0, model="m", weights={})
    assert text.extra["Hires prompt"] == f"{PROMPT} <lora:ink:1>"


def test_the_server_knows_them(pipe: Pipeline) -> None:
    assert info_of(pipe.engine.manifest).loras == ("oil", "ink")


def test_a_refiner_has_those_that_it_knows() -> None:
    refiner = FakeEngine().manifest.model.model_copy(update={"loras": ("ink",)})
    request = request_of(loras={"oil": 1.0, "ink": 0.5})
    base, finished = halves(request, 0.8, refiner)
    assert (base.loras, finished.loras) == (request.loras, {"ink": 0.5})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"oli": 1.0}, r"^loras: this engine has no LoRA 'oli' .*; it has: oil, ink$"),
        ({"oil": float("nan")}, r"^loras: must be a finite number"),
        ({"oil": "much"}, r"^loras: must be a valid (number|tuple)"),
        ({"oil": (1.0, 2.0, 3.0)}, r"^loras: "),
        ({"oil": 101.0}, r"^loras: must be less than or equal to 100"),
    ],
)
def test_bad_loras_are_refused_by_name(pipe: Pipeline, given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        drawn(pipe, loras=given)


def test_an_engine_without_says_how_to_get_some() -> None:
    with pytest.raises(
        RequestError, match=r"no LoRA 'oil' .*; it has none; export one with .*--lora-on-request"
    ):
        Pipeline(FakeEngine()).prepare(request_of(loras={"oil": 1.0}, height=16, width=16), Given())


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("oli", None, "adapter_names: 'oli' is not there; there are: oil, ink"),
        (["oil", "ink"], [1.0], "adapter_weights: 1 for 2 adapters; give one for each"),
        ("oil", {"unet": 1.0, "vae": 1.0}, "adapter_weights: .* one scale in all text encoders"),
        (
            "oil",
            {"text_encoder": 1.0, "text_encoder_2": 0.5},
            "adapter_weights: .* one scale in all text enc",
        ),
    ],
)
def test_adapters_that_are_not_there(pipe: Pipeline, names: Any, weights: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        drop_in.StableDiffusionPipeline(pipe.engine).set_adapters(names, weights)


def test_two_of_one_name_and_names_that_are_none_are_refused(tiny_sd: Path, files: dict[str, Path]) -> None:
    checkpoint = resolve(tiny_sd)

    def refused(*given: dict[str, Any]) -> str:
        with pytest.raises(CheckpointError) as caught:
            with_loras(checkpoint, Recipe.make(loras=given).loras)
        return str(caught.value)

    twice = [{"source": file, "on_request": True, "name": "a"} for file in files.values()]
    assert "requests would call both 'a'; give one of them another name" in refused(*twice)
    odd = files["oil"].with_name("a=b.safetensors")
    odd.write_bytes(files["oil"].read_bytes())
    assert "'a=b' cannot be its name in requests" in refused({"source": odd, "on_request": True})
    for wrong, told in (
        ({"name": "<oil>"}, "loras: String should match pattern"),
        ({"scale": 0.5}, "loras: scale: requests say that of a LoRA which is on_request"),
    ):
        with pytest.raises(ExportError, match=told):
            Recipe.make(loras=[{"source": "oil", "on_request": True, **wrong}])
    with pytest.raises(ExportError, match="loras: name: is for a LoRA that is on_request"):
        Recipe.make(loras=[{"source": "oil", "name": "oil"}])


def test_a_dora_can_be_merged_alone(tiny_sd: Path, tmp_path: Path) -> None:
    changes = random_changes(tiny_sd, r"mid_block.*attn1\.to_q$", components=["unet"])
    tensors = {name: tensor for change in changes for name, tensor in peft(change).items()}
    for change in changes:
        tensors[f"unet.{change.layer}.lora_magnitude_vector"] = torch.ones(len(change.up))
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "dora.safetensors")
    given = {"source": tmp_path / "dora.safetensors"}
    assert with_loras(resolve(tiny_sd), Recipe.make(loras=[given]).loras).loras
    with pytest.raises(CheckpointError, match=r"dora\.safetensors: is a DoRA, .* merge it"):
        with_loras(resolve(tiny_sd), Recipe.make(loras=[{**given, "on_request": True}]).loras)
