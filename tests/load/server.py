"""A server of a `FakeEngine`: python -m tests.load.server PORT."""

import sys

from sdfast.server.settings import Settings
from sdfast.server.start import serve_from
from sdfast.server.studio import Post, WorkerStudio
from sdfast.server.worker.supervisor import Supervisor
from tests.fakes import FakeEngine
from tests.load.fake_worker import MAX_QUEUE

if __name__ == "__main__":
    command = [sys.executable, "-m", "tests.load.fake_worker"]
    supervisor = Supervisor("fake", command, max_queue=MAX_QUEUE)
    studio = WorkerStudio([Post(FakeEngine().manifest, supervisor)])
    serve_from(studio, Settings.make(port=int(sys.argv[1])))
