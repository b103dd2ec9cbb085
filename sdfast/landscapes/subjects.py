"""What stands, or floats, in the middle: cabin, lighthouse, tent, boat, castle, tree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sdfast.landscapes.painter import WHITE, Color, Painter, Point, mix
from sdfast.landscapes.places import water_color


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
