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

`solvers/` holds one short function a scheduler, in the papers' symbols, beside its config; `noise.py` the
noise levels, `levels.py` which of them a run visits, and `layouts.py` layouts that no config asks for;
`experts.py` which rows are done where two networks share a run;
`prediction.py` what the network's output means; `config.py` what configs share; `run.py` what a request may
ask; `samplers.py` the samplers there are, `schedule_types.py` how their levels may be spaced, and `names.py`
what people call them; `table.py` the table. That a table is right is algebra: composed over its K rows, it
must be the map that diffusers' own scheduler is, and the tests compare the two entry by entry.

    >>> s = schedule("DPM++ 2M Karras", {"beta_schedule": "scaled_linear"}, num_inference_steps=20)
    >>> s.matrix.shape
    (20, 2, 4)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sdfast.errors import RequestError
from sdfast.schedulers.config import ending_at, own_config, read
from sdfast.schedulers.experts import first_row, rows_until
from sdfast.schedulers.layouts import LAYOUTS, laid_out
from sdfast.schedulers.names import resolve
from sdfast.schedulers.run import checked_run
from sdfast.schedulers.samplers import SAMPLERS, Sampler
from sdfast.schedulers.schedule_types import SCHEDULE_TYPES as BY_CONFIG
from sdfast.schedulers.solvers import SOLVERS
from sdfast.schedulers.table import Brownian, Floats, Schedule

SCHEDULE_TYPES = tuple(dict.fromkeys([*BY_CONFIG, *LAYOUTS]))
"""AUTOMATIC1111's schedule types that may follow a plain sampler's name."""

__all__ = [
    "SAMPLERS",
    "SCHEDULE_TYPES",
    "SOLVERS",
    "Brownian",
    "Sampler",
    "Schedule",
    "own_config",
    "resolve",
    "schedule",
]


def schedule(
    scheduler: str,
    config: Mapping[str, Any],
    *,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    family: str = "sd",
) -> Schedule:
    """The table of a scheduler's run.

    Args:
        scheduler: any name that `resolve` knows. A diffusers class name leaves everything to `config`; a
            sampler's name ("DPM++ 2M Karras") also decides what that name says.
        config: a scheduler config as diffusers writes it, of this class or of any other, read as diffusers'
            `Class.from_config(config, **overrides)` reads it. For a scheduler object: `own_config(object)`.
        num_inference_steps: K, from 1 to num_train_timesteps. None if `timesteps` or `sigmas` is given.
        timesteps: the timesteps themselves, falling, for the schedulers that take some in diffusers.
        sigmas: the K + 1 noise levels σ/α, falling, the last one usually 0, for every scheduler that goes by
            noise levels: all but DDPM, DDIM, PNDM, LCM and TCD.
        eta: DDIM's noise, from 0 (none) to 1 (DDPM's).
        strength: the share of the run that is done, above 0 and up to 1, as in diffusers' image to image: the
            latents start as `Schedule.noising` of a picture's.
        denoising_start, denoising_end: the shares of the denoising between which the run's steps are done, as
            in diffusers' SDXL pipelines (see `experts`); with a start, `strength` is 1. The latents start as
            another run of the same steps has left them.
        family: "sd" or "sdxl": whose levels "Align Your Steps" takes.

    Raises:
        RequestError: what is wrong, what is allowed, and what to do.
    """
    sampler = resolve(scheduler)
    model, table = SOLVERS[sampler.scheduler]
    settings = read(model, config, sampler.overrides)
    run = checked_run(settings, num_inference_steps, timesteps, sigmas, eta, strength)
    if sampler.layout and run.timesteps is None and run.sigmas is None:
        run = replace(run, sigmas=laid_out(sampler.layout, settings, run.steps, family))
    if run.sigmas is not None:
        settings = ending_at(settings, run.sigmas[-1])
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite, `Schedule` refuses
        made = table(settings, run)
        if denoising_start is not None:
            train, evaluations = settings.num_train_timesteps, sampler.evaluations
            start = first_row(_falling(made), denoising_start, train, evaluations)
            made = table(settings, replace(run, start=start // evaluations))
    if denoising_end is not None:
        made = made.first(rows_until(_falling(made), denoising_end, settings.num_train_timesteps))
    named = sampler.overrides or sampler.layout
    return replace(made, schedule_type=sampler.schedule_type) if named else made


def _falling(plan: Schedule) -> Floats:
    """The timesteps of a run from noise to a picture. Raises `RequestError` for one that goes backwards."""
    if plan.timesteps[0] < plan.timesteps[-1]:
        raise RequestError(
            f"{plan.scheduler} goes from a picture to its noise, so denoising_start and denoising_end mean "
            "nothing there; leave them out"
        )
    return plan.timesteps
