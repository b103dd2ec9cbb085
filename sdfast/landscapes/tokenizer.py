"""A byte-pair tokenizer in CLIP's format, trained on the captions.

Sennrich et al. 2016 (arXiv:1508.07909) over bytes, with CLIP's conventions: lower case, every word ends in
`</w>`, vocabulary = 256 bytes, 256 word-ending bytes, one token a merge, start and end of text last. Any
string is tokenized; words that are not in the captions fall apart into bytes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")

Pair = tuple[str, str]


@cache
def byte_symbols() -> dict[int, str]:
    """A printable character for each byte, as GPT-2 and CLIP assign them."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


def symbols_of(word: str) -> tuple[str, ...]:
    """The symbols of a word before any merge, the last one marked as the word's end."""
    symbols = [byte_symbols()[byte] for byte in word.encode()]
    return (*symbols[:-1], symbols[-1] + "</w>")


def merge(symbols: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """The symbols with every occurrence of the pair joined."""
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            joined.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return tuple(joined)


def learn_merges(captions: Iterable[str], least: int = 50) -> list[Pair]:
    """Merges, most frequent pair first, until no pair occurs `least` times."""
    counts = Counter(word for text in captions for word in WORDS.findall(text.lower()))
    words = {symbols_of(word): count for word, count in counts.items()}
    merges: list[Pair] = []
    while True:
        pairs: Counter[Pair] = Counter()
        for symbols, count in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < least:
            return merges
        merges.append(best)
        words = {merge(symbols, best): count for symbols, count in words.items()}


def save(merges: list[Pair], folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and the configuration that transformers' CLIPTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    single = list(byte_symbols().values())
    tokens = [*single, *(symbol + "</w>" for symbol in single), *(a + b for a, b in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special, indent=2) + "\n")


class Tokenizer:
    """Reads what `save` wrote; gives 77 token ids a text, as `CLIPTokenizer(padding="max_length")` does."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text())
        lines = (folder / "merges.txt").read_text().splitlines()[1:]
        self.ranks: dict[Pair, int] = {
            (a, b): i for i, (a, b) in enumerate(line.split(" ") for line in lines)
        }
        self.known: dict[str, tuple[int, ...]] = {}

    def word(self, word: str) -> tuple[int, ...]:
        """The ids of one word: merges are applied in the order in which they were learnt."""
        if word not in self.known:
            symbols = symbols_of(word)
            while pairs := [pair for pair in pairwise(symbols) if pair in self.ranks]:
                symbols = merge(symbols, min(pairs, key=self.ranks.__getitem__))
            self.known[word] = tuple(self.vocabulary[symbol] for symbol in symbols)
        return self.known[word]

    def encode(self, text: str) -> list[int]:
        """The 77 ids of a text: start, its words cut at 75 ids, end, and the end again as padding."""
        ids = [i for word in WORDS.findall(text.lower()) for i in self.word(word)][: LENGTH - 2]
        end = self.vocabulary[END]
        return [self.vocabulary[START], *ids, *[end] * (LENGTH - 1 - len(ids))]
