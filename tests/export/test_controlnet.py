"""ControlNets beside a checkpoint: found, refused where they do not fit, and recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdfast.errors import CheckpointError, EngineError, ExportError
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.controlnet import with_controlnet
from sdfast.export.files import sha256
from sdfast.export.networks import Networks
from sdfast.export.recipe import ControlNetSetting, Recipe
from sdfast.manifest import read_manifest
from tests import checkpoints
from tests.sealing import reseal

WEIGHTS = "diffusion_pytorch_model.safetensors"


def beside(checkpoint: Path, source: object, **setting: str) -> Networks:
    given = ControlNetSetting.model_validate({"source": source, **setting})
    return Networks.of(with_controlnet(resolve(checkpoint), given))


@pytest.fixture
def controlnet(tiny_controlnet: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return shutil.copytree(tiny_controlnet, tmp_path / "controlnet")


def config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")

    return change


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json, so not a ControlNet"),
    "a union": (config(_class_name="ControlNetUnionModel"), "is a ControlNetUnionModel, not a ControlNet"),
    "a pickle": (to_pickle, r"a pickle only \(diffusion_pytorch_model.bin\)"),
    "half a file": (cut, "is truncated, or not safetensors"),
    "pooled": (config(global_pool_conditions=True), "global_pool_conditions=True is not supported"),
    "for SD 2": (config(cross_attention_dim=48), "cross_attention_dim: 48, but 32 is needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(tiny_sd: Path, controlnet: Path, case: str) -> None:
    change, message = BAD[case]
    change(controlnet)
    with pytest.raises(CheckpointError, match=message) as caught:
        beside(tiny_sd, controlnet)
    assert str(controlnet) in str(caught.value)


def test_what_is_no_folder_or_has_other_settings_is_refused(tiny_sd: Path, controlnet: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a ControlNet in a single file.*from_single_file"):
        beside(tiny_sd, controlnet / WEIGHTS)
    with pytest.raises(CheckpointError, match="revision has no meaning; leave it out"):
        beside(tiny_sd, controlnet, revision="main")
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'fp16'; .* ask for no variant"):
        beside(tiny_sd, controlnet, variant="fp16")
    with pytest.raises(CheckpointError, match="a ControlNet is a diffusers folder or a Hub id"):
        beside(tiny_sd, "nowhere")
    with pytest.raises(ExportError, match="controlnet: unknown field 'scale'; there are: source, revision"):
        Recipe.make(controlnet={"source": "org/canny", "scale": 1})


def test_an_engine_records_it_and_is_made_again_when_it_changes(
    tiny_sd: Path, controlnet: Path, controlled_engine: Path, tmp_path: Path
) -> None:
    """And is not read without its module for the control image."""
    recorded = read_manifest(controlled_engine).checkpoint.controlnet
    assert recorded is not None
    assert recorded.weights == {WEIGHTS: sha256(controlnet / WEIGHTS, "")}
    assert read_manifest(controlled_engine).recipe["controlnet"]["source"] == recorded.source

    broken = shutil.copytree(controlled_engine, tmp_path / "broken")
    reseal(broken, lambda document: document["modules"].pop("control_embedding"))
    with pytest.raises(EngineError, match="no module 'control_embedding'"):
        read_manifest(broken)

    recipe, target = Recipe.make(backend="eager", controlnet=controlnet), tmp_path / "engine"
    export(tiny_sd, target, recipe)
    first = read_manifest(target)
    shutil.rmtree(controlnet)
    checkpoints.build_controlnet(controlnet, tiny_sd, seed=9)
    export(tiny_sd, target, recipe)
    second = read_manifest(target)
    changed = {name for name in first.modules if first.modules[name] != second.modules[name]}
    assert changed == {"unet", "time_shift", "context", "control_embedding"}
