"""Pictures as clients want them. These functions take processor time: call them in a thread."""

from collections.abc import Callable
from io import BytesIO
from typing import Literal

from PIL import Image, PngImagePlugin

from sdfast import infotext

Format = Literal["png", "webp", "jpeg"]
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_JPEG_EXIF = 65_533 - len(b"Exif\0\0")  # bytes: a JPEG segment's length is of 16 bits


def encode(png: bytes, format: Format, quality: int) -> tuple[bytes, bool]:
    """A PNG in another format, and whether its parameters are still inside.

    They go where AUTOMATIC1111 puts them, into EXIF's UserComment. quality: 0 to 100, for webp and jpeg.
    """
    if format == "png":
        return png, True
    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        text = image.info.get(infotext.PNG_KEY)
        exif = _exif(text) if isinstance(text, str) else b""
        kept = bool(exif) and (format != "jpeg" or len(exif) <= _JPEG_EXIF)
        file = BytesIO()
        image.convert("RGB").save(file, format, quality=quality, **({"exif": exif} if kept else {}))
    return file.getvalue(), kept


def redrawn(png: bytes, change: Callable[[Image.Image], Image.Image]) -> bytes:
    """A PNG with what `change` makes of its RGB picture, and the same parameters inside."""
    with Image.open(BytesIO(png), formats=["PNG"]) as picture:
        told, file = PngImagePlugin.PngInfo(), BytesIO()
        if infotext.PNG_KEY in picture.info:
            told.add_text(infotext.PNG_KEY, picture.info[infotext.PNG_KEY])
        changed = change(picture.convert("RGB"))
    changed.save(file, "PNG", pnginfo=told, compress_level=infotext.COMPRESS_LEVEL)
    return file.getvalue()


def parameters_of(image: Image.Image) -> str:
    """The parameters inside a picture that was opened, where `encode` puts them; "" for none."""
    text = image.info.get(infotext.PNG_KEY)
    if isinstance(text, str):
        return text
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return ""
    return comment[8:].decode("utf-16-be", "replace")


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif.tobytes()
