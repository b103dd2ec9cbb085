"""Who gets the places in the loop: the pictures that are due the earliest.

A picture is due when its job has waited `PATIENCE` times as long as the picture, and those of the job before
it, take alone. So short jobs overtake long ones, and jobs of one picture those of many; but a job that came
later overtakes only as long as it is due earlier: what is asked of a job is in proportion to what it asks
for, and nobody waits for ever. Of jobs of one kind the first to come is the first to go.

A picture that is due earlier than one in the loop takes its place; the other is put aside, with all that it
needs to go on. There are never more of these than places, for the memory that they hold.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import islice
from operator import attrgetter

from sdfast.request import Request
from sdfast.server.work import Work

PATIENCE = 7.0
"""Simulated on a processor (a row takes as long beside others as alone), with steps from 8 to 50: the 99th
percentile of all requests is that of first-come order, and that of short ones half or less. With less
patience short ones win less, with more the long ones wait longer than that."""

STEP_SECONDS = 0.01
"""That a step takes alone, until one was measured."""

TICKS = 32
"""So many are remembered."""


@dataclass(frozen=True)
class Picture:
    """A job's picture `index`."""

    work: Work
    index: int

    @property
    def due(self) -> tuple[float, int]:
        """What is smaller goes first."""
        return self.work.due(self.index), self.work.number


class Pace:
    """How long a step of a row takes, from the ticks that were. Any thread may ask."""

    def __init__(self) -> None:
        self._ticks: deque[float] = deque(maxlen=TICKS)
        self._pixel: float | None = None  # seconds of a row's step, for each pixel

    def ticked(self, seconds: float, rows: int, height: int, width: int) -> None:
        """A tick of so many rows took so long."""
        self._ticks.append(seconds / (rows * height * width))
        self._pixel = statistics.median(self._ticks)

    def patience(self, request: Request, steps: int) -> float:
        """Seconds that a job may wait for each of its pictures of so many steps."""
        pixel = self._pixel
        step = STEP_SECONDS if pixel is None else pixel * request.height * request.width
        return PATIENCE * step * steps


@dataclass(frozen=True)
class Changes:
    """Which pictures leave their places to others, and which get one."""

    leaving: Sequence[Picture]
    joining: Sequence[Picture]


def changes(works: Iterable[Work], places: int) -> Changes:
    """What is to change so that the pictures that are due the earliest have the places."""
    works = list(works)
    first = nsmallest(places, (p for work in works for p in _pictures(work, places)), key=attrgetter("due"))
    held = [Picture(work, index) for work in works for index in work.running.values()]
    aside = sum(len(work.aside) for work in works)
    leaving: list[Picture] = []
    joining: list[Picture] = []
    for picture in first:
        if picture in held:
            continue
        if len(held) < places:
            held.append(picture)
        else:
            returns = picture.index in picture.work.aside
            if aside + 1 - returns > places:
                continue
            aside += 1 - returns
            last = max((p for p in held if p not in first), key=attrgetter("due"))
            held[held.index(last)] = picture
            leaving.append(last)
        joining.append(picture)
    return Changes(leaving, joining)


def _pictures(work: Work, most: int) -> Iterable[Picture]:
    return (Picture(work, index) for index in islice(work.unfinished, most))
