"""Tables from scheduler objects: the same map as the object's, and a refusal of what is no table."""

import subprocess
import sys
import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdfast.errors import RequestError
from sdfast.schedulers import SAMPLERS, Sampler, Schedule, schedule
from sdfast.schedulers.extract import run_of
from tests.schedulers.diffusers_map import (
    STABLE_DIFFUSION,
    error_of,
    map_of_diffusers,
    map_of_table,
)


def object_of(sampler: Sampler, **options: Any) -> Any:
    return getattr(diffusers, sampler.scheduler).from_config(
        {**STABLE_DIFFUSION, **options}, **{**sampler.overrides, **options}
    )


# diffusers' DPM++ SDE draws from a Brownian tree, which is no independent noise a step.
FOLLOWED = [s for s in SAMPLERS if s.scheduler != "DPMSolverSDEScheduler"]


@pytest.mark.parametrize("steps", [4, 11])
@pytest.mark.parametrize("sampler", FOLLOWED, ids=lambda s: s.short_name)
def test_extracted_table_is_the_samplers_own(sampler: Sampler, steps: int) -> None:
    eta = 0.5 if sampler.scheduler in ("DDIMScheduler", "TCDScheduler") else 0.0
    scheduler = object_of(sampler)
    scheduler.set_timesteps(steps)
    table = Schedule.from_diffusers(scheduler, eta)
    own = schedule(sampler.name, STABLE_DIFFUSION, num_inference_steps=steps, eta=eta)
    assert error_of(map_of_table(table), map_of_table(own)) <= 1e-5
    np.testing.assert_array_equal(table.draws_noise, own.draws_noise)
    np.testing.assert_allclose(table.timesteps, own.timesteps, rtol=0, atol=1e-3)
    np.testing.assert_allclose(table.input_scale, own.input_scale, rtol=1e-5)
    assert table.init_noise_sigma == pytest.approx(own.init_noise_sigma, rel=3e-7)
    if hasattr(scheduler, "add_noise"):
        assert table.noising == pytest.approx(own.noising, rel=1e-5, abs=1e-6)
    assert table.registers <= own.registers
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()


# Classes that have no formulas here.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("IPNDMScheduler", {}),
    ("DDIMParallelScheduler", {"clip_sample": False}),
    ("DDPMParallelScheduler", {"clip_sample": False}),
    ("DPMSolverMultistepInverseScheduler", {}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("FlowMatchEulerDiscreteScheduler", {}),
]


