"""Files that clients send as pictures: what is opened, and what is refused without a decoder's word."""

import base64
import random
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from sdfast.server.problems import Problem
from sdfast.server.uploads import decode, mask_of_alpha, mask_of_luma, of_base64, pixels

FORMATS = ("png", "jpeg", "webp")
GRADIENT = Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(24, 16, 3))  # 16 wide, 24 high


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def refused(data: bytes, **limits: int) -> str:
    """The reason, which must be our own words on one line."""
    with pytest.raises(Problem) as caught:
        decode(data, "image", **limits)
    assert (caught.value.status, caught.value.param) == (422, "image")
    assert caught.value.code == "invalid_image"
    reasons = ("no PNG, JPEG or WebP", "damaged or cut short", "more than", "at most", "several pictures")
    assert caught.value.message.startswith("image: ")
    assert sum(reason in caught.value.message for reason in reasons) == 1
    return caught.value.message


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, data: bytes, *before: bytes) -> bytes:
    """A PNG of grey pixels whose head says what it likes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [head, *before, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_the_pixels_come_out_as_they_went_in(format: str) -> None:
    image = decode(saved(GRADIENT, format, lossless=True), "image")
    assert image.mode == "RGB"
    assert pixels(image, 24, 16) == GRADIENT.tobytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (640, 3)])
def test_small_and_narrow_pictures_are_opened(format: str, size: tuple[int, int]) -> None:
    assert decode(saved(Image.new("RGB", size, "red"), format), "image").size == size


def test_every_kind_of_colour_becomes_rgb() -> None:
    red = Image.new("RGB", (8, 8), "red")
    grey16 = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))
    for image, format, colour in (
        (red.convert("CMYK"), "jpeg", (254, 0, 0)),
        (red.convert("L"), "jpeg", (76, 76, 76)),
        (red.convert("P"), "png", (255, 0, 0)),
        (Image.new("1", (8, 8), 1), "png", (255, 255, 255)),
        (grey16, "png", (128, 128, 128)),
    ):
        opened = decode(saved(image, format), "image")
        assert opened.mode == "RGB"
        assert np.abs(np.subtract(opened.getpixel((3, 3)), colour)).max() <= 2


def test_transparency_of_every_kind_is_kept() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    grey16 = Image.fromarray(np.array([[0x1234, 0x1235]], dtype=np.uint16))
    rgb = Image.new("RGB", (2, 1), "red")
    rgb.putpixel((1, 0), (0, 0, 255))
    for data in (
        saved(palette, "png", transparency=0),
        saved(grey16, "png", transparency=0x1234),
        saved(rgb, "png", transparency=(255, 0, 0)),
    ):
        image = decode(data, "image")
        assert image.mode == "RGBA"
        assert image.getchannel("A").tobytes() == b"\0\xff"
        assert pixels(image, 1, 2)[:3] == b"\xff\xff\xff"  # on white
    both = decode(saved(Image.new("LA", (1, 1), (9, 100)), "png"), "image")
    assert both.getpixel((0, 0)) == (9, 9, 9, 100)


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_is_turned_upright(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise
    lying = Image.new("RGB", (64, 32), "black")
    lying.paste("white", (0, 0, 32, 32))
    image = decode(saved(lying, format, exif=exif), "image")
    assert image.size == (32, 64)
    assert min(image.getpixel((16, 8))) > 200 and max(image.getpixel((16, 56))) < 50


def test_resampling_is_done_when_asked_for() -> None:
    image = decode(saved(GRADIENT, "png"), "image")
    assert pixels(image, 12, 8) == GRADIENT.resize((8, 12), Image.Resampling.LANCZOS).tobytes()


def test_masks_are_drawn_anew_where_transparent_or_white() -> None:
    alpha = np.array([[0, 100, 127, 128, 255]], dtype=np.uint8)
    image = Image.new("RGB", (5, 1), "white")
    image.putalpha(Image.fromarray(alpha))
    assert mask_of_alpha(image, 1, 5) == b"\xff\xff\xff\0\0"
    shades = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)).convert("RGB")
    assert mask_of_luma(shades, 1, 4) == b"\0\0\xff\xff"
    assert mask_of_luma(shades, 2, 8).count(b"\xff") + mask_of_luma(shades, 2, 8).count(b"\0") == 16


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_cut_short_anywhere_is_refused(format: str) -> None:
    whole = saved(Image.effect_noise((64, 64), 50), format)
    for length in (*range(1, 60), len(whole) // 2, len(whole) - 60):
        refused(whole[:length])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of wrong EXIF data
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_with_wrong_bytes_is_a_picture_or_refused(format: str) -> None:
    """Nothing else comes out: no other error, no other words. The seed is fixed."""
    chance, whole = random.Random(format), saved(GRADIENT, format, exif=_exif(), icc_profile=b"icc" * 40)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert decode(bytes(data), "image").mode in ("RGB", "RGBA")
        except Problem:
            refused(bytes(data))


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 3, "a text of some length"
    return exif


@pytest.mark.parametrize("format", ["gif", "bmp", "tiff", "eps", "jpeg2000", "ppm", "ico", "tga", "icns"])
def test_other_formats_are_not_opened(format: str) -> None:
    assert "no PNG, JPEG or WebP" in refused(saved(Image.new("RGB", (16, 16), "red"), format))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"not a picture",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n",
        b"SIMPLE  =                    T" + b" " * 2_850,  # FITS
        b"8BPS\0\1" + b"\0" * 40,  # PSD
        b"%PDF-1.4\n",
        b"\x76\x2f\x31\x01" + b"\0" * 40,  # EXR
        b"#define a_width 99999\n#define a_height 99999\n",  # XBM
        b"GIF89a\xff\xff\xff\xff\0\0\0" + b"\x89PNG\r\n\x1a\n",
        b"<?php ?>\x89PNG\r\n\x1a\n",
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert "no PNG, JPEG or WebP" in refused(data)


def test_what_follows_a_picture_is_not_looked_at() -> None:
    polyglot = saved(GRADIENT, "png") + b"PK\x03\x04<script>alert(1)</script>"
    assert pixels(decode(polyglot, "image"), 24, 16) == GRADIENT.tobytes()


@pytest.mark.parametrize(
    "bomb",
    [
        png_of(2**31 - 1, 2**31 - 1, b""),
        png_of(50_000, 50_000, zlib.compress(b"\0" * 1_000_000)),
        png_of(5_000, 5_000, zlib.compress(b"\0" * (5_001 * 5_000))),
        saved(Image.new("L", (16_000, 1_100)), "jpeg"),
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2,
    ],
)
def test_a_picture_of_too_many_pixels_is_not_decoded(bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*_: Any) -> None:
        raise AssertionError("its pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", untouched)
    assert "16777216 pixels" in refused(bomb)


def test_more_pixels_than_the_head_tells_of_are_not_unpacked() -> None:
    whole = png_of(4, 4, zlib.compress(b"\0" * 30_000_000))
    assert decode(whole, "image").size == (4, 4)


def test_limits_are_the_callers() -> None:
    data = saved(GRADIENT, "png")
    assert "at most 99 are taken" in refused(data, max_bytes=99)
    assert "383 pixels" in refused(data, max_pixels=383)
    assert decode(data, "image", max_pixels=384).size == (16, 24)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_bomb_in_a_text_is_refused(name: bytes) -> None:
    packed = zlib.compress(b"\0" * 20_000_000)
    told = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[name] + packed
    refused(png_of(4, 4, zlib.compress(b"\0" * 20), chunk(name, told)))


def test_texts_and_profiles_that_make_no_sense_change_nothing() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a boat\nSteps: 20", zip=True)
    info.add_text("../../x", "\0", zip=False)
    data = saved(GRADIENT, "png", pnginfo=info, icc_profile=b"\xff" * 3_000)
    assert pixels(decode(data, "image"), 24, 16) == GRADIENT.tobytes()


@pytest.mark.parametrize("format", ["png", "webp"])
def test_a_picture_that_moves_is_refused(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert "several pictures" in refused(data)
    assert "several pictures" in refused(saved(frames[0], "mpo", save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("wrapped", ["{}", "data:image/png;base64,{}", "data:image/jpeg;base64,{}", "\n{}\n"])
def test_base64_with_or_without_its_prefix(wrapped: str) -> None:
    text = wrapped.format(base64.encodebytes(saved(GRADIENT, "png")).decode())
    assert pixels(of_base64(text, "image"), 24, 16) == GRADIENT.tobytes()


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://example.org/a.png",
        " HTTPS://example.org",
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher:x",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
    ],
)
def test_nothing_is_fetched(address: str) -> None:
    with pytest.raises(Problem, match="init_images: the server fetches nothing") as caught:
        of_base64(address, "init_images")
    assert (caught.value.status, caught.value.param) == (422, "init_images")


@pytest.mark.parametrize(
    "text", ["*", "é", "AAA", "/etc/passwd", "//169.254.169.254/a", "\0", "\ud800", "_-8="]
)
def test_what_is_no_base64_is_told(text: str) -> None:
    with pytest.raises(Problem, match=r"image: (must be a picture as base64|this is no PNG)"):
        of_base64(text, "image")


def test_base64_over_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", _untouched)
    with pytest.raises(Problem, match="more than 300 bytes"):
        of_base64("A" * 404, "image", max_bytes=300)


def _untouched(*_: Any, **__: Any) -> Callable[..., Any]:
    raise AssertionError("it was decoded")
