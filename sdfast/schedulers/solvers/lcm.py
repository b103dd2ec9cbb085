"""Latent consistency models: every evaluation goes all the way to x0, and noise brings it back."""

from typing import Literal

import numpy as np
from pydantic import Field

from sdfast.errors import RequestError
from sdfast.schedulers.config import Clipping, SchedulerConfig, Thresholding
from sdfast.schedulers.noise import alpha_bar_at
from sdfast.schedulers.prediction import predicted_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Floats, Schedule, table

SIGMA_DATA = 0.5  # the spread of the data that the boundary condition is written for


class DistilledConfig(Clipping, Thresholding, SchedulerConfig):
    """The fields of classes for models distilled on a few of the chain's timesteps (LCM, TCD).

    original_inference_steps: how many those were. A run takes some of them.
    """

    accepts = frozenset({"timesteps"})

    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    original_inference_steps: int = Field(50, ge=1)
    set_alpha_to_one: bool = True
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    timestep_scaling: float = Field(10.0, ge=0, allow_inf_nan=False)


class LCMConfig(DistilledConfig):
    scheduler = "LCMScheduler"
    sampler_name = "LCM"


def lcm(config: LCMConfig, run: Run) -> Schedule:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3): x0, then noise anew.

    f(x, t) = c_skip x + c_out x0, with c_skip = σ_d² / (s² + σ_d²), c_out = s / √(s² + σ_d²) and s = t times
    `timestep_scaling` (appendix C): the boundary condition f(x, 0) = x. The last step adds no noise.
    """
    t = distilled_timesteps(config, run)
    alpha_bar = alpha_bar_at(config, t)
    alpha_bar_prev = np.append(alpha_bar[1:], 1.0)[:, None]
    alpha_bar = alpha_bar[:, None]
    s = t[:, None] * config.timestep_scaling
    c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
    c_out = s / np.sqrt(s**2 + SIGMA_DATA**2)

    x, m, z = np.eye(3)
    x0 = predicted_x0(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    denoised = c_skip * x + c_out * x0
    x_prev = np.sqrt(alpha_bar_prev) * denoised + np.sqrt(1 - alpha_bar_prev) * z
    draws_noise = np.arange(len(t)) < len(t) - 1
    return table(config, run, t, np.sqrt(1 / alpha_bar - 1)[:, 0], [x_prev], draws_noise)


def distilled_timesteps(config: DistilledConfig, run: Run) -> Floats:
    """K of the timesteps that the model was distilled on, falling, spread evenly over them: [K] float64."""
    if run.timesteps is not None:
        return np.array(run.timesteps)
    T, original = config.num_train_timesteps, config.original_inference_steps
    if original > T:
        raise RequestError(
            f"{config.scheduler}: original_inference_steps={original} is more than the {T} timesteps that the"
            " model was trained on; lower it in the scheduler config"
        )
    if run.steps > original:
        raise RequestError(
            f"{config.scheduler}: {run.steps} steps, but the model was distilled on {original} timesteps"
            f" (original_inference_steps); take at most {original} steps"
        )
    distilled = np.arange(original, 0, -1) * (T // original) - 1
    chosen = np.floor(np.linspace(0, original, run.steps, endpoint=False)).astype(np.intp)
    return distilled[chosen].astype(np.float64)
