"""The fused arithmetic beside the definition, and in the tests of the loop that step rows."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sdfast.arithmetic import Buffers, Capacity, DeviceArithmetic, FusedArithmetic, Keep, Plan, fused
from sdfast.errors import BackendError
from sdfast.noise import generator
from sdfast.row import Row
from sdfast.schedulers import schedule
from tests import test_joining, test_loop
from tests.fakes import SCHEDULER_CONFIG
from tests.test_loop import row

EPS = torch.finfo(torch.float32).eps
SHAPE = (4, 9, 11)  # 396 numbers: a tile and a half
# Long in the interpreter: a case of the first, and the second, are slow tests below.
LONG = "test_rows_come_and_go_and_each_is_as_if_alone"
REUSED = "test_tensors_are_left_to_the_next_rows"
LEFT_OUT = {LONG, REUSED, "test_rows_are_padded_and_split_over_the_forms_there_are"}
globals().update(
    {
        name: value
        for module in (test_loop, test_joining)
        for name, value in vars(module).items()
        if name.startswith("test_")
        and name not in LEFT_OUT
        and "arithmetic" in inspect.signature(value).parameters
    }
)


@pytest.fixture(autouse=True)
def _on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "why_none", lambda device: "")


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> type[FusedArithmetic]:
    """For rows that do not rescale their guidance: the kernels leave the others to torch."""

    def without(**kinds: Any) -> Row:
        return row(**{**kinds, "rescale": 0.0})

    monkeypatch.setattr(test_loop, "row", without)
    monkeypatch.setattr(test_joining, "row", without)
    return FusedArithmetic


@pytest.mark.slow
def test_rows_come_and_go(arithmetic: type[FusedArithmetic], monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(test_joining, LONG)(arithmetic, monkeypatch, seed=0, lines=2)


@pytest.mark.slow
def test_tensors_are_used_again(arithmetic: type[FusedArithmetic]) -> None:
    getattr(test_loop, REUSED)(arithmetic)


def plan(name: str, steps: int, guidance: float | None, seed: int, keeps: bool) -> Plan:
    chosen = schedule(name, SCHEDULER_CONFIG, num_inference_steps=steps)
    draw = generator(seed)
    shifts = [torch.randn(steps, 5, generator=draw) for _ in range(1 if guidance is None else 2)]
    keep = None
    if keeps:
        anew = torch.rand(1, *SHAPE[1:], generator=draw) < 0.5
        keep = Keep(anew, torch.randn(SHAPE, generator=draw), torch.randn(SHAPE, generator=draw))

    def noise(step: int) -> torch.Tensor:
        return torch.randn(SHAPE, generator=generator(1000 * seed + step))

    return Plan(chosen, shifts, 1.0 if guidance is None else guidance, 0.0, noise, keep)


def plans(draws: bool, keeps: bool) -> list[Plan]:
    """Guided rows first; the guidance on both sides of where lerp changes over, and at its ends."""
    mixed = [("dpmpp_2m", 3, 7.5), ("ddim", 2, 0.3), ("unipc", 5, 1.0), ("lms", 4, None), ("euler", 2, None)]
    mixed = [("euler_a", 4, 0.0), *mixed, ("ddpm", 3, None)] if draws else mixed
    return [plan(name, steps, scale, i, keeps and i % 2 == 0) for i, (name, steps, scale) in enumerate(mixed)]


def buffers(rows: int, dtype: torch.dtype, beside: int) -> Buffers:
    sample = torch.zeros(rows, SHAPE[0] + beside, *SHAPE[1:], dtype=dtype)
    sample[:, SHAPE[0] :] = 3.0
    return Buffers(sample, torch.zeros(rows, *SHAPE, dtype=dtype), torch.zeros(rows, 5, dtype=dtype))


def guidance_terms(said: torch.Tensor, rows: Sequence[Plan], guided: int) -> torch.Tensor:
    """What a row's guidance adds up, in absolute values, [n, C, h, w]."""
    terms = said[guided : guided + len(rows)].float().nan_to_num().abs()
    for i, one in enumerate(rows[:guided]):
        negative, positive = said[i].float(), said[guided + i].float().nan_to_num()
        terms[i] += negative.abs() + (abs(one.guidance) + 1) * (positive - negative).abs()
    return terms


