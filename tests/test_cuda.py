"""What only a GPU can show: the loop asks the host for nothing, and graphs draw what eager steps draw."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdfast.arithmetic import DeviceArithmetic
from sdfast.backends.fp8 import scaled_mm
from sdfast.bucket import Buckets
from sdfast.engine import Engine
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.graph import Graph
from sdfast.loop import Rows
from sdfast.manifest import Span
from sdfast.models import ops
from sdfast.models.fp8 import LinearFP8
from sdfast.models.layers import Linear
from sdfast.pipeline import Pipeline
from tests.fakes import FakeEngine
from tests.models.conftest import randomise
from tests.test_image_to_image import image, mask
from tests.test_loop import KEEPING, MIXED, SIDE, alone, row
from tests.test_pipeline import assert_same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device"),
]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises. What the test itself asks of the device, it asks outside."""
    yield
    torch.cuda.set_sync_debug_mode("default")


class CudaEngine(FakeEngine):
    """The fake engine, its modules on the device."""

    def __init__(self, *batches: Span) -> None:
        super().__init__(batches, cached=True)
        self.device = torch.device("cuda")


@pytest.mark.usefixtures("no_synchronisation")
def test_between_joining_and_leaving_nothing_waits() -> None:
    """From the second rows of a bucket on: capturing the graph of the first ones takes a moment's quiet."""
    engine, buckets = CudaEngine(Span(low=1, high=16)), Buckets()
    for strict, cached in ((False, {}), (True, {}), (False, {"interval": 3}), (True, {"interval": 3})):
        kinds_of_rows = [{**kinds, **cached} for kinds in (*MIXED, *KEEPING)]
        running = Rows(engine, [row(**kinds) for kinds in kinds_of_rows], SIDE, SIDE, buckets=buckets)
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        while running.active:
            running.tick()
        torch.cuda.set_sync_debug_mode("default")
        for kinds, latents in zip(kinds_of_rows, running.latents, strict=True):
            torch.testing.assert_close(latents.cpu(), alone(DeviceArithmetic, **kinds), rtol=1e-4, atol=1e-4)
        running.close()


@pytest.mark.numbers
def test_a_graph_replays_what_was_run_first() -> None:
    x = torch.zeros(4, device="cuda")
    graph = Graph(lambda: x.add_(1), x.device)  # type: ignore[arg-type,return-value]
    for ticks in range(1, 6):
        graph()
        assert x.tolist() == [float(ticks)] * 4


