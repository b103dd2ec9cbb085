"""3×3 convolutions go into FP8 where that was measured to be faster, at every size. On stand-ins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdfast import kernels
from sdfast.backends import clock
from sdfast.backends.fp8 import gathering
from sdfast.backends.inductor import Code, Inductor
from sdfast.backends.target import this_machine
from sdfast.export import inductor
from sdfast.export.code_store import CodeStore
from sdfast.export.fp8 import OWN, enlarging_conv3x3
from sdfast.export.inductor import Compiler
from sdfast.export.modules import Form, ModuleSpec
from sdfast.manifest import Span
from sdfast.models import ops
from sdfast.models.fp8 import convert, fp8_convolutions, use_convolution
from sdfast.models.layers import Downsample, ResBlock, Upsample
from tests.models.conftest import randomise

CPU = torch.device("cpu")
RESNET = ("resnet.conv1", "resnet.conv2")


class Level(nn.Module):
    """Down, a ResNet block, and up again, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.resnet, self.up = (
            Downsample(16),
            ResBlock(16, 32, 4, 1e-5, shifted=True),
            Upsample(32),
        )

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # x [B, 16, H, W], shift [B, 32]
        y: Tensor = self.up(self.resnet(self.down(x), shift), like=x)
        return y


def level(*sizes: int, batches: tuple[Span, ...] = (Span.exactly(2),)) -> ModuleSpec:
    torch.manual_seed(0)

    def inputs(batch: int, height: int, width: int, _: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 16, height, width).half(), "shift": torch.randn(batch, 32).half()}

    def load() -> nn.Module:
        return randomise(Level(), 0).half()

    spans = [Span.exactly(size) for size in sizes]
    forms = tuple(Form(batch, span, span) for span in spans for batch in batches)
    free = {"x": {0: "batch", 2: "height", 3: "width"}, "shift": {0: "batch"}}
    with torch.device("meta"):
        names = fp8_convolutions(Level())
    return ModuleSpec("level", load, inputs, free, ("y",), (), forms, fp8_convolutions=names)


@torch.library.custom_op("sdfast_tests::conv3x3_fp8", mutates_args=())
def own_convolution(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    stride: int,
    padding: list[int],
    size: list[int] | None,
) -> Tensor:
    """By PyTorch's convolution, of what the rounded numbers stand for."""
    read = (x.float() * x_scale[..., None]).permute(0, 3, 1, 2)
    taps = (weight.float() * scale[:, None, None]).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    y = enlarging_conv3x3(read, taps, None if bias is None else bias.float(), stride, padding, size)
    return y.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format)


