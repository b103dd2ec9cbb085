"""What an export costs, and what opening the engine costs: seconds and peak memory, each in its own process.

    python -m benchmarks.export sd15 --size 512x512

`sd15`, `sd21` and `sdxl` are the real architectures with random weights, made on first use in --workdir.
Memory is the peak resident set, in which the pages of mapped files count too; `anonymous` is what is held
without them at the end.
"""

import json
import multiprocessing
import resource
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks import machine, random_weights
from sdfast.proc import bytes_of


@click.command()
@click.argument("checkpoint")
@click.option("--size", help="WIDTHxHEIGHT. [default: the checkpoint's own]")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(checkpoint: str, size: str | None, dtype: str, workdir: Path, keep: bool) -> None:
    """Export CHECKPOINT and open the engine; print what both cost."""
    source = checkpoint
    if checkpoint in random_weights.ARCHITECTURES:
        source = str(apart(_build, checkpoint, workdir / checkpoint)["value"])
    target = workdir / "engines" / f"export-{Path(checkpoint).name}-{size or 'own'}-{dtype}"
    shutil.rmtree(target, ignore_errors=True)
    weights = _weights_bytes(Path(source))
    exported = apart(_export, source, target, size, dtype)
    openings = [apart(_open, target) for _ in range(5)]  # the first may find the disk busy with the export
    opened = openings[-1]
    seconds = [opening["value"] for opening in openings]
    result = {
        "checkpoint": checkpoint,
        "size": size,
        "dtype": dtype,
        "weights_bytes": weights,
        "export_seconds": round(exported["seconds"], 1),
        "export_peak_over_weights": round(exported["peak_bytes"] / weights, 2) if weights else None,
        "export_peak_bytes": exported["peak_bytes"],
        "open_seconds": statistics.median(seconds),
        "open_seconds_each": seconds,
        "open_peak_bytes": opened["peak_bytes"],
        "open_anonymous_bytes": opened["anonymous_bytes"],
        "open_anonymous_over_weights": round(opened["anonymous_bytes"] / weights, 2) if weights else None,
    }
    click.echo(json.dumps(result, indent=1))
    if keep:
        command = "python -m benchmarks.export " + shlex.join(sys.argv[1:])
        name = f"export-{Path(checkpoint).name}-{size or 'own'}-{dtype}"
        click.echo(f"kept in {machine.keep(name, command, result)}")


def apart(work: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run `work` in a new process: its value, its seconds, and the memory it took."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        measured: dict[str, Any] = receiver.recv()
    except EOFError:
        raise click.ClickException(f"{work.__name__} failed; see above") from None
    finally:
        process.join()
    return measured


def _measured(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    start = time.perf_counter()
    value = work(*arguments)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send(
        {"value": value, "seconds": seconds, "peak_bytes": peak, "anonymous_bytes": _anonymous_bytes()}
    )


def _build(name: str, folder: Path) -> str:
    return str(random_weights.build(name, folder))


def _export(source: str, target: Path, size: str | None, dtype: str) -> str:
    from sdfast.cli.stages import Stages
    from sdfast.export.build import export
    from sdfast.export.recipe import Recipe

    recipe = Recipe.make(sizes=(size,) if size else None, dtype=dtype, batch=1)
    return str(export(source, target, recipe, progress=Stages()))


_held: list[Any] = []  # keeps the engine open until its memory has been read


def _open(target: Path) -> float:
    """Seconds of verifying and loading every module, after the imports."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    from sdfast.engine import Engine

    start = time.perf_counter()
    _held.append(Engine.open(target, load=True))
    return round(time.perf_counter() - start, 2)


def _anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    return bytes_of("/proc/self/status", "RssAnon") or 0


def _weights_bytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.rglob("*.safetensors")) if source.is_dir() else 0


if __name__ == "__main__":
    main()
