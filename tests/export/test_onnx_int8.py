"""INT8 layers as ONNX Runtime computes them are the definition."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from sdfast.backends.target import check_int8
from sdfast.errors import BackendError
from sdfast.export.onnx import export_module
from sdfast.models import ops
from sdfast.models.int8 import LinearInt8, convert
from sdfast.models.layers import Linear
from sdfast.models.unet import FeedForward
from tests.export.test_onnx import BATCH, kinds, session
from tests.models.conftest import randomise

LARGEST = int(ops.INT8_MAX)


def overflows() -> bool:
    try:
        check_int8("")
    except BackendError:
        return True
    return False


summed_in_32_bits = pytest.mark.skipif(overflows(), reason="sums of INT8 products overflow on this processor")
pytestmark = summed_in_32_bits


def layer(inputs: int, outputs: int, bias: bool = True) -> LinearInt8:
    return LinearInt8(randomise(Linear(inputs, outputs, bias)))


def exported(module: nn.Module, x: Tensor, path: Path, dynamic: bool = True) -> "Run":
    axes = {"x": {0: BATCH}} if dynamic else {}
    export_module(module, {"x": x}, axes, ["y"], path)
    return Run(path)


class Run:
    def __init__(self, path: Path) -> None:
        self.session = session(path)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize(("shape", "bias"), [((2, 77, 40), True), ((1, 1, 40), False), ((5, 40), True)])
def test_it_is_the_definition(shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    """The same numbers: with rows of any size, smaller than the smallest scale too, and of zeros."""
    module, x = layer(40, 24, bias), torch.randn(shape) * torch.rand(*shape[:-1], 1).mul(12).exp()
    run = exported(module, x, tmp_path / "layer.onnx")
    for given in (x, x * 0, torch.sign(x), x.abs(), -x.abs(), x * 2.0**-36):
        assert torch.equal(run(given), module(given))
    graph = onnx.load(tmp_path / "layer.onnx").graph
    stored = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    assert stored == {onnx.TensorProto.INT8}


def test_halves_go_to_the_even(tmp_path: Path) -> None:
    """Each number on its own: the weight is one times each."""
    numbers = torch.arange(-2 * LARGEST, 2 * LARGEST + 1) / 2
    module = LinearInt8(randomise(Linear(len(numbers), len(numbers), bias=False)))
    module.weight.data, module.scale.data = torch.eye(len(numbers)).to(torch.int8), torch.ones(len(numbers))
    run = exported(module, numbers[None], tmp_path / "layer.onnx", dynamic=False)
    assert torch.equal(run(numbers[None])[0], numbers.round())


@pytest.mark.parametrize("inputs", [2, 1300])
def test_the_largest_sums_do_not_overflow(inputs: int, tmp_path: Path) -> None:
    module = layer(inputs, 20, bias=False)
    module.weight.data = torch.full((20, inputs), LARGEST, dtype=torch.int8)
    module.weight.data[::2] = -LARGEST
    x = torch.ones(8, inputs)
    x[::2] = -1
    y = exported(module, x, tmp_path / "layer.onnx")(x)
    assert torch.equal(y, module(x))
    due = x.double() @ module.weight.double().T * module.scale  # the numbers are those of int8 exactly
    assert torch.linalg.norm(y - due) < 1e-6 * torch.linalg.norm(due)


def test_a_row_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    module, x = layer(64, 48), torch.randn(4, 30, 64) * torch.tensor([1.0, 1e4, 1e-4, 1.0])[:, None, None]
    run = exported(module, x, tmp_path / "layer.onnx")
    assert torch.equal(run(x), torch.cat([run(one[None]) for one in x]))


def test_gated_products_are_two(tmp_path: Path) -> None:
    """What is rounded is rounded once, and no half is copied out of the whole."""
    block = randomise(FeedForward(32))
    convert(block, int8_names(block))
    x = torch.randn(2, 9, 32)
    run = exported(block, x, tmp_path / "ff.onnx")
    nodes = kinds(tmp_path / "ff.onnx")
    assert nodes.count("MatMulIntegerToFloat") == 3 and nodes.count("QuantizeLinear") == 2
    assert "Split" not in nodes
    y, due = run(x), block(x)
    assert torch.linalg.norm(y - due) < 1e-3 * torch.linalg.norm(due)


def int8_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, Linear)]
