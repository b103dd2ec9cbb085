"""A schedule is right when it is the same linear map as diffusers' own scheduler.

Each of the schedulers is run on basis vectors: the starting latents, every model output and every noise are
one direction each, so that the sample after a step *is* the row of coefficients of all the steps so far.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from sdfast.errors import RequestError
from sdfast.schedulers import SAMPLERS, Sampler, Schedule, own_config, resolve, schedule
from sdfast.schedulers.config import EulerConfig, read
from sdfast.schedulers.noise import alpha_bar_at, sigma_alphas, sigmas_of
from sdfast.schedulers.sampling import SAMPLING

diffusers = pytest.importorskip("diffusers")

STEPS = (1, 2, 3, 4, 10, 20, 50)
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
NOISE_SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": np.linspace(0.001, 0.015, 1000).tolist()},
    "no_offset": {"steps_offset": 0},
    "T500": {"num_train_timesteps": 500},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


@dataclass(frozen=True)
class Case:
    """One scheduler with its options; `run` is what the call gives it besides the number of steps."""

    scheduler: str
    options: Mapping[str, Any]
    eta: float = 0.0
    label: str = field(default="")

    @property
    def config(self) -> dict[str, Any]:
        names = inspect.signature(getattr(diffusers, self.scheduler).__init__).parameters
        return {k: v for k, v in {**STABLE_DIFFUSION, **self.options}.items() if k in names}

    def __str__(self) -> str:
        short = self.scheduler.removesuffix("Scheduler")
        values = [
            f"{k}={v}" if not isinstance(v, str) else v
            for k, v in self.options.items()
            if k != "trained_betas"
        ]
        return "-".join(
            [short, *filter(None, [self.label]), *values, *([f"eta={self.eta}"] if self.eta else [])]
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
        ],
        "EulerAncestralDiscreteScheduler": [{}],
        "PNDMScheduler": [
            {"skip_prk_steps": True},
            {"skip_prk_steps": True, "set_alpha_to_one": True},
        ],
        "DPMSolverMultistepScheduler": [
            {},
            {"use_karras_sigmas": True},
            {"solver_type": "heun"},
            {"solver_type": "heun", "use_karras_sigmas": True},
            {"solver_order": 1},
            {"lower_order_final": False},
            {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
            {"final_sigmas_type": "sigma_min"},
            {"final_sigmas_type": "sigma_min", "lower_order_final": False},
            {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
            {"solver_type": "logrho"},
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
    for spacing in SPACINGS:
        clipped = {
            "timestep_spacing": spacing,
            "beta_schedule": "squaredcos_cap_v2",
            "lambda_min_clipped": -5.1,
        }
        yield Case("DPMSolverMultistepScheduler", clipped)


CASES = list(cases())

# Where diffusers' float32 arithmetic is off by more than the bound, although sdfast equals its formulas in
# float64. Cosine levels are extreme: σ goes beyond 20000, and the ancestral √(σ_next² - σ_up²) becomes NaN.
DIFFUSERS_IS_LESS_EXACT = {
    ("DDPM-cosine-linspace-squaredcos_cap_v2-fixed_small", 50),
    ("EulerAncestralDiscrete-cosine-linspace-squaredcos_cap_v2", 4),
    ("EulerAncestralDiscrete-cosine-trailing-squaredcos_cap_v2", 3),
}


class Float64Torch:
    """The torch module, except that float32 is float64: diffusers' arithmetic without its rounding."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class BasisNoise:
    """Stands in for diffusers' `randn_tensor`: hands out the current step's direction, and keeps count."""

    def __init__(self, directions: list[torch.Tensor]) -> None:
        self.directions = directions
        self.step = 0
        self.draws = np.zeros(len(directions), np.bool_)

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        self.draws[self.step] = True
        return self.directions[self.step]


@contextmanager
def noise_from(scheduler: Any, basis: list[torch.Tensor], exact: bool) -> Iterator[BasisNoise]:
    module = inspect.getmodule(type(scheduler))
    noise = BasisNoise(basis)
    arithmetic = Float64Torch() if exact else torch
    with (
        mock.patch.object(module, "randn_tensor", noise, create=True),
        mock.patch.object(module, "torch", arithmetic),
    ):
        yield noise


