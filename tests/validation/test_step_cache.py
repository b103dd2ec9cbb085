"""Engines with a cache branch: judged as others are, and their shallow steps; what caching costs is told."""

import html
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdfast.errors import RequestError
from sdfast.models.step_cache import ShallowUNet
from sdfast.validation import Report, validate
from tests.validation import engines

SOUND = 1e-5  # ten times below the bar: what float32 rounding leaves in a sound engine
CALL: dict[str, Any] = {"prompts": ["boat"], "steps": 3, "scheduler": "DDIM"}


@pytest.fixture(scope="module")
def sound(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.build(tiny_sd, tmp_path_factory.mktemp("cached") / "engine", cache_branch=1)


@pytest.fixture
def engine(sound: Path, tmp_path: Path) -> Path:
    """An engine to be changed."""
    return shutil.copytree(sound, tmp_path / "engine")


def errors(report: Report) -> dict[str, float]:
    return {module.name: module.worst for module in report.modules}


def test_a_sound_engine_passes_and_its_price_is_told(engine: Path) -> None:
    report = validate(engine, **CALL, cache_interval=2)
    price = report.step_cache
    assert report.passed and price is not None, report.table()
    assert max(errors(report).values()) < SOUND
    assert {"deep", "unet_shallow"} <= errors(report).keys()
    assert (price.cache_interval, price.branch) == (2, 1)
    assert price.seconds > 0  # on a machine that others use it may be anything
    assert 25 < price.psnr_min < report.pictures[0].psnr - 20
    page = (engine / "validation" / "report.html").read_text("utf-8")
    for told in (report.table(), page):
        assert "rice of one whole step in 2, the others up to branch 1:" in html.unescape(told)
    assert len(report.prices) == 1


def test_an_interval_is_refused_where_there_is_no_branch(sd_engine: Path) -> None:
    with pytest.raises(RequestError, match="exported without shallow steps"):
        validate(sd_engine, **CALL, cache_interval=2)


def test_a_weight_of_the_shallow_step_alone_is_found(engine: Path) -> None:
    engines.change_weight(engine, "unet_shallow", "conv_out.weight", engines.perturbed)
    report = validate(engine, **CALL)
    assert {failure.part for failure in report.failures} == {"unet_shallow"}
    assert report.prices == []  # none was asked for


def test_a_feature_from_another_place_is_found(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = ShallowUNet.forward

    def moved(self: ShallowUNet, sample: Tensor, time_shift: Tensor, context: Tensor, deep: Tensor) -> Tensor:
        return sound(self, sample, time_shift, context, torch.roll(deep, 1, dims=3))

    monkeypatch.setattr(ShallowUNet, "forward", moved)
    report = validate(engine, **CALL)
    assert {failure.part for failure in report.failures} == {"unet_shallow"}
    assert errors(report)["deep"] < SOUND
