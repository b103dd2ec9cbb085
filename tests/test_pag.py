"""Perturbed-attention guidance: beside stock diffusers' PAG pipelines, and rows among others."""

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdfast import drop_in, infotext
from sdfast.arithmetic import DeviceArithmetic
from sdfast.cli import main
from sdfast.errors import CheckpointError, ExportError, RequestError
from sdfast.experts import halves
from sdfast.export.additions import as_made
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.first_latents import Over
from sdfast.loop import Rows
from sdfast.manifest import read_manifest
from sdfast.models.pag import Switch
from sdfast.pipeline import Pipeline
from sdfast.request import Hires, Request
from sdfast.server.studio import info_of
from sdfast.summary import summary
from sdfast.validation import Report, validate
from sdfast.validation.drawing import generate
from sdfast.validation.reference import reference_pipeline
from tests import checkpoints
from tests.conftest import FLAT_SIZES
from tests.export.loras import kohya, random_changes, write
from tests.fakes import FakeEngine
from tests.server.test_batcher import Held, Open, open_batcher, pixels, submit
from tests.test_image_to_image import image, mask
from tests.test_pipeline import PROMPT, ours, seeded
from tests.validation import engines

__all__ = ["open_batcher"]  # a fixture
SIDE = 64
LAYERS = {"sd": ["mid"], "sdxl": ["mid", r"down_blocks\.1\.attentions\.0"]}


def same(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert expected.shape == actual.shape
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() > 0.01 * other.norm())


def stock(checkpoint: Path, layers: list[str], kind: str, **beside: Any) -> Any:
    without = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    pipe = getattr(diffusers, kind).from_pretrained(
        checkpoint, pag_applied_layers=layers, **without, **beside
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, drop_in.StableDiffusionPAGPipeline | drop_in.StableDiffusionXLPAGPipeline]:
    """The stock pipeline of a checkpoint, and its drop-in on an eager engine."""
    checkpoint, layers = request.getfixturevalue(f"tiny_{request.param}"), LAYERS[request.param]
    kind = f"StableDiffusion{'XL' * (request.param == 'sdxl')}PAGPipeline"
    folder = tmp_path_factory.mktemp("pag") / "engine"
    engine = export(checkpoint, folder, Recipe.make(backend="eager", pag=layers))
    own = getattr(drop_in, kind).from_engine(engine, threads=1)
    own.set_progress_bar_config(disable=True)
    return stock(checkpoint, layers, kind), own