@dataclass(frozen=True)
class LinearMap:
    timesteps: np.ndarray  # [K]
    input_scale: np.ndarray  # [K]
    rows: np.ndarray  # [K, 1 + 2K]: the latents after each step, by x_T, the model outputs and the noises
    draws: np.ndarray  # [K] bool
    init_noise_sigma: float


def map_of_diffusers(scheduler: Any, eta: float = 0.0, *, exact: bool = False, **request: Any) -> LinearMap:
    """The map of a diffusers scheduler; `request` goes to its `set_timesteps`.

    With `exact`, the noise levels stay the float32 ones, but all arithmetic on them is float64.
    """
    if exact:
        make_exact(scheduler)
    scheduler.set_timesteps(**request)
    if exact and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    if (scheduler.timesteps[1:] == scheduler.timesteps[0]).any():
        scheduler.set_begin_index(
            0
        )  # else diffusers takes a repeated timestep for its second and runs out of steps
    K = len(scheduler.timesteps)
    x, *directions = torch.eye(1 + 2 * K, dtype=torch.float64)[:, None]
    m, z = directions[:K], directions[K:]
    extra = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    scales, rows = [], []
    with noise_from(scheduler, z, exact) as noise:
        for k, t in enumerate(scheduler.timesteps):
            noise.step = k
            scales.append(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t).item())
            x = scheduler.step(m[k], t, x, **extra).prev_sample
            rows.append(x[0].double().numpy())
    timesteps, init = scheduler.timesteps.double().numpy(), float(scheduler.init_noise_sigma)
    return LinearMap(timesteps, np.array(scales), np.array(rows), noise.draws, init)


