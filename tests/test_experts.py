"""The two halves of denoising, `denoising_end` and `denoising_start`, beside diffusers' SDXL pipelines."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdfast import drop_in
from sdfast.cli import main
from sdfast.editing import Editing
from sdfast.ensemble import Ensemble
from sdfast.errors import RequestError
from sdfast.first_latents import Over
from sdfast.images import read_images, read_masks
from sdfast.infotext import parse, unet_digest
from sdfast.manifest import read_manifest
from sdfast.masked_area import MaskedArea
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.schedulers import SAMPLERS, SOLVERS, schedule
from tests.test_image_to_image import SCHEDULERS, image, mask, stock
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

STEPS, SWITCH = 7, 0.6
KINDS = {
    "base": "StableDiffusionXLPipeline",
    "image": "StableDiffusionXLImg2ImgPipeline",
    "mask": "StableDiffusionXLInpaintPipeline",
}


@pytest.fixture(scope="module")
def sides(tiny_sdxl: Path, sdxl_engine: Path) -> tuple[dict[str, Any], Pipeline]:
    """Stock's pipelines on one checkpoint, and sdfast's."""
    first = stock(tiny_sdxl, KINDS["base"])
    without = {"add_watermarker": False}
    others = {name: getattr(diffusers, kind).from_pipe(first, **without) for name, kind in KINDS.items()}
    for pipe in others.values():
        pipe.set_progress_bar_config(disable=True)
    return others, ours(sdxl_engine)


def both(
    sides: tuple[dict[str, Any], Pipeline],
    kind: str,
    scheduler: str = "EulerDiscreteScheduler",
    overrides: Mapping[str, Any] | None = None,
    seeds: tuple[int, ...] = (0,),
    output_type: str = "latent",
    **request: Any,
) -> tuple[Any, Any]:
    """The images of the same call, by stock diffusers' pipeline of that kind and by sdfast."""
    reference, pipe = sides[0][kind], sides[1]
    chosen = getattr(diffusers, scheduler).from_config(pipe.engine.scheduler_config, **(overrides or {}))
    reference.scheduler = pipe.scheduler = chosen
    request = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 4.0, **request}
    results = [
        call(**request, generator=seeded(*seeds), output_type=output_type).images
        for call in (reference, pipe)
    ]
    return results[0], results[1]


def halves(sides: Any, *scheduler: Any, switch: float = SWITCH, **request: Any) -> None:
    """Each half is the stock one, the second over latents of the stock first."""
    left = both(sides, "base", *scheduler, denoising_end=switch, **request)
    assert_same(*left)
    assert_same(*both(sides, "image", *scheduler, denoising_start=switch, image=left[0], **request))


IN_SHORT = ("DPM++ 2M Karras", "Heun")


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS]
)
def test_both_halves_equal_stock_diffusers(sides: Any, name: str) -> None:
    halves(sides, *SCHEDULERS[name])


CALLS: dict[str, dict[str, Any]] = {
    "pictures of one generator": {"num_images_per_prompt": 2},
    "a generator each": {"num_images_per_prompt": 2, "seeds": (3, 4)},
    "a middle part": {"denoising_end": 0.9},
}


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("image", "pictures of one generator"),
        ("mask", "a middle part"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("image", "a generator each"),
                ("image", "a middle part"),
                ("mask", "pictures of one generator"),
                ("mask", "a generator each"),
            )
        ),
    ],
)
def test_taking_over_an_image_equals_stock_diffusers(sides: Any, kind: str, call: str) -> None:
    """An image is encoded, which draws; Euler a draws at every step, so that another order shows."""
    given = {"mask_image": mask()} if kind == "mask" else {}
    fields = {"image": image(), "denoising_start": 0.5, "strength": 0.9, **given, **CALLS[call]}
    assert_same(*both(sides, kind, "EulerAncestralDiscreteScheduler", **fields))


def test_masked_latents_equal_stock_diffusers(sides: Any) -> None:
    """Both halves with a mask, as base and refiner inpaint together."""
    call = {"mask_image": mask(), "strength": 0.99}
    first = both(sides, "mask", image=image(), denoising_end=SWITCH, **call)
    assert_same(*first)
    assert_same(*both(sides, "mask", image=first[0], denoising_start=SWITCH, **call))


@pytest.mark.slow
def test_a_scheduler_object_of_another_class_equals_stock_diffusers(sides: Any) -> None:
    halves(sides, "DDIMParallelScheduler", {"clip_sample": False})


@pytest.mark.parametrize("name", ["Euler", "Heun", "DPM++ 2M Karras", "PLMS"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.71, 0.999])
def test_a_run_is_cut_where_diffusers_cuts_it(name: str, share: float) -> None:
    """By its own counting, for short and long runs."""
    kind, overrides = SCHEDULERS[name]
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **overrides}
    for steps in (3, 8, 25):
        own = getattr(diffusers, kind)(**config)
        own.set_timesteps(steps)
        stand_in, run = (
            SimpleNamespace(scheduler=own),
            {"num_inference_steps": steps, "denoising_start": share},
        )
        cut = diffusers.StableDiffusionXLImg2ImgPipeline.get_timesteps
        told, _ = cut(stand_in, steps, 1.0, "cpu", denoising_start=share)
        if not len(told):
            with pytest.raises(RequestError, match=r"denoising_start=0\.999 leaves no step to do"):
                schedule(kind, config, **run)
            continue
        plan = schedule(kind, config, **run)
        assert plan.timesteps == pytest.approx([float(t) for t in told], abs=1e-3)


