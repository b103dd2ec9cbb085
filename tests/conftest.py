"""Fixtures that more than one room's tests use."""

import os
from pathlib import Path

import pytest

from tests import checkpoints

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the real Hub


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint, shared: copy it before changing it."""
    return checkpoints.build_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL checkpoint, shared: copy it before changing it."""
    return checkpoints.build_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")
