"""Fixtures that more than one room's tests use."""

import gc
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from tests import checkpoints
from tests.sealing import reseal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the real Hub
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")  # a third of a compile's time


@pytest.fixture(scope="session")
def parsed_once() -> Iterator[None]:
    """The ONNX exporter parses the source of its five hundred operators anew for each module: 0.4 s."""
    from onnxscript.values import TracedOnnxFunction

    parse = TracedOnnxFunction.function_ir.fget
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TracedOnnxFunction, "function_ir", property(cache(parse)))
        yield


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint, shared: copy it before changing it."""
    return checkpoints.build_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL checkpoint, shared: copy it before changing it."""
    return checkpoints.build_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint whose U-Net, of nine channels, is for inpainting."""
    folder, kind = tmp_path_factory.mktemp("tiny") / "inpainting", "StableDiffusionInpaintPipeline"
    return checkpoints.build_sd(folder, in_channels=9, pipeline=kind)


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
def inpainting_engine(tiny_inpainting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint for inpainting as an eager engine: copy it before changing it."""
    folder = tmp_path_factory.mktemp("eager") / "inpainting"
    return export(tiny_inpainting, folder, Recipe.make(backend="eager"))


@pytest.fixture(scope="session")
def sd_onnx(parsed_once: None, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD checkpoint as an ONNX engine: copy it before changing it."""
    return export(tiny_sd, tmp_path_factory.mktemp("onnx") / "sd", Recipe.make(backend="onnx"))


@pytest.fixture(scope="session")
def says_onnx(sd_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of which the manifest alone is an ONNX one's, for what is refused before it is loaded."""
    engine = Path(shutil.copytree(sd_engine, tmp_path_factory.mktemp("onnx") / "manifest"))
    reseal(engine, lambda document: document.update(backend="onnx", recipe={"provider": "cpu"}))
    return engine


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms that were compiled, not taken from the store."""
    from sdfast.export import inductor

    forms: list[str] = []
    compile_now = inductor._compile

    def counted(program: Any, inputs: Any, path: Path, options: Any) -> Any:
        forms.append(path.stem)
        return compile_now(program, inputs, path, options)

    monkeypatch.setattr(inductor, "_compile", counted)
    return forms


def pytest_collectstart() -> None:
    """What is imported and collected, ten thousand tests, lives to the end: none of it is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """And later collections of garbage need not look through it, which would take a second each."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or else what is written in C++ tells of leaks at the end
