"""FP8 layers: the definition, what PyTorch's product makes of it, and which layers of a U-Net convert."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from sdfast.backends.fp8 import scaled_mm
from sdfast.models import ops
from sdfast.models.controlnet import ControlledUNet, ControlNet
from sdfast.models.fp8 import (
    Conv1x1FP8,
    Conv3x3FP8,
    LinearFP8,
    convert,
    fp8_convolutions,
    fp8_layers,
    use_product,
)
from sdfast.models.layers import Conv1x1, Conv3x3, Linear
from sdfast.models.unet import UNet, UNetConfig
from tests.models.conftest import randomise

LARGEST = ops.FP8_MAX


def unet(**overrides: object) -> UNet:
    config = {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    }
    return UNet(UNetConfig.from_diffusers({**config, **overrides}))


def test_numbers_are_rounded_to_three_bits_of_fraction() -> None:
    x = torch.tensor([[LARGEST, 17.0, 18.0, 19.0, -0.3, 0.0]])
    rows, scale = ops.quantised_rows(x)
    assert scale.tolist() == [[1.0]]
    assert rows.float().tolist() == [[448.0, 16.0, 18.0, 20.0, -0.3125, 0.0]]  # ties go to the even


def test_each_row_has_its_own_scale() -> None:
    """So that a picture does not depend on those beside it."""
    x = torch.randn(3, 5, 32) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    layer = LinearFP8(randomise(Linear(32, 16)))
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    rows, scale = ops.quantised_rows(x)
    error = (rows.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, x.abs().amax(-1, keepdim=True) / 458752 * 1.001)).all()
    assert error.max() > 0


def test_rows_of_zeros_and_what_is_no_number() -> None:
    layer = LinearFP8(randomise(Linear(16, 16)))
    assert torch.equal(layer(torch.zeros(2, 16)), layer.bias.expand(2, 16))
    broken = torch.ones(2, 16)
    broken[0, 3] = torch.nan
    assert layer(broken).isfinite().all(dim=-1).tolist() == [False, True]


@pytest.mark.parametrize("shape", [(2, 77, 64), (1, 64), (2, 8, 3, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_pytorchs_product_is_the_definition(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, bar: float
) -> None:
    """The same call on CUDA differs in the kernel alone."""
    layer = LinearFP8(randomise(Linear(64, 48, bias=bias)))
    x, b = torch.randn(shape).to(dtype), None if layer.bias is None else layer.bias.to(dtype)
    truth = ops.linear_fp8(x, layer.weight, layer.scale, b)
    ours = scaled_mm(x, layer.weight, layer.scale, b)
    assert ours.shape == truth.shape == (*shape[:-1], 48) and ours.dtype == dtype
    assert torch.linalg.norm(ours.float() - truth.float()) <= bar * torch.linalg.norm(truth.float())
    exact = torch.nn.functional.linear(x.float(), layer.weight.float() * layer.scale[:, None], layer.bias)
    assert 0.001 < torch.linalg.norm(truth - exact) / torch.linalg.norm(exact) < 0.05


@pytest.mark.parametrize(
    ("stride", "padding", "size", "bias"),
    [
        (1, (1, 1), None, False),
        (2, (1, 1), None, True),
        (2, (0, 1), None, True),
        (1, (1, 1), [10, 14], True),
        (1, (1, 1), [9, 13], True),
        (1, (1, 1), [10, 13], False),
    ],
)
def test_a_convolution_is_that_of_the_rounded_numbers(
    stride: int, padding: tuple[int, int], size: list[int] | None, bias: bool
) -> None:
    """Each pixel times its own scale, enlarged and padded as by PyTorch, in float64."""
    layer = randomise(Conv3x3(32, 16, stride, padding, bias))
    x = torch.randn(2, 32, 5, 7) * torch.rand(2, 1, 5, 7).mul(6).exp()
    rounded = Conv3x3FP8(layer)
    y = rounded(x, size)
    rows, scale = ops.quantised_rows(x.permute(0, 2, 3, 1))
    read = (rows.double() * scale).permute(0, 3, 1, 2)
    weight = (rounded.weight.double() * rounded.scale[:, None, None]).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    near = [(read, weight, 1e-6), (x.double(), layer.weight.double(), 0.05)]
    for image, taps, bar in near:
        enlarged = image if size is None else F.interpolate(image, size=size, mode="nearest")
        padded = F.pad(enlarged, (*padding, *padding))
        b = None if layer.bias is None else layer.bias.double()
        due = F.conv2d(padded, taps, b, stride)
        error = torch.linalg.norm(y - due) / torch.linalg.norm(due)
        assert y.shape == due.shape and error < bar
    assert error > 0.02
    assert torch.equal(y, torch.cat([rounded(one[None], size) for one in x]))


def unet_inputs(network: UNet, rows: int, height: int = 8, width: int = 8) -> tuple[torch.Tensor, ...]:
    widths = sum(network.shift_widths), sum(network.context_widths)
    return torch.randn(rows, 4, height, width), torch.randn(rows, widths[0]), torch.randn(rows, 77, widths[1])


def on_gpu(*args: torch.Tensor, **options: object) -> torch.Tensor:
    """What PyTorch would make of a product's arguments on CUDA, nothing computed."""

    def moved(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")

    with FakeTensorMode():
        return product(*map(moved, args), **{name: moved(value) for name, value in options.items()})


product = torch._scaled_mm


@pytest.mark.parametrize("rows", [1, 2])
def test_a_gpu_takes_the_strides_of_every_layer(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own check of a product on CUDA: rows, columns, multiples of 16, scales."""
    network = randomise(unet()).half()
    inputs = [tensor.half() for tensor in unet_inputs(network, rows)]
    truth = network(*inputs).float()
    names = fp8_layers(network)
    use_product(convert(network, names), scaled_mm)
    shapes = []

    def checked(*args: torch.Tensor, **options: object) -> torch.Tensor:
        fake, real = on_gpu(*args, **options), product(*args, **options)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, torch.float16, real.stride())
        shapes.append(fake.shape)
        return real

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    result = network(*inputs)
    assert len(shapes) == len(names) > 10
    assert torch.linalg.norm(result.float() - truth) < 0.2 * torch.linalg.norm(truth)


def test_a_gpus_product_refuses_other_layers() -> None:
    """So that the test above could fail."""
    rows, weight, scale = torch.empty(4, 32).to(ops.FP8), torch.empty(16, 32).to(ops.FP8), torch.ones(1, 16)
    given = {"scale_a": torch.ones(4, 1), "scale_b": scale, "out_dtype": torch.float16}
    on_gpu(rows, weight.t(), **given)
    with pytest.raises(RuntimeError, match="col_major"):
        on_gpu(rows, weight.view(32, 16), **given)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        on_gpu(rows[:, :24].contiguous(), weight[:, :24].contiguous().t(), **given)


def test_a_product_is_one_node_of_the_traced_network() -> None:
    network = randomise(unet()).half().requires_grad_(False)
    names = fp8_layers(network)
    use_product(convert(network, names), scaled_mm)
    inputs = tuple(tensor.half() for tensor in unet_inputs(network, 2))
    graph = torch.export.export(network, inputs, strict=False).graph
    assert [node.target for node in graph.nodes].count(torch.ops.aten._scaled_mm.default) == len(names)


def test_which_layers_convert() -> None:
    with torch.device("meta"):
        network = unet(block_out_channels=[64, 1280])
        names = fp8_layers(network)
        kept = {n for n, m in network.named_modules() if isinstance(m, (Linear, Conv1x1))} - set(names)
        assert kept == set()
        assert not any(isinstance(network.get_submodule(name), Conv3x3) for name in names)
        assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv" in names
        assert {"up_blocks.1.resnets.0.conv_shortcut"} <= set(names)
        narrow = unet()
        left_out = {n for n, m in narrow.named_modules() if isinstance(m, Linear)} - set(fp8_layers(narrow))
        assert left_out and all(".to_out." in name for name in left_out)
        assert fp8_layers(unet(block_out_channels=[24, 40], norm_num_groups=8)) == ()


def test_which_convolutions_convert() -> None:
    with torch.device("meta"):
        network = unet()
        every = {name for name, module in network.named_modules() if isinstance(module, Conv3x3)}
        assert every - set(fp8_convolutions(network)) == {"conv_in", "conv_out"}
        assert {"down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"} < every
        some = set(fp8_convolutions(unet(block_out_channels=[24, 64], norm_num_groups=8)))
        assert "mid_block.resnets.0.conv1" in some
        assert not any(name.startswith(("down_blocks.0.resnets", "up_blocks.1.resnets")) for name in some)


def test_a_controlnets_convolutions_convert_too() -> None:
    with torch.device("meta"):
        network = unet()
        both = ControlledUNet(network, [ControlNet(network.config)])
        names = fp8_convolutions(both)
        every = {name for name, module in both.named_modules() if isinstance(module, Conv3x3)}
    apart = {"unet.conv_in", "unet.conv_out", "controlnet.conv_in"}
    assert every - set(names) == apart and "controlnet.mid_block.resnets.0.conv2" in names


def test_a_network_with_its_convolutions_converted_is_near() -> None:
    """On sides that are odd, which are enlarged to twice their halves, less one."""
    network = randomise(unet())
    inputs = unet_inputs(network, 1, 7, 9)
    truth = network(*inputs)
    names = fp8_convolutions(network)
    convert(network, names)
    result = network(*inputs)
    error = torch.linalg.norm(result - truth) / torch.linalg.norm(truth)
    assert result.shape == truth.shape and 1e-3 < error < 0.1
    with torch.device("meta"):
        empty = convert(unet(), names)
    empty.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(empty(*inputs), result)


def test_a_converted_network_is_near_and_keeps_its_scales() -> None:
    network = unet()
    randomise(network)
    inputs = unet_inputs(network, 2)
    truth = network(*inputs)
    bytes_before = sum(p.nbytes for p in network.parameters())
    names = fp8_layers(network)
    convert(network, names)
    result = network(*inputs)
    error = torch.linalg.norm(result - truth) / torch.linalg.norm(truth)
    assert 1e-3 < error < 0.2
    with torch.device("meta"):
        empty = convert(unet(), names)
    assert sum(p.nbytes for p in network.parameters()) < bytes_before
    empty.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(empty(*inputs), result)
    with pytest.raises(TypeError, match="conv_norm_out is a GroupNorm"):
        convert(network, ["conv_norm_out"])


def test_a_convolution_of_one_pixel_is_linear() -> None:
    conv = randomise(Conv1x1(32, 16))
    x = torch.randn(2, 32, 3, 5)
    truth = ops.linear_fp8(x.flatten(2).transpose(1, 2), *LinearFP8(conv).parameters())
    assert torch.equal(Conv1x1FP8(conv)(x).flatten(2).transpose(1, 2), truth)
