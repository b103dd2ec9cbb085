"""Engines with a ControlNet: held to stock's ControlNet pipeline; faults of what their networks are told."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdfast import control, preparation
from sdfast.errors import EngineError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.manifest import read_manifest
from sdfast.models import ops
from sdfast.models.controlnet import ControlledUNet, ControlNet
from sdfast.validation import Report, validate
from sdfast.validation.control import control_image
from tests import checkpoints
from tests.validation import engines

PROMPT = ["a cabin in misty mountains, watercolor style"]
SOUND = 1e-5  # ten times below the bar: what float32 rounding leaves in a sound engine
NETWORK = {"unet", "step", "picture"}
IMAGE, SCALE = {"control", "picture"}, {"control_scale", "picture"}


@pytest.fixture
def engine(controlled_engine: Path, tmp_path: Path) -> Path:
    """An engine to be changed."""
    return shutil.copytree(controlled_engine, tmp_path / "engine")


def short(folder: Path) -> Report:
    return validate(folder, prompts=PROMPT, steps=4, scheduler="Euler a")


def errors(report: Report) -> dict[str, float]:
    return {module.name: module.worst for module in report.modules}


def at_fault(report: Report) -> set[str]:
    return {failure.part for failure in report.failures}


def test_a_sound_engine_passes_with_a_margin(engine: Path, tiny_controlnet: Path) -> None:
    report = short(engine)
    assert report.passed, report.table()
    assert max(errors(report).values()) < SOUND
    assert min(picture.psnr for picture in report.pictures) > 90
    assert {"control_embedding", "control", "control_scale", "unet", "step"} <= set(errors(report))
    assert errors(report)["control_scale"] == 0
    assert [len(picture.drift) for picture in report.pictures] == [4, 2]  # the second over the first one
    assert "StableDiffusionControlNetPipeline in float32" in report.setting.reference
    assert f"with ControlNet {tiny_controlnet}\n" in report.table()
    validation = read_manifest(engine).validation
    assert validation is not None and validation.passed
    page = (engine / "validation" / "report.html").read_text("utf-8")
    assert "under the same control image" in page
    assert page.count("data:image/png;base64,") == 3 * len(report.pictures) + 1


def scale_unread(patch: pytest.MonkeyPatch) -> None:
    """The network adds all of the ControlNet at every step."""
    patch.setattr(ops, "add_scaled", lambda x, branch, _scale: x + branch)


def residuals_swapped(patch: pytest.MonkeyPatch) -> None:
    """Two of the same shape."""
    sound = ControlNet.forward

    def swapped(self: ControlNet, *given: Tensor) -> list[Tensor]:
        first, second, *rest = sound(self, *given)
        return [second, first, *rest]

    patch.setattr(ControlNet, "forward", swapped)


def of_image(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Break the control image on its way to its embedding."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        sound = control.embedded
        patch.setattr(preparation, "embedded", lambda engine, image: sound(engine, change(image)))

    return broken


Scales = Sequence[tuple[float, ...]]


def of_scales(change: Callable[[Scales], Scales]) -> Callable[[pytest.MonkeyPatch], None]:
    """Break the scales of the steps."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        sound = control.scales
        patch.setattr(preparation, "scales", lambda *given, **told: change(sound(*given, **told)))

    return broken


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "a scale that the network does not read": (scale_unread, NETWORK),
    "residuals of two levels swapped": (residuals_swapped, NETWORK),
    "a control image a latent to the right": (of_image(lambda image: image.roll(8, 3)), IMAGE),
    "a scale of 1 whatever is asked": (
        of_scales(lambda found: [tuple(float(s > 0) for s in each) for each in found]),
        SCALE,
    ),
    "a step too many": (of_scales(lambda found: [max(found)] * len(found)), SCALE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(engine: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    broken, parts = FAULTS[fault]
    broken(monkeypatch)
    report = short(engine)
    assert at_fault(report) == parts, report.table()
    assert max(value for name, value in errors(report).items() if name not in parts) < SOUND


@pytest.fixture(scope="module")
def two(tiny_sd: Path, tiny_controlnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with two ControlNets: copy it before changing it."""
    place = tmp_path_factory.mktemp("two")
    second = checkpoints.build_controlnet(place / "second", tiny_sd, seed=7)
    recipe = Recipe.make(backend="eager", controlnet=[tiny_controlnet, second])
    return export(tiny_sd, place / "engine", recipe)


def images_swapped(patch: pytest.MonkeyPatch) -> None:
    of_image(lambda images: images.roll(3, 1))(patch)


def controlnets_swapped(patch: pytest.MonkeyPatch) -> None:
    """Each is told the scale and the image of the other."""
    sound = ControlledUNet.forward

    def swapped(self: ControlledUNet, time_shift: Tensor, control: Tensor, **given: Tensor) -> Tensor:
        shift = torch.cat([time_shift[:, :-2], time_shift[:, -2:].flip(1)], dim=1)
        return sound(self, time_shift=shift, control=control.roll(control.shape[1] // 2, 1), **given)

    patch.setattr(ControlledUNet, "forward", swapped)


FAULTS_OF_TWO: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "none": (lambda _patch: None, set()),
    "the images in the wrong order": (images_swapped, IMAGE),
    "the scale of the other": (of_scales(lambda found: [each[::-1] for each in found]), SCALE),
    "the networks in the wrong order": (controlnets_swapped, NETWORK),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS_OF_TWO)
def test_a_fault_of_several_is_named(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken, parts = FAULTS_OF_TWO[fault]
    broken(monkeypatch)
    report = short(shutil.copytree(two, tmp_path / "engine"))
    assert at_fault(report) == parts, report.table()
    assert max(value for name, value in errors(report).items() if name not in parts) < SOUND
    if fault == "none":
        assert min(picture.psnr for picture in report.pictures) > 90
        assert report.setting.controlnet is not None and report.setting.controlnet.endswith("/second")


def test_a_controlnet_that_has_changed_since_is_told(
    tiny_sd: Path, tiny_controlnet: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tiny_controlnet, tmp_path / "controlnet")
    folder = engines.build(tiny_sd, tmp_path / "engine", controlnet=own)
    shutil.rmtree(own)
    checkpoints.build_controlnet(own, tiny_sd, seed=3)
    with pytest.raises(EngineError, match=r"ControlNet diffusion_pytorch_model\.safetensors: exported"):
        short(folder)
    shutil.rmtree(own)
    with pytest.raises(EngineError, match="what it was exported from is not there any more"):
        short(folder)


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (96, 128)])
def test_the_control_image_has_no_symmetry_that_would_hide_a_fault(size: tuple[int, int]) -> None:
    image = control_image(*size)
    assert torch.equal(image, control_image(*size))
    assert set(image.unique().tolist()) == {0.0, 1.0}
    others = [image.flip(axis) for axis in (1, 2, 3)] + [image.flip(2, 3), image.roll(1, 1)]
    others += [image.roll(by, axis) for by in (8, -8) for axis in (2, 3)]
    assert all((other != image).float().mean() > 0.02 for other in others)
    assert all(0.02 < float(channel.mean()) < 0.5 for channel in image[0])
