"""The convolution in FP8, at every tile size, against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sdfast import kernels
from sdfast.backends.fp8 import gathering
from sdfast.kernels import conv3x3_fp8
from sdfast.models import ops

gathered = gathering(kernels.convolution_fp8())


@pytest.fixture(autouse=True)
def _first_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no clock of a device to choose by."""
    monkeypatch.setattr(conv3x3_fp8.kernel, "configs", conv3x3_fp8.CONFIGS[-1:])


def tensors(
    shape: tuple[int, int, int, int], outputs: int, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pixels of very different sizes: a scale that is taken from the wrong one is a wrong number."""
    torch.manual_seed(sum(shape) + outputs)
    x = torch.randn(shape) * torch.rand(shape[0], 1, *shape[2:]).mul(6).exp()
    weight, scale = ops.quantised_rows(torch.randn(outputs, 9 * shape[1]))
    b = torch.randn(outputs) * 100 if bias else None
    return x, weight.view(outputs, 9, shape[1]), scale[:, 0], b


def assert_defined(given: tuple[Any, ...], *settings: Any) -> None:
    y, due = gathered(*given, *settings), ops.conv3x3_fp8(*given, *settings)
    assert y.dtype == due.dtype and y.is_contiguous(memory_format=torch.channels_last)
    size = due.square().mean().sqrt()
    torch.testing.assert_close(y / size, due / size, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        conv3x3_fp8.CONFIGS[0],
        *(pytest.param(config, marks=pytest.mark.slow) for config in conv3x3_fp8.CONFIGS[1:]),
    ],
    ids=str,
)
def test_it_is_the_definition_at_every_tile_size(config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """143 pixels and 144 channels: with every tile size whole tiles and a part of one, both ways."""
    monkeypatch.setattr(conv3x3_fp8.kernel, "configs", [config])
    assert_defined(tensors((1, 128, 13, 11), 144), 1, [1, 1], None)


@pytest.mark.parametrize(
    ("shape", "outputs", "stride", "padding", "size"),
    [
        ((2, 16, 3, 5), 16, 1, [1, 1], None),
        ((1, 144, 2, 2), 16, 1, [1, 1], None),  # a block of 128 channels, and a part of one
        ((2, 16, 7, 6), 48, 2, [1, 1], None),
        ((2, 16, 6, 7), 16, 2, [0, 1], None),
        ((2, 32, 3, 4), 16, 1, [1, 1], [6, 8]),
        ((2, 16, 3, 4), 16, 1, [1, 1], [5, 7]),
    ],
)
def test_strides_paddings_and_enlarged_images(
    shape: tuple[int, int, int, int], outputs: int, stride: int, padding: list[int], size: list[int] | None
) -> None:
    assert_defined(tensors(shape, outputs), stride, padding, size)


def test_many_rows_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of 64 pixels by two of 32 channels: a band of two and a part of one."""
    monkeypatch.setattr(conv3x3_fp8, "GROUPED_ROWS", 2)
    assert_defined(tensors((2, 16, 10, 8), 48, bias=False), 1, [1, 1], None)


def test_half_precision_is_rounded_once() -> None:
    x, *rest = tensors((1, 64, 6, 7), 32)
    y, due = (
        gathered(x.half(), *rest, 1, [1, 1], None),
        ops.conv3x3_fp8(x.half().float(), *rest, 1, [1, 1], None),
    )
    assert y.dtype == torch.float16
    error = (y.float() - due).abs()
    assert (
        error <= 0.51 * torch.finfo(torch.float16).eps * due.abs() + 1e-4 * due.square().mean().sqrt()
    ).all()


def test_a_picture_does_not_depend_on_those_beside_it() -> None:
    """Up to the last bits where it lies elsewhere in a tile: the interpreter's products are the BLAS's."""
    x, *rest = tensors((2, 32, 5, 4), 16)
    together = gathered(x, *rest, 1, [1, 1], None)
    for i in range(2):
        alone = gathered(x[i : i + 1], *rest, 1, [1, 1], None)
        torch.testing.assert_close(
            together[i : i + 1], alone, rtol=1e-6, atol=1e-5 * float(alone.abs().max())
        )


def test_what_does_not_fit_is_refused() -> None:
    x, weight, scale, bias = tensors((1, 16, 4, 4), 32)
    settings: tuple[Any, ...] = (1, [1, 1], None)
    with pytest.raises(ValueError, match=r"weight must be \[O, 9, 16\]"):
        gathered(x, weight[:, :8].contiguous(), scale, bias, *settings)
    with pytest.raises(ValueError, match=r"scale must be \[32\]"):
        gathered(x, weight, scale[:8], bias, *settings)
    with pytest.raises(ValueError, match=r"contiguous\(\) before"):
        gathered(x, weight.transpose(0, 2).contiguous().transpose(0, 2), scale, bias, *settings)
    with pytest.raises(ValueError, match=r"weight must be float8_e4m3fn, not torch.float16"):
        gathered(x, weight.half(), scale, bias, *settings)
    with pytest.raises(ValueError, match=r"\[4, 4\] pixels is not enlarged twice to \[9, 8\]"):
        gathered(x, weight, scale, bias, 1, [1, 1], [9, 8])
