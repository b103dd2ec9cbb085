"""Pictures under the guidance of several control images, beside stock diffusers' pipelines with a list of
ControlNets."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdfast import drop_in
from sdfast.call import Given
from sdfast.control import asked_scale
from sdfast.errors import RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.images import controls_from_bytes, read_controls
from sdfast.infotext import infotext_of
from sdfast.loop import Rows
from sdfast.masked_area import MaskedArea
from sdfast.pipeline import Pipeline
from tests import checkpoints
from tests.conftest import FLAT_SIZES
from tests.test_controlnet import SIDE, STEPS, Pair, both, over, request_of, stock
from tests.test_image_to_image import assert_same_pictures, image, mask, spot
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

EDGES, POSE = image(1), image(2)


@pytest.fixture(scope="module")
def sd(tiny_sd: Path, tiny_controlnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The second reads blue first."""
    place = tmp_path_factory.mktemp("controlnets")
    second = checkpoints.build_controlnet(
        place / "second", tiny_sd, seed=7, controlnet_conditioning_channel_order="bgr"
    )
    both_nets = [tiny_controlnet, second]
    engine = export(tiny_sd, place / "engine", Recipe.make(backend="eager", controlnet=both_nets))
    return stock(tiny_sd, both_nets, "StableDiffusionControlNetPipeline"), ours(engine)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The second is less deep than the first."""
    place = tmp_path_factory.mktemp("controlnets")
    nets = [
        checkpoints.build_controlnet(place / "first", tiny_sdxl),
        checkpoints.build_controlnet(
            place / "second", tiny_sdxl, seed=7, transformer_layers_per_block=[1, 1]
        ),
    ]
    engine = export(tiny_sdxl, place / "engine", Recipe.make(backend="eager", controlnet=nets))
    return stock(tiny_sdxl, nets, "StableDiffusionXLControlNetPipeline"), ours(engine)


CALLS: dict[str, dict[str, Any]] = {
    "a scale and steps for each": {
        "controlnet_conditioning_scale": [0.8, 0.5],
        "control_guidance_start": [0.0, 0.25],
        "control_guidance_end": [0.5, 1.0],
    },
    "one scale for both, an end for each": {
        "controlnet_conditioning_scale": 0.6,
        "control_guidance_end": [0.5, 0.75],
        "scheduler": "EulerAncestralDiscreteScheduler",
    },
    "guess mode": {"guess_mode": True, "controlnet_conditioning_scale": [0.8, 0.5]},
    "images of each picture": {
        "prompt": ["a boat", "the sea"],
        "control_image": [[EDGES, POSE], [image(3), image(4)]],
    },
    "a batch for one of them": {
        "prompt": ["a boat", "the sea"],
        "control_image": [read_controls([EDGES, POSE]), read_controls(image(3))],
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_equals_stock_diffusers(sd: Pair, call: str) -> None:
    assert_same(*both(sd, **{"control_image": [EDGES, POSE], **CALLS[call]}))


@pytest.mark.parametrize("call", ["a scale and steps for each"])
def test_sdxl_equals_stock_diffusers(sdxl: Pair, call: str) -> None:
    assert_same(*both(sdxl, **{"control_image": [EDGES, POSE], "guidance_scale": 4.0, **CALLS[call]}))


@pytest.mark.parametrize(("family", "task"), [("sd", "Img2Img"), ("sdxl", "Inpaint")])
def test_over_an_image_equals_stock_diffusers(request: pytest.FixtureRequest, family: str, task: str) -> None:
    """By the drop-in."""
    reference, pipe = request.getfixturevalue(family)
    theirs = over(reference, task)
    own = getattr(drop_in, type(theirs).__name__)(pipe.engine)
    own.set_progress_bar_config(disable=True)
    masked = {"mask_image": mask(), "height": SIDE, "width": SIDE} if task == "Inpaint" else {}
    call = {
        **{"image": image(3), "control_image": [EDGES, POSE], "strength": 0.6, "num_inference_steps": 5},
        **{"control_guidance_end": [0.7, 1.0], "guidance_scale": 4.0},
    }
    assert_same(*both((theirs, own), **call, **masked))


def test_a_part_of_an_image_is_cut_out_of_every_control_image(sd: Pair) -> None:
    """Which diffusers does of one alone."""
    whole, hole = image(3, 90, 120), spot(90, 120, (20, 10, 50, 40))
    call = {"prompt": PROMPT, "strength": 0.6, "num_inference_steps": 5, "scheduler": "ddim"}
    area = MaskedArea.make(whole, hole, padding_mask_crop=4, height=SIDE, width=SIDE)
    edges, pose = image(4, 90, 120), image(5, 90, 120)
    for controls in ([edges, pose], [None, pose]):
        parts = [one and area.cut(one) for one in controls]
        given = {"image": area.cut(whole), "mask_image": area.cut(hole), "control_image": parts}
        expected = [area.pasted(one) for one in sd[1](**call, **given, seed=1).images]
        given = {"image": whole, "mask_image": hole, "control_image": controls, "padding_mask_crop": 4}
        assert_same_pictures(expected, sd[1](**call, **given, seed=1).images)


def test_one_without_an_image_adds_nothing(sd: Pair) -> None:
    """As with a scale of 0, whatever is said for it."""
    expected, _ = both(sd, control_image=[EDGES, POSE], controlnet_conditioning_scale=[0.7, 0.0])
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent"}
    for scale in (0.7, [0.7, 0.5]):
        images = {"control_image": [EDGES, None], "controlnet_conditioning_scale": scale}
        assert_same(expected, sd[1](**call, **images, generator=seeded(0)).images)


def test_rows_of_different_scales_and_images_share_a_batch(sd: Pair) -> None:
    pipe = sd[1]
    asked = [
        (request_of(controlnet_conditioning_scale=[0.4, 1.0], seed=2), [image(3), image(4)]),
        (
            request_of(controlnet_conditioning_scale=[1.0, 0.0], control_guidance_end=[1.0, 0.5]),
            [EDGES, POSE],
        ),
        (request_of(control_guidance_start=[0.0, 0.3]), [POSE, EDGES]),
    ]
    given = [Given(control=read_controls(images, 2)) for _, images in asked]
    alone = [pipe.generate(r, g, "latent").images[0] for (r, _), g in zip(asked, given, strict=True)]
    prepared = [pipe.prepare(r, g) for (r, _), g in zip(asked, given, strict=True)]
    rows = Rows(pipe.engine, [row for one in prepared for row in one.rows], SIDE, SIDE)
    while rows.active:
        rows.tick()
    for expected, got in zip(alone, rows.latents, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_onnx_engine_equals_stock_diffusers(flat_sd: Path, tmp_path: Path) -> None:
    widths = {"conditioning_embedding_out_channels": (4, 16)}
    nets = [checkpoints.build_controlnet(tmp_path / str(i), flat_sd, seed=i, **widths) for i in range(2)]
    recipe = Recipe.make(sizes=FLAT_SIZES, batch=2, controlnet=nets)
    pipe = ours(export(flat_sd, tmp_path / "engine", recipe))
    small = [one.resize((16, 16)) for one in (EDGES, POSE)]
    call = {"control_image": small, "controlnet_conditioning_scale": [0.6, 0.9]}
    reference = stock(flat_sd, nets, "StableDiffusionControlNetPipeline")
    expected, drawn = both((reference, pipe), **call, num_images_per_prompt=2, output_type="pt")
    assert 10 * torch.log10(1 / (expected - drawn).square().mean()) > 100


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an image": (
        {"control_image": EDGES},
        "^control_image: 1, but this engine has 2 ControlNets; give a list",
    ),
    "three images": ({"control_image": [EDGES] * 3}, "^control_image: 3, but this engine has 2 ControlNets"),
    "no image for any": ({"control_image": [None, None]}, "^control_image: None for every ControlNet"),
    "a picture without one": (
        {"control_image": [[EDGES, POSE], [EDGES, None]]},
        "^control_image: of a list for each picture each has 2 images",
    ),
    "another size": (
        {"control_image": [EDGES, image(0, 72, 64)]},
        "^control_image: 1 of 64x64, 1 of 72x64; those of one call have one size",
    ),
    "scales of three": (
        {"controlnet_conditioning_scale": [1.0] * 3},
        "^controlnet_conditioning_scale: 3 numbers, but this engine has 2 ControlNets; give one for each",
    ),
    "a negative scale": (
        {"controlnet_conditioning_scale": [1.0, -0.5]},
        r"^controlnet_conditioning_scale\.1: must be greater than or equal to 0 \(got -0\.5\)",
    ),
    "no steps for one": (
        {"control_guidance_start": [0.0, 0.5], "control_guidance_end": 0.5},
        r"^control_guidance_start: 0\.5 is not below control_guidance_end, 0\.5",
    ),
    "starts and ends of others": (
        {"control_guidance_start": [0.0, 0.1], "control_guidance_end": [0.5] * 3},
        "^control_guidance_start: 2 numbers, but control_guidance_end has 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_name(sd: Pair, case: str) -> None:
    fields, message = BAD[case]
    call = {"control_image": [EDGES, POSE], "num_inference_steps": 4, "scheduler": "ddim", **fields}
    with pytest.raises(RequestError, match=message):
        sd[1](PROMPT, **call)


def test_an_engine_with_one_takes_lists_of_one(controlled_engine: Path) -> None:
    pipe = Pipeline.from_engine(controlled_engine)
    with pytest.raises(RequestError, match="scale: 2 numbers, but this engine has one ControlNet; give one"):
        pipe(PROMPT, control_image=EDGES, controlnet_conditioning_scale=[1.0, 0.5], num_inference_steps=2)
    assert asked_scale(pipe.engine.manifest.model, [EDGES, POSE], [0.5]) == (0.5,)


def test_bytes_are_read_as_pictures_are() -> None:
    bytes_of_both = EDGES.tobytes() + POSE.tobytes()
    torch.testing.assert_close(
        controls_from_bytes(bytes_of_both, SIDE, SIDE), read_controls([EDGES, POSE], 2)
    )


def test_a_picture_tells_the_scales_and_the_steps(sd: Pair) -> None:
    asked = request_of(controlnet_conditioning_scale=[0.8, 0.5], control_guidance_end=[1.0, 0.5])
    told = infotext_of(asked, sd[1].schedule_of(asked), 0, model="tiny", weights={}).extra
    assert told == {"ControlNet scale": "0.8/0.5", "ControlNet steps": "0-1/0-0.5"}
    modes = request_of(control_mode=["control", "guess"], control_layer_scales=[None, [0.25, 1]])
    assert infotext_of(modes, sd[1].schedule_of(modes), 0, model="tiny", weights={}).extra == {
        "ControlNet scale": "1",
        "ControlNet mode": "Control/Guess",
        "ControlNet layers": "/0.25,1",
    }
    whole = request_of(controlnet_conditioning_scale=[0.8, 0.5])
    assert infotext_of(whole, sd[1].schedule_of(whole), 0, model="tiny", weights={}).extra == {
        "ControlNet scale": "0.8/0.5"
    }
