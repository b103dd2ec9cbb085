"""Prompts that change between steps: how they are read, and pictures beside stock diffusers'."""

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdfast import infotext
from sdfast.cli import main
from sdfast.editing import MAX_TEXTS, Editing, changes
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.loop import Rows
from sdfast.manifest import Span
from sdfast.pipeline import Pipeline
from sdfast.request import Hires, Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Job
from tests.fakes import FakeEngine
from tests.server.test_batcher import Ear
from tests.test_image_to_image import image, stock
from tests.test_pipeline import assert_same, ours, seeded


def by_step(prompt: str, steps: int = 10, done: int | None = None, before: int | None = None) -> list[str]:
    """The text at each evaluation."""
    done = steps if done is None else done
    found = dict(Editing(steps, done, before).texts(prompt))
    assert list(found) == sorted(found) and 0 in found and max(found) < done
    texts, now = [], ""
    for k in range(done):
        now = found.get(k, now)
        texts.append(now)
    return texts


def of(*stretches: tuple[int, str]) -> list[str]:
    return [text for count, text in stretches for _ in range(count)]


# What AUTOMATIC1111 makes of them in 10 steps. A change after step n comes in the evaluation after n + 1.
READ = {
    "test": of((10, "test")),
    "a [b:3]": of((4, "a "), (6, "a b")),
    "a [b: 3 ]": of((4, "a "), (6, "a b")),
    "a [b::3]": of((4, "a b"), (6, "a ")),
    "a [[[b]]:2]": of((3, "a "), (7, "a [[b]]")),
    "[(a:2):3]": of((4, ""), (6, "(a:2)")),
    "a [b : c : 1] d": of((2, "a b  d"), (8, "a  c  d")),
    "a[b:[c:d:2]:1]e": of((2, "abe"), (1, "ace"), (7, "ade")),
    "a [unbalanced": of((10, "a [unbalanced")),
    "a [b:.5] c": of((6, "a  c"), (4, "a b c")),
    "a [b:1.0] c": of((10, "a  c")),
    "a [b:0] c": of((10, "a b c")),
    "a [b:-3] c": of((10, "a b c")),
    "a [b:1e0] c": of((2, "a  c"), (8, "a b c")),
    "a [b:99] c": of((10, "a  c")),
    "((a][:b:c [d:3]": of((4, "((a][:b:c "), (6, "((a][:b:c d")),
    "[fe|]male": ["female", "female", "male", "female", "male", "female", "male", "female", "male", "female"],
    "[a|(b:1.1)|[c:d:5]]": ["a", "a", "(b:1.1)", "c", "a", "(b:1.1)", "d", "a", "(b:1.1)", "d"],
    "(a [b:c:4]:1.2)": of((5, "(a b:1.2)"), (5, "(a c:1.2)")),
    r"a \\[b:c:3\\] [d:3]": of((4, r"a \\[b:c:3\\] "), (6, r"a \\[b:c:3\\] d")),
    "a: [b:c:d:3] e": of((10, "a: [b:c:d:3] e")),
    "[a:b:c]": of((10, "[a:b:c]")),
    "[a|b:3] [c:2]": of((10, "[a|b:3] [c:2]")),  # a | out of place
    "a | b [c:2]": of((10, "a | b [c:2]")),
    "[c:2] \\\\": of((3, " \\\\"), (7, "c \\\\")),
    "[c:2] \\": of((10, "[c:2] \\")),  # a backslash before nothing
    "(a|b) [c:2]": of((10, "(a|b) [c:2]")),
    "(a:b:c) [c:2]": of((3, "(a:b:c) "), (7, "(a:b:c) c")),
    "(a:b) []()": of((10, "(a:b) []()")),
}


@pytest.mark.parametrize("prompt", READ)
def test_prompts_are_read_as_automatic1111_reads_them(prompt: str) -> None:
    assert by_step(prompt) == READ[prompt]
    assert changes(prompt) == (len(set(READ[prompt])) > 1 or prompt.startswith(("a [b:",)))


