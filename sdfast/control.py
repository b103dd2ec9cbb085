"""A control image on its way to the loop: checked, embedded, and how much it weighs at each step."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdfast.engine import Engine
from sdfast.errors import NumericalError, RequestError
from sdfast.manifest import CONTROL, Model
from sdfast.request import Request
from sdfast.row import Conditioning

DEFAULT_SCALE = 1.0  # as in diffusers


def check_control(model: Model, request: Request, control: Tensor | None) -> None:
    """Raises `RequestError` for a control image that is missing, of no use here, or does not fit the request.

    control: [m, 3, H, W]; m divides the number of pictures, which take them in turn.
    """
    check_controlled(model, request, controlled=control is not None)
    if control is None:
        return
    count, _, height, width = control.shape
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
    """Raises `RequestError` for a control image, or none, where the engine or the request asks otherwise."""
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


def embedded(engine: Engine, control: Tensor) -> Tensor:
    """control [m, 3, H, W] -> [m, C_0, h, w] in the engine's dtype, on its device.

    Raises `NumericalError` for what is not finite.
    """
    image = control.to(engine.device, engine.dtype)
    found = engine.call(CONTROL, {"image": image}, *control.shape[2:])["control"]
    if not bool(torch.isfinite(found).all()):
        raise NumericalError("the embedded control image is not finite: export the engine in fp32")
    return found


def scales(request: Request, steps: int) -> list[float]:
    """How much of the ControlNet is added at each of so many evaluations of the network."""
    scale = request.controlnet_conditioning_scale
    if scale is None:
        raise ValueError("a request without a control image has no scales")
    start, end = request.control_guidance_start, request.control_guidance_end
    return [scale if k / steps >= start and (k + 1) / steps <= end else 0.0 for k in range(steps)]


def with_scales(told: Sequence[Conditioning], by_step: Sequence[float]) -> list[Conditioning]:
    """What a U-Net with a ControlNet is told: the scale of each step is a last column of the time shifts.

    In half precision it is rounded as they are, by 0.05 % at most.
    """
    return [replace(one, time_shift=_beside(one.time_shift, by_step)) for one in told]


def _beside(time_shift: Tensor, by_step: Sequence[float]) -> Tensor:
    return torch.cat([time_shift, time_shift.new_tensor(by_step)[:, None]], dim=1)
