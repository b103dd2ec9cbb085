"""The sides in turn: what is asked of them, and the figures of what they answer."""

import statistics
from collections.abc import Callable, Mapping, Sequence
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

    def __init__(self, sides: Mapping[str, Asked], say: Callable[[str], None]) -> None:
        self.sides = dict(sides)
        self.idle: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._say = say

    def run(self, rounds: Mapping[str, int]) -> Seconds:
        """So many `rounds` of each measure, after one that is not counted. Within a round every side has its
        turn, in an order that moves on by one from round to round."""
        seconds: Seconds = {name: {} for name in (*ASKED, "step")}
        for measure in ASKED:
            for turn in range(-1, rounds[measure]):
                for side in order(list(self.sides), turn):
                    self._turn(measure, side, seconds if turn >= 0 else None)
            self._say(f"{measure}: {rounds[measure]} rounds")
        whole = {name: {s: list(t) for s, t in by.items() if s in self.sides} for name, by in seconds.items()}
        return {name: by for name, by in whole.items() if any(by.values())}

    def _turn(self, measure: str, side: str, seconds: Seconds | None) -> None:
        if side not in self.sides:  # it failed earlier in this round
            return
        try:
            answer = self.sides[side].ask(do=measure)
        except WorkerError as error:
            self.failed[side] = f"{measure}: {error}"
            del self.sides[side]
            self._say(f"{side} failed: {self.failed[side]}")
            return
        if seconds is None:
            return
        if answer["idle"] is not None:
            self.idle[side] = max(answer["idle"], self.idle.get(side, 0.0))
        seconds[measure].setdefault(side, []).append(answer["seconds"])
        if answer["step_seconds"] is not None:
            seconds["step"].setdefault(side, []).append(answer["step_seconds"])


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