def test_a_second_pass_goes_on_counting() -> None:
    """`before` steps of the first pass: 1.5 is the middle of the second, 15 its fifth step after 10."""
    assert by_step("a [b:.5] c", 10, before=10) == of((10, "a b c"))
    assert by_step("a [b:1.5] c", 10, before=10) == of((6, "a  c"), (4, "a b c"))
    assert by_step("a [b:15] c", 8, before=10) == of((6, "a  c"), (2, "a b c"))


def test_what_is_not_done_is_not_read() -> None:
    assert by_step("[a:b:3]", 10, done=4) == of((4, "a"))
    assert by_step("[a|b]", 10, done=3) == ["a", "a", "b"]


def test_too_many_texts_are_refused() -> None:
    several = "|".join(str(i) for i in range(MAX_TEXTS + 1))
    with pytest.raises(RequestError, match=f"into {MAX_TEXTS + 1} different texts; at most {MAX_TEXTS}"):
        Editing(50, 50).texts(f"[{several}]")
    with pytest.raises(RequestError, match="prompt: 101 brackets change it between steps; at most 100 may"):
        Editing(50, 50).texts("[a:b:1]" * 101)
    assert by_step("[a:b:1]" * 100)[-1] == "b" * 100
    assert len(set(by_step(f"[{several}]", MAX_TEXTS, done=MAX_TEXTS))) == MAX_TEXTS - 1


def test_deep_brackets_are_read_too() -> None:
    deep = 5_000
    assert by_step("(" * deep + "[a:2]" + ")" * deep, 4)[-1] == "(" * deep + "a" + ")" * deep
    assert by_step("[" * 100 + "a" + ":0]" * 100, 4)[-1] == "a"
    assert by_step("[" * deep, 4)[-1] == "[" * deep


PROMPT, NEGATIVE = "a [boat:house:2] in [mist|rain]", "[snow::1]"
# At each of four steps, as above.
POSITIVES = ["a boat in mist", "a boat in mist", "a boat in rain", "a house in mist"]
NEGATIVES = ["snow", "snow", "", ""]


@pytest.fixture(scope="module")
def pair(shallow_sd: Path, shallow_engine: Path) -> tuple[Any, Pipeline]:
    return stock(shallow_sd, "StableDiffusionPipeline"), ours(shallow_engine)


@pytest.fixture(scope="module")
def xl_pair(tiny_sdxl: Path, sdxl_engine: Path) -> tuple[Any, Pipeline]:
    return stock(tiny_sdxl, "StableDiffusionXLPipeline"), ours(sdxl_engine)


