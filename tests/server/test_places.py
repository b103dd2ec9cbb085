"""Who has the places in the loop: shorter jobs overtake longer ones, within bounds."""

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sdfast.request import Request
from sdfast.row import Member, Row
from sdfast.server import work as work_module
from sdfast.server.jobs import Job
from sdfast.server.places import PATIENCE, STEP_SECONDS, Pace, changes
from sdfast.server.work import Work


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def asked(width: int = 16, images: int = 1) -> Request:
    return Request.make(
        prompts=("a",),
        negative_prompts=(None,),
        height=16,
        width=width,
        num_inference_steps=4,
        num_images_per_prompt=images,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(work_module, "time", clock)
    return clock


def arrived(number: int, patience: float, images: int = 1) -> Work:
    """A job that has just come, prepared, with a name for each picture's row."""
    request = asked(images=images)
    work = Work(Job(f"{number}", "fake", request), lambda event: None, number, 4, patience)
    rows = [cast(Row, f"{number}.{i}") for i in range(images)]
    work.prepared = cast(Any, SimpleNamespace(rows=rows))
    return work


def settle(works: list[Work], places: int) -> tuple[list[str], list[str]]:
    """Do the changes that are due: who left and who joined, as job.picture."""
    due = changes(works, places)
    for picture in due.leaving:
        row = cast(Row, f"{picture.work.number}.{picture.index}")
        picture.work.put_aside(row, cast(Member, SimpleNamespace(row=row)))
    for picture in due.joining:
        picture.work.enter(picture.index)
    told = [[f"{p.work.number}.{p.index}" for p in pictures] for pictures in (due.leaving, due.joining)]
    return told[0], told[1]


def test_while_there_is_room_everybody_has_a_place(clock: Clock) -> None:
    works = [arrived(0, 1.0, images=2), arrived(1, 0.5)]
    assert settle(works, 3) == ([], ["1.0", "0.0", "0.1"])
    assert settle(works, 3) == ([], [])


def test_of_jobs_of_one_kind_the_first_to_come_goes_first(clock: Clock) -> None:
    works = [arrived(i, 1.0) for i in range(3)]
    assert settle(works, 1) == ([], ["0.0"])
    works.pop(0)
    assert settle(works, 1) == ([], ["1.0"])


def test_a_shorter_job_overtakes_until_the_longer_one_has_waited_in_proportion(clock: Clock) -> None:
    long, short = arrived(0, 5.0), arrived(1, 1.0)
    assert settle([long], 1) == ([], ["0.0"])
    clock.now += 3
    late = arrived(2, 1.0)
    assert settle([long, short, late], 1) == (["0.0"], ["1.0"])
    assert settle([long, late], 1) == ([], ["2.0"])
    clock.now += 3
    later = arrived(3, 1.0)  # due after the long one
    assert settle([long, later], 1) == ([], ["0.0"])
    assert long.running and not long.aside


def test_a_job_of_many_pictures_lets_others_pass_between_them(clock: Clock) -> None:
    many = arrived(0, 1.0, images=4)
    clock.now += 1.5
    one = arrived(1, 1.0)
    assert settle([many, one], 3) == ([], ["0.0", "0.1", "1.0"])


def test_there_are_never_more_aside_than_places(clock: Clock) -> None:
    first = [arrived(i, 100.0) for i in range(2)]
    settle(first, 2)
    second = [arrived(i, 50.0) for i in (2, 3)]
    assert settle([*first, *second], 2) == (["1.0", "0.0"], ["2.0", "3.0"])
    third = [arrived(i, 1.0) for i in (4, 5)]
    assert settle([*first, *second, *third], 2) == ([], [])
    works = [*first, second[0], *third]  # one of them is done
    assert settle(works, 2) == ([], ["4.0"])


def test_who_waits_is_due_later_than_whoever_runs(clock: Clock) -> None:
    """But where as many are aside as there may be."""
    chance, works, crowded = random.Random(3), list[Work](), 0
    for number in range(400):
        clock.now += chance.expovariate(1.0)
        works.append(arrived(number, chance.choice([1.0, 10.0, 100.0, 1e3]), images=chance.choice([1, 1, 3])))
        settle(works, 3)
        running = {(work.due(i), work.number) for work in works for i in work.running.values()}
        waiting = {(work.due(i), work.number) for work in works for i in [*work.waiting, *work.aside]}
        aside = sum(len(work.aside) for work in works)
        assert len(running) == min(3, len(running) + len(waiting))
        assert aside <= 3
        if waiting and min(waiting) < max(running):
            assert aside == 3
            crowded += 1
        for work in list(works):
            for row in [row for row in work.running if chance.random() < 0.6]:
                del work.running[row]
            if not work.unfinished:
                works.remove(work)
    assert 0 < crowded < 100


def test_patience_is_in_proportion_to_what_was_measured() -> None:
    pace, small = Pace(), asked(width=16)
    wide = asked(width=64)
    assert pace.patience(small, 10) == pytest.approx(PATIENCE * STEP_SECONDS * 10)
    for seconds in (9.0, 0.2, 0.2):  # the first tick of a size may take long
        pace.ticked(seconds, 2, 16, 16)
    assert pace.patience(small, 10) == pytest.approx(PATIENCE * 0.1 * 10)
    assert pace.patience(wide, 10) == pytest.approx(4 * PATIENCE * 0.1 * 10)
