"""The figures, on cases whose answer is known."""

import math

import pytest
import torch

from sdfast.validation.metrics import IDENTICAL_DB, compare, psnr, relative_l2, ssim


def test_relative_l2_of_a_scaled_tensor() -> None:
    truth = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert relative_l2(1.01 * truth, truth) == pytest.approx(0.01, rel=1e-5)


def test_inputs_are_taken_together_and_the_worst_alone() -> None:
    large, small = torch.full((3,), 10.0), torch.full((3,), 0.1)
    error = compare([(large, large), (2 * small, small)])
    assert error.inputs == 2
    assert error.worst == pytest.approx(1.0)
    assert error.relative_l2 == pytest.approx(0.1 / math.hypot(10.0, 0.1))
    assert error.max_abs == pytest.approx(0.1)


def test_cosine() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert compare([(a, b)]).cosine == pytest.approx(math.sqrt(0.5))
    assert compare([(torch.zeros(2), torch.zeros(2))]).cosine == 1.0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_not_a_number_is_never_lost(order: tuple[int, int]) -> None:
    good = (torch.ones(2), torch.ones(2))
    bad = (torch.tensor([1.0, math.nan]), torch.ones(2))
    error = compare([(good, bad)[i] for i in order])
    assert math.isnan(error.relative_l2)
    assert math.isnan(error.worst)
    assert math.isnan(error.max_abs)


def test_a_truth_of_zeros() -> None:
    assert relative_l2(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_l2(torch.ones(3), torch.zeros(3)) == math.inf


def test_psnr() -> None:
    truth = torch.zeros(3, 16, 16)
    assert psnr(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-4)
    assert psnr(truth, truth) == IDENTICAL_DB
    assert math.isnan(psnr(truth * math.nan, truth))


def test_ssim() -> None:
    truth = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ssim(truth, truth) == pytest.approx(1.0)
    assert ssim(1 - truth, truth) < 0
