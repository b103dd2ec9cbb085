"""The kernels on a GPU: called as they are, compiled into a package, and in a CUDA graph."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdfast import kernels
from sdfast.arithmetic import DeviceArithmetic, FusedArithmetic
from sdfast.backends.fp8 import gathering
from sdfast.backends.inductor import Inductor
from sdfast.backends.target import this_machine
from sdfast.bucket import Buckets
from sdfast.export.code_store import CodeStore
from sdfast.export.inductor import Compiler
from sdfast.loop import Rows
from sdfast.manifest import Span
from sdfast.models import ops
from sdfast.models.fp8 import Conv3x3FP8, convert
from sdfast.models.layers import Conv3x3
from tests.export.test_fp8_convolutions import level
from tests.models.conftest import randomise
from tests.test_cuda import CudaEngine, fp8
from tests.test_loop import KEEPING, MIXED, SIDE, row

CUDA = torch.device("cuda", 0)
WHY_NONE = kernels.why_none(CUDA) if torch.cuda.is_available() else "this torch sees no CUDA device"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(WHY_NONE), reason=WHY_NONE or "-")]

NORMS = ["triton whole", "triton parts"]
HALVES = [torch.float16, torch.bfloat16]


def image(batch: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(channels + side)
    x = torch.randn(batch, channels, side, side, device=CUDA) * 3 + 10
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def vectors(*sizes: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(size, device=CUDA).to(dtype) for size in sizes]


def norm_definition(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> Tensor:
    """In float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    x = x if shift is None else x + shift.double()[:, :, None, None]
    return (ops.group_norm_silu if silu else ops.group_norm)(x, weight, bias, groups, 1e-5)


def assert_rounded(y: Tensor, due: Tensor, slack: float) -> None:
    """Rounded to the dtype of y once; slack: absolute, for what float32 does on the way."""
    unit = 0.51 * torch.finfo(y.dtype).eps if y.dtype != torch.float32 else 4e-6
    assert ((y.double() - due).abs() <= unit * due.abs() + slack).all()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    ("channels", "side"),
    [(320, 64), (640, 33), (960, 32), (1280, 16), (1920, 16), (2560, 8), (128, 200), (512, 65)],
)
def test_group_norm_is_the_definition(name: str, dtype: torch.dtype, channels: int, side: int) -> None:
    x, (weight, bias) = image(2, channels, side, dtype), vectors(channels, channels, dtype=dtype)
    shift = torch.randn(2, channels + 64, device=CUDA).to(dtype)[:, 32:-32]
    norm = kernels.group_norms()[name]
    for given, silu in ((shift, True), (None, False)):
        y = norm(x, given, weight, bias, 32, 1e-5, silu)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert_rounded(y, norm_definition(x, given, weight, bias, 32, silu), 3e-5)
        assert torch.equal(y, norm(x, given, weight, bias, 32, 1e-5, silu))
        first = None if given is None else given[:1]
        assert torch.equal(y[:1], norm(x[:1], first, weight, bias, 32, 1e-5, silu))


@pytest.mark.parametrize("name", NORMS)
def test_a_large_mean_costs_no_digits(name: str) -> None:
    x, (weight, bias) = image(1, 320, 32, torch.float32), vectors(320, 320, dtype=torch.float32)
    x += 3e4
    y = kernels.group_norms()[name](x, None, weight, bias, 32, 1e-5, False)
    assert (y - norm_definition(x, None, weight, bias, 32, False)).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "features"), [(8192, 320, 1280), (1000, 640, 2560), (77, 1280, 5120), (1, 40, 24)]
)
def test_linear_geglu_is_the_definition(dtype: torch.dtype, rows: int, width: int, features: int) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, width, device=CUDA).to(dtype)
    weight = (torch.randn(2 * features, width, device=CUDA) / width**0.5).to(dtype)
    (bias,) = vectors(2 * features, dtype=dtype)
    multiply = kernels.linear_geglus()["triton"]
    y = multiply(x, weight, bias)
    due = ops.geglu(ops.linear(x.double(), weight.double(), bias.double()))
    assert_rounded(y, due, 2e-4)
    assert torch.equal(y, multiply(x, weight, bias))


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, vectors(320, 320, dtype=dtype))
        self.proj = nn.Linear(320, 2560, dtype=dtype, device=CUDA)

    def forward(self, x: Tensor, time_shift: Tensor) -> Tensor:
        shift = time_shift.split_with_sizes([32, 320], dim=-1)[1]
        for norm in kernels.group_norms().values():
            x = norm(x, shift, self.weight, self.bias, 32, 1e-5, True)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        return kernels.linear_geglus()["triton"](tokens, self.proj.weight, self.proj.bias)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_compiled_package_holds_them(dtype: torch.dtype, tmp_path: Path) -> None:
    block, x = Block(dtype).eval(), image(2, 320, 16, dtype)
    given = (x, torch.randn(2, 352, device=CUDA).to(dtype))
    with torch.no_grad():
        due = block(*given)
        program = torch.export.export(block, given)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        ours = packaged(*given)
    torch.testing.assert_close(ours, due)
    assert torch.equal(packaged(*given), ours)


