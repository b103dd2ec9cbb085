"""EDM: networks that Karras et al.'s preconditioning turns into denoisers (CosXL, Playground 2.5).

The latents are x0 + σ ε with data of spread σ_data, the network sees c_in x and is told c_noise = log σ / 4,
and x0 = c_skip x + c_out m (Karras et al. 2022, table 1). Its checkpoints' scheduler configs say so.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from sdfast.errors import RequestError
from sdfast.schedulers.config import SchedulerConfig, Thresholding
from sdfast.schedulers.noise import exponential, karras
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.dpm_solver import SHORT_RUN
from sdfast.schedulers.solvers.exponential import Interval, adams, along_x0, moments, orders, visited
from sdfast.schedulers.table import Floats, Schedule, table


class EDMConfig(SchedulerConfig):
    """What the two classes share. Sizes and spacings of a discrete chain mean nothing to them."""

    accepts = frozenset({"sigmas"})
    lacks = frozenset(
        {
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "timestep_spacing",
            "steps_offset",
            "rescale_betas_zero_snr",
        }
    )

    sigma_min: float = Field(0.002, gt=0, allow_inf_nan=False)
    sigma_max: float = Field(80.0, gt=0, allow_inf_nan=False)
    sigma_data: float = Field(0.5, gt=0, allow_inf_nan=False)
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: float = Field(7.0, gt=0, allow_inf_nan=False)
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class EDMEulerConfig(EDMConfig):
    scheduler = "EDMEulerScheduler"
    sampler_name = "EDM Euler"


class EDMDPMConfig(Thresholding, EDMConfig):
    scheduler = "EDMDPMSolverMultistepScheduler"

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    @property
    def sampler(self) -> str:
        kind = f"EDM DPM++ {self.solver_order}M" + (" SDE" if self.tau else "")
        return kind + (" Heun" if self.solver_type == "heun" else "")

    @property
    def tau(self) -> float:
        """How much of the SDE's noise there is: all, or none."""
        return 1.0 if self.algorithm_type == "sde-dpmsolver++" else 0.0

    @field_validator("algorithm_type", mode="before")
    @classmethod
    def _deis_means_dpmpp(cls, algorithm: Any) -> Any:
        return "dpmsolver++" if algorithm == "deis" else algorithm  # as diffusers does

    @field_validator("solver_type", mode="before")
    @classmethod
    def _other_solvers_mean_midpoint(cls, solver: Any) -> Any:
        return "midpoint" if solver in ("logrho", "bh1", "bh2") else solver  # as diffusers does


def edm_euler(config: EDMEulerConfig, run: Run) -> Schedule:
    """Euler's method on dx/dσ = (x - x0) / σ (Karras et al. 2022, algorithm 1, first order)."""
    sigmas = _levels(config, run)
    if config.final_sigmas_type == "sigma_min" and run.sigmas is None:
        sigmas[-1] = sigmas[-2]  # as diffusers' other EDM class does not
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    x, m, _ = np.eye(3)
    x0 = _denoised(config, x, m, sigma)
    return _table(config, run, sigmas, [x0 + sigma_next / sigma * (x - x0)])


def edm_dpm_multistep(config: EDMDPMConfig, run: Run) -> Schedule:
    """DPM-Solver++ (2M, 3M) of the flow or the SDE (Lu et al. 2022b), on x0 + σ ε.

    Registers: the latents, and x0 of the steps before.
    """
    if config.tau and config.solver_order == 3:
        raise RequestError(
            f"{config.scheduler}: algorithm_type='sde-dpmsolver++' has no solver_order=3, here as in"
            " diffusers; take order 2"
        )
    steps = run.steps
    sigmas = _levels(config, run)
    order = orders(config.solver_order, run, steps, falling=config.lower_order_final and steps < SHORT_RUN)
    if config.euler_at_final or config.final_sigmas_type == "zero":
        order[-1] = 1

    x, *past, m, z = np.eye(config.solver_order + 2)
    x0 = _denoised(config, x, m, sigmas[:-1, None])
    D = np.stack([x0, *(np.broadcast_to(register, x0.shape) for register in past)], axis=1)
    over = _exploding(along_x0(sigmas[:-1], sigmas[1:], config.tau))
    weights = adams(over, over.at(visited(sigmas, config.solver_order)), order, partial(_moments, config))
    kept = [D[:, i] for i in range(config.solver_order - 1)]
    return _table(config, run, sigmas, [over.cross(x, D, weights, z), *kept], config.tau > 0)


def _levels(config: EDMConfig, run: Run) -> Floats:
    """Noise levels [K + 1]. Exponential ones are laid out from below, as in diffusers: one is the lowest."""
    low, high = config.sigma_min, config.sigma_max
    if run.sigmas is not None:
        return np.array(run.sigmas)
    if config.sigma_schedule == "karras":
        levels = karras(low, high, run.steps, config.rho)
    else:
        levels = exponential(high, low, run.steps)[::-1]
    return np.append(levels, 0.0 if config.final_sigmas_type == "zero" else low)


def _denoised(config: EDMConfig, x: Floats, m: Floats, sigma: Floats) -> Floats:
    """x0 = c_skip x + c_out m, in rows of coefficients; sigma: [K, 1]."""
    total = sigma**2 + config.sigma_data**2
    c_out = sigma * config.sigma_data / np.sqrt(total)
    c_skip = config.sigma_data**2 / total
    x0: Floats = c_skip * x + (c_out if config.prediction_type == "epsilon" else -c_out) * m
    return x0


def _exploding(over: Interval) -> Interval:
    """The same way, of latents x0 + σ ε instead of α x0 + α σ ε."""
    alpha_s, alpha_t = 1 / np.sqrt(over.s**2 + 1), 1 / np.sqrt(over.t**2 + 1)
    return replace(
        over, keep=over.keep * alpha_s / alpha_t, gain=over.gain / alpha_t, noise=over.noise / alpha_t
    )


def _moments(config: EDMDPMConfig, g: Floats, order: int) -> Floats:
    """What DPM-Solver's formulas make of the integral's moments, as in `dpm_solver`."""
    G = moments(g, order)
    if order == 2 and config.solver_type == "midpoint":
        G[:, 1] = G[:, 0] * g / 2
    if order == 3:
        G[:, 2] /= 2
    return G


def _table(
    config: EDMConfig, run: Run, sigmas: Floats, rows: list[Floats], draws_noise: bool = False
) -> Schedule:
    """The schedule, with EDM's scales: c_in, c_noise, and the first latents."""
    t = np.log(sigmas[:-1]) / 4
    made = table(config, run, t, sigmas, rows, draws_noise, exploding=True)
    c_in = 1 / np.sqrt(sigmas[:-1] ** 2 + config.sigma_data**2)
    top = config.sigma_max if run.sigmas is None else run.sigmas[0]
    return replace(made, input_scale=c_in[run.start :], init_noise_sigma=float(np.sqrt(top**2 + 1)))
