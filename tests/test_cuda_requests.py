"""What requests ask for, on a GPU: no step waits, each kind of tick is one graph, memory is given back, and
pictures are those of the processor."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdfast.engine import Engine
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.graph import Graph
from sdfast.ip_adapter import read_images
from sdfast.loop import Rows
from sdfast.manifest import Model
from sdfast.pipeline import Pipeline
from sdfast.request import Hires, Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Job
from tests import checkpoints
from tests.export.embeddings import automatic1111
from tests.export.loras import peft, random_changes, write
from tests.server.test_batcher import Ear
from tests.test_image_to_image import image

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device"),
]

LONG = "a cabin in the misty mountains, the sea and a boat, " * 4  # 96 tokens, of which two chunks are made
CHUNKS = {"long_prompts": "chunk"}
LARGE = {"height": 32, "width": 32, "strength": 0.6, "num_inference_steps": 4}
CONTROLS = [image(1, 16, 16), image(2, 16, 16)]
# Of engines: with all that goes together, with one ControlNet and perturbed layers, with two ControlNets,
# with LoRAs and an IP-Adapter, one that edits images, and one with a tiny VAE.
MOST, CONTROL, CONTROL_2, LIKE, EDITS, TINY = "most", "control", "control 2", "like", "edits", "tiny"


@dataclass(frozen=True)
class Ask:
    """call: of a pipeline. graphs: how many kinds of ticks it has. plain: what it is like without.
    kind: of its engine."""

    call: dict[str, Any]
    graphs: int
    plain: dict[str, Any]
    kind: str = MOST


ASKS = {
    "a prompt of two chunks": Ask({"prompt": LONG, **CHUNKS}, 1, {"long_prompts": "truncate"}),
    "a negative prompt of three": Ask(
        {"negative_prompt": LONG * 2, **CHUNKS}, 1, {"long_prompts": "truncate"}
    ),
    "emphasis": Ask({"prompt": "a (cabin:4)", "emphasis": "original"}, 1, {"emphasis": "ignore"}),
    "guidance in the middle": Ask({"guidance_start": 0.2, "guidance_end": 0.7}, 2, {"guidance_start": 0.0}),
    "an embedding": Ask({"prompt": "a cabin, zq-style"}, 1, {"prompt": "a cabin"}),
    "prompts that change": Ask(
        {"prompt": "a [boat|zq-style] in [mist:rain:2]", "prompt_editing": True, "scheduler": "ddim"},
        1,
        {"prompt": "a boat in mist"},
    ),
    "prompts that change, of other lengths": Ask(
        {"prompt": f"a [boat:zq-style, {LONG}:3]", "prompt_editing": True, **CHUNKS, "scheduler": "ddim"},
        1,
        {"prompt": "a boat"},
    ),
    "a second pass over latents": Ask({"hires": LARGE}, 2, {"hires": {**LARGE, "strength": 1.0}}),
    "a second pass over pictures": Ask({"hires": {**LARGE, "upscaler": "lanczos"}}, 2, {"hires": LARGE}),
    "shallow steps": Ask({"cache_interval": 3}, 2, {"cache_interval": 1}),
    "shallow steps and guidance that ends": Ask(
        {"cache_interval": 3, "guidance_end": 0.6}, 4, {"cache_interval": 1}
    ),
    "a control image": Ask({"control_image": CONTROLS[0]}, 1, {"control_image": CONTROLS[1]}, CONTROL),
    "a control image in the middle": Ask(
        {
            "control_image": CONTROLS,
            "num_images_per_prompt": 2,
            "controlnet_conditioning_scale": 1.5,
            "control_guidance_start": 0.2,
            "control_guidance_end": 0.5,
        },
        1,
        {"control_guidance_end": 1.0},
        CONTROL,
    ),
    "a control image and guidance that begins late": Ask(
        {"control_image": CONTROLS[0], "guidance_start": 0.4}, 2, {"guidance_start": 0.0}, CONTROL
    ),
    "two control images": Ask(
        {"control_image": CONTROLS, "controlnet_conditioning_scale": (1.5, 0.75)},
        1,
        {"control_image": CONTROLS[::-1]},
        CONTROL_2,
    ),
    "a control image for the prompt alone": Ask(
        {"control_image": CONTROLS[0], "control_mode": "control"}, 1, {"control_mode": "balanced"}, CONTROL
    ),
    "perturbed attention under a control image": Ask(
        {"control_image": CONTROLS[0], "pag_scale": 3.0}, 1, {"pag_scale": 0.0}, CONTROL
    ),
    "a variation": Ask(
        {"variation_seed": 3, "variation_strength": 0.4}, 1, {"variation_seed": 4, "variation_strength": 0.4}
    ),
    "a second pass over pictures of a tiny VAE": Ask(
        {"hires": {**LARGE, "upscaler": "lanczos"}}, 2, {"hires": LARGE}, TINY
    ),
    "prompts that are added up": Ask(
        {"prompt": "a boat AND zq-style :0.7 AND mist :-0.4", "emphasis": "original"},
        1,
        {"prompt": "a boat"},
    ),
    "a LoRA": Ask({"loras": {"oil": 0.8}}, 1, {"loras": {}}, LIKE),
    "an image to be like": Ask(
        {"ip_adapter_image": CONTROLS[0], "ip_adapter_scale": 0.7}, 1, {"ip_adapter_scale": 0.0}, LIKE
    ),
    "both": Ask(
        {"loras": {"oil": (0.5, -0.6)}, "ip_adapter_image": CONTROLS[1]}, 1, {"ip_adapter_scale": 0.0}, LIKE
    ),
    "an image to edit": Ask(
        {"image": CONTROLS[0], "image_guidance_scale": 2.0}, 1, {"image": CONTROLS[1]}, EDITS
    ),
}
KINDS = sorted({ask.kind for ask in ASKS.values()})
COMMON = {
    "prompt": "the sea",
    "num_inference_steps": 8,
    "seed": 5,
    "height": 16,
    "width": 16,
    "scheduler": "euler_a",
    "output_type": "latent",
}


@pytest.fixture(scope="module")
def make(shallow_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports an engine of a kind.

    Prompts matter more to its U-Net than half precision does.
    """
    place = tmp_path_factory.mktemp("cuda")
    checkpoint = Path(shutil.copytree(shallow_sd, place / "checkpoint"))
    edits = checkpoints.build_shallow_sd(place / "edits", in_channels=8)
    for folder in (checkpoint, edits):
        weights = load_file(file := folder / "unet" / "diffusion_pytorch_model.safetensors")
        for name in weights:
            if name.endswith((".attn2.to_v.weight", ".attn2.to_out.0.weight")):
                weights[name] *= 3
        save_file(weights, file)
    lora = write(place / "oil.safetensors", random_changes(checkpoint, seed=1), peft)
    adapter = checkpoints.build_ip_adapter(place / "plain.safetensors", checkpoint)
    widths = {"conditioning_embedding_out_channels": (4, 16)}
    nets = [checkpoints.build_controlnet(place / str(i), checkpoint, seed=i, **widths) for i in range(2)]
    tiny = checkpoints.build_tiny_vae(place / "tiny", levels=2)
    embedding = automatic1111(place / "zq-style.safetensors", 5)

    beside: dict[str, dict[str, Any]] = {
        CONTROL: {"controlnet": nets[:1], "pag": ["mid"]},
        CONTROL_2: {"controlnet": nets},
        LIKE: {
            "loras": [{"source": lora, "on_request": True, "name": "oil"}],
            "ip_adapters": [{"source": adapter}],
        },
        EDITS: {},
        TINY: {"vae": tiny},
        MOST: {"embeddings": [{"source": embedding}], "cache_branch": 0},
    }

    def made(name: str, *, kind: str, **recipe: Any) -> Path:
        own: dict[str, Any] = {**beside[kind], "sizes": ["16x16"], "batch": [1]}
        if kind in (MOST, TINY):
            if recipe["backend"] == "onnx":  # which captures what is of one size
                own |= {"sizes": ["16x16", "32x32"]}
            else:
                own |= {"sizes": {"min": "16x16", "max": "32x32"}, "batch": 2}
            own |= {"long_prompts": True} if recipe["backend"] == "inductor" and kind == MOST else {}
        source = edits if kind == EDITS else checkpoint
        return export(source, place / f"{name}-{kind.replace(' ', '-')}", Recipe.make(**own, **recipe))

    return made


