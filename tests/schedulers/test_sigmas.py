"""Noise levels of the caller's own, and layouts that reach a solver as such, for all that go by levels.

Only Euler takes `sigmas` in diffusers. The other classes' own arithmetic is held against the table all the
same: their objects are given these levels in place of those that `set_timesteps` lays out.
"""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdfast.errors import RequestError
from sdfast.preparation import Scheduler
from sdfast.schedulers import SOLVERS, resolve, schedule
from sdfast.schedulers.config import read
from sdfast.schedulers.layouts import ALIGN_YOUR_STEPS, LAYOUTS
from sdfast.schedulers.noise import sigma_alphas, sigma_to_t, sigmas_of
from sdfast.schedulers.solvers.euler import EulerConfig
from tests.schedulers.diffusers_map import STABLE_DIFFUSION, error_of, map_of_diffusers, map_of_table

SIGMAS = {  # by the number of steps
    "one": [14.6, 0.0],
    "two": [9.0, 1.0, 0.0],
    "ays": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0],
    "noisy end": [12.0, 5.0, 2.0, 1.0, 0.5, 0.1],
    "long": [*np.geomspace(14.6, 0.03, 50).tolist(), 0.0],
}
OF_LEVELS = [name for name, (config, _) in SOLVERS.items() if "sigmas" in config.accepts]
# Two evaluations a step: `set_timesteps` interleaves what its Karras layout gives, and goes to no noise.
INTERLEAVED = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DPMSolverMultistepScheduler": [{}, {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}],
    "DPMSolverSinglestepScheduler": [{}, {"solver_order": 3}],
    "UniPCMultistepScheduler": [{}, {"solver_order": 3, "disable_corrector": [0]}],
    "EDMDPMSolverMultistepScheduler": [{}, {"solver_order": 3}],
}
CASES = [(name, options) for name in OF_LEVELS for options in OPTIONS.get(name, [{}])]


def given_levels(scheduler: str, options: dict[str, Any], sigmas: list[float]) -> Any:
    """diffusers' object, laid out on these levels."""
    kind = getattr(diffusers, scheduler)
    final = {"final_sigmas_type": "sigma_min" if sigmas[-1] else "zero"}
    fields = SOLVERS[scheduler][0].model_fields
    karras = {"use_karras_sigmas": True} if scheduler in INTERLEAVED else {}
    known = {k: v for k, v in (final | karras).items() if k in fields}
    own = kind.from_config(STABLE_DIFFUSION, **known, **options)
    if scheduler in INTERLEAVED:
        own._convert_to_karras = lambda *_, **__: np.array(sigmas[:-1])
        return own
    lay_out = own.set_timesteps

    def set_timesteps(num_inference_steps: int) -> None:
        lay_out(num_inference_steps)
        own.sigmas = own.sigmas.new_tensor(sigmas)
        own.timesteps = torch.from_numpy(timesteps_of(sigmas))  # SA-Solver's noise goes by them

    own.set_timesteps = set_timesteps
    return own


def timesteps_of(sigmas: list[float]) -> np.ndarray:
    """Of each step, for the levels of Stable Diffusion."""
    known = sigmas_of(sigma_alphas(read(EulerConfig, STABLE_DIFFUSION, {})))
    return sigma_to_t(np.array(sigmas[:-1]), np.log(known))


@pytest.mark.parametrize("sigmas", SIGMAS.values(), ids=SIGMAS)
@pytest.mark.parametrize(("scheduler", "options"), CASES, ids=str)
def test_table_is_diffusers_arithmetic_on_these_levels(
    scheduler: str, options: dict[str, Any], sigmas: list[float]
) -> None:
    if scheduler in INTERLEAVED and sigmas[-1]:
        pytest.skip("diffusers' class always goes to no noise")
    if SOLVERS[scheduler][0].ends_noisy and not sigmas[-1]:
        sigmas = [*sigmas[:-1], sigmas[-2] / 2]
    sigmas = np.float32(sigmas).tolist()
    config = {**STABLE_DIFFUSION, **options}
    table = schedule(scheduler, config, num_inference_steps=None, sigmas=sigmas)
    reference = given_levels(scheduler, options, sigmas)
    steps = len(sigmas) - 1
    truth = map_of_diffusers(reference, exact=True, noised=False, num_inference_steps=steps)
    assert error_of(map_of_table(table), truth.rows) <= 1e-11
    np.testing.assert_array_equal(table.draws_noise, truth.draws)
    np.testing.assert_allclose(table.input_scale, truth.input_scale, rtol=1e-6)