@pytest.fixture(scope="module")
def engine(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny SD checkpoint, with shallow steps and a LoRA for requests too."""
    place = tmp_path_factory.mktemp("pag")
    lora = write(place / "oil.safetensors", random_changes(tiny_sd, seed=1), kohya)
    recipe = Recipe.make(
        **{"backend": "eager", "sizes": {"min": "16x16", "max": "64x64"}, "pag": ["mid", "up_blocks.0"]},
        loras=[{"source": lora, "on_request": True, "name": "oil"}],
        cache_branch=1,
    )
    return export(tiny_sd, place / "engine", recipe)


@pytest.fixture(scope="module")
def pipe(engine: Path) -> Pipeline:
    return ours(engine)


def both(
    pair: tuple[Any, Any],
    scheduler: str = "EulerAncestralDiscreteScheduler",
    overrides: Mapping[str, Any] | None = None,
    seeds: tuple[int, ...] = (5,),
    **call: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "latent", **call}
    chosen = getattr(diffusers, scheduler).from_config(pair[0].scheduler.config, **(overrides or {}))
    drawn = []
    for pipe in pair:
        pipe.scheduler = chosen
        drawn.append(pipe(**call, generator=seeded(*seeds)).images)
    return drawn[0], drawn[1]


CALLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "another scale": {"pag_scale": 0.7, "negative_prompt": "mist", "scheduler": "DDIMScheduler"},
    "no negative prompt": {"guidance_scale": 1.0},
    "less guidance than one": {"guidance_scale": 0.5, "guidance_rescale": 0.5, "pag_scale": 5.0},
    "less from step to step": {"pag_adaptive_scale": 0.004, "scheduler": "DPMSolverMultistepScheduler"},
    "nothing left of it": {"pag_scale": 1.0, "pag_adaptive_scale": 0.003, "num_inference_steps": 6},
    "less, without a negative prompt": {"pag_adaptive_scale": 0.004, "guidance_scale": 1.0},
    "rescaled": {"guidance_rescale": 0.7, "guidance_scale": 9.0},
    "rescaled, less from step to step": {"guidance_rescale": 0.7, "pag_adaptive_scale": 0.002},
    "two evaluations a step": {"scheduler": "HeunDiscreteScheduler", "pag_adaptive_scale": 0.002},
    "several prompts and pictures": {
        "prompt": ["a boat", "the sea"],
        "num_images_per_prompt": 2,
        "seeds": (1, 2, 3, 4),
    },
    "none of it": {"pag_scale": 0.0},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_drop_in_draws_what_diffusers_class_draws(pair: tuple[Any, Any], call: str) -> None:
    same(*both(pair, **CALLS[call]))


def test_it_is_another_picture(pair: tuple[Any, Any]) -> None:
    call = {"num_inference_steps": 3, "seed": 1, "output_type": "latent"}
    drawn = [
        pair[1](PROMPT, pag_scale=scale, pag_adaptive_scale=fall, **call).images
        for scale, fall in ((0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (3.0, 0.004))
    ]
    assert all(far(one, other) for i, one in enumerate(drawn) for other in drawn[i + 1 :])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_over_an_image(tiny_sd: Path, pipe: Pipeline, guidance: float, masked: bool) -> None:
    kind = f"StableDiffusionPAG{'Inpaint' if masked else 'Img2Img'}Pipeline"
    given: dict[str, Any] = {"mask_image": mask()} if masked else {}
    reference = stock(tiny_sd, ["mid", "up_blocks.0"], kind)
    call = {"image": image(), "strength": 0.6, "guidance_scale": guidance, "pag_scale": 2.0, **given}
    same(*both((reference, pipe), num_inference_steps=5, **call))


def test_requests_of_every_kind_by_the_reference_of_the_validation(tiny_sd: Path, engine: Path) -> None:
    """With a LoRA, with shallow steps, over a picture of their own, and with none of it."""
    manifest = read_manifest(engine)
    made = as_made(resolve(str(tiny_sd)), manifest, lambda _: None)
    reference, pipe = reference_pipeline(made, pag=manifest.model.pag), ours(engine)
    for fields in (
        {"loras": {"oil": 0.8}},
        {"cache_interval": 2, "num_inference_steps": 4},
        {"hires": {"height": 64, "width": 64, "strength": 0.5}, "height": 32, "width": 32},
        {"pag_scale": 0.0, "pag_adaptive_scale": 0.0},
        {"guidance_scale": 1.0},
    ):
        asked = request(**{"pag_scale": 2.0, "pag_adaptive_scale": 0.001, **fields})
        expected = generate(reference, asked, output_type="latent", cache_branch=1)
        same(expected, pipe.generate(asked, output_type="latent").images)


def request(prompt: str = PROMPT, **fields: Any) -> Request:
    if isinstance(hires := fields.get("hires"), dict):
        fields["hires"] = Hires.make(**hires)
    given = {"prompts": (prompt,), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "seed": 3}
    return Request.make(**{**given, "num_inference_steps": 3, **fields})


def test_rows_share_a_batch_and_each_is_what_it_is_alone(pipe: Pipeline) -> None:
    """Guided so, guided otherwise, and not at all; on both ways of the arithmetic."""
    several = [
        request(pag_scale=3.0, loras={"oil": 0.5}),
        request(seed=4),
        request(seed=5, pag_scale=2.0, pag_adaptive_scale=0.003, num_inference_steps=5, scheduler="euler_a"),
        request(seed=6, guidance_scale=1.0),
        request(seed=7, guidance_scale=1.0, pag_scale=1.5, pag_adaptive_scale=0.001),
        request(seed=8, pag_scale=3.0, guidance_rescale=0.7),
    ]
    alone = torch.cat([pipe.generate(one, output_type="latent").images for one in several])
    for arithmetic in (None, DeviceArithmetic):
        rows = [pipe.prepare(one).rows[0] for one in several]
        running = Rows(pipe.engine, rows, SIDE, SIDE, arithmetic)
        while running.active:
            running.tick()
        same(alone, running.latents)


def test_calls_of_one_module_do_not_mix(pair: tuple[Any, Any]) -> None:
    """An eager network holds which rows are perturbed while it runs."""
    opened = pair[1].engine
    model = opened.manifest.model
    source = torch.Generator().manual_seed(0)
    given = []
    for perturbed in (0.0, 1.0) * 8:
        shift = torch.randn(1, model.time_shift_width, generator=source)
        shift[:, -1] = perturbed
        context = torch.randn(1, 77, model.context_width, generator=source)
        given.append(
            {"sample": torch.randn(1, 4, 8, 8, generator=source), "time_shift": shift, "context": context}
        )
    expected = [opened.call("unet", one, SIDE, SIDE)["output"] for one in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: opened.call("unet", one, SIDE, SIDE)["output"], given))
    for one, other in zip(found, expected, strict=True):
        same(other, one)


@pytest.mark.slow
def test_an_onnx_engine_draws_what_an_eager_one_does(
    flat_sd: Path, parsed_once: None, tmp_path: Path
) -> None:
    recipe = {"sizes": FLAT_SIZES, "batch": 2, "pag": ["mid"]}
    eager, onnx = (
        ours(export(flat_sd, tmp_path / backend, Recipe.make(backend=backend, **recipe)))
        for backend in ("eager", "onnx")
    )
    for guidance in (1.0, 7.0):
        call = {"guidance_scale": guidance, "num_images_per_prompt": 2, "height": 24, "width": 32}
        call |= {"num_inference_steps": 3, "seed": 1, "output_type": "latent", "pag_scale": 2.0}
        drawn = eager(PROMPT, **call).images
        same(drawn, onnx(PROMPT, **call).images)
        assert far(drawn, eager(PROMPT, **{**call, "pag_scale": 0.0}).images)
    assert onnx.engine.manifest.modules["unet"].variants[0].batch.high == 6


def test_engines_without_it_are_as_they_were(tiny_sd: Path) -> None:
    checkpoint = resolve(str(tiny_sd))
    plain, perturbed = Networks.of(checkpoint), Networks.of(checkpoint, pag=("mid",))
    assert plain.step().switch is None
    assert all(getattr(layer, "switch", None) is None for layer in plain.step().modules())
    assert perturbed.model().time_shift_width == plain.model().time_shift_width + 1
    assert perturbed.perturbed == ("mid_block.attentions.0.transformer_blocks.0.attn1",)
    assert Recipe.make(batch=[2], pag=["mid"]).pag == ("mid",)


def test_the_layers_are_those_that_diffusers_finds(tiny_sdxl: Path) -> None:
    checkpoint, kind = resolve(str(tiny_sdxl)), "StableDiffusionXLPAGPipeline"
    for pattern in ("mid", "down", r"up_blocks\.0\.attentions\.(0|1)", "transformer_blocks.1", "attn1"):
        reference = stock(tiny_sdxl, [pattern], kind)
        reference._set_pag_attn_processor([pattern], do_classifier_free_guidance=True)
        found = {name.removesuffix(".processor") for name in reference.pag_attn_processors}
        assert found and set(Networks.of(checkpoint, pag=(pattern,)).perturbed) == found


@pytest.mark.parametrize(
    ("pag", "message"),
    [
        (
            ["middle"],
            "pag: 'middle' is in no name of a self-attention layer of this U-Net; they are in: down_",
        ),
        (["mid", "("], r"pag: '\(' is no regular expression"),
    ],
)
def test_layers_that_there_are_not_are_refused(
    tiny_sd: Path, tmp_path: Path, pag: list[str], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", pag=pag))
    assert not (tmp_path / "engine").exists()


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def controlled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same under a ControlNet."""
    checkpoint, layers = request.getfixturevalue(f"tiny_{request.param}"), LAYERS[request.param]
    kind = f"StableDiffusion{'XL' * (request.param == 'sdxl')}ControlNetPAGPipeline"
    place = tmp_path_factory.mktemp("controlled")
    net = checkpoints.build_controlnet(place / "canny", checkpoint)
    recipe = Recipe.make(backend="eager", pag=layers, controlnet=net)
    own = getattr(drop_in, kind).from_engine(export(checkpoint, place / "engine", recipe), threads=1)
    own.set_progress_bar_config(disable=True)
    return stock(checkpoint, layers, kind, controlnet=diffusers.ControlNetModel.from_pretrained(net)), own


@pytest.mark.parametrize("name", ["defaults", "no negative prompt", "several prompts and pictures"])
def test_under_a_controlnet_it_equals_stock_diffusers(controlled: tuple[Any, Any], name: str) -> None:
    call = {"image": image(), "controlnet_conditioning_scale": 0.8, **CALLS[name]}
    expected, drawn = both(controlled, **call, control_guidance_end=0.75)
    same(expected, drawn)
    without = both((controlled[0], controlled[1]), **{**call, "pag_scale": 0.0})[1]
    assert far(drawn, without)


def test_under_a_controlnet_over_an_image_it_equals_stock_diffusers(controlled: tuple[Any, Any]) -> None:
    """By the drop-ins that there are: of SD with a mask, of SDXL without one. The others diffusers lacks."""
    xl = "XL" in type(controlled[0]).__name__
    there, lacking = ("Img2Img", "Inpaint") if xl else ("Inpaint", "Img2Img")
    kind = type(controlled[0]).__name__.replace("PAG", f"PAG{there}")
    theirs = getattr(diffusers, kind).from_pipe(
        controlled[0], pag_applied_layers=LAYERS["sdxl" if xl else "sd"]
    )
    theirs.set_progress_bar_config(disable=True)
    own = getattr(drop_in, kind)(controlled[1].engine)
    own.set_progress_bar_config(disable=True)
    call = {"image": image(1), "control_image": image(2), "strength": 0.7, "num_inference_steps": 5}
    same(*both((theirs, own), **call, **({} if xl else {"mask_image": mask()})))
    asked = Request.make(**ASKED, strength=0.7, controlnet_conditioning_scale=1.0)
    over = Over(torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, 1, SIDE, SIDE) if xl else None)
    with pytest.raises(
        RequestError, match=f"diffusers has no .*ControlNetPAG{lacking}Pipeline; leave it out"
    ):
        generate(controlled[0], asked, over=over, control=torch.zeros(1, 3, SIDE, SIDE))


