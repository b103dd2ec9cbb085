"""uvicorn with limits on connections and heads, and an end that lets running work finish."""

import asyncio
import json
import logging
import secrets
import socket
import time
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdfast.errors import SettingsError
from sdfast.server.problems import Problem
from sdfast.server.settings import Settings

HEAD_BYTES = 32_768
HEAD_SECONDS = 10.0  # from the first byte of a request, or the connection, to the end of its headers
WRITE_SECONDS = 30.0  # in which a client takes nothing of an answer
IDLE_SECONDS = 15  # between requests
LINGER_SECONDS = 5.0  # in which a client that is refused may go on sending, and reads why
CONNECTIONS = 1_024
BACKLOG = 1_024

_log = logging.getLogger("sdfast.server")


def configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        loop="asyncio",
        log_config=None,  # `logs.set_up` did it
        access_log=False,  # the guard logs what was answered, with its id
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=1,  # `Server` has waited already
        h11_max_incomplete_event_size=HEAD_BYTES,
    )


def listen(settings: Settings) -> socket.socket:
    """A socket on the settings' address. Raises `SettingsError`."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"{settings.host}:{settings.port}: cannot be listened on ({error.strerror or error}); "
            "choose another host or port"
        ) from None


class Server(uvicorn.Server):
    """Goes on listening after a signal until running work is done, so that `/health/ready` can say 503."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain: float) -> None:
        super().__init__(config)
        self._app, self._drain = app, drain
        self._drained_by: float | None = None
        self.cut_short = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain; a second one ends at once."""
        if self._drained_by is None:
            self._app.state.draining = True
            self._drained_by = time.monotonic() + self._drain
        else:
            self._cut("a second signal came")

    async def on_tick(self, counter: int) -> bool:
        if self._drained_by is not None and not self.should_exit:
            if not self.server_state.tasks:
                self.should_exit = True
            elif time.monotonic() > self._drained_by:
                self._cut(f"{self._drain:g} s after the signal work still ran")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.cut_short:
            for task in self.server_state.tasks:
                task.cancel()
        await super().shutdown(sockets)

    def _cut(self, why: str) -> None:
        _log.error("%s: what still runs is ended", why)
        self.cut_short = self.should_exit = True


class Protocol(H11Protocol):
    """HTTP/1.1 that waits for a head and for a reader only so long, and refuses in the API's shape."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Lingering(transport, self.conn, self.loop)))
        if len(self.connections) > CONNECTIONS:
            self._refuse(
                Problem(503, "there are too many connections; try again", code="too_many_connections")
            )
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # it was refused, and sends on
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._expect_head()

    def pause_writing(self) -> None:
        """The buffers are full: the client must read on, or loses its connection."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(400, "this is not HTTP/1.1, or its head is too long"))

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(Problem(408, f"the headers did not come within {HEAD_SECONDS:g} s"))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the app, and close."""
        self._stop_timer()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem.envelope()).encode()
            self.transport.write(_head(problem, len(body)) + body)
        self.transport.close()


class _Lingering:
    """A transport whose closing a client in the middle of a request does not take for a broken connection.

    To close while a body still comes in would make the system drop the answer with it. So the answer is ended
    and what comes in is dropped until the client has read it and closes, for some seconds at most.
    """

    def __init__(
        self, transport: asyncio.Transport, conn: h11.Connection, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport, self._conn, self._loop = transport, conn, loop
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or self._conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._loop.call_later(LINGER_SECONDS, self._transport.close)


def _head(problem: Problem, length: int) -> bytes:
    fields: dict[str, Any] = {
        "content-type": "application/json",
        "content-length": length,
        "x-request-id": f"req_{secrets.token_hex(12)}",
        "connection": "close",
    }
    lines = [
        f"HTTP/1.1 {problem.status} {problem.code}",
        *(f"{name}: {value}" for name, value in fields.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii")
