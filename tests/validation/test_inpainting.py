"""Engines whose U-Net is for inpainting: what they draw over, and faults of what their U-Net is told."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdfast import first_latents
from sdfast.errors import RequestError
from sdfast.first_latents import Start
from sdfast.manifest import read_manifest
from sdfast.validation import Report, validate
from sdfast.validation.inpainting import Scene
from tests import checkpoints
from tests.sealing import reseal
from tests.validation import engines

PROMPT = ["a cabin in misty mountains, watercolor style"]
SOUND = 1e-5  # ten times below the bar: what float32 rounding leaves in a sound engine
TOLD = {"mask", "masked_image"}


@pytest.fixture
def engine(inpainting_engine: Path, tmp_path: Path) -> Path:
    """An engine to be changed."""
    return shutil.copytree(inpainting_engine, tmp_path / "engine")


def short(folder: Path) -> Report:
    return validate(folder, prompts=PROMPT, steps=2, scheduler="Euler a")


def errors(report: Report) -> dict[str, float]:
    return {module.name: module.worst for module in report.modules}


def at_fault(report: Report) -> set[str]:
    return {failure.part for failure in report.failures}


def test_a_sound_engine_passes_with_a_margin(engine: Path) -> None:
    """Two pictures of all steps, and one whose first latents are the image's."""
    told: list[str] = []
    report = validate(engine, prompts=[*PROMPT, "boat"], steps=4, progress=told.append)
    assert report.passed, report.table()
    assert max(errors(report).values()) < SOUND
    assert min(picture.psnr for picture in report.pictures) > 90
    own = "PNDMScheduler"
    drawn = [(picture.scheduler, picture.seed, len(picture.drift)) for picture in report.pictures]
    stochastic = [("Euler a", 0, 4), ("Euler a", 1, 4)]
    assert drawn == [(own, 0, 5), (own, 1, 5), *stochastic, (f"{own}, strength 0.6", 0, 3)]
    assert {"unet", "step", "vae_encoder", f"scheduler {own}", "scheduler Euler a", *TOLD} <= set(
        errors(report)
    )
    assert f"{own}, strength 0.6" in told
    assert "StableDiffusionInpaintPipeline in float32" in report.setting.reference
    assert "over the masked part of one image" in report.table()
    validation = read_manifest(engine).validation
    assert validation is not None and validation.passed
    assert validation.figures["mask.relative_l2"] == 0
    page = (engine / "validation" / "report.html").read_text("utf-8")
    assert "over the same image and mask" in page
    assert page.count("data:image/png;base64,") == 3 * len(report.pictures) + 2


@pytest.mark.slow
def test_an_sdxl_engine(tmp_path: Path) -> None:
    """In float32; and in half precision, where stock keeps its VAE in float32."""
    kind = "StableDiffusionXLInpaintPipeline"
    checkpoint = checkpoints.build_sdxl(
        tmp_path / "sdxl", in_channels=9, pipeline=kind, vae=checkpoints.SMALL_VAE
    )
    report = short(engines.build(checkpoint, tmp_path / "engine"))
    assert report.passed, report.table()
    assert max(errors(report).values()) < SOUND
    assert kind in report.setting.reference
    half = engines.build(checkpoint, tmp_path / "half", dtype="fp16")
    report = validate(half, prompts=PROMPT, steps=1, scheduler="Euler")
    modules = {module.name: module for module in report.modules}
    assert modules["mask"].worst == 0 and modules["mask"].stock_relative_l2 is None
    hidden = modules["masked_image"]
    assert hidden.passed and hidden.stock_dtype == "bfloat16"
    assert hidden.stock_relative_l2 is not None and hidden.stock_relative_l2 > 1e-3
    assert hidden.bar == pytest.approx(1.1 * hidden.stock_relative_l2)


def of_mask(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Break the mask that latents have."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        sound = first_latents._mask_of_latents
        patch.setattr(first_latents, "_mask_of_latents", lambda *given: change(sound(*given)))

    return broken


def of_start(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Break what the U-Net is told beside the latents."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        sound = first_latents.start_over

        def start(*given: Any, **options: Any) -> Start:
            made = sound(*given, **options)
            assert made.beside is not None
            return replace(made, beside=change(made.beside))

        patch.setattr("sdfast.preparation.start_over", start)

    return broken


def other_corner(patch: pytest.MonkeyPatch) -> None:
    """Of each latent the pixel at another corner decides."""
    patch.setattr(first_latents, "_mask_of_latents", lambda _engine, mask: mask[:, :, 7::8, 7::8].bool())


def black_for_grey(patch: pytest.MonkeyPatch) -> None:
    """What the mask covers is black to the encoder."""
    sound = first_latents._image_latents

    def latents(engine: Any, noise: Any, image: Tensor, count: int) -> Tensor:
        return sound(engine, noise, torch.where(image == 0.5, 0.0, image), count)

    patch.setattr(first_latents, "_image_latents", latents)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "a mask of another corner": (other_corner, {"mask"}),
    "a mask a latent to the right": (of_mask(lambda mask: mask.roll(1, 3)), {"mask"}),
    "an inverted mask": (of_mask(lambda mask: ~mask), {"mask"}),
    "the mask behind the image": (of_start(lambda told: told.roll(-1, 1)), TOLD),
    "the image's channels in reverse": (
        of_start(lambda told: torch.cat([told[:, :1], told[:, 1:].flip(1)], dim=1)),
        {"masked_image"},
    ),
    "black in place of grey": (black_for_grey, {"masked_image"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_what_the_u_net_is_told_is_named(
    engine: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken, parts = FAULTS[fault]
    broken(monkeypatch)
    report = short(engine)
    assert at_fault(report) == parts | {"picture"}, report.table()
    assert all(f"  {part}: " in report.table() for part in parts)
    assert max(value for name, value in errors(report).items() if name not in parts) < SOUND


def test_a_u_net_that_takes_the_mask_for_the_image(engine: Path) -> None:
    """Its weights are in another order: latents, masked image, mask."""
    order = [0, 1, 2, 3, 5, 6, 7, 8, 4]
    engines.change_weight(engine, "unet", "conv_in.weight", lambda weight: weight[:, order])
    assert at_fault(short(engine)) == {"unet", "step", "picture"}


def test_an_encoder_that_gives_no_numbers(engine: Path) -> None:
    engines.change_weight(engine, "vae_encoder", "encoder.conv_out.weight", lambda w: w * torch.nan)
    assert {"vae_encoder", "masked_image", "picture"} <= at_fault(short(engine))


def test_an_engine_without_an_encoder_is_refused(engine: Path) -> None:
    reseal(engine, lambda document: document["modules"].pop("vae_encoder"))
    with pytest.raises(RequestError, match="has no VAE encoder"):
        short(engine)


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (96, 128)])
def test_a_scene_has_no_symmetry_that_would_hide_a_fault(size: tuple[int, int]) -> None:
    scene = Scene.make(*size)
    assert torch.equal(scene.image, Scene.make(*size).image)
    assert (scene.image.min() > 0) and (scene.image.max() < 1)
    mask = scene.mask[0]
    told = mask[::8, ::8]
    others = [1 - told, told.flip(0), told.flip(1), told.flip(0, 1), mask[7::8, 7::8]]
    others += [told.roll(by, axis) for by in (1, -1) for axis in (0, 1)]
    assert all((other != told).sum() >= 4 for other in others)
    assert len({tuple(told.shape), *(tuple(other.shape) for other in others)}) == 1
    assert {0.0, 1.0} == set(mask.unique().tolist())
    assert torch.equal(scene.kept, torch.where(mask > 0, 0.5, scene.image))
