"""The drop-ins beside the classes of the installed diffusers: the same arguments, in the same places."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import sdfast
from sdfast import drop_in
from sdfast.call import DEFAULT_STEPS
from sdfast.errors import RequestError
from sdfast.pipeline import Pipeline
from tests.fakes import FakeEngine
from tests.test_pipeline import PROMPT, assert_same, seeded, stock

KINDS = sorted(name for name in sdfast.__all__ if name.startswith("StableDiffusion"))
SUPPORTED = set(inspect.signature(Pipeline.__call__).parameters)


def defaults_of(kind: str) -> dict[str, Any]:
    """The parameters of a class of diffusers', in their order, with their defaults."""
    parameters = inspect.signature(getattr(diffusers, kind).__call__).parameters
    return {name: found.default for name, found in parameters.items() if name not in ("self", "kwargs")}


def unsupported() -> list[tuple[str, str]]:
    return [(kind, name) for kind in KINDS for name in defaults_of(kind) if name not in SUPPORTED]


def test_there_is_one_for_each_class() -> None:
    xl = ("", "XL")
    tasks = [f"{control}{over}" for control in ("", "ControlNet") for over in ("", "Img2Img", "Inpaint")]
    tasks += ["InstructPix2Pix", "PAG", "PAGImg2Img", "PAGInpaint", "ControlNetPAG"]
    both = [f"StableDiffusion{size}{task}Pipeline" for size in xl for task in tasks]
    of_one = ("ControlNetPAGInpaint", "XLControlNetPAGImg2Img")  # diffusers has no others
    assert sorted([*both, *(f"StableDiffusion{task}Pipeline" for task in of_one)]) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_the_arguments_are_diffusers_in_diffusers_order(kind: str) -> None:
    own, named = getattr(drop_in, kind), defaults_of(kind)
    assert getattr(sdfast, kind) is own
    assert own.order == tuple(named)
    told = ("strength", "guidance_scale", "controlnet_conditioning_scale", "pag_scale")
    defaults = {name: named[name] for name in told if name in named}
    if named["num_inference_steps"] != DEFAULT_STEPS:
        defaults["num_inference_steps"] = named["num_inference_steps"]
    assert own.defaults == defaults


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_call_by_places_alone_draws_what_diffusers_class_draws(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """Every argument is given in its place, most of them at diffusers' default."""
    xl = "sdxl" if "XL" in kind else "sd"
    checkpoint: Path = request.getfixturevalue(f"tiny_{xl}")
    own = getattr(drop_in, kind).from_engine(request.getfixturevalue(f"{xl}_engine"), threads=1)
    own.set_progress_bar_config(disable=True)
    reference = stock(checkpoint, kind)
    reference.scheduler = diffusers.DDIMScheduler.from_config(own.engine.scheduler_config)
    own.scheduler = reference.scheduler
    given = {
        **{"prompt": PROMPT, "negative_prompt": "mist", "num_inference_steps": 3, "output_type": "latent"},
        **{"height": 64, "width": 64, "eta": 0.5, "num_images_per_prompt": 2, "return_dict": False},
    }
    drawn = [
        call(*{**defaults_of(kind), **given, "generator": seeded(1)}.values())[0] for call in (reference, own)
    ]
    assert isinstance(drawn[1], torch.Tensor)
    assert_same(*drawn)


@pytest.mark.parametrize(("kind", "name"), unsupported())
def test_what_is_not_supported_is_refused_by_name_in_its_place(kind: str, name: str) -> None:
    own, defaults = getattr(drop_in, kind), defaults_of(kind)
    needed = dict.fromkeys(own.needs, object())
    before = [*defaults][: [*defaults].index(name)]
    places = [{**defaults, **needed}[earlier] for earlier in before]
    other = (64, 64) if defaults[name] is None else 0.25
    with pytest.raises(RequestError, match=f"^{name}: not supported by the call of sdfast; leave it out"):
        own(FakeEngine())(
            *places, other, **{need: given for need, given in needed.items() if need not in before}
        )


def test_an_argument_has_one_value() -> None:
    pipe = drop_in.StableDiffusionXLPipeline(FakeEngine())
    with pytest.raises(RequestError, match="prompt_2: given twice, by its place and by its name"):
        pipe(PROMPT, None, prompt_2="a")
    with pytest.raises(RequestError, match=r"^(\d+) positional arguments; there are (\d+)$"):
        pipe(*[None] * 60)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_not_loaded_later(kind: str) -> None:
    pipe = getattr(drop_in, kind)(FakeEngine())
    with pytest.raises(RequestError, match=r"give them to from_pretrained\(\.\.\., embeddings"):
        pipe.load_textual_inversion("org/style", token="<style>")


@pytest.mark.parametrize("kind", KINDS)
def test_loras_are_not_loaded_later(kind: str) -> None:
    pipe = getattr(drop_in, kind)(FakeEngine())
    with pytest.raises(RequestError, match=r"give them to from_pretrained\(\.\.\., loras"):
        pipe.load_lora_weights("org/style", weight_name="style.safetensors")
