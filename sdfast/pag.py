"""Perturbed-attention guidance of requests: how much of it there is at each step, and who is told that it is
perturbed. What that is: see `sdfast.models.pag`.

With u for the negative prompt, t for the prompt and p for the prompt perturbed, a step's output is

    u + guidance · (t − u) + scale · (t − p),        without a negative prompt  t + scale · (t − p)

as in diffusers' PAG pipelines. The loop adds up what outputs are beyond the negative's: so the prompt counts
guidance + scale, and the perturbed one −scale; without a negative prompt the perturbed one is in its place.
"""

from collections.abc import Sequence

from sdfast.arithmetic import Weight
from sdfast.control import with_scales
from sdfast.errors import RequestError
from sdfast.manifest import Model
from sdfast.request import Request
from sdfast.row import Conditioning, Guide
from sdfast.schedulers import Schedule

_LAST_TIMESTEP = 1000  # as diffusers counts them, whatever the schedule


def check_pag(model: Model, request: Request) -> None:
    """Raises `RequestError` for this guidance where the engine has no layers for it."""
    if request.pag_scale and not model.pag:
        raise RequestError(
            f"pag_scale: {request.pag_scale:g}, but this engine was exported without layers to be perturbed; "
            "leave it out, or export one with `sdfast export SOURCE -o DIR --pag mid`"
        )


def scale_of(request: Request, plan: Schedule) -> Weight:
    """How much this guidance counts: less from step to step where the request's adaptive scale says so."""
    scale, fall = request.pag_scale, request.pag_adaptive_scale
    if not fall:
        return scale
    return [max(0.0, scale - fall * (_LAST_TIMESTEP - float(t))) for t in plan.timesteps]


def told_of(told: Sequence[Conditioning], steps: int, *, perturbed: bool) -> list[Conditioning]:
    """What a U-Net with layers to be perturbed is told: in a last column, whether they are."""
    return with_scales(told, [(float(perturbed),)] * steps)


def away_from(perturbed: Conditioning, told: Conditioning, weight: float, scale: Weight) -> list[Guide]:
    """A prompt that counts so much by itself, guided away from itself perturbed."""
    if isinstance(scale, Sequence):
        return [Guide(told, [weight + one for one in scale]), Guide(perturbed, [-one for one in scale])]
    return [Guide(told, weight + scale), Guide(perturbed, -scale)]