ASKED = {
    **{"prompts": ("a",), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "seed": 1},
    **{"num_inference_steps": 3, "pag_scale": 2.0},
}


def test_under_a_controlnet_it_is_validated(controlled: tuple[Any, Any]) -> None:
    report = validate(controlled[1].engine, prompts=["a boat"], steps=3)
    assert report.passed, report.table()
    assert "ControlNetPAGPipeline in float32" in report.setting.reference
    assert "PAG 3 " in report.table()


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_a_drop_in_over_an_image_draws_what_diffusers_class_draws(pair: tuple[Any, Any], task: str) -> None:
    """By places alone, most of them at diffusers' defaults."""
    kind = type(pair[0]).__name__.replace("PAG", f"PAG{task}")
    theirs = getattr(diffusers, kind).from_pipe(pair[0], pag_applied_layers=pair[0].pag_applied_layers)
    own = getattr(drop_in, kind)(pair[1].engine)
    theirs.scheduler = own.scheduler = diffusers.DDIMScheduler.from_config(pair[0].scheduler.config)
    args = (PROMPT, *[None] * ("XL" in kind), image(1), *[mask()] * (task == "Inpaint"))
    size = {"height": SIDE, "width": SIDE} if task == "Inpaint" else {}
    drawn = []
    for pipe in (theirs, own):
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 4, "output_type": "latent", "strength": 0.6, **size}
        drawn.append(pipe(*args, **call, generator=seeded(1)).images)
    same(*drawn)


