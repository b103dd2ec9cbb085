"""Long prompts and emphasis, beside stock diffusers that is given embeddings in their place."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdfast.errors import RequestError
from sdfast.export.checkpoint import resolve
from sdfast.infotext import infotext_of
from sdfast.manifest import CHUNK
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.validation.drawing import generate
from sdfast.validation.reference import reference_pipeline
from tests.fakes import FakeEngine
from tests.sealing import reseal

LONG = "a cabin in the misty mountains, the sea and a boat, " * 4  # 96 tokens
ASKS: dict[str, dict[str, Any]] = {
    "long": {"prompts": (LONG,), "long_prompts": "chunk"},
    "both long, not alike": {
        "prompts": (LONG,),
        "negative_prompts": (LONG * 2,),
        "long_prompts": "chunk",
        "clip_skip": 1,
    },
    "two prompts, two pictures each": {
        "prompts": (LONG, "the (sea:1.4), a [boat]"),
        "negative_prompts": ("style", None),
        "long_prompts": "chunk",
        "emphasis": "original",
        "num_images_per_prompt": 2,
    },
    "emphasis alone": {"prompts": ("a ((cabin)) in the (sea:0.3)",), "emphasis": "original"},
    "cut, with emphasis": {"prompts": (f"(the sea:1.5), {LONG}",), "emphasis": "no_norm"},
    "broken": {
        "prompts": ("a (cabin:1.3) BREAK the sea BREAK",),
        "negative_prompts": ("BREAK BREAK mist",),
        "long_prompts": "chunk",
        "emphasis": "no_norm",
    },
    "brackets ignored": {"prompts": ("a (cabin:1.8)",), "emphasis": "ignore"},
}


def request_of(ask: dict[str, Any], **more: Any) -> Request:
    given = {"height": 64, "width": 64, "num_inference_steps": 3, "seed": 3, **ask, **more}
    given.setdefault("negative_prompts", (None,) * len(given["prompts"]))
    return Request.make(**given)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Pipeline]:
    """The stock pipeline of a checkpoint, and its engine's."""
    source = request.getfixturevalue(f"tiny_{request.param}")
    pipe = Pipeline.from_engine(request.getfixturevalue(f"{request.param}_engine"), threads=1)
    return reference_pipeline(resolve(str(source))), pipe


def drawn(pipe: Pipeline, request: Request) -> torch.Tensor:
    images: torch.Tensor = pipe.generate(request, output_type="pt").images
    return images


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


SECOND: dict[str, dict[str, Any]] = {
    "another prompt for the second encoder": {"prompts_2": (LONG,), "negative_prompts_2": ("the (sea:1.2)",)},
    "and one that is shorter": {"prompts": (LONG,), "prompts_2": ("a boat",)},
}


@pytest.mark.parametrize("ask", SECOND)
def test_second_prompts_are_read_in_as_many_chunks(tiny_sdxl: Path, sdxl_engine: Path, ask: str) -> None:
    stock, pipe = reference_pipeline(resolve(str(tiny_sdxl))), Pipeline.from_engine(sdxl_engine, threads=1)
    texts = {"prompts": ("a (cabin:1.4)",), "negative_prompts": ("mist",), **SECOND[ask]}
    request = request_of(texts, long_prompts="chunk", emphasis="original")
    assert error(drawn(pipe, request), generate(stock, request, output_type="pt")) < 1e-5


@pytest.mark.parametrize("ask", ASKS)
def test_pictures_are_those_of_stock_diffusers(pair: tuple[Any, Pipeline], ask: str) -> None:
    stock, pipe = pair
    request = request_of(ASKS[ask])
    expected = generate(stock, request, output_type="pt")
    assert error(drawn(pipe, request), expected) < 1e-5


def test_what_is_asked_for_matters(pair: tuple[Any, Pipeline]) -> None:
    """Each of these draws another picture: none of the options is ignored."""
    pipe, weighed = pair[1], f"a (cabin:4) in the sea, {LONG}"
    asks: list[dict[str, Any]] = [
        {},
        {"long_prompts": "chunk"},
        {"emphasis": "original"},
        {"emphasis": "original", "long_prompts": "chunk"},
        {"emphasis": "no_norm", "long_prompts": "chunk"},
        {"emphasis": "ignore", "long_prompts": "chunk"},
    ]
    pictures = [drawn(pipe, request_of({"prompts": (weighed,)}, **ask)) for ask in asks]
    for i, picture in enumerate(pictures):
        for other in pictures[:i]:
            assert error(picture, other) > 3e-4


def test_short_prompts_are_the_same_in_chunks(pair: tuple[Any, Pipeline]) -> None:
    pipe, ask = pair[1], {"prompts": ("a cabin",), "negative_prompts": ("mist",)}
    plain = drawn(pipe, request_of(ask))
    assert torch.equal(plain, drawn(pipe, request_of(ask, long_prompts="chunk", emphasis="original")))


