"""Drawing over images, beside stock diffusers' pipelines for that, on tiny checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdfast.pipeline import Pipeline
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

SIDE = 64
STEPS = 5

KINDS = {
    ("sd", False): "StableDiffusionImg2ImgPipeline",
    ("sd", True): "StableDiffusionInpaintPipeline",
    ("sdxl", False): "StableDiffusionXLImg2ImgPipeline",
    ("sdxl", True): "StableDiffusionXLInpaintPipeline",
}


def stock(folder: Path, kind: str) -> Any:
    """diffusers' pipeline of that name, its variances large: tiny random ones leave the sampling unseen."""
    without = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pairs(tiny_sd: Path, sd_engine: Path, tiny_sdxl: Path, sdxl_engine: Path) -> dict[Any, Any]:
    """(family, whether there is a mask) -> stock's pipeline and sdfast's."""
    folders = {"sd": (tiny_sd, ours(sd_engine)), "sdxl": (tiny_sdxl, ours(sdxl_engine))}
    return {key: (stock(folders[key[0]][0], kind), folders[key[0]][1]) for key, kind in KINDS.items()}


def image(seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def mask(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """White in an oval that cuts through latents, with grey at its edge."""
    y, x = np.mgrid[0:height, 0:width]
    away = ((x - width / 2) / width) ** 2 + ((y - height / 3) / height) ** 2
    return Image.fromarray((255 * np.clip(1.6 - 10 * away, 0, 1)).astype(np.uint8))


def both(
    pair: tuple[Any, Pipeline],
    scheduler: str = "DDIMScheduler",
    overrides: Mapping[str, Any] | None = None,
    seeds: tuple[int, ...] = (0,),
    output_type: str = "latent",
    **request: Any,
) -> tuple[Any, Any]:
    """The images of the same call, by stock diffusers and by sdfast."""
    reference, pipe = pair
    if not {"timesteps", "sigmas"} & set(request):
        request.setdefault("num_inference_steps", STEPS)
    chosen = getattr(diffusers, scheduler).from_config(pipe.engine.scheduler_config, **(overrides or {}))
    reference.scheduler = pipe.scheduler = chosen
    request = {"prompt": PROMPT, "image": image(), **request}
    results = []
    for call in (reference, pipe):
        results.append(call(**request, generator=seeded(*seeds), output_type=output_type).images)
    return results[0], results[1]


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "SA-Solver": ("SASolverScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_over_an_image_equals_stock_diffusers(pairs: dict[Any, Any], name: str) -> None:
    assert_same(*both(pairs["sd", False], *SCHEDULERS[name], strength=0.6))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_a_mask_equals_stock_diffusers(pairs: dict[Any, Any], name: str) -> None:
    assert_same(*both(pairs["sd", True], *SCHEDULERS[name], strength=0.6, mask_image=mask()))
