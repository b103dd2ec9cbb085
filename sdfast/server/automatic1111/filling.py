"""What is under a mask, filled with the colours around it, as AUTOMATIC1111 fills it.

By Pillow alone, whose Gaussians those of that program are.
"""

from PIL import Image, ImageFilter, ImageOps

_LAYERS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Radii of blurs in pixels, and how often each is laid over those before."""


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image, RGB, with what its mask leaves open gone, and the rest spread over it.

    mask: as large, L: where it is white nothing of the image is left, where it is grey a part. What is left
    is blurred, and lies over more blurred forms of itself; with none left at all it is black.
    """
    left = image.convert("RGBA")
    left.putalpha(ImageOps.invert(mask))
    weighted = left.convert("RGBa")  # so that what is gone has no colour to spread
    made = Image.new("RGBA", image.size)
    for radius, times in _LAYERS:
        layer = weighted.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            made.alpha_composite(layer)
    return made.convert("RGB")
