"""The linear map of a diffusers scheduler, and whether a table is the same.

The scheduler is run on basis vectors: the starting latents, every model output and every noise are one
direction each, so that the sample after a step *is* the row of coefficients of all the steps so far.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from sdfast.schedulers import Schedule, own_config, schedule
from sdfast.schedulers.config import RESPACINGS, read
from sdfast.schedulers.noise import alpha_bar_at, sigma_alphas, sigmas_of
from sdfast.schedulers.solvers import SOLVERS

STEPS = (1, 2, 3, 4, 10, 20, 50)
SOME_STEPS, MANY_STEPS = 10, 20  # what an everyday test proves: of every case, and of a scheduler's first
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
    strength: float = 1.0

    @property
    def config(self) -> dict[str, Any]:
        names = defaults_of(self.scheduler)
        return {k: v for k, v in {**STABLE_DIFFUSION, **self.options}.items() if k in names}

    def __str__(self) -> str:
        short = self.scheduler.removesuffix("Scheduler")
        values = [
            f"{k}={v}" if not isinstance(v, str) else v
            for k, v in self.options.items()
            if k != "trained_betas"
        ]
        return "-".join(
            [
                short,
                *filter(None, [self.label]),
                *values,
                *([f"eta={self.eta}"] if self.eta else []),
                *([f"strength={self.strength}"] if self.strength < 1 else []),
            ]
        )


class Float64Torch:
    """The torch module, except that float32 is float64: diffusers' arithmetic without its rounding."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def from_numpy(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float64) if array.dtype == np.float32 else array)


class BasisNoise:
    """Stands in for diffusers' sources of noise: hands out the current step's direction, and keeps count."""

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
    with (
        mock.patch.object(module, "randn_tensor", noise, create=True),
        mock.patch.object(module, "BrownianTreeNoiseSampler", lambda *_: noise, create=True),
        arithmetic_of(scheduler, exact),
    ):
        yield noise


@contextmanager
def arithmetic_of(scheduler: Any, exact: bool) -> Iterator[None]:
    """With `exact`, the scheduler's module computes in float64."""
    own = torch.get_default_dtype()
    with mock.patch.object(inspect.getmodule(type(scheduler)), "torch", Float64Torch() if exact else torch):
        torch.set_default_dtype(torch.float64 if exact else own)
        try:
            yield
        finally:
            torch.set_default_dtype(own)


@dataclass(frozen=True)
class LinearMap:
    timesteps: np.ndarray  # [K]
    input_scale: np.ndarray  # [K]
    rows: np.ndarray  # [K, 1 + 2K]: the latents after each step, by x_T, the model outputs and the noises
    draws: np.ndarray  # [K] bool
    init_noise_sigma: float
    noising: np.ndarray | None  # [K, 2], of `add_noise` before each step; None: it has none, or was not asked


@torch.inference_mode()  # of the same numbers, by a tenth to a third sooner
def map_of_diffusers(
    scheduler: Any,
    eta: float = 0.0,
    start: int = 0,
    *,
    exact: bool = False,
    noised: bool = True,
    **request: Any,
) -> LinearMap:
    """The map of a diffusers scheduler; `request` goes to its `set_timesteps`.

    With `exact`, the noise levels stay the float32 ones, but all arithmetic on them is float64. With `noised`
    its `add_noise` is asked before each step, which takes a fifth of the time.
    """
    noised = noised and hasattr(scheduler, "add_noise")
    if exact:
        make_exact(scheduler)
    with arithmetic_of(scheduler, exact):
        scheduler.set_timesteps(**request)
    if exact and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    begin = start * scheduler.order
    # Without a begin, diffusers takes a repeated timestep for its second and runs out of steps.
    repeated = bool((scheduler.timesteps[1:] == scheduler.timesteps[0]).any())
    if hasattr(scheduler, "set_begin_index") and (start or repeated):
        scheduler.set_begin_index(begin)
    chosen = scheduler.timesteps[begin:]
    K = len(chosen)
    x, *directions = torch.eye(1 + 2 * K, dtype=torch.float64)[:, None]
    m, z = directions[:K], directions[K:]
    extra = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    scales, rows, noising = [], [], []
    with noise_from(scheduler, z, exact) as noise:
        for k, t in enumerate(chosen):
            noise.step = k
            if noised:
                noising.append(noising_at(scheduler, t))
            scales.append(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t).item())
            x = scheduler.step(m[k], t, x, **extra).prev_sample
            rows.append(x[0].double().numpy())
    timesteps, init = chosen.double().numpy(), float(scheduler.init_noise_sigma)
    known = np.array(noising) if noised else None
    return LinearMap(timesteps, np.array(scales), np.array(rows), noise.draws, init, known)


