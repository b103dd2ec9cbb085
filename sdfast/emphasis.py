"""Emphasis in prompts, as AUTOMATIC1111 reads it.

`(words)` count 1.1 times, `[words]` 1/1.1 times, `(words:1.3)` 1.3 times, and brackets in brackets multiply;
`\\(` is a bracket as such. `BREAK` begins a new part of the prompt. Prompts that are added up are taken apart
before (`sdfast.composition`). Those that change between steps are refused, unless they are read before this
(`sdfast.editing`).
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from sdfast.errors import RequestError

Emphasis = Literal["original", "no_norm", "ignore"]
"""What weights do. "original", AUTOMATIC1111's default, multiplies hidden states by them and keeps the mean
of all; "no_norm" multiplies alone; "ignore" takes the brackets away and no more."""

UP = 1.1
"""What a round bracket multiplies by, and a square one divides by."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MARK = re.compile(
    rf"\\[()\[\]\\]|\\|[()\[\]]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<change>:\s*{_NUMBER}\s*\])|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt's text, and how much its tokens count."""

    text: str
    weight: float = 1.0


def parse(prompt: str, *, edited: bool = False) -> list[list[Piece]]:
    """The pieces of each part of a prompt; one part, perhaps of no pieces, where nothing breaks it.

    Brackets that are not closed reach to the end; closing ones that nothing opened are text. edited: what
    changes between steps was read before, and what still looks like it is text.

    Raises `RequestError` for what is not supported.
    """
    return _Reader(edited).read(prompt)


class _Reader:
    """The pieces so far, part by part, and for each open bracket the number of those before it."""

    def __init__(self, edited: bool) -> None:
        self._edited = edited
        self._parts: list[list[Piece]] = [[]]
        self._read: list[tuple[int, Piece]] = []  # each with its part
        self._open: dict[str, list[int]] = {"(": [], "[": []}

    def read(self, prompt: str) -> list[list[Piece]]:
        for mark in _MARK.finditer(prompt):
            self._take(mark[0], mark["weight"], changes=mark["change"] is not None)
        for start in self._open["("]:
            self._weigh(start, UP)
        for start in self._open["["]:
            self._weigh(start, 1 / UP)
        return self._merged()

    def _take(self, text: str, weight: str | None, *, changes: bool) -> None:
        if text.startswith("\\"):
            self._add(text[1:])
        elif text in self._open:
            self._open[text].append(len(self._read))
        elif changes and self._open["["] and not self._edited:
            raise RequestError(
                f"prompt: [… {text} changes the prompt between steps, which is not supported; leave it out"
            )
        elif weight is not None and self._open["("]:
            self._weigh(self._open["("].pop(), _weight(weight))
        elif text == ")" and self._open["("]:
            self._weigh(self._open["("].pop(), UP)
        elif text == "]" and self._open["["]:
            self._weigh(self._open["["].pop(), 1 / UP)
        else:
            self._add_text(text)

    def _add_text(self, text: str) -> None:
        if "|" in text and self._open["["] and not self._edited:
            raise RequestError(
                "prompt: [… | …] takes turns between steps, which is not supported; leave it out"
            )
        for i, stretch in enumerate(_BREAK.split(text)):
            if i > 0:
                self._parts.append([])
            self._add(stretch)

    def _add(self, text: str) -> None:
        self._read.append((len(self._parts) - 1, Piece(text)))

    def _weigh(self, start: int, factor: float) -> None:
        """Multiply the weights of all pieces from `start` on."""
        for i, (part, piece) in enumerate(self._read[start:], start):
            self._read[i] = part, Piece(piece.text, piece.weight * factor)

    def _merged(self) -> list[list[Piece]]:
        """Neighbours of one weight as one piece, so that words which brackets split are read as one."""
        for part, piece in self._read:
            pieces = self._parts[part]
            if pieces and pieces[-1].weight == piece.weight:
                pieces[-1] = Piece(pieces[-1].text + piece.text, piece.weight)
            elif piece.text:
                pieces.append(piece)
        return self._parts


def _weight(number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise RequestError(f"prompt: {number:.40} is not a weight; give a number, as in (word:1.3)")
    return weight
