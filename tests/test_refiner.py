"""SDXL's refiner beside stock diffusers, on a tiny random checkpoint."""

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdfast import drop_in
from sdfast.cli import main
from sdfast.errors import RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.manifest import read_manifest
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Job
from sdfast.server.worker.opening import warm_up
from sdfast.validation.metrics import psnr
from tests.test_image_to_image import image, mask, stock
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

STEPS = 4
SAME = 100  # dB: a picture in float32
KIND = "StableDiffusionXLImg2ImgPipeline"


@pytest.fixture(scope="module")
def refiner(tiny_refiner: Path, refiner_engine: Path) -> tuple[Any, Pipeline]:
    return stock(tiny_refiner, KIND), ours(refiner_engine)


def latents(seed: int = 5, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=seeded(seed))


def both(
    pair: tuple[Any, Pipeline],
    scheduler: str = "EulerDiscreteScheduler",
    seeds: tuple[int, ...] = (0,),
    output_type: str = "latent",
    **request: Any,
) -> tuple[Any, Any]:
    """The images of the same call, by stock diffusers and by sdfast."""
    chosen = getattr(diffusers, scheduler).from_config(pair[1].engine.scheduler_config)
    pair[0].scheduler = pair[1].scheduler = chosen
    request = {"prompt": PROMPT, "image": image(), "num_inference_steps": STEPS, **request}
    results = [call(**request, generator=seeded(*seeds), output_type=output_type).images for call in pair]
    return results[0], results[1]


CALLS: dict[str, dict[str, Any]] = {
    "over an image": {"strength": 0.6, "output_type": "pt"},
    "the base's latents": {"image": latents(), "denoising_start": 0.6, "output_type": "pt"},
    "sizes and scores": {
        "aesthetic_score": 9.0,
        "negative_aesthetic_score": 1.0,
        "original_size": (512, 96),
        "crops_coords_top_left": (8, 40),
        "negative_original_size": (9, 7),
        "negative_crops_coords_top_left": (100, 30),
        "strength": 1.0,
    },
    "several of them": {
        "prompt": ["a boat", "the sea"],
        "negative_prompt": ["", "blurry"],
        "image": latents(6, 2),
        "denoising_start": 0.4,
        "num_images_per_prompt": 2,
        "scheduler": "EulerAncestralDiscreteScheduler",
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_equal_stock_diffusers(refiner: tuple[Any, Pipeline], call: str) -> None:
    expected, found = both(refiner, **{"guidance_scale": 5.0, **CALLS[call]})
    assert_same(expected, found)
    if CALLS[call].get("output_type") == "pt":
        assert psnr(found[0], expected[0]) > SAME


def test_what_it_is_told_shows(refiner: tuple[Any, Pipeline]) -> None:
    """Each of its numbers is another picture: or a comparison with stock would prove nothing of them."""
    call = {"image": latents(), "denoising_start": 0.5, "num_inference_steps": 2, "scheduler": "euler"}
    call |= {"seed": 1, "output_type": "latent"}
    told = {
        "usual": {},
        "score": {"aesthetic_score": 9.0},
        "negative score": {"negative_aesthetic_score": 0.0},
        "size": {"original_size": (512, 96)},
        "crop": {"crops_coords_top_left": (8, 40)},
        "negative crop": {"negative_crops_coords_top_left": (8, 40)},
    }
    drawn = [refiner[1](PROMPT, **call, **fields).images for fields in told.values()]
    for i, one in enumerate(drawn):
        assert all((one - other).abs().max() > 1e-3 for other in drawn[:i])


def test_a_mask_equals_stock_diffusers(refiner: tuple[Any, Pipeline]) -> None:
    """Where base and refiner inpaint together."""
    without = {"add_watermarker": False}
    masked = diffusers.StableDiffusionXLInpaintPipeline.from_pipe(refiner[0], **without)
    masked.set_progress_bar_config(disable=True)
    call = {"image": latents(), "mask_image": mask(), "denoising_start": 0.4, "guidance_scale": 4.0}
    assert_same(*both((masked, refiner[1]), **call))


@pytest.mark.slow
def test_base_and_refiner_equal_stock_diffusers(
    refiner: tuple[Any, Pipeline], tiny_sdxl: Path, sdxl_engine: Path
) -> None:
    """The ensemble as users run it, from the prompt to the picture."""
    base = stock(tiny_sdxl, "StableDiffusionXLPipeline"), ours(sdxl_engine)
    pictures = []
    for first, second in zip(base, refiner, strict=True):
        config = refiner[1].engine.scheduler_config
        options = {"use_karras_sigmas": True}
        first.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, **options)
        second.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, **options)
        call = {"num_inference_steps": 6, "guidance_scale": 5.0}
        left = first(
            PROMPT, denoising_end=0.5, output_type="latent", generator=seeded(1), height=64, width=64, **call
        ).images
        drawn = second(PROMPT, image=left, denoising_start=0.5, output_type="pt", generator=seeded(2), **call)
        pictures.append(drawn.images[0])
    assert psnr(pictures[1], pictures[0]) > SAME


