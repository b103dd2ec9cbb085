"""The k-diffusion family against diffusers: Heun, DPM2, LMS, DPM++ SDE, EDM, Euler's rarer options."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdfast.errors import DependencyError, RequestError
from sdfast.noise import BrownianNoise, OwnNoise, SharedNoise
from sdfast.schedulers import Schedule, schedule
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

NO_SAMPLE = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")
FAMILY = ("HeunDiscreteScheduler", *NO_SAMPLE, "LMSDiscreteScheduler")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)


def cases() -> Iterator[Case]:
    for scheduler in FAMILY:
        predictions = [p for p in PREDICTIONS if p != "sample" or scheduler not in NO_SAMPLE]
        for spacing in SPACINGS:
            for layout in LAYOUTS:
                for prediction in predictions if not layout else predictions[:1]:
                    yield Case(
                        scheduler, {"timestep_spacing": spacing, "prediction_type": prediction, **layout}
                    )
            for label, levels in NOISE_SCHEDULES.items():
                if label != "zero_snr":  # not an option of these classes
                    yield Case(scheduler, {"timestep_spacing": spacing, **levels}, label=label)
            yield Case(scheduler, {"timestep_spacing": spacing}, strength=0.5)
        yield Case(scheduler, {"use_karras_sigmas": True}, strength=0.7)
        yield Case(scheduler, {"prediction_type": "v_prediction", "use_karras_sigmas": True})
    yield Case("HeunDiscreteScheduler", {"beta_schedule": "exp"})
    yield from edm_cases()
    log_linear, continuous = {"interpolation_type": "log_linear"}, {"timestep_type": "continuous"}
    for options in (log_linear, continuous, {**log_linear, **continuous}):
        for prediction in PREDICTIONS:
            for layout in LAYOUTS[:2]:
                yield Case("EulerDiscreteScheduler", {"prediction_type": prediction, **options, **layout})
    for final in ("zero", "sigma_min"):
        yield Case("EulerDiscreteScheduler", {**log_linear, "final_sigmas_type": final}, strength=0.5)


def edm_cases() -> Iterator[Case]:
    for prediction in ("epsilon", "v_prediction"):
        for layout in ("karras", "exponential"):
            for final in ("zero", "sigma_min"):
                shared = {
                    "prediction_type": prediction,
                    "sigma_schedule": layout,
                    "final_sigmas_type": final,
                }
                yield Case("EDMEulerScheduler", shared)
                for order in (1, 2, 3):
                    yield Case("EDMDPMSolverMultistepScheduler", {**shared, "solver_order": order})
    bounds = {"sigma_min": 0.01, "sigma_max": 14.0, "sigma_data": 1.0, "rho": 5.0}
    yield Case("EDMEulerScheduler", bounds)
    yield Case("EDMEulerScheduler", bounds, strength=0.5)
    for solver in ("midpoint", "heun", "logrho"):
        for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
            options = {**bounds, "solver_type": solver, "algorithm_type": algorithm}
            yield Case("EDMDPMSolverMultistepScheduler", options)
    for options in (
        {"lower_order_final": False},
        {"euler_at_final": True},
        {"solver_order": 3},
        {"algorithm_type": "deis"},
    ):
        yield Case(
            "EDMDPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min", **options},
            strength=0.5,
        )


CASES = list(cases())

# Where diffusers' float32 arithmetic is off by more than the bound, although sdfast equals its formulas in
# float64: σ_down = √(σ_next² - σ_up²) cancels where a step is steep. With it go the level half way and its
# timestep; some of them are NaN.
LESS_EXACT_IN_DIFFUSERS = {
    "linspace-epsilon": (2,),
    "linspace-v_prediction": (2,),
    "linspace-epsilon-use_karras_sigmas=True": (2,),
    "linspace-epsilon-use_exponential_sigmas=True": (2,),
    "linspace-epsilon-use_beta_sigmas=True": (2,),
    "v_prediction-use_karras_sigmas=True": (2,),
    "no_offset-linspace-steps_offset=0": (2,),
    "trained_betas-linspace": (2, 3),
    "linear-leading-linear-beta_start=0.0001-beta_end=0.02": (2,),
    "linear-trailing-linear-beta_start=0.0001-beta_end=0.02": (2,),
    "linear-linspace-linear-beta_start=0.0001-beta_end=0.02": (2,),
    "cosine-linspace-squaredcos_cap_v2": (3, 4, 10, 20),
    "cosine-trailing-squaredcos_cap_v2": (2, 3, 4, 10, 20),
}
# Its float32 sums over 50 steps are off by up to 1.2e-5 in these.
LONG_RUNS = (
    "EDMDPMSolverMultistep-epsilon-karras-zero-solver_order=3",
    "EDMDPMSolverMultistep-v_prediction-karras-zero-solver_order=3",
)
DIFFUSERS_IS_LESS_EXACT = {(case, 50) for case in LONG_RUNS} | {
    (f"KDPM2AncestralDiscrete-{case}", steps)
    for case, every in LESS_EXACT_IN_DIFFUSERS.items()
    for steps in every
}


def out_of_reach(case: Case, steps: int) -> str | None:
    """Why diffusers has no map to compare with."""
    if int(steps * case.strength) == 0:
        return "no step is left"
    if str(case) == "KDPM2AncestralDiscrete-cosine-linspace-squaredcos_cap_v2" and steps == 2:
        return "σ falls from 20291 to 0.0064 in one step: σ_down cancels in float64 too"
    third_order = (
        case.options.get("solver_order") == 3 and case.options.get("final_sigmas_type") == "sigma_min"
    )
    if third_order and steps >= 15:
        return "the last step is none, from σ_min to σ_min, and the third order divides by its length"
    return None


def runs() -> Iterator[tuple[Case, tuple[int, ...]]]:
    """Cases with numbers of steps; long runs, which take diffusers up to a second, for plain cases alone."""
    for case in CASES:
        plain = case.scheduler not in FAMILY or (len(case.options) == 2 and not case.label)
        short = STEPS[:-2] if case.scheduler == "LMSDiscreteScheduler" else STEPS[:-1]
        yield case, tuple(k for k in (STEPS if plain else short) if not out_of_reach(case, k))


@of_cases(list(runs()))
def test_table_is_diffusers_map(case: Case, every: tuple[int, ...]) -> None:
    assert_every(case, every, proof)


def proof(case: Case, steps: int) -> None:
    assert_case(case, steps, rounds=(str(case), steps) in DIFFUSERS_IS_LESS_EXACT)


@pytest.mark.parametrize("timesteps", [[999], [999, 500, 20], [980.5, 850.25, 500, 1], [700, 3, 0]], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_heun_takes_custom_timesteps(prediction: str, timesteps: list[float]) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction}
    table = schedule("HeunDiscreteScheduler", config, num_inference_steps=None, timesteps=timesteps)
    assert len(table) == 2 * len(timesteps) - 1
    assert_same_map(table, diffusers.HeunDiscreteScheduler.from_config(config), timesteps=timesteps)


@pytest.mark.parametrize(
    "request_", [{"sigmas": [14.0, 3.0, 0.4, 0.0]}, {"timesteps": [999, 500, 20]}], ids=str
)
@pytest.mark.parametrize(
    "options", [{"timestep_type": "continuous"}, {"interpolation_type": "log_linear"}], ids=str
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_eulers_rarer_options_with_custom_levels(
    prediction: str, options: dict[str, str], request_: dict[str, list[float]]
) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction, **options}
    make = partial(schedule, "EulerDiscreteScheduler", config, num_inference_steps=None, **request_)
    if "timesteps" in request_ and "timestep_type" in options and prediction == "v_prediction":
        with pytest.raises(RequestError, match="give sigmas"):  # in diffusers too
            make()
    else:
        assert_same_map(make(), diffusers.EulerDiscreteScheduler.from_config(config), **request_)


def test_edm_sde_has_no_third_order() -> None:
    config = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    with pytest.raises(RequestError, match="solver_order=3"):
        schedule("EDMDPMSolverMultistepScheduler", config, num_inference_steps=4)


def sde_schedule(strength: float = 1.0, **options: Any) -> Schedule:
    config = {**STABLE_DIFFUSION, **options}
    return schedule("DPM++ SDE Karras", config, num_inference_steps=12, strength=strength)


SHAPE = (4, 8, 8)
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:Should have t[ab]")  # diffusers' own rounding
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("rows", [1, 3])
def test_brownian_noise_is_diffusers_to_the_bit(rows: int, strength: float) -> None:
    """Every draw of diffusers' own sampler, as its scheduler asks for them.

    On levels that are diffusers' to the last bit: those of a table may differ in it (see
    `test_noise_levels_are_diffusers`), and where they do the noise differs by some 1e-3.
    """
    table = sde_schedule(strength, noise_sampler_seed=11)
    scheduler = diffusers.DPMSolverSDEScheduler.from_config(
        STABLE_DIFFUSION, use_karras_sigmas=True, noise_sampler_seed=11
    )
    scheduler.set_timesteps(12)
    begin = 2 * (12 - int(12 * strength))
    scheduler.set_begin_index(begin)
    x, draws = torch.zeros(rows, *SHAPE), []
    with pytest.MonkeyPatch.context() as patch:
        module = inspect.getmodule(diffusers.DPMSolverSDEScheduler)
        drawn = module.BrownianTreeNoiseSampler.__call__
        patch.setattr(
            module.BrownianTreeNoiseSampler,
            "__call__",
            lambda self, *levels: draws.append(drawn(self, *levels)) or draws[-1],
        )
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(x, t, x).prev_sample
    first = SharedNoise(torch.Generator(), rows, SHAPE)
    levels = np.unique(scheduler.sigmas.double())
    crossed = levels[np.abs(levels[:, None, None] - table.brownian.crossed).argmin(axis=0)]
    np.testing.assert_allclose(table.brownian.crossed, crossed, rtol=2e-7)
    span = (levels[1], levels[-1])
    np.testing.assert_allclose(table.brownian.span, span, rtol=2e-7)
    noise = BrownianNoise(first, replace(table.brownian, crossed=crossed, span=span), SHAPE, rows, CPU)
    assert len(draws) == table.draws_noise.sum() == len(table) - 1
    for k, expected in enumerate(draws):
        assert torch.equal(torch.stack([noise.of_row(i)(k) for i in range(rows)]), expected)


def test_brownian_noise_is_unit_noise_and_a_pictures_own() -> None:
    """Its variance is 1, half a step and the whole share what they cross, and a batch changes nothing."""
    table = sde_schedule()
    shape = (4, 32, 32)

    def noise(*seeds: int) -> BrownianNoise:
        first = OwnNoise([torch.Generator().manual_seed(seed) for seed in seeds], shape)
        return BrownianNoise(first, table.brownian, shape, len(seeds), CPU)

    together, alone = noise(5, 6), noise(6)
    assert torch.equal(together.initial()[1], alone.initial()[0])
    half, whole = [alone.of_row(0)(k) for k in (4, 5)]
    assert torch.equal(together.of_row(1)(4), half)
    assert 0.95 < half.std() < 1.05 and 0.95 < whole.std() < 1.05
    top, bottom = table.brownian.crossed[4]
    shared = np.sqrt((top - np.sqrt(top * bottom)) / (top - bottom))  # of two increments from the same level
    assert (half * whole).mean() == pytest.approx(shared, abs=0.05)
    assert abs((half * alone.of_row(0)(6)).mean()) < 0.05


def test_without_torchsde_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    first = SharedNoise(torch.Generator(), 1, SHAPE)
    with pytest.raises(DependencyError, match=r"sdfast\[sde\]"):
        BrownianNoise(first, sde_schedule().brownian, SHAPE, 1, CPU)
