"""What every model of a request checks alike, and what is said of what is wrong."""

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from sdfast.errors import RequestError

MAX_PROMPT = 32_768  # characters
_SHOWN = 60  # characters of a bad value that an error repeats


class Checked(BaseModel):
    """What all models check alike."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """A checked object. Raises `RequestError` naming the field, what was given, and what is allowed."""
        given = {name: _plain(value) for name, value in fields.items()}
        try:
            return cls(**given)
        except ValidationError as error:
            raise RequestError(_explain(error, cls.model_fields)) from None

    @field_validator("prompts", "negative_prompts", "prompts_2", "negative_prompts_2", check_fields=False)
    @classmethod
    def _drawable(cls, texts: tuple[str | None, ...] | None) -> tuple[str | None, ...] | None:
        for text in texts or ():
            if text is not None:
                check_text(text)
        return texts

    @field_validator("height", "width", check_fields=False)
    @classmethod
    def _multiple_of_eight(cls, side: int) -> int:
        if side % 8:
            low = side // 8 * 8
            raise ValueError(f"must be a multiple of 8; the nearest are {low} and {low + 8}")
        return side


def check_text(text: str) -> None:
    if len(text) > MAX_PROMPT:
        raise ValueError(f"{len(text)} characters; at most {MAX_PROMPT}")
    if "\0" in text:
        raise ValueError("holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text; remove it") from None


def _plain(value: Any) -> Any:
    """Numpy scalars and lists as the strict schema wants them; everything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value


def wrong_field(error: ValidationError) -> tuple[str, Mapping[str, Any]]:
    """The first field that is wrong, with its place in a list, "" for the whole; and pydantic's word on it.

    Of a field of several types, that is the one which lies deepest: the type that was meant.
    """
    errors = error.errors(include_url=False)
    own = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    first = max(own, key=lambda one: len(one["loc"]))
    places = [part for part in first["loc"][1:] if isinstance(part, int)]  # the rest are names of types
    return ".".join(map(str, (*first["loc"][:1], *places))), first


def _explain(error: ValidationError, fields: Collection[str]) -> str:
    """One line: the field, what is wrong with it, what was given. fields: those that there are."""
    field, first = wrong_field(error)
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if not field:
        return message
    given = first["input"]
    if first["type"] == "missing":
        return f"{field}: is missing"
    if first["type"] == "extra_forbidden":
        return unknown(field, fields)
    if isinstance(given, float) and not math.isfinite(given):
        message = "must be a finite number"
    return f"{field}: {message} (got {shown(given)})"


def unknown(field: str, fields: Collection[str]) -> str:
    """What is said of a field that there is not: those of like names, or else all that there are."""
    near = get_close_matches(field, fields)
    if near:
        return f"{field}: unknown; did you mean {' or '.join(near)}?"
    return f"{field}: unknown; the fields are: {', '.join(fields)}"


def shown(value: Any) -> str:
    """A value in short, on one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integers beyond some thousand digits
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