@pytest.mark.slow
def test_an_onnx_engine_equals_stock_diffusers(
    refiner: tuple[Any, Pipeline], tiny_refiner: Path, tmp_path: Path
) -> None:
    engine = export(tiny_refiner, tmp_path / "onnx", Recipe.make())
    for call in ("over an image", "the base's latents"):
        expected, found = both((refiner[0], ours(engine)), guidance_scale=5.0, **CALLS[call])
        assert psnr(found[0], expected[0]) > SAME


def test_a_drop_in_draws_what_diffusers_class_draws(refiner: tuple[Any, Pipeline]) -> None:
    """By place, as far as the scores."""
    own = drop_in.StableDiffusionXLImg2ImgPipeline(refiner[1].engine)
    own.set_progress_bar_config(disable=True)
    call = {"image": latents(), "denoising_start": 0.5, "aesthetic_score": 7.0}
    assert_same(*both((refiner[0], own), **call))
    with pytest.raises(RequestError, match="image: is missing"):
        own(PROMPT)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to refine": (
        {"image": None},
        "^image: is missing; this engine is SDXL's refiner.*denoising_end",
    ),
    "a target size": ({"target_size": (64, 64)}, "^target_size: SDXL's refiner"),
    "a second prompt": ({"prompt_2": "sea"}, "^prompts_2: SDXL's refiner has one text encoder"),
    "a score of text": ({"aesthetic_score": "high"}, "^aesthetic_score: must be a valid number"),
    "a score too high": ({"aesthetic_score": 1e9}, "^aesthetic_score: must be less than or equal to 100"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_name(refiner: tuple[Any, Pipeline], case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(RequestError, match=message):
        refiner[1](PROMPT, **{"image": image(), "num_inference_steps": STEPS, "scheduler": "ddim", **fields})


def test_the_base_is_told_no_score(sdxl_engine: Path) -> None:
    call = {"image": image(), "num_inference_steps": STEPS, "scheduler": "ddim", "strength": 0.5}
    pipe = ours(sdxl_engine)
    pipe(PROMPT, aesthetic_score=6.0, negative_aesthetic_score=2.5, **call)
    with pytest.raises(RequestError, match=r"^negative_aesthetic_score: only engines of SDXL's refiner"):
        pipe(PROMPT, negative_aesthetic_score=2.0, **call)


def test_info_and_the_command_line(refiner_engine: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    told = run(main, ["info", str(refiner_engine)])
    assert re.search(r"^family +sdxl refiner$", told.output, re.MULTILINE)
    assert read_manifest(refiner_engine).model.scored
    asked = ["generate", "a boat", "--engine", str(refiner_engine), "--steps", "4", "-o"]
    alone = run(main, [*asked, str(tmp_path / "alone.png")])
    assert alone.exit_code == 1 and "image: is missing; this engine is SDXL's refiner" in alone.output
    image().save(tmp_path / "image.png")
    over = ["--image", str(tmp_path / "image.png"), "--denoising-start", "0.7", "--seed", "3"]
    drawn = run(main, [*asked, str(tmp_path / "refined.png"), *over])
    assert drawn.exit_code == 0, drawn.output
    with Image.open(tmp_path / "refined.png") as picture:
        assert "Denoising start: 0.7" in picture.text["parameters"]


def test_it_is_served_over_images_alone(refiner: tuple[Any, Pipeline]) -> None:
    """It is warmed up, and refuses jobs without an image at once."""
    engine, told = refiner[1].engine, []
    warm_up(engine)
    batcher = Batcher(engine)
    asked = {"prompts": (PROMPT,), "negative_prompts": (None,), "height": 64, "width": 64, "seed": 1}
    with pytest.raises(RequestError, match="this engine is SDXL's refiner"):
        batcher.submit(Job("1", "engine", Request.make(**asked, num_inference_steps=2)), told.append)
    over = Request.make(**asked, num_inference_steps=3, strength=0.7, scheduler="euler")
    batcher.submit(Job("2", "engine", over, image=image().tobytes()), told.append)
    assert batcher.close(timeout=30)
    assert len(told[-1].pngs) == 1
