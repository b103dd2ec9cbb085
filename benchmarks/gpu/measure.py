"""Timing any number of sides against each other, in turn, on the device's own clock."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.document import one_line
from sdfast.timing import Measure

BURST = 0.03  # seconds that a burst of calls should take, so that launching them is not what is timed
MOST = 30  # calls of a burst
WARM_UP = 3  # calls of a network until all is compiled, and where there are CUDA graphs one is replayed


@dataclass
class Timed:
    """What a comparison gave: each side's seconds, one for each round, and why sides gave none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, reference: str) -> float | None:
        """The median of the rounds' ratios, reference over side: above 1, the side is faster."""
        if side not in self.seconds or reference not in self.seconds:
            return None
        pairs = zip(self.seconds[reference], self.seconds[side], strict=True)
        return statistics.median(slow / quick for slow, quick in pairs)


def alternate(measures: Mapping[str, Measure], rounds: int, limit: float, warm_up: int = 1) -> Timed:
    """Measure every side `rounds` times in turn, each round beginning with another side.

    Each is measured `warm_up` times before, uncounted; one that fails is left out. After three
    rounds no round begins later than `limit` seconds after the first.
    """
    timed, sides = Timed(), dict(measures)
    for side, measure in measures.items():
        for _ in range(warm_up):
            if side in sides:
                _try(timed, sides, side, measure)
    timed.seconds = {side: [] for side in sides}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - start > limit:
            break
        names = list(sides)
        for side in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            seconds = _try(timed, sides, side, sides[side])
            if seconds is not None:
                timed.seconds[side].append(seconds)
    return timed


def _try(timed: Timed, sides: dict[str, Measure], side: str, measure: Measure) -> float | None:
    try:
        return measure()
    except Exception as error:  # whatever a side fails with, the others go on
        timed.failed[side] = one_line(error)
        sides.pop(side)
        timed.seconds.pop(side, None)
        return None


def synchronised(work: Callable[[], object], device: torch.device) -> Measure:
    """The seconds of `work` on the host's clock, the device idle before and after: for whole pictures."""

    def measure() -> float:
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        return time.perf_counter() - start

    return measure


def burst(work: Callable[[], object], device: torch.device) -> Measure:
    """The seconds of one of several calls of `work` in a row, on the device's clock: for modules."""
    once = synchronised(work, device)
    calls: list[int] = []

    @torch.no_grad()
    def measure() -> float:
        if not calls:
            seconds = [once() for _ in range(WARM_UP + 2)][WARM_UP:]
            calls.append(max(1, min(MOST, round(BURST / min(seconds)))))
        if device.type != "cuda":
            return synchronised(lambda: [work() for _ in range(calls[0])], device)() / calls[0]
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        finish(device)
        first.record()
        for _ in range(calls[0]):
            work()
        last.record()
        finish(device)
        return first.elapsed_time(last) / 1e3 / calls[0]

    return measure


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
