"""One side as a process, in the environment of that side.

    python -m benchmarks.peers.worker prepare SIDE TASK    makes what the side runs, if it is not there
    python -m benchmarks.peers.worker serve SIDE TASK      opens it and measures what it is asked, by lines

Questions of `serve`: `{"do": "open"}`, then `{"do": MEASURE}` for each measure, and `{"do": "memory"}`.
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.peers.channel import answer_all, own_stdout
from benchmarks.peers.sides import SIDES, Side
from benchmarks.peers.task import Task
from sdfast.proc import bytes_of

SETTLE = 0.1  # seconds that threads of this process, and of the one measured before, have to go to sleep
MODULES = ("text", "unet", "vae")
# Of a module that takes less, in seconds, a call after a pause measures how processor and caches wake up. It
# is not counted, but the median of so many calls after it: as the module runs from step to step.
SHORT, CALLS = 0.2, 5


class Serving:
    """Answers the questions about one side."""

    def __init__(self, side: Side, task: Task, outputs: Path) -> None:
        """outputs: the folder for what each measure computed the first time."""
        self._side = side
        self._task = task
        self._outputs = outputs
        self._kept: set[str] = set()
        self._rested: tuple[float, float] | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Raises `KeyError` for a question that there is not, or not for this side."""
        do = question["do"]
        if do == "open":
            return self._open()
        if do == "memory":
            return {"peak_bytes": peak_bytes()}
        if do not in self._side.measures:
            raise KeyError(do)
        return self._measure(do)

    def _open(self) -> dict[str, Any]:
        torch.set_num_threads(self._task.threads)
        self._side.imports()
        start = time.perf_counter()
        self._side.open(self._task)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "facts": self._side.facts(), "peak_bytes": peak_bytes()}

    @torch.no_grad()
    def _measure(self, name: str) -> dict[str, Any]:
        idle = self._idle_share()
        time.sleep(SETTLE)
        measured = getattr(self._side, name)()
        seconds = [measured.seconds]
        if name in MODULES and measured.seconds < SHORT:
            seconds = [getattr(self._side, name)().seconds for _ in range(CALLS)]
        if name not in self._kept:
            self._kept.add(name)
            self._outputs.mkdir(parents=True, exist_ok=True)
            np.save(self._outputs / f"{name}.npy", np.asarray(measured.output, dtype=np.float32))
        self._rested = _clocks()
        return {"seconds": median(seconds), "step_seconds": measured.step_seconds, "idle": idle}

    def _idle_share(self) -> float | None:
        """The share of a processor that this process took since it last measured: it should sleep."""
        if self._rested is None:
            return None
        computed, waited = (now - then for now, then in zip(_clocks(), self._rested, strict=True))
        return round(computed / waited, 4)


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def peak_bytes() -> int | None:
    """The most memory that this process had resident, mapped files included; None where Linux does not say.

    Of this process alone: `getrusage` tells that of the parent where it was more when this one began.
    """
    return bytes_of("/proc/self/status", "VmHWM")


def main(work: str, name: str, path: str) -> None:
    task, side = Task.read(path), SIDES[name]()
    if work == "prepare":
        side.prepare(task)
        return
    serving = Serving(side, task, Path(task.outputs) / name)
    answer_all(serving.answer, sys.stdin, own_stdout())


if __name__ == "__main__":
    main(*sys.argv[1:])
