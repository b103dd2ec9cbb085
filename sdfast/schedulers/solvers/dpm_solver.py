"""DPM-Solver and DPM-Solver++, multistep: of the flow and of the SDE, orders 1 to 3.

Lu et al. 2022a: arXiv:2206.00927, DPM-Solver; 2022b: arXiv:2211.01095, DPM-Solver++.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import field_validator

from sdfast.errors import RequestError
from sdfast.schedulers.config import DynamicShifting, SigmaConfig, Thresholding
from sdfast.schedulers.levels import Final, preserving_levels
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.exponential import adams, along, known, moments, orders, visited
from sdfast.schedulers.table import Floats, Schedule, table

LEARNED = "models that predict a variance are not supported; set it to null"
SHORT_RUN = 15  # steps: diffusers lowers the order at the end of shorter runs


class DPMConfig(Thresholding, DynamicShifting, SigmaConfig):
    """What the multistep and the singlestep class share."""

    accepts = frozenset({"timesteps", "sigmas"})
    refused: ClassVar[Mapping[str, str]] = {"variance_type": LEARNED}
    letter: ClassVar[str]  # how AUTOMATIC1111's names tell the two apart

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None

    @property
    def sampler(self) -> str:
        """ "DPM++ 2M SDE Heun": algorithm, order, multistep or singlestep, with noise, variant."""
        family = "DPM++" if self.of_x0 else "DPM-Solver"
        kind = f"{family} {self.solver_order}{self.letter}" + (" SDE" if self.tau else "")
        return kind + (" Heun" if self.solver_type == "heun" else "")

    @property
    def schedule_type(self) -> str:
        """ "Automatic" means Karras for DPM++ 2M, so plain is "Uniform"."""
        return self.respacing or "Uniform"

    @property
    def of_x0(self) -> bool:
        """Whether D is x0, as in DPM-Solver++; else it is the noise."""
        return self.algorithm_type.endswith("++")

    @property
    def tau(self) -> float:
        """How much of the SDE's noise there is: all, or none."""
        return 1.0 if self.algorithm_type.startswith("sde") else 0.0

    @field_validator("algorithm_type", mode="before")
    @classmethod
    def _deis_means_dpmpp(cls, algorithm: Any) -> Any:
        return "dpmsolver++" if algorithm == "deis" else algorithm  # as diffusers does

    @field_validator("solver_type", mode="before")
    @classmethod
    def _other_solvers_mean_midpoint(cls, solver: Any) -> Any:
        return "midpoint" if solver in ("logrho", "bh1", "bh2") else solver  # as diffusers does


class DPMSolverConfig(DPMConfig):
    scheduler = "DPMSolverMultistepScheduler"
    letter = "M"

    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool = False

    @property
    def respacing(self) -> str | None:
        return super().respacing or ("Lu" if self.use_lu_lambdas else None)


def dpm_multistep(config: DPMSolverConfig, run: Run) -> Schedule:
    """DPM-Solver and DPM-Solver++ (2M, 3M) (Lu et al. 2022a, 2022b), and with noise (2022b, section 5).

    Registers: the latents, and the outputs of the steps before.
    """
    check_end(config)
    if config.algorithm_type == "sde-dpmsolver" and config.solver_order == 3:
        raise RequestError(
            "DPMSolverMultistepScheduler: algorithm_type='sde-dpmsolver' has no solver_order=3, here as in"
            " diffusers; take 'sde-dpmsolver++', or order 2"
        )
    whole = config.use_karras_sigmas or config.use_lu_lambdas
    t, levels = dpm_levels(config, run, rounded=whole and config.beta_schedule != "squaredcos_cap_v2")
    short = config.lower_order_final and len(t) < SHORT_RUN
    order = orders(config.solver_order, run, len(t), falling=short)
    if config.euler_at_final or config.final_sigmas_type == "zero":
        order[-1] = 1

    x, *past, m, z = np.eye(config.solver_order + 2)
    D = known(config, x, m, past, levels, of_x0=config.of_x0)
    over = along(levels[:-1], levels[1:], config.tau, of_x0=config.of_x0)
    weights = adams(over, over.at(visited(levels, config.solver_order)), order, partial(_moments, config))
    kept = [D[:, i] for i in range(config.solver_order - 1)]
    return table(config, run, t, levels, [over.cross(x, D, weights, z), *kept], config.tau > 0)


def _moments(config: DPMSolverConfig, g: Floats, order: int) -> Floats:
    """What DPM-Solver's multistep formulas make of the integral's moments.

    The third-order step weighs the curvature with half of its moment, as its authors' code does. With noise
    diffusers has a sign of its own there, which is kept.
    """
    G = second_order(config, g, order)
    if order == 3:
        G[:, 2] = G[:, 1] + g**2 / 2 if config.tau else G[:, 2] / 2
    return G


def second_order(config: DPMConfig, g: Floats, order: int) -> Floats:
    """The moments, and for order 2 `midpoint`'s: D's slope as if it acted in the middle of the step.

    `heun` has the exact ones.
    """
    G = moments(g, order)
    if order == 2 and config.solver_type == "midpoint":
        G[:, 1] = G[:, 0] * g / 2
    return G


def dpm_levels(config: DPMConfig, run: Run, *, rounded: bool) -> tuple[Floats, Floats]:
    """Timesteps [K] and noise levels σ/α [K + 1]."""
    final: Final = "zero" if config.final_sigmas_type == "zero" else "model"
    return preserving_levels(config, run, final, rounded=rounded, clipped=config.lambda_min_clipped)


def check_end(config: DPMConfig) -> None:
    """The integral over the noise does not end where there is none."""
    if not config.of_x0 and config.final_sigmas_type == "zero":
        raise RequestError(
            f"{config.scheduler}: algorithm_type={config.algorithm_type!r} cannot go to"
            " final_sigmas_type='zero', here as in diffusers; set it to 'sigma_min', or take algorithm_type"
            " 'dpmsolver++'"
        )