def test_the_classes_of_two_evaluations_are_those_of_diffusers_second_order() -> None:
    """By which diffusers pairs the timesteps."""
    ours = {sampler.scheduler for sampler in SAMPLERS if sampler.evaluations == 2}
    assert ours == {name for name in SOLVERS if getattr(diffusers, name).order == 2}


def test_drop_ins_take_both_ends(sides: Any) -> None:
    """With the strength that they have by default, which says nothing then."""
    call = {"num_inference_steps": 4, "scheduler": "euler", "output_type": "latent"}
    left = sides[1](PROMPT, denoising_end=0.5, guidance_scale=5.0, seed=1, **call).images
    own = drop_in.StableDiffusionXLImg2ImgPipeline(sides[1].engine)
    own.set_progress_bar_config(disable=True)
    finished = own(PROMPT, image=left, denoising_start=0.5, seed=1, **call).images
    expected = sides[1](PROMPT, image=left, denoising_start=0.5, guidance_scale=5.0, seed=2, **call).images
    assert torch.equal(finished, expected)
    assert not torch.equal(finished, left)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a start alone": (
        {"denoising_start": 0.8},
        "^mask_image, strength, denoising_start, image_guidance_scale are for",
    ),
    "all of it before": ({"image": image(), "denoising_start": 1.0}, "^denoising_start: must be less than 1"),
    "nothing before": (
        {"image": image(), "denoising_start": 0.0},
        "^denoising_start: must be greater than 0",
    ),
    "no end": ({"denoising_end": 0.0}, "^denoising_end: must be greater than 0"),
    "the wrong way round": (
        {"image": image(), "denoising_start": 0.8, "denoising_end": 0.5},
        "^denoising_start: 0.8 is not below denoising_end, 0.5",
    ),
    "no step": ({"denoising_end": 0.001}, "^denoising_end=0.001 leaves no step to do"),
    "a second pass": (
        {"denoising_end": 0.8, "hires": {"height": 128, "width": 128}},
        "^hires: its second pass draws over whole pictures",
    ),
    "a run backwards": ({"denoising_end": 0.8, "scheduler": "DDIMInverseScheduler"}, "from a picture to its"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_name(sides: Any, case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(RequestError, match=message):
        sides[1](PROMPT, **{"num_inference_steps": 4, "scheduler": "ddim", **fields})


def test_a_request_says_where_it_begins_once() -> None:
    fields = {"prompts": ("a",), "negative_prompts": (None,), "height": 64, "width": 64}
    with pytest.raises(
        RequestError, match="denoising_start: says which steps are done, and strength does too"
    ):
        Request.make(**fields, num_inference_steps=4, strength=0.5, denoising_start=0.5)


def test_two_engines_draw_what_stock_pipelines_draw_with_one_generator(
    sides: Any, tiny_refiner: Path, refiner_engine: Path
) -> None:
    """Euler a draws in both halves: the second goes on with the generator of the first."""
    refiner, name = stock(tiny_refiner, KINDS["image"]), "EulerAncestralDiscreteScheduler"
    config = sides[1].engine.scheduler_config
    for pipe in (sides[0]["base"], refiner):
        pipe.scheduler = getattr(diffusers, name).from_config(config)
    own = seeded(5)
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "generator": own, "output_type": "latent"}
    left = sides[0]["base"](PROMPT, prompt_2="sea", denoising_end=SWITCH, **call).images
    expected = refiner(PROMPT, image=left, denoising_start=SWITCH, **call).images
    asked = Request.make(
        **{
            "prompts": (PROMPT,),
            "negative_prompts": (None,),
            "prompts_2": ("sea",),
            "height": 64,
            "width": 64,
        },
        **{"num_inference_steps": STEPS, "guidance_scale": 4.0, "scheduler": name, "seed": 5},
    )
    found = Ensemble(sides[1], ours(refiner_engine), SWITCH).generate(asked, output_type="latent")
    assert found.seeds == (5,)
    assert_same(expected, found.images)


def test_two_engines_from_the_command_line(sdxl_engine: Path, refiner_engine: Path, tmp_path: Path) -> None:
    asked = ["generate", "a boat", "--engine", str(sdxl_engine), "--refiner", str(refiner_engine)]
    asked += ["--steps", "4", "--seed", "5", "--scheduler", "euler", "-o", str(tmp_path / "a.png")]
    drawn = CliRunner().invoke(main, [*asked, "--refiner-switch-at", "0.5"])
    assert drawn.exit_code == 0, drawn.output
    with Image.open(tmp_path / "a.png") as picture:
        told = parse(picture.text["parameters"])
    digest = unet_digest(read_manifest(refiner_engine).checkpoint.weights)
    assert told.extra == {"Refiner": f"refiner [{digest[:10]}]", "Refiner switch at": "0.5"}
    wrong = {
        "guidance_end: is a share of the steps of one engine": ["--guidance-end", "0.5"],
        "hires: its second pass": ["--hires", "64x64"],
        "refiner: goes on with what an engine began": ["--backend", "diffusers"],
    }
    for message, options in wrong.items():
        refused = CliRunner().invoke(main, [*asked, "--overwrite", *options])
        assert refused.exit_code == 1 and message in refused.output


def test_two_engines_draw_a_part_of_an_image(sdxl_engine: Path, refiner_engine: Path, tmp_path: Path) -> None:
    """Both over the part, and pasted once."""
    whole, hole = image(1, 150, 100), Image.new("L", (150, 100))
    hole.paste(mask(40, 30), (100, 20))
    whole.save(tmp_path / "image.png")
    hole.save(tmp_path / "mask.png")
    asked = ["generate", "a boat", "--engine", str(sdxl_engine), "--refiner", str(refiner_engine)]
    asked += ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    asked += ["--steps", "4", "--seed", "5", "--scheduler", "euler", "-o", str(tmp_path / "a.png")]
    drawn = CliRunner().invoke(main, [*asked, "--mask-padding", "6"])
    assert drawn.exit_code == 0, drawn.output
    area = MaskedArea.make(whole, hole, padding_mask_crop=6, height=64, width=64)
    over = Over(read_images(area.cut(whole), 4), read_masks(area.cut(hole)))
    request = Request.make(
        **{"prompts": ("a boat",), "negative_prompts": (None,), "height": 64, "width": 64, "seed": 5},
        **{"num_inference_steps": 4, "guidance_scale": 7.0, "scheduler": "euler", "strength": 0.9999},
    )
    [part] = Ensemble(ours(sdxl_engine), ours(refiner_engine)).generate(request, over).images
    with Image.open(tmp_path / "a.png") as picture:
        assert np.abs(np.asarray(picture, int) - np.asarray(area.pasted(part), int)).max() <= 1


def test_pictures_of_two_engines_are_what_they_are_alone(sdxl_engine: Path, refiner_engine: Path) -> None:
    """With a mask too, where each picture's own generator has to draw for the image's latents."""
    engines = Ensemble(ours(sdxl_engine), ours(refiner_engine), SWITCH)
    over = Over(read_images(image(), 4), read_masks(mask()))
    call = {"prompts": (PROMPT,), "negative_prompts": (None,), "height": 64, "width": 64, "strength": 0.8}
    call |= {"num_inference_steps": 5, "guidance_scale": 4.0, "scheduler": "euler_a"}

    def drawn(seed: int, images: int) -> torch.Tensor:
        asked = Request.make(seed=seed, num_images_per_prompt=images, **call)
        found: torch.Tensor = engines.generate(asked, over, output_type="latent").images
        return found

    for i, picture in enumerate(drawn(3, 2)):
        torch.testing.assert_close(picture, drawn(3 + i, 1)[0], rtol=1e-4, atol=1e-4)


def test_a_refiner_of_other_latents_is_refused(sides: Any, sd_engine: Path) -> None:
    asked = Request.make(
        prompts=("a",), negative_prompts=(None,), height=64, width=64, num_inference_steps=4, scheduler="ddim"
    )
    with pytest.raises(
        RequestError, match=r"^refiner: is of sd, with 4 channels of latents, and the base of sdxl"
    ):
        Ensemble(sides[1], ours(sd_engine)).generate(asked)


def test_prompts_that_change_go_on_where_the_base_stopped() -> None:
    """Of 10 steps another engine has done 6: brackets name the steps of the whole."""
    rest = Editing(10, 4, skipped=6)
    assert rest.texts("a [boat:cabin:0.5] at sea") == [(0, "a cabin at sea")]
    assert rest.texts("a [boat:cabin:8] at sea") == [(0, "a boat at sea"), (3, "a cabin at sea")]
    whole = Editing(10, 10)
    for prompt in ("[a|b] c", "[a:b:3][c:d:7]", "[[a:b:2]:c:0.7]", "[a::8]"):
        told = [
            text for k in range(6, 10) for start, text in [max(t for t in whole.texts(prompt) if t[0] <= k)]
        ]
        own = [text for k in range(4) for start, text in [max(t for t in rest.texts(prompt) if t[0] <= k)]]
        assert own == told


def test_both_halves_of_a_prompt_that_changes(sides: Any) -> None:
    """Together they read what the whole run reads."""
    fields = {"prompts": ("a [boat:cabin:0.3] [x|y]",), "negative_prompts": (None,), "prompt_editing": True}
    fields |= {"height": 64, "width": 64, "num_inference_steps": 10, "scheduler": "euler"}
    whole, rest = Request.make(**fields), Request.make(**fields, denoising_start=0.6)
    plans = [sides[1].schedule_of(one) for one in (whole, rest)]
    editing = sides[1].editing_of(rest, plans[1])
    assert editing == Editing(10, len(plans[1]), skipped=10 - len(plans[1]))
    assert sides[1].editing_of(whole, plans[0]) == Editing(10, 10)
