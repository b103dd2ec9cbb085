"""A second pass over pictures at another size, beside stock diffusers' two calls."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdfast import infotext
from sdfast.cli import main
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.recipe import Recipe
from sdfast.manifest import Span
from sdfast.pipeline import Pipeline
from sdfast.request import UPSCALERS, Hires, Request
from sdfast.validation.drawing import generate
from sdfast.validation.reference import reference_pipeline
from tests.fakes import FakeEngine
from tests.test_image_to_image import stock
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

STEPS = 4
WIDE = {"height": 16, "width": 24}
LARGE = {"height": 24, "width": 32}  # of WIDE: enlarged to 36x24, and cropped
LATENT = {
    "latent": {"mode": "bilinear"},
    "latent_antialiased": {"mode": "bilinear", "antialias": True},
    "latent_bicubic": {"mode": "bicubic"},
    "latent_bicubic_antialiased": {"mode": "bicubic", "antialias": True},
    "latent_nearest": {"mode": "nearest"},
    "latent_nearest_exact": {"mode": "nearest-exact"},
}
SIZES = tuple((Span.exactly(side), Span.exactly(side)) for side in (16, 32))


@pytest.fixture(scope="module")
def pipes(shallow_sd: Path, shallow_engine: Path) -> tuple[Any, Any, Pipeline]:
    """Stock's text to image and image to image, and sdfast."""
    kinds = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    return stock(shallow_sd, kinds[0]), stock(shallow_sd, kinds[1]), ours(shallow_engine)


@pytest.fixture(scope="module")
def xl_pipes(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Pipeline]:
    kinds = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    recipe = Recipe.make(backend="eager", sizes={"min": "16x16", "max": "32x32"})
    folder = export(tiny_sdxl, tmp_path_factory.mktemp("eager") / "sdxl-sizes", recipe)
    return stock(tiny_sdxl, kinds[0]), stock(tiny_sdxl, kinds[1]), ours(folder)


