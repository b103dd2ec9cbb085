"""Requests: everything that can be wrong with one is refused in one line that names it."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from sdfast.errors import RequestError
from sdfast.request import MAX_IMAGES, MAX_PROMPT, Request

GOOD: dict[str, Any] = {
    "prompts": ("a cabin",),
    "negative_prompts": (None,),
    "height": 64,
    "width": 64,
    "num_inference_steps": 20,
}
HUGE = 10**5000


def request(**fields: Any) -> Request:
    return Request.make(**{**GOOD, **fields})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("prompts", "a cabin", "tuple"),
        ("prompts", None, "tuple"),
        ("prompts", (), "at least 1"),
        ("prompts", (1,), "string"),
        ("prompts", (b"a cabin",), "string"),
        ("prompts", ("x" * (MAX_PROMPT + 1),), str(MAX_PROMPT)),
        ("prompts", ("x" * 10**6,), str(MAX_PROMPT)),
        ("prompts", ("a\0b",), "NUL"),
        ("prompts", ("a \ud800 b",), "surrogate"),
        ("negative_prompts", ("a\0b",), "NUL"),
        ("negative_prompts", ("\udfff",), "surrogate"),
        ("negative_prompts", (7,), "string"),
        ("negative_prompts", ("a", "b"), "one for each"),
        *[
            (side, value, allowed)
            for side in ("height", "width")
            for value, allowed in [
                (0, "8"),
                (-8, "8"),
                (12, "multiple of 8; the nearest are 8 and 16"),
                (10**9, "8192"),
                (8200, "8192"),
                (HUGE, "8192"),
                (64.0, "integer"),
                (math.nan, "finite"),
                (math.inf, "finite"),
                (True, "integer"),
                ("64", "integer"),
                (None, "integer"),
            ]
        ],
        *[
            ("num_inference_steps", value, allowed)
            for value, allowed in [
                (0, "1"),
                (-1, "1"),
                (1001, "1000"),
                (10**9, "1000"),
                (HUGE, "1000"),
                (2.5, "integer"),
                (math.nan, "finite"),
                (True, "integer"),
                ("20", "integer"),
            ]
        ],
        *[
            ("guidance_scale", value, allowed)
            for value, allowed in [
                (math.nan, "finite"),
                (math.inf, "finite"),
                (-math.inf, "finite"),
                (np.float32("nan"), "finite"),
                (-0.5, "0"),
                (1e9, "100"),
                (1e308, "100"),
                (10**400, "number"),
                ("7.5", "number"),
                (True, "number"),
                (None, "number"),
                (torch.zeros(40, 40), "number"),
                ([7.5], "number"),
            ]
        ],
        *[
            (name, value, allowed)
            for name in ("guidance_rescale", "eta")
            for value, allowed in [
                (math.nan, "finite"),
                (-0.1, "0"),
                (1.1, "1"),
                (False, "number"),
                ("1", "number"),
            ]
        ],
        *[
            ("padding_mask_crop", value, allowed)
            for value, allowed in [(-1, "0"), (8193, "8192"), (1.0, "integer"), (True, "integer")]
        ],
        *[
            ("controlnet_conditioning_scale", value, allowed)
            for value, allowed in [(math.nan, "finite"), (-0.1, "0"), (10.5, "10"), ("1", "number")]
        ],
        *[
            (name, value, allowed)
            for name in ("control_guidance_start", "control_guidance_end")
            for value, allowed in [(math.inf, "finite"), (-0.1, "0"), (1.1, "1")]
        ],
        *[
            ("num_images_per_prompt", value, allowed)
            for value, allowed in [(0, "1"), (-1, "1"), (10**9, "128"), (1.0, "integer"), (True, "integer")]
        ],
        *[
            ("clip_skip", value, allowed)
            for value, allowed in [(-1, "0"), (65, "64"), (1.5, "integer"), (True, "integer")]
        ],
        *[
            ("seed", value, allowed)
            for value, allowed in [
                (-1, "0"),
                (2**64, str(2**64)),
                (HUGE, str(2**64)),
                (1.0, "integer"),
                (math.nan, "finite"),
                (True, "integer"),
                ("42", "integer"),
                (None, "integer"),
            ]
        ],
        ("scheduler", 5, "string"),
        ("scheduler", ["ddim"], "string"),
        ("negativ_prompt", "mist", "did you mean negative_prompts"),
        ("foo", None, "fields are"),
    ],
    ids=lambda value: "huge" if isinstance(value, int) and value > 2**64 else repr(value)[:20],
)
def test_a_bad_field_is_refused_in_one_line_that_names_it(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(**{field: value})
    message = str(caught.value)
    assert message.startswith(field)
    assert allowed in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000


@pytest.mark.parametrize("field", ["timesteps", "sigmas"])
@pytest.mark.parametrize(
    "value",
    [(math.nan,), (3.0, math.inf), "321", (True, False), ("3",), 5, range(10**9), tuple([0.0] * 1002)],
    ids=lambda value: repr(value)[:20],
)
def test_bad_timesteps_and_sigmas_are_refused(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{field}"):
        request(num_inference_steps=None, **{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"timesteps": (3.0, 1.0)},
        {"sigmas": (3.0, 1.0)},
        {"timesteps": (3.0, 1.0), "sigmas": (3.0, 1.0), "num_inference_steps": None},
        {"num_inference_steps": None},
    ],
)
def test_the_steps_are_given_exactly_once(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="exactly one of num_inference_steps, timesteps, sigmas"):
        request(**fields)


def test_a_part_is_of_an_image_that_is_drawn_over() -> None:
    assert request(padding_mask_crop=8, strength=0.5).padding_mask_crop == 8
    with pytest.raises(RequestError, match=r"^padding_mask_crop: is for an image to draw over, with a mask"):
        request(padding_mask_crop=8)
    with pytest.raises(RequestError, match=r"^padding_mask_crop: .* an image is edited as a whole"):
        request(padding_mask_crop=8, image_guidance_scale=1.5)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match=r"^height: is missing$"):
        Request.make(**{name: value for name, value in GOOD.items() if name != "height"})


def test_the_number_of_pictures_is_bounded_over_all_prompts() -> None:
    prompts = ("a",) * 65
    with pytest.raises(RequestError, match="130 pictures; at most 128"):
        request(prompts=prompts, negative_prompts=(None,) * 65, num_images_per_prompt=2)
    assert request(num_images_per_prompt=MAX_IMAGES).images == MAX_IMAGES


def test_seeds_count_up_and_end_below_two_to_the_64() -> None:
    assert request(seed=7, num_images_per_prompt=3).seeds == (7, 8, 9)
    assert request(seed=2**64 - 1).seeds == (2**64 - 1,)
    with pytest.raises(RequestError, match=r"^seed: .* leaves no seeds"):
        request(seed=2**64 - 1, num_images_per_prompt=2)


def test_a_missing_seed_is_chosen_once_and_can_be_told() -> None:
    one, other = request(), request()
    assert one.seeds == one.seeds
    assert one.seed != other.seed
    assert 0 <= one.seed < 2**32


def test_what_is_right_passes() -> None:
    made = request(
        prompts=["", "ein Häuschen 🏔", "x" * MAX_PROMPT],
        negative_prompts=["", None, "mist"],
        height=np.int64(72),
        guidance_scale=7,
        eta=np.float32(0.5),
        clip_skip=0,
    )
    assert (made.height, made.guidance_scale, made.eta) == (72, 7.0, 0.5)
    assert request(num_inference_steps=None, timesteps=np.array([900, 10])).timesteps == (900.0, 10.0)
