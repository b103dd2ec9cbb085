"""Embeddings in prompts: read as stock diffusers reads them, and drawn as it draws them."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdfast.emphasis import Piece
from sdfast.errors import EngineError
from sdfast.export.additions import as_made
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.recipe import Recipe
from sdfast.manifest import read_manifest
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.studio import info_of
from sdfast.tokenizer import SETTINGS_FILE, VOCABULARY_FILE, Tokenizer
from sdfast.validation.drawing import generate
from sdfast.validation.modules import token_ids
from sdfast.validation.reading import _chunks
from sdfast.validation.reference import reference_pipeline
from tests.conftest import FLAT_SIZES
from tests.export.embeddings import automatic1111, for_family
from tests.test_long_prompts import error, request_of

TOKENS = {"EasyNegative": 5, "<cat-toy>": 1, "zq-style": 20}
FILES = {"EasyNegative": "EasyNegative", "<cat-toy>": "one", "zq-style": "zq-style"}
LONG = "a cabin in the misty mountains, the sea and a boat, " * 3  # 72 tokens


def settings(folder: Path, family: str) -> list[dict[str, Any]]:
    """An embedding for each of `TOKENS`."""
    return [
        {
            "source": for_family(family, folder / f"{FILES[token]}.safetensors", count, seed=i),
            "token": token,
        }
        for i, (token, count) in enumerate(TOKENS.items())
    ]


@dataclass(frozen=True)
class Pair:
    """The stock pipeline of a checkpoint with embeddings, and its engine's."""

    stock: Any
    own: Pipeline

    def compare(self, request: Request) -> float:
        own = self.own.generate(request, output_type="pt").images
        return error(own, generate(self.stock, request, output_type="pt"))


def paired(checkpoint: Path, engine: Path) -> Pair:
    stock = reference_pipeline(as_made(resolve(checkpoint), read_manifest(engine)))
    return Pair(stock, Pipeline.from_engine(engine, threads=1))


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    checkpoint = request.getfixturevalue(f"tiny_{request.param}")
    folder = tmp_path_factory.mktemp("embeddings")
    recipe = Recipe.make(backend="eager", embeddings=settings(folder, request.param))
    return paired(checkpoint, export(checkpoint, folder / "engine", recipe))


def random_text(chance: random.Random, *, small: bool) -> str:
    """With tokens in it, alone, in words, side by side; without what diffusers takes apart or names a vector
    by: a token with a number behind it."""
    parts = [*TOKENS, "easy", "negative", "<cat", "-toy>", "zq", "style", " the", " cabin", "misty"]
    parts += [",", " ", "  ", ".", "\n", "!", "é", "(", ")", "x", "山"]
    text = "".join(chance.choices(parts, k=chance.randrange(40)))
    return text.lower() if small else "".join(chance.choice([c, c.upper()]) for c in text)


def test_ids_of_random_prompts_are_those_of_stock(pair: Pair) -> None:
    """In small letters by diffusers' own code alone, given what the user wrote."""
    chance = random.Random(0)
    small = [random_text(chance, small=True) for _ in range(150)]
    large = [random_text(chance, small=False) for _ in range(50)]
    for index, tokenizer in enumerate(pair.own.engine.tokenizers):
        stock = getattr(pair.stock, ("tokenizer", "tokenizer_2")[index])
        options = {"padding": "max_length", "truncation": True, "max_length": 77}
        ids = stock(pair.stock.maybe_convert_prompt(small, stock), **options).input_ids
        assert tokenizer(small).input_ids.tolist() == ids
        assert tokenizer(large).input_ids.tolist() == token_ids(pair.stock, index, large).tolist()
        assert sum(id > tokenizer.eos for row in ids for id in row) > 1000


