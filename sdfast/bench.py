"""How long an engine takes on this machine: opening, prompts, steps, decoding, whole pictures.

Beside stock diffusers if asked: both in turn, in this process, on the checkpoint that the engine was made
from.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdfast.call import Given
from sdfast.columns import columns
from sdfast.control import DEFAULT_SCALE
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.pipeline import Pipeline
from sdfast.proc import bytes_of
from sdfast.prompts import Prompts, Reading
from sdfast.request import DEFAULT_IMAGE_GUIDANCE, Request
from sdfast.timing import Measure, alternate, clocked, shown

PROMPT, NEGATIVE = "a cabin in misty mountains, watercolor style", "blurry"
# What takes less, in seconds, is measured so many times in a row, after one that wakes up caches and threads.
SHORT, TIMES = 0.2, 5


@dataclass(frozen=True)
class Figure:
    """Seconds of one thing, by round, and those of stock diffusers in the same rounds, where it was asked."""

    name: str
    seconds: tuple[float, ...]
    reference: tuple[float, ...] = ()
    each_second: str | None = None  # what there are 1 / seconds of in a second

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """Reference over engine, round by round: above 1, the engine is faster."""
        return [stock / own for stock, own in zip(self.reference, self.seconds, strict=True)]

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"name": self.name, "seconds": list(self.seconds), "median": self.median}
        if self.each_second:
            told["per_second"] = 1 / self.median
        if self.reference:
            told["reference_seconds"] = list(self.reference)
            told["reference_median"] = statistics.median(self.reference)
            told["ratio"] = statistics.median(self.ratios)
        return told

    def row(self, *, compared: bool) -> tuple[str, ...]:
        often = f"{1 / self.median:.1f} {self.each_second}" if self.each_second else ""
        own = (
            self.name,
            shown(self.median),
            f"{shown(min(self.seconds))} to {shown(max(self.seconds))}",
            often,
        )
        if not compared:
            return own
        if not self.reference:
            return (*own, "", "", "")
        ratios = self.ratios
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        return (*own, shown(statistics.median(self.reference)), f"{statistics.median(ratios):.2f}×", span)


@dataclass(frozen=True)
class Benchmark:
    """What a run gave. setting: what was measured, on what. peak_bytes: the most memory that the process had
    while it drew, on CUDA the most that torch had of the device; None where the machine does not say, or
    where stock diffusers was there too. notes: what is to be said of the checkpoint beside it.
    """

    setting: Mapping[str, Any]
    opened_seconds: float
    figures: tuple[Figure, ...]
    peak_bytes: int | None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            **self.setting,
            "opened_seconds": self.opened_seconds,
            "peak_bytes": self.peak_bytes,
            "figures": [figure.as_json() for figure in self.figures],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """For a terminal."""
        setting, compared = self.setting, any(figure.reference for figure in self.figures)
        head = ("", "median", "range", "", *(["stock", "ratio", "range"] if compared else []))
        lines = [
            f"{setting['engine']}: {setting['backend']}, {setting['dtype']}, {setting['size']}, "
            f"{setting['images']} at a time, {setting['steps']} steps of {setting['scheduler']}, guidance "
            f"{setting['guidance_scale']:g}",
            f"on {setting['device']}, {setting['rounds']} rounds",
            "",
            columns([head, *(figure.row(compared=compared) for figure in self.figures)]),
            "",
            f"opened in {shown(self.opened_seconds)}",
        ]
        if self.peak_bytes is not None:
            lines.append(f"peak memory {self.peak_bytes / 2**30:.2f} GiB")
        return "\n".join([*lines, *self.notes])


def bench(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    size: tuple[int, int] | None = None,
    images: int = 1,
    steps: int = 20,
    guidance_scale: float = 7.0,
    scheduler: str = "dpmpp_2m_karras",
    rounds: int = 5,
    reference: bool = False,
    checkpoint: str | Path | None = None,
    compile: bool = False,
    attention: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure the engine in `folder`, after one uncounted round.

    size: width and height in pixels (default: the engine's own). images: of a call. reference: beside stock
    diffusers on the same checkpoint, in the engine's dtype, in turn. checkpoint: the one that stock diffusers
    draws with (default: what the engine was made from). The rest is as in `Engine.open` and `Request`.

    A step is what a longer run takes more than a shorter one, by the steps between. Prompts are encoded anew
    for each picture, as stock diffusers does.

    Raises `RequestError` for what the engine cannot draw, and what opening an engine, or for `reference` the
    stock pipeline of its checkpoint, raises.
    """
    if rounds < 1:
        raise RequestError(f"rounds: {rounds}, but at least 1 is needed")
    if checkpoint is not None and not reference:
        raise RequestError("checkpoint: is what stock diffusers draws with; give it with --reference")
    progress("opening")
    start = time.perf_counter()
    engine = Engine.open(folder, device, load=True, compile=compile, attention=attention)
    opened = time.perf_counter() - start
    side = _Side(engine, size, images, steps, guidance_scale, scheduler)
    stock = _Stock(side, checkpoint) if reference else None
    figures = []
    for name, often, measure in side.measures():
        progress(name)
        against = stock.measure(name) if stock else None
        sides = {"sdfast": measure} if against is None else {"sdfast": measure, "stock": against}
        seconds = alternate(sides, rounds=rounds)
        figures.append(Figure(name, tuple(seconds["sdfast"]), tuple(seconds.get("stock", ())), often))
    request = side.request(steps)
    setting = {
        "engine": engine.manifest.name,
        "backend": engine.manifest.backend,
        "dtype": engine.manifest.dtype,
        "size": f"{request.width}x{request.height}",
        "images": images,
        "steps": steps,
        "scheduler": scheduler,
        "guidance_scale": guidance_scale,
        "device": _told(engine.device),
        "rounds": rounds,
    }
    peak, notes = (_peak(engine.device), ()) if stock is None else (None, stock.notes)
    return Benchmark(setting, opened, tuple(figures), peak, notes)


