"""DEIS: the Adams-Bashforth method of an exponential integrator."""

from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from sdfast.schedulers.config import DynamicShifting, SigmaConfig, Thresholding
from sdfast.schedulers.levels import preserving_levels
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.dpm_solver import SHORT_RUN
from sdfast.schedulers.solvers.exponential import adams, along, known, moments, orders, visited
from sdfast.schedulers.table import Schedule, table


class DEISConfig(Thresholding, DynamicShifting, SigmaConfig):
    scheduler = "DEISMultistepScheduler"
    sampler_name = "DEIS"
    accepts = frozenset({"sigmas"})
    ends_noisy = True
    lacks = frozenset({"rescale_betas_zero_snr"})

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["deis"] = "deis"
    solver_type: Literal["logrho"] = "logrho"
    lower_order_final: bool = True

    @field_validator("algorithm_type", mode="before")
    @classmethod
    def _dpm_means_deis(cls, algorithm: Any) -> Any:
        return "deis" if algorithm in ("dpmsolver", "dpmsolver++") else algorithm  # as diffusers does

    @field_validator("solver_type", mode="before")
    @classmethod
    def _other_solvers_mean_logrho(cls, solver: Any) -> Any:
        return "logrho" if solver in ("midpoint", "heun", "bh1", "bh2") else solver  # as diffusers does


def deis(config: DEISConfig, run: Run) -> Schedule:
    """DEIS-ρAB with ρ = e^{-λ} (Zhang and Chen 2022, arXiv:2204.13902): ε as a polynomial in log ρ.

    Registers: the latents, and ε of the steps before. Ends at the lowest level, not at none.
    """
    t, levels = preserving_levels(config, run, "run", rounded=config.use_karras_sigmas)
    short = config.lower_order_final and len(t) < SHORT_RUN
    order = orders(config.solver_order, run, len(t), falling=short)

    x, *past, m, z = np.eye(config.solver_order + 2)
    eps = known(config, x, m, past, levels, of_x0=False)
    over = along(levels[:-1], levels[1:], of_x0=False)
    weights = adams(over, over.at(visited(levels, config.solver_order)), order, moments)
    kept = [eps[:, i] for i in range(config.solver_order - 1)]
    return table(config, run, t, levels, [over.cross(x, eps, weights, z), *kept])
