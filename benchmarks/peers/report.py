"""The tables of a run, and its JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.rounds import Comparison
from benchmarks.peers.task import MEASURES
from sdfast.columns import columns
from sdfast.timing import shown

PRECISION = "{used} (without being told: {without_the_hint})"


@dataclass
class Opened:
    """What is known of a side, or why it did not take part.

    seconds: of each opening, after the imports, with the files in the page cache.
    """

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    open_peak_bytes: int | None = None
    peak_bytes: int | None = None
    idle: float | None = None
    distances: Mapping[str, float] = field(default_factory=dict)
    failed: str | None = None

    def as_json(self) -> dict[str, Any]:
        told = {
            "open_seconds": middle(self.seconds),
            "open_seconds_each": [round(second, 3) for second in self.seconds],
            **self.facts,
            "open_peak_bytes": self.open_peak_bytes,
            "peak_bytes": self.peak_bytes,
            "idle_processor_share": self.idle,
            "distances": {name: _finite(value) for name, value in self.distances.items()},
        }
        return told if self.failed is None else {"failed": self.failed, **told}


def middle(seconds: Sequence[float]) -> float | None:
    """The median, or None of none."""
    return round(sorted(seconds)[len(seconds) // 2], 3) if seconds else None


def tables(comparisons: Sequence[Comparison], sides: Mapping[str, Opened]) -> str:
    """Both tables: what was measured, and what is known of each side."""
    return f"{measures(comparisons)}\n\n{properties(sides)}"


def measures(comparisons: Sequence[Comparison]) -> str:
    """A line for each measure and side."""
    lines = [("", "side", "median", "to sdfast", "range", "rounds")]
    last = ""
    for one in comparisons:
        name = MEASURES[one.measure]
        lines.append(("" if name == last else name, one.side, shown(one.seconds), *_ratio(one)))
        last = name
    return columns(lines)


def _ratio(one: Comparison) -> tuple[str, str, str]:
    if one.ratio is None or one.ratio_low is None or one.ratio_high is None:
        return "", "", str(one.rounds)
    return f"{one.ratio:.2f}×", f"{one.ratio_low:.2f}–{one.ratio_high:.2f}", str(one.rounds)


def properties(sides: Mapping[str, Opened]) -> str:
    """A line for each side; those that did not take part say why."""
    lines = [("side", "opens in", "peak memory", "idle", "PSNR", "U-Net error", "precision")]
    lines += [_of(name, side) for name, side in sides.items() if side.failed is None]
    lost = [f"{name}: {side.failed}" for name, side in sides.items() if side.failed is not None]
    return "\n".join([columns(lines), *lost])


def _of(name: str, side: Opened) -> tuple[str, ...]:
    opens, far, precision = middle(side.seconds), side.distances, side.facts.get("precision")
    return (
        name,
        "" if opens is None else f"{opens:.2f} s",
        "" if side.peak_bytes is None else f"{side.peak_bytes / 2**30:.2f} GiB",
        "" if side.idle is None else f"{side.idle:.1%}",
        f"{far['picture']:.1f} dB" if "picture" in far else "the reference",
        f"{far['unet']:.1e}" if "unet" in far else "",
        "float32" if precision is None else PRECISION.format(**precision),
    )


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "the same"