def make_exact(scheduler: Any) -> None:
    """Give diffusers sdfast's noise levels, in float64, so that only the arithmetic is compared.

    They are diffusers' own but for the last bit: see `test_noise_levels_are_diffusers`.
    """
    model, _ = SAMPLING[type(scheduler).__name__]
    config = read(model, own_config(scheduler), {})
    alpha_bar = alpha_bar_at(config, np.arange(config.num_train_timesteps))
    if hasattr(scheduler, "sigmas"):
        alpha_bar = 1 / (1 + sigmas_of(sigma_alphas(config)).astype(np.float64) ** 2)
    scheduler.alphas_cumprod = torch.from_numpy(alpha_bar)
    if not getattr(scheduler.config, "set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]


def map_of_table(table: Schedule) -> np.ndarray:
    """[K, 1 + 2K], the rows of `LinearMap`, by running the loop that `Schedule` documents."""
    K = len(table)
    x, *directions = np.eye(1 + 2 * K)
    registers = np.zeros((table.registers, 1 + 2 * K))
    registers[0] = x
    rows = []
    for k in range(K):
        z = directions[K + k] * table.draws_noise[k]
        registers = table.matrix[k] @ np.vstack([registers, directions[k], z])
        rows.append(registers[0])
    return np.array(rows)


def error_of(rows: np.ndarray, truth: np.ndarray) -> float:
    """The largest error of an entry, relative to its row's norm."""
    return float((np.abs(rows - truth).max(axis=1) / np.linalg.norm(truth, axis=1)).max())


def assert_same_map(
    table: Schedule,
    scheduler: Any,
    eta: float = 0.0,
    *,
    searched: bool = False,
    rounds: bool = False,
    **request: Any,
) -> None:
    """The table is diffusers' map: to rounding, when its formulas run in float64, and to 1e-5, as they run.

    searched: the timesteps come from a search by noise level that keeps the fraction. They hang on float32
        logarithms of float32 square roots, whose last bit differs from processor to processor.
    rounds: the case is one where diffusers' own float32 arithmetic is off by more than the bound.
    """
    rows = map_of_table(table)
    exact = map_of_diffusers(type(scheduler).from_config(scheduler.config), eta, exact=True, **request)
    assert error_of(rows, exact.rows) <= 1e-12

    truth = map_of_diffusers(scheduler, eta, **request)
    assert (error_of(rows, truth.rows) <= 1e-5) is not rounds
    np.testing.assert_allclose(table.timesteps, truth.timesteps, rtol=0, atol=1e-3 if searched else 0)
    np.testing.assert_array_equal(table.draws_noise, truth.draws)
    np.testing.assert_allclose(table.input_scale, truth.input_scale, rtol=1e-5)
    assert table.init_noise_sigma == pytest.approx(truth.init_noise_sigma, rel=3e-7)


# ---------------------------------------------------------------- the map


@pytest.mark.parametrize("steps", STEPS, ids=lambda k: f"K{k}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_table_is_diffusers_map(case: Case, steps: int) -> None:
    assert_same_map(
        schedule(case.scheduler, case.config, num_inference_steps=steps, eta=case.eta),
        getattr(diffusers, case.scheduler)(**case.config),
        case.eta,
        searched=case.scheduler == "EulerDiscreteScheduler" and case.options.get("use_karras_sigmas", False),
        rounds=(str(case), steps) in DIFFUSERS_IS_LESS_EXACT,
        num_inference_steps=steps,
    )


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
    assert_same_map(table, reference, searched=True, sigmas=sigmas)


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
    """A nonlinear network, float32, one generator: diffusers' loop and the table's make the same latents."""
    eta = 1.0 if sampler.scheduler == "DDIMScheduler" else 0.0
    table = schedule(sampler.name, STABLE_DIFFUSION, num_inference_steps=20, eta=eta)
    overrides = {k: v for k, v in sampler.overrides.items() if k in defaults_of(sampler.scheduler)}
    reference = getattr(diffusers, sampler.scheduler).from_config(STABLE_DIFFUSION, **overrides)
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

    generator = torch.Generator().manual_seed(7)
    registers = torch.zeros(table.registers, 1, 4, 8, 8)
    registers[0] = torch.randn(1, 4, 8, 8, generator=generator) * table.init_noise_sigma
    matrix = torch.tensor(table.matrix, dtype=torch.float32)
    for k in range(len(table)):
        m = network(registers[0] * float(table.input_scale[k]), table.timesteps[k])
        z = torch.randn(1, 4, 8, 8, generator=generator) if table.draws_noise[k] else torch.zeros_like(m)
        registers = torch.einsum("rs,s...->r...", matrix[k], torch.cat([registers, m[None], z[None]]))

    assert torch.linalg.norm(registers[0] - x) <= 1e-4 * torch.linalg.norm(x)


# ---------------------------------------------------------------- configs


def defaults_of(scheduler: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("self", "args", "kwargs")}


@pytest.mark.parametrize("scheduler", SAMPLING)
def test_defaults_are_diffusers(scheduler: str) -> None:
    """Every field of the diffusers class is known here, with its default."""
    model, _ = SAMPLING[scheduler]
    known = {name: f.default for name, f in model.model_fields.items()}
    if scheduler == "DPMSolverMultistepScheduler":
        assert (known.pop("sigma_min"), known.pop("sigma_max")) == (None, None)
    if scheduler == "PNDMScheduler":
        assert known.pop("rescale_betas_zero_snr") is False  # shared by the models; ignored by this one
    assert known == defaults_of(scheduler)


FOREIGN_CONFIGS: dict[str, dict[str, Any]] = {
    "stable-diffusion-1.5": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "karras-bounds": {
        **STABLE_DIFFUSION,
        "_class_name": "EulerDiscreteScheduler",
        "sigma_min": 0.05,
        "sigma_max": 9.0,
    },
    "from-an-object": dict(diffusers.DDIMScheduler(**STABLE_DIFFUSION).config),
    "unknown-fields": {**STABLE_DIFFUSION, "_class_name": "SomethingElse", "colour": "green"},
}


@pytest.mark.parametrize("config", FOREIGN_CONFIGS.values(), ids=FOREIGN_CONFIGS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.short_name)
def test_config_is_read_as_from_config_reads_it(sampler: Sampler, config: dict[str, Any]) -> None:
    overrides = {k: v for k, v in sampler.overrides.items() if k in defaults_of(sampler.scheduler)}
    assert overrides == sampler.overrides
    reference = getattr(diffusers, sampler.scheduler).from_config(config, **overrides)
    searched = sampler.short_name == "euler_karras"
    for k in (5, 20):
        table = schedule(sampler.name, config, num_inference_steps=k)
        assert_same_map(table, reference, searched=searched, num_inference_steps=k)
    own = schedule(sampler.scheduler, own_config(reference), num_inference_steps=20)
    np.testing.assert_array_equal(own.matrix, table.matrix)
    assert (own.sampler, own.schedule_type) == (sampler.sampler, sampler.schedule_type)


def test_own_config_holds_as_it_stands() -> None:
    """A field that was changed after construction counts, though diffusers still lists it as never set."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **{k: STABLE_DIFFUSION[k] for k in ("beta_start", "beta_end")}
    )
    scheduler.register_to_config(timestep_spacing="trailing")
    assert "timestep_spacing" in scheduler.config["_use_default_values"]
    table = schedule("DPMSolverMultistepScheduler", own_config(scheduler), num_inference_steps=4)
    scheduler.set_timesteps(4)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()


REFUSED_OPTIONS = [
    ("DDIMScheduler", "clip_sample", True),
    ("DDIMScheduler", "thresholding", True),
    ("DDPMScheduler", "clip_sample", True),
    ("DDPMScheduler", "thresholding", True),
    ("DDPMScheduler", "variance_type", "learned_range"),
    ("DDPMScheduler", "variance_type", "fixed_large_log"),
    ("DDPMScheduler", "beta_schedule", "sigmoid"),
    ("EulerDiscreteScheduler", "use_exponential_sigmas", True),
    ("EulerDiscreteScheduler", "use_beta_sigmas", True),
    ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
    ("EulerDiscreteScheduler", "timestep_type", "continuous"),
    ("EulerDiscreteScheduler", "use_karras_sigmas", None),
    ("EulerAncestralDiscreteScheduler", "prediction_type", "sample"),
    ("DPMSolverMultistepScheduler", "thresholding", True),
    ("DPMSolverMultistepScheduler", "solver_order", 3),
    ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver++"),
    ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
    ("DPMSolverMultistepScheduler", "solver_type", "rk4"),
    ("DPMSolverMultistepScheduler", "prediction_type", "flow_prediction"),
    ("DPMSolverMultistepScheduler", "use_exponential_sigmas", True),
    ("DPMSolverMultistepScheduler", "use_beta_sigmas", True),
    ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
    ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
    ("DPMSolverMultistepScheduler", "use_dynamic_shifting", True),
    ("DPMSolverMultistepScheduler", "variance_type", "learned"),
    ("DPMSolverMultistepScheduler", "lambda_min_clipped", 99.0),
    ("DDIMScheduler", "timestep_spacing", "random"),
    ("DDIMScheduler", "beta_start", math.nan),
    ("DDIMScheduler", "beta_end", 1.5),
    ("DDIMScheduler", "num_train_timesteps", 10**12),
    ("DDIMScheduler", "steps_offset", 0.5),
    ("DDIMScheduler", "trained_betas", [0.1, 0.2]),
    ("DDIMScheduler", "trained_betas", [0.0] * 1000),
    ("DDIMScheduler", "trained_betas", ["a"] * 1000),
    ("DDIMScheduler", "trained_betas", 5),
]


@pytest.mark.parametrize(("scheduler", "option", "value"), REFUSED_OPTIONS, ids=lambda v: str(v)[:30])
def test_unsupported_option_is_refused_by_name(scheduler: str, option: str, value: Any) -> None:
    with pytest.raises(RequestError, match=option):
        schedule(scheduler, {**STABLE_DIFFUSION, option: value}, num_inference_steps=4)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_epsilon_model_with_zero_terminal_snr_is_refused(scheduler: str) -> None:
    config = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match=r"step 1 of 4, timestep 999.*prediction_type"):
        schedule(scheduler, config, num_inference_steps=4)


# ---------------------------------------------------------------- requests


BAD_REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no-steps": ("Euler", {}, "num_inference_steps is missing"),
    "zero": ("Euler", {"num_inference_steps": 0}, "outside 1 to 1000"),
    "negative": ("Euler", {"num_inference_steps": -3}, "outside 1 to 1000"),
    "billion": ("Euler", {"num_inference_steps": 10**9}, "outside 1 to 1000"),
    "float": ("Euler", {"num_inference_steps": 20.0}, "not a whole number"),
    "bool": ("Euler", {"num_inference_steps": True}, "not a whole number"),
    "text": ("Euler", {"num_inference_steps": "20"}, "not a whole number"),
    "both": ("Euler", {"timesteps": [9, 1], "sigmas": [3.0, 0.0]}, "both"),
    "steps-disagree": ("Euler", {"timesteps": [9, 1], "num_inference_steps": 3}, "make 2 steps"),
    "no-timesteps": ("Euler", {"timesteps": []}, "0 values"),
    "rising": ("Euler", {"timesteps": [1, 999]}, "must fall"),
    "repeated": ("Euler", {"timesteps": [9, 9]}, "must fall"),
    "too-high": ("Euler", {"timesteps": [1000, 1]}, "999 down to 0"),
    "below-zero": ("Euler", {"timesteps": [10, -1]}, "999 down to 0"),
    "nan-timestep": ("Euler", {"timesteps": [math.nan]}, "finite"),
    "words": ("Euler", {"timesteps": ["a"]}, "must all be numbers"),
    "no-list": ("Euler", {"timesteps": 7}, "not a list"),
    "a-word": ("Euler", {"sigmas": "321"}, "not a list"),
    "karras-timesteps": ("Euler Karras", {"timesteps": [9, 1]}, "Karras"),
    "fraction": ("DPM++ 2M", {"timesteps": [9.5, 1]}, "whole timesteps"),
    "ddim-timesteps": ("DDIM", {"timesteps": [9, 1]}, "DDIMScheduler takes no custom timesteps"),
    "ddpm-sigmas": ("DDPM", {"sigmas": [9, 0]}, "DDPMScheduler takes no custom sigmas"),
    "dpm-sigmas": ("DPM++ 2M", {"sigmas": [9, 0]}, "takes no custom sigmas"),
    "ancestral-sigmas": ("Euler a", {"sigmas": [9, 0]}, "takes no custom sigmas"),
    "one-sigma": ("Euler", {"sigmas": [9.0]}, "at least two"),
    "negative-sigma": ("Euler", {"sigmas": [9.0, -1.0]}, "0 or above"),
    "infinite-sigma": ("Euler", {"sigmas": [math.inf, 0.0]}, "finite"),
    "nan-eta": ("DDIM", {"num_inference_steps": 4, "eta": math.nan}, "eta"),
    "negative-eta": ("DDIM", {"num_inference_steps": 4, "eta": -0.1}, "eta"),
    "huge-eta": ("DDIM", {"num_inference_steps": 4, "eta": 9.0}, "more noise than"),
    "text-eta": ("DDIM", {"num_inference_steps": 4, "eta": "1"}, "eta"),
    "eta-elsewhere": ("Euler", {"num_inference_steps": 4, "eta": 0.5}, "only DDIM"),
    "offset-past-the-end": ("DDIM", {"num_inference_steps": 1000}, "timestep 1000"),
    "levels-fall-together": ("DPM++ 2M", {"num_inference_steps": 1000}, "fewer steps"),
}


@pytest.mark.parametrize(("name", "request_", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request_is_refused(name: str, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        schedule(name, STABLE_DIFFUSION, **{"num_inference_steps": None, **request_})


def test_trailing_timestep_below_zero_is_refused() -> None:
    """For 61 trailing steps diffusers lays out 62, the last at -1, where DDIM reads ᾱ from the wrong end."""
    config = {**STABLE_DIFFUSION, "timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match="timestep -1"):
        schedule("DDIM", config, num_inference_steps=61)
    table = schedule("Euler", config, num_inference_steps=61)
    assert_same_map(table, diffusers.EulerDiscreteScheduler.from_config(config), num_inference_steps=61)


def test_arrays_and_tensors_are_taken_as_lists_are() -> None:
    timesteps = [999, 500, 20]
    plain = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=None, timesteps=timesteps)
    for given in (np.array(timesteps), torch.tensor(timesteps), tuple(timesteps)):
        other = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=None, timesteps=given)
        np.testing.assert_array_equal(plain.matrix, other.matrix)
    betas = np.linspace(0.001, 0.015, 1000)
    listed = schedule("DDIM", {"clip_sample": False, "trained_betas": betas.tolist()}, num_inference_steps=4)
    arrayed = schedule("DDIM", {"clip_sample": False, "trained_betas": betas}, num_inference_steps=4)
    np.testing.assert_array_equal(listed.matrix, arrayed.matrix)


def test_a_refusal_is_short() -> None:
    with pytest.raises(RequestError) as refusal:
        schedule("DDIM", {**STABLE_DIFFUSION, "trained_betas": ["a"] * 1000}, num_inference_steps=4)
    assert len(str(refusal.value)) < 600


def test_table_is_read_only() -> None:
    table = schedule("DPM++ 2M Karras", STABLE_DIFFUSION, num_inference_steps=20)
    assert (len(table), table.registers, table.matrix.shape) == (20, 2, (20, 2, 4))
    for array in (table.timesteps, table.input_scale, table.matrix, table.draws_noise):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_one_schedule_cannot_change_the_next() -> None:
    first = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=4)
    second = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=4)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert not np.shares_memory(first.matrix, second.matrix)


# ---------------------------------------------------------------- names


NAMES = {
    "DPM++ 2M Karras": "dpmpp_2m_karras",
    "dpm++ 2m karras": "dpmpp_2m_karras",
    "DPM++ 2M Automatic": "dpmpp_2m_karras",
    "dpmpp_2m_karras": "dpmpp_2m_karras",
    "dpmpp-2m-karras": "dpmpp_2m_karras",
    "DPM++ 2M": "dpmpp_2m",
    "dpmpp_2m": "dpmpp_2m",
    "DPM++ 2M Uniform": "dpmpp_2m",
    "Euler a": "euler_a",
    "EULER A": "euler_a",
    "euler_ancestral": "euler_a",
    "k_euler_ancestral": "euler_a",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "Euler": "euler",
    "k_euler": "euler",
    " euler ": "euler",
    "Euler Karras": "euler_karras",
    "euler_karras": "euler_karras",
    "DDIM": "ddim",
    "DDIMScheduler": "ddim",
    "ddpm": "ddpm",
    "DDPMScheduler": "ddpm",
}


@pytest.mark.parametrize(("name", "short"), NAMES.items(), ids=NAMES)
def test_name_resolves(name: str, short: str) -> None:
    assert resolve(name).short_name == short


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.short_name)
def test_every_name_of_a_sampler_resolves_to_it(sampler: Sampler) -> None:
    names = (sampler.name, sampler.short_name, f"{sampler.sampler} {sampler.schedule_type}", *sampler.aliases)
    assert [resolve(name) for name in names] == [sampler] * len(names)
    assert hasattr(diffusers, sampler.scheduler)


@pytest.mark.parametrize("karras", [False, True])
def test_class_name_leaves_karras_to_the_config(karras: bool) -> None:
    config = {**STABLE_DIFFUSION, "use_karras_sigmas": karras}
    by_class = schedule("DPMSolverMultistepScheduler", config, num_inference_steps=20)
    by_name = schedule("DPM++ 2M Karras" if karras else "DPM++ 2M", STABLE_DIFFUSION, num_inference_steps=20)
    np.testing.assert_array_equal(by_class.matrix, by_name.matrix)
    assert (by_class.sampler, by_class.schedule_type) == ("DPM++ 2M", "Karras" if karras else "Uniform")
    assert resolve("DPMSolverMultistepScheduler").overrides == {}


@pytest.mark.parametrize(
    ("name", "nearest"), [("DPM 2M Karas", "DPM++ 2M Karras"), ("eular", "Euler"), ("dimm", "DDIM")]
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RequestError) as refusal:
        resolve(name)
    assert f"did you mean '{nearest}'?" in str(refusal.value)
    assert all(sampler.name in str(refusal.value) for sampler in SAMPLERS)


@pytest.mark.parametrize("name", ["", "UniPC", None, 7])
def test_unknown_name_lists_what_there_is(name: Any) -> None:
    with pytest.raises(RequestError, match=r"Known: DPM\+\+ 2M Karras"):
        resolve(name)
