"""A server of its own process, for tests of signals: python -m tests.server.serving PORT SECONDS DRAIN."""

import sys

from sdfast.server.run import serve
from sdfast.server.settings import Settings
from tests.server.studio import FakeStudio

if __name__ == "__main__":
    port, seconds, drain = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    finished = serve(FakeStudio(seconds=seconds), Settings.make(port=port, drain=drain, api_key="secret-key"))
    sys.exit(0 if finished else 1)
