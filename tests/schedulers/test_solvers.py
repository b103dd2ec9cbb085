"""The exponential integrators against diffusers: DPM-Solver, DEIS, UniPC, SA-Solver."""

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal, localcontext
from itertools import cycle
from typing import Any

import diffusers
import numpy as np
import pytest

from sdfast.errors import RequestError
from sdfast.schedulers import schedule
from sdfast.schedulers.noise import exponential
from sdfast.schedulers.solvers.exponential import adams, along, moments, visited
from tests.schedulers.diffusers_map import (
    NOISE_SCHEDULES,
    PREDICTIONS,
    SPACINGS,
    STABLE_DIFFUSION,
    STEPS,
    Case,
    assert_case,
    assert_every,
    assert_same_map,
    of_cases,
)

MULTISTEP = "DPMSolverMultistepScheduler"
SINGLESTEP = "DPMSolverSinglestepScheduler"
DEIS = "DEISMultistepScheduler"
UNIPC = "UniPCMultistepScheduler"
SA = "SASolverScheduler"

SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
ON_NOISE = {"algorithm_type": "dpmsolver", **SIGMA_MIN}
SDE_ON_NOISE = {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN}
HEUN = {"solver_type": "heun"}
KARRAS = {"use_karras_sigmas": True}
LAYOUTS = [KARRAS, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
CLIPPED = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    MULTISTEP: [
        {},
        {"solver_order": 1},
        HEUN,
        {"solver_order": 3},
        {"solver_order": 3, "lower_order_final": False, **SIGMA_MIN},
        {"lower_order_final": False},
        {"euler_at_final": True, **SIGMA_MIN},
        SIGMA_MIN,
        {"lower_order_final": False, **SIGMA_MIN},
        {**KARRAS, **SIGMA_MIN},
        {**KARRAS, **HEUN},
        *LAYOUTS,
        {"use_lu_lambdas": True},
        {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"solver_type": "logrho"},
        {"algorithm_type": "deis", **SIGMA_MIN},
        SDE,
        {**SDE, "solver_order": 1},
        {**SDE, **HEUN},
        {**SDE, "solver_order": 3},
        {**SDE, **KARRAS},
        ON_NOISE,
        {**ON_NOISE, "solver_order": 1},
        {**ON_NOISE, **HEUN},
        {**ON_NOISE, "solver_order": 3},
        {**ON_NOISE, "use_lu_lambdas": True},
        SDE_ON_NOISE,
        {**SDE_ON_NOISE, "solver_order": 1},
        {**SDE_ON_NOISE, **HEUN},
        CLIPPED,
    ],
    SINGLESTEP: [
        {},
        {"solver_order": 1},
        HEUN,
        {"solver_order": 3},
        {"solver_order": 3, **HEUN},
        {"lower_order_final": True, **SIGMA_MIN},
        SIGMA_MIN,
        {"solver_order": 3, **SIGMA_MIN},
        *LAYOUTS,
        SDE,
        {**SDE, **HEUN},
        {**SDE, "solver_order": 3},
        {**SDE, "solver_order": 3, **HEUN},
        ON_NOISE,
        {**ON_NOISE, **HEUN},
        {**ON_NOISE, "solver_order": 3},
        {**ON_NOISE, "solver_order": 3, **HEUN},
        CLIPPED,
    ],
    DEIS: [
        {},
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "lower_order_final": False},
        {"lower_order_final": False},
        *LAYOUTS,
        {"algorithm_type": "dpmsolver++", "solver_type": "heun"},
    ],
    UNIPC: [
        {},
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "bh1", **SIGMA_MIN},
        {"solver_type": "bh1", "solver_order": 1, **SIGMA_MIN},
        {"solver_type": "bh1", "solver_order": 3, **SIGMA_MIN},
        {"predict_x0": False, **SIGMA_MIN},
        {"predict_x0": False, "solver_type": "bh1", "solver_order": 3, **SIGMA_MIN},
        {"disable_corrector": [0, 1, 3], "solver_order": 3},
        {"lower_order_final": False, "solver_order": 3, **SIGMA_MIN},
        SIGMA_MIN,
        *LAYOUTS,
        {**KARRAS, **SIGMA_MIN},
        {**KARRAS, "sigma_min": 0.1, "sigma_max": 10.0},
        {"solver_type": "midpoint"},
    ],
    SA: [
        {},
        {"predictor_order": 1, "corrector_order": 1},
        {"predictor_order": 3, "corrector_order": 3},
        {"predictor_order": 1, "corrector_order": 3},
        {"predictor_order": 3, "corrector_order": 1},
        {"lower_order_final": False, "corrector_order": 3},
        {"predictor_order": 4, "corrector_order": 4},
        {"algorithm_type": "noise_prediction"},
        {"algorithm_type": "noise_prediction", "predictor_order": 3, "corrector_order": 3},
        *LAYOUTS,
        CLIPPED,
    ],
}
LAY_OUT_THEIR_OWN = {SINGLESTEP}  # no timestep_spacing
NO_ZERO_SNR = {SINGLESTEP, DEIS, SA}  # no rescale_betas_zero_snr


