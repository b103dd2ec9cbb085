"""What img2img draws over, and what stays of it; control images, and IP-Adapters'.

All of it takes processor time: call it in a thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image, ImageOps

from sdfast.errors import RequestError
from sdfast.manifest import ImageProcessor
from sdfast.masked_area import MaskedArea
from sdfast.server.automatic1111.blur import blurred
from sdfast.server.automatic1111.controlnet import Unit, refused
from sdfast.server.automatic1111.fields import ImageToImage
from sdfast.server.automatic1111.filling import filled
from sdfast.server.encoding import redrawn
from sdfast.server.jobs import EngineInfo
from sdfast.server.problems import Problem
from sdfast.server.uploads import halved, of_base64, on_white, seen

_HALF = 128


@dataclass(frozen=True)
class Canvas:
    """image: RGB, of the size that is drawn. mask: as large, L, white where it is drawn anew, blurred.

    area: where both were cut out of larger ones. crop: whether what has other proportions loses its edges.
    fills: whether the run is given the image with what is around the mask in the place of what is under it.
    """

    image: Image.Image
    mask: Image.Image | None
    area: MaskedArea | None = None
    crop: bool = False
    fills: bool = False

    @property
    def job_image(self) -> bytes:
        image = filled(self.image, self.mask) if self.fills and self.mask is not None else self.image
        return image.tobytes()

    @property
    def job_mask(self) -> bytes | None:
        """Latents are drawn anew or are not: where the mask is at least half white."""
        return None if self.mask is None else halved(self.mask).tobytes()

    def over(self, png: bytes) -> bytes:
        """A finished picture, with the image where it was to stay, blended where the mask is blurred."""
        if self.area is not None:
            return redrawn(png, self.area.pasted)
        return png if self.mask is None else redrawn(png, partial(self._blended, self.mask))

    def _blended(self, mask: Image.Image, picture: Image.Image) -> Image.Image:
        """As in AUTOMATIC1111, where the mask is half white nothing of the image is left. (Around a part of
        it, though, as much is left as the mask says.)"""
        return Image.composite(picture, self.image, mask.point(lambda value: min(2 * value, 255)))


def canvas_of(asked: ImageToImage, height: int, width: int) -> Canvas:
    """The image and the mask of a request, of the size that is drawn. Raises `Problem`."""
    image = on_white(of_base64(asked.init_images[0], "init_images"))
    mask = None if asked.mask is None else _mask(of_base64(asked.mask, "mask"), asked)
    crop = asked.resize_mode == 1
    fills = asked.masked_content not in (None, "original")  # before its latents are replaced, too
    if mask is not None and asked.padding is not None:
        area = _area(image, mask, asked.padding, height, width)
        return Canvas(area.cut(image), area.cut(mask).convert("L"), area, crop, fills)
    whole = _sized(image, height, width, crop)
    return Canvas(whole, mask and _sized(mask, height, width, crop), crop=crop, fills=fills)


def _area(image: Image.Image, mask: Image.Image, padding: int, height: int, width: int) -> MaskedArea:
    """What the mask leaves open, with so many pixels around. Raises `Problem`."""
    if mask.size != image.size:
        raise _refused_mask(
            f"{mask.width}x{mask.height}, but the image is {image.width}x{image.height}; make them alike, or "
            "send inpaint_full_res: false, with which both are resized"
        )
    if mask.getbbox() is None:
        raise _refused_mask(
            "nothing of it is white, so that there is no part to inpaint; paint it white, or leave the mask "
            "out to draw over the whole image"
        )
    try:
        return MaskedArea.make(image, mask, padding_mask_crop=padding, height=height, width=width)
    except RequestError as error:  # of a part that is too long
        raise _refused_mask(str(error).partition(": ")[2]) from None


def _refused_mask(message: str) -> Problem:
    return Problem(422, f"mask: {message}", param="mask")


def controls_of(units: Sequence[Unit | None], canvas: Canvas | None, height: int, width: int) -> bytes | None:
    """`Job.control`: the units' images, black for a ControlNet without a unit. Raises `Problem`."""
    if not units:
        return None
    black = bytes(height * width * 3)
    return b"".join(_control(unit, canvas, height, width) if unit else black for unit in units)


def seen_of(units: Sequence[Unit | None], engine: EngineInfo) -> bytes | None:
    """`Job.ip_adapter`: the units' images, black for an IP-Adapter without a unit. Raises `Problem`."""
    processor = engine.image_processor
    if not units or processor is None:
        return None
    black = bytes(processor.crop**2 * 3)
    return b"".join(_seen(unit.image or "", processor) if unit else black for unit in units)


def _seen(image: str, processor: ImageProcessor) -> bytes:
    try:
        return seen(of_base64(image, "image"), processor, "image")
    except Problem as problem:
        raise refused(problem.message) from None


def _control(unit: Unit, canvas: Canvas | None, height: int, width: int) -> bytes:
    """A unit's image, of the size that is drawn; of one without, what is drawn over."""
    area = canvas.area if canvas is not None and unit.crops else None
    if not unit.image:
        if canvas is None:
            raise ValueError("neither the unit nor the call has an image")
        if canvas.area is not None and area is None:
            return _sized(canvas.area.image, height, width, canvas.crop).tobytes()
        return canvas.image.tobytes()  # as it came, whatever is under the mask
    try:
        image = on_white(of_base64(unit.image, "image"))
    except Problem as problem:
        raise refused(problem.message) from None
    if area is None:
        return _resized(unit, image, height, width).tobytes()
    return area.cut(_resized(unit, image, area.image.height, area.image.width)).tobytes()


def _resized(unit: Unit, image: Image.Image, height: int, width: int) -> Image.Image:
    """A unit's image of this size, as it says. Raises `Problem`."""
    if unit.fill and image.width * height != image.height * width:
        raise refused(
            f"resize_mode: an image of {image.width}x{image.height} leaves something to fill in a picture of "
            f"{width}x{height}, which is not supported: take 0 (just resize) or 1 (crop and resize)"
        )
    return _sized(image, height, width, unit.crop)


def _mask(image: Image.Image, asked: ImageToImage) -> Image.Image:
    """By its transparency, if it has any; else by how white it is."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if alpha is not None and alpha.getextrema() != (255, 255):
        mask = alpha.point(lambda value: 255 if value > _HALF else 0)
    else:
        mask = image.convert("L")
    if asked.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    return blurred(mask, *asked.blur)


def _sized(image: Image.Image, height: int, width: int, crop: bool) -> Image.Image:
    size = (width, height)
    if crop:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
