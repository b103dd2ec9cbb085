"""Watching the stock pipeline at work: what it computes on the way to a picture, as it computes it."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdfast.first_latents import Over
from sdfast.request import Request
from sdfast.validation.reference import as_reference, generate, stock_scheduler


@dataclass(frozen=True)
class StepInputs:
    """What the stock U-Net is given in step `index`. B is 2 with guidance: negative prompt, then prompt.

    sample: [B, C, h, w], scaled for the network. hidden_states: [B, L, D].
    conditions: text_embeds [B, P] and time_ids [B, 6] (SDXL), timestep_cond [B, W] (LCM), where it has them.
    """

    index: int
    timestep: float
    sample: Tensor
    hidden_states: Tensor
    conditions: Mapping[str, Tensor]


@dataclass(frozen=True)
class StepOutputs:
    """What it computes: the packed context [B, L, KV] and time shifts [B, T], and the output [B, C, h, w]."""

    context: Tensor
    time_shift: Tensor
    output: Tensor


@dataclass
class Run:
    """One picture by the stock pipeline. masked: whether it was drawn over the masked part of an image.

    latents, outputs: after each evaluation of the network, [1, C, h, w] float32: the latents, and the guided
    model output that led to them. steps: the inputs of the steps that were asked for.
    image: [3, H, W] float32 in [0, 1].
    """

    seed: int
    masked: bool = False
    timesteps: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    steps: list[StepInputs] = field(default_factory=list)
    image: Tensor = field(default_factory=lambda: torch.empty(0))


@as_reference()
def observed_run(pipe: Any, request: Request, wanted: Collection[int] = (), over: Over | None = None) -> Run:
    """The first picture of `request` by the stock pipeline, with the U-Net's inputs at the `wanted` steps.

    over: what it is drawn over.
    """
    run = Run(request.seed, masked=over is not None and over.mask is not None)
    scheduler = _watched_scheduler(stock_scheduler(pipe, request.scheduler), run)
    with _watched_unet(pipe.unet, run, wanted):
        run.image = generate(pipe, request, scheduler=scheduler, output_type="pt", over=over)[0].cpu()
    return run


@contextmanager
def _watched_unet(unet: Any, run: Run, wanted: Collection[int]) -> Iterator[None]:
    count = 0

    def before(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal count
        if count in wanted:
            run.steps.append(_step_inputs(count, args[0], args[1], given))
        count += 1

    handle = unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _step_inputs(index: int, sample: Tensor, timestep: Tensor, given: Mapping[str, Any]) -> StepInputs:
    conditions = {**(given.get("added_cond_kwargs") or {}), "timestep_cond": given.get("timestep_cond")}
    return StepInputs(
        index,
        float(timestep),
        sample.clone(),
        given["encoder_hidden_states"].clone(),
        {name: value.clone() for name, value in conditions.items() if value is not None},
    )


def _watched_scheduler(scheduler: Any, run: Run) -> Any:
    """The scheduler, with its steps recorded."""
    step: Callable[..., Any] = scheduler.step

    @functools.wraps(step)  # the pipeline reads the signature to see what a scheduler takes
    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **given: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **given)
        run.timesteps.append(float(timestep))
        run.outputs.append(model_output.float().cpu().clone())
        run.latents.append(result[0].float().cpu().clone())
        return result

    scheduler.step = recorded
    return scheduler


def observed_step(unet: Any, given: StepInputs) -> StepOutputs:
    """One evaluation of the stock U-Net, its keys, values and time projections packed as sdfast packs them.

    The order of the packing is not assumed: it is the order in which the network is seen to use them.
    """
    context: list[Tensor] = []
    shifts: list[Tensor] = []
    handles = []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            handles.append(module.register_forward_hook(lambda _m, _args, out: context.append(out)))
        if hasattr(module, "time_emb_proj"):
            handles.append(module.time_emb_proj.register_forward_hook(_shift_of(module, shifts)))
    try:
        output = _evaluate(unet, given)
    finally:
        for handle in handles:
            handle.remove()
    return StepOutputs(torch.cat(context, dim=-1), torch.cat(shifts, dim=-1), output)


def _shift_of(block: Any, shifts: list[Tensor]) -> Callable[[Any, Any, Tensor], None]:
    """A ResNet block adds its time projection right after a convolution, whose bias sdfast packs with it."""

    def seen(_module: Any, _args: Any, projected: Tensor) -> None:
        shifts.append(projected + block.conv1.bias)

    return seen


@as_reference()
def _evaluate(unet: Any, given: StepInputs) -> Tensor:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(unet.device, unet.dtype)

    conditions = {name: cast(value) for name, value in given.conditions.items()}
    timestep_cond = conditions.pop("timestep_cond", None)
    timestep = torch.tensor(given.timestep, device=unet.device)
    output: Tensor = unet(
        cast(given.sample),
        timestep,
        encoder_hidden_states=cast(given.hidden_states),
        timestep_cond=timestep_cond,
        added_cond_kwargs=conditions or None,
        return_dict=False,
    )[0]
    return output
