"""What goes wrong with a request, and the one shape in which clients are told."""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sdfast.errors import RequestError
from sdfast.server.jobs import Failed, FailureKind, QueueFull

_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_value",
    429: "queue_full",
    499: "cancelled",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
_FAILURES: Mapping[FailureKind, tuple[int, str]] = {
    "request": (422, "invalid_value"),
    "numerical": (500, "numerical_error"),
    "memory": (503, "out_of_memory"),
    "timeout": (504, "timeout"),
    "cancelled": (499, "cancelled"),
    "engine": (503, "engine_error"),
}
_FIELD = re.compile(r"([a-z_]+)(?:\.\d+)?(?=[: ])")
_FIELDS = {
    "prompts": "prompt",
    "negative_prompts": "negative_prompt",
    "height": "size",
    "width": "size",
    "num_images_per_prompt": "n",
    "hires": "enable_hr",
    "image_guidance_scale": "image_cfg_scale",
    "variation_seed": "subseed",
    "variation_strength": "subseed_strength",
}
"""The API's names of a `sdfast.request.Request`'s fields, where they are others."""


_AUTOMATIC1111 = ("/sdapi/", "/internal/", "/controlnet/")
"""Where its clients and its extension's ask, who read errors of another shape."""


class SdapiError(BaseModel):
    """How AUTOMATIC1111's API tells an error. detail: in short. errors: at length. body: nothing."""

    error: str
    detail: str
    body: str
    errors: str


class Told(BaseModel):
    """param: the field that is wrong, if it is one. code: what programs go by."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str


class Envelope(BaseModel):
    """How every error is told."""

    model_config = ConfigDict(extra="forbid")

    error: Told


class Problem(Exception):
    """An answer that is no picture.

    param: the field that is wrong. code: what programs go by. short: what AUTOMATIC1111 says of it, where
    clients know that.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        short: str | None = None,
    ) -> None:
        super().__init__(message)
        self.short = short or message
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, "error")
        self.headers = MutableHeaders(headers)  # it keeps a name that comes twice

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def envelope(self) -> dict[str, Any]:
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {name: _text(value) for name, value in told.items()}}

    def sdapi(self) -> dict[str, Any]:
        """An `SdapiError`."""
        told = {"error": self.code, "detail": self.short, "body": "", "errors": self.message}
        return {name: _text(value) for name, value in told.items()}

    def response(self, path: str) -> Response:
        """The answer to a request of `path`."""
        told = self.sdapi() if path.startswith(_AUTOMATIC1111) else self.envelope()
        return Response(json.dumps(told), self.status, self.headers, "application/json")


def of_failure(failed: Failed, fields: Collection[str]) -> Problem:
    """A job that ended without pictures. fields: the API's, to name the one that is wrong."""
    status, code = _FAILURES[failed.kind]
    param = _field(failed.message, fields) if failed.kind == "request" else None
    return Problem(status, failed.message, param=param, code=code)


def of_request_error(error: RequestError, fields: Collection[str], param: str | None = None) -> Problem:
    """What no engine here can do. param: the field that is wrong, if it is known."""
    message, param = str(error), param or _field(str(error), fields)
    told = message if param is None or param in message else f"{param}: {message}"
    return Problem(422, told, param=param)


def of_full_queue(error: QueueFull) -> Problem:
    seconds = max(1, math.ceil(error.retry_after))
    return Problem(429, str(error), code="queue_full", headers={"retry-after": str(seconds)})


def bug() -> Problem:
    return Problem(500, "an error inside the server; its log has more under this answer's x-request-id")


async def answer_problem(request: Request, error: Exception) -> Response:
    """For `Problem`s raised in a route."""
    return cast(Problem, error).response(request.url.path)


async def answer_unrouted(request: Request, error: Exception) -> Response:
    """For the framework's own errors: no such route, a method that a route does not have."""
    error = cast(HTTPException, error)
    what = f"{request.method} {request.url.path[:200]}"
    messages = {404: f"{what}: there is no such route", 405: f"{what}: the route has other methods"}
    message = messages.get(error.status_code, f"{what}: cannot be served")
    return Problem(error.status_code, message, headers=error.headers).response(request.url.path)


async def answer_invalid(request: Request, error: Exception) -> Response:
    """For what the framework itself checks, such as a query."""
    first = cast(RequestValidationError, error).errors()[0]
    field = str(first["loc"][-1])[:60]
    return Problem(422, f"{field}: {first['msg']}", param=field).response(request.url.path)


async def answer_gone(request: Request, error: Exception) -> Response:
    """For a client that left while its body was read: nobody reads this, but logs and metrics count it."""
    return Problem(499, "the client left before its request was read").response(request.url.path)


async def answer_bug(request: Request, error: Exception) -> Response:
    """For what nobody raised on purpose. The log has the traceback; the client gets the id to ask about."""
    made = bug()
    made.headers["x-request-id"] = request.state.request_id
    return made.response(request.url.path)


def _field(message: str, fields: Collection[str]) -> str | None:
    """The API's name of the field that a message starts with."""
    match = _FIELD.match(message)
    names = (match[1], _FIELDS.get(match[1])) if match else ()
    return next((name for name in names if name in fields), None)


def _text(value: str | None) -> str | None:
    """Text that every JSON parser takes: lone surrogates, which a client may have sent, as escapes."""
    return value if value is None else value.encode("utf-8", "backslashreplace").decode("utf-8")
