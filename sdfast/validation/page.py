"""The report as one HTML page that needs nothing else: pictures inside it, plots as SVG, light and dark."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from sdfast.errors import DependencyError
from sdfast.first_latents import Over
from sdfast.pipeline import to_uint8
from sdfast.validation.pictures import Picture
from sdfast.validation.report import ModuleFigures, PictureFigures, Report, decibels
from sdfast.validation.rule import BARS, PICTURE_DB, RELATIVE_L2, STOCK_FACTOR

GAINS = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))


def page(report: Report, pictures: Sequence[Picture]) -> str:
    """The page. pictures: in the order of `report.pictures`."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise DependencyError("the validation report needs Jinja2: pip install jinja2") from error
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(sci=_scientific, decibels=decibels, point=_point)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        shown=[_shown(p, figures) for p, figures in zip(pictures, report.pictures, strict=True)],
        scene=_scene(pictures[0].over) if report.setting.inpaints else None,
        controls=_controls(pictures[0].control),
        seen=_seen(pictures[0].seen),
        gauge=Gauge.of(report.modules),
        drift=Drift.of(report.pictures),
        rule={
            "module": RELATIVE_L2,
            "picture": PICTURE_DB,
            "factor": STOCK_FACTOR,
            "rounding": BARS.get(report.setting.rounding) if report.setting.rounding else None,
        },
    )


# ---------------------------------------------------------------- pictures


def _controls(control: Tensor | None) -> list[str]:
    """The control images [1, N 3, H, W] as data URIs."""
    return [] if control is None else [png(one) for one in control.reshape(-1, 3, *control.shape[2:])]


def _seen(images: Tensor | None) -> list[str]:
    """IP-Adapters' images [A, S, S, 3] uint8 as data URIs."""
    return [] if images is None else [png(one.permute(2, 0, 1) / 255) for one in images]


@dataclass(frozen=True)
class Shown:
    """One picture as data URIs: the reference's, the engine's, and their difference times `gain`."""

    figures: PictureFigures
    reference: str
    engine: str
    difference: str
    gain: int


def _shown(picture: Picture, figures: PictureFigures) -> Shown:
    truth, image = picture.truth.image, picture.image.nan_to_num(0.0)
    amplified, gain = difference(image, truth)
    return Shown(figures, png(truth), png(image), png(amplified), gain)


@dataclass(frozen=True)
class ShownScene:
    """What all pictures of an inpainting engine were drawn over, as data URIs."""

    image: str
    mask: str


def _scene(over: Over | None) -> ShownScene | None:
    if over is None or over.mask is None:
        return None
    return ShownScene(png(over.image[0]), png(over.mask[0].expand(3, -1, -1)))


def difference(image: Tensor, truth: Tensor) -> tuple[Tensor, int]:
    """|image - truth| [3, H, W] times the largest gain (1, 2, 5 …) that keeps it in [0, 1]; and the gain."""
    apart = (image - truth).abs()
    largest = float(apart.max())
    gain = max((gain for gain in GAINS if gain * largest <= 1), default=1)
    return (apart * gain).clamp(0, 1), gain


def png(image: Tensor) -> str:
    """A picture [3, H, W] in [0, 1] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image.float()[None].clone())[0].cpu().numpy()).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------- plots


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: whole powers of ten from `low` to `high`, laid on [start, end] in SVG units."""

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> "Axis":
        """An axis that holds every finite positive value."""
        logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [-4.0]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low, max(high, low + 1), start, end)

    def at(self, value: float) -> float:
        """Where a value lies; zero at the low end, infinity and NaN at the high one."""
        share = 1.0
        if value <= 0:
            share = 0.0
        elif math.isfinite(value):
            share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position and label of the powers of ten, every second one when there are many."""
        every = 1 if self.high - self.low <= 5 else 2
        return [(self.at(10.0**power), f"1e{power}") for power in range(self.low, self.high + 1, every)]


@dataclass(frozen=True)
class Gauge:
    """The modules' errors as bars on one axis, each with the bar that it had to meet."""

    axis: Axis
    width: int

    @classmethod
    def of(cls, modules: Sequence[ModuleFigures]) -> "Gauge":
        width = 240
        values = [value for m in modules for value in (gauged(m), m.bar, m.stock_relative_l2 or 0.0)]
        return cls(Axis.over([*values, RELATIVE_L2], 2, width - 2), width)

    def length(self, module: ModuleFigures) -> float:
        return self.axis.at(gauged(module)) - self.axis.start


def gauged(module: ModuleFigures) -> float:
    """The figure that had to meet the bar."""
    return module.worst if module.stock_relative_l2 is None else module.relative_l2


@dataclass(frozen=True)
class Line:
    """A line of the drift plot: SVG points, and what it shows."""

    points: str
    colour: int
    dashed: bool
    label: str


@dataclass(frozen=True)
class Drift:
    """How the latents leave the reference's, step by step."""

    width: int
    height: int
    axis: Axis
    steps: list[tuple[float, int]]  # position and number
    lines: list[Line]
    left: int
    bottom: int

    @classmethod
    def of(cls, pictures: Sequence[PictureFigures]) -> "Drift":
        width, height, left, bottom = 720, 260, 52, 34
        count = max((len(picture.drift) for picture in pictures), default=0)
        axis = Axis.over((v for p in pictures for v in (*p.drift, *p.stock_drift)), height - bottom, 12)

        def across(k: int) -> float:
            return left + (width - left - 12) * k / max(count - 1, 1)

        def points(values: Sequence[float]) -> str:
            finite = [(across(k), axis.at(v)) for k, v in enumerate(values) if math.isfinite(v)]
            return " ".join(f"{x:.1f},{y:.1f}" for x, y in finite)

        every = max(1, math.ceil(count / 10))
        steps = [(across(k), k + 1) for k in range(0, count, every)]
        schedulers = list(dict.fromkeys(picture.scheduler for picture in pictures))
        lines = []
        for picture in pictures:
            colour = schedulers.index(picture.scheduler) % 4
            label = f"{picture.scheduler}: {picture.prompt}"
            lines.append(Line(points(picture.drift), colour, False, label))
            if picture.stock_drift:
                lines.append(
                    Line(points(picture.stock_drift), colour, True, f"stock, same precision, {label}")
                )
        return cls(width, height, axis, steps, lines, left, bottom)

    @property
    def legend(self) -> list[tuple[int, bool, str]]:
        """(colour, dashed, label), one for each kind of line."""
        kinds = {(line.colour, line.dashed): line.label.split(":")[0] for line in self.lines}
        return [(colour, dashed, label) for (colour, dashed), label in kinds.items()]


def _scientific(value: float | None) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "not a number"
    return "0" if value == 0 else ("∞" if math.isinf(value) else f"{value:.2e}")


def _point(value: float) -> str:
    return f"{value:.1f}"
