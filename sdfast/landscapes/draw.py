"""Draws a scene: 128×128 pixels from five attributes and one integer."""

import numpy as np
from numpy.typing import NDArray

from sdfast.landscapes.painter import CANVAS, SCALE, SIZE, Painter
from sdfast.landscapes.places import PLACES
from sdfast.landscapes.scenes import Scene
from sdfast.landscapes.sky import paint_sky
from sdfast.landscapes.styles import paint_weather, pixelate, wash, watercolor
from sdfast.landscapes.subjects import paint_subject

__all__ = ["SIZE", "draw"]


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
