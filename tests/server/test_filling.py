"""AUTOMATIC1111's `inpainting_fill`: what img2img begins with where a mask leaves the image open."""

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from sdfast.request import MaskedContent
from sdfast.server.automatic1111.fields import ImageToImage
from sdfast.server.automatic1111.filling import filled
from sdfast.server.automatic1111.pictures import canvas_of
from tests.server.studio import FakeStudio, engine
from tests.server.test_automatic1111 import CANNY, HOLE, LARGE, PART, RED, Client, coded, opened, units

pytestmark = pytest.mark.anyio
LANCZOS = Image.Resampling.LANCZOS
CONTENTS: dict[int | None, MaskedContent] = {
    **{None: "fill", 0: "fill", 1: "original", 2: "latent_noise", 3: "latent_nothing"},
}
TOLD = {"fill": "fill", "latent_noise": "latent noise", "latent_nothing": "latent nothing"}
ASKED = {name: value for name, value in PART.items() if name != "inpainting_fill"}


@pytest.fixture
def api(http: httpx.AsyncClient) -> Client:
    return Client(http)


def spread(image: Image.Image, mask: Image.Image) -> np.ndarray:
    """The image filled, [H, W, 3] float64: by true Gaussians, without rounding."""
    left = 1 - np.asarray(mask, float)[..., None] / 255
    planes = np.dstack([np.asarray(image, float) * left, left])
    made = np.zeros_like(planes)
    for radius, times in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        layer = gaussian_filter(planes, (radius, radius, 0), mode="nearest") if radius else planes
        for _ in range(times):
            made = layer + made * (1 - layer[..., 3:])
    return made[..., :3] / made[..., 3:]


@pytest.mark.parametrize("seed", range(4))
def test_filled_with_the_colours_around(seed: int) -> None:
    """Pillow's blurs are three boxes, and of eight bits: no pixel is far off, and together they are near."""
    dice = np.random.default_rng(seed)
    image = Image.fromarray(dice.integers(0, 256, (6, 8, 3), np.uint8)).resize((160, 120))
    shades = np.zeros((120, 160), np.uint8)
    shades[30:90, 50:110] = 255
    shades[20:30, 40:120] = dice.integers(0, 256, (10, 80))
    mask = Image.fromarray(shades)
    apart = np.abs(np.asarray(filled(image, mask), float) - spread(image, mask))
    assert apart.max() < 12 and apart[shades > 0].mean() < 2.5
    assert (apart[shades == 0] == 0).all()
    hidden = np.abs(np.asarray(image, float) - spread(image, mask))[shades == 255]
    assert hidden.mean() > 25  # which the image itself is not


def test_nothing_of_what_is_under_the_mask_is_left() -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 40, 40))
    others = [Image.new("RGB", (64, 64), "red") for _ in range(2)]
    others[1].paste("blue", (16, 16, 40, 40))
    first, second = (np.asarray(filled(image, mask), int) for image in others)
    assert np.array_equal(first, second)
    assert np.abs(first - (255, 0, 0)).max() <= 3
    assert filled(others[1], Image.new("L", (64, 64))).tobytes() == others[1].tobytes()
    assert not np.asarray(filled(others[1], Image.new("L", (64, 64), 255))).any()  # of nothing, black


def test_colours_reach_far_where_nothing_is_near() -> None:
    """Further than the blurs that follow the widest."""
    image, mask = Image.new("RGB", (700, 16), "red"), Image.new("L", (700, 16), 255)
    mask.paste(0, (0, 0, 40, 16))
    assert filled(image, mask).getpixel((450, 8)) == (255, 0, 0)


