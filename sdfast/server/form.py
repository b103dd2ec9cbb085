"""Reading a form, multipart/form-data: its texts and its files. Nothing of it is written to a disk."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from sdfast.request import MAX_PROMPT, check_text, shown
from sdfast.server.problems import Problem

_FIELDS, _FILES = 64, 32
_TEXT_BYTES = 4 * MAX_PROMPT  # of one field
_WHOLE = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?")
_ENTRY = re.compile(r"(\w+)\[([^\[\]]+)\]")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Form:
    """What was sent under each name. The names of files are forgotten, and so is what they claim to be."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


async def read_form(request: Request) -> Form:
    """Raises `Problem`: 415 for another type, 403 for another site's form, 400 for one that is damaged."""
    _check_head(request.headers)
    parser = _Parser(
        request.headers,
        request.stream(),
        max_files=_FILES,
        max_fields=_FIELDS,
        max_part_size=_TEXT_BYTES,
    )
    try:
        sent = await parser.parse()
    except MultiPartException as error:
        raise _damaged(error.message) from None
    try:
        if not parser.ended:
            raise _damaged("it is cut short.")
        return await _sorted(sent)
    finally:
        await sent.close()


def typed(texts: Mapping[str, str], model: type[BaseModel]) -> dict[str, Any]:
    """Texts as `model` has their fields: numbers, truth values and objects as JSON writes them.

    What is no number, list of numbers or words, or object stays text, and the model refuses it. An object may
    also be sent entry by entry, as OpenAI's SDK does: `loras[oil]`.
    """
    fields, found = model.model_fields, dict[str, Any]()
    for name, text in texts.items():
        entry = _ENTRY.fullmatch(name)
        if entry and entry[1] in fields and _is_object(fields[entry[1]].annotation):
            earlier = found.get(entry[1])
            found[entry[1]] = {
                **(earlier if isinstance(earlier, dict) else {}),
                entry[2]: _value(text, float),
            }
        else:
            found[name] = _value(text, fields[name].annotation) if name in fields else text
    return found


class _Parser(MultiPartParser):
    """Keeps files in memory: the guard bounds what comes in."""

    spool_max_size = 0  # which stands for no limit
    ended = False

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode("utf-8")
            except UnicodeDecodeError:
                raise MultiPartException(
                    f"{part.field_name:.60} is not UTF-8; a file needs a filename."
                ) from None
        super().on_part_end()

    def on_end(self) -> None:
        self.ended = True


def _check_head(headers: Headers) -> None:
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise Problem(415, f"content-type: must be multipart/form-data (got {shown(kind.decode('latin-1'))})")
    charset = options.get(b"charset", b"utf-8")
    if charset.lower() != b"utf-8":
        raise Problem(
            415, f"content-type: the charset must be utf-8 (got {shown(charset.decode('latin-1'))})"
        )
    if not _of_this_site(headers):
        raise Problem(403, "a web page of another site sent this form; only this server's own may")


def _of_this_site(headers: Headers) -> bool:
    """Browsers send forms of other sites unasked, with the password that they remember for this one."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


async def _sorted(sent: FormData) -> Form:
    form = Form()
    for name, value in sent.multi_items():
        if isinstance(value, UploadFile):
            form.files.setdefault(name, []).append(await value.read())
        elif name in form.texts:
            raise Problem(422, f"{name:.60}: is there twice; give it once", param=name[:60])
        else:
            form.texts[name] = value
    for name in (*form.texts, *form.files):
        try:
            check_text(name)
        except ValueError as error:
            raise Problem(422, f"{name:.60}: {error}", param=name[:60]) from None
    return form


def _value(text: str, annotation: Any) -> Any:
    kinds = get_args(annotation) or (annotation,)
    if bool in kinds:
        return _TRUTH.get(text, text)
    if int in kinds and _WHOLE.fullmatch(text):
        return int(text)
    if float in kinds and _NUMBER.fullmatch(text):
        return float(text)
    if (_is_object(annotation) and text[:1] in ("[", "{")) or (_lists_words(annotation) and text[:1] == "["):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    if list[float] in kinds and text[:1] + text[-1:] == "[]":
        numbers = [number.strip() for number in text[1:-1].split(",")]
        if all(map(_NUMBER.fullmatch, numbers)):
            return list(map(float, numbers))
    return text


def _is_object(annotation: Any) -> bool:
    return any(get_origin(kind) is dict for kind in get_args(annotation))


def _lists_words(annotation: Any) -> bool:
    """Whether there may be a list of some words out of a few."""
    lists = (kind for kind in get_args(annotation) if get_origin(kind) is list)
    return any(get_origin(get_args(kind)[0]) is Literal for kind in lists)


def _damaged(why: str) -> Problem:
    return Problem(400, f"the form cannot be read: {why}", code="invalid_form")
