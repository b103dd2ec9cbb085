"""Heun's method on the probability flow: two evaluations a step."""

from typing import Literal

import numpy as np

from sdfast.schedulers.config import Clipping, SigmaConfig
from sdfast.schedulers.levels import exploding_levels
from sdfast.schedulers.prediction import slope
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Schedule, interleaved, table


class HeunConfig(Clipping, SigmaConfig):
    scheduler = "HeunDiscreteScheduler"
    sampler_name = "Heun"
    accepts = frozenset({"timesteps", "sigmas"})
    whole_timesteps = False
    lacks = frozenset({"rescale_betas_zero_snr"})

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"  # type: ignore[assignment]


def heun(config: HeunConfig, run: Run) -> Schedule:
    """Heun's method on dx/dσ (Karras et al. 2022, algorithm 2, no churn): K steps, 2K - 1 evaluations.

    The first evaluation takes an Euler step to σ_next, the second goes there again with the mean of both
    slopes. Registers: the latents, and those latents with half of the first slope, where the second starts.
    """
    t, sigmas = exploding_levels(config, run)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    dt = sigma_next - sigma

    x, half_way, m, _ = np.eye(4)
    d = slope(config, x, m, sigma)
    d_next = slope(config, x, m, sigma_next[:-1])
    x_next = interleaved(x + dt * d, half_way + dt[:-1] / 2 * d_next)
    kept = interleaved(x + dt / 2 * d, half_way)
    levels = interleaved(sigmas[:-1], sigmas[1:-1])
    return table(
        config, run, interleaved(t, t[1:]), levels, [x_next, kept], exploding=True, start=2 * run.start
    )
