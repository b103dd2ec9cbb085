"""A worker around a `FakeEngine`: python -m tests.server.fake_worker FILE.

FILE holds failpoints in JSON, by module. It is read, and removed, at every SIGUSR1.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from sdfast.engine import Engine
from sdfast.server.worker.process import run
from tests.fakes import Failpoint, FakeEngine

MAX_ROWS, MAX_QUEUE = 2, 3


def opened() -> Engine:
    file, engine = Path(sys.argv[1]), FakeEngine()

    def read(*_: Any) -> None:
        points = json.loads(file.read_text("utf-8"))
        engine.failpoints = {name: Failpoint(**fields) for name, fields in points.items()}
        file.unlink()

    signal.signal(signal.SIGUSR1, read)
    return engine


if __name__ == "__main__":
    run(opened, max_rows=MAX_ROWS, max_queue=MAX_QUEUE)
