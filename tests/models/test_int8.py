"""INT8 layers: the definition, and which layers of a U-Net convert."""

import pytest
import torch
from torch.nn import functional as F

from sdfast.models import ops
from sdfast.models.controlnet import ControlledUNet, ControlNet
from sdfast.models.int8 import LinearInt8, convert, int8_layers
from sdfast.models.layers import Linear
from tests.models.conftest import randomise
from tests.models.test_fp8 import unet, unet_inputs

LARGEST = int(ops.INT8_MAX)


def test_numbers_are_rounded_to_whole_ones() -> None:
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 126.51]])
    rows, scale = ops.whole_rows(x)
    assert scale.tolist() == [[1.0]] and rows.dtype == torch.int8
    assert rows.tolist() == [[127, -127, 0, 2, 2, 0, -2, 0, 127]]  # halves go to the even


def test_each_row_has_its_own_scale() -> None:
    """So that a picture does not depend on those beside it."""
    x = torch.randn(3, 5, 32) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    layer = LinearInt8(randomise(Linear(32, 16)))
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))
    rows, scale = ops.whole_rows(x)
    error = (rows.float() * scale - x).abs()
    assert (error <= x.abs().amax(-1, keepdim=True) / 254 * 1.0001).all() and error.max() > 0


@pytest.mark.parametrize("inputs", [7, 1300])
def test_sums_are_exact(inputs: int) -> None:
    """Beyond what float32 counts one by one, and as large as they get."""
    x = torch.randint(-LARGEST, LARGEST + 1, (6, inputs))
    weight = torch.randint(-LARGEST, LARGEST + 1, (8, inputs)).to(torch.int8)
    x[:, 0], x[0], weight[0], weight[1] = LARGEST, LARGEST, LARGEST, -LARGEST  # so every scale is 1
    scale, bias = torch.rand(8), torch.randn(8)
    y = ops.linear_int8(x.float(), weight, scale, bias)
    total = x @ weight.long().T
    assert total[0, 0] == inputs * LARGEST**2 == -total[0, 1]
    assert torch.equal(y, total.float() * scale + bias)


def test_rows_of_zeros_and_what_is_no_number() -> None:
    layer = LinearInt8(randomise(Linear(16, 16)))
    assert torch.equal(layer(torch.zeros(2, 16)), layer.bias.expand(2, 16))
    broken = torch.ones(2, 16)
    broken[0, 3] = torch.nan
    assert layer(broken).isfinite().all(dim=-1).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_layer_is_near(dtype: torch.dtype) -> None:
    linear = randomise(Linear(64, 48))
    layer, x = LinearInt8(linear), torch.randn(2, 77, 64).to(dtype)
    y, exact = layer(x), F.linear(x.float(), linear.weight, linear.bias)
    assert y.dtype == dtype
    assert 1e-3 < torch.linalg.norm(y - exact) / torch.linalg.norm(exact) < 0.015
    assert (layer.weight * layer.scale[:, None] - linear.weight).abs().max() <= layer.scale.max() * 0.5001


def test_which_layers_convert() -> None:
    """Those of which a product saves more than rounding costs: I · O / (I + O) from 100 on."""
    with torch.device("meta"):
        network = unet(block_out_channels=[64, 320])
        names = int8_layers(network)
        every = {name for name, layer in network.named_modules() if isinstance(layer, Linear)}
        assert set(names) == every
        assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv" in names
        narrow = unet(block_out_channels=[64, 128])
        assert {name.rpartition("transformer_blocks.0.")[2] for name in int8_layers(narrow)} == {
            "ff.net.0.proj",
            "ff.net.2",
        }
        assert int8_layers(unet()) == ()
        names = int8_layers(ControlledUNet(network, [ControlNet(network.config)]))
        assert "controlnet.mid_block.attentions.0.proj_in" in names
        assert "unet.mid_block.attentions.0.proj_in" in names


def test_a_converted_network_is_near_and_keeps_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfast.models.int8.PAYS_FROM", 0)
    network = randomise(unet())
    inputs = unet_inputs(network, 2)
    truth = network(*inputs)
    names = int8_layers(network)
    convert(network, names)
    result = network(*inputs)
    assert 1e-3 < torch.linalg.norm(result - truth) / torch.linalg.norm(truth) < 0.05
    with torch.device("meta"):
        empty = convert(unet(), names)
    empty.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(empty(*inputs), result)
    with pytest.raises(TypeError, match="conv_in is a Conv3x3; Linear converts"):
        convert(network, ["conv_in"])
