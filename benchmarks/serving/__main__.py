"""Latency of serving under rising load: stock diffusers, batches of whole requests, sdfast.

    python -m benchmarks.serving
    python -m benchmarks.serving --rate 1 --rate 2 --seconds 20 --no-keep

Every side sits behind the same HTTP layer, in a process of its own, and gets the same requests. At each rate
the sides run in turn, in each round with other requests; one that was overloaded is spared the higher rates.
"""

import asyncio
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks import machine
from benchmarks.serving.client import Answered, send
from benchmarks.serving.report import HEADER, Point, plot, ratios
from benchmarks.serving.server import SIDES
from benchmarks.serving.sides import served
from benchmarks.serving.workload import arrivals
from sdfast.columns import columns
from sdfast.export.build import export
from sdfast.export.recipe import Recipe

CHECKPOINT = "landscapes"
RATES = (1.0, 1.5, 3.0, 4.0, 4.5, 5.0)
WARM_SECONDS = 3.0
OVERLOADED = 4.0  # times the limit of p99


@click.command()
@click.option("--rate", "rates", type=float, multiple=True, default=RATES, show_default=True)
@click.option("--seconds", type=float, default=30.0, show_default=True, help="Of arrivals in a round.")
@click.option("--rounds", type=int, default=2, show_default=True)
@click.option("--side", "sides", type=click.Choice(SIDES), multiple=True, default=SIDES)
@click.option("--limit", type=float, default=4.0, show_default=True, help="Seconds of p99 to compare at.")
@click.option("--batch", type=int, default=8, show_default=True, help="The most requests of a batch.")
@click.option("--rows", type=int, help="The most rows of sdfast serve. [default: its own]")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--keep/--no-keep", default=True, help="Write the result and the plot of it.")
def main(
    rates: tuple[float, ...],
    seconds: float,
    rounds: int,
    sides: tuple[str, ...],
    limit: float,
    batch: int,
    rows: int | None,
    seed: int,
    workdir: Path,
    keep: bool,
) -> None:
    """Send Poisson arrivals of mixed requests to each side."""
    folder = export(CHECKPOINT, workdir / "engines" / f"{CHECKPOINT}-serving", Recipe.make())
    points: dict[str, list[Point]] = {side: [] for side in sides}
    with ExitStack() as open_sides:  # who has nothing to do takes no processor
        urls = {}
        for side in sides:
            most, log = rows if side == "sdfast" else batch, workdir / f"serving-{side}.log"
            urls[side] = open_sides.enter_context(served(side, folder, CHECKPOINT, most, log))
        for url in urls.values():
            asyncio.run(send(url, arrivals(2.0, WARM_SECONDS, seed)))
        for rate in sorted(rates):
            loads = [arrivals(rate, seconds, seed + turn) for turn in range(rounds)]
            taking = [s for s in sides if not points[s] or points[s][-1].p99 <= OVERLOADED * limit]
            answers: dict[str, list[Sequence[Answered]]] = {side: [] for side in taking}
            for load in loads:
                for side in taking:
                    answers[side].append(asyncio.run(send(urls[side], load)))
            for side in taking:
                points[side].append(Point.of(side, rate, answers[side]))
                click.echo("  ".join(points[side][-1].row()))
    click.echo(columns([HEADER, *(point.row() for of_side in points.values() for point in of_side)]))
    told = ratios(points, limit) if "sdfast" in points else {}
    click.echo(told)
    if keep:
        result = {
            "checkpoint": CHECKPOINT,
            "seconds": seconds,
            "rounds": rounds,
            "batch": batch,
            "rows": rows,
            "points": [vars(point) for of_side in points.values() for point in of_side],
            **told,
        }
        command = "python -m benchmarks.serving " + shlex.join(sys.argv[1:])
        click.echo(f"kept in {machine.keep('serving-landscapes-cpu', command.strip(), result)}")
        plot(points, limit, Path("docs") / "serving.png")


if __name__ == "__main__":
    main()
