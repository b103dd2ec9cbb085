"""The six places: mountains, hills, desert, sea, forest, lake."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from sdfast.landscapes.painter import CANVAS, WHITE, Color, Painter, Point, grey, mix, rgb


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
