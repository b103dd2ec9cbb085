"""The tables of a run, and its JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.outputs import REFERENCE
from benchmarks.peers.rounds import Comparison
from benchmarks.peers.task import MEASURES
from sdfast.columns import columns
from sdfast.timing import shown

PRECISION = "{used} (without being told: {without_the_hint})"
NONE = "-"


@dataclass
class Opened:
    """What is known of a side, or why it did not take part.

    seconds: of each opening, after the imports, with the files in the page cache. left_out: why it cannot run
    this checkpoint. failed: why it could not, though it should.
    """

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    open_peak_bytes: int | None = None
    peak_bytes: int | None = None
    idle: float | None = None
    distances: Mapping[str, float] = field(default_factory=dict)
    left_out: str | None = None
    failed: str | None = None

    @property
    def absent(self) -> str | None:
        """Why it does not take part, if it does not."""
        return self.left_out or self.failed

    def as_json(self) -> dict[str, Any]:
        if self.left_out is not None:
            return {"left_out": self.left_out}
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
    """A line for each measure and side; a side without a measure has no figures there."""
    lines = [("", "side", "median", "to sdfast", "range", "rounds")]
    found = {(one.measure, one.side): one for one in comparisons}
    sides = dict.fromkeys(one.side for one in comparisons)
    for measure in dict.fromkeys(one.measure for one in comparisons):
        figures = [(side, *_figures(found.get((measure, side)))) for side in sides]
        names = [MEASURES[measure], *[""] * (len(figures) - 1)]
        lines += [(name, *cells) for name, cells in zip(names, figures, strict=True)]
    return columns(lines)


def _figures(one: Comparison | None) -> tuple[str, str, str, str]:
    return (NONE,) * 4 if one is None else (shown(one.seconds), *_ratio(one))


def _ratio(one: Comparison) -> tuple[str, str, str]:
    if one.ratio is None or one.ratio_low is None or one.ratio_high is None:
        return "", "", str(one.rounds)
    return f"{one.ratio:.2f}×", f"{one.ratio_low:.2f}–{one.ratio_high:.2f}", str(one.rounds)


def properties(sides: Mapping[str, Opened]) -> str:
    """A line for each side; those that did not take part say why, and others what is to be known of them."""
    lines = [("side", "opens in", "peak memory", "idle", "PSNR", "U-Net error", "precision")]
    lines += [_of(name, side) for name, side in sides.items() if side.absent is None]
    notes = {name: side.absent or side.facts.get("note") for name, side in sides.items()}
    return "\n".join([columns(lines), *(f"{name}: {note}" for name, note in notes.items() if note)])


def _of(name: str, side: Opened) -> tuple[str, ...]:
    opens = middle(side.seconds)
    return (
        name,
        "" if opens is None else f"{opens:.2f} s",
        "" if side.peak_bytes is None else f"{side.peak_bytes / 2**30:.2f} GiB",
        "" if side.idle is None else f"{side.idle:.1%}",
        *(("the reference", "") if name == REFERENCE else _distances(side.distances)),
        _precision(side.facts.get("precision")),
    )


def _distances(far: Mapping[str, float]) -> tuple[str, str]:
    return (
        f"{far['picture']:.1f} dB" if "picture" in far else NONE,
        f"{far['unet']:.1e}" if "unet" in far else NONE,
    )


def _precision(told: Mapping[str, str] | None) -> str:
    """What a side computes in, and what it would, were it not told to."""
    if told is None:
        return "float32"
    return PRECISION.format(**told) if "without_the_hint" in told else told["used"]


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "the same"
