"""Rows that join and leave a loop: each as if it were alone, whoever comes and goes beside it."""

import random

import pytest
import torch

from sdfast.arithmetic import HostArithmetic, device
from sdfast.bucket import Buckets
from sdfast.loop import Rows
from sdfast.manifest import Span
from sdfast.row import Row
from tests.fakes import Failpoint, FakeEngine
from tests.test_loop import FURTHER, KEEPING, MIXED, SIDE, Arithmetics, alone, arithmetic, row

__all__ = ["arithmetic"]  # the fixture

EXACT = {"rtol": 1e-5, "atol": 1e-5}
KINDS = [
    *MIXED,
    *FURTHER,
    *KEEPING,
    {"name": "euler_a", "steps": 9, "seed": 11, "rescale": 0.4},
    {"name": "unipc", "steps": 8, "seed": 12, "negative": None},
    {"name": "dpmpp_2s", "steps": 5, "seed": 13},
    {"name": "lms", "steps": 8, "seed": 14},
    {"name": "ddim", "steps": 40, "seed": 15},
]


def wide() -> FakeEngine:
    return FakeEngine([Span(low=1, high=16)])


@pytest.mark.parametrize("lines", [1, 2, 3, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_rows_come_and_go_and_each_is_as_if_alone(
    arithmetic: Arithmetics, monkeypatch: pytest.MonkeyPatch, seed: int, lines: int
) -> None:
    """lines: of noise for how many steps there is room on the device."""
    chance, due = random.Random(seed), [alone(HostArithmetic, **kinds) for kinds in KINDS]
    monkeypatch.setattr(device, "NOISE", lines * 6 * 4 * 2 * 2 * 4)
    running, kinds_of, finished = Rows(wide(), [], SIDE, SIDE, arithmetic), dict[Row, int](), 0
    waiting = [chance.randrange(len(KINDS)) for _ in range(25)]
    while waiting or running.rows:
        leaving = [r for r in running.rows if r in running.finished or chance.random() < 0.02]
        for r in set(leaving) & set(running.finished):
            torch.testing.assert_close(running.latents_of(r), due[kinds_of[r]], **EXACT)
            finished += 1
        joining = []
        while waiting and len(running.rows) - len(leaving) + len(joining) < 6 and chance.random() < 0.6:
            joining.append(row(**KINDS[waiting[-1]]))
            kinds_of[joining[-1]] = waiting.pop()
        if leaving or joining:
            running.change(joining, leaving)
        running.tick()
    assert finished > 10


def test_a_row_keeps_its_step_and_order_when_others_join(arithmetic: Arithmetics) -> None:
    first, second = row(steps=4, negative=None), row(steps=3)
    running = Rows(wide(), [first], SIDE, SIDE, arithmetic)
    running.tick()
    before = running.latents_of(first)
    running.change(joining=[second])
    assert running.steps == {first: 1, second: 0}
    assert running.rows == [first, second]
    assert torch.equal(running.latents[0], before)
    assert torch.equal(running.latents[1], second.latents)
    assert not running.finished


def test_a_row_that_left_costs_nothing_more(arithmetic: Arithmetics) -> None:
    engine = wide()
    first, second = row(steps=4), row(steps=4, negative=None)
    running = Rows(engine, [first, second], SIDE, SIDE, arithmetic)
    running.tick()
    running.change(leaving=[first])
    running.tick()
    running.change(leaving=[second])
    running.tick()
    assert engine.calls["unet"] == [3, 1]
    assert not running.active and not running.rows


def test_a_row_that_is_not_finite_leaves_nothing_behind(arithmetic: Arithmetics) -> None:
    engine, kinds = wide(), {"steps": 5, "seed": 2}
    engine.failpoints["unet"] = Failpoint("nan", rows=[1, 3])  # of the second row, both
    good, bad, late = row(**kinds), row(seed=1, steps=5), row(seed=3, steps=5)
    running = Rows(engine, [good, bad], SIDE, SIDE, arithmetic)
    running.tick()
    running.change([late], [bad])
    engine.failpoints.clear()
    while running.active:
        running.tick()
    torch.testing.assert_close(running.latents_of(good), alone(arithmetic, **kinds), **EXACT)
    torch.testing.assert_close(running.latents_of(late), alone(arithmetic, seed=3, steps=5), **EXACT)


def test_without_memory_for_a_row_the_others_go_on(arithmetic: Arithmetics) -> None:
    engine, kinds = wide(), {"name": "euler_a", "steps": 6, "seed": 4}
    running = Rows(engine, [stays := row(**kinds)], SIDE, SIDE, arithmetic, Buckets(most=0))
    running.tick()
    bind, joins = engine.bind, row(seed=5)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    engine.bind = full  # type: ignore[method-assign,assignment]
    with pytest.raises(torch.OutOfMemoryError):
        running.change(joining=[joins])
    engine.bind = bind  # type: ignore[method-assign]
    running.change(leaving=[joins])
    while running.active:
        running.tick()
    torch.testing.assert_close(running.latents_of(stays), alone(arithmetic, **kinds), **EXACT)


def test_after_a_failed_tick_the_rows_go_on_in_other_tensors(arithmetic: Arithmetics) -> None:
    engine, kinds = wide(), {"name": "euler_a", "steps": 6, "seed": 4}
    buckets, made, make = Buckets(), list[object](), engine.bind
    engine.bind = lambda *given: made.append(given) or make(*given)  # type: ignore[method-assign]
    running = Rows(engine, [stays := row(**kinds), goes := row()], SIDE, SIDE, arithmetic, buckets)
    running.tick()
    engine.failpoints["unet"] = Failpoint("memory")
    with pytest.raises(torch.OutOfMemoryError):
        running.tick()
    engine.failpoints.clear()
    assert running.steps == {stays: 1, goes: 1}
    running.change(leaving=[goes], discard=True)
    Rows(engine, [row(), row()], SIDE, SIDE, arithmetic, buckets)
    assert len(made) == 3  # nobody gets those that failed
    while running.active:
        running.tick()
    torch.testing.assert_close(running.latents_of(stays), alone(arithmetic, **kinds), **EXACT)
