"""What a request may ask of a scheduler."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdfast.errors import RequestError
from sdfast.schedulers import schedule
from tests.schedulers.diffusers_map import STABLE_DIFFUSION, assert_same_map

BAD_REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no-steps": ("Euler", {}, "num_inference_steps is missing"),
    "zero": ("Euler", {"num_inference_steps": 0}, "outside 1 to 1000"),
    "negative": ("Euler", {"num_inference_steps": -3}, "outside 1 to 1000"),
    "billion": ("Euler", {"num_inference_steps": 10**9}, "outside 1 to 1000"),
    "float": ("Euler", {"num_inference_steps": 20.0}, "not a whole number"),
    "bool": ("Euler", {"num_inference_steps": True}, "not a whole number"),
    "text": ("Euler", {"num_inference_steps": "20"}, "not a whole number"),
    "both": ("Euler", {"timesteps": [9, 1], "sigmas": [3.0, 0.0]}, "both"),
    "steps-disagree": ("Euler", {"timesteps": [9, 1], "num_inference_steps": 3}, "make 2 steps"),
    "no-timesteps": ("Euler", {"timesteps": []}, "0 values"),
    "rising": ("Euler", {"timesteps": [1, 999]}, "must fall"),
    "repeated": ("Euler", {"timesteps": [9, 9]}, "must fall"),
    "too-high": ("Euler", {"timesteps": [1000, 1]}, "999 down to 0"),
    "below-zero": ("Euler", {"timesteps": [10, -1]}, "999 down to 0"),
    "nan-timestep": ("Euler", {"timesteps": [math.nan]}, "finite"),
    "words": ("Euler", {"timesteps": ["a"]}, "must all be numbers"),
    "no-list": ("Euler", {"timesteps": 7}, "not a list"),
    "a-word": ("Euler", {"sigmas": "321"}, "not a list"),
    "karras-timesteps": ("Euler Karras", {"timesteps": [9, 1]}, "use_karras_sigmas"),
    "fraction": ("DPM++ 2M", {"timesteps": [9.5, 1]}, "whole timesteps"),
    "ddim-timesteps": ("DDIM", {"timesteps": [9, 1]}, "DDIMScheduler takes no custom timesteps"),
    "ddpm-sigmas": ("DDPM", {"sigmas": [9, 0]}, "DDPMScheduler takes no custom sigmas"),
    "lcm-sigmas": ("LCM", {"sigmas": [9, 0]}, "takes no custom sigmas"),
    "deis-sigmas": ("DEIS", {"sigmas": [9, 0]}, "DEISMultistepScheduler cannot go to sigma 0"),
    "one-sigma": ("Euler", {"sigmas": [9.0]}, "at least two"),
    "negative-sigma": ("Euler", {"sigmas": [9.0, -1.0]}, "0 or above"),
    "infinite-sigma": ("Euler", {"sigmas": [math.inf, 0.0]}, "finite"),
    "nan-eta": ("DDIM", {"num_inference_steps": 4, "eta": math.nan}, "eta"),
    "negative-eta": ("DDIM", {"num_inference_steps": 4, "eta": -0.1}, "eta"),
    "huge-eta": ("DDIM", {"num_inference_steps": 4, "eta": 9.0}, "more noise than"),
    "text-eta": ("DDIM", {"num_inference_steps": 4, "eta": "1"}, "eta"),
    "eta-elsewhere": ("Euler", {"num_inference_steps": 4, "eta": 0.5}, "only DDIM"),
    "offset-past-the-end": ("DDIM", {"num_inference_steps": 1000}, "timestep 1000"),
    "levels-fall-together": ("DPM++ 2M", {"num_inference_steps": 1000}, "fewer steps"),
}


@pytest.mark.parametrize(("name", "request_", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request_is_refused(name: str, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        schedule(name, STABLE_DIFFUSION, **{"num_inference_steps": None, **request_})


def test_trailing_timestep_below_zero_is_refused() -> None:
    """For 61 trailing steps diffusers lays out 62, the last at -1, where DDIM reads ᾱ from the wrong end."""
    config = {**STABLE_DIFFUSION, "timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match="timestep -1"):
        schedule("DDIM", config, num_inference_steps=61)
    table = schedule("Euler", config, num_inference_steps=61)
    assert_same_map(table, diffusers.EulerDiscreteScheduler.from_config(config), num_inference_steps=61)


def test_arrays_and_tensors_are_taken_as_lists_are() -> None:
    timesteps = [999, 500, 20]
    plain = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=None, timesteps=timesteps)
    for given in (np.array(timesteps), torch.tensor(timesteps), tuple(timesteps)):
        other = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=None, timesteps=given)
        np.testing.assert_array_equal(plain.matrix, other.matrix)
    betas = np.linspace(0.001, 0.015, 1000)
    listed = schedule("DDIM", {"clip_sample": False, "trained_betas": betas.tolist()}, num_inference_steps=4)
    arrayed = schedule("DDIM", {"clip_sample": False, "trained_betas": betas}, num_inference_steps=4)
    np.testing.assert_array_equal(listed.matrix, arrayed.matrix)


def test_a_refusal_is_short() -> None:
    with pytest.raises(RequestError) as refusal:
        schedule("DDIM", {**STABLE_DIFFUSION, "trained_betas": ["a"] * 1000}, num_inference_steps=4)
    assert len(str(refusal.value)) < 600


def test_table_is_read_only() -> None:
    table = schedule("DPM++ 2M Karras", STABLE_DIFFUSION, num_inference_steps=20)
    assert (len(table), table.registers, table.matrix.shape) == (20, 2, (20, 2, 4))
    for array in (table.timesteps, table.input_scale, table.matrix, table.draws_noise):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_one_schedule_cannot_change_the_next() -> None:
    first = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=4)
    second = schedule("Euler", STABLE_DIFFUSION, num_inference_steps=4)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert not np.shares_memory(first.matrix, second.matrix)
