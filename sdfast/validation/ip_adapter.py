"""What IP-Adapters add to a validation: images, and what the engine sees in them and tells the U-Net."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdfast.call import Given
from sdfast.engine import Engine
from sdfast.errors import NumericalError
from sdfast.image_processor import prepared
from sdfast.ip_adapter import pixel_values, pixels_of, processor_of
from sdfast.manifest import IMAGE_ENCODER, Model
from sdfast.pipeline import Pipeline, to_uint8
from sdfast.validation.control import control_image
from sdfast.validation.metrics import compare
from sdfast.validation.modules import Measured, Stock, as_inputs, scaled_contexts, shaped
from sdfast.validation.observe import observed_step
from sdfast.validation.pictures import Picture
from sdfast.validation.reference import as_reference, quiet

SCALES = (0.75, 0.5, 0.625)  # of the IP-Adapters, in turn; half precision holds them as they are
SIDES = (320, 240)  # of the images: not what the image encoder sees


def image_settings(count: int) -> dict[str, Any]:
    """Of a request with an image for each of so many IP-Adapters."""
    return {"ip_adapter_scale": tuple(SCALES[i % len(SCALES)] for i in range(count))} if count else {}


def adapter_images(model: Model) -> Tensor | None:
    """An image for each IP-Adapter, each another, [A, S, S, 3] uint8; None where there are none."""
    usual, count = control_image(*SIDES), len(model.ip_adapters)
    moved = [usual.roll((i * SIDES[0] // count, 0), (2, 3)) for i in range(count)]
    images = [Image.fromarray(to_uint8(one)[0].numpy()) for one in moved]
    return torch.stack([pixels_of(prepared(one, processor_of(model))) for one in images]) if images else None


def measure_images(engine: Engine, stock: Stock, pictures: Sequence[Picture]) -> list[Measured]:
    """What the engine's image encoder sees, against stock's; and what is told to its U-Net of the images,
    made ready, seen, projected and scaled.

    pictures: with images for IP-Adapters; their float32 runs hold the inputs of the first step.
    """
    model, seen = engine.manifest.model, pictures[0].seen
    if seen is None:
        return []
    pixels = torch.stack([pixel_values(one, processor_of(model)) for one in seen])
    pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])
    given = engine.call(IMAGE_ENCODER, as_inputs(engine, {"pixel_values": pixels}))
    truth = _seen(stock.exact, pixels)
    same = None if stock.same is None else _seen(stock.same, pixels)
    measured = []
    for reads in sorted({adapter.reads for adapter in model.ip_adapters}):
        value = shaped(IMAGE_ENCODER, given[reads], truth[reads])
        own = None if same is None else compare(zip(same[reads], truth[reads], strict=True))
        error = compare(zip(value, truth[reads], strict=True))
        measured.append(Measured(f"{IMAGE_ENCODER}.{reads}", "as IP-Adapters read it", error, own))
    told = [(_told(engine, picture), _stock_told(engine, stock.exact, picture)) for picture in pictures]
    same_told = None
    if stock.same is not None:
        stocks = [_stock_told(engine, stock.same, picture) for picture in pictures]
        same_told = compare((own, truth) for own, (_, truth) in zip(stocks, told, strict=True))
    error = compare((shaped("ip_adapter", value, truth), truth) for value, truth in told)
    return [*measured, Measured("ip_adapter", "as the U-Net is told the images", error, same_told)]


@as_reference()
def _seen(pipe: Any, pixels: Tensor) -> dict[str, Tensor]:
    encoder = pipe.image_encoder
    output = encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True)
    return {"image_embeds": output.image_embeds, "hidden_states": output.hidden_states[-2]}


def _stock_told(engine: Engine, pipe: Any, picture: Picture) -> Tensor:
    """The keys and values of the images that stock tells its U-Net, [B, I, KV]: of what its own image encoder
    sees in them, which in half precision is not what the float32 one sees."""
    step = picture.truth.steps[0]
    if step.images is None or picture.seen is None:
        raise ValueError("a picture that was drawn without images")
    images = [Image.fromarray(one.numpy()) for one in picture.seen]
    with as_reference(), quiet():
        embeds = pipe.prepare_ip_adapter_image_embeds(images, None, pipe.device, 1, len(step.sample) > 1)
    own = replace(step, images=replace(step.images, embeds=tuple(embeds)))
    return scaled_contexts(engine, own, observed_step(pipe, own).image_contexts).float()


def _told(engine: Engine, picture: Picture) -> Tensor:
    """The engine's; NaN where its numbers are none."""
    model = engine.manifest.model
    given = Given(over=picture.over, control=picture.control, ip_adapter_images=picture.seen)
    try:
        [row] = Pipeline(engine).prepare(picture.request, given).rows
    except NumericalError:
        return torch.full((2, *model.image_context), math.nan)
    told = [one.image for one in row.told_at(0) if one.image is not None]
    return torch.stack(told).float().cpu()