def noising_at(scheduler: Any, t: torch.Tensor) -> tuple[float, float]:
    """What diffusers' `add_noise` makes of a picture and of noise before its step at t."""
    begin = getattr(scheduler, "begin_index", None)
    if hasattr(scheduler, "set_begin_index") and begin is None:
        scheduler._begin_index = 0  # the pipelines that add noise set one
    picture, noise = torch.eye(2, dtype=torch.float64)[:, :, None]  # two latents of one number each
    noisy = scheduler.add_noise(picture, noise, t.repeat(2))
    if hasattr(scheduler, "set_begin_index"):
        scheduler._begin_index = begin
    return float(noisy[0]), float(noisy[1])


def make_exact(scheduler: Any) -> None:
    """Give diffusers sdfast's noise levels, in float64, so that only the arithmetic is compared.

    They are diffusers' own but for the last bit: see `test_noise_levels_are_diffusers`.
    """
    model, _ = SOLVERS[type(scheduler).__name__]
    config = read(model, own_config(scheduler), {})
    alpha_bar = alpha_bar_at(config, np.arange(config.num_train_timesteps))
    if hasattr(scheduler, "sigmas"):
        alpha_bar = 1 / (1 + sigmas_of(sigma_alphas(config)).astype(np.float64) ** 2)
    scheduler.alphas_cumprod = torch.from_numpy(alpha_bar)
    if hasattr(scheduler, "_convert_to_lu"):
        layout, lambdas = scheduler._convert_to_lu, np.log(sigmas_of(sigma_alphas(config)))[::-1]
        scheduler._convert_to_lu = lambda in_lambdas, **steps: layout(in_lambdas=lambdas, **steps)
    if not getattr(scheduler.config, "set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
    if hasattr(scheduler, "get_scalings_for_boundary_condition_discrete"):
        scalings = scheduler.get_scalings_for_boundary_condition_discrete
        scheduler.get_scalings_for_boundary_condition_discrete = lambda t: scalings(float(t))


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


def assert_case(case: Case, steps: int, *, rounds: bool = False, bound: float = 1e-5) -> None:
    """The case's table is the map of the scheduler that diffusers makes of the same options."""
    table = schedule(
        case.scheduler, case.config, num_inference_steps=steps, eta=case.eta, strength=case.strength
    )
    start = steps - int(steps * case.strength)
    assert_same_map(
        table, built(case), case.eta, start=start, rounds=rounds, bound=bound, num_inference_steps=steps
    )


def assert_every(case: Case, every: Iterable[int], proof: Callable[[Case, int], None]) -> None:
    """`proof` holds of the case at each of these numbers of steps; of all where it does not, it is told."""
    failures = []
    for steps in every:
        try:
            proof(case, steps)
        except Exception as error:  # whatever it is: the numbers after it are tried as well
            error.add_note(f"{case} in {steps} steps")
            failures.append(error)
    if failures:
        raise ExceptionGroup(f"{case}: at {len(failures)} numbers of steps", failures)


def of_cases(runs: Sequence[tuple[Case, tuple[int, ...]]]) -> pytest.MarkDecorator:
    """A test of each case with the numbers of steps that it is proved at: thousands of tests would cost more.

    What pytest and its workers do for one test takes as long as a proof of a few steps. Proofs of many steps
    take longer than all others of their case together: these are slow tests, but for those of up to 20 steps
    of the first case of a scheduler, and where there are no others.
    """
    given, met = [], set()
    for case, every in runs:
        most = SOME_STEPS if case.scheduler in met else MANY_STEPS
        met.add(case.scheduler)
        usual = tuple(steps for steps in every if steps <= most)
        long = tuple(steps for steps in every if steps not in usual)
        if usual:
            given.append(pytest.param(case, usual, id=str(case)))
        if long:
            marks = [pytest.mark.slow] if usual else []
            named = " and ".join(map(str, long))
            given.append(pytest.param(case, long, id=f"{case}, {named} steps", marks=marks))
    return pytest.mark.parametrize(("case", "every"), given)


def built(case: Case) -> Any:
    """The case's diffusers scheduler, without the timesteps: some classes lay out all thousand at first."""
    kind = getattr(diffusers, case.scheduler)
    lay_out = kind.set_timesteps
    with mock.patch.object(kind, "set_timesteps", lambda self, *_: lay_out(self, 1)):
        return kind(**case.config)


def assert_same_map(
    table: Schedule,
    scheduler: Any,
    eta: float = 0.0,
    *,
    start: int = 0,
    rounds: bool = False,
    bound: float = 1e-5,
    **request: Any,
) -> None:
    """The table is diffusers' map: to rounding, when its formulas run in float64, and to 1e-5, as they run.

    start: how many steps of the run are left out at the noisy end, as in image to image.
    rounds: the case is one where diffusers' own float32 arithmetic is off by more than the bound.
    bound: how far that may be off.
    """
    rows = map_of_table(table)
    exact = map_of_diffusers(copy.deepcopy(scheduler), eta, start, exact=True, noised=rounds, **request)
    assert error_of(rows, exact.rows) <= 1e-12

    truth = map_of_diffusers(scheduler, eta, start, **request)
    off = timestep_error(scheduler, request)
    if rounds:
        assert not is_near(table, truth, bound, off)
        truth = exact
    assert error_of(rows, truth.rows) <= bound
    np.testing.assert_allclose(table.timesteps, truth.timesteps, rtol=0, atol=off)
    np.testing.assert_array_equal(table.draws_noise, truth.draws)
    np.testing.assert_allclose(table.input_scale, truth.input_scale, rtol=1e-5)
    assert table.init_noise_sigma == pytest.approx(truth.init_noise_sigma, rel=3e-7)
    if truth.noising is not None:
        np.testing.assert_allclose(table.noising[:-1], truth.noising, rtol=1e-5, atol=1e-6)
        assert table.noising[-1].tolist() == [1.0, 0.0]


def is_near(table: Schedule, truth: LinearMap, bound: float, off: float) -> bool:
    """Whether the bounds on the map, on the timesteps and on the input scale are all kept."""
    return bool(
        error_of(map_of_table(table), truth.rows) <= bound
        and np.abs(table.timesteps - truth.timesteps).max() <= off
        and np.allclose(table.input_scale, truth.input_scale, rtol=1e-5, atol=0)
    )


def timestep_error(scheduler: Any, request: Mapping[str, Any]) -> float:
    """How far the timesteps may be off: not at all, unless they are found by their noise level.

    Fractional timesteps found so hang on float32 logarithms of float32 square roots, whose last bit differs
    from processor to processor.
    """
    config = scheduler.config
    continuous = config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction"
    if continuous or "sigma_data" in config:
        return 1e-6  # they are the level's logarithm
    laid_out_anew = "sigmas" in request or any(config.get(name) for name in RESPACINGS)
    half_way = hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "mid_point_sigma")
    return 1e-3 if (laid_out_anew or half_way) and scheduler.timesteps.dtype.is_floating_point else 0


@cache
def defaults_of(scheduler: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("self", "args", "kwargs")}
