"""DPM-Solver++, multistep."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from sdfast.schedulers.config import FLOW, NOT_LINEAR, SigmaConfig
from sdfast.schedulers.levels import final_level, open_timesteps, preserving_levels
from sdfast.schedulers.noise import sigma_alphas, sigmas_of
from sdfast.schedulers.prediction import predicted_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Schedule, table


class DPMSolverConfig(SigmaConfig):
    scheduler = "DPMSolverMultistepScheduler"
    accepts = frozenset({"timesteps"})
    refused: ClassVar[Mapping[str, str]] = {
        "thresholding": NOT_LINEAR,
        "use_lu_lambdas": "set it to false",
        "use_flow_sigmas": FLOW,
        "use_dynamic_shifting": FLOW,
        "variance_type": "models that predict a variance are not supported; set it to null",
    }

    solver_order: Literal[1, 2] = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    @property
    def sampler(self) -> str:
        return f"DPM++ {self.solver_order}M" + (" Heun" if self.solver_type == "heun" else "")

    @property
    def schedule_type(self) -> str:
        """ "Automatic" means Karras for DPM++ 2M, so plain is "Uniform"."""
        return self.respacing or "Uniform"

    @field_validator("algorithm_type", mode="before")
    @classmethod
    def _deis_means_dpmpp(cls, algorithm: Any) -> Any:
        return "dpmsolver++" if algorithm == "deis" else algorithm  # as diffusers does

    @field_validator("solver_type", mode="before")
    @classmethod
    def _other_solvers_mean_midpoint(cls, solver: Any) -> Any:
        return "midpoint" if solver in ("logrho", "bh1", "bh2") else solver  # as diffusers does


def dpmpp_2m(config: DPMSolverConfig, run: Run) -> Schedule:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), or its first order, which is DDIM in log-SNR time.

    From level s to level t, with λ = log(α / σ), h = λ_t - λ_s and h_0 the step before:
    x_t = σ_t / σ_s x - α_t (e^{-h} - 1) D, where D is x0 extrapolated along its last difference.
    `heun` weighs that difference by the exact integral of the exponential, `midpoint` by half a step's.
    """
    sigmas = sigmas_of(sigma_alphas(config))
    t, levels = preserving_levels(
        config,
        open_timesteps(config, run, sigmas, config.lambda_min_clipped),
        run.steps,
        final_level(config.final_sigmas_type, sigmas),
        rounded=config.use_karras_sigmas and config.beta_schedule != "squaredcos_cap_v2",
    )
    alphas = 1 / np.sqrt(levels**2 + 1)
    sigmas = levels * alphas
    h = -np.diff(np.log(levels))  # log σ/α = -λ; the last step may go to λ = ∞
    h_0 = np.append(np.inf, h[:-1])
    e = np.expm1(-h)
    slope = e + h if config.solver_type == "heun" else -e * h / 2
    slope = np.divide(slope, h_0, out=np.zeros_like(h), where=_second_order(config, run, len(t)))

    x, x0_prev, m, _ = np.eye(4)
    x0 = predicted_x0(config, x, m, alphas[:-1, None], sigmas[:-1, None])
    x_t = (
        (sigmas[1:] / sigmas[:-1])[:, None] * x
        - (alphas[1:] * e)[:, None] * x0
        + (alphas[1:] * slope)[:, None] * (x0 - x0_prev)
    )
    return table(config, run, t, levels, [x_t, x0])


def _second_order(config: DPMSolverConfig, run: Run, steps: int) -> NDArray[np.bool_]:
    """[K], where the second-order update is used: there is a step before, and the last is not too steep."""
    second = np.full(steps, config.solver_order == 2)
    second[run.start] = False
    few = config.lower_order_final and steps < 15
    if config.euler_at_final or few or config.final_sigmas_type == "zero":
        second[-1] = False
    return second
