"""The part of an image around its mask: cut out and pasted as diffusers' image processor does both."""

import random
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from sdfast.errors import RequestError
from sdfast.masked_area import MaskedArea

IMAGES = VaeImageProcessor(vae_scale_factor=8, do_normalize=False)
MASKS = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
SIZES = [(64, 64), (96, 64), (64, 128), (72, 40)]  # width, height


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (-(-height // 3), -(-width // 3), 4), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def scene(seed: int) -> dict[str, Any]:
    """An image of some size, an oval with a grey edge in its mask, a padding, and a size to draw it at."""
    dice = random.Random(seed)
    width, height = dice.randint(40, 200), dice.randint(40, 200)
    left, top = dice.randint(0, width - 8), dice.randint(0, height - 8)
    box = (left, top, dice.randint(left + 3, width - 1), dice.randint(top + 3, height - 1))
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    draw.ellipse(box, fill=dice.choice((90, 200, 255)))
    draw.ellipse((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), fill=255)
    drawn = dice.choice(SIZES)
    return {
        **{"image": noise(width, height, seed), "mask": mask, "padding_mask_crop": dice.choice((0, 5, 32))},
        **{"width": drawn[0], "height": drawn[1]},
    }


def apart(a: Image.Image, b: Image.Image) -> int:
    assert (a.mode, a.size) == (b.mode, b.size)
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def as_picture(tensor: Any) -> Image.Image:
    return Image.fromarray(np.round(tensor[0].numpy() * 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("seed", range(60))
def test_cut_out_and_pasted_as_by_diffusers(seed: int) -> None:
    asked = scene(seed)
    area = MaskedArea.make(**asked)
    size = {"width": asked["width"], "height": asked["height"]}
    box = MASKS.get_crop_region(asked["mask"], **size, pad=asked["padding_mask_crop"])
    assert area.box == box
    how = {**size, "crops_coords": box, "resize_mode": "fill"}
    assert apart(area.cut(asked["image"]), as_picture(IMAGES.preprocess(asked["image"], **how))) == 0
    cut = np.asarray(area.cut(asked["mask"]).convert("L"))
    assert np.array_equal(cut >= 128, MASKS.preprocess(asked["mask"], **how)[0, 0].numpy() == 1)
    picture = noise(**size, seed=99)
    expected = IMAGES.apply_overlay(asked["mask"], asked["image"], picture, box)
    assert apart(area.pasted(picture), expected) == 0


def test_scenes_have_every_shape() -> None:
    """Some parts lie at the image's edge and are filled up, on either side; others have the proportions."""
    areas = [MaskedArea.make(**scene(seed)) for seed in range(60)]
    shapes = [(area, area.box[2] - area.box[0], area.box[3] - area.box[1]) for area in areas]
    ratios = [width * area.height / (height * area.width) for area, width, height in shapes]
    assert min(ratios) < 0.8 and max(ratios) > 1.25
    assert sum(0.98 < ratio < 1.02 for ratio in ratios) > 20


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1"])
def test_images_of_other_modes_are_cut_out_as_by_diffusers(mode: str) -> None:
    image, mask = noise(90, 70, 1, mode), scene(3)["mask"].resize((90, 70)).convert("P")
    area = MaskedArea.make(image, mask, padding_mask_crop=4, height=64, width=64)
    box = MASKS.get_crop_region(mask, 64, 64, pad=4)
    how = {"width": 64, "height": 64, "crops_coords": box, "resize_mode": "fill"}
    assert apart(area.cut(image), as_picture(IMAGES.preprocess(image, **how))) == 0
    expected = IMAGES.apply_overlay(mask, image, noise(64, 64, 2), box)
    assert apart(area.pasted(noise(64, 64, 2)), expected) == 0


def test_what_the_mask_has_black_stays() -> None:
    asked = scene(5)
    area = MaskedArea.make(**asked)
    pasted = np.asarray(area.pasted(Image.new("RGB", (area.width, area.height), "red")))
    black = np.asarray(asked["mask"]) == 0
    white = np.asarray(asked["mask"]) == 255
    assert np.array_equal(pasted[black], np.asarray(asked["image"])[black])
    assert (pasted[white] == (255, 0, 0)).all()


def test_control_images_are_cut_out_alike() -> None:
    asked = scene(7)
    area, other = MaskedArea.make(**asked), noise(*asked["image"].size, seed=1)
    ready = np.zeros((area.height, area.width, 3), np.float32)
    one, [two, none], array = area.cut_controls([other, (other, None), ready])
    assert one.tobytes() == two.tobytes() == area.cut(other).tobytes()
    assert none is None and array is ready
    with pytest.raises(RequestError, match=r"^control_image: 8x8, but the image is \d+x\d+; with padding"):
        area.cut_controls([None, noise(8, 8)])


def test_a_part_may_be_four_times_as_long_as_what_is_drawn() -> None:
    """It is enlarged to its length in both directions before it is pasted: what is longer costs memory."""
    image = {"image": noise(256, 64), "mask": Image.new("L", (256, 64), 255), "padding_mask_crop": 0}
    area = MaskedArea.make(**image, height=64, width=64)
    assert area.box == (0, 0, 256, 64) and area.pasted(noise(64, 64)).size == (256, 64)
    with pytest.raises(RequestError, match=r"^mask_image: the part around it is 256x64, too long"):
        MaskedArea.make(**image, height=72, width=64)
    with pytest.raises(RequestError, match=r"^mask_image: the part around it is 256x64, too long"):
        MaskedArea.make(**image, height=128, width=64)
    MaskedArea.make(**image, height=64, width=128)
    tall = {"image": noise(64, 264), "mask": Image.new("L", (64, 264), 255), "padding_mask_crop": 0}
    with pytest.raises(RequestError, match=r"^mask_image: the part around it is 64x264, too long"):
        MaskedArea.make(**tall, height=64, width=64)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a black mask": ({"mask": Image.new("L", (80, 60))}, "^mask_image: nothing of it is white"),
    "a mask of another size": (
        {"mask": Image.new("L", (60, 80), 255)},
        "^mask_image: 60x80, but the image is 80x60",
    ),
    "less than nothing": ({"padding_mask_crop": -1}, "^padding_mask_crop: must be greater than"),
    "too much": ({"padding_mask_crop": 10_000}, "^padding_mask_crop: must be less than or equal to 8192"),
    "half a pixel": ({"padding_mask_crop": 0.5}, "^padding_mask_crop: must be a valid integer"),
    "yes": ({"padding_mask_crop": True}, "^padding_mask_crop: must be a valid integer"),
    "no size": ({"width": 0}, "^width: must be greater than or equal to 8"),
    "a crooked size": ({"height": 60}, "^height: must be a multiple of 8"),
    "a line": (
        {"image": noise(200, 2), "mask": Image.new("L", (200, 2), 255)},
        "^mask_image: the part around it is 200x2, too long for its width to be drawn at 64x64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_part_that_cannot_be_is_refused_by_name(case: str) -> None:
    asked = {
        **{"image": noise(80, 60), "mask": Image.new("L", (80, 60), 255), "padding_mask_crop": 0},
        **{"height": 64, "width": 64},
    }
    fields, message = BAD[case]
    with pytest.raises(RequestError, match=message):
        MaskedArea.make(**asked | fields)
