"""What every request passes before any route: an id, a key, a limit on its body and on the time it takes."""

import asyncio
import base64
import binascii
import hmac
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdfast.server.logs import request_id
from sdfast.server.metrics import Metrics
from sdfast.server.problems import Problem
from sdfast.server.settings import Settings

OPEN = "/health/live"
"""The one path that asks for no key."""

BODY_SECONDS = 60.0  # for a whole body to come in
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)

<<<<<<< HEAD
=======
_CHALLENGES = Headers(
    raw=[
        (b"www-authenticate", b"Bearer"),
        (b"www-authenticate", b'Basic realm="sdfast"'),  # of one line, Chromium reads the first alone
        (b"connection", b"close"),
    ]
)

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Whose work the current task does; the log puts it into every line."""

>>>>>>> main
_log = logging.getLogger("sdfast.server")


class Guard:
    """An ASGI layer around the whole app; it also counts and logs what was answered."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._bodies = _Bodies(settings.memory_of_bodies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._let_in(scope, receive, send)
        else:  # there are no websockets here, and none may come to be that ask for no key
            await send({"type": "websocket.close", "code": 1008})

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        answer = _Answer(send, _id(headers))
        scope.setdefault("state", {})["request_id"] = answer.id
        request_id.set(answer.id)  # for the task, which is this request's own, and what is logged of its end
        begun = time.perf_counter()
        body = _Body(receive, self.settings.max_body, self._bodies)
        try:
            problem = self._refusal(scope["path"], headers)
            app = problem.response(scope["path"]) if problem else self.app
            await app(scope, body, answer.send)
        except asyncio.CancelledError:
            if answer.status is None:  # the server is made to stop, and a client should not be left to guess
                stopped = Problem(503, "the server was stopped before the work was done; try again")
                await stopped.response(scope["path"])(scope, receive, answer.send)
            raise
        finally:
            body.release()
            self._account(scope, answer.status or 500, time.perf_counter() - begun)

    def _refusal(self, path: str, headers: Headers) -> Problem | None:
        """Why the request is not let in, as far as its head tells."""
        if not self._host_is_ours(headers):
            return Problem(
                403,
                f"host: {headers.get('host', '')[:60]} is not this machine's; a server without a key answers "
                "to its local names only: set a key, or start it with --allow-public",
                code="unknown_host",
            )
        if path != OPEN and not self._key_is_shown(headers):
            return Problem(
                401,
                "the key is wrong or missing; send it as `Authorization: Bearer KEY`, or as Basic's password",
                headers=_CHALLENGES,
            )
        return self._body_refusal(headers)

    def _host_is_ours(self, headers: Headers) -> bool:
        """Against web pages whose name was made to mean this machine, where no key stops them."""
        if self.settings.key is not None or self.settings.allow_public:
            return True
        return _LOCAL_HOST.fullmatch(headers.get("host", "")) is not None

    def _key_is_shown(self, headers: Headers) -> bool:
        key = self.settings.key
        if key is None:
            return True
        shown = _credentials(headers.get("authorization", ""))
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), key.encode())

    def _body_refusal(self, headers: Headers) -> Problem | None:
        coding = headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            return Problem(
                415,
                f"content-encoding: {coding[:60]} is not taken; send the body as it is",
                headers={"connection": "close"},
            )
        length = headers.get("content-length", "0")
        too_long = not length.isdecimal() or len(length) > 18 or int(length) > self.settings.max_body
        if too_long:
            return _too_large(self.settings.max_body)
        return None if self._bodies.have_room(int(length)) else _too_many_bodies()

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")  # the template: labels must stay few
        self.metrics.answered(route, status, seconds)
        told = {"method": scope["method"], "path": scope["path"], "status": status}
        _log.info("answered", extra={"fields": {**told, "seconds": round(seconds, 4)}})


class _Answer:
    """Sends an answer with the request's id on it, and remembers its status."""

    def __init__(self, send: Send, id: str) -> None:
        self._send, self.id = send, id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)


class _Bodies:
    """The bytes of all bodies that came in and whose requests are not answered yet."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0

    def have_room(self, size: int) -> bool:
        return self._held + size <= self._limit

    def take(self, size: int) -> None:
        self._held += size

    def release(self, size: int) -> None:
        self._held -= size


class _Body:
    """Receives a body, whether its length was told or not, up to a number of bytes and seconds.

    What it has received counts among all bodies until `release`.
    """

    def __init__(self, receive: Receive, limit: int, bodies: _Bodies) -> None:
        self._receive, self._limit, self._bodies = receive, limit, bodies
        self._size, self._complete = 0, False
        self._until = time.monotonic() + BODY_SECONDS

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # the client's leaving, for which there is no limit
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                408,
                f"the body did not come within {BODY_SECONDS:g} s; send it again, faster",
                headers={"connection": "close"},
            ) from None
        size = len(message.get("body", b""))
        if self._size + size > self._limit:
            raise _too_large(self._limit)
        if not self._bodies.have_room(size):
            raise _too_many_bodies()
        self._bodies.take(size)
        self._size += size
        self._complete = not message.get("more_body", False)
        return message

    def release(self) -> None:
        self._bodies.release(self._size)
        self._size = 0


def _too_large(limit: int) -> Problem:
    """The connection closes after it, so that nobody reads the rest."""
    return Problem(
        413, f"the body is longer than {limit} bytes, the most taken here", headers={"connection": "close"}
    )


def _too_many_bodies() -> Problem:
    """Told before a body is read, or within it: others have sent theirs meanwhile."""
    return Problem(
        503,
        "the server holds as many bodies of requests as it has memory for; try again later",
        code="too_many_bodies",
        headers={"retry-after": "5", "connection": "close"},
    )


def _id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _credentials(header: str) -> str:
    """The key in an Authorization header: Bearer's token or Basic's password; "" for none."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
