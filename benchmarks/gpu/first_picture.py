"""From the start of a process to a saved picture, and the memory that it takes: `fresh` starts the process.

python -m benchmarks.gpu.first_picture sd15 --side sdfast-eager --source … --engine … --picture a.png
"""

import time

LOADED = time.monotonic()  # before anything large is imported

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from threading import Event, Thread  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402
import torch  # noqa: E402

from benchmarks.gpu.sides import open_side  # noqa: E402
from benchmarks.gpu.workloads import WORKLOADS, Draw, Workload, workload  # noqa: E402

TIMEOUT = 900.0  # seconds
ROOT = Path(__file__).parents[2]


def fresh(
    load: Workload,
    side: str,
    batch: int,
    source: Path,
    engine: Path | None,
    device: torch.device,
    place: Path,
) -> dict[str, Any]:
    """Draw the first guided picture in a process of its own. Seconds since its start; bytes.

    The checkpoint, the engine and what torch compiled are on disk, and where memory allows in its page cache.
    """
    picture = place / f"{load.architecture}-{side}-b{batch}.png"
    place.mkdir(parents=True, exist_ok=True)
    options = {"side": side, "source": source, "engine": engine, "batch": batch, "device": device}
    options |= {"picture": picture, "architecture": None if load.architecture == load.name else "tiny"}
    command = [sys.executable, "-m", "benchmarks.gpu.first_picture", load.name]
    for name, value in options.items():
        command += [] if value is None else [f"--{name}", str(value)]
    started = time.monotonic()
    with _DeviceMemory(device) as memory:
        done = subprocess.run(
            [*command, "--started", repr(started)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            cwd=ROOT,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"{side}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "side": side,
        "batch": batch,
        "steps": load.first_picture,
        **told,
        "peak_device_bytes": memory.peak,
    }


class _DeviceMemory:
    """The most memory of the device that others take while this is open, by looking every few milliseconds.

    It counts what torch does not: the CUDA context, and what ONNX Runtime allocates. None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak: int | None = None
        self._device = device
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_DeviceMemory":
        if self._device.type == "cuda":
            self.peak, self._before = 0, self._used()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak or 0, self._used() - self._before)

    def _used(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)


@click.command()
@click.argument("name", type=click.Choice(list(WORKLOADS)))
@click.option("--architecture", type=click.Choice(["tiny"]))
@click.option("--side", required=True)
@click.option("--source", type=click.Path(path_type=Path), required=True)
@click.option("--engine", type=click.Path(path_type=Path))
@click.option("--batch", type=int, default=1)
@click.option("--device", default="cuda")
@click.option("--picture", type=click.Path(path_type=Path), required=True)
@click.option("--started", type=float, help="time.monotonic() when the process was started.")
def main(
    name: str,
    architecture: str | None,
    side: str,
    source: Path,
    engine: Path | None,
    batch: int,
    device: str,
    picture: Path,
    started: float | None,
) -> None:
    """Draw one picture, tell how long it took since the process started, and the memory."""
    start = LOADED if started is None else started
    load, place = workload(name, architecture), torch.device(device)
    imported = time.monotonic()
    opened_side = open_side(side, load, source, engine, place)
    opened = time.monotonic()
    draw = Draw(load.first_picture, batch, True)
    opened_side.draw(draw)[0].save(picture)
    saved = time.monotonic()
    opened_side.draw(draw)[0].save(picture)
    told = {
        "seconds": saved - start,
        "imported_seconds": imported - start,
        "opened_seconds": opened - start,
        "second_picture_seconds": time.monotonic() - saved,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(place) if place.type == "cuda" else None,
    }
    click.echo(json.dumps(told))


if __name__ == "__main__":
    main()