@pytest.fixture(scope="module", params=["eager", "inductor", "onnx"])
def engines(request: pytest.FixtureRequest, make: Any) -> dict[str, Path]:
    """In half precision, by their kinds."""
    if request.param == "onnx":
        providers = pytest.importorskip("onnxruntime").get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            pytest.skip("this ONNX Runtime is not the one for CUDA")
    compiled = {"device": "cuda", "autotune": False} if request.param == "inductor" else {}
    return {
        kind: make(request.param, kind=kind, backend=request.param, dtype="fp16", **compiled)
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def exact(make: Any) -> dict[str, Pipeline]:
    """The same on the processor, in single precision; what these draw is compared with stock diffusers."""
    return {kind: Pipeline.from_engine(make("exact", kind=kind, backend="eager")) for kind in KINDS}


def draw(pipe: Pipeline, **call: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    found: torch.Tensor = pipe(**{**COMMON, **call}).images
    return found.float().cpu()


@contextmanager
def synchronisation(mode: str) -> Iterator[None]:
    """What waits for the device meanwhile: "error", or "default"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks that wait raise. Rows that move to another bucket within one take the host's time by design."""
    tick, change = Rows.tick, Rows.change

    def strict_tick(self: Rows) -> None:
        with synchronisation("error"):
            tick(self)

    def free_change(self: Rows, *args: Any, **options: Any) -> None:
        with synchronisation("default"):
            change(self, *args, **options)

    monkeypatch.setattr(Rows, "tick", strict_tick)
    monkeypatch.setattr(Rows, "change", free_change)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs, as they are captured."""
    found: list[Graph] = []
    capture = Graph._captured

    def captured(self: Graph) -> Any:
        found.append(self)
        return capture(self)

    monkeypatch.setattr(Graph, "_captured", captured)
    return found


def job(name: str, ask: Ask, model: Model) -> Job:
    """The same of a server."""
    given = {**COMMON, "negative_prompt": None, **ask.call}
    control, seen, over = (given.pop(key, None) for key in ("control_image", "ip_adapter_image", "image"))
    texts = {f"{name}s": (given.pop(name),) for name in ("prompt", "negative_prompt")}
    del given["output_type"]
    if control is not None:
        given.setdefault("controlnet_conditioning_scale", 1.0)
        several = [control] if isinstance(control, Image.Image) else control
        control = b"".join(one.tobytes() for one in several[: model.controlnets])
    if seen is not None:
        given.setdefault("ip_adapter_scale", 1.0)
        seen = read_images(model, seen).numpy().tobytes()
    if "hires" in given:
        given["hires"] = Hires.make(**given["hires"])
    request = Request.make(**texts, **given)
    return Job(name, "engine", request, image=over and over.tobytes(), control=control, ip_adapter=seen)


@pytest.mark.parametrize("name", ASKS)
def test_no_step_waits_and_each_kind_of_tick_is_one_graph(
    engines: dict[str, Path], name: str, strict: None, captures: list[Graph]
) -> None:
    ask = ASKS[name]
    pipe = Pipeline.from_engine(engines[ask.kind], "cuda")
    for _ in range(4):  # a tick that comes once in a picture is captured in the second one
        draw(pipe, **ask.call)
    assert len(captures) == len(set(captures)) == ask.graphs


@pytest.mark.parametrize("name", ASKS)
def test_memory_is_given_back(engines: dict[str, Path], name: str) -> None:
    ask = ASKS[name]

    def drawn() -> int:
        pipe = Pipeline.from_engine(engines[ask.kind], "cuda")
        for _ in range(2):
            draw(pipe, **ask.call)
        del pipe
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = drawn()
    assert drawn() - before < 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_draws_all_of_them_side_by_side(engines: dict[str, Path], kind: str) -> None:
    engine = Engine.open(engines[kind], "cuda")
    asks = [ask for ask in ASKS.values() if ask.kind == kind]
    batcher, ears = Batcher(engine, max_rows=3), [Ear() for _ in asks]
    try:
        for i, (ask, ear) in enumerate(zip(asks, ears, strict=True)):
            batcher.submit(job(str(i), ask, engine.manifest.model), ear)
        for ear in ears:
            assert ear.done().pngs
    finally:
        assert batcher.close(drain=False, timeout=60)


@pytest.mark.numbers
@pytest.mark.parametrize("name", ASKS)
def test_pictures_are_those_of_the_processor(
    engines: dict[str, Path], exact: dict[str, Pipeline], name: str
) -> None:
    ask = ASKS[name]
    expected = draw(exact[ask.kind], **ask.call)
    plain = draw(exact[ask.kind], **{**ask.call, **ask.plain})
    pipe = Pipeline.from_engine(engines[ask.kind], "cuda")
    for _ in range(3):  # by eager ticks, some graphs, and all of them
        error = (draw(pipe, **ask.call) - expected).norm()
        assert error < 0.01 * expected.norm() and error < 0.4 * (plain - expected).norm()
