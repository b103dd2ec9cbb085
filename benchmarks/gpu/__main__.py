"""sdfast against stock diffusers on one GPU, part by part.

    python -m benchmarks.gpu sd15
    python -m benchmarks.gpu sdxl --minutes 10 --only step --only picture
    python -m benchmarks.gpu --device cpu --architecture tiny

The real architectures with random weights, made on first use in --workdir, as are engines and what torch
compiles. Every part is written to the result as soon as it is there; the same command again goes on where the
last one stopped, and tries again what failed. A side that is new to a comparison is measured with all others.
Compiling takes most of a first run: `--side` leaves sides out, to be added by a later run.
"""

import re
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import machine
from benchmarks.gpu import report
from benchmarks.gpu.bench import Bench, use_caches
from benchmarks.gpu.document import Document, describe
from benchmarks.gpu.plan import KINDS, NEEDED, Runner, parts
from benchmarks.gpu.sides import SIDES, usual
from benchmarks.gpu.workloads import WORKLOADS, Workload, workload


@click.command()
@click.argument("name", type=click.Choice(list(WORKLOADS)), default="sd15")
@click.option("--only", type=click.Choice(KINDS), multiple=True, help="These kinds of parts. [default: all]")
@click.option("--side", "sides", multiple=True, help=f"Of {', '.join(SIDES)}. [default: those that run here]")
@click.option("--batch", "batches", type=int, multiple=True, help="Pictures of a call. [default: 1, 4, 8]")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="To stop before.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--architecture", type=click.Choice(["tiny"]), help="A dry run, which a CPU can do.")
@click.option(
    "--result", type=click.Path(path_type=Path), help="JSON file. [default: in benchmarks/results/]"
)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-gpu-bench"
)
def main(
    name: str,
    only: tuple[str, ...],
    sides: tuple[str, ...],
    batches: tuple[int, ...],
    minutes: float,
    device: str,
    architecture: str | None,
    result: Path | None,
    workdir: Path,
) -> None:
    """Measure workload NAME ("sd15" or "sdxl"), print the table, and keep all of it in one JSON file."""
    place, load, workdir = _device(device), workload(name, architecture), workdir.resolve()
    use_caches(workdir)
    chosen = _sides(sides, place)
    counts = sorted(set(batches or load.batches))
    facts = describe(place)
    path = result or _default_result(load, facts["gpu"], workdir)
    document = Document(path)
    document.head(_head(load, facts, chosen, place))
    needed = NEEDED if set(only) - set(NEEDED) else ()
    wanted = [
        part
        for part in parts(load, chosen, counts, path.with_name(path.stem + "-profile"))
        if not only or part.kind in (*only, *needed)
    ]
    key = {
        "architecture": load.architecture,
        "size": load.size,
        "gpu": facts["gpu"],
        "versions": facts["versions"],
    }

    def conclude(left: list[str]) -> None:
        document.foot(left=left, summary=report.summary(document.parts, load.architecture, facts["gpu"]))

    Runner(Bench(load, place, workdir), document, key, facts["code"], minutes, click.echo, conclude).run(
        wanted
    )
    click.echo(f"\n{name} ({load.architecture}), {load.size}, on {facts['gpu'] or facts['processor']}\n")
    click.echo(report.text(document.content))
    click.echo(f"\nkept in {path}")


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "this torch sees no CUDA device; a dry run: --device cpu --architecture tiny"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _sides(names: tuple[str, ...], device: torch.device) -> list[str]:
    """The sides asked for, in the order of SIDES; one that cannot run here is refused with the reason."""
    for name in names:
        if name not in SIDES:
            raise click.ClickException(f"--side {name}: there are {', '.join(SIDES)}")
        absent = SIDES[name].absent(device)
        if absent is not None:
            raise click.ClickException(f"--side {name}: {absent}")
    return [name for name in SIDES if name in names] if names else usual(device)


def _default_result(load: Workload, gpu: str | None, workdir: Path) -> Path:
    """A dry run is no result: it stays in the work directory."""
    words = "-".join(re.findall(r"[a-z0-9]+", (gpu or "cpu").lower()))
    folder = machine.RESULTS if load.architecture == load.name else workdir
    return folder / f"gpu-{load.architecture}-{words}.json"


def _head(load: Workload, facts: dict[str, Any], chosen: list[str], device: torch.device) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": facts,
        "workload": load.name,
        "architecture": load.architecture,
        "size": load.size,
        "sides": {
            name: {"title": side.title, "measured": name in chosen, "absent": side.absent(device)}
            for name, side in SIDES.items()
        },
    }


if __name__ == "__main__":
    main()
