"""A server whose worker is another command: python -m tests.server.serving_worker ENGINE PORT COMMAND…"""

import sys
from pathlib import Path

from sdfast.errors import SdfastError
from sdfast.manifest import read_manifest
from sdfast.server.settings import Settings
from sdfast.server.start import serve_from
from sdfast.server.studio import Post, WorkerStudio
from sdfast.server.worker.supervisor import Patience, Supervisor

if __name__ == "__main__":
    engine, port, *command = sys.argv[1:]
    manifest = read_manifest(Path(engine))
    patience = Patience(failures=3, backoff=0.1)
    supervisor = Supervisor(manifest.name, command, max_queue=8, patience=patience)
    try:
        serve_from(WorkerStudio([Post(manifest, supervisor)]), Settings.make(port=int(port)))
    except SdfastError as error:
        sys.exit(f"Error: {error}")
