"""Schedulers as tables of numbers.

Every scheduler is linear in the latents, the model output and the noise; only the network is not. So a run
of K steps is a table: K small matrices that map a few registers, the model output m and unit noise z to the
next registers. The loop multiplies and knows nothing of schedulers; one loop runs them all, and rows of
different schedulers can share a batch.

DPM++ 2M keeps two registers, the latents x and the last predicted x0. For an epsilon model, in step k, with
x0 = (x - σ m) / α now and x0' from the step before, the paper's update is

    x_next = a x + b x0 + c (x0 - x0')        a = σ_t/σ_s,  b = -α_t (e^-h - 1),  c = b h / (2 h_0)

and, written out, the matrix of that step is

                x              x0'   m                 z
    x_next  [ a + (b + c)/α   -c    -(b + c) σ/α       0 ]
    x0      [ 1/α              0    -σ/α               0 ]

`sampling.py` holds one short function a scheduler, in the papers' symbols; `noise.py` the noise levels;
`config.py` the configs as diffusers writes them; `names.py` what people call a scheduler; `table.py` the
table. That a table is right is algebra: composed over its K rows, it must be the map that diffusers' own
scheduler is, and the tests compare the two entry by entry.

    >>> s = schedule("DPM++ 2M Karras", {"beta_schedule": "scaled_linear"}, num_inference_steps=20)
    >>> s.matrix.shape
    (20, 2, 4)
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np

from sdfast.errors import RequestError
from sdfast.schedulers.config import Run, SchedulerConfig, own_config, read
from sdfast.schedulers.names import SAMPLERS, Sampler, resolve
from sdfast.schedulers.sampling import SAMPLING
from sdfast.schedulers.table import Schedule

__all__ = ["SAMPLERS", "Sampler", "Schedule", "own_config", "resolve", "schedule"]


def schedule(
    scheduler: str,
    config: Mapping[str, Any],
    *,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
) -> Schedule:
    """The table of a scheduler's run.

    Args:
        scheduler: any name that `resolve` knows. A diffusers class name leaves everything to `config`; a
            sampler's name ("DPM++ 2M Karras") also decides what that name says.
        config: a scheduler config as diffusers writes it, of this class or of any other, read as diffusers'
            `Class.from_config(config, **overrides)` reads it. For a scheduler object: `own_config(object)`.
        num_inference_steps: K, from 1 to num_train_timesteps. None if `timesteps` or `sigmas` is given.
        timesteps: the timesteps themselves, falling, for DDPM, Euler and DPM++ 2M.
        sigmas: the K + 1 noise levels, falling, the last one usually 0, for Euler.
        eta: DDIM's noise, from 0 (none) to 1 (DDPM's).

    Raises:
        RequestError: what is wrong, what is allowed, and what to do.
    """
    sampler = resolve(scheduler)
    model, table = SAMPLING[sampler.scheduler]
    settings = read(model, config, sampler.overrides)
    run = _checked_run(settings, num_inference_steps, timesteps, sigmas, eta)
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite, `Schedule` refuses
        return table(settings, run)


def _checked_run(
    config: SchedulerConfig,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    eta: float,
) -> Run:
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
        return Run(_agreed(steps, len(values), "timesteps"), values, None, _checked_eta(config, eta))
    if sigmas is not None:
        values = _falling("sigmas", sigmas, config.num_train_timesteps + 1)
        if len(values) < 2 or values[-1] < 0:
            raise RequestError("sigmas must be at least two falling numbers, the last one 0 or above")
        return Run(_agreed(steps, len(values) - 1, "sigmas"), None, values, _checked_eta(config, eta))
    return Run(_checked_steps(steps, config.num_train_timesteps), None, None, _checked_eta(config, eta))


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
    if getattr(config, "use_karras_sigmas", False):
        raise RequestError(
            "custom timesteps and Karras sigmas exclude each other; take the plain form of the sampler"
        )
    if config.scheduler != "EulerDiscreteScheduler" and any(value % 1 for value in values):
        raise RequestError(f"{config.scheduler} takes whole timesteps only")


def _checked_eta(config: SchedulerConfig, eta: float) -> float:
    if isinstance(eta, bool) or not isinstance(eta, Real) or not math.isfinite(eta) or eta < 0:
        raise RequestError(f"eta={eta!r} is not a number from 0 to 1")
    if eta and "eta" not in config.accepts:
        raise RequestError(
            f"eta={eta:g} has no meaning for {config.scheduler}; only DDIM uses it, leave it at 0"
        )
    return float(eta)