@pytest.mark.parametrize("fill", CONTENTS)
@pytest.mark.parametrize("part", [True, False])
async def test_the_engine_is_given_the_filled_image_and_told(
    api: Client, studio: FakeStudio, fill: int | None, part: bool
) -> None:
    """All but the original is filled: what replaces latents leaves some pixels' colours at the mask's edge.
    The image that pictures are laid over is the one that came."""
    said = {} if fill is None else {"inpainting_fill": fill}
    call = {**ASKED, **said, "inpaint_full_res": part, "inpaint_full_res_padding": 4, "mask_blur": 2}
    told = await api.post("img2img", **call, seed=1)
    [job] = studio.jobs
    assert job.request.masked_content == CONTENTS[fill]
    canvas = canvas_of(ImageToImage(**call), 64, 64)
    assert canvas.mask is not None
    own = canvas.image.tobytes()
    assert (job.image == own) == (fill == 1)
    if fill != 1:
        assert job.image == filled(canvas.image, canvas.mask).tobytes()
    if not part:
        assert own == LARGE.resize((64, 64), LANCZOS).tobytes()
    extra = json.loads(told["info"])["extra_generation_params"]
    assert extra.get("Masked content") == TOLD.get(CONTENTS[fill])
    picture = opened(told["images"][0])
    whole = LARGE if part else canvas.image
    kept = np.asarray(canvas.area.mask if part and canvas.area else canvas.mask) == 0
    assert np.array_equal(np.asarray(picture)[kept], np.asarray(whole)[kept])


@pytest.mark.parametrize("part", [True, False])
def test_a_picture_is_blended_with_the_image_that_came(part: bool) -> None:
    """Where the mask is grey something of the image shows, not of what it was filled with."""
    call = {**ASKED, "inpaint_full_res": part, "mask_blur": 8}
    drawn = base64.b64decode(coded(Image.new("RGB", (64, 64), "blue")))
    pictures = [canvas_of(ImageToImage(**call, inpainting_fill=n), 64, 64).over(drawn) for n in range(4)]
    assert all(picture == pictures[1] for picture in pictures)


async def test_a_unit_without_an_image_has_the_one_that_came(api: Client, studio: FakeStudio) -> None:
    """Not the filled one: what a ControlNet sees is the image of the call."""
    studio.engines["tiny"] = engine(controlnets=(CANNY,))
    await api.post("img2img", **ASKED, inpaint_full_res=False, **units({"weight": 0.5}))
    [job] = studio.jobs
    assert job.control == LARGE.resize((64, 64), LANCZOS).tobytes() != job.image


async def test_without_a_mask_it_says_nothing(api: Client, studio: FakeStudio) -> None:
    for fill in CONTENTS:
        await api.post("img2img", init_images=[coded(RED)], inpainting_fill=fill)
    assert [(job.image, job.request.masked_content) for job in studio.jobs] == [(RED.tobytes(), None)] * 5


async def test_an_inverted_mask_has_the_rest_filled(api: Client, studio: FakeStudio) -> None:
    await api.post("img2img", **ASKED, inpainting_mask_invert=1, inpaint_full_res=False)
    image = Image.frombytes("RGB", (64, 64), studio.jobs[0].image or b"")
    hole = np.asarray(HOLE.resize((64, 64), LANCZOS)) > 200
    colours = np.asarray(image, int)
    assert (colours[hole] == (0, 255, 0)).all()  # what was lime stays, and spreads
    assert np.abs(colours[:8, :8] - (0, 255, 0)).max() < 40


@pytest.mark.parametrize("fill", [-1, 4, 1.5, "fill"])
async def test_other_contents_are_refused(api: Client, studio: FakeStudio, fill: Any) -> None:
    message = await api.refused("img2img", 422, **ASKED, inpainting_fill=fill)
    assert message.startswith("inpainting_fill: must be 0, 1, 2 or 3") and studio.jobs == []


async def test_an_engine_that_edits_whole_images_is_asked_for_no_content(
    api: Client, studio: FakeStudio
) -> None:
    """Which its engine refuses with the mask."""
    studio.engines = {"tiny": engine(instructed=True)}
    await api.post("img2img", **ASKED, inpaint_full_res=False)
    assert studio.jobs[0].request.masked_content is None and studio.jobs[0].mask is not None
