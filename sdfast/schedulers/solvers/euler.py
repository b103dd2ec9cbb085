"""Euler's method on the probability flow, plain and ancestral."""

from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from sdfast.schedulers.config import SchedulerConfig, SigmaConfig
from sdfast.schedulers.levels import exploding_levels, final_level
from sdfast.schedulers.noise import sigma_alphas, sigmas_of
from sdfast.schedulers.prediction import predicted_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Schedule, table


class EulerConfig(SigmaConfig):
    scheduler = "EulerDiscreteScheduler"
    sampler_name = "Euler"
    accepts = frozenset({"timesteps", "sigmas"})

    prediction_type: Literal["epsilon", "sample", "v_prediction", "original_sample"] = "epsilon"  # type: ignore[assignment]
    interpolation_type: Literal["linear"] = "linear"
    timestep_type: Literal["discrete"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @field_validator("prediction_type", mode="before")
    @classmethod
    def _old_name(cls, prediction: Any) -> Any:
        return "sample" if prediction == "original_sample" else prediction


class EulerAncestralConfig(SchedulerConfig):
    scheduler = "EulerAncestralDiscreteScheduler"
    sampler_name = "Euler a"

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


def euler(config: EulerConfig, run: Run) -> Schedule:
    """Euler's method on dx/dσ = (x - x0) / σ (Karras et al. 2022, algorithm 2, first order, no churn)."""
    final = final_level(config.final_sigmas_type, sigmas_of(sigma_alphas(config)))
    t, sigmas = exploding_levels(config, run, final)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    scale = 1 / np.sqrt(sigma**2 + 1)

    x, m, _ = np.eye(3)
    x0 = predicted_x0(config, scale * x, m, scale, scale * sigma)
    d = (x - x0) / sigma
    x_next = x + (sigma_next - sigma) * d
    return table(config, run, t, sigmas, [x_next], exploding=True)


def euler_ancestral(config: EulerAncestralConfig, run: Run) -> Schedule:
    """An Euler step down to σ_down, then fresh noise up to σ_next (k-diffusion, `sample_euler_ancestral`).

    σ_up² + σ_down² = σ_next², with σ_down = σ_next² / σ: the split of DDPM's posterior.
    """
    t, sigmas = exploding_levels(config, run)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    scale = 1 / np.sqrt(sigma**2 + 1)
    sigma_down = sigma_next**2 / sigma
    sigma_up = sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)

    x, m, z = np.eye(3)
    x0 = predicted_x0(config, scale * x, m, scale, scale * sigma)
    d = (x - x0) / sigma
    x_next = x + (sigma_down - sigma) * d + sigma_up * z
    return table(config, run, t, sigmas, [x_next], True, exploding=True)
