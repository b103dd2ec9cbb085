"""Euler's method on the probability flow, plain and ancestral."""

from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from sdfast.errors import RequestError
from sdfast.schedulers.config import SchedulerConfig, SigmaConfig
from sdfast.schedulers.levels import exploding_levels, final_level
from sdfast.schedulers.noise import as_float32, sigma_alphas, sigmas_of
from sdfast.schedulers.prediction import slope
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Schedule, table


class EulerConfig(SigmaConfig):
    scheduler = "EulerDiscreteScheduler"
    sampler_name = "Euler"
    accepts = frozenset({"timesteps", "sigmas"})
    whole_timesteps = False

    prediction_type: Literal["epsilon", "sample", "v_prediction", "original_sample"] = "epsilon"  # type: ignore[assignment]
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @field_validator("prediction_type", mode="before")
    @classmethod
    def _old_name(cls, prediction: Any) -> Any:
        return "sample" if prediction == "original_sample" else prediction

    @property
    def continuous(self) -> bool:
        """Whether the network is told log σ / 4 rather than a timestep: in diffusers, v models only."""
        return self.timestep_type == "continuous" and self.prediction_type == "v_prediction"


class EulerAncestralConfig(SchedulerConfig):
    scheduler = "EulerAncestralDiscreteScheduler"
    sampler_name = "Euler a"
    accepts = frozenset({"sigmas"})

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


def euler(config: EulerConfig, run: Run) -> Schedule:
    """Euler's method on dx/dσ = (x - x0) / σ (Karras et al. 2022, algorithm 2, first order, no churn).

    Log-linear levels are one more than the steps and end at the model's lowest, as in diffusers.
    """
    final = final_level(config.final_sigmas_type, sigmas_of(sigma_alphas(config)))
    t, sigmas = exploding_levels(config, run, final, log_linear=config.interpolation_type == "log_linear")
    if config.continuous:
        if run.timesteps is not None:
            raise RequestError(
                "EulerDiscreteScheduler: custom timesteps and timestep_type='continuous' exclude each other;"
                " give sigmas"
            )
        t = as_float32(np.log(sigmas[:-1]) / 4)  # c_noise of Karras et al. 2022, table 1
    sigma, sigma_next = sigmas[: len(t), None], sigmas[1 : len(t) + 1, None]

    x, m, _ = np.eye(3)
    x_next = x + (sigma_next - sigma) * slope(config, x, m, sigma)
    return table(config, run, t, sigmas, [x_next], exploding=True)


def euler_ancestral(config: EulerAncestralConfig, run: Run) -> Schedule:
    """An Euler step down to σ_down, then fresh noise up to σ_next (k-diffusion, `sample_euler_ancestral`).

    σ_up² + σ_down² = σ_next², with σ_down = σ_next² / σ: the split of DDPM's posterior.
    """
    t, sigmas = exploding_levels(config, run)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    sigma_down = sigma_next**2 / sigma
    sigma_up = sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)

    x, m, z = np.eye(3)
    x_next = x + (sigma_down - sigma) * slope(config, x, m, sigma) + sigma_up * z
    return table(config, run, t, sigmas, [x_next], True, exploding=True)