class _Side:
    """The engine's way of a picture, in parts that can be repeated."""

    def __init__(
        self,
        engine: Engine,
        size: tuple[int, int] | None,
        images: int,
        steps: int,
        guidance_scale: float,
        scheduler: str,
    ) -> None:
        self.engine, self.steps = engine, steps
        self.pipe = Pipeline(engine)
        self.pipe.set_progress_bar_config(disable=True)
        model = engine.manifest.model
        width, height = size or (model.default_width, model.default_height)
        self._asked: dict[str, Any] = {
            "prompts": (PROMPT,),
            "negative_prompts": (NEGATIVE,),
            "num_images_per_prompt": images,
            "width": width,
            "height": height,
            "guidance_scale": guidance_scale,
            "scheduler": scheduler,
            "seed": 0,
            **({"strength": 1.0} if model.inpaints or model.scored else {}),
            **({"image_guidance_scale": DEFAULT_IMAGE_GUIDANCE} if model.instructed else {}),
            **({"controlnet_conditioning_scale": DEFAULT_SCALE} if model.controlled else {}),
            "loras": dict.fromkeys(model.loras, 1.0),
        }
        self.given = _given(engine, height, width)

    def request(self, steps: int) -> Request:
        return Request.make(**self._asked, num_inference_steps=steps)

    def measures(self) -> list[tuple[str, str | None, Measure]]:
        """Each part: its name, what there is a number of in a second, and how it is measured."""
        parts: list[tuple[str, str | None, Measure]] = [("prompts", None, _often(self._encode))]
        if self.steps > 1:
            parts.append(("step", "it/s", step_of(self.draw, self.steps)))
        parts += [("decoding", None, _often(self._decoder())), ("picture", None, clocked(self._picture))]
        return parts

    def draw(self, steps: int, output_type: str) -> Any:
        return self.pipe.generate(self.request(steps), self.given, output_type)

    def _picture(self) -> None:
        self.pipe.prompts = Prompts(self.engine)
        self.draw(self.steps, "pil")

    def _encode(self) -> None:
        prompts, request = Prompts(self.engine), self.request(self.steps)
        with self.engine.running():
            prompts.encode(request.pairs, None, Reading())
            if prompts.guided(request):
                prompts.encode_negative(request.negative_pairs, Reading())

    def _decoder(self) -> Callable[[], None]:
        latents = self.draw(1, "latent").images

        def decode() -> None:
            with self.engine.running():
                self.pipe.decode(latents)

        return decode


class _Stock:
    """Stock diffusers on the checkpoint that the engine was made from, or on one that was asked for."""

    def __init__(self, side: _Side, checkpoint: str | Path | None) -> None:
        from sdfast.validation.counterpart import counterpart
        from sdfast.validation.reference import reference_pipeline

        engine = side.engine
        found, notes = counterpart(engine, checkpoint)
        self._side, self.notes = side, tuple(notes)
        self._pipe = reference_pipeline(found, dtype=engine.dtype, device=engine.device)

    def measure(self, name: str) -> Measure | None:
        """What stock has to a part of that name; None where it has no such part."""
        if name == "step":
            return step_of(self._draw, self._side.steps)
        if name == "picture":
            return clocked(lambda: self._draw(self._side.steps, "pil"))
        return None

    def _draw(self, steps: int, output_type: str) -> Any:
        from sdfast.validation.drawing import generate

        given, request = self._side.given, self._side.request(steps)
        return generate(self._pipe, request, output_type=output_type, over=given.over, control=given.control)


def step_of(draw: Callable[[int, str], Any], steps: int) -> Measure:
    """The seconds of one of `steps` steps: of a run of so many and one of a fifth, the difference."""
    fewer = max(1, steps // 5)
    runs = [clocked(partial(draw, count, "latent")) for count in (fewer, steps)]

    def seconds() -> float:
        short, long = (run() for run in runs)
        return (long - short) / (steps - fewer)

    return seconds


def _often(work: Callable[[], object]) -> Measure:
    """The measure of `work`; of what is short the median of several in a row, as it runs between others."""
    measure = clocked(work)
    again = clocked(work, settles=False)

    def seconds() -> float:
        once = measure()
        return once if once >= SHORT else statistics.median(again() for _ in range(TIMES))

    return seconds


def _given(engine: Engine, height: int, width: int) -> Given:
    """What such an engine has to be given: what is drawn over, and control images."""
    model = engine.manifest.model
    over = control = None
    if model.draws_over:
        from sdfast.validation.inpainting import Scene

        over = Scene.make(height, width, masked=model.inpaints).over
    if model.controlled:
        from sdfast.validation.control import control_images

        control = control_images(model.controlnets, height, width)
    return Given(over=over, control=control)


def _told(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the processor, {torch.get_num_threads()} threads"


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return bytes_of("/proc/self/status", "VmHWM")
