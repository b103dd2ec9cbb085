"""For pytest on a GPU that computes nothing: numbers are neither compared nor looked at.

Tests marked `numbers` run too; that their assertions fail is expected ("xfailed"), any other error is not.
"""

import sys

import pytest
import torch

from tests.null_gpu.stand_ins import nothing


def pytest_configure() -> None:
    torch.testing.assert_close = nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    numbers = pytest.mark.xfail(raises=AssertionError, reason="this GPU computes nothing")
    for item in items:
        if item.get_closest_marker("numbers"):
            item.add_marker(numbers)
    for name in [name for name in sys.modules if name.startswith("tests.")]:
        if hasattr(sys.modules[name], "assert_same"):
            sys.modules[name].assert_same = nothing  # type: ignore[attr-defined]
