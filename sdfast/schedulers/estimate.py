"""The clean latents that a run would arrive at, as its network sees them in the middle: for previews."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdfast.schedulers.config import read
from sdfast.schedulers.noise import sigma_alphas, sigmas_of
from sdfast.schedulers.prediction import predicted_x0
from sdfast.schedulers.solvers import SOLVERS
from sdfast.schedulers.solvers.edm import EDMConfig
from sdfast.schedulers.table import Schedule


def clean_estimate(plan: Schedule, k: int, config: Mapping[str, Any]) -> tuple[float, float] | None:
    """(a, b), so that a · latents + b · m is the estimate of the clean latents at step k.

    latents: register 0 before the step. m: its model output after guidance. config: what `plan` was made of.
    Where the network's input is scaled, the scale says the noise level; elsewhere the timestep does, which
    some schedulers round: there the estimate is as far off as that. None for a schedule whose network does
    not predict by a chain's levels (EDM), or that was taken from a scheduler object.
    """
    if plan.scheduler not in SOLVERS:
        return None
    settings = read(SOLVERS[plan.scheduler][0], config, {})
    if isinstance(settings, EDMConfig):
        return None
    scale, sigmas = plan.input_scale[k], sigmas_of(sigma_alphas(settings))
    level = np.interp(plan.timesteps[k], np.arange(len(sigmas)), sigmas)
    alpha = 1 / np.sqrt(level**2 + 1) if scale == 1 else scale
    x, m = np.eye(2)
    alphas, levels = np.array([[alpha]]), np.sqrt(1 - np.array([[alpha]]) ** 2)
    a, b = predicted_x0(settings, scale * x, m, alphas, levels)[0]
    return float(a), float(b)
