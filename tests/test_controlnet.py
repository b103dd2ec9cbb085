"""Pictures under the guidance of a control image, beside stock diffusers' ControlNet pipelines."""

from pathlib import Path
from typing import Any

import diffusers
import pytest

from sdfast.pipeline import Pipeline
from tests.test_image_to_image import image
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

STEPS = 4
SIDE = 64


def stock(checkpoint: Path, controlnet: Path, kind: str) -> Any:
    """diffusers' pipeline of that name."""
    without = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    network = diffusers.ControlNetModel.from_pretrained(controlnet)
    pipe = getattr(diffusers, kind).from_pretrained(
        checkpoint, controlnet=network, local_files_only=True, **without
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pair(tiny_sd: Path, tiny_controlnet: Path, controlled_engine: Path) -> tuple[Any, Pipeline]:
    return stock(tiny_sd, tiny_controlnet, "StableDiffusionControlNetPipeline"), ours(controlled_engine)


def both(pair: tuple[Any, Pipeline], seeds: tuple[int, ...] = (0,), **call: Any) -> tuple[Any, Any]:
    """Latents of the same call, by stock diffusers and by sdfast."""
    reference, pipe = pair
    scheduler = call.pop("scheduler", "DDIMScheduler")
    chosen = getattr(diffusers, scheduler).from_config(pipe.engine.scheduler_config)
    reference.scheduler = pipe.scheduler = chosen
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", **call}
    named = {"image": "control_image"} if "control_image" not in call else {}
    renamed = {named.get(name, name): value for name, value in call.items()}
    return (
        reference(**call, generator=seeded(*seeds)).images,
        pipe(**renamed, generator=seeded(*seeds)).images,
    )


CALLS: dict[str, dict[str, Any]] = {
    "one picture": {},
    "a scale": {"controlnet_conditioning_scale": 0.6},
    "in the middle of the run": {"control_guidance_start": 0.2, "control_guidance_end": 0.75},
    "no guidance": {"guidance_scale": 1.0},
    "an image each": {
        "prompt": ["a boat", "the sea"],
        "image": [image(1), image(2)],
        "controlnet_conditioning_scale": 1.4,
    },
    "two evaluations a step": {"scheduler": "HeunDiscreteScheduler", "control_guidance_end": 0.6},
    "noise at each step": {"scheduler": "EulerAncestralDiscreteScheduler", "num_images_per_prompt": 2},
}


@pytest.mark.parametrize("call", CALLS)
def test_equals_stock_diffusers(pair: tuple[Any, Pipeline], call: str) -> None:
    assert_same(*both(pair, **{"image": image(), **CALLS[call]}))