@fp8
@pytest.mark.numbers
@pytest.mark.parametrize(
    ("inputs", "outputs", "side", "stride", "size"),
    [
        (320, 320, 64, 1, None),
        (960, 640, 32, 1, None),
        (2560, 1280, 8, 1, None),
        (640, 640, 33, 2, None),
        (1280, 1280, 16, 1, [32, 31]),
        (16, 48, 5, 1, None),
    ],
)
def test_convolution_in_fp8_is_the_definition(
    inputs: int, outputs: int, side: int, stride: int, size: list[int] | None
) -> None:
    layer = Conv3x3FP8(randomise(Conv3x3(inputs, outputs, stride))).cuda()
    x, bias = image(3, inputs, side, torch.float16), layer.bias.half()
    given = layer.weight, layer.scale, bias, stride, [1, 1], size
    due = ops.conv3x3_fp8(x.float(), *given)
    convolution = gathering(kernels.convolution_fp8())
    y = convolution(x, *given)
    assert y.dtype == torch.float16 and y.is_contiguous(memory_format=torch.channels_last)
    error = (y.float() - due).abs() / (due.abs() + due.square().mean().sqrt())
    assert error.max() < 2e-2  # what the tensor cores' accumulators drop
    assert torch.equal(y, convolution(x, *given))


class Enlarging(nn.Module):
    """Convolutions in FP8 on the way down and up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = Conv3x3FP8(randomise(Conv3x3(64, 32, stride=2)).half())
        self.up = Conv3x3FP8(randomise(Conv3x3(32, 48, bias=False)).half())
        self.down.compute = self.up.compute = gathering(kernels.convolution_fp8())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(torch.nn.functional.silu(self.down(x)), list(x.shape[2:]))
        return y


@fp8
@pytest.mark.numbers
def test_a_compiled_package_holds_convolutions_in_fp8(tmp_path: Path) -> None:
    network, x = Enlarging().cuda().eval(), image(2, 64, 15, torch.float16)
    with torch.no_grad():
        due = network(x)
        program = torch.export.export(network, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "enlarging.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        ours = packaged(x)
    assert ours.shape == due.shape == (2, 48, 15, 15)
    torch.testing.assert_close(ours, due, rtol=0.1, atol=0.02 * float(due.abs().max()))
    assert torch.equal(packaged(x), ours)


@fp8
@pytest.mark.numbers
def test_an_export_measures_convolutions_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, which would not win: all that are right are taken."""
    monkeypatch.setattr("sdfast.export.kernels.MARGIN", 0.0)
    said: list[str] = []
    spec = level(16)
    compiler = Compiler(this_machine(CUDA), True, CodeStore(tmp_path / "store"), say=said.append)
    (tmp_path / "engine").mkdir()
    compiled = compiler.compile(spec, tmp_path / "engine")
    assert said == ["level: 4 of 4 3x3 convolutions are in FP8"]
    assert set(compiled.fp8) == set(spec.fp8_convolutions)
    inputs = {name: tensor.cuda() for name, tensor in spec.inputs(2, 16, 16, 0).items()}
    ours = Inductor(CUDA).load(tmp_path / "engine" / "level.pt2")(inputs)["y"]
    due = convert(spec.load(), compiled.fp8).cuda()(**inputs)
    assert ours.shape == due.shape
    assert torch.linalg.norm(ours.float() - due.float()) < 0.1 * torch.linalg.norm(due.float())


@pytest.mark.parametrize("keeps", [False, True])
def test_the_fused_arithmetic_is_the_definition(keeps: bool) -> None:
    """Its ticks are graphs from the second on, and the buckets are used again."""
    kinds_of_rows = [{**kinds, "rescale": 0.0} for kinds in (*MIXED, *(KEEPING if keeps else ()))]

    def drawn(arithmetic: Callable[..., object], buckets: Buckets) -> Tensor:
        running = Rows(
            CudaEngine(Span(low=1, high=16)),
            [row(**kinds) for kinds in kinds_of_rows],
            SIDE,
            SIDE,
            arithmetic,  # type: ignore[arg-type]
            buckets,
        )
        while running.active:
            running.tick()
        latents = running.latents
        running.close()
        return latents

    due, buckets = drawn(DeviceArithmetic, Buckets()), Buckets()
    first = drawn(FusedArithmetic, buckets)
    torch.testing.assert_close(first, due, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn(FusedArithmetic, buckets), first)
