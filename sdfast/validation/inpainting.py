"""What is drawn over in a validation of engines that draw over something, and what inpainting adds: what the
U-Net is told of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sdfast.call import Given
from sdfast.engine import Engine
from sdfast.errors import NumericalError
from sdfast.first_latents import Over
from sdfast.noise import OwnNoise, generator
from sdfast.pipeline import Pipeline
from sdfast.validation.metrics import compare
from sdfast.validation.modules import Measured, Stock, stock_moments, stock_vae_like
from sdfast.validation.pictures import Picture


@dataclass(frozen=True)
class Scene:
    """What is drawn over: image [3, H, W] in [0, 1], and mask [1, H, W], 1 where it is drawn anew; or all."""

    image: Tensor
    mask: Tensor | None

    @property
    def over(self) -> Over:
        return Over(self.image[None], None if self.mask is None else self.mask[None])

    @property
    def kept(self) -> Tensor:
        """The image without what is drawn anew, [3, H, W]: grey there, which the encoder takes as 0."""
        return self.image if self.mask is None else torch.where(self.mask > 0, 0.5, self.image)

    @classmethod
    def make(cls, height: int, width: int, *, masked: bool = True) -> "Scene":
        """The scene of that size in pixels, the same for everybody.

        The image has slopes and waves of its own in each channel. The mask is an oval off the middle, whose
        edge cuts through latents, and a bar: mirrored, inverted, or moved by a latent, it is another.
        """
        y = (torch.arange(height, dtype=torch.float32)[:, None] + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32)[None] + 0.5) / width
        red = 0.5 + 0.3 * (x - y) + 0.2 * torch.sin(2 * math.pi * (2 * x + y))
        green = 0.4 + 0.4 * x * y + 0.2 * torch.sin(2 * math.pi * (3 * y - x))
        blue = 0.7 - 0.4 * y + 0.2 * torch.sin(10 * math.pi * x) * torch.sin(6 * math.pi * y)
        oval = ((x - 0.42) / 0.3) ** 2 + ((y - 0.38) / 0.24) ** 2 < 1
        bar = (x > 0.86) & (y > 0.5)
        mask = (oval | bar).float()[None] if masked else None
        return cls(torch.stack([red, green, blue]).clamp(0, 1), mask)


def measure_told(
    engine: Engine, stock: Stock, scene: Scene, pictures: Sequence[Picture]
) -> tuple[Measured, Measured]:
    """The mask and the masked image's latents that the engine tells its U-Net, against those of stock.

    pictures: over the scene with a strength of 1; their float32 runs hold the inputs of the first step.
    """
    channels = engine.manifest.model.latent_channels
    truths = [picture.truth.steps[0].sample[-1, channels:] for picture in pictures]
    told = [_told(engine, scene, picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
    own, stand_in = stock_vae_like(engine, stock, "vae_encoder")
    hidden = [truth[1:] for truth in truths]
    masks = compare((value[:1], truth[:1]) for value, truth in zip(told, truths, strict=True))
    latents = compare((value[1:], truth) for value, truth in zip(told, hidden, strict=True))
    same = None
    if own is not None:
        by_stock = [_stock_latents(own, scene, picture) for picture in pictures]
        same = compare(zip(by_stock, hidden, strict=True))
    return (
        Measured("mask", "as the U-Net is told it, one number a latent", masks),
        Measured("masked_image", "latents of what the mask leaves", latents, same, stand_in),
    )


def measure_edited(engine: Engine, stock: Stock, scene: Scene, pictures: Sequence[Picture]) -> Measured:
    """The latents of the edited image that the engine tells its U-Net, against those of stock.

    pictures: of the scene; their float32 runs hold the inputs of the first step, the prompt's row first.
    """
    channels = engine.manifest.model.latent_channels
    truths = [picture.truth.steps[0].sample[0, channels:] for picture in pictures]
    told = [_told(engine, scene, picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
    own, stand_in = stock_vae_like(engine, stock, "vae_encoder")
    same, scale = None, engine.manifest.model.image_latents_scale or 1.0
    if own is not None:
        by_stock = stock_moments(own, scene.image)[0, 0] * scale
        same = compare((by_stock, truth) for truth in truths)
    error = compare(zip(told, truths, strict=True))
    return Measured("edited_image", "latents that the U-Net is told", error, same, stand_in)


def _told(engine: Engine, scene: Scene, picture: Picture, truth: Tensor) -> Tensor:
    """[1 + C, h, w] float32, like `truth`; NaN where the encoder gives no numbers."""
    try:
        given = Given(over=scene.over, control=picture.control, ip_adapter_images=picture.seen)
        [row] = Pipeline(engine).prepare(picture.request, given).rows
    except NumericalError:
        return torch.full_like(truth, math.nan)
    return cast(Tensor, row.positive.beside)  # as of every row of a U-Net for inpainting


def _stock_latents(pipe: Any, scene: Scene, picture: Picture) -> Tensor:
    """The masked image's latents [C, h, w] by a stock VAE, with the noise that is theirs."""
    mean, *std = stock_moments(pipe, scene.kept)[:, 0].cpu()
    if not std:  # of a tiny VAE, which has no noise
        return cast(Tensor, mean)
    noise = OwnNoise([generator(picture.request.seed)], mean.shape)
    noise.initial()  # the latents' own
    latents: Tensor = mean + std[0] * noise.initial()[0]
    return latents
