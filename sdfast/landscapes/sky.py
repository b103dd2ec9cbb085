"""Above the horizon: gradient, sun or moon, stars, clouds."""

import numpy as np
from PIL import Image

from sdfast.landscapes.painter import CANVAS, WHITE, Color, Painter, Pixels, grey, mix


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
