"""Timing two sides against each other on a machine that is never quiet.

The sides run in turn, in changing order, so that a drift of the machine meets both; what is reported is each
side's median and the median of the pairwise ratios.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sdfast.columns import columns

Measure = Callable[[], float]  # does the work once and gives its seconds


@dataclass(frozen=True)
class Comparison:
    """What one measurement gave. Seconds; `ratio` is reference over sdfast: above 1, sdfast is faster."""

    name: str
    reference: float
    sdfast: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> tuple[str, ...]:
        span = f"{self.ratio_low:.2f}–{self.ratio_high:.2f}"
        return self.name, shown(self.reference), shown(self.sdfast), f"{self.ratio:.2f}×", span


def compare(name: str, reference: Measure, sdfast: Measure, *, rounds: int, warm_up: int = 1) -> Comparison:
    """Measure both sides `rounds` times in turn, after `warm_up` uncounted measures of each."""
    seconds = alternate({"reference": reference, "sdfast": sdfast}, rounds=rounds, warm_up=warm_up)
    ratios = [a / b for a, b in zip(seconds["reference"], seconds["sdfast"], strict=True)]
    return Comparison(
        name=name,
        reference=statistics.median(seconds["reference"]),
        sdfast=statistics.median(seconds["sdfast"]),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        rounds=rounds,
    )


def alternate(sides: Mapping[str, Measure], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """The seconds of each side by round, after `warm_up` uncounted ones; who begins changes from round to
    round."""
    for _ in range(warm_up):
        for measure in sides.values():
            measure()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for side in sorted(sides, reverse=bool(turn % 2)):
            seconds[side].append(sides[side]())
    return seconds


def clocked(work: Callable[[], object], *, settles: bool = True) -> Measure:
    """The measure of how long `work` takes, the device's queue included. settles: after a pause, see
    `settle`."""

    def measure() -> float:
        if settles:
            settle()
        _finish()
        start = time.perf_counter()
        with torch.no_grad():
            work()
        _finish()
        return time.perf_counter() - start

    return measure


def settle() -> None:
    """Let the other side's threads go to sleep: thread pools spin for a while after their last work."""
    time.sleep(0.1)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: list[Comparison]) -> str:
    """The comparisons for a terminal."""
    return columns([("", "stock", "sdfast", "ratio", "range"), *(row.row() for row in rows)])


def shown(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
