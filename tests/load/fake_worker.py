"""A worker around a `FakeEngine` that nothing happens to."""

from sdfast.server.worker.process import run
from tests.fakes import FakeEngine

MAX_ROWS, MAX_QUEUE = 8, 16

if __name__ == "__main__":
    run(FakeEngine, max_rows=MAX_ROWS, max_queue=MAX_QUEUE)
