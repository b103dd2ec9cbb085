"""Control images on their way to the loop: checked, embedded, and how much they weigh at each step.

Those of several ControlNets lie one after the other in the channels, in the order of the ControlNets.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdfast.engine import Engine
from sdfast.errors import NumericalError, RequestError
from sdfast.images import controls_of_each
from sdfast.manifest import CONTROL, Model
from sdfast.request import ControlMode, Request, each
from sdfast.row import Conditioning

DEFAULT_SCALE = 1.0  # as in diffusers
_OF_EACH = (
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    *("control_mode", "control_layer_scales"),
)
SOFTER = 0.825  # the outer layer's share of the next one's, as in sd-webui-controlnet
_MIDDLE = 12  # there the place of SD's middle, which counts whole; SDXL's is the tenth layer, and counts less


def asked_scale(model: Model, images: Any, scale: Any) -> Any:
    """What a request's scale is to be, with control images as `read_controls` takes them.

    By default 1, and 0 for a ControlNet without an image.
    """
    count = controlnets_of(model)
    given = controls_of_each(images, count)
    scale = DEFAULT_SCALE if scale is None else scale
    scale = tuple(scale) if isinstance(scale, list) else scale
    if all(one is not None for one in given) or len(each(scale, count)) != count:  # which is refused later
        return scale
    return tuple(0.0 if one is None else s for one, s in zip(given, each(scale, count), strict=True))


def controlnets_of(model: Model) -> int:
    """For how many ControlNets images are read: where there are none, as for one, which is refused later."""
    return max(1, model.controlnets)


def check_control(model: Model, request: Request, control: Tensor | None) -> None:
    """Raises `RequestError` for a control image that is missing, of no use here, or does not fit the request.

    control: [m, N 3, H, W] with N ControlNets; m divides the number of pictures, which take them in turn.
    """
    check_controlled(model, request, controlled=control is not None)
    if control is None:
        return
    count, channels, height, width = control.shape
    if channels != 3 * model.controlnets:
        raise RequestError(
            f"control_image: {channels // 3}, but this engine has {model.controlnets} ControlNets; give one "
            "for each, in their order"
        )
    if (height, width) != (request.height, request.width):
        raise RequestError(
            f"control_image: {width}x{height}, but the picture is {request.width}x{request.height} "
            "(width x height); scale the one, or ask for the other"
        )
    if request.images % count:
        raise RequestError(
            f"control_image: {count} for {request.images} pictures; give one for all, or one for each"
        )


def check_controlled(model: Model, request: Request, *, controlled: bool) -> None:
    """Raises `RequestError` for control images, or none, where the engine or the request asks otherwise."""
    if model.controlled and not controlled:
        raise RequestError(
            "control_image: is missing; this engine has a ControlNet, which draws every picture under the "
            "guidance of one"
        )
    if controlled and not model.controlled:
        raise RequestError(
            "control_image: this engine has no ControlNet; leave it out, or export one with "
            "`sdfast export SOURCE -o DIR --controlnet CONTROLNET`"
        )
    if (request.controlnet_conditioning_scale is not None) != controlled:
        raise RequestError(
            "controlnet_conditioning_scale and a control image go together; give both, or neither"
        )
    if not controlled:
        return
    for name in _OF_EACH:
        given = getattr(request, name)
        if isinstance(given, tuple) and len(given) != model.controlnets:
            raise RequestError(
                f"{name}: {len(given)} numbers, but this engine has "
                f"{_of_controlnets(model.controlnets)}; give one for each, in their order, or one for all"
            )
    _check_layers(model, request)


def _check_layers(model: Model, request: Request) -> None:
    """Raises `RequestError` for scales of other layers than there are."""
    for scales in request.control_layer_scales or ():
        if scales is not None and len(scales) != model.control_layers:
            raise RequestError(
                f"control_layer_scales: {len(scales)} numbers, but a ControlNet of this engine adds to "
                f"{model.control_layers} layers; give one for each, from the outermost to the middle"
            )


def _of_controlnets(count: int) -> str:
    return "one ControlNet" if count == 1 else f"{count} ControlNets"


def embedded(engine: Engine, control: Tensor) -> Tensor:
    """control [m, N 3, H, W] -> [m, N C_0, h, w] in the engine's dtype, on its device.

    Raises `NumericalError` for what is not finite.
    """
    image = control.to(engine.device, engine.dtype)
    found = engine.call(CONTROL, {"image": image}, *control.shape[2:])["control"]
    if not bool(torch.isfinite(found).all()):
        raise NumericalError("the embedded control image is not finite: export the engine in fp32")
    return found


def scales(request: Request, steps: int, model: Model, *, away: bool = False) -> list[tuple[float, ...]]:
    """How much is added at each of so many evaluations of the network: of each ControlNet, and of what it
    adds to each layer.

    away: for what is guided away from, the negative prompt.
    """
    if request.controlnet_conditioning_scale is None:
        raise ValueError("a request without a control image has no scales")
    every = list(
        zip(
            each(request.controlnet_conditioning_scale, model.controlnets),
            each(request.control_guidance_start, model.controlnets),
            each(request.control_guidance_end, model.controlnets),
            _shares(request, model, away=away),
            strict=True,
        )
    )
    return [
        tuple(
            scale * share if k / steps >= start and (k + 1) / steps <= end else 0.0
            for scale, start, end, shares in every
            for share in shares
        )
        for k in range(steps)
    ]


def _shares(request: Request, model: Model, *, away: bool) -> list[Sequence[float]]:
    """Of each ControlNet, how much of its scale each layer has.

    diffusers asks the first ControlNet whether it pools, and if so has all guess; without a mode it is as
    there.
    """
    layers, pooling = model.control_layers, model.pooling_controlnets
    usual: ControlMode = "guess" if 0 in pooling else "balanced"
    modes: tuple[ControlMode, ...] = each(request.control_mode or usual, model.controlnets)
    own = request.control_layer_scales or (None,) * model.controlnets
    shares: list[Sequence[float]] = []
    for place, (mode, given) in enumerate(zip(modes, own, strict=True)):
        # what pools is for the prompt alone where a mode is asked for, as in sd-webui-controlnet
        alone = place in pooling and request.control_mode is not None
        if away and (alone or mode in ("control", "guess")):
            shares.append((0.0,) * layers)
        else:
            shares.append(given or _shares_of(mode, layers, pools=place in pooling))
    return shares


def _shares_of(mode: ControlMode, layers: int, *, pools: bool) -> Sequence[float]:
    if mode == "balanced" or (mode == "guess" and pools):
        return (1.0,) * layers
    if mode == "guess":  # from a tenth to the whole, as in diffusers
        return [float(share) for share in torch.logspace(-1, 0, layers)]
    return [SOFTER ** max(_MIDDLE - layer, 0) for layer in range(layers)]


def with_scales(told: Sequence[Conditioning], by_step: Sequence[Sequence[float]]) -> list[Conditioning]:
    """What a U-Net with ControlNets, or with LoRAs, is told: the scales of each step are further columns of
    the time shifts, behind those that there are.

    In half precision they are rounded as these are, by 0.05 % at most.
    """
    return [replace(one, time_shift=_beside(one.time_shift, by_step)) for one in told]


def _beside(time_shift: Tensor, by_step: Sequence[Sequence[float]]) -> Tensor:
    return torch.cat([time_shift, time_shift.new_tensor(by_step)], dim=1)
