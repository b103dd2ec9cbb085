"""OpenAI's Images API: `POST /v1/images/generations`, whole or as a stream, and `GET /v1/models`."""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sdfast.errors import BackendError, RequestError
from sdfast.server.body import read_json
from sdfast.server.encoding import encode
from sdfast.server.fields import FIELDS, Generation, engine_of
from sdfast.server.health import check_open
from sdfast.server.jobs import Done, Event, Failed, Job, Preview, QueueFull, Studio
from sdfast.server.metrics import Metrics
from sdfast.server.problems import Problem, bug, of_failure, of_full_queue, of_request_error
from sdfast.server.settings import Settings

_BODY = {"content": {"application/json": {"schema": Generation.model_json_schema()}}, "required": True}
Result = TypeVar("Result")
_log = logging.getLogger("sdfast.server")


def routes(studio: Studio, settings: Settings, metrics: Metrics) -> APIRouter:
    """The API's routes, over one studio."""
    router, started = APIRouter(), int(time.time())
    desk = Desk(studio, settings, metrics)

    @router.post("/v1/images/generations", openapi_extra={"requestBody": _BODY})
    async def generations(request: Request) -> Response:
        check_open(request, studio)
        order = desk.order(await read_json(request, Generation))
        events = desk.submit(order.job)
        if order.asked.stream:
            return EventStream(order, desk, events)
        async with desk.under_way(order.job, events):
            body = await unless_gone(request.receive, _answer(order, desk.outcome(events)))
        return Response(body, media_type="application/json")

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [
            {"id": name, "object": "model", "created": started, "owned_by": "sdfast"}
            for name in studio.engines
        ]
        return {"object": "list", "data": listed}

    return router


@dataclass(frozen=True)
class Order:
    """What a client asked for, the job that it became, and when (seconds since 1970)."""

    asked: Generation
    job: Job
    created: int

    @property
    def told(self) -> dict[str, Any]:
        """What every answer repeats."""
        request = self.job.request
        return {
            "background": "opaque",
            "output_format": self.asked.format,
            "quality": "auto",
            "size": f"{request.width}x{request.height}",
        }


@dataclass(frozen=True)
class Desk:
    """Takes orders to the studio, and counts what became of them."""

    studio: Studio
    settings: Settings
    metrics: Metrics

    def order(self, asked: Generation) -> Order:
        engine = engine_of(asked.model, self.studio.engines)
        job = Job(
            id=secrets.token_hex(12),
            engine=engine.name,
            request=asked.request(engine),
            deadline=time.monotonic() + self.settings.timeout,
            previews=asked.partial_images or 0,
        )
        return Order(asked, job, int(time.time()))

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Raises `Problem` for what the studio does not take in."""
        try:
            return self.studio.submit(job)
        except QueueFull as error:
            self.metrics.failed("queue_full")
            raise of_full_queue(error) from None
        except RequestError as error:
            self.metrics.failed("request")
            raise of_request_error(error, FIELDS) from None
        except BackendError as error:  # it failed for good since `check_open` looked
            self.metrics.failed("engine")
            raise of_failure(Failed("engine", str(error)), FIELDS) from None

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
        raise _without_end()

    async def watched(self, events: AsyncIterator[Event]) -> AsyncGenerator[Event]:
        """The events, counted. Raises `Problem` for a job that failed."""
        async for event in events:
            if isinstance(event, Failed):
                self._tell(event)
                raise of_failure(event, FIELDS)
            if isinstance(event, Done):
                self.metrics.finished(event.seconds)
            yield event

    def _tell(self, failed: Failed) -> None:
        """Count a failure, and log one that is not the client's doing."""
        self.metrics.failed(failed.kind)
        if failed.kind not in ("request", "cancelled"):
            _log.warning("a job failed", extra={"fields": {"kind": failed.kind, "error": failed.message}})


class EventStream(Response):
    """Server-sent events of a job: partial pictures, then the finished ones, then `[DONE]`.

    The status is sent before anything can go wrong with the job, so a failure is an event of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, order: Order, desk: Desk, events: AsyncIterator[Event]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._order, self._desk, self._events = order, desk, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def push(chunk: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        async with self._desk.under_way(self._order.job, self._events):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            try:
                await unless_gone(receive, self._push_all(push))
            except ClientLeft:
                return
            except Problem as problem:
                await push(_event("error", problem.envelope()))
            except Exception:
                await push(_event("error", bug().envelope()), more=False)
                raise
        await push(b"", more=False)

    async def _push_all(self, push: Callable[[bytes], Awaitable[None]]) -> None:
        async with aclosing(self._desk.watched(self._events)) as watched:
            async for event in watched:
                if isinstance(event, Preview):
                    await push(await asyncio.to_thread(_partial, self._order, event))
                elif isinstance(event, Done):
                    for i in range(len(event.pngs)):
                        await push(await asyncio.to_thread(_completed, self._order, event, i))
                    await push(b"data: [DONE]\n\n")
                    return
        raise _without_end()


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


async def _answer(order: Order, outcome: Awaitable[Done]) -> bytes:
    return await asyncio.to_thread(_whole, order, await outcome)


def _whole(order: Order, done: Done) -> bytes:
    """The answer's JSON. Megabytes of base64: in a thread, like everything that is called there."""
    made = [encode(png, order.asked.format, order.asked.compression) for png in done.pngs]
    data = [_picture(order, done, i, *encoded) for i, encoded in enumerate(made)]
    return json.dumps({"created": order.created, "data": data, **order.told, "usage": _usage()}).encode()


def _picture(order: Order, done: Done, i: int, picture: bytes, kept: bool) -> dict[str, Any]:
    """A picture, the seed that makes it again, and what a client should know of it."""
    truncated = done.truncated[0] if done.truncated else ""
    warnings = []
    if truncated:
        warnings.append(f"the text encoder reads no more than 77 tokens; left out: {truncated!r}")
    if not kept:
        warnings.append(
            f"{order.asked.format} has no room for the parameters; ask for png to have them inside"
        )
    return {"b64_json": base64.b64encode(picture).decode(), "seed": done.seeds[i], "warnings": warnings}


def _partial(order: Order, preview: Preview) -> bytes:
    picture, _ = encode(preview.png, order.asked.format, order.asked.compression)
    type = "image_generation.partial_image"
    return _event(
        type,
        {
            "type": type,
            "b64_json": base64.b64encode(picture).decode(),
            "created_at": order.created,
            "partial_image_index": preview.index,
            **order.told,
        },
    )


def _completed(order: Order, done: Done, i: int) -> bytes:
    type = "image_generation.completed"
    picture = _picture(order, done, i, *encode(done.pngs[i], order.asked.format, order.asked.compression))
    return _event(
        type, {"type": type, "created_at": order.created, **picture, **order.told, "usage": _usage()}
    )


def _usage() -> dict[str, Any]:
    """Nothing is billed. The engine alone counts tokens and does not tell; a picture is not made of any."""
    details = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": details, "output_tokens": 0, "total_tokens": 0}


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _without_end() -> Problem:
    return Problem(503, "the engine ended the job without a result; try again", code="engine_error")
