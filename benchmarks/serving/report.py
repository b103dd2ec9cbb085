"""What the latencies say: for each side and rate, and how much a side can take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.client import Answered

NAMES = {
    "stock": "stock diffusers, one at a time",
    "alike": "sdfast engine, requests of one kind batched",
    "mixed": "sdfast engine, whole requests batched",
    "sdfast": "sdfast serve",
}


@dataclass(frozen=True)
class Point:
    """One side at one rate, all rounds. Seconds; throughput: pictures a second, from a round's first arrival
    to its last answer."""

    side: str
    rate: float
    answered: int
    failed: int
    throughput: float
    p50: float
    p95: float
    p99: float
    short_p50: float
    short_p99: float

    @classmethod
    def of(cls, side: str, rate: float, rounds: Sequence[Sequence[Answered]]) -> "Point":
        answers = [answer for answered in rounds for answer in answered]
        good = [answer for answer in answers if answer.status == 200]
        seconds = [answer.seconds for answer in good]
        short = [answer.seconds for answer in good if answer.arrival.short]
        span = sum(max(a.ended for a in answered) - answered[0].arrival.at for answered in rounds)
        return cls(
            side=side,
            rate=rate,
            answered=len(good),
            failed=len(answers) - len(good),
            throughput=len(good) / span,
            p50=_percentile(seconds, 50),
            p95=_percentile(seconds, 95),
            p99=_percentile(seconds, 99),
            short_p50=_percentile(short, 50),
            short_p99=_percentile(short, 99),
        )

    def row(self) -> tuple[str, ...]:
        told = (self.p50, self.p95, self.p99, self.short_p50, self.short_p99)
        return self.side, f"{self.rate:g}", f"{self.throughput:.2f}", *(f"{value:.2f}" for value in told)


HEADER = ("side", "arrive/s", "done/s", "p50 s", "p95 s", "p99 s", "short p50 s", "short p99 s")


def capacity(points: Sequence[Point], limit: float) -> float:
    """The rate up to which p99 stays within `limit` seconds, on the line between the rates measured."""
    found = 0.0
    for before, after in zip([None, *points], points, strict=False):
        if after.p99 <= limit:
            found = after.rate
            continue
        if before is not None:
            share = (math.log(limit) - math.log(before.p99)) / (math.log(after.p99) - math.log(before.p99))
            found = before.rate + share * (after.rate - before.rate)
        break
    return found


def ratios(points: Mapping[str, Sequence[Point]], limit: float) -> dict[str, Any]:
    """What sdfast takes at the same p99, and how short requests fare at the same rate, against each side."""
    most = {side: capacity(of_side, limit) for side, of_side in points.items()}
    told: dict[str, Any] = {"p99_limit_seconds": limit, "capacity": most}
    ours = {point.rate: point for point in points["sdfast"]}
    for side, of_side in points.items():
        if side == "sdfast":
            continue
        shared = [(point, ours[point.rate]) for point in of_side if point.rate in ours]
        told[side] = {
            "throughput_at_equal_p99": most["sdfast"] / most[side] if most[side] else None,
            "short_p99": {f"{theirs.rate:g}": theirs.short_p99 / own.short_p99 for theirs, own in shared},
        }
    return told


def plot(points: Mapping[str, Sequence[Point]], limit: float, path: Path) -> None:
    """p99 of all requests, and of the short ones, against the rate of arrivals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained")
    for axis, field, title in (
        (axes[0], "p99", "all requests"),
        (axes[1], "short_p99", "requests of at most 12 steps"),
    ):
        for side, of_side in points.items():
            rates, seconds = [p.rate for p in of_side], [getattr(p, field) for p in of_side]
            axis.plot(rates, seconds, marker="o", label=NAMES[side], linewidth=2 if side == "sdfast" else 1.2)
        axis.set(title=title, xlabel="requests a second", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].axhline(limit, color="grey", linestyle="--", linewidth=0.8)
    axes[0].set_ylabel("p99 latency, seconds")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _percentile(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) if seconds else math.nan
