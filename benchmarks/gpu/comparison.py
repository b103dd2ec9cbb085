"""One case on every side: seconds, ratios, share of the roofline, and for pictures their error."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.gpu import work
from benchmarks.gpu.bench import Bench, pictures
from benchmarks.gpu.document import one_line
from benchmarks.gpu.measure import WARM_UP, Timed, alternate, burst, synchronised
from benchmarks.gpu.sides import COMPILED, EAGER, SIDES, Side
from benchmarks.gpu.work import Work
from benchmarks.gpu.workloads import Draw
from sdfast.timing import Measure
from sdfast.validation.metrics import compare, psnr
from sdfast.validation.rule import BARS, STOCK_FACTOR

Prepare = Callable[[Side], Measure]


def module(bench: Bench, sides: Sequence[str], name: str, batch: int) -> dict[str, Any]:
    """One network alone."""
    with ExitStack() as stack:

        def prepare(side: Side) -> Measure:
            return burst(stack.enter_context(side.module(name, batch)), bench.device)

        timed = _timed(bench, sides, batch, prepare)
    return {"rows": _rows(bench, timed, sides, _module_floor(bench, name, batch), iterations=None)}


def step(bench: Bench, sides: Sequence[str], batch: int) -> dict[str, Any]:
    """A guided step in the loop: what a longer run takes more than a shorter one, by the steps between."""
    short, long = (Draw(steps, batch, True) for steps in bench.workload.step_runs)

    def prepare(side: Side) -> Measure:
        runs = [
            synchronised(lambda draw=draw: side.draw(draw, "latent"), bench.device) for draw in (short, long)
        ]
        return lambda: (runs[1]() - runs[0]()) / (long.steps - short.steps)

    floor = _floor(bench, _unet(bench, short.rows))
    return {"rows": _rows(bench, _timed(bench, sides, batch, prepare), sides, floor, iterations=1)}


def picture(bench: Bench, sides: Sequence[str], draw: Draw) -> dict[str, Any]:
    """Prompt to PIL images, and the error of the images."""

    def prepare(side: Side) -> Measure:
        return synchronised(lambda: side.draw(draw), bench.device)

    timed = _timed(bench, sides, draw.batch, prepare, warm_up=-(-WARM_UP // draw.steps))
    rows = _rows(bench, timed, sides, _picture_floor(bench, draw), iterations=draw.steps)
    errors = {row["side"]: _picture_error(bench, row["side"], draw) for row in rows if row["failed"] is None}
    bench.forget_exact()
    stock = errors.get(EAGER, {}).get("relative_l2")
    for row in rows:
        row.update(errors.get(row["side"], {"relative_l2": None, "psnr_db": None}))
        row["stock_relative_l2"] = stock
        row["within_bar"] = within(row["side"], row["relative_l2"], stock)
    return {"rows": rows}


def _timed(bench: Bench, sides: Sequence[str], batch: int, prepare: Prepare, warm_up: int = 1) -> Timed:
    measures: dict[str, Measure] = {}
    failed: dict[str, str] = {}
    for name in sides:
        try:
            measures[name] = prepare(bench.side(name, batch))
        except Exception as error:  # the other sides go on
            failed[name] = one_line(error)
    timed = alternate(measures, bench.workload.rounds, bench.workload.limit, warm_up)
    timed.failed.update(failed)
    return timed


def _rows(
    bench: Bench, timed: Timed, sides: Sequence[str], floor: float | None, iterations: int | None
) -> list[dict[str, Any]]:
    """A row for each side; the figures of one that failed are None. floor: seconds, by the roofline."""
    rows = []
    for side in sides:
        taken = timed.seconds.get(side)
        median = timed.median(side) if taken else None
        rows.append(
            {
                "side": side,
                "failed": timed.failed.get(side),
                "milliseconds": None if median is None else median * 1e3,
                "milliseconds_low": min(taken) * 1e3 if taken else None,
                "milliseconds_high": max(taken) * 1e3 if taken else None,
                "rounds": len(taken or ()),
                "iterations_per_second": iterations / median if median and iterations else None,
                "ratio_to_eager": timed.ratio(side, EAGER),
                "ratio_to_compiled": timed.ratio(side, COMPILED),
                "floor_milliseconds": None if floor is None else floor * 1e3,
                "roofline_share": floor / median if floor and median else None,
            }
        )
    return rows


# ---------------------------------------------------------------- the roofline


def _floor(bench: Bench, *parts: Work) -> float | None:
    """The least seconds of networks that run one after the other, if the roofline was measured.

    By the half-precision product for all, also for the VAE of SDXL, which stock runs in float32; a side with
    FP8 products may take less.
    """
    roof = bench.roofline
    if roof is None:
        return None
    return sum(part.seconds(roof["flops_per_second"], roof["bytes_per_second"]) for part in parts)


def _unet(bench: Bench, rows: int) -> Work:
    load = bench.workload
    return work.unet(load.architecture, rows, load.height, load.width)


def _vae(bench: Bench, batch: int) -> Work:
    load = bench.workload
    return work.vae_decoder(load.architecture, batch, load.height, load.width)


def _module_floor(bench: Bench, name: str, batch: int) -> float | None:
    if name == "unet":
        return _floor(bench, _unet(bench, 2 * batch))
    if name == "vae_decoder":
        return _floor(bench, _vae(bench, batch))
    return _floor(bench, work.text_encoder(bench.workload.architecture, name))


def _picture_floor(bench: Bench, draw: Draw) -> float | None:
    """The prompt and, with guidance, the negative one; the steps; the pictures."""
    load = bench.workload
    texts = [work.text_encoder(load.architecture, name) for name in load.text_encoders]
    prompts = 2 if draw.guided else 1
    return _floor(bench, *texts * prompts, *[_unet(bench, draw.rows)] * draw.steps, _vae(bench, draw.batch))


# ---------------------------------------------------------------- the error


def _picture_error(bench: Bench, side: str, draw: Draw) -> dict[str, Any]:
    """Of the batch's first and last picture against float32: relative L2 together, the lower PSNR."""
    truths = bench.truths(draw)
    try:
        drawn = pictures(bench.side(side, draw.batch).draw(draw, "pt"))
    except Exception as error:
        return {"relative_l2": None, "psnr_db": None, "failed": one_line(error)}
    pairs = [(drawn[i], truth) for i, truth in truths.items()]
    worst = min((psnr(image, truth) for image, truth in pairs), key=_nan_first)
    return {"relative_l2": compare(pairs).relative_l2, "psnr_db": worst}


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def within(side: str, error: float | None, stock: float | None) -> bool | None:
    """Whether the error of pictures is at most 1.1 times that of stock fp16, or meets the bar of FP8; None
    where there is nothing to compare."""
    if error is None or stock is None:
        return None
    return error <= (BARS["FP8"]["pictures"] if SIDES[side].fp8 else STOCK_FACTOR * stock)
