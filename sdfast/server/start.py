"""`sdfast serve`: engines opened while the server already answers that it is alive."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from sdfast.server.run import serve
from sdfast.server.settings import Settings
from sdfast.server.studio import LocalStudio


def start(folders: Sequence[Path], settings: Settings, device: str | None = None) -> bool:
    """Serve the engines until a signal; whether all work that was under way was finished.

    Raises what opening or warming up an engine raises: the server ends then.
    """
    studio = LocalStudio(folders, device, max_rows=settings.max_rows, max_queue=settings.queue)
    failures: list[BaseException] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        opening = asyncio.create_task(_open(studio, stop, failures))
        try:
            yield
        finally:
            stop.set()
            await opening
            await asyncio.to_thread(studio.close)

    finished = serve(studio, settings, lifespan)
    if failures:
        raise failures[0]
    return finished


async def _open(studio: LocalStudio, stop: threading.Event, failures: list[BaseException]) -> None:
    try:
        await asyncio.to_thread(studio.open, stop)
    except Exception as error:  # whatever keeps an engine from drawing ends the server, and is raised then
        failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)