def switching(pipe: Any, positives: list[str], negatives: list[str], **call: Any) -> torch.Tensor:
    """Latents of stock diffusers whose embeddings a callback changes after each step."""
    sdxl = hasattr(pipe, "text_encoder_2")
    with torch.no_grad():
        encoded = [
            pipe.encode_prompt(
                prompt=positive,
                negative_prompt=negative,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
            for positive, negative in zip(positives, negatives, strict=True)
        ]
    names = ["prompt_embeds", *(["add_text_embeds"] if sdxl else [])]

    def switch(_: Any, step: int, __: Any, told: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step + 1 == len(encoded):
            return {}
        now = encoded[step + 1]
        embeds = {"prompt_embeds": torch.cat([now[1], now[0]])}
        return embeds | ({"add_text_embeds": torch.cat([now[3], now[2]])} if sdxl else {})

    first = {"prompt_embeds": encoded[0][0], "negative_prompt_embeds": encoded[0][1]}
    if sdxl:
        first |= {"pooled_prompt_embeds": encoded[0][2], "negative_pooled_prompt_embeds": encoded[0][3]}
    found: torch.Tensor = pipe(
        **first,
        callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["latents", *names],
        output_type="latent",
        **call,
    ).images
    return found


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_it_is_what_stock_diffusers_draws_with_changing_embeddings(
    pair: tuple[Any, Pipeline], scheduler: str
) -> None:
    reference, pipe = pair
    chosen = getattr(diffusers, scheduler).from_config(pipe.engine.scheduler_config)
    reference.scheduler = pipe.scheduler = chosen
    call = {"num_inference_steps": 4, "height": 16, "width": 16}
    expected = switching(reference, POSITIVES, NEGATIVES, generator=seeded(3), **call)
    call |= {"negative_prompt": NEGATIVE, "prompt_editing": True, "output_type": "latent"}
    assert_same(expected, pipe(PROMPT, seed=3, **call).images)
    both = pipe([PROMPT, "a boat"], seed=3, **call).images  # beside one that does not change
    assert_same(expected, both[:1])


def test_two_evaluations_a_step_both_count(pair: tuple[Any, Pipeline]) -> None:
    """Heun in three steps: six evaluations count, of which five are done; .5 is after the third."""
    reference, pipe = pair
    reference.scheduler = pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(
        pipe.engine.scheduler_config
    )
    texts = ["a boat"] * 4 + ["a house"]
    call = {"num_inference_steps": 3, "height": 16, "width": 16}
    expected = switching(reference, texts, [""] * 5, generator=seeded(3), **call)
    call |= {"prompt_editing": True, "output_type": "latent"}
    assert_same(expected, pipe("a [boat:house:.5]", seed=3, **call).images)


def test_sdxl_is_told_of_each_text_as_a_whole_too(xl_pair: tuple[Any, Pipeline]) -> None:
    reference, pipe = xl_pair
    reference.scheduler = pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.engine.scheduler_config)
    call = {"num_inference_steps": 4, "height": 64, "width": 64}
    expected = switching(reference, POSITIVES, NEGATIVES, generator=seeded(3), **call)
    call |= {"negative_prompt": NEGATIVE, "prompt_editing": True, "output_type": "latent"}
    assert_same(expected, pipe(PROMPT, seed=3, **call).images)


def test_over_an_image_the_first_step_that_is_done_is_the_first(pair: tuple[Any, Pipeline]) -> None:
    """Of ten steps five are done: a change after half of all is after six of them, which never comes."""
    pipe = pair[1]
    pipe.scheduler = "ddim"
    call = {"image": image(width=16, height=16), "strength": 0.5, "num_inference_steps": 10, "seed": 1}
    call |= {"output_type": "latent", "prompt_editing": True}
    first, second = (pipe(f"a {word}", **call).images for word in ("boat", "house"))
    assert torch.equal(pipe("a [boat:house:.5]", **call).images, first)
    early = pipe("a [boat:house:.3]", **call).images
    assert not torch.equal(early, first) and not torch.equal(early, second)


def fake(**options: Any) -> Pipeline:
    pipe = Pipeline(FakeEngine(**options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(prompt: str, **fields: Any) -> Request:
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "seed": 1, "prompt_editing": True, **fields}
    return Request.make(prompts=(prompt,), **{"negative_prompts": (None,), **given})


def test_texts_of_other_lengths_are_made_alike() -> None:
    """Of one chunk and of three: all are told as three."""
    asked = request("[a:" + "b" * 20 + ":2]", long_prompts="chunk", negative_prompts=("c" * 9,))
    row = fake().prepare(asked).rows[0]
    assert {len(row.positive.context), *(len(one) for one in row.positive.later.values())} == {48}
    assert list(row.positive.later) == [3] and row.negative is not None and row.negative.later == {}
    assert len(row.negative.context) == 48


def test_a_row_that_leaves_goes_on_with_its_text() -> None:
    """And so does one that joins others, or whose guidance ends on the way."""
    pipe, texts = fake(), "[a:b:0][c:d:1][e:f:2]"
    for end in (1.0, 0.7):
        asked = request(texts, guidance_end=end, num_inference_steps=6)
        [row], [again] = (pipe.prepare(asked).rows for _ in range(2))
        assert list(row.positive.later) == [2, 3]
        other = pipe.prepare(request("g", seed=2, num_inference_steps=6)).rows[0]
        alone, moved = Rows(pipe.engine, [row], 16, 16), Rows(pipe.engine, [again], 16, 16)
        for step in range(6):
            alone.tick()
            if step == 1:
                moved.change(joining=[other])
            elif step == 5:
                member = moved.member(again)
                moved.change(leaving=[again])
                moved.change(joining=[member])
            moved.tick()
        assert torch.equal(alone.latents_of(row), moved.latents_of(again))


def test_nothing_is_encoded_again_when_a_text_comes_back() -> None:
    pipe = fake()
    pipe.generate(request("[a|b]", num_inference_steps=9, guidance_scale=1.0))
    assert sum(pipe.engine.calls["text_encoder"]) == 2  # type: ignore[attr-defined]


def test_jobs_with_changing_prompts_are_the_pipelines_pictures() -> None:
    sizes = tuple((Span.exactly(side), Span.exactly(side)) for side in (16, 32))
    hires = Hires(height=32, width=32)
    asked = [
        request("[a|bb] c", negative_prompts=("[d::1]",)),
        request("a [b:c:1.5]", hires=hires, seed=2),
        request("a [b:c:.5]", hires=hires, seed=2),
        request("abc", seed=3),
    ]
    batcher, ears = Batcher(FakeEngine(sizes=sizes), max_rows=3), [Ear() for _ in asked]
    try:
        for i, one in enumerate(asked):
            batcher.submit(Job(str(i), "fake", one), ears[i])
        pipe = fake(sizes=sizes)
        for one, ear in zip(asked, ears, strict=True):
            due = np.asarray(pipe.generate(one).images[0])
            assert (np.asarray(Image.open(io.BytesIO(ear.done().pngs[0]))) == due).all()
        assert ears[1].done().pngs != ears[2].done().pngs
        assert ears[0].done().tokens == 3 + 4 + 1  # each text once, and the empty one
        with pytest.raises(RequestError, match="different texts"):
            batcher.submit(
                Job("5", "fake", request("[" + "|".join(map(str, range(99))) + "]", num_inference_steps=60)),
                Ear(),
            )
    finally:
        assert batcher.close(drain=False, timeout=20)


def test_what_is_left_in_brackets_is_read_as_emphasis_says() -> None:
    pipe = fake()
    with pytest.raises(RequestError, match="changes the prompt between steps"):
        pipe.generate(request("a [b:c:2]", emphasis="original", prompt_editing=False))
    with pytest.raises(RequestError, match="takes turns"):
        pipe.generate(request("a [b|c]", emphasis="original", prompt_editing=False))
    for prompt in ("a [b:c:2] (d:1.2)", "a | b [c:2]", "[a|b:3]", "[a|b]"):
        assert pipe.generate(request(prompt, emphasis="original", long_prompts="chunk")).images


def test_the_command_line_reads_it_when_asked(
    shallow_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Engine.open(shallow_engine, threads=1)
    monkeypatch.setattr(Engine, "open", lambda *_, **__: opened)
    drawn = []
    for i, (prompt, given) in enumerate(
        [("a [boat:house:0]", ["--prompt-editing"]), ("a house", []), ("a [boat:house:0]", [])]
    ):
        file = tmp_path / f"{i}.png"
        line = ["generate", prompt, "--engine", str(shallow_engine), "--steps", "2", "--seed", "1"]
        result = CliRunner().invoke(main, [*line, "-o", str(file), *given])
        assert result.exit_code == 0, result.output
        drawn.append(Image.open(file).tobytes())
    assert drawn[0] == drawn[1] != drawn[2]
    stock_too = [*line, "-o", str(file), "--overwrite", "--backend", "diffusers", "--prompt-editing"]
    monkeypatch.undo()
    result = CliRunner().invoke(main, stock_too)
    assert result.exit_code == 1 and "diffusers has none" in result.output


def test_the_parameters_tell_of_it() -> None:
    for prompt, told in (("a [b:2]", True), ("a [b]", False), ("a", False)):
        asked = request(prompt)
        text = infotext.infotext_of(asked, fake().schedule_of(asked), 0, model="m", weights={})
        assert ("Prompt editing" in text.extra) == told
