"""The run-time tokenizer gives the ids that transformers' CLIPTokenizer gives, for any prompt."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdfast.emphasis import Piece
from sdfast.errors import CheckpointError, EngineError, RequestError
from sdfast.export.single_file import write_clip_vocabulary
from sdfast.export.tokenizer import save_runtime_tokenizer
from sdfast.tokenizer import SETTINGS_FILE, VOCABULARY_FILE, Tokenizer
from sdfast.validation.reading import _chunks
from tests.checkpoints import save_tokenizer

PROMPTS = [
    "",
    " ",
    "a",
    "a cabin in misty mountains, watercolor style",
    "A Cabin\tIN\n\nmisty   mountains !!! ...",
    "don't they're we've I'm you'll he'd it's",
    "1girl, (masterpiece:1.2), [x|y], 4k, 3.14159, <lora:a:0.8>",
    "hello! world! !",
    "!",
    "🎉 👩‍👩‍👧‍👦 🏔️ 山の小屋 café e\u0301 ﬁ Ⅷ ½ ß İ",
    "<|startoftext|> inside <|endoftext|> of it <|endoftext|>",
    "<|startoftext|><|endoftext|>!<|ENDOFTEXT|>",
    "with\0zero and \u200b\ufeff\u2028\u3000 odd spaces \x7f",
    "word " * 75,
    "word " * 76,
    "word " * 300,
    "z" * 5000,
    "🎉" * 200,
    "a !" * 100,
]


def clip(folder: Path, pad: str) -> Path:
    """CLIP's own vocabulary of 49,408 tokens."""
    folder.mkdir(parents=True)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_clip_vocabulary(folder)
    return folder


