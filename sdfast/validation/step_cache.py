"""What step caching adds to a validation: its module, and what it saves and costs."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from sdfast.engine import Engine
from sdfast.manifest import SHALLOW, StepCache
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.validation.hooks import cached_steps
from sdfast.validation.metrics import compare, psnr, ssim
from sdfast.validation.modules import (
    Measured,
    Stock,
    as_inputs,
    scaled_contexts,
    shaped,
    with_last_columns,
)
from sdfast.validation.observe import StepInputs, evaluate, observed_step
from sdfast.validation.pictures import Drawn, Picture, draw
from sdfast.validation.report import CachePrice

DEEP = "deep"


def measure_step_cache(
    engine: Engine, cache: StepCache, stock: Stock, pictures: Sequence[Picture]
) -> tuple[Measured, Measured]:
    """What a whole step keeps, and a shallow step, each on the inputs that stock's own blocks have.

    pictures: their float32 runs hold the inputs of some steps. Each of these is the shallow one after the one
    before it, the first after itself.
    """
    pairs = [pair for picture in pictures for pair in _after_another(picture.truth.steps)]
    truths = [_stock_pair(stock.exact, cache, *pair) for pair in pairs]
    height, width = pictures[0].truth.image.shape[1:]
    own = [
        _own_pair(engine, [_told(engine, stock.exact, step) for step in pair], truth[0], height, width)
        for pair, truth in zip(pairs, truths, strict=True)
    ]
    same = stock.same and [
        _stock_pair(stock.same, cache, *pair, truth[0]) for pair, truth in zip(pairs, truths, strict=True)
    ]

    def measured(part: int, name: str, what: str) -> Measured:
        due = [truth[part] for truth in truths]
        values = [shaped(name, pair[part], truth) for pair, truth in zip(own, due, strict=True)]
        stocks = compare(zip((pair[part] for pair in same), due, strict=True)) if same else None
        return Measured(name, what, compare(zip(values, due, strict=True)), stocks)

    return (
        measured(0, DEEP, "what a whole step keeps"),
        measured(1, SHALLOW, "a shallow step, on what the reference kept"),
    )


def _after_another(steps: Sequence[StepInputs]) -> Iterator[tuple[StepInputs, StepInputs]]:
    return zip((steps[0], *steps[:-1]), steps, strict=True)


def _own_pair(
    engine: Engine, told: Sequence[dict[str, Tensor]], deep: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """What the engine keeps of the first step, and what it makes of the second with `deep`."""
    whole, shallow = as_inputs(engine, told[0]), as_inputs(engine, {**told[1], "deep": deep})
    return (
        engine.call("unet", whole, height, width)["deep"],
        engine.call(SHALLOW, shallow, height, width)["output"],
    )


def _told(engine: Engine, pipe: Any, step: StepInputs) -> dict[str, Tensor]:
    """What the U-Net is told of a step: stock's own contexts and shifts."""
    outputs = observed_step(pipe, step)
    shift = with_last_columns(engine, step, outputs.time_shift)
    told = {"sample": step.sample, "time_shift": shift, "context": outputs.context}
    if step.images is not None:
        told["image_context"] = scaled_contexts(engine, step, outputs.image_contexts)
    return told


def _stock_pair(
    pipe: Any, cache: StepCache, whole: StepInputs, shallow: StepInputs, deep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What stock keeps of the first step, and what it makes of the second with that, or with `deep`."""
    with cached_steps(pipe, 2, cache.branch) as cached:
        evaluate(pipe, whole)
        kept = cached.deep
        cached.deep = kept if deep is None else deep.to(kept)
        return kept, evaluate(pipe, shallow)


def cached_in(request: Request, interval: int) -> Request:
    """Raises `RequestError` for an interval that is none."""
    return Request.make(**{**dict(request), "cache_interval": interval})


def price_of_caching(
    engine: Engine, cache: StepCache, pictures: Sequence[Picture], interval: int
) -> CachePrice:
    """What it saves and costs to have one whole step in `interval`. Each picture is drawn with and without,
    after one that is not counted."""
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    cached = [cached_in(picture.request, interval) for picture in pictures]
    _timed(pipe, cached[0], pictures[0])
    without, seconds, drawn = 0.0, 0.0, []
    for request, picture in zip(cached, pictures, strict=True):
        without += _timed(pipe, picture.request, picture)[0]
        took, found = _timed(pipe, request, picture)
        seconds += took
        drawn.append((found.images[0], picture.truth.image))
    return CachePrice(
        cache_interval=interval,
        branch=cache.branch,
        seconds=seconds / without,
        psnr_min=min(psnr(image, truth) for image, truth in drawn),
        ssim_min=min(ssim(image, truth) for image, truth in drawn),
    )


def _timed(pipe: Pipeline, request: Request, picture: Picture) -> tuple[float, Drawn]:
    start = time.perf_counter()
    drawn = draw(pipe, request, *picture.told)
    return time.perf_counter() - start, drawn