@own_convolution.register_fake
def _(x: Tensor, _: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    dtype, stride, padding, size = rest[2:]
    sides = ops.conv3x3_sides(x.shape[1:3] if size is None else size, stride, padding)
    return x.new_empty([x.shape[0], *sides, weight.shape[0]], dtype=dtype)


class Times:
    """Milliseconds of a run by what computes it, and at which height. What is not said takes one."""

    def __init__(self) -> None:
        self.own: dict[int, float] = {}
        self.timed: list[tuple[str, int, int]] = []

    def named(self, definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = "compiler" if definition is enlarging_conv3x3 else "own"

        def call(x: Tensor, *rest: Any) -> Tensor:
            self.last = name, len(x), x.shape[2]
            return definition(x, *rest)

        return call

    def milliseconds(self, run: Callable[[], object], _: torch.device) -> float:
        run()
        self.timed.append(self.last)
        name, _, height = self.last
        return self.own.get(height, 0.5) if name == "own" else 1.0


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """The kernel that a processor can run, in place of the own ones."""
    found = Times()
    monkeypatch.setattr(kernels, "why_none", lambda device: "")
    monkeypatch.setattr(kernels, "convolution_fp8", lambda: own_convolution)
    monkeypatch.setattr(kernels, "group_norms", dict)
    monkeypatch.setattr(kernels, "linear_geglus", dict)
    monkeypatch.setattr("sdfast.export.kernels.compiled_alone", found.named)
    monkeypatch.setattr(clock, "milliseconds", found.milliseconds)
    return found


def compiler(folder: Path, said: list[str] | None = None, **settings: Any) -> Compiler:
    say = said.append if said is not None else print
    given = {"autotune": True, "store": CodeStore(folder), "say": say, **settings}
    return Compiler(this_machine(CPU), **given)


def rounded(made: Compiler, spec: ModuleSpec) -> tuple[Any, nn.Module]:
    network = inductor.laid_out_for(spec.load(), "cpu")
    return made._round(spec, sorted(spec.forms, key=lambda form: -form.batch.high), network), network


def test_a_convolution_has_to_be_faster_at_every_size(tmp_path: Path, times: Times) -> None:
    """Of 16 pixels, which are 8 after the first, and of 32, which are 16: 16 is both."""
    said: list[str] = []
    made = compiler(tmp_path, said)
    found, network = rounded(made, level(16, 32))
    assert found.names == ("down.conv", *RESNET, "up.conv")
    assert said == ["level: 4 of 4 3x3 convolutions are in FP8"]
    assert set(found.taken.values()) == {OWN} and len(found.report) == 8
    x = network.get_submodule("resnet.conv1")
    assert x.weight.dtype == ops.FP8 and x.weight.shape == (32, 9, 16)

    times.own = {8: 0.96}  # not by the margin, in the smaller size's ResNet and what is enlarged there
    found, network = rounded(compiler(tmp_path / "other"), level(16, 32))
    assert found.names == ("down.conv",)
    assert found.taken["3x3 convolution of 16 to 32 channels, 8x8, float16 or FP8"] == "compiler"
    assert found.taken["3x3 convolution of 16 to 32 channels, 16x16, float16 or FP8"] == OWN
    assert network.get_submodule("resnet.conv1").weight.dtype == torch.float16
    assert (
        "3x3 convolution of 32 to 32 channels, 8x8 enlarged to 16x16, float16 or FP8: compiler "
        "(triton FP8 0.960 ms, compiler 1.000 ms), in a batch of 2"
    ) in found.report
    assert "3x3 convolution of 16 to 16 channels, 32x32, stride 2, float16 or FP8" in found.taken


def test_the_largest_batch_is_measured_and_remembered(tmp_path: Path, times: Times) -> None:
    spec = level(16, batches=(Span.exactly(1), Span.exactly(4), Span.exactly(2)))
    first, _ = rounded(compiler(tmp_path), spec)
    assert {batch for _, batch, _ in times.timed} == {4} and len(times.timed) == 8
    times.own = {16: 9.0, 8: 9.0}
    again, _ = rounded(compiler(tmp_path), spec)
    assert again == first and len(times.timed) == 8
    [remembered] = json.loads((tmp_path / "choices.json").read_text("utf-8"))["choices"].values()
    assert len(remembered) == 4


@pytest.mark.parametrize(
    ("settings", "forms"),
    [
        ({"autotune": False}, level(16)),
        ({"own_kernels": False}, level(16)),
        ({}, level(16, batches=(Span(low=1, high=4),))),
    ],
)
def test_where_nothing_is_measured_all_stay_as_they_are(
    tmp_path: Path, times: Times, settings: dict[str, Any], forms: ModuleSpec
) -> None:
    said: list[str] = []
    found, network = rounded(compiler(tmp_path, said, **settings), forms)
    assert found.names == () and times.timed == []
    assert said == ["level: no 3x3 convolution is in FP8, for none was measured; see docs/fp8.md"]
    assert all(weight.dtype == torch.float16 for weight in network.parameters())


def wrong_pixel(x: Tensor, x_scale: Tensor, *rest: Any) -> Tensor:
    return own_convolution(x, x_scale.roll(1, dims=2), *rest)


def test_a_wrong_kernel_is_left_out_loudly(
    tmp_path: Path, times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "convolution_fp8", lambda: wrong_pixel)
    said: list[str] = []
    found, _ = rounded(compiler(tmp_path, said), level(16))
    assert found.names == () and times.timed == []
    assert len(said) == 5 and all("'triton FP8' is left out: it differs" in line for line in said[:4])


@pytest.mark.slow
def test_it_is_traced_with_its_rounding_before(tmp_path: Path, times: Times) -> None:
    spec = level(16)
    _, network = rounded(compiler(tmp_path), spec)
    graph = str(inductor._trace(network, spec.inputs(2, 16, 16, 0), {}).graph)
    assert graph.count("sdfast_tests.conv3x3_fp8") == 4
    assert graph.count("aten.conv2d") == 1  # of one pixel, beside the ResNet block
    assert "upsample" not in graph  # the small image is read


@pytest.mark.slow
def test_an_engines_weights_are_of_one_form_and_its_numbers_the_definitions(
    tmp_path: Path, times: Times
) -> None:
    times.own = {8: 2.0}
    spec = level(16, 24)
    place = tmp_path / "engine"
    place.mkdir()
    found = compiler(tmp_path).compile(spec, place)
    assert found.fp8 == ("down.conv",)
    stored = load_file(place / "level.safetensors")
    assert {name for name, weight in stored.items() if weight.dtype == ops.FP8} == {"down.conv.weight"}
    assert stored["down.conv.scale"].dtype == torch.float32
    network = convert(spec.load(), found.fp8)
    use_convolution(network, gathering(own_convolution))
    for variant, size in zip(found.variants, (16, 24), strict=True):
        assert variant.kernels["3x3 convolution of 16 to 16 channels, 16x16, stride 2, float16 or FP8"] == OWN
        code = Code.model_validate_json((place / variant.file).with_suffix(".json").read_bytes())
        assert any(line.startswith("3x3 convolution of 16 to 16 channels, 24x24") for line in code.kernels)
        inputs = spec.inputs(2, size, size, 0)
        ours = Inductor(CPU).load(place / variant.file)(inputs)["y"].float()
        truth = network(**inputs).float()
        assert torch.linalg.norm(ours - truth) <= 0.01 * torch.linalg.norm(truth)
