"""Engines compiled ahead of time: the same picture, no needless compile, nothing unchecked given to code."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sdfast.backends import clock
from sdfast.backends.attention import exportable
from sdfast.backends.fp8 import scaled_mm
from sdfast.backends.inductor import Code, Inductor, Layout, in_memory
from sdfast.backends.target import check_target, this_machine
from sdfast.engine import Engine
from sdfast.errors import BackendError, EngineError, ExportError
from sdfast.export import inductor
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.code_store import CodeStore
from sdfast.export.inductor import Compiler
from sdfast.export.modules import Form, ModuleSpec, module_specs
from sdfast.export.networks import Networks
from sdfast.export.recipe import LoraSetting, Recipe
from sdfast.export.tracing import traced_with
from sdfast.manifest import Span, Target, read_manifest
from sdfast.models import ops
from sdfast.models.fp8 import Conv1x1FP8, LinearFP8
from sdfast.models.layers import Conv1x1, Linear
from sdfast.pipeline import Pipeline
from sdfast.summary import summary
from tests import checkpoints
from tests.export.loras import kohya, random_changes, write
from tests.models.conftest import randomise
from tests.sealing import reseal
from tests.test_pipeline import assert_same

CPU = torch.device("cpu")
ONE = Recipe.make(backend="inductor", sizes=["16x16"], batch=[1])
EAGER = Recipe.make(backend="eager", sizes=["16x16"])
CALL: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5}


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Code that was compiled once serves this module's tests, and no other program's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SDFAST_CACHE", str(folder))
        yield folder / "code"


@pytest.fixture(scope="module")
def decoding_sd(flat_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint without its VAE's encoder: each module takes ten seconds to compile."""
    return without_encoder(flat_sd, tmp_path_factory.mktemp("decoding") / "sd")


def without_encoder(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    encoding = ("encoder.", "quant_conv.")
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith(encoding)}
    save_file(kept, weights)
    return folder


@pytest.fixture(scope="module")
def engine(decoding_sd: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(decoding_sd, tmp_path_factory.mktemp("inductor") / "sd", ONE)


@pytest.fixture
def own(engine: Path, tmp_path: Path) -> Path:
    """A copy of the engine to be changed."""
    return Path(shutil.copytree(engine, tmp_path / "engine"))


def picture(folder: Path, prompt: str = "the sea", **call: Any) -> torch.Tensor:
    pipe = Pipeline.from_engine(folder)
    pipe.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipe(prompt, **{**CALL, **call}).images
    return latents


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("pictures", [1, 3])
def test_the_picture_is_the_eager_engines(
    engine: Path, flat_engine: Path, guidance: float, pictures: int
) -> None:
    call = {"guidance_scale": guidance, "num_images_per_prompt": pictures, "height": 16, "width": 16}
    assert_same(picture(engine, **call), picture(flat_engine, **call))


def test_every_module_is_the_eager_one(engine: Path, flat_engine: Path) -> None:
    compiled, eager = Engine.open(engine, load=True), Engine.open(flat_engine)
    model = compiled.manifest.model
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "text_encoder": {"input_ids": torch.arange(77).view(1, 77)},
        "context": {"hidden_states": random(1, 77, model.text_width)},
        "time_shift": {"timesteps": torch.tensor([500.5])},  # a free axis of 1: traced, it would be fixed
        "unet": {
            "sample": random(2, 4, 8, 8),
            "time_shift": random(2, model.time_shift_width),
            "context": random(2, 77, model.context_width),
        },
        "vae_decoder": {"latents": random(1, 4, 8, 8)},
    }
    for name, inputs in given.items():
        ours, truth = (opened.call(name, inputs, 16, 16) for opened in (compiled, eager))
        assert ours.keys() == truth.keys()
        for key, value in truth.items():
            assert ours[key].is_contiguous() and ours[key].shape == value.shape
            assert torch.linalg.norm(ours[key] - value) <= 1e-5 * torch.linalg.norm(value), name


def test_a_bound_call_writes_in_place_and_reads_what_is_there(engine: Path) -> None:
    opened = Engine.open(engine)
    model = opened.manifest.model
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "time_shift": torch.randn(2, model.time_shift_width),
        "context": torch.randn(2, 77, model.context_width),
    }
    output = torch.zeros(2, 4, 8, 8)
    run = opened.bind("unet", inputs, {"output": output}, 16, 16)
    for _ in range(2):
        inputs["sample"].normal_()
        run()
        assert torch.equal(output, opened.call("unet", inputs, 16, 16)["output"])


