"""Frames on a stream of bytes: a header in JSON, and the bytes that it counts.

    length of the header (4 bytes, big-endian) | header | part | part | …

The header is `Header`'s JSON; nothing that comes in is ever run. What is too long or makes no sense raises
`FrameError`, before memory is given to it: the other side is broken, and the stream with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

HEADER_BYTES = 2**24
PARTS_BYTES = 2**30  # of one frame
PARTS = 256
_LENGTH = 4


class FrameError(Exception):
    """What came, or was to be sent, is no frame or no message."""


@dataclass(frozen=True)
class Frame:
    """kind: of message. id: the job that it is about, or "". fields: JSON. parts: bytes that are no JSON."""

    kind: str
    id: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    parts: tuple[bytes, ...] = ()


class Header(BaseModel):
    """A frame without its parts, and how many bytes each of them has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: str
    id: str
    fields: dict[str, Any]
    parts: tuple[Annotated[int, Field(ge=0)], ...] = Field(max_length=PARTS)


def encoded(frame: Frame) -> list[bytes]:
    """What to send, in order. Raises `FrameError` for what the other side would not take."""
    lengths = tuple(map(len, frame.parts))
    header = Header.model_construct(kind=frame.kind, id=frame.id, fields=frame.fields, parts=lengths)
    text = header.model_dump_json().encode()
    _check(len(text), lengths)
    return [len(text).to_bytes(_LENGTH) + text, *frame.parts]


class Decoder:
    """Puts together what comes in."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._header: Header | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now. Raises `FrameError`; after that the stream cannot be read."""
        self._data += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Frame | None:
        if self._header is None:
            self._header = self._read_header()
        if self._header is None or len(self._data) < sum(self._header.parts):
            return None
        header, self._header = self._header, None
        parts = tuple(self._take(length) for length in header.parts)
        return Frame(header.kind, header.id, header.fields, parts)

    def _read_header(self) -> Header | None:
        if len(self._data) < _LENGTH:
            return None
        length = int.from_bytes(self._data[:_LENGTH])
        _check(length, ())
        if len(self._data) < _LENGTH + length:
            return None
        self._take(_LENGTH)
        text = self._take(length)
        try:
            header = Header.model_validate_json(text)
        except ValidationError as error:
            raise FrameError(f"{text[:60]!r} is no header: {error.errors()[0]['msg']}") from None
        _check(length, header.parts)
        return header

    def _take(self, length: int) -> bytes:
        taken = bytes(memoryview(self._data)[:length])
        del self._data[:length]
        return taken


def _check(header: int, parts: Sequence[int]) -> None:
    if header > HEADER_BYTES:
        raise FrameError(f"a header of {header} bytes; the most is {HEADER_BYTES}")
    if len(parts) > PARTS or sum(parts) > PARTS_BYTES:
        raise FrameError(
            f"{len(parts)} parts of {sum(parts)} bytes; the most are {PARTS} parts and {PARTS_BYTES} bytes"
        )
