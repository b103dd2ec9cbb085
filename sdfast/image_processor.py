"""Images made ready for an image encoder, by Pillow alone: the server does it before a worker sees them."""

from PIL import Image

from sdfast.errors import RequestError
from sdfast.manifest import ImageProcessor
from sdfast.request import MAX_SIDE


def prepared(image: Image.Image, processor: ImageProcessor) -> Image.Image:
    """The image as CLIP's processor resizes and crops it: a square, RGB, on white where it was transparent.

    Raises `RequestError`.
    """
    width, height = image.size
    short, long = min(image.size), max(image.size)
    enlarged = processor.resize * long // short
    if enlarged > MAX_SIDE:
        raise RequestError(
            f"ip_adapter_image: {width}x{height} is too long for its width: with the shorter side at "
            f"{processor.resize} pixels the other would be {enlarged}, and at most {MAX_SIDE} are taken; "
            "crop it"
        )
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    size = (processor.resize, enlarged) if width <= height else (enlarged, processor.resize)
    left, top = ((side - processor.crop) // 2 for side in size)
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + processor.crop, top + processor.crop))
