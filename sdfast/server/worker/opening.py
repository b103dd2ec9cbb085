"""What a worker does before it is ready: open its engine, and draw once of everything."""

from itertools import product
from pathlib import Path

import torch

from sdfast.call import Given, asked_over
from sdfast.engine import Engine
from sdfast.errors import SdfastError
from sdfast.first_latents import Over, encoded
from sdfast.ip_adapter import black_images
from sdfast.pipeline import Pipeline
from sdfast.request import Request

WARM_UP_STEPS = 2  # the first loads kernels, on CUDA the second is captured


def open_engine(folder: Path, device: str | None) -> Engine:
    """Open, verify and load an engine, and warm it up."""
    engine = Engine.open(folder, device, load=True)
    warm_up(engine)
    return engine


def warm_up(engine: Engine) -> None:
    """Draw a picture of each size that the engine was exported for, the smallest of a range, and one with
    shallow steps if it has some.

    So the first request meets nothing that is done only once, and what cannot draw is not served.
    """
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    model = engine.manifest.model
    sizes = [(form.height, form.width) for form in engine.manifest.modules["unet"].variants]
    intervals = (1, 2) if model.step_cache else (1,)
    for (height, width), interval in product(dict.fromkeys(sizes), intervals):
        request = Request.make(
            prompts=("",),
            negative_prompts=(None,),
            height=height.low if height else model.default_height,
            width=width.low if width else model.default_width,
            num_inference_steps=WARM_UP_STEPS * interval,
            cache_interval=interval,
            controlnet_conditioning_scale=1.0 if model.controlled else None,
            ip_adapter_scale=1.0 if model.ip_adapters else None,
            seed=0,
        )
        nothing = _nothing(request)
        control = nothing.image.repeat(1, model.controlnets, 1, 1) if model.controlled else None
        seen = black_images(model) if model.ip_adapters else None
        try:
            if model.draws_over:
                asked = asked_over(model, nothing, 1.0 if not model.instructed else None, None, None)
                request = request.model_copy(update=asked)
                over = nothing if model.inpaints else Over(nothing.image)
                pipe.generate(request, Given(over=over, control=control, ip_adapter_images=seen))
                continue
            if engine.manifest.edits:
                encoded(engine, nothing.image)
            pipe.generate(request, Given(control=control, ip_adapter_images=seen))
        except SdfastError as error:
            raise type(error)(f"engine {engine.manifest.name!r} cannot draw: {error}") from error


def _nothing(request: Request) -> Over:
    """A black image of the request's size, all of it to be drawn anew."""
    black = torch.zeros(1, 3, request.height, request.width)
    return Over(black, torch.ones_like(black[:, :1]))
