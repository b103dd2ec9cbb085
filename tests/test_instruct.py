"""InstructPix2Pix: an image edited as the prompt says, guided by both, beside stock diffusers."""

import io
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import sdfast
from sdfast.arithmetic import DeviceArithmetic
from sdfast.call import Given
from sdfast.cli import main
from sdfast.errors import CheckpointError, RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.first_latents import Over
from sdfast.images import read_images
from sdfast.loop import Rows
from sdfast.manifest import read_manifest
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Job
from sdfast.validation import validate
from tests import checkpoints
from tests.server.test_batcher import Ear

SIDE = 64
PROMPT = "a cabin in misty mountains, watercolor style"


def image(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The stock pipeline of a checkpoint, and its drop-in on an eager engine."""
    folder, xl = tmp_path_factory.mktemp("instruct"), "XL" * (request.param == "sdxl")
    kind = f"StableDiffusion{xl}InstructPix2PixPipeline"
    build = checkpoints.build_sdxl if xl else checkpoints.build_sd
    checkpoint = build(folder / "checkpoint", in_channels=8, pipeline=kind)
    engine = export(checkpoint, folder / "engine", Recipe.make(backend="eager"))
    stock = getattr(diffusers, kind).from_pretrained(checkpoint)
    own = getattr(sdfast, kind).from_engine(engine, threads=1)
    for pipe in (stock, own):
        pipe.set_progress_bar_config(disable=True)
    return stock, own


def both(pair: tuple[Any, Any], scheduler: str = "EulerAncestralDiscreteScheduler", **call: Any) -> list[Any]:
    drawn = []
    for pipe in pair:
        config = pair[0].scheduler.config
        pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
        seeds = call.get("seeds", [5])
        given = {name: value for name, value in call.items() if name != "seeds"}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given["generator"] = generators if len(seeds) > 1 else generators[0]
        if hasattr(pair[0], "text_encoder_2"):
            given |= {"height": SIDE, "width": SIDE}
        drawn.append(pipe(**{"num_inference_steps": 4, "output_type": "pt", **given}).images)
    return drawn


CALLS: dict[str, dict[str, Any]] = {
    "defaults": {"prompt": PROMPT, "image": image()},
    "both guidances": {
        "prompt": PROMPT,
        "image": image(),
        "negative_prompt": "mist",
        "guidance_scale": 4.0,
        "image_guidance_scale": 2.5,
        "scheduler": "DPMSolverMultistepScheduler",
    },
    "no guidance": {"prompt": PROMPT, "image": image(), "guidance_scale": 1.0},
    "two prompts, an image each, two pictures of each": {
        "prompt": [PROMPT, "snow"],
        "image": [image(), image(1), image(2), image(3)],
        "num_images_per_prompt": 2,
        "seeds": [1, 2, 3, 4],
    },
    "latents": {"prompt": PROMPT, "image": image(), "latents": torch.randn(1, 4, 8, 8)},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_drop_in_draws_what_diffusers_class_draws(pair: tuple[Any, Any], call: str) -> None:
    expected, actual = both(pair, **CALLS[call])
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_cosxl_is_told_scaled_latents(tmp_path: Path) -> None:
    """Its edit model, of which model_index.json says so."""
    kind = "StableDiffusionXLInstructPix2PixPipeline"
    checkpoint = checkpoints.build_sdxl(tmp_path / "cosxl", in_channels=8, pipeline=kind)
    index = json.loads((file := checkpoint / "model_index.json").read_text("utf-8"))
    file.write_text(json.dumps({**index, "is_cosxl_edit": True}), "utf-8")
    stock = getattr(diffusers, kind).from_pretrained(checkpoint)
    own = Pipeline.from_engine(
        export(checkpoint, tmp_path / "engine", Recipe.make(backend="eager")), threads=1
    )
    for pipe in (stock, own):
        pipe.set_progress_bar_config(disable=True)
    assert stock.is_cosxl_edit and own.engine.manifest.model.image_latents_scale == 1
    expected, actual = both((stock, own), **{**CALLS["defaults"], "guidance_scale": 5.0})
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_the_image_guides(pair: tuple[Any, Any]) -> None:
    _, own = pair
    call = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 1, "output_type": "pt"}
    drawn = [
        own(image=image(), **call).images,
        own(image=image(), image_guidance_scale=3.0, **call).images,
        own(image=image(1), **call).images,
    ]
    assert torch.equal(drawn[0], own(image=image(), image_guidance_scale=1.5, **call).images)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-4)
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-4)
    several = {**call, "prompt": [PROMPT, "snow :0.5 AND fog"], "emphasis": "original"}
    together = own(image=image(), **several).images
    torch.testing.assert_close(together[:1], drawn[0], atol=1e-5, rtol=0)


def test_on_a_device_it_is_the_same(pair: tuple[Any, Any]) -> None:
    _, own = pair
    drawn = []
    for arithmetic in (None, DeviceArithmetic):
        made = own.prepare(request(own), Given(over=over()))
        running = Rows(own.engine, made.rows, SIDE, SIDE, arithmetic)
        while running.active:
            running.tick()
        drawn.append(running.latents)
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)


def over() -> Over:
    return Over(read_images(image(), 4))


def request(pipe: Any, **more: Any) -> Request:
    given = {"prompts": (PROMPT,), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "seed": 2}
    return Request.make(**{**given, "num_inference_steps": 3, "image_guidance_scale": 1.5, **more})


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, "image: is missing"),
        ({"image": image(), "mask_image": image()}, "mask_image: .* edits whole images"),
        ({"image": image(), "strength": 0.5}, "give image_guidance_scale in its place"),
        ({"image": image(), "strength": 0.5, "image_guidance_scale": 2.0}, "leave strength and"),
        (
            {"image": image(), "image_guidance_scale": 0.5},
            "greater than or equal to 1",
        ),
        ({"image": image(), "guidance_end": 0.5}, "guides in all steps"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "edits the image itself"),
        (
            {"image": image(), "hires": {"height": 128, "width": 128}},
            "hires: is for pictures",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    pair: tuple[Any, Any], call: dict[str, Any], reason: str
) -> None:
    pipe = Pipeline(pair[1].engine)
    with pytest.raises(RequestError, match=reason):
        pipe(PROMPT, num_inference_steps=2, **call)


def test_other_engines_have_no_use_for_it(sd_engine: Path) -> None:
    pipe = Pipeline.from_engine(sd_engine, threads=1)
    with pytest.raises(RequestError, match="only engines of InstructPix2Pix"):
        pipe(PROMPT, image=image(), image_guidance_scale=1.5)
    with pytest.raises(RequestError, match="image_guidance_scale are for an image"):
        pipe(PROMPT, image_guidance_scale=1.5)


def test_it_is_validated_and_served_and_drawn(pair: tuple[Any, Any], tmp_path: Path) -> None:
    engine = pair[1].engine
    manifest, scale = read_manifest(engine.folder), pair[0].vae.config.scaling_factor
    assert manifest.model.image_latents_scale == pytest.approx(1 / scale)
    assert manifest.modules["unet"].variants[0].batch.high == 3 * manifest.max_images
    report = validate(engine, prompts=[PROMPT], steps=3)
    assert report.passed, report.table()
    assert "InstructPix2PixPipeline" in report.setting.reference and "each edits one image" in report.table()
    measured = {module.name: module.worst for module in report.modules}
    assert measured["edited_image"] < 1e-5 and max(measured.values()) < 2e-5

    batcher, ear = Batcher(engine, max_rows=2), Ear()
    try:
        asked = request(pair[1])
        batcher.submit(Job("1", "engine", asked, image=np.asarray(image()).tobytes()), ear)
        served = Image.open(io.BytesIO(ear.done().pngs[0]))
        assert served.text["parameters"].count("Image CFG scale: 1.5") == 1
        [expected] = Pipeline(engine).generate(asked, Given(over=over())).images
        assert np.array_equal(np.asarray(served), np.asarray(expected))
        with pytest.raises(RequestError, match="image: is missing"):
            batcher.submit(Job("2", "engine", asked), Ear())
    finally:
        assert batcher.close(drain=False, timeout=20)

    image().save(tmp_path / "in.png")
    command = ["generate", PROMPT, "--engine", str(engine.folder), "--image", str(tmp_path / "in.png")]
    command += ["--steps", "2", "--image-guidance", "2", "-o", str(tmp_path / "out.png")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "Image CFG scale: 2" in Image.open(tmp_path / "out.png").text["parameters"]


def test_a_controlnet_beside_it_is_refused(tiny_controlnet: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints.build_sd(tmp_path / "sd", in_channels=8)
    recipe = Recipe.make(backend="eager", controlnet=tiny_controlnet)
    with pytest.raises(CheckpointError, match="leave ControlNets out"):
        export(checkpoint, tmp_path / "engine", recipe)
