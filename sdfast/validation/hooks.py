"""Guidance in some of the steps, and step caching: hooks for the stock pipeline, which has neither."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sdfast.errors import RequestError
from sdfast.request import Request


@contextmanager
def guided_steps(pipe: Any, request: Request) -> Iterator[None]:
    """Guidance in the steps that have some: in the others the U-Net's answer to the negative prompt is made
    that to the prompt, so that the pipeline, which knows of no such steps, is guided nowhere."""
    if (request.guidance_start, request.guidance_end) == (0.0, 1.0):
        yield
        return
    calls = 0

    def answer(_: Any, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if pipe.do_classifier_free_guidance and calls - 1 not in request.guided(pipe.num_timesteps):
            positive = output[0].chunk(2)[1]
            return (torch.cat([positive, positive]), *output[1:])
        return output

    hook = pipe.unet.register_forward_hook(answer)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class Cached:
    """Step caching at work in a stock U-Net. deep: what was kept of the last whole evaluation."""

    calls: int = 0
    deep: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def cached_steps(pipe: Any, interval: int, branch: int | None) -> Iterator[Cached]:
    """Step caching: in every `interval`th evaluation of the U-Net, what enters the ResNet block that consumes
    skip `branch` beside that is kept, and it is what enters there in the others.

    It saves nothing: what lies deeper is computed all the same, and comes to nothing. Raises `RequestError`
    for an interval without a branch.
    """
    cached = Cached()
    if interval == 1:
        yield cached
        return
    if branch is None:
        raise RequestError(
            f"cache_interval: {interval}, but a checkpoint does not say up to which branch shallow steps go; "
            "leave it out, or draw with an engine that was exported with one"
        )
    unet, width = pipe.unet, _skip_widths(pipe.unet)[branch]

    def count(*_: Any) -> None:
        cached.calls += 1

    def enter(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if (cached.calls - 1) % interval == 0:
            cached.deep = args[0][:, :-width]
            return None
        return torch.cat([cached.deep, args[0][:, -width:]], dim=1), *args[1:]

    consumers = [resnet for block in unet.up_blocks for resnet in block.resnets][::-1]
    hooks = [unet.register_forward_pre_hook(count), consumers[branch].register_forward_pre_hook(enter)]
    try:
        yield cached
    finally:
        for hook in hooks:
            hook.remove()


def _skip_widths(unet: Any) -> list[int]:
    """The channels of each skip of a stock U-Net, in the order in which the way down leaves them."""
    widths = [unet.config.block_out_channels[0]]
    for block in unet.down_blocks:
        widths += [part.out_channels for part in (*block.resnets, *(block.downsamplers or ()))]
    return widths