def test_nothing_changed_compiles_and_writes_nothing(
    decoding_sd: Path, engine: Path, compiled: list[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in engine.rglob("*")}
    export(decoding_sd, engine, ONE)
    assert compiled == []
    assert {path: path.stat().st_mtime_ns for path in engine.rglob("*")} == before


def test_a_further_form_compiles_that_alone(
    decoding_sd: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the compiler: that it then draws is a slow test's."""

    def compile_now(_program: Any, _inputs: Any, path: Path, _options: Any) -> None:
        raise CompiledAgain(path.stem)

    monkeypatch.setattr(inductor, "_compile", compile_now)
    with pytest.raises(CompiledAgain, match=r"^unet-16x16-b4$"):
        export(decoding_sd, own, Recipe.make(backend="inductor", sizes=["16x16"], batch=[1, 2]))
    export(decoding_sd, own, ONE)


@pytest.mark.slow
def test_a_further_form_draws_as_the_others(decoding_sd: Path, own: Path, compiled: list[str]) -> None:
    export(decoding_sd, own, Recipe.make(backend="inductor", sizes=["16x16"], batch=[1, 2]))
    assert compiled == ["unet-16x16-b4"]
    two = picture(own, num_images_per_prompt=2)
    assert_same(two[:1], picture(own))


@pytest.mark.slow
def test_an_encoder_is_the_eager_one(
    flat_sd: Path, own: Path, flat_engine: Path, compiled: list[str]
) -> None:
    """And an engine that had none is given it alone."""
    export(flat_sd, own, ONE)
    assert compiled == ["vae_encoder"]
    given = {"image": torch.randn(1, 3, 16, 16)}
    ours, truth = (Engine.open(one).call("vae_encoder", given, 16, 16) for one in (own, flat_engine))
    for key, value in truth.items():
        assert torch.linalg.norm(ours[key] - value) <= 1e-5 * torch.linalg.norm(value), key


@pytest.mark.slow
def test_a_second_size_compiles_that_alone(decoding_sd: Path, own: Path, compiled: list[str]) -> None:
    recipe = Recipe.make(backend="inductor", sizes=["16x16", "24x16"], batch=[1])
    export(decoding_sd, own, recipe)
    assert sorted(compiled) == ["unet-24x16-b1", "unet-24x16-b2", "vae_decoder-24x16"]
    wide = picture(own, width=24, height=16)
    assert wide.shape == (1, 4, 8, 12)
    assert_same(picture(own, width=16, height=16), picture(own))


def test_another_checkpoint_of_the_same_networks_is_not_compiled(
    engine: Path, tmp_path: Path, compiled: list[str]
) -> None:
    """And draws its own picture: the weights are none of the code's."""
    other = without_encoder(checkpoints.build_flat_sd(tmp_path / "flat", seed=1), tmp_path / "other")
    swapped = export(other, tmp_path / "swapped", ONE)
    assert compiled == []
    eager = export(other, tmp_path / "eager", EAGER)
    ours = picture(swapped)
    assert_same(ours, picture(eager))
    assert torch.linalg.norm(ours - picture(engine)) > 0.1 * torch.linalg.norm(ours)


def test_a_lora_is_not_compiled(decoding_sd: Path, engine: Path, tmp_path: Path, compiled: list[str]) -> None:
    """It is other weights, of the same networks."""
    lora = write(tmp_path / "lora.safetensors", random_changes(decoding_sd), kohya)
    ours = export(
        decoding_sd, tmp_path / "ours", ONE.model_copy(update={"loras": (LoraSetting(source=str(lora)),)})
    )
    assert compiled == []
    eager = export(
        decoding_sd, tmp_path / "eager", Recipe.make(backend="eager", sizes=["16x16"], loras=[lora])
    )
    assert_same(picture(ours), picture(eager))
    assert torch.linalg.norm(picture(ours) - picture(engine)) > 0.1 * torch.linalg.norm(picture(ours))


@pytest.mark.slow
def test_rows_that_are_perturbed_share_one_compiled_module(
    decoding_sd: Path, engine: Path, tmp_path: Path, compiled: list[str]
) -> None:
    """Of a U-Net that is compiled for it, and nothing else of the engine is compiled anew."""
    assert engine.is_dir()
    recipe = {"sizes": ["16x16"], "batch": [1], "pag": ["mid"]}
    ours, eager = (
        export(decoding_sd, tmp_path / backend, Recipe.make(backend=backend, **recipe))
        for backend in ("inductor", "eager")
    )
    assert compiled and all("unet" in form for form in compiled)
    drawn = [picture(ours, pag_scale=scale) for scale in (0.0, 3.0)]
    for scale, latents in zip((0.0, 3.0), drawn, strict=True):
        assert_same(latents, picture(eager, pag_scale=scale))
    assert torch.linalg.norm(drawn[0] - drawn[1]) > 0.01 * torch.linalg.norm(drawn[0])


def test_engines_of_one_checkpoint_share_their_weights(
    decoding_sd: Path, engine: Path, compiled: list[str]
) -> None:
    second = export(decoding_sd, engine.parent / "second", ONE)
    large = [path for path in engine.glob("*.safetensors") if path.stat().st_size >= 2**20]
    assert large
    assert all(path.samefile(second / path.name) for path in large)
    damaged = large[0]
    content = damaged.read_bytes()
    with damaged.open("r+b") as file:  # both engines have this file now: both tell
        file.write(b"\0" * 16)
    try:
        for folder in (engine, second):
            with pytest.raises(EngineError, match=r"digest .* was exported"):
                Engine.open(folder)
        third = export(decoding_sd, engine.parent / "third", ONE)  # which does not link to what is damaged
        assert not (third / damaged.name).samefile(damaged)
        Engine.open(third)
    finally:
        with damaged.open("r+b") as file:
            file.write(content)
        shutil.rmtree(second)
        shutil.rmtree(engine.parent / "third")


@pytest.mark.parametrize("kind", ["sdpa", "flash", "math"])
def test_attention_is_the_fastest_kernel_for_each_shape(
    flat_sd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """What was measured is what is traced, and is told."""
    kernels = exportable(CPU)
    fastest = kernels[kind]
    monkeypatch.setattr(clock, "milliseconds", lambda run, _: 1.0 if run.__defaults__ == (fastest,) else 2.0)
    spec = unet_spec(flat_sd)
    compiler = Compiler(this_machine(CPU), autotune=True, store=CodeStore(tmp_path))
    network = spec.load()
    inputs, _ = traced_with(spec, spec.forms[0])
    chosen = compiler._choose(network, inputs, inductor._Rounded(), fixed=True)
    told = chosen.attention
    assert told and all(f": {kind} (" in line for line in told)
    assert chosen.attention_taken == {line.partition(":")[0]: kind for line in told}
    operations = {
        "sdpa": "scaled_dot_product_attention.default",
        "flash": "_scaled_dot_product_flash_attention_for_cpu",
        "math": "_scaled_dot_product_attention_math",
    }
    graph = str(inductor._trace(network, inputs, {}).graph)
    assert [kind for kind, name in operations.items() if name in graph] == [kind]
    free = compiler._choose(network, inputs, inductor._Rounded(), fixed=False)
    assert (free.attention, free.attention_taken) == ((), {})
    assert operations["sdpa"] in str(inductor._trace(network, inputs, {}).graph)


def test_attention_that_was_measured_once_is_not_measured_again(
    flat_sd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a second export traces what the first has compiled, whatever the clock would say now."""
    spec, timed, times = unet_spec(flat_sd), list[str](), dict.fromkeys(exportable(CPU), 2.0)

    def time(run: Any, _: torch.device) -> float:
        [kernel] = run.__defaults__
        timed.append(next(kind for kind, one in exportable(CPU).items() if one is kernel))
        return times[timed[-1]]

    monkeypatch.setattr(clock, "milliseconds", time)
    inputs, _ = traced_with(spec, spec.forms[0])
    told = []
    for fastest, taken in (("flash", 1.0), ("math", 0.5)):
        times[fastest] = taken
        compiler = Compiler(this_machine(CPU), autotune=True, store=CodeStore(tmp_path))
        told.append(compiler._choose(spec.load(), inputs, inductor._Rounded(), fixed=True).attention)
    assert told[0] == told[1]
    assert all(": flash (" in line for line in told[1])
    assert len(timed) == len(told[0]) * len(exportable(CPU))
    (tmp_path / "choices.json").write_text("{")
    compiler = Compiler(this_machine(CPU), autotune=True, store=CodeStore(tmp_path))
    again = compiler._choose(spec.load(), inputs, inductor._Rounded(), fixed=True).attention
    assert all(": math (" in line for line in again)


def test_an_older_description_still_opens(own: Path) -> None:
    edit(DECODER, lambda document: [document.pop(name) for name in ("attention", "kernels")])(own)
    reseal(own, lambda document: None)
    Engine.open(own, load=True)


def test_what_was_made_of_weights_is_no_part_of_the_code() -> None:
    """It would be right for one checkpoint, and taken for every other."""
    traced = [torch.arange(4.0), "not a tensor"]
    assert inductor._literal("frequencies", torch.arange(4.0), traced).values == (0, 1, 2, 3)
    for made in (torch.arange(4.0) + 1, torch.arange(4.0).half(), torch.arange(5.0)):
        with pytest.raises(ExportError, match=r"packed: the compiler made .* of the weights"):
            inductor._literal("packed", made, traced)


class FP8Layers(nn.Module):
    """A convolution of one pixel, then a linear layer, as they are in a U-Net."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv = Conv1x1FP8(randomise(Conv1x1(32, 48), seed).half())
        self.linear = LinearFP8(randomise(Linear(48, 16), seed).half())
        self.conv.product = self.linear.product = scaled_mm

    def forward(self, sample: torch.Tensor) -> torch.Tensor:  # [B, 32, H, W] -> [B, H W, 16]
        y: torch.Tensor = self.linear(ops.tokens_from_image(self.conv(sample)))
        return y


@pytest.mark.slow
def test_fp8_layers_take_their_weights_and_scales_from_the_engine(
    tmp_path: Path, compiled: list[str]
) -> None:
    """Compiled for a processor, which has their product too; other weights need no compile."""
    compiler = Compiler(this_machine(CPU), autotune=False, store=CodeStore(tmp_path / "store"))
    sample = torch.randn(2, 32, 4, 4).half()
    one = {"sample": sample}
    for seed in (0, 1):
        place, network = tmp_path / str(seed), FP8Layers(seed)
        place.mkdir()
        forms = (Form(Span.exactly(1)),)
        spec = ModuleSpec("layers", lambda n=network: n, lambda *_: one, {}, ("y",), (), forms)
        compiler.compile(spec, place)
        ours = Inductor(CPU).load(place / "layers.pt2")(one)["y"].float()
        truth = network(sample).float()
        assert torch.linalg.norm(ours - truth) <= 0.01 * torch.linalg.norm(truth)
        stored = load_file(place / "layers.safetensors")
        assert stored["linear.weight"].dtype == ops.FP8
        assert stored["linear.scale"].dtype == torch.float32
    assert compiled == ["layers"]


def unet_spec(checkpoint: Path) -> ModuleSpec:
    return module_specs(Networks.of(resolve(checkpoint)), ONE)[0]


@pytest.mark.slow
def test_an_autotuned_engine_draws_the_same_picture(
    shallow_sd: Path, shallow_engine: Path, tmp_path: Path
) -> None:
    recipe = Recipe.make(backend="inductor", sizes=["16x16"], batch=[1], autotune=True)
    tuned = export(shallow_sd, tmp_path / "tuned", recipe)
    code = Code.model_validate_json((tuned / "unet-16x16-b2.json").read_bytes())
    assert code.attention
    manifest = read_manifest(tuned)
    taken = manifest.modules["unet"].variants[1].attention
    assert sorted(f"{what}: {kind}" for what, kind in taken.items()) == [
        line.partition(" (")[0] for line in code.attention
    ]
    assert "\nattention    " in summary(manifest)
    assert_same(picture(tuned), picture(shallow_engine, width=16, height=16))


@pytest.mark.slow
def test_free_sizes_and_batches(shallow_sd: Path, shallow_engine: Path, tmp_path: Path) -> None:
    """One package for a range of sizes: also for a batch of one, which tracing would have made static."""
    sizes = {"min": "16x16", "max": "32x32"}
    free = export(shallow_sd, tmp_path / "free", Recipe.make(backend="inductor", sizes=sizes, batch=2))
    assert [v.file for v in read_manifest(free).modules["unet"].variants] == ["unet.pt2"]
    for call in ({"width": 16, "height": 24}, {"width": 32, "height": 24, "guidance_scale": 1.0}):
        assert_same(picture(free, **call), picture(shallow_engine, **call))
    three = {"num_images_per_prompt": 3, "width": 24, "height": 16}
    assert_same(picture(free, **three), picture(shallow_engine, **three))


@pytest.mark.parametrize("name", [pytest.param("vae_encoder", marks=pytest.mark.slow), "vae_decoder"])
def test_a_vae_of_free_sizes_can_be_traced(shallow_sd: Path, name: str) -> None:
    """Channels last, its encoder halves sides that torch.export must know to be even."""
    recipe = Recipe.make(backend="inductor", sizes={"min": "16x16", "max": "32x32"}, batch=2)
    spec = next(one for one in module_specs(Networks.of(resolve(shallow_sd)), recipe) if one.name == name)
    network = inductor.laid_out_for(spec.load(), "cpu")
    inputs, dynamic = traced_with(spec, spec.forms[0])
    program = inductor._trace(network, inputs, dynamic)
    for height, width in ((16, 16), (24, 32)):
        given = spec.inputs(1, height, width, 77)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(**given), network(**given))


class CompiledAgain(Exception):
    """Raised where the compiler would be called."""


def test_a_changed_entry_of_the_store_is_compiled_again(
    decoding_sd: Path, engine: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_now(_program: Any, _inputs: Any, path: Path, _options: Any) -> None:
        raise CompiledAgain(path.stem)

    entries = {Code.model_validate_json(path.read_bytes()).module: path for path in store.glob("*/code.json")}
    package = entries["context"].with_name("code.pt2")
    whole = package.read_bytes()
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 1
    package.unlink()  # it is a link to the engine's own
    package.write_bytes(changed)
    monkeypatch.setattr(inductor, "_compile", compile_now)
    with pytest.raises(CompiledAgain, match=r"^context$"):
        export(decoding_sd, tmp_path / "again", ONE)
    assert not package.exists()
    files = {"code.pt2": engine / "context.pt2", "code.json": engine / "context.json"}
    CodeStore(store).keep(package.parent.name, files)  # for the tests that come
    assert package.read_bytes() == whole


def test_a_store_takes_only_whole_entries(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("code.pt2", "code.json")}
    for name, path in files.items():
        path.write_text(name)
    store = CodeStore(tmp_path / "store")
    store.keep("key", files)
    store.keep("key", files)  # the second of two exporters
    targets = {name: tmp_path / f"taken-{name}" for name in files}
    assert store.take("key", targets)
    assert targets["code.pt2"].read_text() == "code.pt2"
    assert not store.take("another", {name: tmp_path / f"other-{name}" for name in files})
    (tmp_path / "store/key/code.json").unlink()
    assert not store.take("key", {name: tmp_path / f"late-{name}" for name in files})
    assert not (tmp_path / "store/key").exists()


TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "torch": ({"torch": "2.11.0"}, r"compiled for torch 2\.11\.0, and this machine has 2\."),
    "architecture": ({"architecture": "x86_64 avx1024"}, "compiled for architecture x86_64 avx1024"),
    "device": ({"device": "cuda", "architecture": "sm_90"}, "for device 'cuda' and was opened on 'cpu'"),
}


@pytest.mark.parametrize(("change", "message"), TARGETS.values(), ids=TARGETS)
def test_code_for_another_machine_is_refused_with_both_values(
    own: Path, change: dict[str, Any], message: str
) -> None:
    reseal(own, lambda document: document["builder"]["target"].update(change))
    with pytest.raises(BackendError, match=message) as refusal:
        Engine.open(own, "cpu")
    assert f"sdfast rebuild {own}" in str(refusal.value) or "device" in change


def test_a_richer_processor_and_a_newer_driver_serve() -> None:
    here = this_machine(CPU)
    lesser = here.model_copy(update={"architecture": here.architecture.split()[0]})
    check_target(lesser, CPU, "rebuild")
    known = Target(device="cuda", architecture="sm_90", torch="2.13.0", cuda="13.0", driver=13000)
    from sdfast.backends.target import _serves

    assert _serves("driver", known.driver, 13010)
    assert not _serves("driver", known.driver, 12080)
    assert not _serves("architecture", "sm_90", "sm_89")


def test_cuda_without_a_device_is_refused_before_anything_is_read(shallow_sd: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ExportError, match=r"needs a CUDA device.*take --device cpu"):
        export(shallow_sd, tmp_path / "engine", Recipe.make(backend="inductor", dtype="fp16"))
    assert not (tmp_path / "engine").exists()


Change = Callable[[Path], None]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def edited(folder: Path) -> None:
        document = json.loads((folder / name).read_text("utf-8"))
        change(document)
        (folder / name).write_text(json.dumps(document), "utf-8")

    return edited


def drop_weight(folder: Path) -> None:
    state = load_file(folder / "vae_decoder.safetensors")
    del state[sorted(state)[0]]
    save_file(state, folder / "vae_decoder.safetensors")


def first(document: dict[str, Any]) -> dict[str, Any]:
    layout: dict[str, Any] = document["constants"][sorted(document["constants"])[0]]
    return layout


DECODER, INDEX = "vae_decoder.json", "vae_decoder.index.json"
DAMAGED: dict[str, tuple[Change, str]] = {
    "a missing constant": (edit(DECODER, lambda d: d["constants"].popitem()), "differ in the constant"),
    "an unknown constant": (
        edit(DECODER, lambda d: d["literals"].update(x={"dtype": "float32", "shape": [1], "values": [1.0]})),
        "differ in the constant 'x'",
    ),
    "another shape": (edit(DECODER, lambda d: first(d).update(shape=[3], stride=[1])), "numbers, but"),
    "another dtype": (edit(DECODER, lambda d: first(d).update(dtype="float16")), "the code was compiled for"),
    "not a description": (lambda folder: (folder / DECODER).write_text("{"), "cannot be read"),
    "unknown fields": (edit(DECODER, lambda d: d.update(run="rm")), "cannot be read"),
    "an index that leads out": (
        edit(INDEX, lambda d: d.update(dict.fromkeys(d, "../unet.safetensors"))),
        "names files that are not beside it",
    ),
    "an index without it": (edit(INDEX, lambda d: d.clear()), "not among those of the engine"),
    "a weight that is not in the file": (drop_weight, "no weight"),
    "not a package": (lambda folder: (folder / "vae_decoder.pt2").write_bytes(b"PK"), "cannot be loaded"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_does_not_fit_the_code_never_reaches_it(own: Path, damage: Change, message: str) -> None:
    """Sealed again, so that no digest tells: the code itself would compute nonsense, or end the process."""
    damage(own)
    reseal(own, lambda document: None)
    opened = Engine.open(own)
    with pytest.raises(EngineError, match=message):
        opened.load()


def test_inputs_that_do_not_fit_are_refused(engine: Path) -> None:
    module = Inductor(CPU).load(engine / "context.pt2")
    right = torch.randn(1, 77, Engine.open(engine).manifest.model.text_width)
    assert module({"hidden_states": right})["context"].shape[:2] == (1, 77)
    wrong = {
        "float16 ": right.half(),
        r"\[2, 77": right.repeat(2, 1, 1),
        r"\[77, ": right[0],
        "not contiguous": right.transpose(1, 2).contiguous().transpose(1, 2),
    }
    for message, tensor in wrong.items():
        with pytest.raises(BackendError, match=message):
            module({"hidden_states": tensor})
    with pytest.raises(BackendError, match="needs the input 'hidden_states'"):
        module({})


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (8, 4, 3, 3), (1, 4, 1, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_a_weight_is_stored_as_it_lies(shape: tuple[int, ...], last: bool) -> None:
    tensor = torch.randn(shape)
    if last and len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    stored = inductor._as_it_lies(tensor)
    assert stored.is_contiguous()
    back = in_memory(stored, Layout.of(tensor))
    assert torch.equal(back, tensor) and back.stride() == tensor.stride()


def test_large_weights_go_to_several_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inductor, "SHARD", 100)
    weights = {f"w{i}": torch.full((10,), float(i)) for i in range(5)} | {"big": torch.zeros(100)}
    inductor._write_weights(weights, "unet", tmp_path)
    index = json.loads((tmp_path / "unet.index.json").read_text())
    assert len(set(index.values())) == 4
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / file)[name], weights[name])
        assert (tmp_path / file).stat().st_mode & 0o044 == 0o044


def test_a_compiler_that_is_not_there_is_said(
    shallow_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDFAST_CACHE", str(tmp_path / "empty"))

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")

    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    with pytest.raises(ExportError, match=r"unet.* cannot be compiled: .*apt-get install g\+\+"):
        export(shallow_sd, tmp_path / "engine", ONE)
    assert not (tmp_path / "engine").exists()


def test_the_description_says_what_was_compiled(engine: Path) -> None:
    code = Code.model_validate_json((engine / "unet-16x16-b2.json").read_bytes())
    assert [entry.name for entry in code.inputs] == ["sample", "time_shift", "context"]
    assert code.inputs[0].shape == (2, 4, 8, 8)
    assert code.outputs == ("output",)
    convolution = code.constants["conv_in.weight"]
    assert convolution.stride[1] == 1  # channels-last
    shifts = Code.model_validate_json((engine / "time_shift.json").read_bytes())
    assert shifts.inputs[0].shape == ((1, 1000),)
    assert len(shifts.literals) == 1  # the sinusoid's frequencies
