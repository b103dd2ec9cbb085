"""Where every interface hands in its jobs: it takes them to the studio, and counts what became of them."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from starlette.types import Receive

from sdfast.errors import BackendError, RequestError
from sdfast.request import Request
from sdfast.server.jobs import Done, Event, Failed, Job, QueueFull, Refiner, Studio
from sdfast.server.metrics import Metrics
from sdfast.server.problems import Problem, of_failure, of_full_queue, of_request_error
from sdfast.server.settings import Settings

Result = TypeVar("Result")
_log = logging.getLogger("sdfast.server")


@dataclass(frozen=True)
class Desk:
    """One interface's desk. fields: the interface's names of what it takes, for its error messages."""

    studio: Studio
    settings: Settings
    metrics: Metrics
    fields: Collection[str]

    def job(
        self,
        engine: str,
        request: Request,
        *,
        previews: int = 0,
        image: bytes | None = None,
        mask: bytes | None = None,
        control: bytes | None = None,
        ip_adapter: bytes | None = None,
        refiner: Refiner | None = None,
    ) -> Job:
        """A job of now, with an id of its own and the settings' deadline."""
        deadline = time.monotonic() + self.settings.timeout
        job = Job(
            secrets.token_hex(12), engine, request, deadline, previews, image, mask, control, ip_adapter
        )
        return job if refiner is None else replace(job, refiner=refiner)

    def check_size(self, engine: str, request: Request) -> None:
        """To be asked before images are made ready, which may take seconds. Raises `Problem` for a size that
        the engine does not have."""
        try:
            self.studio.check_size(engine, request)
        except RequestError as error:
            raise self._refused(error) from None

    def _refused(self, error: RequestError) -> Problem:
        self.metrics.failed("request")
        return of_request_error(error, self.fields)

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Raises `Problem` for what the studio does not take in."""
        try:
            return self.studio.submit(job)
        except QueueFull as error:
            self.metrics.failed("queue_full")
            raise of_full_queue(error) from None
        except RequestError as error:
            raise self._refused(error) from None
        except BackendError as error:  # this engine is not up, while others may be
            self.metrics.failed("engine")
            problem = of_failure(Failed("engine", str(error)), self.fields)
            problem.headers["retry-after"] = "5"
            raise problem from None

    @asynccontextmanager
    async def under_way(self, job: Job, events: AsyncIterator[Event]) -> AsyncGenerator[None]:
        """Whatever ends the block ends the job."""
        try:
            yield
        finally:
            self.studio.cancel(job.id)  # closing an iterator that was never begun would not do it
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    async def outcome(self, events: AsyncIterator[Event]) -> Done:
        """The end of a job that is not watched."""
        async with aclosing(self.watched(events)) as watched:
            async for event in watched:
                if isinstance(event, Done):
                    return event
        raise without_end()

    async def watched(self, events: AsyncIterator[Event]) -> AsyncGenerator[Event]:
        """The events, counted. Raises `Problem` for a job that failed."""
        async for event in events:
            if isinstance(event, Failed):
                self._tell(event)
                raise of_failure(event, self.fields)
            if isinstance(event, Done):
                self.metrics.finished(event.seconds)
            yield event

    def _tell(self, failed: Failed) -> None:
        """Count a failure, and log one that is not the client's doing."""
        self.metrics.failed(failed.kind)
        if failed.kind not in ("request", "cancelled"):
            _log.warning("a job failed", extra={"fields": {"kind": failed.kind, "error": failed.message}})


class ClientLeft(Problem):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client left before its answer")


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` results in. It is cancelled when the client leaves: then raises `ClientLeft`."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def without_end() -> Problem:
    return Problem(503, "the engine ended the job without a result; try again", code="engine_error")
