"""Measures the checkpoint: held-out captions drawn by the stock pipeline and judged, and negative prompts.

The setting is fixed: `StableDiffusionPipeline`, 20 steps of DPM++ 2M Karras, guidance 7, picture i from
seed i.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

from sdfast.landscapes.autoencoder import reconstruct
from sdfast.landscapes.captions import full_caption
from sdfast.landscapes.draw import draw
from sdfast.landscapes.judge import Judge, verdicts
from sdfast.landscapes.scenes import ATTRIBUTES, Scene, held_out_scenes

STEPS = 20
GUIDANCE = 7.0
FRESH = 1_000_000  # seeds from here on were never drawn for training

Pictures = NDArray[np.uint8]


def stock_pipeline(folder: Path) -> Any:
    """The stock diffusers pipeline of a checkpoint, with DPM++ 2M Karras and no progress bar."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, prompts: Sequence[str], negative: str = "", first_seed: int = 0, batch: int = 16
) -> Pictures:
    """One picture a prompt, [N, 128, 128, 3] uint8; prompt i uses seed first_seed + i."""
    pictures: list[Pictures] = []
    for first in range(0, len(prompts), batch):
        group = list(prompts[first : first + batch])
        seeds = range(first_seed + first, first_seed + first + len(group))
        images = pipe(
            group,
            negative_prompt=[negative] * len(group),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        pictures.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(pictures)


def shares(judged: NDArray[np.int64], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of pictures with each attribute right, and with all five."""
    right = judged == np.array([scene.labels() for scene in scenes])
    each = {name: float(right[:, i].mean()) for i, name in enumerate(ATTRIBUTES)}
    return {
        name: round(share, 4) for name, share in (each | {"all": float(right.all(axis=1).mean())}).items()
    }


def judge_on_renderings(judge: Judge, autoencoder: AutoencoderKL) -> dict[str, dict[str, float]]:
    """The judge's accuracy on fresh renderings of held-out scenes, and on their reconstructions."""
    scenes = held_out_scenes() * 2
    drawn = np.stack([draw(scene, FRESH + i) for i, scene in enumerate(scenes)])
    again = reconstruct(autoencoder, drawn)
    mse = float(((again.astype(np.float64) - drawn) ** 2).mean())
    return {
        "renderings": shares(verdicts(judge, drawn), scenes),
        "reconstructions": shares(verdicts(judge, again), scenes)
        | {"psnr": round(10 * np.log10(255**2 / mse), 2)},
    }


def held_out_captions(count: int | None = None) -> tuple[list[Scene], list[str]]:
    """Held-out scenes and a full caption of each; all of them, or `count` spread evenly."""
    scenes = held_out_scenes()
    if count is not None:
        scenes = [scenes[i * len(scenes) // count] for i in range(count)]
    return scenes, [full_caption(scene, np.random.default_rng([6, i])) for i, scene in enumerate(scenes)]


def open_weather_prompts() -> list[str]:
    """36 prompts that leave the weather open."""
    return [
        f"a {subject} in the {place} at dawn"
        for subject in ("cabin", "castle", "tent", "tree")
        for place in ("mountains", "hills", "forest")
    ] * 3


def negative_prompt_effect(pipe: Any, judge: Judge) -> dict[str, dict[str, float]]:
    """For negative prompts that name a weather or none: the share of pictures judged to have each weather."""
    column = list(ATTRIBUTES).index("weather")
    effect = {}
    for negative in ("", "misty", "clear"):
        judged = verdicts(judge, generate(pipe, open_weather_prompts(), negative))[:, column]
        effect[negative or "none"] = {
            weather: round(float((judged == i).mean()), 4) for i, weather in enumerate(ATTRIBUTES["weather"])
        }
    return effect


def evaluate(folder: Path, judge: Judge, count: int | None = None) -> dict[str, Any]:
    """All figures of the model card."""
    pipe = stock_pipeline(folder)
    scenes, prompts = held_out_captions(count)
    pictures = generate(pipe, prompts)
    return {
        "judge": judge_on_renderings(judge, pipe.vae),
        "held_out_pictures": len(pictures),
        "held_out": shares(verdicts(judge, pictures), scenes),
        "negative_prompt": negative_prompt_effect(pipe, judge),
    }
