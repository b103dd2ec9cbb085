"""Prompts to token ids, as CLIP reads them: byte-level BPE between a start and an end token, padded.

It runs on the `tokenizers` library alone, on two files that `sdfast/export/tokenizer.py` writes:
`tokenizer.json`, the vocabulary and merges, and `sdfast_tokenizer.json`, the length and the special ids.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from sdfast.errors import EngineError, RequestError

VOCABULARY_FILE = "tokenizer.json"
SETTINGS_FILE = "sdfast_tokenizer.json"
_SETTINGS = ("model_max_length", "bos", "eos", "pad")


@dataclass(frozen=True)
class Tokens:
    """Tokenized prompts: `input_ids` int64 [B, L]; `truncated`, what was cut off each prompt, or ""."""

    input_ids: npt.NDArray[np.int64]
    truncated: tuple[str, ...]


@dataclass(frozen=True)
class Tokenizer:
    """A CLIP tokenizer. `max_length` is L, the ids a prompt becomes (77); `bos`, `eos`, `pad` are token ids.

    SD 1.x pads with the end token, SD 2.x and the second encoder of SDXL with id 0.
    """

    bpe: tokenizers.Tokenizer
    max_length: int
    bos: int
    eos: int
    pad: int

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
        return cls(bpe, max_length, bos, eos, pad)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids [B, L] of B prompts: start, text, end, padding. What does not fit is cut, and returned."""
        input_ids = np.full((len(prompts), self.max_length), self.pad, dtype=np.int64)
        truncated = []
        for row, prompt in zip(input_ids, prompts, strict=True):
            text = self._encode(prompt)
            room = self.max_length - 2
            ids = [self.bos, *text.ids[:room], self.eos]
            row[: len(ids)] = ids
            truncated.append(prompt[text.offsets[room][0] :] if len(text.ids) > room else "")
        return Tokens(input_ids, tuple(truncated))

    def count(self, prompt: str) -> int:
        """How many tokens of a prompt are read, without start and end."""
        return min(len(self._encode(prompt).ids), self.max_length - 2)

    def _encode(self, prompt: str) -> tokenizers.Encoding:
        """The tokens of a prompt, without start and end, each with its place in the prompt."""
        try:
            return self.bpe.encode(prompt, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:  # what is not UTF-8 does not reach the BPE
            raise RequestError(
                f"prompt {prompt!r:.80} is not valid Unicode text; remove its lone surrogates"
            ) from error


def _settings(path: Path) -> dict[str, int]:
    """The length, at least that of a start, a word and an end, and the special ids."""
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
    return settings
