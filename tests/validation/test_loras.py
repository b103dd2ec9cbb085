"""Engines with LoRAs are held to stock diffusers with the same LoRAs, and a merge that is wrong fails."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdfast.errors import EngineError
from sdfast.export.lora_file import Part
from sdfast.models.lora import RowScales
from sdfast.validation import Report, validate
from tests.export.loras import ATTENTION, kohya, random_changes, write
from tests.validation import engines

SCALE = 0.8
Merged = Callable[[Part, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
MERGED: Merged = Part.merged  # type: ignore[assignment]


def short(folder: Path) -> Report:
    return validate(folder, prompts=["a cabin in misty mountains"], steps=2, scheduler="Euler a")


@pytest.fixture
def lora(checkpoint: Path, tmp_path: Path) -> Path:
    """Of the attention layers, square ones for the most part, with alpha / rank = 2."""
    return write(tmp_path / "style.safetensors", random_changes(checkpoint, ATTENTION, alphas=(8.0,)), kohya)


def built(checkpoint: Path, lora: Path) -> Path:
    return engines.build(checkpoint, lora.parent / "engine", loras=[{"source": lora, "scale": SCALE}])


def test_an_engine_with_a_lora_passes(checkpoint: Path, lora: Path) -> None:
    folder = built(checkpoint, lora)
    report = short(folder)
    assert report.passed, report.table()
    assert max(module.worst for module in report.modules) < 1e-5
    assert report.setting.loras == (f"{lora}, scale 0.8",)
    assert f"with LoRA {lora}, scale 0.8\n" in report.table()
    assert f"<dt>LoRA</dt><dd>{lora}, scale 0.8</dd>" in (folder / "validation" / "report.html").read_text(
        "utf-8"
    )


@pytest.fixture
def chosen(checkpoint: Path, lora: Path) -> Path:
    return engines.build(
        checkpoint, lora.parent / "chosen", loras=[{"source": lora, "on_request": True, "name": "style"}]
    )


def test_an_engine_with_a_lora_of_requests_passes(chosen: Path, lora: Path) -> None:
    """With all of it, and with nothing of it."""
    report = short(chosen)
    assert report.passed, report.table()
    assert max(module.worst for module in report.modules) < 1e-5
    assert report.setting.loras == (f"style, of {lora}, as requests choose",)
    assert "Euler a, without LoRAs" in [picture.scheduler for picture in report.pictures]


def test_branches_that_are_wrong_fail(chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One percent more than is asked for; and what is added where nothing is asked for."""
    repeated = RowScales.repeated

    def one_percent_more(scales: RowScales, places: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return repeated(scales, places) * 1.01

    def never_nothing(scales: RowScales, places: tuple[tuple[int, int], ...]) -> torch.Tensor:
        given = repeated(scales, places)
        return torch.where(given == 0, torch.ones_like(given), given)

    for broken, fault in ((one_percent_more, "unet"), (never_nothing, "Euler a, without LoRAs")):
        with monkeypatch.context() as patch:
            patch.setattr(RowScales, "repeated", broken)
            report = short(chosen)
        assert any(fault in f"{one.part}: {one.reason}" for one in report.failures), report.table()


def one_percent_more(part: Part, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return MERGED(replace(part, factor=part.factor * 1.01), weight, tensors)


def alpha_ignored(part: Part, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return MERGED(replace(part, factor=SCALE), weight, tensors)


def up_and_down_swapped(part: Part, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where that can be: of square layers."""
    if weight.shape[0] != weight.shape[1]:
        return MERGED(part, weight, tensors)
    swapped = {part.down: tensors[part.up].T, part.up: tensors[part.down].T}
    return MERGED(part, weight, swapped)


@pytest.mark.parametrize("broken", [one_percent_more, alpha_ignored, up_and_down_swapped])
def test_a_merge_that_is_wrong_fails(
    checkpoint: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, broken: Merged
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Part, "merged", broken)
        folder = built(checkpoint, lora)
    report = short(folder)
    at_fault = {failure.part for failure in report.failures}
    assert {"unet", "text_encoder.hidden_states"} <= at_fault, report.table()
    assert "vae_decoder" not in at_fault


def test_a_lora_that_is_another_now_or_gone_is_no_reference(checkpoint: Path, lora: Path) -> None:
    folder = built(checkpoint, lora)
    write(lora, random_changes(checkpoint, ATTENTION, seed=9), kohya)
    with pytest.raises(
        EngineError, match=r"exported from other weights .*style\.safetensors: exported \w+, found"
    ):
        short(folder)
    lora.unlink()
    with pytest.raises(EngineError, match=r"not there any more: .*style\.safetensors: no such file"):
        short(folder)
