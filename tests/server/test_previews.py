"""Previews by the colours of latents, in place of the decoder."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdfast.errors import BackendError, NumericalError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.pipeline import Pipeline
from sdfast.server import colours
from sdfast.server.batcher import Batcher
from sdfast.server.colours import Approximately, Colours
from sdfast.server.jobs import Preview
from tests.fakes import FACTOR, Failpoint, FakeEngine
from tests.server.test_batcher import Open, open_batcher, request, submit

__all__ = ["open_batcher"]  # a fixture


def latents(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_what_is_linear_is_found() -> None:
    """The fake encoder's first three channels are the colours, from -1 to 1; the fourth is their sum."""
    given = latents()
    given[3] = given[:3].sum(0)
    made = Colours.of(FakeEngine()).picture(given, 1)
    expected = ((given[:3] + 1) / 2 * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(made).astype(float) - expected).max() <= 1
    large = Colours.of(FakeEngine()).picture(given, FACTOR)
    assert large.size == (8 * FACTOR, 8 * FACTOR)


def test_fast_previews_decode_nothing(open_batcher: Open) -> None:
    engine = FakeEngine()
    ear = submit(open_batcher(engine, previews="fast"), request(num_inference_steps=6), previews=3)
    ear.done()
    previews = [event for event in ear.events if isinstance(event, Preview)]
    assert [preview.index for preview in previews] == [0, 1, 2]
    assert all(pixels(preview.png).shape == (16, 16, 3) for preview in previews)
    assert engine.calls["vae_decoder"] == [1]  # of the picture itself
    assert engine.calls["vae_encoder"] == [1]  # once, for all that follow
    submit(open_batcher(engine, previews="full"), request(num_inference_steps=6), previews=3).done()
    assert engine.calls["vae_decoder"] == [1] * 5 and engine.calls["vae_encoder"] == [1]


def test_by_default_they_are_fast_once_decoding_is_known_to_be_slow(
    open_batcher: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine)
    submit(batcher, request(num_inference_steps=6), previews=3).done()
    assert engine.calls["vae_decoder"] == [1] * 4 and engine.calls["vae_encoder"] == []  # all in full
    monkeypatch.setattr(colours, "DECODES_WITHIN", 0.0)
    submit(batcher, request(num_inference_steps=6), previews=3).done()
    assert engine.calls["vae_decoder"] == [1] * 5 and engine.calls["vae_encoder"] == [1]


def test_it_is_the_fastest_decode_that_counts_by_the_size_of_the_picture() -> None:
    made = Approximately(FakeEngine(), "auto")
    assert made(latents()) is None  # nothing is known yet
    made.decoded(latents(), 1.0)
    assert made(latents()) is not None
    made.decoded(latents(), 0.2)
    assert made(latents()) is None
    made.decoded(latents(), 5.0)  # the first of another process, perhaps
    assert made(latents()) is None
    assert made(latents().repeat(1, 2, 2)) is not None  # four times as large


def test_an_engine_without_an_encoder_decodes_them() -> None:
    made = Approximately(FakeEngine(edits=False), "auto")
    made.decoded(latents(), 9.0)
    assert made(latents()) is None
    with pytest.raises(BackendError, match=r"no VAE encoder, by which .* serve it with --previews full"):
        Batcher(FakeEngine(edits=False), previews="fast")


def test_what_is_not_finite_makes_none() -> None:
    made = Approximately(FakeEngine(), "fast")
    with pytest.raises(NumericalError):
        made(latents() * torch.nan)
    broken = Approximately(FakeEngine(failpoints={"vae_encoder": Failpoint("nan")}), "fast")
    with pytest.raises(NumericalError):
        broken(latents())


def test_of_the_landscapes_they_have_the_pictures_colours(tmp_path: Path) -> None:
    engine = export("landscapes", tmp_path / "engine", Recipe.make(backend="eager"))
    pipe = Pipeline.from_engine(engine)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 6, "seed": 3}
    prompt = "a boat on a lake at sunset, oil painting style"
    drawn = pipe(prompt, output_type="latent", **call).images
    picture = pipe.decode(drawn)[0]
    factor = pipe.engine.manifest.model.vae_scale_factor
    coarse = Colours.of(pipe.engine).picture(drawn[0], 1)
    truth = torch.nn.functional.avg_pool2d(picture, factor).permute(1, 2, 0).numpy()
    made = np.asarray(coarse).astype(float) / 255
    assert np.corrcoef(made.ravel(), truth.ravel())[0, 1] > 0.99
    assert np.abs(made - truth).mean() < 0.02
