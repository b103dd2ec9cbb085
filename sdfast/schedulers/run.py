"""`Run`: what one request asks of a scheduler, checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real

from sdfast.errors import RequestError
from sdfast.schedulers.config import RESPACINGS, SchedulerConfig


@dataclass(frozen=True)
class Run:
    """What one request asks, already checked: [K] timesteps, or [K + 1] sigmas, or just K steps.

    start: how many of the K steps are left out at the noisy end. The run is laid out as a whole and then cut;
        a solver that remembers has nothing to remember in its first step, wherever that is.
    """

    steps: int
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float = 0.0
    start: int = 0


def checked_run(
    config: SchedulerConfig,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    eta: float,
    strength: float,
) -> Run:
    """Raises `RequestError` for what no scheduler can do, or this one cannot."""
    if timesteps is not None and sigmas is not None:
        raise RequestError("timesteps and sigmas were both given; give one of them")
    for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is not None and name not in config.accepts:
            raise RequestError(
                f"{config.scheduler} takes no custom {name}, here as in diffusers; leave them out"
            )
    if timesteps is not None:
        values = _falling("timesteps", timesteps, config.num_train_timesteps)
        _check_timesteps(config, values)
        count = _agreed(steps, len(values), "timesteps")
        return Run(count, values, None, _checked_eta(config, eta), left_out(count, strength))
    if sigmas is not None:
        values = _falling("sigmas", sigmas, config.num_train_timesteps + 1)
        if len(values) < 2 or values[-1] < 0:
            raise RequestError("sigmas must be at least two falling numbers, the last one 0 or above")
        count = _agreed(steps, len(values) - 1, "sigmas")
        return Run(count, None, values, _checked_eta(config, eta), left_out(count, strength))
    count = _checked_steps(steps, config.num_train_timesteps)
    return Run(count, None, None, _checked_eta(config, eta), left_out(count, strength))


def _checked_steps(steps: int | None, most: int) -> int:
    if steps is None:
        raise RequestError("num_inference_steps is missing; give it, or timesteps, or sigmas")
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise RequestError(f"num_inference_steps={steps!r} is not a whole number; give one from 1 to {most}")
    if not 1 <= steps <= most:
        raise RequestError(
            f"num_inference_steps={steps} is outside 1 to {most}, the timesteps the model was trained on"
        )
    return int(steps)


def left_out(steps: int, strength: float) -> int:
    """How many steps `strength` leaves out: diffusers' image-to-image rule."""
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
        raise RequestError(f"strength={strength!r} is not a number above 0 and up to 1")
    done = min(int(steps * strength), steps)
    if done < 1:
        raise RequestError(
            f"strength={strength:g} of {steps} steps leaves no step to do; raise one of the two"
        )
    return steps - done


def _agreed(steps: int | None, given: int, name: str) -> int:
    if steps is not None and steps != given:
        raise RequestError(
            f"num_inference_steps={steps} but {name} make {given} steps; leave one of them out"
        )
    return given


def _falling(name: str, values: Sequence[float], most: int) -> tuple[float, ...]:
    """`values` as finite floats, each below the one before."""
    if not hasattr(values, "__len__") or isinstance(values, str):
        raise RequestError(f"{name}={values!r} is not a list of numbers")
    if not 1 <= len(values) <= most:
        raise RequestError(f"{name} has {len(values)} values; give 1 to {most}")
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise RequestError(f"{name} must all be numbers") from None
    if not all(math.isfinite(number) for number in numbers):
        raise RequestError(f"{name} must be finite numbers")
    for before, after in pairwise(numbers):
        if after >= before:
            raise RequestError(f"{name} must fall from step to step, but {after:g} follows {before:g}")
    return numbers


def _check_timesteps(config: SchedulerConfig, values: tuple[float, ...]) -> None:
    top = config.num_train_timesteps - 1
    if values[0] > top or values[-1] < 0:
        raise RequestError(
            f"timesteps run from {values[0]:g} to {values[-1]:g}; the model knows {top} down to 0"
        )
    for name in RESPACINGS:
        if getattr(config, name, False):
            raise RequestError(
                f"custom timesteps and {name} exclude each other; take the plain form of the sampler"
            )
    if config.whole_timesteps and any(value % 1 for value in values):
        raise RequestError(f"{config.scheduler} takes whole timesteps only")


def _checked_eta(config: SchedulerConfig, eta: float) -> float:
    if isinstance(eta, bool) or not isinstance(eta, Real) or not math.isfinite(eta) or eta < 0:
        raise RequestError(f"eta={eta!r} is not a number from 0 to 1")
    if eta and "eta" not in config.accepts:
        raise RequestError(
            f"eta={eta:g} has no meaning for {config.scheduler}; only DDIM and TCD use it, leave it at 0"
        )
    return float(eta)
