"""What a ControlNet adds to a validation: a control image, and what the networks are told of it."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sdfast.call import Given
from sdfast.engine import Engine
from sdfast.errors import NumericalError
from sdfast.pipeline import Pipeline
from sdfast.validation.metrics import compare
from sdfast.validation.modules import Measured, Stock
from sdfast.validation.observe import observed_step
from sdfast.validation.pictures import Picture

SCALES = (0.75, 0.5, 0.625)  # of the ControlNets, in turn; half precision holds them as they are
ENDS = (0.75, 0.5)  # of the steps, so that there are steps without


def control_settings(count: int) -> dict[str, Any]:
    """Of a request with so many control images: other scales for each, and other steps."""
    scales, ends = (tuple(every[i % len(every)] for i in range(count)) for every in (SCALES, ENDS))
    if count == 1:
        return {"controlnet_conditioning_scale": scales[0], "control_guidance_end": ends[0]}
    return {"controlnet_conditioning_scale": scales, "control_guidance_end": ends}


def control_images(count: int, height: int, width: int) -> Tensor:
    """Control images for so many ControlNets, each another, [1, N 3, H, W]: the usual one moved on."""
    usual = control_image(height, width)
    return torch.cat(
        [usual.roll((i * height // count, i * width // count), (2, 3)) for i in range(count)], dim=1
    )


def control_image(height: int, width: int) -> Tensor:
    """The control image of that size in pixels, the same for everybody: [1, 3, H, W] in [0, 1].

    Lines on black, as of edges: an oval off the middle in red, slanting bars in green, a wave in blue.
    Mirrored, moved by a latent or with its channels in another order, it is another.
    """
    y = (torch.arange(height, dtype=torch.float32)[:, None] + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32)[None] + 0.5) / width
    oval = (((x - 0.42) / 0.3) ** 2 + ((y - 0.38) / 0.24) ** 2 - 1).abs() < 0.25
    bars = (3 * x + 5 * y) % 1 < 0.2
    wave = (y - 0.7 - 0.1 * torch.sin(2 * math.pi * (x + 0.1))).abs() < 0.06
    return torch.stack([oval, bars, wave]).float()[None]


def measure_control(engine: Engine, stock: Stock, pictures: Sequence[Picture]) -> tuple[Measured, Measured]:
    """The control image and the scales as the engine tells them to its networks, against those of stock.

    pictures: with a control image; their float32 runs hold the inputs of the first step.
    """
    truths = [_embedded(stock.exact, picture) for picture in pictures]
    scales = [torch.stack(picture.truth.scales, dim=1) for picture in pictures]  # [B, K, N L]
    told = [_told(engine, picture, *like) for picture, *like in zip(pictures, truths, scales, strict=True)]
    same = None
    if stock.same is not None:
        same = compare((_embedded(stock.same, p), truth) for p, truth in zip(pictures, truths, strict=True))
    images = compare((control, truth) for (control, _), truth in zip(told, truths, strict=True))
    return (
        Measured("control", "as the ControlNet is told it", images, same),
        Measured(
            "control_scale",
            "of every step",
            compare((own, truth) for (_, own), truth in zip(told, scales, strict=True)),
        ),
    )


def _embedded(pipe: Any, picture: Picture) -> Tensor:
    """The control images as stock embeds them, [N C_0, h, w]."""
    return cast(Tensor, observed_step(pipe, picture.truth.steps[0]).control)[-1].float()


def _told(engine: Engine, picture: Picture, control: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The embedded images and the scales, like those given; NaN where the engine's numbers are none."""
    try:
        given = Given(over=picture.over, control=picture.control, ip_adapter_images=picture.seen)
        [row] = Pipeline(engine).prepare(picture.request, given).rows
    except NumericalError:
        return torch.full_like(control, math.nan), torch.full_like(scales, math.nan)
    own = cast(Tensor, row.control)  # as of every row of an engine with a ControlNet
    model = engine.manifest.model
    end = row.positive.time_shift.shape[1] - len(model.loras) - bool(model.pag)
    told = [row.positive] if row.negative is None else [row.negative, row.positive]
    columns = torch.stack([one.time_shift for one in told])[:, :, end - scales.shape[2] : end]
    return own.to(control), columns.to(scales)