def test_an_onnx_engine_draws_them(flat_sd: Path, flat_onnx: Path) -> None:
    stock, pipe = reference_pipeline(resolve(str(flat_sd))), Pipeline.from_engine(flat_onnx, threads=1)
    request = request_of(ASKS["both long, not alike"], height=16, width=16)
    assert error(drawn(pipe, request), generate(stock, request, output_type="pt")) < 1e-5


def test_embeddings_of_any_length(pair: tuple[Any, Pipeline]) -> None:
    stock, pipe = pair
    width, pooled = pipe.engine.manifest.model.text_width, pipe.engine.manifest.model.pooled_width
    draw = torch.Generator().manual_seed(1)
    given = {
        name: torch.randn(1, 100, width, generator=draw)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    if pooled:
        given |= {
            name: torch.randn(1, pooled, generator=draw)
            for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        }
    call = {"num_inference_steps": 2, "output_type": "pt", **given}
    expected = stock(generator=torch.Generator().manual_seed(0), **call).images
    actual = pipe(generator=torch.Generator().manual_seed(0), **call).images
    assert error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        ({"prompts": (LONG * 12,)}, r"a prompt is 1232 tokens long, .*this engine takes 924; shorten it"),
        (
            {"prompts": (LONG * 3,), "negative_prompts": (LONG * 5,)},
            r"prompts of 308 and 539 tokens, .*no common multiple up to 924",
        ),
        (
            {"prompts": ("a BREAK b",), "emphasis": "original", "long_prompts": "truncate"},
            "BREAK begins part 2 of 2, and long_prompts is 'truncate'; ask for 'chunk'",
        ),
    ],
)
def test_what_is_too_long_is_refused(sd_engine: Path, ask: dict[str, Any], reason: str) -> None:
    pipe, request = (
        Pipeline.from_engine(sd_engine, threads=1),
        request_of(ask, **{"long_prompts": "chunk", **ask}),
    )
    for refused in (lambda: pipe.prompts.check(request), lambda: pipe.generate(request)):
        with pytest.raises(RequestError, match=reason):
            refused()


def test_older_engines_take_one_chunk(sd_engine: Path, tmp_path: Path) -> None:
    import shutil

    old = Path(shutil.copytree(sd_engine, tmp_path / "old"))

    def forget(document: dict[str, Any]) -> None:
        for form in document["modules"]["unet"]["variants"]:
            assert form.pop("tokens") == {"low": CHUNK, "high": 12 * CHUNK}

    reseal(old, forget)
    pipe = Pipeline.from_engine(old, threads=1)
    drawn(pipe, request_of({"prompts": ("a cabin",)}, long_prompts="chunk"))
    with pytest.raises(
        RequestError, match=r"a prompt is 154 tokens long, .*takes 77; .*export the engine again"
    ):
        drawn(pipe, request_of({"prompts": (LONG,)}, long_prompts="chunk"))
    pipe.prompts.check(request_of({"prompts": ("a",), "negative_prompts": (LONG,)}, guidance_scale=1.0))
    with pytest.raises(RequestError, match="a prompt is 100 tokens long"):
        pipe(prompt_embeds=torch.zeros(1, 100, pipe.engine.manifest.model.text_width))


def test_tokens_are_counted_as_they_are_read(sd_engine: Path) -> None:
    pipe = Pipeline.from_engine(sd_engine, threads=1)
    whole = pipe.prompts.count(request_of({"prompts": (LONG,)}, long_prompts="chunk"))
    assert pipe.prompts.count(request_of({"prompts": (LONG,)})) == 75 < whole
    asked = request_of({"prompts": (f"({LONG}:1.2)",)}, long_prompts="chunk", emphasis="ignore")
    assert pipe.prompts.count(asked) == whole


def test_the_parameters_say_how_prompts_were_read() -> None:
    pipe = Pipeline(FakeEngine())
    ask = {"prompts": ("a",), "height": 16, "width": 16}

    def extra(**more: Any) -> dict[str, str]:
        request = request_of(ask, **more)
        text = infotext_of(request, pipe.schedule_of(request), 0, model="m", weights={})
        return dict(text.extra)

    assert extra() == {}
    assert extra(emphasis="no_norm", long_prompts="chunk") == {"Emphasis": "No norm", "Long prompts": "chunk"}
    sizes = {"target_size": (512, 768), "crops_coords_top_left": (0, 8)}
    assert extra(prompts_2=("the sea, a boat",), **sizes) == {
        "Prompt 2": "the sea, a boat",
        "Crops coords top left": "8x0",
        "Target size": "768x512",
    }
