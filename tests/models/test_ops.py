"""An operation recorded as a node has the shape, and gives the result, of its definition."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sdfast.models import ops


def noise(*shape):
    return torch.randn(shape)


CALLS = {
    "linear": (noise(2, 5, 8), noise(6, 8), noise(6)),
    "linear_fp8": (noise(2, 5, 8), noise(6, 8).to(ops.FP8), noise(6), noise(6)),
    "linear_int8": (noise(2, 5, 8), noise(6, 8).mul(40).to(torch.int8), noise(6), noise(6)),
    "conv3x3": (noise(2, 4, 7, 8), noise(6, 4, 3, 3), None, 2, [0, 1]),
    "conv3x3_fp8": (
        *(noise(2, 4, 7, 8), noise(6, 9, 4).to(ops.FP8), noise(6), noise(6)),
        *(1, [1, 1], [14, 15]),
    ),
    "conv1x1": (noise(2, 4, 7, 8), noise(6, 4, 1, 1), noise(6)),
    "group_norm": (noise(2, 8, 3, 5), noise(8), noise(8), 4, 1e-5),
    "group_norm_silu": (noise(2, 8, 3, 5), noise(8), noise(8), 4, 1e-5),
    "shifted_group_norm_silu": (noise(2, 8, 3, 5), noise(2, 8), noise(8), noise(8), 4, 1e-5),
    "layer_norm": (noise(2, 3, 8), noise(8), noise(8), 1e-5),
    "attention": (noise(2, 3, 8), noise(2, 7, 8), noise(2, 7, 8), 2, True),
    "self_attention": (noise(2, 3, 8), noise(24, 8), None, 2, True),
    "relu": (noise(2, 3, 4, 5),),
    "add": (noise(2, 3, 4, 5), noise(2, 3, 4, 5)),
    "add_scaled": (noise(2, 3, 4, 5), noise(2, 3, 4, 5), noise(2, 1)),
    "mean_of_pixels": (noise(2, 3, 4, 5),),
    "scale_channels": (noise(2, 3, 4, 5), noise(2, 3)),
    "concat_channels": (noise(2, 3, 4, 5), noise(2, 4, 4, 5)),
    "geglu": (noise(2, 3, 8),),
    "upsample_nearest": (noise(2, 3, 4, 5), noise(2, 6, 7, 10)),
    "upsample_twice": (noise(2, 3, 4, 5),),
    "tokens_from_image": (noise(2, 3, 4, 5),),
    "image_from_tokens": (noise(2, 20, 3), noise(2, 3, 4, 5)),
}


def test_every_operation_is_called_here():
    assert set(CALLS) == set(ops.NAMES)


@pytest.mark.parametrize("name", CALLS)
def test_node_is_its_definition(name):
    operation, arguments = getattr(ops, name), CALLS[name]
    expected = operation(*arguments)
    with ops.as_nodes():
        assert torch.equal(operation(*arguments), expected)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = operation(*fakes)
    assert fake.shape == expected.shape
    assert fake.dtype == expected.dtype
    assert fake.is_contiguous() == expected.is_contiguous()


def test_padding_of_different_ends():
    """Stable Diffusion's encoder pads its strided convolutions below and to the right only."""
    x, weight = noise(1, 2, 6, 6), noise(3, 2, 3, 3)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, weight, stride=2)
    assert torch.equal(ops.conv3x3(x, weight, None, 2, [0, 1]), expected)


def test_attention_upcasts_only_the_scores():
    q, k, v = (noise(1, 4, 8).half() * 300 for _ in range(3))
    result = ops.attention(q, k, v, 1, True)
    assert result.dtype == torch.float16
    assert torch.isfinite(result).all()