def cases() -> Iterator[Case]:
    """Every option with every spacing; the plain class with every prediction too, the others in turn."""
    for scheduler, choices in OPTIONS.items():
        spacings = ({},) if scheduler in LAY_OUT_THEIR_OWN else [{"timestep_spacing": s} for s in SPACINGS]
        turn = cycle(PREDICTIONS)
        for i, choice in enumerate(choices):
            for spacing in spacings:
                for prediction in PREDICTIONS if i == 0 else [next(turn)]:
                    yield Case(scheduler, {**spacing, "prediction_type": prediction, **choice})
            next(turn)
        for label, levels in NOISE_SCHEDULES.items():
            if label != "zero_snr" or scheduler not in NO_ZERO_SNR:
                for spacing in spacings[-1:]:
                    yield Case(scheduler, {**spacing, **levels}, label=label)
        for strength in (0.5, 0.7):
            order = {} if scheduler == SA else {"solver_order": 3}
            yield Case(scheduler, {**spacings[0], **order}, strength=strength)
    for strength in (0.5, 0.7):
        yield Case(SA, KARRAS, strength=strength)
        yield Case(MULTISTEP, SDE, strength=strength)
        yield Case(SINGLESTEP, {"solver_order": 3, **HEUN}, strength=strength)


def loses_digits(case: Case, steps: int) -> bool:
    """Fourth order in small steps: diffusers integrates from λ = 0, and float64 is too short for that, too.

    It is off by 5e-12 there; `test_weights_to_fifty_digits` has the truth.
    """
    return case.options.get("predictor_order") == 4 and steps > 20


CASES = list(cases())
# Differences between outputs of nearby levels cancel in diffusers' float32 coefficients, the more the nearer:
# from 10 steps on it is off by up to this, as it runs. Its formulas in float64 agree to 1e-12 all the same.
FLOAT32 = {MULTISTEP: 3e-5, SINGLESTEP: 3e-5, DEIS: 1e-3, UNIPC: 2e-4, SA: 1e-3}
RUNS = [(c, tuple(k for k in STEPS if int(k * c.strength) and not loses_digits(c, k))) for c in CASES]


@of_cases(RUNS)
def test_table_is_diffusers_map(case: Case, every: tuple[int, ...]) -> None:
    assert_every(case, every, proof)


def proof(case: Case, steps: int) -> None:
    assert_case(case, steps, bound=FLOAT32[case.scheduler] if steps >= 10 else 1e-5)


