"""Every table against diffusers' own scheduler, and against a picture drawn by it."""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdfast.noise import BrownianNoise, NoiseSource, SharedNoise
from sdfast.schedulers import SAMPLERS, Sampler, own_config, schedule
from sdfast.schedulers.config import read
from sdfast.schedulers.noise import sigma_alphas, sigmas_of
from sdfast.schedulers.solvers.euler import EulerConfig
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
    defaults_of,
    error_of,
    map_of_diffusers,
    map_of_table,
    of_cases,
)


def cases() -> Iterator[Case]:
    options: dict[str, list[dict[str, Any]]] = {
        "DDPMScheduler": [{"variance_type": v} for v in ("fixed_small", "fixed_small_log", "fixed_large")],
        "DDIMScheduler": [{}, {"set_alpha_to_one": False}],
        "EulerDiscreteScheduler": [
            {},
            {"use_karras_sigmas": True},
            {"final_sigmas_type": "sigma_min"},
            {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
            {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
            {"use_exponential_sigmas": True},
            {"use_beta_sigmas": True},
        ],
        "EulerAncestralDiscreteScheduler": [{}],
        "PNDMScheduler": [
            {"skip_prk_steps": True},
            {"skip_prk_steps": True, "set_alpha_to_one": True},
        ],
    }
    for scheduler, choices in options.items():
        for choice in choices:
            for spacing in SPACINGS:
                for prediction in PREDICTIONS:
                    if scheduler.startswith(("EulerAncestral", "PNDM")) and prediction == "sample":
                        continue  # diffusers has none
                    for eta in (0.0, 0.5, 1.0) if scheduler == "DDIMScheduler" else (0.0,):
                        yield Case(
                            scheduler,
                            {"timestep_spacing": spacing, "prediction_type": prediction, **choice},
                            eta,
                        )
        for label, levels in NOISE_SCHEDULES.items():
            for choice in choices[:2] if "use_karras_sigmas" in str(choices) else choices[:1]:
                for spacing in SPACINGS:
                    yield Case(scheduler, {"timestep_spacing": spacing, **levels, **choice}, label=label)


CASES = list(cases())

# Where diffusers' float32 arithmetic is off by more than the bound, although sdfast equals its formulas in
# float64. Cosine levels are extreme: σ goes beyond 20000, and the ancestral √(σ_next² - σ_up²) becomes NaN.
DIFFUSERS_IS_LESS_EXACT = {
    ("DDPM-cosine-linspace-squaredcos_cap_v2-fixed_small", 50),
    ("EulerAncestralDiscrete-cosine-linspace-squaredcos_cap_v2", 4),
    ("EulerAncestralDiscrete-cosine-trailing-squaredcos_cap_v2", 3),
}


@of_cases([(case, STEPS) for case in CASES])
def test_table_is_diffusers_map(case: Case, every: tuple[int, ...]) -> None:
    assert_every(case, every, proof)


def proof(case: Case, steps: int) -> None:
    assert_case(case, steps, rounds=(str(case), steps) in DIFFUSERS_IS_LESS_EXACT)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_all_thousand_steps(scheduler: str) -> None:
    config = {**STABLE_DIFFUSION, "steps_offset": 0}
    table = schedule(scheduler, config, num_inference_steps=1000)
    reference = getattr(diffusers, scheduler).from_config(config)
    exact = map_of_diffusers(reference, exact=True, num_inference_steps=1000)
    assert error_of(map_of_table(table), exact.rows) <= 1e-11
    np.testing.assert_array_equal(table.timesteps, exact.timesteps)


@pytest.mark.parametrize(
    "timesteps", [[999], [999, 500, 20], [980, 850, 500, 250, 120, 60, 1], [700, 3, 0]], ids=str
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler", ["DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_custom_timesteps(scheduler: str, prediction: str, timesteps: list[int]) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction}
    table = schedule(scheduler, config, num_inference_steps=None, timesteps=timesteps)
    assert_same_map(table, getattr(diffusers, scheduler).from_config(config), timesteps=timesteps)


@pytest.mark.parametrize(
    "sigmas", [[14.6, 0.0], [14.615, 6.475, 3.861, 1.866, 0.803, 0.38, 0.113, 0.0], [3.0, 1.0, 0.5]]
)
@pytest.mark.parametrize("karras", [False, True])
def test_custom_sigmas(sigmas: list[float], karras: bool) -> None:
    config = {**STABLE_DIFFUSION, "use_karras_sigmas": karras}
    table = schedule("EulerDiscreteScheduler", config, num_inference_steps=None, sigmas=sigmas)
    reference = diffusers.EulerDiscreteScheduler.from_config(config)
    assert_same_map(table, reference, sigmas=sigmas)


@pytest.mark.parametrize("levels", [{}, *NOISE_SCHEDULES.values()], ids=["scaled_linear", *NOISE_SCHEDULES])
def test_noise_levels_are_diffusers(levels: dict[str, Any]) -> None:
    """Bit for bit, but for torch's float32 square root, which errs in the last bit."""
    reference = diffusers.EulerDiscreteScheduler.from_config({**STABLE_DIFFUSION, **levels})
    config = read(EulerConfig, own_config(reference), {})
    alpha_bar, truth = sigma_alphas(config), reference.alphas_cumprod.numpy()
    np.testing.assert_allclose(alpha_bar, truth, rtol=1e-5 if config.rescale_betas_zero_snr else 0)
    np.testing.assert_allclose(sigmas_of(truth)[::-1], reference.sigmas[:-1].numpy(), rtol=2e-7)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.short_name)
def test_same_picture_as_diffusers_loop(sampler: Sampler) -> None:
    """A nonlinear network, float32, one generator: diffusers' loop and the table's make the same latents.

    DPM++ SDE's steps draw from no generator, but from a Brownian motion with the seed that its config says.
    """
    eta = 1.0 if sampler.scheduler in ("DDIMScheduler", "TCDScheduler") else 0.0
    config = {**STABLE_DIFFUSION, "noise_sampler_seed": 3}
    table = schedule(sampler.name, config, num_inference_steps=20, eta=eta)
    overrides = {k: v for k, v in sampler.overrides.items() if k in defaults_of(sampler.scheduler)}
    reference = getattr(diffusers, sampler.scheduler).from_config(config, **overrides)
    reference.set_timesteps(20)

    def network(x: torch.Tensor, t: float) -> torch.Tensor:  # [1, 4, 8, 8] -> the same
        return torch.tanh(x.roll(1, -1) - 0.5 * x.roll(1, 1)) + 0.1 * math.sin(t) * x

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 8, 8, generator=generator) * reference.init_noise_sigma
    extra = {"eta": eta} if eta else {}
    if "generator" in inspect.signature(reference.step).parameters:
        extra["generator"] = generator
    for t in reference.timesteps:
        x = reference.step(network(reference.scale_model_input(x, t), t.item()), t, x, **extra).prev_sample

    noise: NoiseSource = SharedNoise(torch.Generator().manual_seed(7), 1, (4, 8, 8))
    if table.brownian is not None:
        noise = BrownianNoise(noise, table.brownian, (4, 8, 8), 1, torch.device("cpu"))
    registers = torch.zeros(table.registers, 1, 4, 8, 8)
    registers[0] = noise.initial() * table.init_noise_sigma
    matrix = torch.tensor(table.matrix, dtype=torch.float32)
    for k in range(len(table)):
        m = network(registers[0] * float(table.input_scale[k]), table.timesteps[k])
        z = noise.of_row(0)(k)[None] if table.draws_noise[k] else torch.zeros_like(m)
        registers = torch.einsum("rs,s...->r...", matrix[k], torch.cat([registers, m[None], z[None]]))

    assert torch.linalg.norm(registers[0] - x) <= 1e-4 * torch.linalg.norm(x)
