"""The page's plots and pictures."""

import math

import pytest
import torch

from sdfast.validation.page import Axis, difference


def test_an_axis_holds_its_values() -> None:
    axis = Axis.over([3e-7, 2e-4, 0.0, math.nan, math.inf], 0, 100)
    assert (axis.low, axis.high) == (-7, -3)
    assert axis.at(1e-5) == pytest.approx(50)
    assert axis.at(0.0) == 0
    assert axis.at(math.nan) == axis.at(math.inf) == 100
    assert [label for _, label in axis.ticks] == ["1e-7", "1e-6", "1e-5", "1e-4", "1e-3"]


def test_an_axis_of_nothing() -> None:
    assert Axis.over([0.0], 0, 1).low < Axis.over([0.0], 0, 1).high


def test_differences_are_amplified_as_far_as_they_fit() -> None:
    truth = torch.full((3, 8, 8), 0.5)
    image = truth.clone()
    image[0, 0, 0] += 0.004
    amplified, gain = difference(image, truth)
    assert gain == 200
    assert float(amplified.max()) == pytest.approx(0.8, abs=1e-4)
    assert difference(truth, truth)[1] > 1
    assert difference(1 - truth * 0, truth * 0)[1] == 1
