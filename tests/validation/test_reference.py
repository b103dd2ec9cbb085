"""The stock pipeline takes the same request as sdfast's and draws the same pictures."""

from pathlib import Path

import pytest
import torch

from sdfast.errors import DependencyError
from sdfast.export.checkpoint import resolve
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.validation import generate, reference_pipeline


@pytest.mark.parametrize(
    "fields",
    [
        {"scheduler": "Euler a", "num_images_per_prompt": 2},
        {"negative_prompts": ("misty", None), "guidance_rescale": 0.5},
        {"clip_skip": 1, "scheduler": "DDIM", "eta": 0.7},
        {"timesteps": (900, 500, 20), "num_inference_steps": None, "scheduler": "DDPM"},
        {"sigmas": (10.0, 3.0, 0.5, 0.0), "num_inference_steps": None, "scheduler": "Euler"},
        {"guidance_scale": 1.0},
    ],
)
def test_the_same_request_on_both_sides(checkpoint: Path, sound: Path, fields: dict[str, object]) -> None:
    request = Request.make(
        **{
            "prompts": ("a cabin", "the sea at night"),
            "negative_prompts": (None, None),
            "height": 64,
            "width": 64,
            "num_inference_steps": 3,
            "seed": 11,
            **fields,
        }
    )
    pipe = reference_pipeline(resolve(checkpoint))
    own = type(pipe.scheduler)
    truth = generate(pipe, request, output_type="pt")
    engine = Pipeline.from_engine(sound)
    engine.set_progress_bar_config(disable=True)
    images = engine.generate(request, output_type="pt").images
    assert truth.shape == images.shape
    assert (truth - images).abs().max() < 1e-4
    assert type(pipe.scheduler) is own


def test_pictures_for_a_person(checkpoint: Path) -> None:
    request = Request.make(
        prompts=("boat",),
        negative_prompts=(None,),
        height=64,
        width=64,
        num_inference_steps=1,
        scheduler="ddim",
    )
    images = generate(reference_pipeline(resolve(checkpoint)), request)
    assert [image.size for image in images] == [(64, 64)]


def test_reduced_precision(checkpoint: Path) -> None:
    pipe = reference_pipeline(resolve(checkpoint), dtype=torch.float16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}


def test_without_diffusers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(DependencyError, match=r"pip install \"sdfast\[export\]\""):
        reference_pipeline(resolve(checkpoint))