@pytest.mark.parametrize(
    "text",
    ["EasyNegative", "easynegative", "(EASYNEGATIVE)", "xEasyNegativex", "EasyNegative,EasyNegative\n"],
)
def test_a_token_is_found_wherever_and_however_it_stands(pair: Pair, text: str) -> None:
    tokenizer = pair.own.engine.tokenizers[0]
    first = tokenizer.bpe.token_to_id("EasyNegative")
    ids = [id for id in tokenizer([text]).input_ids[0].tolist() if id > tokenizer.eos]
    assert ids == [*range(first, first + 5)] * text.lower().count("easynegative")


ASKS: dict[str, dict[str, Any]] = {
    "in both prompts": {
        "prompts": ("a <cat-toy> in the sea, zq-style",),
        "negative_prompts": ("EasyNegative, mist",),
    },
    "cut in the midst of the vectors": {"prompts": (f"{LONG}EasyNegative",)},
    "with emphasis": {
        "prompts": ("a (<cat-toy>:1.4), ((zq-style, the sea))",),
        "negative_prompts": ("[EasyNegative]",),
        "emphasis": "original",
    },
    "in chunks": {
        "prompts": (f"{LONG}(easynegative:1.2), {LONG}zq-style",),
        "negative_prompts": ("EasyNegative",),
        "emphasis": "no_norm",
        "long_prompts": "chunk",
    },
}


@pytest.mark.parametrize("ask", ASKS)
def test_pictures_are_those_of_stock(pair: Pair, ask: str) -> None:
    assert pair.compare(request_of(ASKS[ask])) < 1e-5


@pytest.mark.parametrize("pair", ["sdxl"], indirect=True)
def test_a_second_prompt_has_them_too(pair: Pair) -> None:
    asked = {"prompts": ("a boat",), "prompts_2": ("EasyNegative",), "negative_prompts_2": ("zq-style",)}
    assert pair.compare(request_of({**asked, "negative_prompts": ("mist",)})) < 1e-5


@pytest.mark.parametrize("pair", ["sd"], indirect=True)
def test_every_token_draws_another_picture(pair: Pair) -> None:
    texts = ["a boat", "a boat easy", *(f"a boat {token}" for token in TOKENS)]
    pictures = [
        pair.own.generate(request_of({"prompts": (text,)}), output_type="pt").images for text in texts
    ]
    for i, picture in enumerate(pictures):
        assert all(error(picture, other) > 1e-4 for other in pictures[:i])


def test_a_server_is_told_of_them(pair: Pair) -> None:
    manifest = pair.own.engine.manifest
    told = info_of(manifest)
    assert told.embeddings == TOKENS
    assert told.text_width == {"sd": 32, "sdxl": 32 + 48}[manifest.model.family]


def test_vectors_count_as_tokens_and_what_was_cut_is_told(pair: Pair) -> None:
    prompts, tokenizer = pair.own.prompts, pair.own.engine.tokenizers[0]
    assert prompts.count(request_of({"prompts": ("zq-style, a boat",)})) == 20 + 3
    cut = tokenizer([f"{'x ' * 72}EasyNegative, a boat"])
    assert cut.truncated == ("EasyNegative, a boat",)  # of which three vectors are read
    assert [id > tokenizer.eos for id in cut.input_ids[0, 72:77]] == [False, True, True, True, False]


def test_emphasis_weighs_every_vector(pair: Pair) -> None:
    chunks = pair.own.engine.tokenizers[0].cut([Piece("a"), Piece("EasyNegative", 1.3), Piece("boat", 0.5)])
    assert chunks.weights[0, :7].tolist() == pytest.approx([1, 1, *[1.3] * 5])


