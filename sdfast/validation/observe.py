"""Watching the stock pipeline at work: what it computes on the way to a picture, as it computes it."""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdfast.first_latents import Over
from sdfast.models.vae import TINY
from sdfast.request import Request
from sdfast.validation.drawing import generate, stock_scheduler
from sdfast.validation.reference import as_reference, set_loras, step_networks


@dataclass(frozen=True)
class Control:
    """What N stock ControlNets are given in a step: images [B, N 3, H, W]; the scale of what each adds.

    guessing: whether they are evaluated for the prompt alone, and add less in the outer layers, unless they
    pool; pooling: whether each does. layers: to how many each adds.
    """

    image: Tensor
    scales: tuple[float, ...]
    guessing: bool
    pooling: tuple[bool, ...]
    layers: int

    def columns(self, rows: int) -> Tensor:
        """How much of each is added to each layer, [B, N L] float32, as diffusers' ControlNetModel has it.

        B is `rows`, of which the first half is for the negative prompt.
        """
        falling = torch.logspace(-1, 0, self.layers)
        shares = [
            scale * (falling if self.guessing and not pools else torch.ones(self.layers))
            for scale, pools in zip(self.scales, self.pooling, strict=True)
        ]
        columns = torch.cat(shares).repeat(rows, 1)
        if self.guessing and rows > 1:
            columns[: rows // 2] = 0
        return columns


@dataclass(frozen=True)
class Images:
    """What a stock U-Net is given of the images of IP-Adapters: of each what its projection reads, [B, 1, D]
    or [B, 1, N, D], and how much it counts."""

    embeds: tuple[Tensor, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class StepInputs:
    """What the stock U-Net is given in step `index`. B is 2 with guidance: negative prompt, then prompt; and
    3 where an image is edited: prompt and image, image, neither.

    sample: [B, C, h, w], scaled for the network. hidden_states: [B, L, D].
    conditions: text_embeds [B, P] and time_ids [B, 6] (SDXL; [B, 5] its refiner), timestep_cond [B, W]
        (LCM), where it has them.
    control: what its ControlNets are given, if it has some. images: what it is told by IP-Adapters, likewise.
    loras: how much is added of the LoRAs that requests choose, in the text encoders and in the U-Net.
    """

    index: int
    timestep: float
    sample: Tensor
    hidden_states: Tensor
    conditions: Mapping[str, Tensor]
    control: Control | None = None
    images: Images | None = None
    loras: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOutputs:
    """What it computes: the packed context [B, L, KV] and time shifts [B, T], and the output [B, C, h, w].

    Of N ControlNets, context and time shifts follow the U-Net's; control: the embedded images
    [B, N C_0, h, w]. image_contexts: of the image of each IP-Adapter, [B, T, KV], whatever it counts.
    """

    context: Tensor
    time_shift: Tensor
    output: Tensor
    control: Tensor | None = None
    image_contexts: tuple[Tensor, ...] = ()


@dataclass
class Run:
    """One picture by the stock pipeline. over: whether it began with an image; masked: over a part of it.
    drawn_around: whether an image's latents are drawn from around a mean, and not just its VAE's output.

    latents, outputs: after each evaluation of the network, [1, C, h, w] float32: the latents, and the guided
    model output that led to them. steps: the inputs of the steps that were asked for. scales: of what each
    ControlNet adds to each layer at each evaluation, [B, N L].
    image: [3, H, W] float32 in [0, 1].
    """

    seed: int
    over: bool = False
    masked: bool = False
    drawn_around: bool = True
    timesteps: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    steps: list[StepInputs] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    image: Tensor = field(default_factory=lambda: torch.empty(0))


@as_reference()
def observed_run(
    pipe: Any,
    request: Request,
    wanted: Collection[int] = (),
    over: Over | None = None,
    control: Tensor | None = None,
    seen: Tensor | None = None,
) -> Run:
    """The first picture of `request` by the stock pipeline, with the U-Net's inputs at the `wanted` steps.

    over: what it is drawn over. control: the control images of a pipeline with N ControlNets, [1, N 3, H, W].
    seen: the images of one with IP-Adapters, see `generate`.
    """
    drawn_over = over is not None and request.image_guidance_scale is None
    masked = over is not None and over.mask is not None
    run = Run(request.seed, drawn_over, masked, drawn_around=type(pipe.vae).__name__ != TINY)
    scheduler = _watched_scheduler(stock_scheduler(pipe, request.scheduler), run)
    asked = {"scheduler": scheduler, "output_type": "pt", "over": over, "control": control}
    asked["ip_adapter_images"] = seen
    scales = {name: request.lora_scales(name) for name in request.loras}
    with _watched(step_networks(pipe), run, wanted, scales):
        run.image = generate(pipe, request, **asked)[0].cpu()
    return run


@contextmanager
def _watched(
    networks: Sequence[Any], run: Run, wanted: Collection[int], loras: Mapping[str, tuple[float, float]]
) -> Iterator[None]:
    """The U-Net, and the ControlNets, which are evaluated before it in each step. loras: see `StepInputs`."""
    count = 0
    given_to: list[dict[str, Any]] = []
    pooling = tuple(bool(network.config.global_pool_conditions) for network in networks[1:])

    def before_unet(unet: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal count
        control, rows = None, len(args[0])
        if given_to:
            images = torch.cat([one["controlnet_cond"] for one in given_to], dim=1)
            scales = tuple(float(one["conditioning_scale"]) for one in given_to)
            layers = len(given["down_block_additional_residuals"]) + 1
            guessing = bool(given_to[0].get("guess_mode"))  # then the images are those of the prompt alone
            images = images.repeat(rows // len(images), 1, 1, 1)
            control = Control(images, scales, guessing, pooling, layers)
            run.scales.append(control.columns(rows))
            given_to.clear()
        if count in wanted:
            inputs = _step_inputs(unet, count, args[0], args[1], given, control)
            run.steps.append(replace(inputs, loras=loras))
        count += 1

    def before_controlnet(_module: Any, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        given_to.append(given)

    hooks = (before_unet, *[before_controlnet] * (len(networks) - 1))
    handles = [
        network.register_forward_pre_hook(hook, with_kwargs=True)
        for network, hook in zip(networks, hooks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _step_inputs(
    unet: Any,
    index: int,
    sample: Tensor,
    timestep: Tensor,
    given: Mapping[str, Any],
    control: Control | None,
) -> StepInputs:
    conditions = {**(given.get("added_cond_kwargs") or {}), "timestep_cond": given.get("timestep_cond")}
    images = None
    if (embeds := conditions.pop("image_embeds", None)) is not None:
        scales = next(one.scale for one in unet.attn_processors.values() if hasattr(one, "to_k_ip"))
        images = Images(tuple(one.clone() for one in embeds), tuple(scales))
    return StepInputs(
        index,
        float(timestep),
        sample.clone(),
        given["encoder_hidden_states"].clone(),
        {name: value.clone() for name, value in conditions.items() if value is not None},
        control,
        images,
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


def observed_step(pipe: Any, given: StepInputs) -> StepOutputs:
    """One evaluation of the stock networks, keys, values and time projections packed as sdfast packs them.

    The order of the packing is not assumed: it is the order in which each network is seen to use them.
    """
    seen = [_Seen(network) for network in step_networks(pipe)]
    try:
        output = evaluate(pipe, given)
    finally:
        for one in seen:
            one.close()
    context = torch.cat([part for one in seen for part in one.context], dim=-1)
    shifts = torch.cat([part for one in seen for part in one.shifts], dim=-1)
    controls = [one.control for one in seen if one.control is not None]
    images = tuple(torch.cat(parts, dim=-1).squeeze(1) for parts in seen[0].images.values())
    return StepOutputs(context, shifts, output, torch.cat(controls, dim=1) if controls else None, images)


_OF_IMAGES = re.compile(r"attn2\.processor\.to_[kv]_ip\.(\d+)$")


class _Seen:
    """What a stock network computes on the way, in the order in which it does, until `close`."""

    def __init__(self, network: Any) -> None:
        self.context: list[Tensor] = []
        self.shifts: list[Tensor] = []
        self.control: Tensor | None = None
        self.images: dict[str, list[Tensor]] = {}  # of each IP-Adapter, by its number
        self._handles = []
        for name, module in network.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                self._handles.append(module.register_forward_hook(self._see_context))
            if match := _OF_IMAGES.search(name):
                hook = _kept_in(self.images.setdefault(match[1], []))
                self._handles.append(module.register_forward_hook(hook))
            if hasattr(module, "time_emb_proj"):
                hook = _shift_of(module, self.shifts)
                self._handles.append(module.time_emb_proj.register_forward_hook(hook))
            if name == "controlnet_cond_embedding":
                self._handles.append(module.register_forward_hook(self._see_control))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_context(self, _module: Any, _args: Any, output: Tensor) -> None:
        self.context.append(output)

    def _see_control(self, _module: Any, _args: Any, output: Tensor) -> None:
        self.control = output


def _kept_in(parts: list[Tensor]) -> Callable[[Any, Any, Tensor], None]:
    return lambda _module, _args, output: parts.append(output)


def _shift_of(block: Any, shifts: list[Tensor]) -> Callable[[Any, Any, Tensor], None]:
    """A ResNet block adds its time projection right after a convolution, whose bias sdfast packs with it."""

    def seen(_module: Any, _args: Any, projected: Tensor) -> None:
        shifts.append(projected + block.conv1.bias)

    return seen


@as_reference()
def evaluate(pipe: Any, given: StepInputs) -> Tensor:
    """What the stock U-Net gives for a step, [B, C, h, w]."""
    unet = pipe.unet
    set_loras(pipe, given.loras)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(unet.device, unet.dtype)

    conditions: dict[str, Any] = {name: cast(value) for name, value in given.conditions.items()}
    timestep_cond = conditions.pop("timestep_cond", None)
    timestep = torch.tensor(given.timestep, device=unet.device)
    shared: dict[str, Any] = {
        "encoder_hidden_states": cast(given.hidden_states),
        "added_cond_kwargs": conditions or None,
        "return_dict": False,
    }
    added: dict[str, Any] = {}
    if given.control is not None:
        controlnets = step_networks(pipe)[1:]
        latents = cast(given.sample[:, : controlnets[0].config.in_channels])
        images, scales = cast(given.control.image).chunk(len(controlnets), dim=1), given.control.scales
        several = len(controlnets) > 1
        down, mid = pipe.controlnet(
            latents,
            timestep,
            controlnet_cond=list(images) if several else images[0],
            conditioning_scale=list(scales) if several else scales[0],
            guess_mode=given.control.guessing,
            **shared,
        )
        if given.control.guessing and len(latents) > 1:
            of_prompt = torch.arange(len(latents), device=unet.device) >= len(latents) // 2
            down = [of_prompt[:, None, None, None] * one for one in down]
            mid = of_prompt[:, None, None, None] * mid
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    if given.images is not None:  # of which ControlNets are told nothing
        embeds = [cast(one) for one in given.images.embeds]
        shared["added_cond_kwargs"] = {**conditions, "image_embeds": embeds}
    output: Tensor = unet(cast(given.sample), timestep, timestep_cond=timestep_cond, **shared, **added)[0]
    return output