@pytest.fixture(scope="module", params=["<|endoftext|>", "!", "clip <|endoftext|>", "clip !"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tokenizer"
    kind, _, pad = request.param.rpartition(" ")
    if kind:
        return clip(folder, pad)
    save_tokenizer(folder, pad=pad)
    return folder


@pytest.fixture(scope="module")
def pair(source: Path) -> tuple[Tokenizer, Any]:
    from transformers import CLIPTokenizer

    save_runtime_tokenizer(source, source.parent / "runtime")
    return Tokenizer.load(source.parent / "runtime"), CLIPTokenizer.from_pretrained(source)


def expected(reference: Any, prompts: list[str]) -> np.ndarray:
    ids: np.ndarray = reference(
        prompts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
    ).input_ids
    return ids


def test_ids_equal_those_of_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    tokens = ours(PROMPTS)
    assert tokens.input_ids.dtype == np.int64 and tokens.input_ids.shape == (len(PROMPTS), 77)
    np.testing.assert_array_equal(tokens.input_ids, expected(reference, PROMPTS))


def test_ids_equal_for_random_text(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    chance = random.Random(0)
    letters = [*"abcthe !'.,0123\n\té🎉山́<|>", "<|endoftext|>", " the ", " cabin "]
    prompts = ["".join(chance.choices(letters, k=chance.randrange(120))) for _ in range(500)]
    prompts += ["".join(chr(chance.randrange(1, 0xD800)) for _ in range(20)) for _ in range(200)]
    np.testing.assert_array_equal(ours(prompts).input_ids, expected(reference, prompts))


def test_what_was_cut_is_said(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    kept = "z " * 75
    assert ours(["short", kept, kept + "cut off"]).truncated == ("", "", "cut off")


def test_the_tokens_that_are_read_are_counted(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for prompt in PROMPTS:
        tokens = len(theirs(prompt, verbose=False).input_ids) - 2
        assert ours.cut([Piece(prompt)]).read == min(tokens, 75)
        assert ours.chunks([[Piece(prompt)]]).read == tokens


def test_chunks_end_after_a_comma_that_is_near(pair: tuple[Tokenizer, Any]) -> None:
    """At most 20 tokens before the end of a full one, as with AUTOMATIC1111; the rest begins the next."""
    ours, _ = pair

    def lengths(text: str) -> list[int]:
        chunks = ours.chunks([[Piece(text)]])
        assert (chunks.input_ids[:, 0] == ours.bos).all()
        ends = [row.tolist().index(ours.eos) for row in chunks.input_ids]
        assert sum(end - 1 for end in ends) == chunks.read
        return [end - 1 for end in ends]

    assert lengths("z " * 75) == [75] and lengths("z " * 76) == [75, 1]
    assert lengths("z " * 55 + ", " + "z " * 20) == [56, 20]
    assert lengths("z " * 54 + ", " + "z " * 21) == [75, 1]
    assert lengths("z " * 54 + ", " + "z " * 19 + ", z") == [75, 1]
    assert lengths("z " * 75 + ", z") == [75, 2]  # a comma there belongs to what follows
    assert lengths("z " * 60 + ", " + "z " * 13 + ", " + "z " * 90) == [75, 75, 15]


def test_chunks_of_random_text_are_those_of_the_reference(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    chance = random.Random(1)
    for _ in range(100):
        words = chance.choices(
            ["the", "cabin", ",", "misty!", "x"], [4, 4, chance.choice([0.3, 3]), 1, 1], k=300
        )
        parts = [
            [Piece(" ".join(words[:cut]), 1.5), Piece(" ".join(words[cut : 2 * cut])), Piece("", 2)]
            for cut in [chance.randrange(150)]
        ]
        chunks, expected = ours.chunks(parts), _chunks(reference, parts, chunked=True)
        for ids, weights, chunk in zip(chunks.input_ids, chunks.weights, expected, strict=True):
            assert ids[1 : len(chunk) + 2].tolist() == [*(id for id, _ in chunk), ours.eos]
            assert weights[1 : len(chunk) + 1].tolist() == [weight for _, weight in chunk]
            assert (weights[len(chunk) + 1 :] == 1).all() and weights[0] == 1


def test_padding_is_the_checkpoints(source: Path, pair: tuple[Tokenizer, Any]) -> None:
    ours = pair[0]
    pad = json.loads((source / "tokenizer_config.json").read_text())["pad_token"]
    assert ours.pad == (0 if pad == "!" else ours.eos)
    assert (ours([""]).input_ids[0, 2:] == ours.pad).all()


def test_clips_vocabulary_is_the_released_one(tmp_path: Path) -> None:
    """Ids known from the released tokenizer: "a photo of a cat" is 320 1125 539 320 2368."""
    save_runtime_tokenizer(clip(tmp_path / "tokenizer", "!"), tmp_path / "runtime")
    tokenizer = Tokenizer.load(tmp_path / "runtime")
    assert tokenizer(["a photo of a cat"]).input_ids[0, :8].tolist() == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
        0,
    ]


def test_a_megabyte_is_tokenized_in_bounded_time(pair: tuple[Tokenizer, Any]) -> None:
    start = time.perf_counter()
    assert pair[0](["z" * 2**20]).input_ids.shape == (1, 77)
    assert time.perf_counter() - start < 20


def test_no_prompts(pair: tuple[Tokenizer, Any]) -> None:
    assert pair[0]([]).input_ids.shape == (0, 77)


def test_a_lone_surrogate_is_refused(pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(RequestError, match="surrogates"):
        pair[0](["a \ud800 b"])


def test_a_shorter_length_is_kept(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 16}))
    save_runtime_tokenizer(tmp_path / "source", tmp_path / "runtime")
    assert Tokenizer.load(tmp_path / "runtime")(["the cabin " * 20]).input_ids.shape == (1, 16)


def test_a_tokenizer_that_states_no_length_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_max_length"):
        save_runtime_tokenizer(tmp_path / "source", tmp_path / "runtime")


def test_a_checkpoint_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "vocab.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match="not a CLIP tokenizer"):
        save_runtime_tokenizer(tmp_path / "source", tmp_path / "runtime")
    assert not (tmp_path / "runtime").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (SETTINGS_FILE, None),
        (SETTINGS_FILE, "{"),
        (SETTINGS_FILE, "[]"),
        (SETTINGS_FILE, '{"model_max_length": 77, "bos": 1, "eos": 2}'),
        (SETTINGS_FILE, '{"model_max_length": 77, "bos": 1, "eos": 2, "pad": true}'),
        (SETTINGS_FILE, '{"model_max_length": 77, "bos": 1, "eos": 2, "pad": -1}'),
        (SETTINGS_FILE, '{"model_max_length": 2, "bos": 1, "eos": 2, "pad": 1}'),
        (VOCABULARY_FILE, None),
        (VOCABULARY_FILE, "{}"),
        (VOCABULARY_FILE, "\udcff"),
    ],
)
def test_a_damaged_engine_tokenizer_is_refused(tmp_path: Path, file: str, content: str | None) -> None:
    save_tokenizer(tmp_path / "source")
    save_runtime_tokenizer(tmp_path / "source", tmp_path / "runtime")
    damaged = tmp_path / "runtime" / file
    damaged.unlink()
    if content is not None:
        damaged.write_text(content, "utf-8", errors="surrogateescape")
    with pytest.raises(EngineError, match=f"{file}.*export the engine again"):
        Tokenizer.load(tmp_path / "runtime")


def test_neither_transformers_nor_torch_is_imported(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "source")
    save_runtime_tokenizer(tmp_path / "source", tmp_path / "runtime")
    shutil.rmtree(tmp_path / "source")
    code = (
        "import sys; from pathlib import Path; from sdfast.tokenizer import Tokenizer; "
        "Tokenizer.load(Path(sys.argv[1]))(['the cabin']); "
        "print({'transformers', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runtime")], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