def test_vectors_stay_in_one_chunk(pair: Pair) -> None:
    """As with AUTOMATIC1111: the next one begins with them, whatever comma stood before."""
    ours = pair.own.engine.tokenizers[0]

    def lengths(text: str) -> list[int]:
        chunks = ours.chunks([[Piece(text)]])
        return [row.tolist().index(ours.eos) - 1 for row in chunks.input_ids]

    assert lengths("x " * 55 + "zq-style") == [75] and lengths("x " * 56 + "zq-style") == [56, 20]
    assert lengths("x " * 60 + ", " + "x " * 9 + "zq-style x") == [70, 21]
    assert lengths("x " * 60 + ", " + "x " * 14 + "zq-style") == [61, 34]  # that chunk is full without them
    assert lengths("x " * 56 + ", " + "x " * 18 + "zq-style " * 4) == [57, 18 + 2 * 20, 2 * 20]


def test_chunks_of_random_text_are_those_of_the_reference(pair: Pair) -> None:
    chance = random.Random(2)
    ours, stock = pair.own.engine.tokenizers[0], pair.stock.tokenizer
    words = ["the", "cabin", ",", "misty!", "x", *TOKENS]
    for _ in range(60):
        text = chance.choices(words, [4, 4, chance.choice([0.3, 3]), 1, 1, 1, 1, 0.3], k=150)
        cut = chance.randrange(150)
        parts = [[Piece(" ".join(text[:cut]), 1.5), Piece(" ".join(text[cut:]))], [Piece("zq-style", 0.5)]]
        chunks, expected = ours.chunks(parts), _chunks(stock, parts, chunked=True)
        for ids, weights, chunk in zip(chunks.input_ids, chunks.weights, expected, strict=True):
            assert ids[1 : len(chunk) + 2].tolist() == [*(id for id, _ in chunk), ours.eos]
            assert weights[1 : len(chunk) + 1].tolist() == [weight for _, weight in chunk]


def test_an_old_config_pools_sdxls_prompt_where_stock_does(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Released SDXL checkpoints name 2 as the end of a prompt; transformers then takes the largest id for it,
    which is a vector's."""
    checkpoint = Path(shutil.copytree(tiny_sdxl, tmp_path / "checkpoint"))
    path = checkpoint / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 2}))
    recipe = Recipe.make(backend="eager", embeddings=settings(tmp_path, "sdxl"))
    pair = paired(checkpoint, export(checkpoint, tmp_path / "engine", recipe))
    assert pair.compare(request_of(ASKS["in both prompts"])) < 1e-5


def test_an_onnx_engine_has_them(flat_sd: Path, flat_onnx: Path, tmp_path: Path) -> None:
    engine, embeddings = Path(shutil.copytree(flat_onnx, tmp_path / "engine")), settings(tmp_path, "sd")
    export(flat_sd, engine, Recipe.make(sizes=FLAT_SIZES, batch=2, embeddings=embeddings))
    assert (engine / "unet.onnx").stat().st_mtime == (flat_onnx / "unet.onnx").stat().st_mtime
    asked = request_of({**ASKS["in both prompts"], "height": 16, "width": 16})
    assert paired(flat_sd, engine).compare(asked) < 1e-5


@pytest.mark.parametrize(
    ("file", "embeddings"),
    [
        (SETTINGS_FILE, ["zq"]),
        (SETTINGS_FILE, {"zq": 0}),
        (SETTINGS_FILE, {"zq": 76}),
        (SETTINGS_FILE, {"zq": True}),
        (SETTINGS_FILE, {"zq": "2"}),
        (VOCABULARY_FILE, {"other": 2}),
    ],
)
def test_a_damaged_tokenizer_is_refused(tiny_sd: Path, tmp_path: Path, file: str, embeddings: Any) -> None:
    from sdfast.export.tokenizer import save_runtime_tokenizer

    automatic1111(tmp_path / "zq.safetensors", 2)
    save_runtime_tokenizer(tiny_sd / "tokenizer", tmp_path, {"zq": 2})
    assert Tokenizer.load(tmp_path).vectors
    path = tmp_path / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "embeddings": embeddings}))
    with pytest.raises(EngineError, match=rf"{file}.*export the engine again"):
        Tokenizer.load(tmp_path)
