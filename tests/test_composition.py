"""Prompts that are added up with AND: an evaluation of the network for each, added by its weight."""

import io
from typing import Any

import pytest
import torch
from PIL import Image

from sdfast.composition import MAX_PROMPTS, composed
from sdfast.errors import RequestError
from sdfast.export.checkpoint import resolve
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Job
from sdfast.validation.drawing import generate
from sdfast.validation.reference import reference_pipeline
from tests.fakes import FakeEngine
from tests.server.test_batcher import Ear

SIDE = 64


def request_of(prompt: str, **more: Any) -> Request:
    given = {"prompts": (prompt,), "negative_prompts": ("mist",), "height": SIDE, "width": SIDE, "seed": 3}
    return Request.make(**{**given, "emphasis": "original", "num_inference_steps": 4, **more})


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat AND a dog", [("a cat ", 1), (" a dog", 1)]),
        ("a cat :1.2AND a dog : -.5 ", [("a cat :1.2AND a dog", -0.5)]),
        ("a cat :1.2 AND a dog : -.5 ", [("a cat", 1.2), (" a dog", -0.5)]),
        ("a\ncat:2.\nAND\n(a dog:1.3)", [("a\ncat", 2), ("\n(a dog:1.3)", 1)]),
        ("a [cat:dog:0.5] AND ANDROID and 16:9", [("a [cat:dog:0.5] ", 1), (" ANDROID and 16", 9)]),
        ("a: b AND : 3", [("a: b ", 1), ("", 3)]),
        ("a :1.2.3", [("a :1.2.3", 1)]),
        ("AND", [("", 1), ("", 1)]),
    ],
)
def test_prompts_are_taken_apart_as_automatic1111_does(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert composed(prompt) == parts


def test_too_many_and_no_number_are_refused() -> None:
    assert len(composed(" AND ".join("a" * MAX_PROMPTS))) == MAX_PROMPTS
    with pytest.raises(RequestError, match="AND joins 9 prompts; at most 8"):
        composed(" AND ".join("a" * (MAX_PROMPTS + 1)))
    with pytest.raises(RequestError, match="999 is not a weight"):
        composed(f"a :{'9' * 400}")


@pytest.mark.parametrize(
    ("prompt", "fields", "reason"),
    [
        ("a AND b", {"guidance_scale": 1.0}, "AND adds prompts up, which is guidance; give a guidance_scale"),
        ("a :2", {"guidance_scale": 0.0}, "it ends in a weight, 2, which is guidance"),
        ("a AND b", {"guidance_rescale": 0.5}, "leave guidance_rescale"),
        ("a AND b", {"guidance_end": 0.5}, "guidance_end out"),
        ("a AND b", {"prompts_2": ("c",)}, "leave prompts_2 out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(prompt: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        request_of(prompt, **fields)
    assert request_of(prompt, **{**fields, "emphasis": None})  # where AND is text


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Pipeline]:
    """The stock pipeline of a checkpoint, and its engine's."""
    source = request.getfixturevalue(f"tiny_{request.param}")
    pipe = Pipeline.from_engine(request.getfixturevalue(f"{request.param}_engine"), threads=1)
    return reference_pipeline(resolve(str(source))), pipe


def added_up(stock: Any, request: Request, prompts: dict[str, float]) -> torch.Tensor:
    """The picture by diffusers' own networks and scheduler: its U-Net's output for the negative prompt, and
    what those for each prompt have beyond it, by weight and guidance."""
    unet, real = stock.unet, stock.unet.forward

    def told(text: str) -> dict[str, torch.Tensor]:
        encoded = stock.encode_prompt(
            text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"hidden": encoded[0], **({"text_embeds": encoded[2]} if len(encoded) == 4 else {})}

    several = {text: told(text) for text in prompts}

    def forward(sample: torch.Tensor, timestep: Any, **how: Any) -> tuple[torch.Tensor]:
        away = real(sample, timestep, **{**how, "return_dict": False})[0][:1]
        total = away.clone()
        for text, weight in prompts.items():
            given = dict(how, return_dict=False, encoder_hidden_states=several[text]["hidden"])
            if "text_embeds" in several[text]:
                given["added_cond_kwargs"] = {
                    "text_embeds": several[text]["text_embeds"],
                    "time_ids": how["added_cond_kwargs"]["time_ids"][1:],
                }
            total += request.guidance_scale * weight * (real(sample[1:], timestep, **given)[0] - away)
        return (torch.cat([total, total]),)  # guided from itself to itself

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "forward", forward)
        plain = request.model_copy(update={"prompts": ("",), "emphasis": None})
        images: torch.Tensor = generate(stock, plain, output_type="pt")
    return images


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


ASKS: dict[str, tuple[str, dict[str, float]]] = {
    "two": ("a boat AND a hill", {"a boat": 1.0, "a hill": 1.0}),
    "weights": ("a boat :1.4 AND a hill:-0.3 AND snow : 0.5", {"a boat": 1.4, "a hill": -0.3, "snow": 0.5}),
    "one with a weight": ("a boat :0.6", {"a boat": 0.6}),
}


@pytest.mark.parametrize("ask", ASKS)
def test_the_picture_is_what_stocks_networks_make_of_it(pair: tuple[Any, Pipeline], ask: str) -> None:
    stock, pipe = pair
    prompt, prompts = ASKS[ask]
    request = request_of(prompt, scheduler="euler_a")
    drawn = pipe.generate(request, output_type="pt").images
    assert error(drawn, added_up(stock, request, prompts)) < 1e-5
    assert (
        error(drawn, pipe.generate(request_of("a boat", scheduler="euler_a"), output_type="pt").images) > 1e-4
    )
    with pytest.raises(RequestError, match="diffusers adds no prompts up"):
        generate(stock, request)


def test_several_prompts_of_a_call_are_drawn_as_each_alone(sd_engine: Any) -> None:
    """One prompt, three, and two that change between steps, on a U-Net that takes two rows at a time."""
    pipe = Pipeline.from_engine(sd_engine, threads=1)
    prompts = ("a boat", "a hill AND snow :0.4 AND mist", "a [boat:hill:2] AND dusk")
    more = {"negative_prompts": ("", "fog", "rain"), "prompt_editing": True, "long_prompts": "chunk"}
    whole = request_of("", **{**more, "prompts": prompts})
    together = pipe.generate(whole, output_type="pt").images
    for i, image in enumerate(together):
        torch.testing.assert_close(
            image, pipe.generate(whole.alone(i), output_type="pt").images[0], rtol=0, atol=1e-5
        )


def test_a_server_draws_it_beside_others() -> None:
    batcher, small = Batcher(FakeEngine(), max_rows=4), {"height": 16, "width": 16}
    try:
        prompts = {"a AND b": 5, "a": 9, "a AND b AND c": 3}
        asked = [request_of(prompt, num_inference_steps=n, **small) for prompt, n in prompts.items()]
        ears = [Ear() for _ in asked]
        for i, (one, ear) in enumerate(zip(asked, ears, strict=True)):
            batcher.submit(Job(str(i), "fake", one), ear)
        for one, ear in zip(asked, ears, strict=True):
            drawn = Image.open(io.BytesIO(ear.done().pngs[0]))
            assert drawn.tobytes() == Pipeline(FakeEngine()).generate(one).images[0].tobytes()
    finally:
        assert batcher.close(drain=False, timeout=20)


def test_a_checkpoint_that_is_told_the_guidance_refuses_it() -> None:
    engine = FakeEngine()
    model = engine.manifest.model.model_copy(update={"guidance_embedding": 8})
    engine.manifest = engine.manifest.model_copy(update={"model": model})
    with pytest.raises(RequestError, match="LCM"):
        Pipeline(engine).generate(request_of("a AND b", guidance_scale=8.0, height=16, width=16))
