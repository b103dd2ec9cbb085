"""Engines with embeddings are held to stock diffusers with the same files; a vector that is wrong fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdfast.errors import EngineError
from sdfast.export.embedding import Embedding
from sdfast.tokenizer import SETTINGS_FILE
from sdfast.validation import Report, validate
from tests.export.embeddings import automatic1111
from tests.validation import engines

Rows = Callable[[Embedding, str], torch.Tensor]
ROWS: Rows = Embedding.rows


def short(folder: Path, **given: object) -> Report:
    return validate(folder, steps=2, scheduler="Euler a", **given)


def built(checkpoint: Path, folder: Path) -> Path:
    automatic1111(folder / "EasyNegative.safetensors", 4)
    automatic1111(folder / "zq.safetensors", 1, seed=1)
    files = [folder / "EasyNegative.safetensors", {"source": folder / "zq.safetensors", "token": "<zq>"}]
    return engines.build(checkpoint, folder / "engine", embeddings=files)


def test_an_engine_with_embeddings_passes(checkpoint: Path, tmp_path: Path) -> None:
    folder = built(checkpoint, tmp_path)
    report = short(folder)
    assert report.passed, report.table()
    assert max(module.worst for module in report.modules) < 1e-5
    assert [picture.prompt.rpartition(", ")[2] for picture in report.pictures[:2]] == ["EasyNegative", "<zq>"]
    told = f"EasyNegative (4 vectors) of {tmp_path / 'EasyNegative.safetensors'}"
    assert report.setting.embeddings == (told, f"<zq> (1 vector) of {tmp_path / 'zq.safetensors'}")
    assert f"with embedding {told}\n" in report.table()
    assert f"<dt>embedding</dt><dd>{told}</dd>" in (folder / "validation" / "report.html").read_text("utf-8")


def one_row_off(embedding: Embedding, component: str) -> torch.Tensor:
    rows = ROWS(embedding, component).clone()
    rows[-1] = engines.perturbed(rows[-1])
    return rows


def two_rows_swapped(embedding: Embedding, component: str) -> torch.Tensor:
    return ROWS(embedding, component).roll(1, dims=0)


@pytest.mark.parametrize("broken", [one_row_off, two_rows_swapped])
def test_a_wrong_vector_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Rows
) -> None:
    """With prompts that have no token, too."""
    with monkeypatch.context() as patch:
        patch.setattr(Embedding, "rows", broken)
        folder = built(checkpoint, tmp_path)
    report = short(folder, prompts=["a cabin in misty mountains"])
    assert {failure.part for failure in report.failures} == {"text_encoder.hidden_states"}, report.table()


@pytest.mark.parametrize("read_as", [{}, {"EasyNegative": 3, "<zq>": 1}])
def test_a_token_that_is_read_otherwise_fails(
    checkpoint: Path, tmp_path: Path, read_as: dict[str, int]
) -> None:
    """As its first vector alone, and without its last; with prompts that have no token, too."""
    folder = built(checkpoint, tmp_path)
    path = folder / "tokenizer" / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "embeddings": read_as}))
    engines.reseal(folder)
    report = short(folder, prompts=["a boat"])
    assert [failure.part for failure in report.failures] == ["tokenizer"]
    assert "tokenizer 1 reads 'EasyNegative' as other ids" in report.failures[0].reason


def test_an_embedding_that_is_another_now_or_gone_is_no_reference(checkpoint: Path, tmp_path: Path) -> None:
    folder = built(checkpoint, tmp_path)
    automatic1111(tmp_path / "zq.safetensors", 1, seed=9)
    with pytest.raises(
        EngineError, match=r"exported from other weights .*zq\.safetensors: exported \w+, found"
    ):
        short(folder)
    (tmp_path / "zq.safetensors").unlink()
    with pytest.raises(EngineError, match=r"not there any more: .*zq\.safetensors: no such file"):
        short(folder)
