"""The part of an image around what its mask leaves open: cut out, drawn at a size of its own, pasted back.

As in diffusers' inpainting pipelines with `padding_mask_crop`, and in AUTOMATIC1111 where it inpaints "only
masked": both cut out the same part, and paste alike. By Pillow alone: the server does it before a worker sees
the part, and after.
"""

from dataclasses import dataclass
from typing import Any, Self

from PIL import Image, ImageOps

from sdfast.errors import RequestError
from sdfast.request import Crop

Box = tuple[int, int, int, int]
"""left, top, right and bottom, in pixels of the whole image."""

MAX_STRETCH = 4.0
"""How many times longer for its width a part may be than what is drawn, most of which would be filling."""

_LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class MaskedArea:
    """A part of `image`, which is drawn at height x width pixels.

    mask: as large as the image, L: how much of what is drawn shows, 0 where the image stays. box: the part.
    """

    image: Image.Image
    mask: Image.Image
    box: Box
    height: int
    width: int

    @classmethod
    def make(
        cls, image: Image.Image, mask: Image.Image, *, padding_mask_crop: int, height: int, width: int
    ) -> Self:
        """The part around what is not black in `mask`, with so many pixels more on each side, made longer
        or wider to the proportions that are drawn, as far as the image goes.

        Raises `RequestError` for numbers that cannot be, for a mask of another size than the image's or
        without anything to draw, and for a part that is too long for its width.
        """
        asked = Crop.make(padding_mask_crop=padding_mask_crop, height=height, width=width)
        if mask.size != image.size:
            raise RequestError(
                f"mask_image: {_told(mask.size)}, but the image is {_told(image.size)}; with "
                "padding_mask_crop they have one size"
            )
        shades = mask.convert("L")
        masked = shades.getbbox()
        if masked is None:
            raise RequestError(
                "mask_image: nothing of it is white, so that there is no part to draw anew; paint it white, "
                "or leave padding_mask_crop and the mask out"
            )
        box = _in_proportion(_padded(masked, asked.padding_mask_crop, image.size), asked, image.size)
        part = (box[2] - box[0], box[3] - box[1])
        if _stretch(part, (asked.width, asked.height)) > MAX_STRETCH:
            raise RequestError(
                f"mask_image: the part around it is {_told(part)}, too long for its width to be drawn at "
                f"{_told((asked.width, asked.height))}; crop the image, or ask for another size"
            )
        return cls(image, shades, box, asked.height, asked.width)

    def cut(self, image: Image.Image) -> Image.Image:
        """The part of the image, or of what is as large, RGB, of the size that is drawn.

        It is resized (Lanczos) in its own proportions; where these are others than the size's, the colours
        at its edges fill the rest.
        """
        part = image.crop(self.box)
        width, height = _within(part.size, (self.width, self.height))
        part = part.resize((width, height), _LANCZOS)
        left, top = self.width // 2 - width // 2, self.height // 2 - height // 2
        filled = Image.new("RGB", (self.width, self.height))
        filled.paste(part, (left, top))
        if top > 0:  # a box without height is the edge, which Pillow extends
            filled.paste(part.resize((width, top), box=(0, 0, width, 0)), (0, 0))
            filled.paste(part.resize((width, top), box=(0, height, width, height)), (0, top + height))
        elif left > 0:
            filled.paste(part.resize((left, height), box=(0, 0, 0, height)), (0, 0))
            filled.paste(part.resize((left, height), box=(width, 0, width, height)), (left + width, 0))
        return filled

    def cut_controls(self, given: Any) -> Any:
        """The parts of control images: of one, or of lists of them as `sdfast.images.read_controls` takes
        them. Arrays and tensors have the size that is drawn, as with diffusers, and stay as they are.

        Raises `RequestError` for one of another size than the image's.
        """
        if isinstance(given, (list, tuple)):
            return [self.cut_controls(one) for one in given]
        if not isinstance(given, Image.Image):
            return given
        if given.size != self.image.size:
            raise RequestError(
                f"control_image: {_told(given.size)}, but the image is {_told(self.image.size)}; with "
                "padding_mask_crop they have one size, and the same part is cut out of both"
            )
        return self.cut(given)

    def pasted(self, picture: Image.Image) -> Image.Image:
        """The whole image, RGB, with a picture of the part in its place, as far as the mask shows it."""
        left, top, right, bottom = self.box
        drawn = Image.new("RGB", self.image.size)
        drawn.paste(_covering(picture, (right - left, bottom - top)), (left, top))
        kept = Image.new("RGBa", self.image.size)  # its colours are multiplied by how much of them shows
        kept.paste(self.image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(self.mask))
        return Image.alpha_composite(drawn.convert("RGBA"), kept.convert("RGBA")).convert("RGB")


def _padded(box: Box, padding: int, size: tuple[int, int]) -> Box:
    """With so many pixels more on each side, of those that there are."""
    left, top, right, bottom = box
    width, height = size
    return (
        max(left - padding, 0),
        max(top - padding, 0),
        min(right + padding, width),
        min(bottom + padding, height),
    )


def _in_proportion(box: Box, asked: Crop, size: tuple[int, int]) -> Box:
    """The least box around this one of the proportions that are drawn, if the image is large enough."""
    left, top, right, bottom = box
    proportion = asked.width / asked.height
    if (right - left) / (bottom - top) > proportion:
        top, bottom = _longer(top, bottom, (right - left) / proportion, size[1])
    else:
        left, right = _longer(left, right, (bottom - top) * proportion, size[0])
    return left, top, right, bottom


def _longer(low: int, high: int, length: float, end: int) -> tuple[int, int]:
    """What lies between `low` and `high`, made so long around its middle, and moved to lie within the end."""
    more = int(length - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high > end:
        low, high = low - (high - end), end
    return (0, min(high - low, end)) if low < 0 else (low, high)


def _within(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The largest width and height of these proportions within `size`, rounded down."""
    if size[0] * own[1] < own[0] * size[1]:
        return size[0], own[1] * size[0] // own[0]
    return own[0] * size[1] // own[1], size[1]


def _stretch(own: tuple[int, int], size: tuple[int, int]) -> float:
    """How many times longer for its width, or wider for its length, the one is than the other."""
    ratio = (own[0] * size[1]) / (size[0] * own[1])
    return max(ratio, 1 / ratio)


def _covering(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture enlarged or reduced (Lanczos) to the least that covers `size`, and its middle of that."""
    width, height = size
    if width * picture.height > picture.width * height:
        whole = (width, picture.height * width // picture.width)
    else:
        whole = (picture.width * height // picture.height, height)
    left, top = whole[0] // 2 - width // 2, whole[1] // 2 - height // 2
    return picture.resize(whole, _LANCZOS).crop((left, top, left + width, top + height))


def _told(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
