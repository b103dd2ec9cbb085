"""Engines of SDXL's refiner: what they draw over, and faults of what their U-Net is told."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from sdfast import preparation
from sdfast.manifest import read_manifest
from sdfast.prompts import told_sizes
from sdfast.validation import Report, validate
from tests.validation import engines

PROMPT = ["a cabin in misty mountains, watercolor style"]
SOUND = 1e-5  # ten times below the bar: what float32 rounding leaves in a sound engine
Told = tuple[list[float], list[float]]


@pytest.fixture
def engine(refiner_engine: Path, tmp_path: Path) -> Path:
    """An engine to be changed."""
    return shutil.copytree(refiner_engine, tmp_path / "engine")


def short(folder: Path) -> Report:
    return validate(folder, prompts=PROMPT, steps=2, scheduler="Euler a")


def at_fault(report: Report) -> set[str]:
    return {failure.part for failure in report.failures}


@pytest.mark.slow
def test_a_sound_engine_passes_with_a_margin(engine: Path) -> None:
    report = short(engine)
    assert report.passed, report.table()
    worst = {module.name: module.worst for module in report.modules}
    assert max(worst.values()) < SOUND
    assert {
        "text_encoder_2.hidden_states",
        "text_encoder_2.text_embeds",
        "time_shift",
        "unet",
    } <= worst.keys()
    assert {"vae_encoder", "scheduler Euler a"} <= worst.keys()
    assert [(one.scheduler, len(one.drift)) for one in report.pictures] == [
        ("Euler a", 2),
        ("Euler a, strength 0.6", 1),
    ]
    assert min(picture.psnr for picture in report.pictures) > 90
    assert "StableDiffusionXLImg2ImgPipeline in float32" in report.setting.reference
    assert "seed 0, over one image" in report.table()
    assert {check.name for check in report.checks} >= {"time_ids", "tokenizer"}
    validation = read_manifest(engine).validation
    assert validation is not None and validation.passed


@pytest.mark.slow
def test_a_checkpoints_own_scheduler_and_a_stochastic_one(engine: Path) -> None:
    report = validate(engine, prompts=[*PROMPT, "boat"], steps=4)
    assert report.passed, report.table()
    assert {picture.scheduler for picture in report.pictures} == {
        *("PNDMScheduler", "Euler a", "PNDMScheduler, strength 0.6")
    }


def wrong_score(told: Told) -> Told:
    return [*told[0][:4], told[0][4] + 1], told[1]


def scores_swapped(told: Told) -> Told:
    return [*told[0][:4], told[1][4]], [*told[1][:4], told[0][4]]


def crop_before_size(told: Told) -> Told:
    return tuple([*one[2:4], *one[:2], one[4]] for one in told)


@pytest.mark.parametrize(
    "change",
    [wrong_score, *(pytest.param(one, marks=pytest.mark.slow) for one in (scores_swapped, crop_before_size))],
)
def test_numbers_that_are_told_otherwise_are_named(
    engine: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Told], Told]
) -> None:
    monkeypatch.setattr(preparation, "told_sizes", lambda *asked, **how: change(told_sizes(*asked, **how)))
    report = short(engine)
    assert report.failures[0].part == "time_ids"
    assert at_fault(report) == {"time_ids", "picture"}
    assert max(module.worst for module in report.modules) < SOUND


@pytest.mark.slow
def test_numbers_that_are_read_in_another_order_are_named(engine: Path) -> None:
    """The embeddings of the size and of the score, behind the pooled prompt's, have changed places."""

    def swapped(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[:, 48:56], changed[:, 80:88] = weight[:, 80:88], weight[:, 48:56]
        return changed

    engines.change_weight(engine, "time_shift", "add_embedding.linear_1.weight", swapped)
    assert {"time_shift", "step", "picture"} <= at_fault(short(engine))
