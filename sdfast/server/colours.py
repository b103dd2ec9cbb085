"""Previews without a decoder: the colour that a latent stands for.

What a VAE makes of a latent is, to a first approximation, a colour that is linear in its channels. The
numbers are fitted to an engine's own encoder, by one image of many colours.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdfast.engine import Engine
from sdfast.errors import BackendError
from sdfast.first_latents import encoded
from sdfast.loop import check_finite

Previews = Literal["auto", "full", "fast"]
"""How previews are made: decoded like pictures; by colours alone; or so where decoding holds up others."""

DECODES_WITHIN = 0.25
"""Seconds: where decoding takes longer, each preview would hold up the steps of all pictures by that."""

_COLOURS = 16  # along each side of the image that is fitted to


@dataclass(frozen=True)
class Colours:
    """weight: [C + 1, 3] float32: red, green and blue in [0, 1] of a latent's channels and a constant."""

    weight: Tensor

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """Those of an engine that takes images: one run of its encoder.

        Raises `NumericalError` where that gives no numbers.
        """
        form = engine.manifest.modules["vae_encoder"].variants[0]
        model = engine.manifest.model
        height = form.height.low if form.height else model.default_height
        width = form.width.low if form.width else model.default_width
        image = colourful(height, width)
        mean, _ = encoded(engine, image)
        seen = F.avg_pool2d(image, model.vae_scale_factor)
        return cls(_fitted(mean[0].cpu(), seen[0]))

    def picture(self, latents: Tensor, factor: int) -> Image.Image:
        """latents [C, h, w] → an image of `factor` times their size."""
        rows = _with_constant(latents.float().cpu()) @ self.weight
        pixels = (rows.clamp(0, 1) * 255).round().to(torch.uint8).view(*latents.shape[1:], 3)
        height, width = (side * factor for side in latents.shape[1:])
        return Image.fromarray(np.asarray(pixels)).resize((width, height), Image.Resampling.BICUBIC)


class Approximately:
    """Makes those previews of an engine that are not decoded. Its methods are the batcher's thread's."""

    def __init__(self, engine: Engine, previews: Previews) -> None:
        """Raises `BackendError` where there is nothing to fit fast ones to."""
        if previews == "fast" and not engine.manifest.edits:
            raise BackendError(
                f"engine {engine.manifest.name!r} has no VAE encoder, by which fast previews are fitted; "
                "serve it with --previews full"
            )
        self._engine, self._previews = engine, previews
        self._colours: Colours | None = None
        self._pace: float | None = None  # seconds a latent, of the fastest decode so far

    def decoded(self, latents: Tensor, seconds: float) -> None:
        """A picture of latents [C, h, w] was decoded in so many seconds."""
        pace = seconds / latents[0].numel()
        self._pace = pace if self._pace is None else min(pace, self._pace)

    def __call__(self, latents: Tensor) -> Image.Image | None:
        """The preview of latents [C, h, w], or None where it is to be decoded.

        Raises `NumericalError` for latents that are not finite.
        """
        if not self._wanted(latents):
            return None
        check_finite(latents)
        if self._colours is None:
            self._colours = Colours.of(self._engine)
        return self._colours.picture(latents, self._engine.manifest.model.vae_scale_factor)

    def _wanted(self, latents: Tensor) -> bool:
        if self._previews != "auto":
            return self._previews == "fast"
        known = self._pace is not None and self._engine.manifest.edits
        return known and (self._pace or 0.0) * latents[0].numel() > DECODES_WITHIN


def colourful(height: int, width: int) -> Tensor:
    """[1, 3, height, width] in [0, 1]: colours that run into each other, always the same.

    Patches of one colour each would leave out what latents say of detail, and the fit would not know it.
    """
    colours = torch.rand(1, 3, _COLOURS, _COLOURS, generator=torch.Generator().manual_seed(0))
    return F.interpolate(colours, size=(height, width), mode="bicubic").clamp(0, 1)


def _fitted(latents: Tensor, colours: Tensor) -> Tensor:
    """Least squares: latents [C, h, w], colours [3, h, w] -> [C + 1, 3]."""
    given, wanted = _with_constant(latents), colours.flatten(1).T
    # Of those that fit alike, where channels depend on each other, this driver takes the smallest.
    solved = torch.linalg.lstsq(given.double(), wanted.double(), driver="gelsd")
    weight: Tensor = solved.solution.float()
    return weight


def _with_constant(latents: Tensor) -> Tensor:
    """[C, h, w] -> [h w, C + 1]."""
    rows = latents.flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
