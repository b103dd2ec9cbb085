"""A worker around a `FakeEngine`: python -m tests.server.fake_worker FILE.

FILE holds failpoints in JSON, by module. It is read, and removed, at every SIGUSR1.
"""

import json
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":  # before what is imported starts threads, which would die of the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

from sdfast.engine import Engine
from sdfast.server.worker.process import run
from tests.fakes import Failpoint, FakeEngine

MAX_ROWS, MAX_QUEUE = 2, 3


def opened() -> Engine:
    engine = FakeEngine()
    threading.Thread(target=_obey, args=(engine,), daemon=True).start()
    return engine


def _obey(engine: FakeEngine) -> None:
    """A handler would run in the main thread, which may be just about to wait for a job, and then does."""
    file = Path(sys.argv[1])
    while signal.sigwait({signal.SIGUSR1}):
        points = json.loads(file.read_text("utf-8"))
        engine.failpoints = {name: Failpoint(**fields) for name, fields in points.items()}
        file.unlink()


if __name__ == "__main__":
    run(opened, max_rows=MAX_ROWS, max_queue=MAX_QUEUE)
