"""SA-Solver: stochastic Adams methods, predictor and corrector."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from sdfast.schedulers.config import FLOW, NOT_LINEAR, SigmaConfig
from sdfast.schedulers.levels import lowest_level, open_timesteps, preserving_levels
from sdfast.schedulers.noise import alpha_bar_at, sigma_alphas, sigmas_of
from sdfast.schedulers.prediction import predicted_noise, predicted_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.dpm_solver import LEARNED
from sdfast.schedulers.solvers.exponential import (
    adams,
    along_noise,
    along_x0,
    moments,
    orders,
    remembered,
    visited,
)
from sdfast.schedulers.table import Floats, Schedule, table


class SASolverConfig(SigmaConfig):
    scheduler = "SASolverScheduler"
    sampler_name = "SA-Solver"
    lacks = frozenset({"rescale_betas_zero_snr"})
    refused: ClassVar[Mapping[str, str]] = {
        "thresholding": NOT_LINEAR,
        "use_flow_sigmas": FLOW,
        "variance_type": LEARNED,
    }

    predictor_order: Literal[1, 2, 3, 4] = 2
    corrector_order: Literal[1, 2, 3, 4] = 2
    tau_func: None = None
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction"
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None


def sa_solver(config: SASolverConfig, run: Run) -> Schedule:
    """SA-Solver (Xue et al. 2023, arXiv:2309.05019, algorithm 1).

    Step k first goes once more from level k - 1 to level k, with the same noise, now that the output at k is
    known; from there it goes on to level k + 1. Registers: the predicted latents, the corrected ones of the
    step before, its noise, and the outputs of the steps before.
    """
    t, levels = _levels(config, run)
    steps, k = len(t), np.arange(len(t))
    tau = np.where((t >= 200) & (t <= 800), 1.0, 0.0)  # noise in the middle only: diffusers' default
    predictor = orders(config.predictor_order, run, steps, falling=config.lower_order_final)
    corrector = np.minimum(config.corrector_order, np.maximum(k - run.start + 1, 1))
    if config.lower_order_final:
        corrector = np.minimum(corrector, steps - k + 2)

    depth = max(config.predictor_order, config.corrector_order)
    x, x_before, z_before, *past, m, z = np.eye(depth + 4)
    predicts_x0 = config.algorithm_type == "data_prediction"
    alpha = 1 / np.sqrt(levels[:-1, None] ** 2 + 1)
    predicted = predicted_x0 if predicts_x0 else predicted_noise
    outputs = remembered(
        predicted(config, x, m, alpha, levels[:-1, None] * alpha), np.reshape(past, (-1, len(x)))
    )
    seen = visited(levels, depth)
    along = along_x0 if predicts_x0 else along_noise
    wanted = _flat_slope if predicts_x0 else moments

    again = along(levels[k - 1], levels[:-1], tau[k - 1])
    weights = adams(again, again.at(seen), corrector, wanted)
    corrected = np.where((k > run.start)[:, None], again.cross(x_before, outputs, weights, z_before), x)

    over = along(levels[:-1], levels[1:], tau)
    weights = adams(over, over.at(seen), predictor, wanted)
    x_t = over.cross(corrected, outputs, weights, z)
    kept = [outputs[:, i] for i in range(depth - 1)]
    noise = np.broadcast_to(z, x_t.shape)
    # diffusers adds noise by the timestep, also where it is only the nearest one to the step's level
    noisy = np.sqrt(1 / alpha_bar_at(config, t) - 1)
    return table(config, run, t, noisy, [x_t, corrected, noise, *kept], True)


def _flat_slope(g: Floats, count: int) -> Floats:
    """The moments; between two outputs the slope weighs as if the exponential were 1, as the authors do."""
    G = moments(g, count)
    if count == 2:
        G[:, 1] = g**2 / 2
    return G


def _levels(config: SASolverConfig, run: Run) -> tuple[Floats, Floats]:
    sigmas = sigmas_of(sigma_alphas(config))
    return preserving_levels(
        config,
        open_timesteps(config, run, sigmas, config.lambda_min_clipped),
        run.steps,
        lowest_level(config, sigmas),
        rounded=config.use_karras_sigmas,
    )
