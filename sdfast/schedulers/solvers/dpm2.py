"""DPM-Solver-2, plain and ancestral: two evaluations a step, the second half way in log σ."""

from typing import Literal

import numpy as np

from sdfast.schedulers.config import SigmaConfig
from sdfast.schedulers.levels import exploding_levels
from sdfast.schedulers.noise import sigma_alphas, sigma_to_t, sigmas_of
from sdfast.schedulers.prediction import slope
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Floats, Schedule, interleaved, table


class DPM2Config(SigmaConfig):
    scheduler = "KDPM2DiscreteScheduler"
    sampler_name = "DPM2"
    accepts = frozenset({"sigmas"})
    lacks = frozenset({"rescale_betas_zero_snr"})

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"

    @property
    def schedule_type(self) -> str:
        """ "Automatic" means Karras for these samplers, so plain is "Uniform"."""
        return self.respacing or "Uniform"


class DPM2AncestralConfig(DPM2Config):
    scheduler = "KDPM2AncestralDiscreteScheduler"
    sampler_name = "DPM2 a"


def dpm2(config: DPM2Config, run: Run) -> Schedule:
    """DPM-Solver-2 in σ (k-diffusion, `sample_dpm_2`): the slope half way in log σ serves it all."""
    t, sigmas = _levels(config, run)
    return _midpoint(config, run, t, sigmas, sigma_down=sigmas[1:], sigma_up=np.zeros(len(t)))


def dpm2_ancestral(config: DPM2AncestralConfig, run: Run) -> Schedule:
    """A DPM-Solver-2 step down to σ_down, then noise up to σ_next (k-diffusion, `sample_dpm_2_ancestral`).

    σ_up² + σ_down² = σ_next², with σ_down = σ_next² / σ: the split of DDPM's posterior.
    """
    t, sigmas = _levels(config, run)
    sigma_down = sigmas[1:] ** 2 / sigmas[:-1]
    sigma_up = sigmas[1:] * np.sqrt(1 - (sigmas[1:] / sigmas[:-1]) ** 2)
    return _midpoint(config, run, t, sigmas, sigma_down, sigma_up, draws_noise=True)


def _levels(config: DPM2Config, run: Run) -> tuple[Floats, Floats]:
    """Timesteps [K], which diffusers rounds for Karras levels, and noise levels [K + 1]."""
    t, sigmas = exploding_levels(config, run)
    return t.round() if config.use_karras_sigmas else t, sigmas


def _midpoint(
    config: DPM2Config,
    run: Run,
    t: Floats,
    sigmas: Floats,
    sigma_down: Floats,
    sigma_up: Floats,
    draws_noise: bool = False,
) -> Schedule:
    """Midpoint steps σ → σ_down, then noise σ_up, [K] each. Registers: the latents, where a step began."""
    sigma, down, up = sigmas[:-1, None], sigma_down[:, None], sigma_up[:-1, None]
    middle = np.sqrt(sigma * down)

    x, start, m, z = np.eye(4)
    d = slope(config, x, m, sigma)
    d_middle = slope(config, x, m, middle[:-1])
    x_next = interleaved(x + (middle - sigma) * d, start + (down - sigma)[:-1] * d_middle + up * z)
    levels = interleaved(sigma[:, 0], middle[:-1, 0])
    t_middle = sigma_to_t(middle[:-1, 0], np.log(sigmas_of(sigma_alphas(config))))
    second = np.arange(len(levels)) % 2 == 1
    return table(
        config,
        run,
        interleaved(t, t_middle),
        levels,
        [x_next, np.where(second[:, None], start, x)],
        second & draws_noise,
        exploding=True,
        start=2 * run.start,
        noised=interleaved(sigmas[:-1], sigmas[1:-1]),  # diffusers knows no level half way there
    )