def test_a_controlnet_that_pools_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    net = checkpoints.build_controlnet(tmp_path / "shuffle", tiny_sd, global_pool_conditions=True)
    with pytest.raises(ExportError, match=r"pag: .*shuffle: a ControlNet that pools guides the prompt alone"):
        export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", pag=["mid"], controlnet=net))


def test_recipes_that_it_does_not_go_with_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="pag"):
        Recipe.make(pag=[""])
    kind = "StableDiffusionInstructPix2PixPipeline"
    checkpoint = checkpoints.build_sd(tmp_path / "sd", in_channels=8, pipeline=kind)
    with pytest.raises(ExportError, match="pag: an InstructPix2Pix U-Net is guided by the image"):
        export(checkpoint, tmp_path / "engine", Recipe.make(backend="eager", pag=["mid"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pag_scale": -1.0}, "pag_scale: must be greater than or equal to 0"),
        ({"pag_scale": 1000.0}, "pag_scale: must be less than or equal to 100"),
        ({"pag_adaptive_scale": 0.1}, "pag_adaptive_scale: lowers pag_scale; give that too"),
        ({"pag_scale": 1.0, "guidance_end": 0.5}, "pag_scale: guides in all steps"),
        ({"pag_scale": 1.0, "guidance_start": 0.5}, "pag_scale: guides in all steps"),
        ({"pag_scale": 1.0, "image_guidance_scale": 1.5}, "pag_scale: is not for engines that edit"),
        (
            {"pag_scale": 1.0, "prompt": "a AND b", "emphasis": "original"},
            "pag_scale: is not for prompts that AND adds up",
        ),
    ],
)
def test_requests_that_it_does_not_go_with_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        request(**fields)


def test_an_engine_without_layers_for_it_says_how_to_get_one(open_batcher: Open) -> None:
    drawing = Pipeline(FakeEngine())
    with pytest.raises(RequestError, match=r"^pag_scale: 3, but this engine .* --pag mid"):
        drawing(PROMPT, pag_scale=3.0)
    with pytest.raises(RequestError, match=r"^pag_scale: 3, but this engine"):
        drop_in.StableDiffusionPAGPipeline(FakeEngine())(PROMPT)
    with pytest.raises(RequestError, match=r"^pag_scale: 1, but this engine"):
        submit(open_batcher(FakeEngine()), request(height=16, width=16, pag_scale=1.0))


def test_jobs_are_the_pipelines_pictures_beside_others(open_batcher: Open) -> None:
    """In one batch; and their parameters tell it."""
    engine = FakeEngine(pag=("mid",))
    drawing, batcher = Pipeline(FakeEngine(pag=("mid",))), open_batcher(engine, max_rows=4)
    asked: list[dict[str, Any]] = [{}, {"pag_scale": 3.0}, {"pag_scale": 2.5, "pag_adaptive_scale": 0.001}]
    size = {"height": 16, "width": 16}
    with Held(engine):
        ears = [submit(batcher, request("a", **{**size, "seed": i}, **asked[i])) for i in range(3)]
    for i, fields in enumerate(asked):
        [png] = ears[i].done().pngs
        call = {"num_inference_steps": 3, "guidance_scale": 7.5, **size}
        [due] = drawing("a", seed=i, **fields, **call).images
        assert np.abs(pixels(png) - np.asarray(due, np.int16)).max() == 0
    assert max(engine.calls["unet"]) == 8
    told = [infotext.parse(Image.open(io.BytesIO(ear.done().pngs[0])).info["parameters"]) for ear in ears]
    assert [dict(one.extra) for one in told] == [
        {},
        {"PAG scale": "3"},
        {"PAG scale": "2.5", "PAG adaptive scale": "0.001"},
    ]
    assert info_of(engine.manifest).pag and not info_of(FakeEngine().manifest).pag


def test_a_refiner_without_layers_for_it_has_none() -> None:
    asked = request(pag_scale=3.0, pag_adaptive_scale=0.001)
    for pag in ((), ("mid",)):
        begun, finished = halves(asked, 0.8, FakeEngine(pag=pag).manifest.model)
        assert begun.pag_scale == 3.0
        assert (finished.pag_scale, finished.pag_adaptive_scale) == ((3.0, 0.001) if pag else (0.0, 0.0))


def test_on_the_command_line(tiny_sd: Path, tmp_path: Path) -> None:
    folder, picture = tmp_path / "engine", tmp_path / "a.png"
    line = ["export", str(tiny_sd), "-o", str(folder), "--backend", "eager", "--pag", "mid", "--pag", "up"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert "PAG          mid, up, for requests with a pag_scale" in summary(read_manifest(folder))
    draw = ["generate", "a", "--engine", str(folder), "--steps", "2", "--seed", "1", "--pag-scale", "2"]
    drawn = []
    for backend in ("engine", "diffusers"):
        more = ["--pag-adaptive-scale", "0.001", "-o", str(picture), "--overwrite", "--backend", backend]
        result = CliRunner().invoke(main, [*draw, *more])
        assert result.exit_code == 0, result.output
        drawn.append(np.asarray(Image.open(picture), np.int16))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    told = infotext.read(picture).extra
    assert (told["PAG scale"], told["PAG adaptive scale"]) == ("2", "0.001")
    changed = CliRunner().invoke(main, [*line[:-1], "down"])  # other layers, and nothing else
    stages = {text.split()[0]: text for text in changed.output.splitlines()}
    assert changed.exit_code == 0 and "kept" in stages["time_shift"] and "kept" not in stages["unet"]


def test_the_drop_ins_engine_has_diffusers_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def cached(checkpoint: object, **recipe: Any) -> Path:
        asked.append(recipe["pag"])
        raise CheckpointError("enough")

    monkeypatch.setattr("sdfast.export.first_use.cached_engine", cached)
    for given in ({}, {"pag_applied_layers": ["down", "mid"]}):
        with pytest.raises(CheckpointError):
            drop_in.StableDiffusionPAGPipeline.from_pretrained("a", **given)
    with pytest.raises(CheckpointError):
        drop_in.StableDiffusionPipeline.from_pretrained("a")
    assert asked == [("mid",), ("down", "mid"), ()]


@pytest.fixture(scope="module")
def validated(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("validated")
    return engines.build(tiny_sd, place / "engine", pag=["mid"], cache_branch=0)


def short(folder: Path) -> Report:
    return validate(folder, prompts=[PROMPT], steps=2, scheduler="Euler a")


def test_validation_holds_it_to_diffusers(validated: Path) -> None:
    report = short(validated)
    assert report.passed, report.table()
    assert "Euler a, PAG 3" in [picture.scheduler for picture in report.pictures]
    assert "StableDiffusionPAGPipeline" in report.setting.reference


def test_a_perturbation_that_is_wrong_fails(validated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are never perturbed, by half, or all of them."""
    taken = Switch.taken

    def never(switch: Switch, attended: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return attended

    def half(switch: Switch, attended: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return taken(switch, attended, (attended + values) / 2)

    def always(switch: Switch, attended: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values

    for broken, fault in ((never, "PAG 3"), (half, "PAG 3"), (always, "unet")):
        with monkeypatch.context() as patch:
            patch.setattr(Switch, "taken", broken)
            report = short(validated)
        assert any(fault in f"{one.part}: {one.reason}" for one in report.failures), report.table()