@pytest.mark.parametrize("clock", [-2.0, -1.0, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_to_fifty_digits(order: int, clock: float) -> None:
    """Against ∫ e^{g - v} l_i(v) dv of the Lagrange polynomials l_i, multiplied out in decimals."""
    levels = exponential(0.03, 15.0, 51) * (1 + 0.01 * np.sin(np.arange(51)))
    over = replace(along(levels[:-1], levels[1:], of_x0=True), clock=np.full((50, 1), clock))
    weights = adams(over, over.at(visited(levels, order)), np.full(50, order), moments)
    with localcontext() as decimals:
        decimals.prec = 50
        lambdas = [-Decimal(level).ln() for level in levels.tolist()]
        for k in range(order - 1, 50):
            nodes = [Decimal(clock) * (lambdas[k - i] - lambdas[k]) for i in range(order)]
            exact = lagrange_weights(nodes, Decimal(clock) * (lambdas[k + 1] - lambdas[k]))
            np.testing.assert_allclose(weights[k], exact, rtol=0, atol=1e-13)


def lagrange_weights(nodes: list[Decimal], g: Decimal) -> list[float]:
    G = [g.exp() - 1]
    for n in range(1, len(nodes)):
        G.append(n * G[-1] - g**n)
    weights = []
    for i, node in enumerate(nodes):
        polynomial = [Decimal(1)]  # the lowest power first
        for other in nodes[:i] + nodes[i + 1 :]:
            shifted, scaled = [Decimal(0), *polynomial], [-other * c for c in polynomial] + [Decimal(0)]
            polynomial = [(a + b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(float(sum(c * G[n] for n, c in enumerate(polynomial))))
    return weights


REFUSED = [
    (MULTISTEP, {"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
    (MULTISTEP, {"algorithm_type": "sde-dpmsolver"}, "final_sigmas_type"),
    (MULTISTEP, {**SDE_ON_NOISE, "solver_order": 3}, "solver_order=3"),
    (MULTISTEP, {"use_lu_lambdas": True, **KARRAS}, "exclude each other"),
    (SINGLESTEP, {"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
    (SINGLESTEP, SDE_ON_NOISE, "algorithm_type"),
    (UNIPC, {"predict_x0": False}, "final_sigmas_type"),
    (UNIPC, {"lower_order_final": False}, "final_sigmas_type"),
    (UNIPC, {"solver_p": "DDIM"}, "solver_p"),
    (UNIPC, {"shift_terminal": 0.1}, "shift_terminal"),
    (UNIPC, {"solver_order": 4}, "solver_order"),
    (SA, {"tau_func": abs}, "tau_func"),
    (SA, {"predictor_order": 5}, "predictor_order"),
    (SA, {"variance_type": "learned"}, "variance_type"),
    *((scheduler, {"thresholding": True}, "thresholding") for scheduler in OPTIONS),
    *((scheduler, {"use_flow_sigmas": True}, "use_flow_sigmas") for scheduler in OPTIONS),
    *((scheduler, {"prediction_type": "flow_prediction"}, "prediction_type") for scheduler in OPTIONS),
]


@pytest.mark.parametrize(("scheduler", "options", "named"), REFUSED, ids=str)
def test_what_cannot_be_honoured_is_refused(scheduler: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        schedule(scheduler, {**STABLE_DIFFUSION, **options}, num_inference_steps=4)


@pytest.mark.parametrize("timesteps", [[999], [980, 850, 500, 250, 120, 60, 1]], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_custom_timesteps(order: int, timesteps: list[int]) -> None:
    config = {**STABLE_DIFFUSION, "solver_order": order}
    table = schedule(SINGLESTEP, config, num_inference_steps=None, timesteps=timesteps)
    assert_same_map(table, diffusers.DPMSolverSinglestepScheduler.from_config(config), timesteps=timesteps)


@pytest.mark.parametrize("scheduler", sorted(NO_ZERO_SNR))
def test_fields_of_other_classes_are_ignored(scheduler: str) -> None:
    foreign = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    if scheduler in LAY_OUT_THEIR_OWN:
        foreign |= {"timestep_spacing": "trailing", "steps_offset": 5}
    table = schedule(scheduler, {**STABLE_DIFFUSION, **foreign}, num_inference_steps=7)
    plain = {**STABLE_DIFFUSION, "prediction_type": "v_prediction"}
    np.testing.assert_array_equal(table.matrix, schedule(scheduler, plain, num_inference_steps=7).matrix)


def test_registers_are_no_more_than_a_solver_remembers() -> None:
    expected = {MULTISTEP: 2, SINGLESTEP: 3, DEIS: 2, UNIPC: 4, SA: 4}
    tables = {s: schedule(s, STABLE_DIFFUSION, num_inference_steps=5) for s in expected}
    assert {s: table.registers for s, table in tables.items()} == expected


def test_unipc_bh1_reaches_no_noise() -> None:
    """Its weight is infinite where the noise ends: diffusers multiplies it with zero and has NaN latents."""
    config = {**STABLE_DIFFUSION, "solver_type": "bh1", "prediction_type": "sample"}
    last = schedule(UNIPC, config, num_inference_steps=4).matrix[-1, 0]
    np.testing.assert_array_equal(last, [0, 0, 0, 0, 1, 0])  # the model output, which is x0