@pytest.mark.parametrize("scheduler", [name for name in OF_LEVELS if not name.startswith("EDM")])
def test_the_network_is_told_the_timestep_of_the_level(scheduler: str) -> None:
    sigmas = [12.0, 5.0, 2.0, 0.7, 0.3]
    table = schedule(scheduler, STABLE_DIFFUSION, num_inference_steps=None, sigmas=sigmas)
    firsts = table.timesteps[::2] if scheduler in INTERLEAVED else table.timesteps
    np.testing.assert_allclose(firsts, timesteps_of(sigmas), rtol=1e-6)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "LCMScheduler", "PNDMScheduler"])
def test_sigmas_are_refused_where_there_are_no_levels(scheduler: str) -> None:
    with pytest.raises(RequestError, match="takes no custom sigmas"):
        schedule(scheduler, STABLE_DIFFUSION, num_inference_steps=None, sigmas=[3.0, 0.0])


@pytest.mark.parametrize("name", ["DEIS", "SA-Solver"])
def test_no_noise_is_refused_where_a_solver_cannot_reach_it(name: str) -> None:
    with pytest.raises(RequestError, match="end the sigmas above 0"):
        schedule(name, STABLE_DIFFUSION, num_inference_steps=None, sigmas=[3.0, 1.0, 0.0])
    table = schedule(f"{name} Align Your Steps", STABLE_DIFFUSION, num_inference_steps=10)
    assert len(table) == 10


def levels_of(name: str, steps: int, family: str = "sd") -> np.ndarray:
    """σ before each step of Euler's table: what the input is divided by says it."""
    table = schedule(name, STABLE_DIFFUSION, num_inference_steps=steps, family=family)
    return np.sqrt(1 / table.input_scale**2 - 1)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_align_your_steps(family: str) -> None:
    """The published levels at eleven steps, and at other numbers levels between them."""
    levels = levels_of("Euler Align Your Steps", 11, family)
    np.testing.assert_allclose(levels, ALIGN_YOUR_STEPS[family], rtol=1e-5)
    finer = levels_of("Euler AYS", 21, family)
    np.testing.assert_allclose(finer[::2], ALIGN_YOUR_STEPS[family], rtol=1e-5)
    np.testing.assert_allclose(finer[1] ** 2, finer[0] * finer[2], rtol=1e-5)
    assert levels_of("Euler AYS", 1, family) == pytest.approx([14.615], rel=1e-5)


def test_kl_optimal() -> None:
    levels = levels_of("Euler KL Optimal", 10)
    np.testing.assert_allclose(np.diff(np.arctan(levels)), np.diff(np.arctan(levels))[0], rtol=1e-4)
    assert levels[0] == pytest.approx(14.6146, rel=1e-4)
    last = schedule("Euler KL Optimal", STABLE_DIFFUSION, num_inference_steps=10)
    # x + (σ_next - σ) ε: the weight of the output in the last step says where it ends
    assert levels[-1] + last.matrix[-1, 0, 1] == pytest.approx(0.0292, abs=1e-3)


@pytest.mark.parametrize("layout", ["Karras", "Exponential", "Polyexponential", "Beta"])
def test_a_layout_is_the_same_by_config_and_by_levels(layout: str) -> None:
    """Euler a has no such field in its config; its levels are those that Euler gets by its own."""
    by_config = levels_of(f"Euler {'Exponential' if layout == 'Polyexponential' else layout}", 12)
    np.testing.assert_allclose(levels_of(f"Euler a {layout}", 12), by_config, rtol=1e-5)


@pytest.mark.parametrize("scheduler", [s for s in OF_LEVELS if not s.startswith("EDM")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("steps", [1, 2, 15])
def test_every_layout_works_with_every_solver(scheduler: str, layout: str, steps: int) -> None:
    table = schedule(f"{resolve(scheduler).sampler} {layout}", STABLE_DIFFUSION, num_inference_steps=steps)
    assert (table.scheduler, table.schedule_type) == (scheduler, layout)
    assert len(table) == (2 * steps - 1 if scheduler in INTERLEAVED else steps)


def test_a_pipelines_scheduler_knows_its_family() -> None:
    sdxl = Scheduler("Euler Align Your Steps", STABLE_DIFFUSION).schedule("sdxl", num_inference_steps=11)
    np.testing.assert_allclose(np.sqrt(1 / sdxl.input_scale**2 - 1), ALIGN_YOUR_STEPS["sdxl"], rtol=1e-5)