@pytest.mark.parametrize("steps", [2, 4, 20])
@pytest.mark.parametrize(("name", "options"), OTHERS, ids=str)
def test_other_classes(name: str, options: dict[str, Any], steps: int) -> None:
    """The object's own results, chained, are the table's: the loop need not know the class."""
    scheduler = getattr(diffusers, name)(**options)
    table = run_of(scheduler, num_inference_steps=steps)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    x, *random = torch.randn(2 * steps + 1, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
    registers = np.zeros((table.registers, 1, 4, 2, 2))
    registers[0] = x.numpy()
    for k, t in enumerate(scheduler.timesteps):
        m, state = random[k], generator.get_state()
        extra = {"generator": generator} if table.draws_noise[k] else {}
        x = scheduler.step(m, t, x, **extra).prev_sample
        z = torch.zeros_like(m)
        if extra:
            z = torch.randn(m.shape, generator=generator.set_state(state), dtype=m.dtype)
        inputs = np.concatenate([registers, m.numpy()[None], z.numpy()[None]])
        registers = np.tensordot(table.matrix[k], inputs, axes=1)
    assert np.abs(registers[0] - x.numpy()).max() <= 1e-5 * np.abs(x.numpy()).max()


def test_a_start_in_the_middle_is_kept() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(STABLE_DIFFUSION)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(5)
    own = schedule("DPMSolverMultistepScheduler", STABLE_DIFFUSION, num_inference_steps=10, strength=0.5)
    asked = run_of(scheduler, num_inference_steps=10, strength=0.5)
    for table in (Schedule.from_diffusers(scheduler), asked):
        assert error_of(map_of_table(table), map_of_table(own)) <= 1e-5
        assert table.noising == pytest.approx(own.noising, rel=1e-5)


def test_custom_timesteps_are_the_objects() -> None:
    scheduler = diffusers.DDPMScheduler.from_config(STABLE_DIFFUSION)
    scheduler.set_timesteps(timesteps=[900, 500, 20])
    own = schedule("DDPMScheduler", STABLE_DIFFUSION, num_inference_steps=None, timesteps=[900, 500, 20])
    asked = run_of(scheduler, num_inference_steps=None, timesteps=[900, 500, 20])
    for table in (Schedule.from_diffusers(scheduler), asked):
        assert error_of(map_of_table(table), map_of_table(own)) <= 1e-5


def test_noise_of_a_brownian_motion_is_refused() -> None:
    """Steps of diffusers' DPM++ SDE share noise: there is a table of its own for that."""
    pytest.importorskip("torchsde")
    scheduler = _with_steps(diffusers.DPMSolverSDEScheduler.from_config(STABLE_DIFFUSION), 4)
    with pytest.raises(RequestError, match=r"draws noise|noise of shape"):
        Schedule.from_diffusers(scheduler)


def test_the_object_is_left_as_it_was() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(STABLE_DIFFUSION)
    scheduler.set_timesteps(5)
    Schedule.from_diffusers(scheduler)
    assert (scheduler.step_index, scheduler.begin_index, scheduler.model_outputs) == (
        None,
        None,
        [None, None],
    )
    truth = map_of_diffusers(scheduler, num_inference_steps=5)
    assert error_of(map_of_table(Schedule.from_diffusers(_with_steps(scheduler, 5))), truth.rows) <= 1e-5


def _with_steps(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


NOT_LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDPMScheduler", {"clip_sample": True}),
    ("DDPMScheduler", {"clip_sample": False, "thresholding": True}),
    ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ("LCMScheduler", {"clip_sample": True, "clip_sample_range": 3.0}),
]


@pytest.mark.parametrize(("name", "options"), NOT_LINEAR, ids=str)
def test_what_is_not_linear_is_refused(name: str, options: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(4)
    with pytest.raises(RequestError, match="not linear"):
        Schedule.from_diffusers(scheduler)


def test_an_object_without_finite_coefficients_is_refused() -> None:
    scheduler = diffusers.DDIMInverseScheduler(clip_sample=False, prediction_type="sample")
    with pytest.raises(RequestError, match="no finite coefficients for step 1 of 4"):
        run_of(scheduler, num_inference_steps=4)


def test_clipping_without_effect_is_no_hindrance() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=1e6)
    scheduler.set_timesteps(4)
    free = diffusers.DDIMScheduler(clip_sample=False)
    free.set_timesteps(4)
    tables = [Schedule.from_diffusers(one).matrix for one in (scheduler, free)]
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_an_object_without_timesteps_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="call its set_timesteps"):
        Schedule.from_diffusers(getattr(diffusers, name)())


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_an_object_in_the_middle_of_a_run_is_refused(name: str) -> None:
    scheduler = _with_steps(getattr(diffusers, name)(), 5)
    x = torch.zeros(1, 4, 2, 2)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(RequestError, match="stepped already"):
        Schedule.from_diffusers(scheduler)


class Plain:
    """The least that counts as a scheduler; what a step does is given."""

    num_inference_steps = None

    def __init__(self, step: Any) -> None:
        self._step = step
        self.seen: list[torch.Tensor] = []

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, 0, -1)

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> Any:
        self.seen.append(model_output)
        return self._step(self, model_output, sample)


