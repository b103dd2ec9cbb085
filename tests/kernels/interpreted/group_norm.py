"""Both group norms against the definition in float64."""

import pytest
import torch

from sdfast import kernels
from sdfast.kernels import group_norm
from sdfast.models import ops

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["triton whole", "triton parts"])
def norm(request: pytest.FixtureRequest) -> ops.GroupNormKernel:
    return kernels.group_norms()[request.param]


def image(
    *shape: int, mean: float = 0.0, spread: float = 1.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    values = (torch.randn(shape) * spread + mean).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def definition(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    silu: bool,
) -> torch.Tensor:
    given = [None if t is None else t.double() for t in (x, shift, weight, bias)]
    x, shift, weight, bias = given  # type: ignore[assignment]
    if shift is not None and silu:
        return ops.shifted_group_norm_silu(x, shift, weight, bias, groups, 1e-5)
    x = x if shift is None else x + shift[:, :, None, None]
    return (ops.group_norm_silu if silu else ops.group_norm)(x, weight, bias, groups, 1e-5)


SIZES = [
    (1, 2, 7, 9),
    (4, 3, 13, 11),
    (10, 3, 13, 11),
    (20, 2, 7, 9),
    (30, 1, 1, 3),
    (40, 2, 13, 11),
    (60, 2, 7, 9),
    (80, 1, 13, 11),
]
SHIFTED = {4, 10, 60}


@pytest.mark.parametrize(
    ("each", "batch", "height", "width", "shifted"),
    [  # the other half is slow
        *((*size, size[0] in SHIFTED) for size in SIZES),
        *(pytest.param(*size, size[0] not in SHIFTED, marks=pytest.mark.slow) for size in SIZES),
    ],
)
def test_it_is_the_definition(
    norm: ops.GroupNormKernel, each: int, batch: int, height: int, width: int, shifted: bool
) -> None:
    """Three groups, so that tiles of channels end within one; 143 pixels are a chunk and a part of one."""
    x, silu = image(batch, 3 * each, height, width), (each // 10 + shifted) % 2 == 0
    weight, bias = parameters(3 * each)
    shift = torch.randn(batch, 3 * each + 7)[:, 4:-3] if shifted else None  # a slice, as the U-Net has it
    y = norm(x, shift, weight, bias, 3, 1e-5, silu)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == x.dtype
    torch.testing.assert_close(y.double(), definition(x, shift, weight, bias, 3, silu), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("silu", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_image_of_many_chunks(norm: ops.GroupNormKernel, silu: bool) -> None:
    x, (weight, bias) = (
        image(1, 32, 67, 65),
        parameters(32),
    )  # 4355 pixels: five chunks, the last a part of one
    y = norm(x, None, weight, bias, 8, 1e-5, silu)
    torch.testing.assert_close(y.double(), definition(x, None, weight, bias, 8, silu), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("mean", [100.0, -3e4])
def test_a_large_mean_costs_no_digits(norm: ops.GroupNormKernel, mean: float) -> None:
    """A sum of squares would: at a mean of 30000 with a spread of 1 it has no digit of the variance."""
    x, (weight, bias) = image(2, 20, 17, 19, mean=mean), parameters(20)
    y = norm(x, None, weight, bias, 2, 1e-5, False)
    due = definition(x, None, weight, bias, 2, False)
    assert (y - due).abs().max() <= 4 * EPS * abs(mean) * weight.abs().max()


def test_one_channel_far_from_the_others(norm: ops.GroupNormKernel) -> None:
    """And one corner far from the rest of the image, so that the moments to be merged differ."""
    x, (weight, bias) = image(1, 20, 19, 17), parameters(20)
    x[:, 3] += 1000
    x[:, :, :4, :4] -= 500
    y = norm(x, None, weight, bias, 2, 1e-5, False)
    torch.testing.assert_close(y.double(), definition(x, None, weight, bias, 2, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("silu", [pytest.param(False, marks=pytest.mark.slow), True])
def test_half_precision_is_rounded_once(norm: ops.GroupNormKernel, dtype: torch.dtype, silu: bool) -> None:
    x, (weight, bias) = image(2, 40, 9, 7, dtype=dtype), parameters(40, dtype)
    shift = torch.randn(2, 40).to(dtype)
    y = norm(x, shift, weight, bias, 4, 1e-5, silu)
    due = definition(x, shift, weight, bias, 4, silu)
    assert y.dtype == dtype
    units = 0.51 if dtype == torch.float16 else 1.01  # the interpreter cuts bfloat16 off, where a GPU rounds
    assert ((y - due).abs() <= units * torch.finfo(dtype).eps * due.abs() + 1e-5).all()


def test_numbers_at_the_end_of_float16(norm: ops.GroupNormKernel) -> None:
    """Neither their sum nor their square nor the shift added to them is within float16."""
    x, (weight, bias) = image(1, 20, 8, 9, mean=6e4, spread=2e3, dtype=torch.float16), parameters(20)
    x = x.clamp(max=65000)
    weight, bias = weight.half(), bias.half()
    shift = torch.full([1, 20], 3e4, dtype=torch.float16)
    y = norm(x, shift, weight, bias, 2, 1e-5, True)
    due = definition(x, shift, weight, bias, 2, True)
    assert y.isfinite().all()
    torch.testing.assert_close(y.double(), due, rtol=1e-3, atol=1e-3)


def test_a_picture_is_the_same_alone_and_beside_others_and_every_time(norm: ops.GroupNormKernel) -> None:
    x, (weight, bias) = image(3, 40, 12, 13), parameters(40)
    x[2] = torch.nan
    shift = torch.randn(3, 40)
    together = norm(x, shift, weight, bias, 4, 1e-5, True)
    assert torch.equal(together[:2], norm(x, shift, weight, bias, 4, 1e-5, True)[:2])
    for i in range(2):
        alone = norm(x[i : i + 1], shift[i : i + 1], weight, bias, 4, 1e-5, True)
        assert torch.equal(alone[0], together[i])
    assert together[2].isnan().all()


def test_an_image_of_one_number_is_its_bias(norm: ops.GroupNormKernel) -> None:
    weight, bias = parameters(40)
    x = torch.full([2, 40, 6, 6], 123.25).contiguous(memory_format=torch.channels_last)
    y = norm(x, None, weight, bias, 4, 1e-5, False)
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))


def test_what_does_not_fit_is_refused(norm: ops.GroupNormKernel) -> None:
    x, (weight, bias) = image(2, 8, 4, 4), parameters(8)
    with pytest.raises(ValueError, match=r"channels-last.*call x\.contiguous"):
        norm(x.contiguous(), None, weight, bias, 2, 1e-5, False)
    with pytest.raises(ValueError, match="8 channels cannot be divided into 3 groups"):
        norm(x, None, weight, bias, 3, 1e-5, False)
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        norm(x, None, weight[:4], bias, 2, 1e-5, False)
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        norm(x, None, weight, torch.randn(16)[::2], 2, 1e-5, False)
    with pytest.raises(ValueError, match=r"shift must be \[2, 8\]"):
        norm(x, torch.randn(1, 8), weight, bias, 2, 1e-5, False)


def test_long_chunks_are_for_narrow_layers() -> None:
    assert [group_norm.chunk_pixels(c) for c in (128, 256, 320, 1280)] == [1024, 1024, 128, 128]
