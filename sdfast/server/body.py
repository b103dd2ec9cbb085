"""Reading a request's body: JSON into a checked model, or a `Problem` naming the field."""

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from sdfast.request import check_text, shown, unknown, wrong_field
from sdfast.server.problems import Problem

_AT_ONCE = 65_536  # bytes that are parsed before another request would notice
Model = TypeVar("Model", bound=BaseModel)
Neutral = tuple[tuple[Any, ...], str]
"""Of a field that means nothing here: the values, beside null, that ask for nothing; what to do instead."""


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as a `model`. Raises `Problem`: 400 for no JSON, 415 for another type, 422 for a bad field."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page of another origin cannot send this type unasked
        raise Problem(415, f"content-type: must be application/json (got {shown(kind)})")
    body = await request.body()
    if len(body) <= _AT_ONCE:
        return parse(body, model)
    return await asyncio.to_thread(parse, body, model)


def parse(body: bytes, model: type[Model]) -> Model:
    """The checked fields of a JSON object."""
    try:
        given = json.loads(body.decode("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {_reason(error)}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise Problem(400, f"the body must be a JSON object (got {shown(given)})", code="invalid_json")
    return checked(given, model)


def checked(given: dict[str, Any], model: type[Model]) -> Model:
    """Raises `Problem` for the first field that is wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _of_field(error, model) from None


def check_neutral(value: Any, neutral: Neutral, written: Callable[[Any], str] = str) -> None:
    """Raises `ValueError`, for a model's validator, unless the value of a field that means nothing here asks
    for nothing. written: how the values that do are told."""
    allowed, advice = neutral
    if value is not None and value not in allowed:
        taken = f"; taken are: {', '.join(map(written, allowed))}" if allowed else ""
        raise ValueError(f"is not supported: {advice}{taken}")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. A name that comes twice would mean one thing here and another to whoever looked before."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        _check_name(name)
        if name in found:
            raise Problem(422, f"{name:.60}: is there twice; give it once", param=name[:60])
        found[name] = value
    return found


def _check_name(name: str) -> None:
    try:
        check_text(name)
    except ValueError as error:
        raise Problem(422, f"{name:.60}: {error}", param=name[:60]) from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error) if isinstance(error, json.JSONDecodeError) else "a number is too long"


def _of_field(error: ValidationError, model: type[BaseModel]) -> Problem:
    """The first wrong field: its name, what is wrong with it, what was given."""
    field, first = wrong_field(error)
    field, given = field[:60], first["input"]
    if first["type"] == "extra_forbidden":
        message = unknown(field, model.model_fields)
        return Problem(422, message, param=field, code="unknown_field")
    if first["type"] == "missing":
        return Problem(422, f"{field}: is missing", param=field, code="missing_field")
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if isinstance(given, float) and not math.isfinite(given):
        message = "must be a finite number"
    return Problem(422, f"{field or 'body'}: {message} (got {shown(given)})", param=field or None)
