"""One side as a process: python -m benchmarks.serving.server SIDE ENGINE CHECKPOINT PORT [ROWS]."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.serving.baselines import Batches, alike, mixed, one_at_a_time
from sdfast.manifest import read_manifest
from sdfast.server.jobs import EngineInfo
from sdfast.server.run import serve
from sdfast.server.settings import Settings
from sdfast.server.start import start
from sdfast.server.studio import info_of

BASELINES: Mapping[str, Callable[[Path, EngineInfo, str, int], Batches]] = {
    "stock": one_at_a_time,
    "alike": alike,
    "mixed": mixed,
}
SIDES = (*BASELINES, "sdfast")
UNBOUNDED = 10_000  # jobs in the queue: here nobody is turned away


def main(side: str, folder: Path, checkpoint: str, port: int, rows: int | None) -> None:
    settings = Settings.make(port=port, max_rows=rows, queue=UNBOUNDED, timeout=3_600, drain=0)
    if side == "sdfast":
        start([folder], settings)
    elif rows is None:
        raise SystemExit("the rows of a baseline are to be said")
    else:
        serve(BASELINES[side](folder, info_of(read_manifest(folder)), checkpoint, rows), settings)


if __name__ == "__main__":
    main(
        sys.argv[1],
        Path(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]) if sys.argv[5:] else None,
    )
