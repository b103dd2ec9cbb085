"""What falls from the sky, and how the finished picture looks: watercolor, ink and wash, pixel art."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sdfast.landscapes.painter import SCALE, SIZE, WHITE, Painter, Pixels, mix, rgb

PIXEL = 4  # side of one block of the pixel style


def paint_weather(pen: ImageDraw.ImageDraw, p: Painter, side: int, unit: int) -> None:
    """What falls: snowflakes or slanted rain, on a canvas of `side` pixels with strokes of `unit`."""
    if p.scene.weather == "snowy":
        for _ in range(48):
            x, y, r = p.vary(0, side), p.vary(0, side), p.vary(1.2, 2.0) * unit
            pen.ellipse((x - r, y - r, x + r, y + r), fill=rgb(mix(WHITE, p.light.tint, 0.12)))
    elif p.scene.weather == "rainy":
        color = rgb(mix((206, 218, 236), p.light.tint, 0.45))
        for _ in range(40):
            x, y, long = p.vary(0, side * 1.1), p.vary(-0.05, 0.95) * side, p.vary(0.09, 0.13) * side
            pen.line((x, y, x - 0.35 * long, y + long), fill=color, width=unit)


def pixelate(p: Painter) -> NDArray[np.uint8]:
    """The picture in blocks of 4×4 pixels and few colours."""
    small = p.canvas.reduce(SCALE * PIXEL)
    side = SIZE // PIXEL
    pixels = np.asarray(small, dtype=np.float32)
    pixels = (pixels - 128) * 1.12 + 128
    small = Image.fromarray((np.clip(np.rint(pixels / 20), 0, 12) * 20).astype(np.uint8))
    pen = ImageDraw.Draw(small)
    if p.scene.weather == "snowy":
        for _ in range(40):
            pen.point((int(p.vary(0, side)), int(p.vary(0, side))), fill=rgb(mix(WHITE, p.light.tint, 0.12)))
    elif p.scene.weather == "rainy":
        for _ in range(34):
            x, y = int(p.vary(0, side)), int(p.vary(-1, side))
            pen.line((x, y, x, y + 2), fill=rgb(mix((206, 218, 236), p.light.tint, 0.45)))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.NEAREST))


def clouds_of_noise(rng: np.random.Generator, cells: int) -> Pixels:
    """Smooth noise [128, 128] in −1 … 1 with blobs of about 128 / cells pixels."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)


def watercolor(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Paint on paper: wavering edges, pigment gathered at them, blooms, and a ragged white border."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    y = np.clip(np.rint(rows + 2.2 * clouds_of_noise(rng, 14)), 0, SIZE - 1).astype(np.intp)
    x = np.clip(np.rint(columns + 2.2 * clouds_of_noise(rng, 14)), 0, SIZE - 1).astype(np.intp)
    image = Image.fromarray(picture[y, x].astype(np.uint8)).filter(ImageFilter.ModeFilter(3))
    wet = np.asarray(image, dtype=np.float32)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(3)), dtype=np.float32)
    pigment = wet + np.clip(wet - soft, -60, 10) * 0.5
    bloom = 1 + 0.1 * clouds_of_noise(rng, 7)[:, :, None] + 0.045 * clouds_of_noise(rng, 26)[:, :, None]
    paper = np.array((250, 247, 238), dtype=np.float32)
    painted = paper - (paper - pigment) * 0.86 * bloom
    edge = np.minimum(np.minimum(rows, columns), np.minimum(SIZE - 1 - rows, SIZE - 1 - columns))
    inside = np.clip((edge - 7.5 - 3.5 * clouds_of_noise(rng, 16)) / 2.5, 0, 1)[:, :, None]
    painted_over: Pixels = (paper + (painted - paper) * inside).astype(np.float32)
    return painted_over


def wash(picture: Pixels) -> Pixels:
    """Ink and wash: muted colour on cream paper under the black contours."""
    level = picture @ np.array((0.3, 0.59, 0.11), dtype=np.float32)
    muted = picture + (level[:, :, None] - picture) * 0.32
    paper = np.array((1.0, 0.972, 0.905), dtype=np.float32)
    washed: Pixels = (muted * paper).astype(np.float32)
    return washed
