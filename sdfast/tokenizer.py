"""Prompts to token ids, as CLIP reads them: byte-level BPE between a start and an end token, padded.

One longer than the text encoder reads is cut, as diffusers does, or read in chunks, as AUTOMATIC1111 does.

It runs on the `tokenizers` library alone, on two files that `sdfast/export/tokenizer.py` writes:
`tokenizer.json`, the vocabulary and merges, and `sdfast_tokenizer.json`, the length, the special ids, and of
how many vectors each embedding is.

The token of an embedding is found wherever it stands, within words too, in capital and small letters, as with
diffusers; it becomes an id for each of its vectors, one after the other.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from sdfast.emphasis import Piece
from sdfast.errors import EngineError, RequestError

VOCABULARY_FILE = "tokenizer.json"
SETTINGS_FILE = "sdfast_tokenizer.json"
BACKTRACK = 20
"""So many tokens back from the end of a full chunk a comma is looked for."""
EMBEDDINGS = "embeddings"  # where the settings have them, if there are any: token → number of vectors
_SETTINGS = ("model_max_length", "bos", "eos", "pad")


@dataclass(frozen=True)
class Tokens:
    """Tokenized prompts: `input_ids` int64 [B, L]; `truncated`, what was cut off each prompt, or ""."""

    input_ids: npt.NDArray[np.int64]
    truncated: tuple[str, ...]


@dataclass(frozen=True)
class _Token:
    """place: the number of its piece, and where in that it begins. number: which vector of an embedding."""

    id: int
    weight: float
    place: tuple[int, int]
    number: int = 0


@dataclass(frozen=True)
class Chunks:
    """A prompt as n prompts of the text encoder's length: `input_ids` int64 [n, L], and how much each token
    counts, `weights` float32 [n, L]; `read`, how many tokens of the text they hold; `truncated`, what was cut
    off, or ""."""

    input_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    read: int
    truncated: str = ""


@dataclass(frozen=True)
class Tokenizer:
    """A CLIP tokenizer. `max_length` is L, the ids a prompt becomes (77); `bos`, `eos`, `pad` are token ids.

    SD 1.x pads with the end token, SD 2.x and the second encoder of SDXL with id 0. `vectors`: by the id of
    an embedding's token, of how many vectors it is; the ids of the others follow that one.
    """

    bpe: tokenizers.Tokenizer
    max_length: int
    bos: int
    eos: int
    pad: int
    vectors: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Open the tokenizer in an engine's folder. Raises EngineError when it is missing or damaged."""
        settings = _settings(folder / SETTINGS_FILE)
        try:
            bpe = tokenizers.Tokenizer.from_str((folder / VOCABULARY_FILE).read_text("utf-8"))
        except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
            raise EngineError(
                f"{folder / VOCABULARY_FILE} cannot be read ({error}); export the engine again"
            ) from error
        bpe.no_truncation()
        bpe.no_padding()
        max_length, bos, eos, pad = (settings[name] for name in _SETTINGS)
        vectors = {}
        for token, count in settings.get(EMBEDDINGS, {}).items():
            first = bpe.token_to_id(token)
            if first is None:
                raise EngineError(
                    f"{folder / VOCABULARY_FILE} lacks the token {token!r:.60}; export the engine again"
                )
            vectors[first] = count
        return cls(bpe, max_length, bos, eos, pad, vectors)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids [B, L] of B prompts: start, text, end, padding. What does not fit is cut, and returned."""
        read = [self.cut([Piece(prompt)]) for prompt in prompts]
        none = np.empty((0, self.max_length), dtype=np.int64)
        ids = np.concatenate([none, *(one.input_ids for one in read)])
        return Tokens(ids, tuple(one.truncated for one in read))

    def cut(self, pieces: Sequence[Piece]) -> Chunks:
        """The beginning of a prompt, as much as one chunk holds."""
        tokens = list(islice(self._tokens(pieces), self.room + 1))
        first, rest = tokens[: self.room], tokens[self.room :]
        truncated = ""
        if rest:
            number, offset = rest[0].place
            truncated = pieces[number].text[offset:] + "".join(piece.text for piece in pieces[number + 1 :])
        return self._chunks([first], truncated)

    def chunks(self, parts: Sequence[Sequence[Piece]], least: int = 1) -> Chunks:
        """All of a prompt, each part of it in chunks of its own; the last ones empty to be at least so many.

        Where a comma is among the last `BACKTRACK` tokens of a full chunk, the next one begins after it, as
        with AUTOMATIC1111: what stands between two commas belongs together. Where the vectors of an embedding
        do not fit into the rest of a chunk, the next one begins with them, as there.
        """
        filled = [chunk for part in parts for chunk in self._filled([*self._tokens(part)]) or [[]]]
        if len(filled) > 1 and not filled[-1]:
            filled.pop()  # nothing follows the last break
        return self._chunks([*filled, *[[]] * (least - len(filled))])

    @property
    def room(self) -> int:
        """How many tokens of a text a chunk holds, between start and end."""
        return self.max_length - 2

    @cached_property
    def _comma(self) -> int | None:
        return self.bpe.token_to_id(",</w>")

    def _filled(self, tokens: "list[_Token]") -> "list[list[_Token]]":
        chunks: list[list[_Token]] = []
        while len(tokens) > self.room:
            end = self._end(tokens)
            chunks.append(tokens[:end])
            tokens = tokens[end:]
        return [*chunks, tokens] if tokens else chunks

    def _end(self, tokens: "list[_Token]") -> int:
        """How many of the tokens, more than a chunk holds, the first chunk takes."""
        end = self.room
        if tokens[end].number:
            return end - tokens[end].number
        if tokens[end].id == self._comma:
            return end
        near = range(end - 1, max(end - 1 - BACKTRACK, -1), -1)
        return next((i + 1 for i in near if tokens[i].id == self._comma), end)

    def _chunks(self, filled: "Sequence[Sequence[_Token]]", truncated: str = "") -> Chunks:
        input_ids = np.full((len(filled), self.max_length), self.pad, dtype=np.int64)
        weights = np.ones((len(filled), self.max_length), dtype=np.float32)
        for ids, weight, chunk in zip(input_ids, weights, filled, strict=True):
            ids[: len(chunk) + 2] = [self.bos, *(token.id for token in chunk), self.eos]
            weight[1 : len(chunk) + 1] = [token.weight for token in chunk]
        return Chunks(input_ids, weights, sum(map(len, filled)), truncated)

    def _tokens(self, pieces: Sequence[Piece]) -> "Iterator[_Token]":
        """The tokens of a text without start and end; each piece of it is read for itself."""
        for number, piece in enumerate(pieces):
            text = self._encode(piece.text)
            for id, (offset, _) in zip(text.ids, text.offsets, strict=True):
                for i in range(self.vectors.get(id, 1)):
                    yield _Token(id + i, piece.weight, (number, offset), i)

    def _encode(self, prompt: str) -> tokenizers.Encoding:
        """The tokens of a prompt, without start and end, each with its place in the prompt."""
        try:
            return self.bpe.encode(prompt, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:  # what is not UTF-8 does not reach the BPE
            raise RequestError(
                f"prompt {prompt!r:.80} is not valid Unicode text; remove its lone surrogates"
            ) from error


def _settings(path: Path) -> dict[str, Any]:
    """The length, at least that of a start, a word and an end, the special ids, and the embeddings."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read ({error}); export the engine again") from error
    least = dict.fromkeys(_SETTINGS, 0) | {"model_max_length": 3}
    if not isinstance(settings, dict) or not all(
        type(settings.get(name)) is int and settings[name] >= least[name] for name in _SETTINGS
    ):
        raise EngineError(
            f"{path} must give {', '.join(_SETTINGS)} as whole numbers; export the engine again"
        )
    embeddings, room = settings.get(EMBEDDINGS, {}), settings["model_max_length"] - 2
    if not isinstance(embeddings, dict) or not all(
        type(count) is int and 1 <= count <= room for count in embeddings.values()
    ):
        raise EngineError(
            f"{path} must give {EMBEDDINGS} as numbers of vectors, 1 to {room}; export the engine again"
        )
    return settings
