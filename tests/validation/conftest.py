"""Engines of one tiny checkpoint, exported once."""

import shutil
from pathlib import Path

import pytest

from tests.validation import engines


@pytest.fixture(scope="session")
def checkpoint(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint whose own scheduler sdfast has."""
    folder = shutil.copytree(tiny_sd, tmp_path_factory.mktemp("validation") / "checkpoint")
    return engines.use_own_scheduler(folder)


@pytest.fixture(scope="session")
def sound(checkpoint: Path) -> Path:
    """An engine of `checkpoint`: copy it before changing it."""
    return engines.build(checkpoint, checkpoint.parent / "sound")


@pytest.fixture
def engine(sound: Path, tmp_path: Path) -> Path:
    """A copy of `sound`, to be broken."""
    return shutil.copytree(sound, tmp_path / "engine")
