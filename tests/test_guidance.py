"""Guidance in some of the steps: stock diffusers' picture of the same, at half the work in the others."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from sdfast.call import Given
from sdfast.errors import RequestError
from sdfast.export.checkpoint import resolve
from sdfast.first_latents import Over
from sdfast.images import read_images
from sdfast.infotext import infotext_of
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.validation.drawing import generate
from sdfast.validation.reference import reference_pipeline
from tests.fakes import FakeEngine

SIDE = 64


def request_of(steps: int = 6, **more: Any) -> Request:
    given = {"prompts": ("a boat",), "negative_prompts": ("mist",), "height": SIDE, "width": SIDE, **more}
    return Request.make(num_inference_steps=steps, seed=3, **given)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Pipeline]:
    """The stock pipeline of a checkpoint, and its engine's."""
    source = request.getfixturevalue(f"tiny_{request.param}")
    pipe = Pipeline.from_engine(request.getfixturevalue(f"{request.param}_engine"), threads=1)
    return reference_pipeline(resolve(str(source))), pipe


ASKS: dict[str, dict[str, Any]] = {
    "not at the end": {"guidance_end": 0.5},
    "not at the beginning": {"guidance_start": 0.4},
    "in the middle, with noise": {
        "guidance_start": 0.2,
        "guidance_end": 0.7,
        "scheduler": "euler_a",
        "num_images_per_prompt": 2,
    },
    "rescaled, two evaluations a step": {
        "guidance_end": 0.6,
        "guidance_rescale": 0.5,
        "scheduler": "HeunDiscreteScheduler",
    },
    "nowhere": {"steps": 3, "guidance_end": 0.3},
}


@pytest.mark.parametrize("ask", ASKS)
def test_pictures_are_those_of_stock_diffusers(pair: tuple[Any, Pipeline], ask: str) -> None:
    stock, pipe = pair
    request = request_of(**ASKS[ask])
    expected = generate(stock, request, output_type="pt")
    assert error(pipe.generate(request, output_type="pt").images, expected) < 1e-5
    everywhere = request.model_copy(update={"guidance_start": 0.0, "guidance_end": 1.0})
    assert error(pipe.generate(everywhere, output_type="pt").images, expected) > 1e-4


def test_over_an_image_shares_are_of_the_steps_that_are_done(pair: tuple[Any, Pipeline]) -> None:
    stock, pipe = pair
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    over = Over(read_images(pixels.astype(np.float32) / 255, 4), None)
    request = request_of(steps=8, strength=0.5, guidance_end=0.5)
    expected = generate(stock, request, output_type="pt", over=over)
    assert error(pipe.generate(request, Given(over=over), output_type="pt").images, expected) < 1e-5


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("fields", "batches"),
    [
        ({}, [2, 2, 2, 2, 2]),
        ({"guidance_end": 0.4}, [2, 2, 1, 1, 1]),
        ({"guidance_start": 0.4}, [1, 1, 2, 2, 2]),
        ({"guidance_start": 0.2, "guidance_end": 0.99}, [1, 2, 2, 2, 1]),
        ({"guidance_start": 0.5, "guidance_end": 0.55}, [1, 1, 1, 1, 1]),
        ({"guidance_end": 0.4, "guidance_scale": 1.0}, [1, 1, 1, 1, 1]),
    ],
)
def test_steps_without_guidance_are_one_row(fields: Mapping[str, Any], batches: list[int]) -> None:
    engine = FakeEngine()
    Pipeline(engine).generate(request_of(steps=5, height=16, width=16, **fields), output_type="latent")
    assert engine.calls["unet"] == batches


def test_what_makes_no_sense_is_refused() -> None:
    for fields, reason in (
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_start: 0.5 is not below guidance_end, 0.5"),
        ({"guidance_end": 1.5}, "guidance_end: must be less than or equal to 1"),
    ):
        with pytest.raises(RequestError, match=reason):
            request_of(**fields)


def test_the_parameters_say_so() -> None:
    pipe = Pipeline(FakeEngine())
    request = request_of(guidance_start=0.25, guidance_end=0.6)
    told = infotext_of(request, pipe.schedule_of(request), 0, model="m", weights={}).extra
    assert told == {"Guidance start": "0.25", "Guidance end": "0.6"}
