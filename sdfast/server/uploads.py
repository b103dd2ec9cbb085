"""Pictures that clients send, opened with suspicion. These functions take time: call them in a thread.

Only PNG, JPEG and WebP are opened, each by its own decoder; a picture's size is looked at before its pixels
are. What a decoder says of a bad file is not repeated: it may tell of the server's memory and of its
libraries. Names of files are never looked at. Colours are taken as sRGB, whatever profile is inside.
"""

import base64
import binascii
import re
import struct
import zlib
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from sdfast.errors import RequestError
from sdfast.image_processor import prepared
from sdfast.manifest import ImageProcessor
from sdfast.request import shown
from sdfast.server.problems import Problem

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 16 * 2**20  # of a file
MAX_PIXELS = 2**24  # of a picture; 4096x4096, say

_LANCZOS = Image.Resampling.LANCZOS
_HALF = 128  # from here on a mask's pixel is more of the one than of the other
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)
_SCHEME = re.compile(r"\s*[a-z][a-z0-9+.-]{0,32}:", re.IGNORECASE)
_DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)
"""What Pillow's decoders are known to raise for bad files, each in its own way."""


def decode(
    data: bytes, field: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A file's picture, upright, as RGB or, where it knows transparency, RGBA.

    Raises `Problem` 422, of `field`, for what is no single PNG, JPEG or WebP picture within the limits.
    """
    if len(data) > max_bytes:
        raise _refused(field, f"the file has {len(data)} bytes; at most {max_bytes} are taken")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check(image, field, max_pixels)
            return _colours(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise _too_large(field, max_pixels) from None
    except UnidentifiedImageError:
        raise _refused(field, "this is no PNG, JPEG or WebP file; send one of these") from None
    except _DAMAGED:
        raise _refused(field, "the file is damaged or cut short; save the picture again") from None


def of_base64(
    text: str, field: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture of a file that was sent as base64, with or without `data:image/png;base64,` before it."""
    prefix = _DATA_URL.match(text)
    if prefix is None and _SCHEME.match(text):
        raise _refused(
            field, f"the server fetches nothing; send the picture itself, as base64 (got {shown(text[:64])})"
        )
    coded = "".join(text[prefix.end() if prefix else 0 :].split())
    if len(coded) > -(-max_bytes // 3) * 4:
        raise _refused(field, f"the file has more than {max_bytes} bytes, the most taken")
    try:
        data = base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError):
        raise _refused(field, f"must be a picture as base64 (got {shown(text[:64])})") from None
    return decode(data, field, max_bytes=max_bytes, max_pixels=max_pixels)


def pixels(image: Image.Image, height: int, width: int) -> bytes:
    """RGB pixels [height, width, 3] uint8 for `Job.image` or `Job.control`, on white where the picture is
    transparent.

    Of another size, the picture is resampled (Lanczos): whoever calls has been asked for that.
    """
    return sized(image, height, width).tobytes()


def sized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The same as a picture, RGB."""
    image = on_white(image)
    return image if image.size == (width, height) else image.resize((width, height), _LANCZOS)


def seen(image: Image.Image, processor: ImageProcessor, field: str) -> bytes:
    """Pixels for `Job.ip_adapter` of one image, on white where it is transparent. Raises `Problem`."""
    try:
        return prepared(on_white(image), processor).tobytes()
    except RequestError as error:
        raise _refused(field, str(error).partition(": ")[2]) from None


def on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB, on white where it is transparent."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def mask_of_alpha(image: Image.Image, height: int, width: int) -> bytes:
    """`Job.mask`, [height, width] uint8: drawn anew (255) where the picture is rather transparent."""
    return _mask(shades_of_alpha(image), height, width)


def shades_of_alpha(image: Image.Image) -> Image.Image:
    """A mask of greys, L: white where the picture is transparent."""
    return image.convert("RGBA").getchannel("A").point(lambda value: 255 - value)


def mask_of_luma(image: Image.Image, height: int, width: int) -> bytes:
    """`Job.mask`, [height, width] uint8: drawn anew (255) where the picture is rather white."""
    return _mask(on_white(image), height, width)


def _mask(shades: Image.Image, height: int, width: int) -> bytes:
    shades = shades.convert("L")
    if shades.size != (width, height):
        shades = shades.resize((width, height), Image.Resampling.BILINEAR)
    return halved(shades).tobytes()


def halved(shades: Image.Image) -> Image.Image:
    """A mask of greys, L, as one of white, where it is at least half white, and black."""
    return shades.point(lambda value: 255 if value >= _HALF else 0)


def _check(image: Image.Image, field: str, max_pixels: int) -> None:
    """Of a file whose head alone was read."""
    if image.width * image.height > max_pixels:
        raise _too_large(field, max_pixels)
    if getattr(image, "n_frames", 1) > 1:
        raise _refused(field, "the file holds several pictures, or one that moves; send a single picture")


def _colours(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB or RGBA, 8 bits a channel."""
    if image.mode.startswith("I"):  # a PNG of 16-bit greys
        return _of_16_bits(np.asarray(image), image.info.get("transparency"))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _of_16_bits(greys: npt.NDArray[np.integer], transparent: int | None) -> Image.Image:
    """greys: [H, W] of 0 to 65535, of which one may mean transparency."""
    image = Image.fromarray((greys >> 8).astype(np.uint8)).convert("RGB")
    if transparent is not None:
        image.putalpha(Image.fromarray(np.where(greys == transparent, 0, 255).astype(np.uint8)))
    return image


def _too_large(field: str, max_pixels: int) -> Problem:
    return _refused(field, f"the picture has more than {max_pixels} pixels, the most taken; make it smaller")


def _refused(field: str, message: str) -> Problem:
    return Problem(422, f"{field}: {message}", param=field, code="invalid_image")
