"""What the API answers: the whole at once, or server-sent events. Each in its JSON."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sdfast.masked_area import MaskedArea
from sdfast.server.desk import ClientLeft, Desk, unless_gone, without_end
from sdfast.server.encoding import encode, redrawn
from sdfast.server.jobs import Done, Event, Job, Preview, Queued, Step
from sdfast.server.openai.fields import Generation
from sdfast.server.problems import Problem, bug

KEEP_ALIVE_SECONDS = 5.0
"""A stream is not silent for longer: proxies and clients would take it for dead."""

Kind = Literal["image_generation", "image_edit"]
Push = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class Order:
    """What a client asked for, the job that it became, and when (seconds since 1970).

    kind: what the names of its events begin with. area: of an image, the part that is drawn.
    """

    kind: Kind
    asked: Generation
    job: Job
    created: int
    area: MaskedArea | None = None

    @classmethod
    def make(cls, kind: Kind, asked: Generation, job: Job, area: MaskedArea | None = None) -> Self:
        """An order of now."""
        return cls(kind, asked, job, int(time.time()), area)

    @property
    def told(self) -> dict[str, Any]:
        """What every answer repeats."""
        width, height = self.job.request.width, self.job.request.height
        if self.area is not None:
            width, height = self.area.image.size
        return {
            "background": "opaque",
            "output_format": self.asked.format,
            "quality": "auto",
            "size": f"{width}x{height}",
        }

    def file(self, png: bytes) -> tuple[bytes, bool]:
        """The file of a picture, whole and as asked for, and whether its parameters are inside.

        Takes processor time.
        """
        whole = png if self.area is None else redrawn(png, self.area.pasted)
        return encode(whole, self.asked.format, self.asked.compression)


class EventStream(Response):
    """Server-sent events of a job: its progress and partial pictures, the finished ones, then `[DONE]`.

    What the engine refuses is answered with a status of its own. Once it has taken the job in, the stream
    begins, and a failure is an event.
    """

    media_type = "text/event-stream"

    def __init__(self, order: Order, desk: Desk, events: AsyncIterator[Event]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._order, self._desk, self._events = order, desk, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def push(chunk: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        async with (
            self._desk.under_way(self._order.job, self._events),
            aclosing(self._desk.watched(self._events)) as watched,
        ):
            first = await unless_gone(receive, _first(watched))
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            try:
                async with _kept_alive(push):
                    await unless_gone(receive, self._push_all(first, watched, push))
            except ClientLeft:
                return
            except Problem as problem:
                await push(_event("error", problem.envelope()))
            except Exception:
                await push(_event("error", bug().envelope()), more=False)
                raise
        await push(b"", more=False)

    async def _push_all(self, first: Event, others: AsyncIterator[Event], push: Push) -> None:
        """Ends with the pictures. Raises `Problem`."""
        event: Event | None = first
        while event is not None:
            await self._push(event, push)
            if isinstance(event, Done):
                return
            event = await anext(others, None)
        raise without_end()

    async def _push(self, event: Event, push: Push) -> None:
        if isinstance(event, Preview):
            await push(await asyncio.to_thread(_partial, self._order, event))
        elif isinstance(event, Done):
            for i in range(len(event.pngs)):
                await push(await asyncio.to_thread(_completed, self._order, event, i))
            await push(b"data: [DONE]\n\n")
        elif self._order.asked.progress and isinstance(event, Queued | Step):
            await push(_progress(self._order, event))


async def _first(events: AsyncIterator[Event]) -> Event:
    """Comes soon: it waits for no other job, and an engine that gives no sign of life is ended."""
    event = await anext(events, None)
    if event is None:
        raise without_end()
    return event


@asynccontextmanager
async def _kept_alive(push: Push) -> AsyncGenerator[None]:
    """Comments, which every client skips, go out beside the events."""

    async def comment() -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            await push(b": waiting\n\n")

    commenting = asyncio.create_task(comment())
    try:
        yield
    finally:
        commenting.cancel()
        await asyncio.gather(commenting, return_exceptions=True)


async def answer(receive: Receive, order: Order, desk: Desk) -> Response:
    """The pictures: the whole at once, or a stream of events. Raises `Problem`."""
    events = desk.submit(order.job)
    if order.asked.stream:
        return EventStream(order, desk, events)
    async with desk.under_way(order.job, events):
        done = await unless_gone(receive, desk.outcome(events))
        body = await asyncio.to_thread(_whole, order, done)
    return Response(body, media_type="application/json")


def _whole(order: Order, done: Done) -> bytes:
    """The answer's JSON. Megabytes of base64: in a thread, like everything that is called there."""
    made = [order.file(png) for png in done.pngs]
    data = [_picture(order, done, i, *encoded) for i, encoded in enumerate(made)]
    return json.dumps({"created": order.created, "data": data, **order.told, "usage": _usage(done)}).encode()


def _picture(order: Order, done: Done, i: int, picture: bytes, kept: bool) -> dict[str, Any]:
    """A picture, the seed that makes it again, and what a client should know of it."""
    truncated = done.truncated[0] if done.truncated else ""
    warnings = []
    if truncated:
        warnings.append(
            f"the text encoder reads no more than 77 tokens; left out: {truncated!r}; "
            'long_prompts: "chunk" reads all of it'
        )
    if not kept:
        warnings.append(
            f"{order.asked.format} has no room for the parameters; ask for png to have them inside"
        )
    varied = order.job.request.variation_seeds
    return {
        "b64_json": base64.b64encode(picture).decode(),
        "seed": done.seeds[i],
        **({"variation_seed": varied[i]} if varied else {}),
        "warnings": warnings,
    }


def _partial(order: Order, preview: Preview) -> bytes:
    picture, _ = order.file(preview.png)
    type = f"{order.kind}.partial_image"
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
    type = f"{order.kind}.completed"
    picture = _picture(order, done, i, *order.file(done.pngs[i]))
    return _event(
        type, {"type": type, "created_at": order.created, **picture, **order.told, "usage": _usage(done)}
    )


def _progress(order: Order, event: Queued | Step) -> bytes:
    """position: the jobs that come before it while it waits, then null. steps: 0 until it is known."""
    type = f"{order.kind}.progress"
    position = event.position if isinstance(event, Queued) else None
    step, steps = (event.done, event.total) if isinstance(event, Step) else (0, 0)
    told = {"type": type, "created_at": order.created, "position": position, "step": step, "steps": steps}
    return _event(type, told)


def _usage(done: Done) -> dict[str, Any]:
    """Tokens of the prompts that were read; no picture is made of any, drawn over or new."""
    details = {"image_tokens": 0, "text_tokens": done.tokens}
    return {
        "input_tokens": done.tokens,
        "input_tokens_details": details,
        "output_tokens": 0,
        "total_tokens": done.tokens,
    }


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