@pytest.mark.parametrize(
    ("dtype", "draws", "keeps", "beside"),
    [
        (torch.float16, True, True, 5),
        pytest.param(torch.float32, True, False, 0, marks=pytest.mark.slow),
        pytest.param(torch.float16, False, False, 5, marks=pytest.mark.slow),
        pytest.param(torch.float32, False, True, 0, marks=pytest.mark.slow),
    ],
)
def test_every_tick_equals_the_definitions(dtype: torch.dtype, draws: bool, keeps: bool, beside: int) -> None:
    """From the same tensors, whatever the U-Net says; NaN for rows that have ended."""
    rows = plans(draws, keeps)
    capacity = Capacity.of(rows)
    n, guided = capacity.rows, capacity.guided
    both = [
        made(buffers(n + guided + 2, dtype, beside), capacity)  # two rows of padding
        for made in (DeviceArithmetic, FusedArithmetic)
    ]
    chance, steps = generator(9), [0] * n
    for one in both:
        one.place(rows, steps, [torch.randn(1, *SHAPE, generator=generator(20 + i)) for i in range(n)])
        one.prepare(steps)
    for _ in range(7):
        said = torch.randn(n + guided + 2, *SHAPE, generator=chance).to(dtype)
        for i, (k, one_plan) in enumerate(zip(steps, rows, strict=True)):
            if k == len(one_plan.schedule):
                said[guided + i] = torch.nan
        before = both[0]._state.clone()
        for one in both:
            one._state.copy_(before)
            one._buffers.output.copy_(said)
            one.feed(steps)
        lines = both[0]._table_line.clone()
        due, ours = both
        due.advance()
        ours.advance()
        # the sum that a number is, term by term: its rounding is some ulps of the largest
        terms = due._matrices[lines].abs() @ due._state.abs().maximum(before.abs())
        if keeps:
            terms += due._image.abs().max() + due._image_noise.abs().max()
        assert ((ours._state[:, :-2] - due._state[:, :-2]).abs() <= 4 * EPS * terms[:, :-1]).all()
        assert ((ours._m - due._m).abs() <= EPS * guidance_terms(said, rows, guided)).all()
        for i, one_plan in enumerate(rows[:guided]):
            ends = {0.0: said[i], 1.0: said[guided + i]}
            if one_plan.guidance in ends and steps[i] < len(one_plan.schedule):
                assert torch.equal(ours.output(i), ends[one_plan.guidance].float())
        assert torch.equal(ours._lines, due._lines)
        assert torch.equal(ours._buffers.time_shift, due._buffers.time_shift)
        a, b = (one._buffers.sample.float() for one in (ours, due))
        slack = 4 * EPS * terms.abs().max() + (2.0**-10 * b.abs() if dtype == torch.float16 else 0)
        assert ((a - b).abs() <= slack).all()
        assert torch.equal(a[:guided], a[guided : 2 * guided])
        assert (a[:, SHAPE[0] :] == 3).all() and not a[n + guided :, : SHAPE[0]].any()
        steps = [min(k + 1, len(p.schedule)) for k, p in zip(steps, rows, strict=True)]
    for i in range(n):
        assert torch.equal(ours.output(i), torch.zeros(SHAPE))


def test_rows_that_rescale_their_guidance_advance_as_in_torch() -> None:
    kinds = {"name": "dpmpp_2m", "steps": 3, "rescale": 0.6}
    ours, due = (test_loop.alone(made, **kinds) for made in (FusedArithmetic, DeviceArithmetic))
    assert torch.equal(ours, due)


def test_where_the_kernels_cannot_run_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows = plans(draws=False, keeps=False)
    with pytest.raises(BackendError, match=r"NVIDIA.*'cpu'.*use DeviceArithmetic"):
        FusedArithmetic(buffers(8, torch.float32, 0), Capacity.of(rows))


def test_a_tensor_that_lies_apart_is_refused() -> None:
    capacity, apart = Capacity.of(plans(draws=False, keeps=False)), buffers(16, torch.float32, 0)
    apart = Buffers(apart.sample, apart.output[::2], apart.time_shift)
    with pytest.raises(ValueError, match="output must be contiguous"):
        FusedArithmetic(apart, capacity)
