"""Fixtures that more than one room's tests use."""

import os
from pathlib import Path

import pytest

from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from tests import checkpoints

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the real Hub
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")  # a third of a compile's time


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint, shared: copy it before changing it."""
    return checkpoints.build_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL checkpoint, shared: copy it before changing it."""
    return checkpoints.build_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def sd_engine(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD checkpoint as an eager engine, for 64 to 128 pixels: copy it before changing it."""
    sizes = {"min": "64x64", "max": "128x128"}
    return export(tiny_sd, tmp_path_factory.mktemp("eager") / "sd", Recipe.make(backend="eager", sizes=sizes))


@pytest.fixture(scope="session")
def sdxl_engine(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL checkpoint as an eager engine: copy it before changing it."""
    return export(tiny_sdxl, tmp_path_factory.mktemp("eager") / "sdxl", Recipe.make(backend="eager"))


@pytest.fixture(scope="session")
def sd_onnx(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD checkpoint as an ONNX engine: copy it before changing it."""
    return export(tiny_sd, tmp_path_factory.mktemp("onnx") / "sd", Recipe.make(backend="onnx"))
