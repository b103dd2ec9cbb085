"""The canvas: colours, the hour's light, and shapes in them.

Everything is painted back to front on a canvas three times as large as the picture and then reduced, so
edges are smooth. Coordinates are fractions of the picture's side, y downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sdfast.landscapes.scenes import Scene

SIZE = 128
SCALE = 3
CANVAS = SIZE * SCALE

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