@pytest.fixture(scope="module", params=["eager", "inductor"])
def engine(request: pytest.FixtureRequest, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = {"device": "cuda"} if request.param == "inductor" else {}
    recipe = Recipe.make(backend=request.param, sizes=["64x64"], batch=[1, 2], cache_branch=1, **compiled)
    return export(tiny_sd, tmp_path_factory.mktemp("cuda") / request.param, recipe)


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("scheduler", ["DPM++ 2M Karras", "Euler a", "DDPM"])
def test_the_picture_is_the_processors(engine: Path, sd_engine: Path, scheduler: str, pictures: int) -> None:
    call: dict[str, Any] = {
        "num_inference_steps": 8,
        "output_type": "pt",
        "seed": 5,
        "scheduler": scheduler,
        "num_images_per_prompt": pictures,
        "height": 64,
        "width": 64,
    }
    pipe = Pipeline.from_engine(engine, "cuda")
    for _ in range(2):  # the second time, the graph is there from the first step on
        ours = pipe("the sea", **call).images
        assert_same(ours.cpu(), Pipeline.from_engine(sd_engine)("the sea", **call).images)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scheduler", ["DPM++ 2M Karras", "Heun"])
def test_the_picture_over_an_image_is_the_processors(
    engine: Path, sd_engine: Path, scheduler: str, masked: bool
) -> None:
    call: dict[str, Any] = {
        "num_inference_steps": 8,
        "output_type": "pt",
        "seed": 5,
        "scheduler": scheduler,
        "image": image(),
        "mask_image": mask() if masked else None,
        "strength": 0.6,
    }
    pipe = Pipeline.from_engine(engine, "cuda")
    for _ in range(2):
        ours = pipe("the sea", **call).images
        assert_same(ours.cpu(), Pipeline.from_engine(sd_engine)("the sea", **call).images)


@pytest.mark.numbers
@pytest.mark.parametrize("guidance_end", [1.0, 0.5])
def test_the_picture_of_cached_steps_is_the_processors(engine: Path, guidance_end: float) -> None:
    call: dict[str, Any] = {
        "num_inference_steps": 8,
        "output_type": "pt",
        "seed": 5,
        "scheduler": "Euler a",
        "cache_interval": 3,
        "guidance_end": guidance_end,
    }
    pipe, plain = Pipeline.from_engine(engine, "cuda"), "eager" in engine.name
    expected = Pipeline.from_engine(engine, "cpu")("the sea", **call).images if plain else None
    first = pipe("the sea", **call).images.cpu()
    assert torch.equal(pipe("the sea", **call).images.cpu(), first)  # by the graphs from the first step on
    if expected is not None:
        assert_same(first, expected)
    whole = pipe("the sea", **{**call, "cache_interval": 1}).images.cpu()
    assert 1e-3 < (whole - first).norm() / whole.norm() < 0.2


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.usefixtures("no_synchronisation")
def test_a_compiled_engines_steps_do_not_wait(engine: Path, interval: int) -> None:
    opened = Engine.open(engine, "cuda", load=True)
    pipe = Pipeline(opened)
    call: dict[str, Any] = {"num_inference_steps": 6, "output_type": "latent", "seed": 1, "height": 64}
    call["cache_interval"] = interval

    pipe("the sea", width=64, **call)
    tick = Rows.tick

    def strict(self: Rows) -> None:
        torch.cuda.set_sync_debug_mode("error")
        tick(self)
        torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "tick", strict)
        pipe("a boat", width=64, **call)


def test_memory_of_an_engine_that_is_let_go_is_free(engine: Path) -> None:
    """The compiled code keeps its constants for good; what they hold is given back all the same."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        Engine.open(engine, "cuda", load=True)
        torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2 * 2**20


fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="FP8 needs a GPU of compute capability 8.9 or above",
)


@fp8
@pytest.mark.numbers
@pytest.mark.parametrize("rows", [1, 77, 300])  # not only multiples of the kernels' tiles
@pytest.mark.parametrize("bias", [True, False])
def test_the_gpus_fp8_product_is_the_definition(rows: int, bias: bool) -> None:
    layer = LinearFP8(randomise(Linear(320, 640, bias=bias))).cuda()
    x, b = torch.randn(2, rows, 320, device="cuda").half(), None if layer.bias is None else layer.bias.half()
    truth = ops.linear_fp8(x, layer.weight, layer.scale, b).float()
    ours = scaled_mm(x, layer.weight, layer.scale, b)
    assert ours.dtype == torch.float16
    # rounded sums, and the few numbers that the GPU's division puts on the other side of a tie
    assert torch.linalg.norm(ours.float() - truth) < 0.01 * torch.linalg.norm(truth)


@fp8
@pytest.mark.numbers
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_an_fp8_engine_on_a_gpu_is_near_the_one_without(backend: str, tiny_sd: Path, tmp_path: Path) -> None:
    """Near, no more: what is rounded otherwise in its last bit differs by FP8's own steps a few layers on."""
    recipe = {"backend": backend, "dtype": "fp16", "sizes": ["64x64"], "batch": [1]}
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": 5}
    drawn = []
    for kind in (False, True):
        folder = export(tiny_sd, tmp_path / f"fp8-{kind}", Recipe.make(**recipe, fp8=kind))
        pipe = Pipeline.from_engine(folder, "cuda")
        drawn.append(pipe("the sea", **call).images.float().cpu())
        assert torch.equal(pipe("the sea", **call).images.float().cpu(), drawn[-1])
    exact, ours = drawn
    assert 1e-3 < torch.linalg.norm(ours - exact) / torch.linalg.norm(exact) < 0.2
