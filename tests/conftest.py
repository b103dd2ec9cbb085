"""Fixtures that more than one room's tests use."""

import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from tests import checkpoints
from tests.sealing import reseal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the real Hub
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")  # a third of a compile's time
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")  # for debuggers: a tenth of it
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # or four compiles ask what the compiler knows
# Or else pytest hangs its handlers on it too, and torch writes down all that it traces for them.
logging.getLogger("torch.__trace").propagate = True

EAGER_SMALL = Recipe.make(backend="eager", sizes={"min": "16x16", "max": "32x32"})
FLAT_SIZES = {"min": "16x16", "max": "32x24"}  # of `flat_onnx`


@pytest.fixture(scope="session")
def parsed_once() -> Iterator[None]:
    """The ONNX exporter parses the source of its five hundred operators anew for each module, and makes a
    registry of them: 0.6 s."""
    from onnxscript.values import TracedOnnxFunction
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parse = TracedOnnxFunction.function_ir.fget
    register = cache(ONNXRegistry.from_torchlib)

    def copied(opset_version: int) -> ONNXRegistry:
        """To which an export adds translations of its own."""
        known = copy(register(opset_version=opset_version))
        known.functions = {target: [*found] for target, found in known.functions.items()}
        return known

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TracedOnnxFunction, "function_ir", property(cache(parse)))
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all of its workers have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder` as `make` writes it, by the first worker that needs it."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part")
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(shared: Path) -> Path:
    """A tiny SD 1.x checkpoint, shared: copy it before changing it."""
    return made_once(shared / "sd", checkpoints.build_sd)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL checkpoint, shared: copy it before changing it."""
    return checkpoints.build_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL refiner, shared: copy it before changing it."""
    return checkpoints.build_refiner(tmp_path_factory.mktemp("tiny") / "refiner")


@pytest.fixture(scope="session")
def tiny_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint whose U-Net, of nine channels, is for inpainting."""
    folder, kind = tmp_path_factory.mktemp("tiny") / "inpainting", "StableDiffusionInpaintPipeline"
    return checkpoints.build_sd(folder, in_channels=9, pipeline=kind)


@pytest.fixture(scope="session")
def tiny_controlnet(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ControlNet for `tiny_sd`."""
    return checkpoints.build_controlnet(tmp_path_factory.mktemp("tiny") / "controlnet", tiny_sd)


@pytest.fixture(scope="session")
def controlled_engine(tiny_sd: Path, tiny_controlnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD checkpoint with its ControlNet as an eager engine: copy it before changing it."""
    recipe = Recipe.make(backend="eager", controlnet=tiny_controlnet)
    return export(tiny_sd, tmp_path_factory.mktemp("eager") / "controlled", recipe)


@pytest.fixture(scope="session")
def sd_engine(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD checkpoint as an eager engine, for 64 to 128 pixels: copy it before changing it."""
    sizes = {"min": "64x64", "max": "128x128"}
    return export(tiny_sd, tmp_path_factory.mktemp("eager") / "sd", Recipe.make(backend="eager", sizes=sizes))


@pytest.fixture(scope="session")
def shallow_sd(shared: Path) -> Path:
    """A checkpoint of few layers, to be compiled, shared: copy it before changing it."""
    return made_once(shared / "shallow", checkpoints.build_shallow_sd)


@pytest.fixture(scope="session")
def shallow_engine(shallow_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an eager engine, for 16 to 32 pixels: copy it before changing it."""
    return export(shallow_sd, tmp_path_factory.mktemp("shallow") / "engine", EAGER_SMALL)


@pytest.fixture(scope="session")
def flat_sd(shared: Path) -> Path:
    """A checkpoint of fewer still, its U-Net of one level, shared: copy it before changing it."""
    return made_once(shared / "flat", checkpoints.build_flat_sd)


@pytest.fixture(scope="session")
def flat_engine(flat_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an eager engine, for 16 to 32 pixels: copy it before changing it."""
    return export(flat_sd, tmp_path_factory.mktemp("flat") / "engine", EAGER_SMALL)


@pytest.fixture(scope="session")
def flat_onnx(parsed_once: None, flat_sd: Path, shared: Path) -> Path:
    """The same as an ONNX engine, for `FLAT_SIZES`, two pictures at a time: copy it before changing it."""
    recipe = Recipe.make(backend="onnx", sizes=FLAT_SIZES, batch=2)
    return made_once(shared / "flat-onnx", lambda part: export(flat_sd, part, recipe))


@pytest.fixture(scope="session")
def sdxl_engine(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL checkpoint as an eager engine: copy it before changing it."""
    return export(tiny_sdxl, tmp_path_factory.mktemp("eager") / "sdxl", Recipe.make(backend="eager"))


@pytest.fixture(scope="session")
def refiner_engine(tiny_refiner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL refiner as an eager engine: copy it before changing it."""
    return export(tiny_refiner, tmp_path_factory.mktemp("eager") / "refiner", Recipe.make(backend="eager"))


@pytest.fixture(scope="session")
def inpainting_engine(tiny_inpainting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint for inpainting as an eager engine: copy it before changing it."""
    folder = tmp_path_factory.mktemp("eager") / "inpainting"
    return export(tiny_inpainting, folder, Recipe.make(backend="eager"))


@pytest.fixture(scope="session")
def sd_onnx(parsed_once: None, tiny_sd: Path, shared: Path) -> Path:
    """The tiny SD checkpoint as an ONNX engine: copy it before changing it."""
    return made_once(shared / "sd-onnx", lambda part: export(tiny_sd, part, Recipe.make(backend="onnx")))


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


# The files that take longest, the longest first: one that was begun late would be waited for by all workers.
LONGEST = (
    "backends/test_inductor.py",
    "export/test_onnx.py",
    "server/test_page.py",
    "export/test_onnx_cuda.py",
    "benchmarks/test_gpu_suite.py",
    "export/test_build.py",
    "test_pag.py",
    "server/test_serve.py",
    "server/test_automatic1111.py",
    "test_cli.py",
    "test_image_to_image.py",
    "server/test_faults.py",
    "kernels/test_interpreted.py",
    "validation/test_validate.py",
    "test_controlnet.py",
    "hub/test_download.py",
    "validation/test_broken_engines.py",
    "server/test_worker.py",
    "test_ip_adapter.py",
    "export/test_vae_in_half.py",
    "server/test_edits.py",
    "validation/test_loras.py",
    "server/test_live.py",
    "schedulers/test_solvers.py",
    "schedulers/test_tables.py",
    "test_landscapes.py",
    "test_pipeline.py",
    "schedulers/test_configs.py",
    "schedulers/test_k_diffusion.py",
    "test_instruct.py",
    "test_loras.py",
    "kernels/test_compiled.py",
    "export/test_lora.py",
    "validation/test_inpainting.py",
    "schedulers/test_extract.py",
    "export/test_optimum.py",
    "validation/test_vae.py",
    "export/test_checkpoint.py",
    "export/test_compiled_kernels.py",
    "test_step_cache.py",
    "test_tokenizer.py",
    "backends/test_eager.py",
    "test_long_prompts.py",
    "validation/test_control.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    lost = [name for name in LONGEST if not (here / name).is_file()]
    if lost:
        raise pytest.UsageError(f"{__file__}: LONGEST names {', '.join(lost)}, which are not there")
    places = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collectstart() -> None:
    """What is imported and collected, ten thousand tests, lives to the end: none of it is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """And later collections of garbage need not look through it, which would take a second each."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or else what is written in C++ tells of leaks at the end
