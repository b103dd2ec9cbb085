"""The sides in turn: what is asked of them, and the figures of what they answer."""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from benchmarks.peers.channel import WorkerError
from benchmarks.peers.task import ASKED

BASE = "sdfast"  # whom the others are compared with


class Asked(Protocol):
    """A side that answers: see `worker`."""

    def ask(self, **question: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Comparison:
    """A measure of one side. Seconds; the ratios are the side's over sdfast's of the same round: above 1,
    sdfast is faster. Without sdfast among the sides there are none."""

    measure: str
    side: str
    seconds: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Seconds = dict[str, dict[str, list[float]]]
"""measure -> side -> seconds of each round"""


class Rounds:
    """idle: side -> the largest share of a processor that it took while others were measured.
    failed: side -> why it was left out from then on."""

    def __init__(
        self,
        sides: Sequence[str],
        say: Callable[[str], None],
        measures: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """measures: side -> what it is asked for; of those that are not named, everything."""
        self.idle: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._sides = sides
        self._say = say
        self._measures = measures or {}
        self._last: str | None = None
        self._seconds: Seconds = {name: {} for name in (*ASKED, "step")}

    def together(self, workers: Mapping[str, Asked], rounds: Mapping[str, int]) -> Seconds:
        """So many `rounds` of each measure, after one that is not counted, of sides that all stay open.

        Within a round every side has its turn, in an order that moves on by one from round to round.
        """
        for measure in ASKED:
            for turn in range(-1, rounds[measure]):
                for side in self._order(turn, [measure]):
                    with self._or_left_out(side):
                        self._measure(side, workers[side], measure, turn >= 0)
            self._say(f"{measure}: {rounds[measure]} rounds")
        return self._whole()

    def apart(
        self, opened: Callable[[str], AbstractContextManager[Asked]], rounds: Mapping[str, int]
    ) -> Seconds:
        """The same of sides that have no room beside one another: in each round a side is opened, measured,
        each measure once uncounted and once more, and closed."""
        for turn in range(max(rounds.values())):
            due = [measure for measure in ASKED if turn < rounds[measure]]
            for side in self._order(turn, due):
                with self._or_left_out(side), opened(side) as worker:
                    for measure in self._asked_of(side, due):
                        for counted in (False, True):
                            self._measure(side, worker, measure, counted)
            self._say(f"round {turn + 1}: {', '.join(due)}")
        self.idle.clear()  # nobody else was measured while a side was open
        return self._whole()

    def _order(self, turn: int, due: Sequence[str]) -> list[str]:
        """The sides that are still there and are asked for any of what is due."""
        there = [side for side in order(self._sides, turn) if side not in self.failed]
        return [side for side in there if self._asked_of(side, due)]

    def _asked_of(self, side: str, due: Sequence[str]) -> list[str]:
        return [measure for measure in due if measure in self._measures.get(side, ASKED)]

    @contextmanager
    def _or_left_out(self, side: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            self.failed[side] = str(error)
            self._say(f"{side} failed: {error}")

    def _measure(self, side: str, worker: Asked, measure: str, counted: bool) -> None:
        try:
            answer = worker.ask(do=measure)
        except WorkerError as error:
            raise WorkerError(f"{measure}: {error}") from error
        others_were = self._last != side  # measured since this side was: with two sides, not always
        self._last = side
        if not counted:
            return
        if answer["idle"] is not None and others_were:
            self.idle[side] = max(answer["idle"], self.idle.get(side, 0.0))
        self._seconds[measure].setdefault(side, []).append(answer["seconds"])
        if answer["step_seconds"] is not None:
            self._seconds["step"].setdefault(side, []).append(answer["step_seconds"])

    def _whole(self) -> Seconds:
        """Without the sides that failed."""
        whole = {
            name: {side: list(took) for side, took in by_side.items() if side not in self.failed}
            for name, by_side in self._seconds.items()
        }
        return {name: by_side for name, by_side in whole.items() if any(by_side.values())}


def order(sides: Sequence[str], turn: int) -> list[str]:
    """The sides in the order of round `turn`."""
    first = turn % len(sides) if sides else 0
    return [*sides[first:], *sides[:first]]


def compared(seconds: Seconds) -> list[Comparison]:
    """The figures of every measure and side."""
    return [
        _comparison(measure, side, own, by_side.get(BASE))
        for measure, by_side in seconds.items()
        for side, own in by_side.items()
    ]


def _comparison(measure: str, side: str, own: list[float], base: list[float] | None) -> Comparison:
    ratios = [a / b for a, b in zip(own, base, strict=True)] if base else []
    return Comparison(
        measure=measure,
        side=side,
        seconds=statistics.median(own),
        ratio=statistics.median(ratios) if ratios else None,
        ratio_low=min(ratios) if ratios else None,
        ratio_high=max(ratios) if ratios else None,
        rounds=len(own),
    )
