"""`sdfast serve`: engines opened while the server already answers that it is alive."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from sdfast.server.run import serve
from sdfast.server.settings import Settings
from sdfast.server.studio import WorkerStudio

log = logging.getLogger(__name__)


def start(folders: Sequence[Path], settings: Settings, device: str | None = None) -> bool:
    """Serve the engines until a signal; whether all work that was under way was finished.

    Raises what opening or warming up an engine raises, and `BackendError` for one that was given up: the
    server finishes what else runs, and ends then.
    """
    return serve_from(WorkerStudio.of(folders, settings, device), settings)


def serve_from(studio: WorkerStudio, settings: Settings) -> bool:
    """As `start`, from a studio that was not run yet."""
    failures: list[BaseException] = []

    def end(run: asyncio.Task[None]) -> None:
        """What ends the studio ends the server, and is raised then."""
        if error := run.exception():
            log.error("the server ends: %s", error)
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(studio.run())
        running.add_done_callback(end)
        try:
            yield
        finally:
            running.remove_done_callback(end)
            await studio.close()

    finished = serve(studio, settings, lifespan)
    if failures:
        raise failures[0]
    return finished