WEIGHTS = np.random.default_rng(0).normal(size=(41, 40)).tolist()
PLAIN: dict[str, tuple[Any, str]] = {
    "two-draws": (lambda s, m, x: (x + torch.randn(m.shape) + torch.randn_like(m),), "draws noise 2 times"),
    "own-noise": (lambda s, m, x: (x + torch.rand(m.shape),), "something of nothing"),
    "noise-for-all": (lambda s, m, x: (x + torch.randn(1),), r"noise of shape \[1\]"),
    "noise-by-sides": (lambda s, m, x: (x * m + torch.randn(*m.shape),), "not linear"),
    "constant": (lambda s, m, x: (x + 1,), "something of nothing"),
    "two-outputs": (lambda s, m, x: (torch.cat([x, x], 1),), "something else"),
    "no-tensor": (lambda s, m, x: {"sample": x}, "something else"),
    "neighbours": (lambda s, m, x: (x.roll(1, -1),), "not linear"),
    "square": (lambda s, m, x: (x * m,), "not linear"),
    "all-of-the-past": (
        lambda s, m, x: (x + sum(w * seen for w, seen in zip(WEIGHTS[len(s.seen)], s.seen, strict=False)),),
        "20 tensors of earlier steps",
    ),
    "raises": (lambda s, m, x: s.nothing, "refuses a step"),
}


@pytest.mark.parametrize(("step", "message"), PLAIN.values(), ids=PLAIN)
def test_what_cannot_be_a_table_says_why(step: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_of(Plain(step), num_inference_steps=40)


def test_what_a_step_needs_of_earlier_ones_is_held_as_long_as_it_is_needed() -> None:
    scheduler = Plain(lambda s, m, x: (x - m + (s.seen[-3] / 2 if len(s.seen) > 2 else 0),))
    table = run_of(scheduler, num_inference_steps=9)
    assert table.registers == 3  # the latents and two model outputs
    np.testing.assert_allclose(map_of_table(table)[-1, :10], [1, *[-0.5] * 7, -1, -1], atol=1e-12)


def test_a_sum_over_all_earlier_steps_is_one_register() -> None:
    table = run_of(Plain(lambda s, m, x: (x + sum(s.seen),)), num_inference_steps=40)
    assert table.registers == 2
    np.testing.assert_allclose(map_of_table(table)[-1, 1:41], np.arange(40, 0, -1), atol=1e-9)


def test_a_scheduler_that_is_none_and_bad_requests_are_refused() -> None:
    with pytest.raises(RequestError, match="int is no scheduler"):
        Schedule.from_diffusers(5)
    with pytest.raises(RequestError, match="UNet is no scheduler"):
        run_of(type("UNet", (), {"config": {}})(), num_inference_steps=4)
    scheduler = diffusers.DPMSolverMultistepInverseScheduler()
    with pytest.raises(RequestError, match="takes no sigmas"):
        run_of(scheduler, num_inference_steps=None, sigmas=[3.0, 0.0])
    parallel = diffusers.DDIMParallelScheduler()
    with pytest.raises(RequestError, match="refuses num_inference_steps=2000"):
        run_of(parallel, num_inference_steps=2000)
    with pytest.raises(RequestError, match="no step to do"):
        run_of(parallel, num_inference_steps=-3)
    with pytest.raises(RequestError, match="step takes none"):
        run_of(scheduler, num_inference_steps=3, eta=1.0)


def test_other_threads_draw_their_own_noise() -> None:
    """While an object is followed, noise elsewhere stays noise."""
    drawn: list[torch.Tensor] = []

    def step(scheduler: Plain, m: torch.Tensor, x: torch.Tensor) -> Any:
        thread = threading.Thread(target=lambda: drawn.append(torch.randn(5)))
        thread.start()
        thread.join()
        return (x + torch.randn(m.shape),)

    table = run_of(Plain(step), num_inference_steps=2)
    assert table.draws_noise.all()
    assert all(len(noise) == 5 and noise.std() > 0 for noise in drawn)


def test_tables_import_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, sdfast.schedulers as s; s.schedule('Euler', {}, num_inference_steps=4);"
        "assert not {'torch', 'diffusers'} & set(sys.modules);"
        "import sdfast.schedulers.extract; assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
