"""The linear layer with its GEGLU, at every tile size, against the definition in float64."""

from functools import partial

import pytest
import torch

from sdfast import kernels
from sdfast.kernels import geglu
from sdfast.models import ops

CONFIGS = [*geglu.HALF_CONFIGS, *geglu.FULL_CONFIGS]
linear_geglu = kernels.linear_geglus()["triton"]


@pytest.fixture(autouse=True)
def _first_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no clock of a device to choose by."""
    monkeypatch.setattr(geglu.half_kernel, "configs", geglu.HALF_CONFIGS[-1:])
    monkeypatch.setattr(geglu.full_kernel, "configs", geglu.FULL_CONFIGS[-1:])


def tensors(
    rows: int, width: int, features: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows + width + features)
    x, weight = torch.randn(rows, width), torch.randn(2 * features, width) / width**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(2 * features).to(dtype)


def definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return ops.geglu(ops.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_the_definition_at_every_tile_size(config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """137 rows and 136 features: with every tile size whole tiles and a part of one, both ways."""
    monkeypatch.setattr(geglu.full_kernel, "configs", [config])
    given = tensors(137, 128, 136)
    torch.testing.assert_close(linear_geglu(*given).double(), definition(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "width", "features"), [(1, 64, 32), (5, 40, 24), (33, 100, 40), (600, 8, 16), (64, 320, 64)]
)
def test_sizes_that_fill_no_tile(rows: int, width: int, features: int) -> None:
    """600 rows are nineteen tiles: two bands of eight and a part of one."""
    given = tensors(rows, width, features)
    torch.testing.assert_close(linear_geglu(*given).double(), definition(*given), rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_once() -> None:
    """In float16: the interpreter takes bfloat16 in a product for whole numbers."""
    given = tensors(70, 64, 40, torch.float16)
    y, due = linear_geglu(*given), definition(*given)
    assert y.dtype == torch.float16
    assert ((y - due).abs() <= 0.51 * torch.finfo(torch.float16).eps * due.abs() + 1e-5).all()


def test_the_halves_may_be_beyond_float16() -> None:
    """Only what they come to is rounded: here the gate is 1e5 away from zero, and shut."""
    x, weight = torch.full([16, 64], 200.0), torch.full([64, 64], 10.0)
    weight[32:] *= -1
    y = linear_geglu(x.half(), weight.half(), torch.zeros(64).half())
    assert torch.equal(y, torch.zeros_like(y))


def test_leading_axes_are_kept_and_a_row_depends_on_itself_alone() -> None:
    """Up to the last bits where a row lies elsewhere in a tile: the interpreter's products are the BLAS's."""
    x, weight, bias = tensors(90, 64, 40)
    apart = x.view(3, 30, 64)
    y = linear_geglu(apart, weight, bias)
    assert y.shape == (3, 30, 40)
    assert torch.equal(y.view(90, 40), linear_geglu(x, weight, bias))
    same = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    same(y[1], linear_geglu(apart[1], weight, bias))
    across = apart.transpose(0, 1)  # rows that lie apart
    same(linear_geglu(across, weight, bias), y.transpose(0, 1))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = tensors(4, 16, 8)
    with pytest.raises(ValueError, match=r"weight must be \[2 F, 16\]"):
        linear_geglu(x, weight[:, :8], bias)
    with pytest.raises(ValueError, match=r"bias must be \[16\]"):
        linear_geglu(x, weight, bias[:8])
    with pytest.raises(ValueError, match=r"contiguous\(\) before"):
        linear_geglu(x, weight.t().contiguous().t(), bias)
    with pytest.raises(ValueError, match=r"float64"):
        linear_geglu(x.double(), weight.double(), bias.double())
    with pytest.raises(ValueError, match=r"make them one"):
        linear_geglu(x.half(), weight, bias)
