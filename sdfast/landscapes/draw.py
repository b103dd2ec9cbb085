"""Draws a scene: 128×128 pixels from five attributes and one integer, the same on every machine's Pillow.

Everything is painted back to front on a canvas three times as large and then reduced, so edges are
smooth. Coordinates are fractions of the picture's side, y downwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sdfast.landscapes.scenes import Scene

SIZE = 128
SCALE = 3
CANVAS = SIZE * SCALE
PIXEL = 4  # side of one block of the pixel style

Color = tuple[float, float, float]  # 0 … 255
Point = tuple[float, float]  # fractions of the side
Pixels = NDArray[np.float32]

INK: Color = (38, 34, 44)
WHITE: Color = (246, 248, 252)


@dataclass(frozen=True)
class Light:
    """What the hour does to colours: the sky's gradient, the sun or moon, and what falls on things."""

    sky: tuple[Color, Color, Color]  # zenith, middle, horizon
    disc: Color
    disc_at: tuple[float, float]
    disc_radius: float
    glow: float
    tint: Color  # multiplies local colours, 255 = unchanged
    haze: Color  # what far things fade into
    lamps: bool  # whether windows and lamps are lit


LIGHTS = {
    "dawn": Light(
        ((112, 158, 214), (214, 186, 224), (255, 208, 206)),
        (255, 246, 226), (0.24, 0.40), 0.055, 0.55, (250, 216, 228), (240, 204, 220), False,
    ),
    "noon": Light(
        ((44, 132, 226), (110, 188, 246), (200, 234, 252)),
        (255, 250, 214), (0.78, 0.15), 0.075, 0.35, (255, 255, 250), (190, 222, 244), False,
    ),
    "sunset": Light(
        ((86, 36, 110), (226, 82, 72), (255, 178, 66)),
        (255, 236, 150), (0.72, 0.40), 0.095, 0.75, (236, 158, 124), (240, 134, 78), True,
    ),
    "night": Light(
        ((14, 20, 62), (32, 48, 116), (74, 98, 170)),
        (246, 244, 222), (0.26, 0.17), 0.075, 0.35, (112, 132, 206), (66, 88, 158), True,
    ),
}  # fmt: skip


def mix(a: Color, b: Color, share: float) -> Color:
    """The colour `share` of the way from a to b."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def grey(color: Color, share: float, darken: float = 1.0) -> Color:
    """The colour with `share` of its saturation taken away, then darkened."""
    level = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]
    r, g, b = mix(color, (level, level, level), share)
    return (r * darken, g * darken, b * darken)


def rgb(color: Color) -> tuple[int, int, int]:
    """The colour as Pillow wants it."""
    return (round(color[0]), round(color[1]), round(color[2]))


class Painter:
    """A large canvas with the hour's light, the weather's air and the style's outlines."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.light = LIGHTS[scene.time]
        self.canvas = Image.new("RGB", (CANVAS, CANVAS))
        self.pen = ImageDraw.Draw(self.canvas)
        self.outline = scene.style == "ink"
        self.horizon = 0.5

    def vary(self, low: float, high: float) -> float:
        """A number of this picture, uniform between low and high."""
        return float(self.rng.uniform(low, high))

    def air(self) -> Color:
        """The colour of distance: the hour's haze, white in mist and snow, grey in rain."""
        haze = self.light.haze
        if self.scene.weather == "misty":
            return mix(haze, mix(WHITE, self.light.tint, 0.55), 0.55)
        if self.scene.weather == "snowy":
            return mix(haze, mix(WHITE, self.light.tint, 0.6), 0.3)
        return grey(haze, 0.45, 0.8) if self.scene.weather == "rainy" else haze

    def shade(self, color: Color, depth: float = 0.0, snow: float = 0.0) -> Color:
        """A local colour as seen: snow on it, lit by the hour, faded by depth (0 near … 1 far)."""
        if self.scene.weather == "snowy":
            color = mix(color, WHITE, snow)
        if self.scene.weather == "rainy":
            color = grey(color, 0.3, 0.92)
        tint = self.light.tint
        lit = (color[0] * tint[0] / 255, color[1] * tint[1] / 255, color[2] * tint[2] / 255)
        thick = {"clear": 0.75, "misty": 1.0, "snowy": 0.8, "rainy": 0.85}[self.scene.weather]
        least = 0.26 if self.scene.weather == "misty" else 0.0
        return mix(lit, self.air(), min(1.0, least + depth * thick))

    def polygon(self, points: Sequence[Point], color: Color, line: bool = True) -> None:
        """Fill a shape; in the ink style also draw its contour."""
        corners = [(x * CANVAS, y * CANVAS) for x, y in points]
        self.pen.polygon(corners, fill=rgb(color))
        if self.outline and line:
            self.pen.line([*corners, corners[0]], fill=rgb(self.ink()), width=4, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color, line: bool = True) -> None:
        """Fill an ellipse around (x, y); in the ink style also draw its contour."""
        box = ((x - rx) * CANVAS, (y - ry) * CANVAS, (x + rx) * CANVAS, (y + ry) * CANVAS)
        ink = rgb(self.ink()) if self.outline and line else None
        self.pen.ellipse(box, fill=rgb(color), outline=ink, width=4 if ink else 0)

    def ink(self) -> Color:
        """The outline's colour: nearly black, and darker than what it surrounds at night too."""
        return (10, 12, 26) if self.scene.time == "night" else INK

    def veil(self, color: Color, strength: Pixels) -> None:
        """Lay a colour over the canvas; strength [h, w] in 0 … 1 is stretched to the canvas."""
        mask = Image.fromarray((np.clip(strength, 0, 1) * 255).astype(np.uint8))
        self.canvas.paste(rgb(color), (0, 0), mask.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR))

    def fog(self, middle: float, height: float, strength: float) -> None:
        """A horizontal bank of mist, densest at `middle`."""
        if self.scene.weather != "misty":
            return
        y = np.linspace(0, 1, 64, dtype=np.float32)[:, None]
        x = np.linspace(0, 1, 16, dtype=np.float32)[None, :]
        drift = 0.02 * np.sin(2 * np.pi * (x * self.vary(0.7, 1.3) + self.vary(0, 1)))
        self.veil(self.air(), strength * np.exp(-(((y - middle - drift) / height) ** 2)))


