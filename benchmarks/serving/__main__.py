"""Latency of serving under rising load: stock diffusers, batches of whole requests, sdfast.

    python -m benchmarks.serving
    python -m benchmarks.serving --rate 1 --rate 2 --seconds 20 --no-keep

Every side sits behind the same HTTP layer, in a process of its own, and gets the same requests. At each rate
the sides run in turn; one that was overloaded is spared the higher rates.
"""

import asyncio
import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks import machine
from benchmarks.serving.client import send
from benchmarks.serving.report import HEADER, Point, plot, ratios
from benchmarks.serving.server import SIDES
from benchmarks.serving.sides import served
from benchmarks.serving.workload import arrivals
from benchmarks.timing import columns
from sdfast.export.build import export
from sdfast.export.recipe import Recipe

CHECKPOINT = "landscapes"
RATES = (0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
WARM_SECONDS = 3.0
OVERLOADED = 4.0  # times the limit of p99


@click.command()
@click.option("--rate", "rates", type=float, multiple=True, default=RATES, show_default=True)
@click.option("--seconds", type=float, default=45.0, show_default=True, help="Of arrivals, for each rate.")
@click.option("--side", "sides", type=click.Choice(SIDES), multiple=True, default=SIDES)
@click.option("--limit", type=float, default=4.0, show_default=True, help="Seconds of p99 to compare at.")
@click.option("--rows", type=int, default=8, show_default=True, help="The most that are drawn together.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--keep/--no-keep", default=True, help="Write the result and the plot of it.")
def main(
    rates: tuple[float, ...],
    seconds: float,
    sides: tuple[str, ...],
    limit: float,
    rows: int,
    seed: int,
    workdir: Path,
    keep: bool,
) -> None:
    """Send Poisson arrivals of mixed requests to each side."""
    folder = export(CHECKPOINT, workdir / "engines" / f"{CHECKPOINT}-serving", Recipe.make())
    points: dict[str, list[Point]] = {side: [] for side in sides}
    with ExitStack() as open_sides:  # who has nothing to do takes no processor
        urls = {
            side: open_sides.enter_context(
                served(side, folder, CHECKPOINT, rows, workdir / f"serving-{side}.log")
            )
            for side in sides
        }
        for url in urls.values():
            asyncio.run(send(url, arrivals(2.0, WARM_SECONDS, seed)))
        for rate in sorted(rates):
            load = arrivals(rate, seconds, seed)
            for side in sides:
                if points[side] and points[side][-1].p99 > OVERLOADED * limit:
                    continue
                points[side].append(Point.of(side, rate, asyncio.run(send(urls[side], load))))
                click.echo("  ".join(points[side][-1].row()))
    click.echo(columns([HEADER, *(point.row() for of_side in points.values() for point in of_side)]))
    told = ratios(points, limit) if "sdfast" in points else {}
    click.echo(told)
    if keep:
        result = {
            "checkpoint": CHECKPOINT,
            "seconds": seconds,
            "rows": rows,
            "points": [vars(point) for of_side in points.values() for point in of_side],
            **told,
        }
        command = "python -m benchmarks.serving " + shlex.join(sys.argv[1:])
        click.echo(f"kept in {machine.keep('serving-landscapes-cpu', command.strip(), result)}")
        plot(points, limit, Path("docs") / "serving.png")


if __name__ == "__main__":
    main()
