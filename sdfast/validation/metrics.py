"""How far a result is from the truth. Everything is computed in float64.

A result that is not finite has figures that are not finite: they pass no bar.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sdfast.errors import DependencyError

IDENTICAL_DB = 200.0
"""Stands for the infinite PSNR of equal pictures, as JSON has no infinity; float32 rounding is near 130."""


@dataclass(frozen=True)
class Error:
    """The error of one module over several inputs.

    relative_l2: ‖value - truth‖ / ‖truth‖, all inputs taken together; worst: that of the worst input alone.
    max_abs: the largest difference of two elements. cosine: of value and truth, all inputs taken together.
    """

    inputs: int
    relative_l2: float
    worst: float
    max_abs: float
    cosine: float


def compare(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Error:
    """The error of (value, truth) pairs; the two of a pair have one shape."""
    error = truth_norm = value_norm = product = 0.0
    singles, largest = [], []
    for given, expected in pairs:
        value, truth = _flat(given), _flat(expected)
        difference = value - truth
        squares, own = float(difference @ difference), float(truth @ truth)
        error, truth_norm = error + squares, truth_norm + own
        value_norm, product = value_norm + float(value @ value), product + float(value @ truth)
        singles.append(_ratio(squares, own))
        largest.append(float(difference.abs().max()))
    length = math.sqrt(truth_norm * value_norm)
    cosine = product / length if length else 1.0
    return Error(len(singles), _ratio(error, truth_norm), _largest(singles), _largest(largest), cosine)


def relative_l2(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value - truth‖ / ‖truth‖ of two tensors of one shape."""
    return compare([(value, truth)]).relative_l2


def psnr(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures [3, H, W] in [0, 1]."""
    error = float((_flat(image) - _flat(truth)).square().mean())
    if math.isnan(error):
        return math.nan
    return min(IDENTICAL_DB, -10 * math.log10(error)) if error else IDENTICAL_DB


def ssim(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Structural similarity of pictures [3, H, W] in [0, 1] (Wang et al. 2004), by scikit-image."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise DependencyError('validation needs scikit-image: pip install "sdfast[export]"') from error
    arrays = (tensor.detach().double().cpu().numpy() for tensor in (image, truth))
    return float(structural_similarity(*arrays, channel_axis=0, data_range=1.0))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64).flatten()


def _ratio(error: float, truth: float) -> float:
    """The relative L2 error of two sums of squares. A truth of zeros is met by zeros only."""
    if truth == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / truth)


def _largest(values: list[float]) -> float:
    """The largest value; NaN if there is one, which `max` would lose."""
    return math.nan if any(map(math.isnan, values)) else max(values)
