"""DPM-Solver++ of the SDE, singlestep: two evaluations a step, and noise along a Brownian motion."""

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from sdfast.schedulers.config import SigmaConfig
from sdfast.schedulers.levels import exploding_levels
from sdfast.schedulers.noise import sigma_alphas, sigma_to_t, sigmas_of
from sdfast.schedulers.prediction import exploding_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Brownian, Floats, Schedule, interleaved, table


class DPMSDEConfig(SigmaConfig):
    scheduler = "DPMSolverSDEScheduler"
    sampler_name = "DPM++ SDE"
    accepts = frozenset({"sigmas"})
    lacks = frozenset({"rescale_betas_zero_snr"})

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    noise_sampler_seed: int | None = Field(None, ge=0)

    @property
    def schedule_type(self) -> str:
        """ "Automatic" means Karras for this sampler, so plain is "Uniform"."""
        return self.respacing or "Uniform"

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Karras levels of this class keep to the run's own bounds, in diffusers; other layouts do not."""
        return (None, None) if self.use_karras_sigmas else super().bounds


def dpmpp_sde(config: DPMSDEConfig, run: Run) -> Schedule:
    """DPM-Solver++(2S) of the SDE, in σ (k-diffusion, `sample_dpmpp_sde`, r = 1/2, η = 1).

    Both evaluations go down from σ, the first half way to σ_next in log σ, the second, with what the network
    says there, all the way: to σ_down, and with noise from there up to where they go, as an ancestral step
    does. The noise is the increment of one Brownian motion over the levels that an evaluation crosses, so
    that of the second holds that of the first. Registers: the latents, and where a step began.
    """
    t, sigmas = exploding_levels(config, run, rounded=False)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    middle = np.sqrt(sigma * sigma_next)

    x, start, m, z = np.eye(4)
    first = _ancestral(sigma, middle, x, exploding_x0(config, x, m, sigma), z)
    x0_middle = exploding_x0(config, x, m, middle[:-1])
    x_next = interleaved(first, _ancestral(sigma[:-1], sigma_next[:-1], start, x0_middle, z))
    levels = interleaved(sigmas[:-1], middle[:-1, 0])
    t_middle = sigma_to_t(middle[:-1, 0], np.log(sigmas_of(sigma_alphas(config))))
    row = np.arange(len(levels))
    second = row % 2 == 1
    made = table(
        config,
        run,
        interleaved(t, t_middle),
        levels,
        [x_next, np.where(second[:, None], start, x)],
        row < len(row) - 1,
        exploding=True,
        start=2 * run.start,
        noised=interleaved(sigmas[:-1], sigmas[1:-1]),  # diffusers knows no level half way there
    )
    run_rows = row[2 * run.start :]
    motion = Brownian(
        span=(float(sigmas[sigmas > 0].min()), float(sigmas.max())),
        crossed=np.stack([sigmas[run_rows // 2], sigmas[run_rows // 2 + 1]], axis=1),
        half=run_rows % 2 == 0,
        seed=config.noise_sampler_seed,
    )
    return replace(made, brownian=motion)


def _ancestral(sigma: Floats, sigma_to: Floats, x: Floats, x0: Floats, z: Floats) -> Floats:
    """From σ down to σ_to² / σ on the line from x to x0, then noise up to σ_to; all in rows [K, columns]."""
    down = sigma_to**2 / sigma
    up = sigma_to * np.sqrt(1 - (sigma_to / sigma) ** 2)
    reached: Floats = x0 + down / sigma * (x - x0) + up * z
    return reached