def in_two_calls(
    pipes: tuple[Any, Any, Pipeline],
    upscaler: str,
    steps: int,
    laid_out: int,
    scheduler: str = "DDIMScheduler",
    seed: int = 3,
    again: dict[str, Any] | None = None,
    **call: Any,
) -> torch.Tensor:
    """Latents of stock diffusers' second call over what its first has drawn, enlarged here."""
    for pipe in pipes[:2]:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipes[2].engine.scheduler_config)
    kind, factor = "latent" if upscaler in LATENT else "pil", pipes[0].vae_scale_factor
    left = (36 - 32) // factor // 2  # of the latents, of which whole ones are cropped
    first = pipes[0](
        **WIDE, num_inference_steps=STEPS, generator=seeded(seed), output_type=kind, **call
    ).images
    if upscaler in LATENT:
        large = torch.nn.functional.interpolate(first, (24 // factor, 36 // factor), **LATENT[upscaler])
        over: Any = large[..., left : left + 32 // factor]
    else:
        filter = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[upscaler]
        over = first[0].resize((36, 24), filter).crop((left * factor, 0, left * factor + 32, 24))
    call |= {"num_inference_steps": laid_out, "strength": (steps + 0.5) / laid_out, **(again or {})}
    found: torch.Tensor = pipes[1](image=over, generator=seeded(seed), output_type="latent", **call).images
    return found


@pytest.mark.parametrize("upscaler", UPSCALERS.values())
def test_it_is_what_stock_diffusers_draws_in_two_calls(
    pipes: tuple[Any, Any, Pipeline], upscaler: str
) -> None:
    hires = {**LARGE, "upscaler": upscaler, "strength": 0.6, "num_inference_steps": 3}
    expected = in_two_calls(pipes, upscaler, 3, 5, prompt=PROMPT)  # 3 / 0.6
    pipes[2].scheduler = "DDIMScheduler"
    found = pipes[2](
        PROMPT, **WIDE, num_inference_steps=STEPS, seed=3, hires=hires, output_type="latent"
    ).images
    assert_same(expected, found)


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_its_own_prompts_and_as_many_steps(pipes: tuple[Any, Any, Pipeline], scheduler: str) -> None:
    again = {"prompt": "a red boat", "negative_prompt": "snow"}
    expected = in_two_calls(pipes, "latent", STEPS, 5, scheduler, prompt=PROMPT, again=again)  # 4 / 0.75
    pipes[2].scheduler = scheduler
    hires = Hires.make(**LARGE, prompts=["a red boat"], negative_prompts=["snow"])
    call = {**WIDE, "num_inference_steps": STEPS, "hires": hires, "output_type": "latent"}
    assert_same(expected, pipes[2](PROMPT, seed=3, **call).images)
    both = pipes[2](PROMPT, seed=2, num_images_per_prompt=2, **call).images
    assert_same(expected, both[1:])  # each picture has its own seed in both passes


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_sdxl_is_told_the_sizes_of_each_pass(xl_pipes: tuple[Any, Any, Pipeline], upscaler: str) -> None:
    expected = in_two_calls(xl_pipes, upscaler, 2, 4, prompt=PROMPT, negative_prompt="snow")
    xl_pipes[2].scheduler = "DDIMScheduler"
    hires = {**LARGE, "upscaler": upscaler, "strength": 0.5, "num_inference_steps": 2}
    call = {"negative_prompt": "snow", "num_inference_steps": STEPS, "output_type": "latent"}
    assert_same(expected, xl_pipes[2](PROMPT, **WIDE, seed=3, hires=hires, **call).images)


def test_the_reference_draws_it_as_two_calls(shallow_sd: Path, pipes: tuple[Any, Any, Pipeline]) -> None:
    """`sdfast generate --backend diffusers`, of latents and of pictures, with another scheduler."""
    reference = reference_pipeline(resolve(str(shallow_sd)))
    for upscaler in ("latent_bicubic", "lanczos"):
        hires = Hires.make(**LARGE, upscaler=upscaler, strength=0.5, scheduler="euler", num_inference_steps=3)
        asked = Request.make(
            prompts=(PROMPT,),
            negative_prompts=("snow",),
            **WIDE,
            seed=1,
            num_inference_steps=3,
            scheduler="ddim",
            hires=hires,
        )
        expected = generate(reference, asked, output_type="pt")
        assert_same(expected, pipes[2].generate(asked, output_type="pt").images)


def test_a_picture_that_is_interrupted_in_its_first_pass_has_no_second() -> None:
    pipe = Pipeline(FakeEngine(sizes=SIZES))
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[int, ...]] = []
    stop_after = 0

    def stop(pipe: Any, step: int, timestep: float, told: dict[str, torch.Tensor]) -> dict[str, Any]:
        seen.append(tuple(told["latents"].shape))
        pipe.interrupt = len(seen) == stop_after
        return {}

    hires, sizes = {"height": 32, "width": 32}, []
    for last in (2, 6):
        stop_after = last
        seen.clear()
        images = pipe("a", num_inference_steps=4, hires=hires, callback_on_step_end=stop).images
        sizes.append((len(seen), images[0].size))
    assert sizes == [(2, (16, 16)), (6, (32, 32))]
    assert seen == [(1, 4, 2, 2)] * 4 + [(1, 4, 4, 4)] * 2


def asked(**fields: Any) -> Request:
    given = {"num_inference_steps": 4, "height": 16, "width": 16, **fields}
    return Request.make(prompts=("a", "b"), negative_prompts=(None, "c"), seed=5, **given)


def test_so_many_steps_are_done() -> None:
    for steps in (1, 7, 20, 333):
        for strength in (0.35, 0.5, 0.7, 0.75, 0.9999, 1.0):
            hires = Hires.make(height=16, width=16, strength=strength, num_inference_steps=steps)
            plan = Pipeline(FakeEngine()).schedule_of(asked(hires=hires).passes[1])
            assert len(plan) == steps
            whole = Pipeline(FakeEngine()).schedule_of(
                asked(num_inference_steps=int(steps / min(strength, 0.999)))
            )
            assert np.array_equal(plan.timesteps, whole.timesteps[-steps:])


def test_a_picture_alone_has_its_own_texts_and_seed() -> None:
    hires = Hires.make(height=32, width=32, prompts=("d", "e"), negative_prompts=("f", None))
    request = asked(hires=hires, num_images_per_prompt=2, prompts_2=("g", None))
    alone = request.alone(3)
    assert (alone.prompts, alone.negative_prompts, alone.prompts_2) == (("b",), ("c",), (None,))
    assert (alone.seed, alone.images) == (8, 1)
    second = alone.passes[1]
    assert (second.prompts, second.negative_prompts, second.prompts_2) == (("e",), (None,), None)
    assert (second.height, second.width, second.seed, second.hires) == (32, 32, 8, None)
    assert Request.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    ("hires", "fields", "told"),
    [
        ({"height": 20}, {}, "height: must be a multiple of 8"),
        ({"heigth": 32}, {}, "heigth: unknown; did you mean height"),
        ({"upscaler": "ESRGAN"}, {}, "upscaler: must be 'latent'"),
        ({"strength": 0.0}, {}, "strength: must be greater than 0"),
        ({"strength": 0.001}, {}, "hires: 4 steps at a strength of 0.001 are of a schedule of 4000"),
        ({"height": 8, "width": 8}, {}, "hires: 8x8 is smaller than the first pass, 16x16"),
        ({"prompts": ("a",)}, {}, "hires: prompts: 1 for 2 prompts"),
        ({"prompts": ("a", "\0")}, {}, "prompts: holds a NUL"),
        ({}, {"strength": 0.5}, "hires: is for pictures drawn from noise"),
        ({}, {"controlnet_conditioning_scale": 1.0}, "hires: is for pictures drawn from noise"),
        ({}, {"num_inference_steps": None, "timesteps": (500.0, 1.0)}, "hires: give it num_inference_steps"),
    ],
)
def test_what_makes_no_second_pass_is_refused(
    hires: dict[str, Any], fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError) as caught:
        asked(hires=Hires.make(**{"height": 32, "width": 32, **hires}), **fields)
    assert str(caught.value).startswith(told)


def test_what_an_engine_cannot_draw_is_refused_before_it_draws() -> None:
    engine = FakeEngine(sizes=SIZES, edits=False)
    pipe, call = Pipeline(engine), {"num_inference_steps": 2}
    for hires, told in (
        ({"height": 64, "width": 64}, "64x64"),
        ({"height": 32, "width": 32, "upscaler": "lanczos"}, "no VAE encoder"),
        ({"height": 32, "width": 32, "scheduler": "nothing"}, "nothing"),
        ({"height": 32, "width": 32, "prompts": ("a BREAK b",)}, "BREAK"),
    ):
        with pytest.raises(RequestError, match=told):
            pipe("a", hires=hires, emphasis="original", **call)
    assert engine.calls["unet"] == []
    assert pipe("a", hires={"height": 32, "width": 32}, **call).images[0].size == (32, 32)  # latents alone


def test_a_scheduler_object_without_add_noise_has_no_second_pass() -> None:
    class Silent(diffusers.DDIMParallelScheduler):
        def __getattribute__(self, name: str) -> Any:
            if name == "add_noise":
                raise AttributeError(name)
            return super().__getattribute__(name)

    engine = FakeEngine(sizes=SIZES)
    pipe = Pipeline(engine)
    pipe.scheduler = Silent(clip_sample=False)
    with pytest.raises(RequestError, match="Silent has no add_noise"):
        pipe("a", num_inference_steps=2, hires={"height": 32, "width": 32})
    assert engine.calls["unet"] == []


def test_the_parameters_tell_of_it() -> None:
    def told(**hires: Any) -> dict[str, str]:
        request = asked(hires=Hires.make(**hires))
        plan = Pipeline(FakeEngine()).schedule_of(request)
        text = infotext.infotext_of(request, plan, 1, model="m", weights={})
        return dict(infotext.parse(str(text)).extra)

    assert told(height=32, width=32) == {
        "Denoising strength": "0.75",
        "Hires upscale": "2",
        "Hires upscaler": "Latent",
    }
    assert told(
        height=32,
        width=24,
        upscaler="latent_nearest_exact",
        strength=0.5,
        num_inference_steps=9,
        scheduler="dpmpp_2m_karras",
        prompts=("d", "e, f"),
        negative_prompts=(None, "g"),
    ) == {
        "Denoising strength": "0.5",
        "Hires resize": "24x32",
        "Hires upscaler": "Latent (nearest-exact)",
        "Hires steps": "9",
        "Hires sampler": "DPM++ 2M",
        "Hires schedule type": "Karras",
        "Hires prompt": "e, f",
        "Hires negative prompt": "g",
    }


def test_the_command_line_draws_twice(
    shallow_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Engine.open(shallow_engine, threads=1)
    monkeypatch.setattr(Engine, "open", lambda *_, **__: opened)
    line = [
        "generate",
        PROMPT,
        "--engine",
        str(shallow_engine),
        "--steps",
        "2",
        "-o",
        str(tmp_path / "a.png"),
    ]
    given = ["--size", "16x16", "--hires", "24x16", "--hires-strength", "0.5", "--hires-upscaler", "lanczos"]
    result = CliRunner().invoke(main, [*line, *given, "--hires-steps", "3"])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "a.png").size == (24, 16)
    extra = infotext.read(tmp_path / "a.png").extra
    assert (extra["Hires resize"], extra["Hires upscaler"], extra["Hires steps"]) == ("24x16", "Lanczos", "3")
    refused = CliRunner().invoke(main, [*line, "--hires-steps", "3", "--overwrite"])
    assert refused.exit_code == 1 and "give --hires too" in refused.output
