"""DPM-Solver and DPM-Solver++, singlestep: up to three evaluations make one step of that order."""

from typing import Literal

import numpy as np

from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.dpm_solver import DPMConfig, check_end, dpm_levels, second_order
from sdfast.schedulers.solvers.exponential import Interval, Ints, along, known, quadrature, visited
from sdfast.schedulers.table import Floats, Schedule, table


class DPMSinglestepConfig(DPMConfig):
    scheduler = "DPMSolverSinglestepScheduler"
    letter = "S"
    lacks = frozenset({"timestep_spacing", "steps_offset", "rescale_betas_zero_snr"})

    algorithm_type: Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++"] = "dpmsolver++"
    lower_order_final: bool = False


def dpm_singlestep(config: DPMSinglestepConfig, run: Run) -> Schedule:
    """DPM-Solver-2 and -3 and DPM-Solver++(2S) (Lu et al. 2022a, algorithms 1 and 2; 2022b, algorithm 1).

    As in diffusers the points in between are levels of the run, so that K counts evaluations: a step of
    order 1 goes to the next level, then one of order 2 from the same latents to the level after it, then one
    of order 3. Registers: the latents, those that the step began with, and its outputs so far.
    """
    check_end(config)
    t, levels = dpm_levels(config, run, rounded=config.use_karras_sigmas)
    order = _orders(config, run, len(t))
    k = np.arange(len(t))

    x, begun, *past, m, z = np.eye(config.solver_order + 3)
    x_s = np.where(order[:, None] == 1, x, begun)
    D = known(config, x, m, past, levels, of_x0=config.of_x0)
    over = along(levels[k - order + 1], levels[1:], config.tau, of_x0=config.of_x0)
    weights = _weights(config, over, over.at(visited(levels, config.solver_order)), order)
    kept = [D[:, i] for i in range(config.solver_order - 1)]
    return table(config, run, t, levels, [over.cross(x_s, D, weights, z), x_s, *kept], config.tau > 0)


def _orders(config: DPMSinglestepConfig, run: Run, steps: int) -> Ints:
    """1, 2, .. up to the order, again and again, [K]; what is left at the end is done in lower orders."""
    highest = config.solver_order
    order = np.arange(steps) % highest + 1
    whole = config.lower_order_final and steps % highest == 0
    if whole or config.final_sigmas_type == "zero":
        order[-1] = 1
    evaluated = np.arange(steps) - run.start + 1
    return np.minimum(order, np.maximum(evaluated, 1))


def _weights(config: DPMSinglestepConfig, over: Interval, nodes: Floats, order: Ints) -> Floats:
    """Weights [K, P] of the outputs, newest first; the oldest one taken is that of the step's beginning.

    `midpoint` of order 3 only looks at the newest and the oldest (Lu et al. 2022a, algorithm 2).
    """
    weights = np.zeros_like(nodes)
    for p in np.unique(order):
        k = np.flatnonzero(order == p)[:, None]
        taken = np.array([0, 2]) if p == 3 and config.solver_type == "midpoint" else np.arange(p)
        g = over.g[k[:, 0], 0]
        G = second_order(config, g, int(p))
        if p == 3 and config.tau:
            G[:, 2] = 2 * G[:, 1] + g**2  # a sign of diffusers' own, kept
        weights[k, taken] = quadrature(nodes[k, taken], G[:, : len(taken)])
    return weights