def draw(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """The picture of a scene, [128, 128, 3] uint8; equal arguments give equal pictures."""
    rng = np.random.default_rng([seed, *scene.labels()])
    painter = Painter(scene, rng)
    paint_sky(painter)
    PLACES[scene.place](painter)
    paint_subject(painter)
    painter.fog(0.87, 0.08, 0.55)
    if scene.style == "pixel":
        return pixelate(painter)
    paint_weather(painter.pen, painter, CANVAS, 4)
    picture = np.asarray(painter.canvas.reduce(SCALE), dtype=np.float32)
    if scene.style == "watercolor":
        picture = watercolor(picture, rng)
    elif scene.style == "ink":
        picture = wash(picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- sky


def paint_sky(p: Painter) -> None:
    """Gradient, glow, sun or moon, stars, clouds."""
    weather = p.scene.weather
    loss, darken = {"clear": (0.0, 1.0), "misty": (0.25, 1.0), "snowy": (0.3, 0.97), "rainy": (0.5, 0.8)}[
        weather
    ]
    stops = np.array([grey(color, loss, darken) for color in p.light.sky], dtype=np.float32)
    if weather == "misty":
        stops[1:] = stops[1:] * 0.55 + np.array(p.air(), dtype=np.float32) * 0.45
    at = np.linspace(0, 1, CANVAS)
    column = np.stack([np.interp(at, (0.0, 0.3, 0.58), stops[:, c]) for c in range(3)], axis=1)
    strip = Image.fromarray(np.rint(column[:, None, :]).astype(np.uint8))
    p.canvas.paste(strip.resize((CANVAS, CANVAS)))
    x, y = p.light.disc_at[0] + p.vary(-0.05, 0.05), p.light.disc_at[1] + p.vary(-0.02, 0.02)
    if p.scene.time == "night":
        paint_stars(p)
    faint = {"clear": 1.0, "misty": 0.75, "snowy": 0.7, "rainy": 0.55}[weather]
    grid = np.linspace(0, 1, 48, dtype=np.float32)
    distance = np.hypot(grid[None, :] - x, grid[:, None] - y)
    p.veil(
        mix(p.light.disc, p.light.sky[2], 0.35), faint * p.light.glow * np.exp(-((distance / 0.22) ** 1.3))
    )
    if weather != "rainy":
        p.ellipse(
            x, y, p.light.disc_radius, p.light.disc_radius, mix(p.light.disc, p.air(), 0.6 * (1 - faint))
        )
        if p.scene.time == "night":
            p.ellipse(
                x + 0.028, y - 0.016, 0.056, 0.06, mix(stops_color(stops, 0), p.light.disc, 0.12), False
            )
    paint_clouds(p)


def stops_color(stops: Pixels, index: int) -> Color:
    """One stop of the sky's gradient as a colour."""
    return (float(stops[index, 0]), float(stops[index, 1]), float(stops[index, 2]))


def paint_stars(p: Painter) -> None:
    """Points of light, fewer in bad weather."""
    count = {"clear": 34, "misty": 12, "snowy": 10, "rainy": 0}[p.scene.weather]
    for _ in range(count):
        x, y, r = p.vary(0.02, 0.98), p.vary(0.02, 0.42), p.vary(0.0035, 0.0075)
        p.ellipse(x, y, r, r, (236, 238, 255), False)


def paint_clouds(p: Painter) -> None:
    """Two small clouds on a clear day, a dark ceiling in rain, a pale one in snow."""
    if p.scene.weather == "rainy":
        color = mix(grey(p.light.sky[0], 0.7, 0.42), (70, 76, 92), 0.35 if p.scene.time != "night" else 0.15)
        for i in range(7):
            p.ellipse(
                i / 6 + p.vary(-0.05, 0.05), p.vary(-0.01, 0.08), 0.15, p.vary(0.08, 0.13), color, False
            )
        lighter = mix(color, p.air(), 0.22)
        for i in range(3):
            x, y = 0.2 + 0.3 * i + p.vary(-0.08, 0.08), p.vary(0.13, 0.19)
            paint_cloud(p, x, y, p.vary(0.9, 1.2), lighter)
    elif p.scene.weather == "snowy":
        color = mix(grey(p.light.sky[0], 0.5), mix(WHITE, p.light.tint, 0.7), 0.45)
        for i in range(2):
            paint_cloud(p, 0.25 + 0.5 * i + p.vary(-0.1, 0.1), p.vary(0.05, 0.11), p.vary(1.0, 1.3), color)
    elif p.scene.weather == "clear" and p.scene.time != "night":
        color = mix(WHITE, p.light.sky[2], 0.12 if p.scene.time == "noon" else 0.5)
        side = 0.3 if p.scene.time == "noon" else 0.62
        paint_cloud(p, side + p.vary(-0.12, 0.12), p.vary(0.12, 0.2), p.vary(0.7, 1.0), color)


def paint_cloud(p: Painter, x: float, y: float, size: float, color: Color) -> None:
    """One flat-bottomed cloud."""
    for dx, dy, r in (
        (-0.09, 0.0, 0.045),
        (-0.03, -0.022, 0.06),
        (0.05, -0.012, 0.055),
        (0.11, 0.006, 0.036),
    ):
        p.ellipse(x + dx * size, y + dy * size, r * size * 1.35, r * size * 0.72, color, False)


# ---------------------------------------------------------------- land


def ridge(p: Painter, base: float, height: float, waves: float) -> list[Point]:
    """A rolling skyline from the left edge to the right one."""
    x = np.linspace(-0.02, 1.02, 48)
    phase = p.rng.uniform(0, 2 * np.pi, 3)
    line = np.sin(2 * np.pi * waves * x + phase[0]) + 0.5 * np.sin(2 * np.pi * waves * 2.1 * x + phase[1])
    y = base - height * (0.5 + 0.33 * line + 0.08 * np.sin(2 * np.pi * waves * 4.7 * x + phase[2]))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def ground(line: Sequence[Point], bottom: float = 1.02) -> list[Point]:
    """The area under a skyline."""
    return [*line, (1.02, bottom), (-0.02, bottom)]


def paint_peak(p: Painter, x: float, base: float, height: float, color: Color, depth: float) -> None:
    """One mountain: a lit side, a shaded side and a snow cap with a ragged hem."""
    half = height * p.vary(0.78, 0.95)
    top = base - height
    lit, dark = p.shade(color, depth, 0.45), p.shade(mix(color, (30, 32, 60), 0.45), depth, 0.3)
    p.polygon([(x - half, base), (x, top), (x + half, base)], lit)
    p.polygon(
        [(x, top), (x + half, base), (x + half * 0.1, base), (x - half * 0.08, top + height * 0.4)],
        dark,
        False,
    )
    cap = p.shade(WHITE, depth * 0.8)
    s = 0.34 + (0.2 if p.scene.weather == "snowy" else 0.0)
    hem = [
        (-s, s),
        (-s * 0.55, s * 0.82),
        (-s * 0.2, s * 1.1),
        (s * 0.2, s * 0.8),
        (s * 0.6, s * 1.08),
        (s, s),
    ]
    p.polygon([(x, top), *((x + half * dx, top + height * dy) for dx, dy in hem)], cap, False)
    shadow = p.shade(mix(WHITE, (96, 112, 168), 0.5), depth * 0.8)
    p.polygon(
        [(x, top), *((x + half * dx, top + height * dy) for dx, dy in hem[3:]), (x, top + height * 0.5 * s)],
        shadow,
        False,
    )
    if p.outline:
        edge = [
            ((x - half) * CANVAS, base * CANVAS),
            (x * CANVAS, top * CANVAS),
            ((x + half) * CANVAS, base * CANVAS),
        ]
        p.pen.line(edge, fill=rgb(p.ink()), width=4)


def paint_conifer(p: Painter, x: float, base: float, height: float, color: Color, depth: float) -> None:
    """One fir: three stacked triangles on a short trunk."""
    half = height * 0.27
    lit, dark = p.shade(color, depth, 0.5), p.shade(mix(color, (10, 24, 34), 0.35), depth, 0.3)
    if height > 0.1:
        trunk = p.shade((86, 60, 44), depth)
        p.polygon(
            [
                (x - half * 0.15, base + 0.012),
                (x - half * 0.15, base - 0.03),
                (x + half * 0.15, base - 0.03),
                (x + half * 0.15, base + 0.012),
            ],
            trunk,
        )
    for low, top, wide in ((0.06, 0.55, 1.0), (0.32, 0.8, 0.78), (0.58, 1.0, 0.54)):
        left, right, tip = (
            (x - half * wide, base - height * low),
            (x + half * wide, base - height * low),
            (x, base - height * top),
        )
        p.polygon([left, tip, right], lit)
        if height > 0.1:
            p.polygon([(x, base - height * low), tip, right], dark, False)


def paint_mountains(p: Painter) -> None:
    """Snow-capped peaks behind a valley with firs."""
    far: Color = (112, 124, 168)
    for x, height in ((0.05, 0.24), (0.42, 0.27), (0.95, 0.26)):
        paint_peak(p, x + p.vary(-0.06, 0.06), 0.64, height + p.vary(-0.02, 0.03), far, 0.62)
    p.fog(0.58, 0.07, 0.75)
    near: Color = (96, 98, 128)
    main = p.vary(0.2, 0.32) if p.rng.random() < 0.5 else p.vary(0.68, 0.8)
    paint_peak(p, 1.05 - main, 0.72, p.vary(0.26, 0.31), near, 0.36)
    paint_peak(p, main, 0.73, p.vary(0.4, 0.46), near, 0.24)
    p.fog(0.66, 0.07, 0.8)
    meadow: Color = (104, 142, 84)
    p.polygon(ground(ridge(p, 0.72, 0.06, 0.9)), p.shade(mix(meadow, (60, 96, 84), 0.5), 0.22, 0.75))
    for x in (0.04, 0.1, 0.17, 0.84, 0.9, 0.97):
        paint_conifer(
            p, x + p.vary(-0.02, 0.02), 0.745 + p.vary(-0.01, 0.02), p.vary(0.11, 0.16), (52, 96, 74), 0.14
        )
    p.fog(0.74, 0.05, 0.6)
    p.polygon(ground(ridge(p, 0.82, 0.04, 0.7)), p.shade(meadow, 0.02, 0.85))


def paint_hills(p: Painter) -> None:
    """Rolling green waves with a winding path and round bushes."""
    layers: tuple[tuple[float, float, float, Color], ...] = (
        (0.56, 0.12, 0.8, (138, 184, 128)),
        (0.64, 0.13, 0.9, (124, 180, 100)),
        (0.73, 0.13, 0.8, (104, 168, 82)),
    )
    for i, (base, height, waves, color) in enumerate(layers):
        line = ridge(p, base, height, waves)
        p.polygon(ground(line), p.shade(color, 0.55 - 0.22 * i, 0.75))
        for _ in range(3 + i):
            x, y = line[int(p.rng.integers(3, 44))]
            r = 0.014 + 0.007 * i
            p.ellipse(x, y + 0.004, r * 1.2, r, p.shade(mix(color, (36, 92, 60), 0.6), 0.5 - 0.2 * i, 0.55))
        p.fog(base + 0.02, 0.06, 0.72)
    p.polygon(ground(ridge(p, 0.83, 0.06, 0.6)), p.shade((128, 190, 88), 0.04, 0.85))
    way, turn = p.vary(0.35, 0.65), p.vary(-0.16, 0.16)
    path = [
        (way - 0.16, 1.02),
        (way - 0.04 + turn * 0.6, 0.9),
        (way + turn, 0.81),
        (way + turn + 0.035, 0.81),
        (way + 0.06 + turn * 0.6, 0.9),
        (way + 0.12, 1.02),
    ]
    p.polygon(path, p.shade((224, 200, 150), 0.04, 0.6))


def paint_desert(p: Painter) -> None:
    """Mesas, dunes with a shaded side, tall cacti."""
    for x, wide, height in ((p.vary(0.08, 0.25), 0.13, 0.15), (p.vary(0.72, 0.9), 0.17, 0.2)):
        rock = p.shade((196, 104, 72), 0.42, 0.35)
        p.polygon(
            [
                (x - wide, 0.62),
                (x - wide * 0.66, 0.6 - height),
                (x + wide * 0.66, 0.6 - height),
                (x + wide, 0.62),
            ],
            rock,
        )
        band = p.shade((152, 72, 58), 0.42, 0.35)
        p.polygon(
            [
                (x + wide * 0.2, 0.6 - height),
                (x + wide * 0.66, 0.6 - height),
                (x + wide, 0.62),
                (x + wide * 0.3, 0.62),
            ],
            band,
            False,
        )
    p.fog(0.56, 0.07, 0.78)
    sand: Color = (236, 190, 112)
    for i, base in enumerate((0.62, 0.7, 0.79)):
        line = ridge(p, base, 0.08, 0.8)
        p.polygon(ground(line), p.shade(mix(sand, (214, 142, 84), 0.18 * i), 0.3 - 0.13 * i, 0.5))
        low = [(x, y + 0.035 + 0.03 * np.sin(3 * x + i)) for x, y in line[::-1] if x > 0.3]
        p.polygon(
            [*[(x, y) for x, y in line if x > 0.3], *low],
            p.shade((206, 138, 84), 0.34 - 0.13 * i, 0.45),
            False,
        )
        p.fog(base + 0.01, 0.05, 0.62)
    for x, base, height in ((p.vary(0.07, 0.15), 0.84, 0.24), (p.vary(0.87, 0.94), 0.8, 0.17)):
        paint_cactus(p, x, base + p.vary(-0.01, 0.02), height)


def paint_cactus(p: Painter, x: float, base: float, height: float) -> None:
    """A saguaro with two arms."""
    color = p.shade((62, 128, 84), 0.04, 0.3)
    wide = 0.021 * height / 0.2
    for dx, low, top in ((-2.6, 0.42, 0.72), (2.6, 0.34, 0.84)):
        ax = x + dx * wide
        p.polygon(
            [
                (x, base - height * low),
                (ax, base - height * low),
                (ax, base - height * (low - 0.09)),
                (x, base - height * (low - 0.09)),
            ],
            color,
        )
        rounded(p, ax, base - height * (low - 0.09), base - height * top, wide * 0.75, color)
    rounded(p, x, base, base - height, wide, color)


def rounded(p: Painter, x: float, base: float, top: float, half: float, color: Color) -> None:
    """An upright bar with a round top."""
    box = ((x - half) * CANVAS, top * CANVAS, (x + half) * CANVAS, base * CANVAS)
    ink = rgb(p.ink()) if p.outline else None
    p.pen.rounded_rectangle(box, half * CANVAS, fill=rgb(color), outline=ink, width=4 if ink else 0)


def water_color(p: Painter, share: float) -> Color:
    """Water between the sky's colour near the horizon (0) and its own deep tone at the shore (1)."""
    deep: Color = (24, 104, 150)
    near = p.shade(deep, 0.0)
    sky = mix(p.light.sky[1], p.light.sky[2], 0.6)
    if p.scene.weather == "rainy":
        sky = grey(sky, 0.5, 0.7)
    return mix(mix(sky, p.air(), 0.3), near, 0.3 + 0.6 * share)


def paint_glitter(p: Painter, top: float, bottom: float, strength: float) -> None:
    """The sun's or moon's path on the water, in short bars."""
    if p.scene.weather == "rainy":
        strength *= 0.35
    x = p.light.disc_at[0]
    for i in range(9):
        y = top + (bottom - top) * (i + 0.5) / 9
        half = 0.03 + 0.06 * (i / 9) * p.vary(0.5, 1.0)
        shift = p.vary(-0.015, 0.015)
        color = mix(water_color(p, i / 9), p.light.disc, strength)
        p.polygon(
            [(x + shift - half, y), (x + shift, y - 0.006), (x + shift + half, y), (x + shift, y + 0.006)],
            color,
            False,
        )


def paint_sea(p: Painter) -> None:
    """Open water to the horizon, waves, the sun's path, a rocky shore for what stands on land."""
    p.horizon = 0.53
    for i in range(16):
        y = p.horizon + (1 - p.horizon) * i / 16
        p.polygon([(-0.02, y), (1.02, y), (1.02, 1.02), (-0.02, 1.02)], water_color(p, i / 15), False)
    if p.outline:
        p.pen.line([(0, p.horizon * CANVAS), (CANVAS, p.horizon * CANVAS)], fill=rgb(p.ink()), width=4)
    paint_glitter(p, p.horizon + 0.01, 0.86, 0.75)
    foam = mix(water_color(p, 0.4), p.shade(WHITE), 0.55)
    for i in range(11):
        y = p.horizon + 0.05 + 0.4 * i / 11
        x, half = p.vary(0, 1), 0.025 + 0.06 * i / 11
        p.polygon(
            [
                (x - half, y),
                (x - half * 0.3, y - 0.009),
                (x + half * 0.5, y - 0.005),
                (x + half, y),
                (x, y + 0.004),
            ],
            foam,
            False,
        )
    p.fog(0.54, 0.08, 0.85)
    p.fog(0.72, 0.06, 0.5)
    if p.scene.subject not in ("boat", "none"):
        x = p.vary(0.44, 0.56)
        rim = [
            (x - 0.47, 1.02),
            (x - 0.38, 0.88),
            (x - 0.27, 0.83),
            (x, 0.8),
            (x + 0.25, 0.82),
            (x + 0.36, 0.87),
            (x + 0.46, 1.02),
        ]
        p.polygon([(a, b + 0.02) for a, b in rim], foam, False)
        p.polygon(rim, p.shade((126, 112, 104), 0.03, 0.65))
        p.polygon(
            [(x - 0.27, 0.83), (x, 0.8), (x + 0.25, 0.82), (x + 0.3, 0.85), (x, 0.86), (x - 0.3, 0.86)],
            p.shade((116, 150, 88), 0.02, 0.85),
            False,
        )


def paint_forest(p: Painter) -> None:
    """Ranks of tall firs, paler with distance, around a clearing."""
    ranks: tuple[tuple[float, float, int, float, Color], ...] = (
        (0.62, 0.3, 11, 0.66, (88, 138, 108)),
        (0.69, 0.36, 9, 0.42, (62, 118, 84)),
        (0.77, 0.4, 8, 0.2, (44, 100, 68)),
    )
    for i, (base, height, count, depth, color) in enumerate(ranks):
        p.polygon(
            [(-0.02, base - 0.03), (1.02, base - 0.03), (1.02, 1.02), (-0.02, 1.02)],
            p.shade(mix(color, (90, 110, 70), 0.3), depth, 0.7),
            False,
        )
        for k in range(count):
            x = (k + 0.5) / count + p.vary(-0.02, 0.02)
            if i == 2 and abs(x - 0.5) < 0.24:
                continue
            paint_conifer(p, x, base + 0.02, height * p.vary(0.85, 1.12), color, depth)
        p.fog(base - 0.02, 0.09, 0.66)
    p.polygon(ground(ridge(p, 0.81, 0.04, 0.6)), p.shade((84, 124, 66), 0.04, 0.85))
    for side in (0.02, 0.98):
        paint_conifer(p, side + p.vary(-0.02, 0.02), 0.92, p.vary(0.6, 0.7), (32, 82, 58), 0.05)


def paint_lake(p: Painter) -> None:
    """Still water that mirrors the far shore, grass and reeds in front."""
    p.horizon = 0.56
    p.polygon(ground(ridge(p, 0.54, 0.2, 0.9), p.horizon), p.shade((108, 128, 158), 0.55, 0.4))
    p.fog(0.5, 0.06, 0.6)
    p.polygon(ground(ridge(p, 0.56, 0.09, 1.3), p.horizon), p.shade((78, 122, 92), 0.34, 0.6))
    for k in range(12):
        x = (k + 0.5) / 12 + p.vary(-0.03, 0.03)
        paint_conifer(p, x, 0.565, p.vary(0.06, 0.115), (52, 98, 76), 0.28)
    edge = round(p.horizon * CANVAS)
    mirror = p.canvas.crop((0, 2 * edge - CANVAS, CANVAS, edge)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    tone = Image.new("RGB", mirror.size, rgb(water_color(p, 0.7)))
    p.canvas.paste(Image.blend(mirror, tone, 0.36), (0, edge))
    for i in range(8):
        y, x, half = p.horizon + 0.025 + 0.3 * i / 8, p.vary(0, 1), p.vary(0.06, 0.14)
        p.polygon(
            [(x - half, y), (x, y - 0.004), (x + half, y), (x, y + 0.004)],
            mix(water_color(p, 0.2), WHITE, 0.18),
            False,
        )
    p.fog(0.57, 0.07, 0.8)
    if p.scene.subject == "boat":
        return
    p.polygon(ground(ridge(p, 0.83, 0.035, 0.6)), p.shade((112, 158, 80), 0.02, 0.85))
    for k in range(8):
        x = (0.02 + 0.025 * k) if k < 4 else (0.88 + 0.027 * (k - 4))
        lean, top = p.vary(-0.02, 0.02), p.vary(0.68, 0.75)
        p.polygon([(x, 0.86), (x + lean, top), (x + 0.012, 0.86)], p.shade((88, 120, 58), 0.0, 0.35))


PLACES: dict[str, Callable[[Painter], None]] = {
    "mountains": paint_mountains,
    "hills": paint_hills,
    "desert": paint_desert,
    "sea": paint_sea,
    "forest": paint_forest,
    "lake": paint_lake,
}


# ---------------------------------------------------------------- subjects


def paint_subject(p: Painter) -> None:
    """The subject in front of its place; nothing for "none"."""
    if p.scene.subject == "none":
        return
    y = 0.82 if p.scene.subject == "boat" else 0.865
    brush = Brush(p, p.vary(0.43, 0.57), y + p.vary(-0.012, 0.012), p.vary(0.93, 1.07), p.rng.random() < 0.5)
    SUBJECTS[p.scene.subject](brush)


@dataclass(frozen=True)
class Brush:
    """Paints in the subject's own frame: origin at the middle of its foot, y upwards, perhaps mirrored."""

    painter: Painter
    x: float
    y: float
    size: float
    mirrored: bool

    def at(self, x: float, y: float) -> Point:
        """From the subject's frame to the picture's."""
        return (self.x + (-x if self.mirrored else x) * self.size, self.y - y * self.size)

    def shape(self, points: Sequence[Point], color: Color, snow: float = 0.0, lamp: bool = False) -> None:
        """A filled polygon; a lamp keeps its colour whatever the hour."""
        tone = color if lamp else self.painter.shade(color, 0.02, snow)
        self.painter.polygon([self.at(x, y) for x, y in points], tone)

    def box(
        self,
        left: float,
        low: float,
        right: float,
        top: float,
        color: Color,
        snow: float = 0.0,
        lamp: bool = False,
    ) -> None:
        """A filled rectangle."""
        self.shape([(left, low), (left, top), (right, top), (right, low)], color, snow, lamp)

    def disc(self, x: float, y: float, rx: float, ry: float, color: Color, snow: float = 0.0) -> None:
        """A filled ellipse."""
        cx, cy = self.at(x, y)
        self.painter.ellipse(cx, cy, rx * self.size, ry * self.size, self.painter.shade(color, 0.02, snow))

    def window(self, left: float, low: float, right: float, top: float) -> None:
        """A pane: lit from within when the lamps are on."""
        lit = self.painter.light.lamps or self.painter.scene.weather in ("misty", "rainy", "snowy")
        self.box(left, low, right, top, (255, 214, 96) if lit else (86, 112, 138), lamp=lit)

    def glow(self, x: float, y: float, radius: float, strength: float) -> None:
        """Warm light on what is around, when the lamps are on."""
        if not self.painter.light.lamps:
            return
        cx, cy = self.at(x, y)
        grid = np.linspace(0, 1, 48, dtype=np.float32)
        distance = np.hypot(grid[None, :] - cx, grid[:, None] - cy)
        self.painter.veil((255, 206, 110), strength * np.exp(-((distance / radius) ** 2)))


def paint_cabin(b: Brush) -> None:
    """A log cabin with a red roof, a chimney and smoke."""
    for dx, dy, r in ((0.02, 0.36, 0.02), (0.045, 0.41, 0.026), (0.03, 0.465, 0.032)):
        b.disc(-0.1 + dx, dy, r, r * 0.85, (214, 214, 222))
    b.box(-0.125, 0.2, -0.075, 0.34, (130, 96, 88), 0.2)
    b.box(-0.2, 0.0, 0.2, 0.17, (156, 104, 62))
    for y in (0.045, 0.09, 0.135):
        b.box(-0.2, y, 0.2, y + 0.009, (112, 70, 44))
    b.shape([(-0.25, 0.16), (-0.15, 0.31), (0.15, 0.31), (0.25, 0.16)], (178, 58, 48), 0.9)
    b.box(-0.035, 0.0, 0.045, 0.125, (84, 50, 36))
    b.window(-0.155, 0.05, -0.085, 0.12)
    b.window(0.095, 0.05, 0.165, 0.12)
    b.glow(0.0, 0.08, 0.2, 0.3)


def paint_lighthouse(b: Brush) -> None:
    """A tall tower in red and white bands with a lamp and, after dark, its beams."""
    if b.painter.light.lamps or b.painter.scene.weather in ("misty", "rainy"):
        beam = mix((255, 244, 176), b.painter.air(), 0.45)
        for x in (-0.62, 0.62):
            b.shape([(0.0, 0.545), (x, 0.63), (x, 0.5)], beam, lamp=True)
    edges = np.linspace(0, 0.48, 6)
    for i in range(5):
        low, top = float(edges[i]), float(edges[i + 1])
        wide_low, wide_top = 0.098 - 0.085 * low, 0.098 - 0.085 * top
        color: Color = (214, 46, 44) if i % 2 == 0 else (246, 244, 238)
        b.shape([(-wide_low, low), (-wide_top, top), (wide_top, top), (wide_low, low)], color, 0.12)
    b.box(-0.082, 0.48, 0.082, 0.505, (58, 60, 74))
    b.box(-0.045, 0.505, 0.045, 0.585, (255, 236, 130), lamp=True)
    b.shape([(-0.066, 0.585), (0.0, 0.66), (0.066, 0.585)], (186, 40, 42), 0.8)
    b.box(-0.024, 0.0, 0.024, 0.075, (66, 54, 56))
    b.glow(0.0, 0.545, 0.17, 0.55)


def paint_tent(b: Brush) -> None:
    """An orange ridge tent, its door open, guy lines to both sides."""
    b.shape([(-0.1, 0.27), (0.1, 0.31), (0.27, 0.0), (0.05, 0.0)], (212, 104, 34), 0.55)
    b.shape([(-0.24, 0.0), (-0.1, 0.28), (0.05, 0.0)], (250, 150, 50), 0.25)
    lit = b.painter.light.lamps
    b.shape([(-0.155, 0.0), (-0.1, 0.2), (-0.035, 0.0)], (255, 222, 120) if lit else (92, 44, 26), lamp=lit)
    b.shape([(-0.1, 0.29), (-0.1, 0.275), (0.1, 0.305), (0.1, 0.32)], (140, 62, 26))
    b.shape([(-0.31, 0.0), (-0.1, 0.285), (-0.1, 0.27)], (110, 84, 62))
    b.glow(-0.08, 0.1, 0.19, 0.4)


def paint_boat(b: Brush) -> None:
    """A sailing boat: white mainsail, red jib, dark hull, its reflection under it."""
    below = water_color(b.painter, 0.9)
    b.shape(
        [(-0.16, -0.03), (-0.03, -0.19), (0.02, -0.03)], mix(below, b.painter.shade(WHITE), 0.35), lamp=True
    )
    b.shape(
        [(-0.2, 0.0), (0.2, 0.0), (0.14, -0.07), (-0.14, -0.07)], mix(below, (40, 26, 30), 0.45), lamp=True
    )
    b.box(-0.012, 0.07, 0.008, 0.5, (98, 66, 46))
    b.shape(
        [(-0.022, 0.12), (-0.022, 0.48), (-0.21, 0.12)], mix(WHITE, b.painter.light.tint, 0.25), lamp=True
    )
    b.shape([(0.016, 0.12), (0.016, 0.44), (0.17, 0.12)], (224, 58, 48), 0.0)
    b.shape([(-0.23, 0.085), (0.23, 0.085), (0.16, 0.0), (-0.17, 0.0)], (122, 68, 42), 0.0)
    b.shape([(-0.24, 0.1), (0.24, 0.1), (0.225, 0.075), (-0.225, 0.075)], (240, 232, 214), 0.0)


def paint_castle(b: Brush) -> None:
    """A keep between two towers with blue cones, a gate and flags."""
    stone: Color = (176, 174, 184)
    b.box(-0.13, 0.0, 0.13, 0.3, stone, 0.1)
    for x in (-0.13, -0.052, 0.026, 0.104):
        b.box(x, 0.29, x + 0.042, 0.335, stone, 0.6)
    for x in (-0.2, 0.2):
        b.box(x - 0.07, 0.0, x + 0.07, 0.36, mix(stone, (130, 128, 148), 0.5 if x > 0 else 0.15), 0.1)
        b.shape([(x - 0.092, 0.355), (x, 0.53), (x + 0.092, 0.355)], (56, 84, 168), 0.6)
        b.window(x - 0.018, 0.2, x + 0.018, 0.27)
        b.shape([(x, 0.52), (x, 0.595), (x + 0.065, 0.57), (x + 0.008, 0.545)], (220, 52, 56))
    b.box(-0.052, 0.0, 0.052, 0.11, (72, 52, 46))
    b.disc(0.0, 0.11, 0.052, 0.04, (72, 52, 46))
    b.window(-0.07, 0.19, -0.038, 0.245)
    b.window(0.038, 0.19, 0.07, 0.245)
    b.glow(0.0, 0.15, 0.22, 0.22)


def paint_tree(b: Brush) -> None:
    """One great broad-leaved tree in autumn red."""
    bark: Color = (92, 62, 46)
    b.shape([(-0.055, 0.0), (-0.026, 0.08), (-0.024, 0.26), (0.024, 0.26), (0.026, 0.08), (0.06, 0.0)], bark)
    b.shape([(-0.015, 0.17), (-0.12, 0.3), (-0.1, 0.31), (0.0, 0.21)], bark)
    b.shape([(0.015, 0.17), (0.12, 0.29), (0.1, 0.31), (0.0, 0.2)], bark)
    leaf: Color = (206, 62, 44)
    for x, y, r in (
        (-0.15, 0.31, 0.105),
        (0.15, 0.31, 0.105),
        (0.0, 0.33, 0.13),
        (-0.085, 0.42, 0.11),
        (0.09, 0.42, 0.11),
        (0.0, 0.48, 0.1),
    ):
        b.disc(x, y, r, r * 0.88, mix(leaf, (250, 140, 52), 0.15 + 1.1 * (y - 0.3)), 0.35)
    for x, y, r in ((-0.1, 0.44, 0.05), (0.02, 0.5, 0.045), (0.1, 0.38, 0.04), (-0.04, 0.35, 0.04)):
        cx, cy = b.at(x, y)
        b.painter.ellipse(
            cx, cy, r * b.size, r * 0.7 * b.size, b.painter.shade((250, 158, 66), 0.02, 0.7), False
        )


SUBJECTS: dict[str, Callable[[Brush], None]] = {
    "cabin": paint_cabin,
    "lighthouse": paint_lighthouse,
    "tent": paint_tent,
    "boat": paint_boat,
    "castle": paint_castle,
    "tree": paint_tree,
}


# ---------------------------------------------------------------- weather and style


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
