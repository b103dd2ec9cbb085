"""SA-Solver: stochastic Adams methods, predictor and corrector."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from sdfast.schedulers.config import FlowSigmas, SigmaConfig, Thresholding
from sdfast.schedulers.levels import preserving_levels
from sdfast.schedulers.noise import alpha_bar_at
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.dpm_solver import LEARNED
from sdfast.schedulers.solvers.exponential import Ints, adams, along, known, moments, orders, visited
from sdfast.schedulers.table import Floats, Schedule, table


class SASolverConfig(Thresholding, FlowSigmas, SigmaConfig):
    scheduler = "SASolverScheduler"
    sampler_name = "SA-Solver"
    accepts = frozenset({"sigmas"})
    ends_noisy = True
    lacks = frozenset({"rescale_betas_zero_snr"})
    refused: ClassVar[Mapping[str, str]] = {"variance_type": LEARNED}

    predictor_order: Literal[1, 2, 3, 4] = 2
    corrector_order: Literal[1, 2, 3, 4] = 2
    tau_func: None = None
    algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction"
    lower_order_final: bool = True
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None


def sa_solver(config: SASolverConfig, run: Run) -> Schedule:
    """SA-Solver (Xue et al. 2023, arXiv:2309.05019, algorithm 1).

    Step k first goes once more from level k - 1 to level k, with the same noise, now that the output at k is
    known; from there it goes on to level k + 1. Registers: the predicted latents, the corrected ones of the
    step before, its noise, and the outputs of the steps before.
    """
    t, levels = preserving_levels(
        config, run, "run", rounded=config.use_karras_sigmas, clipped=config.lambda_min_clipped
    )
    k = np.arange(len(t))
    tau = np.where((t >= 200) & (t <= 800), 1.0, 0.0)  # noise in the middle only: diffusers' default
    of_x0 = config.algorithm_type == "data_prediction"
    wanted = _flat_slope if of_x0 else moments

    depth = max(config.predictor_order, config.corrector_order)
    x, x_before, z_before, *past, m, z = np.eye(depth + 4)
    D = known(config, x, m, past, levels, of_x0=of_x0)
    seen = visited(levels, depth)

    again = along(levels[k - 1], levels[:-1], tau[k - 1], of_x0=of_x0)
    weights = adams(again, again.at(seen), _corrector_orders(config, run, len(t)), wanted)
    corrected = np.where((k > run.start)[:, None], again.cross(x_before, D, weights, z_before), x)

    over = along(levels[:-1], levels[1:], tau, of_x0=of_x0)
    order = orders(config.predictor_order, run, len(t), falling=config.lower_order_final)
    x_t = over.cross(corrected, D, adams(over, over.at(seen), order, wanted), z)
    kept = [D[:, i] for i in range(depth - 1)]
    # diffusers adds noise by the timestep, also where it is only the nearest one to the step's level
    noisy = levels if run.sigmas else np.sqrt(1 / alpha_bar_at(config, t) - 1)
    return table(config, run, t, noisy, [x_t, corrected, np.broadcast_to(z, x_t.shape), *kept], True)


def _corrector_orders(config: SASolverConfig, run: Run, steps: int) -> Ints:
    """How many outputs each step's corrector uses, its own among them: [K]."""
    k = np.arange(steps)
    order = np.minimum(config.corrector_order, k - run.start + 1)
    if config.lower_order_final:
        order = np.minimum(order, steps - k + 2)
    return np.maximum(order, 1)


def _flat_slope(g: Floats, count: int) -> Floats:
    """The moments; between two outputs the slope weighs as if the exponential were 1, as the authors do."""
    G = moments(g, count)
    if count == 2:
        G[:, 1] = g**2 / 2
    return G
