"""The chain and its relatives: DDIM backwards, PNDM with its warm-up, LCM and TCD."""

from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdfast.errors import RequestError
from sdfast.schedulers import schedule
from sdfast.schedulers.solvers.tcd import _share
from tests.schedulers.diffusers_map import (
    NOISE_SCHEDULES,
    PREDICTIONS,
    SPACINGS,
    STABLE_DIFFUSION,
    STEPS,
    Case,
    assert_case,
    assert_every,
    assert_same_map,
    map_of_table,
    of_cases,
)

DISTILLED = ("LCMScheduler", "TCDScheduler")
ETAS = (0.0, 0.3, 1.0)
BEGUN_ANYWHERE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)


def cases() -> Iterator[Case]:
    yield from inversions()
    yield from warmed_up()
    yield from distilled()
    for spacing in SPACINGS:
        for scheduler in BEGUN_ANYWHERE:
            yield Case(scheduler, {"timestep_spacing": spacing}, strength=0.5)
        yield Case("DDIMScheduler", {"timestep_spacing": spacing}, 1.0, strength=0.7)


def inversions() -> Iterator[Case]:
    for spacing in ("leading", "trailing"):  # diffusers has no linspace here
        for prediction in PREDICTIONS:
            options = {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": False}
            yield Case("DDIMInverseScheduler", options)
            if prediction != "sample":  # at ᾱ = 1 a step divides by 1 - ᾱ, in diffusers too
                yield Case("DDIMInverseScheduler", {**options, "set_alpha_to_one": True})
        for label, levels in NOISE_SCHEDULES.items():
            yield Case("DDIMInverseScheduler", {"timestep_spacing": spacing, **levels}, label=label)


def warmed_up() -> Iterator[Case]:
    for spacing in SPACINGS:
        for prediction in ("epsilon", "v_prediction"):  # diffusers has no sample here
            for one in (False, True):
                options = {
                    "timestep_spacing": spacing,
                    "prediction_type": prediction,
                    "set_alpha_to_one": one,
                }
                yield Case("PNDMScheduler", options)
                yield Case("PNDMScheduler", options, strength=0.5)
                yield Case("PNDMScheduler", {**options, "skip_prk_steps": True}, strength=0.5)
        for label, levels in NOISE_SCHEDULES.items():
            yield Case("PNDMScheduler", {"timestep_spacing": spacing, **levels}, label=label)


def distilled() -> Iterator[Case]:
    for scheduler, etas in (("LCMScheduler", (0.0,)), ("TCDScheduler", ETAS)):
        for prediction in PREDICTIONS:
            for eta in etas:
                for options in ({}, {"original_inference_steps": 64}, {"set_alpha_to_one": False}):
                    yield Case(scheduler, {"prediction_type": prediction, **options}, eta)
                yield Case(scheduler, {"prediction_type": prediction}, eta, strength=0.5)
        for label, levels in NOISE_SCHEDULES.items():
            yield Case(scheduler, levels, etas[-1], label=label)
    for scaling in (0.1, 1.0):
        yield Case("LCMScheduler", {"timestep_scaling": scaling})


CASES = list(cases())


def out_of_reach(case: Case, steps: int) -> str | None:
    """Why diffusers cannot do this."""
    if int(steps * case.strength) < 1:
        return "no step is left"
    if case.scheduler == "PNDMScheduler" and not case.options.get("skip_prk_steps") and steps < 4:
        return "diffusers' warm-up fails below four steps"
    return None


@of_cases([(case, tuple(k for k in STEPS if not out_of_reach(case, k))) for case in CASES])
def test_table_is_diffusers_map(case: Case, every: tuple[int, ...]) -> None:
    assert_every(case, every, assert_case)


@pytest.mark.parametrize("timesteps", [[999], [999, 759, 499, 259], [700, 3, 0]], ids=str)
@pytest.mark.parametrize("scheduler", DISTILLED)
def test_custom_timesteps(scheduler: str, timesteps: list[int]) -> None:
    table = schedule(scheduler, STABLE_DIFFUSION, num_inference_steps=None, timesteps=timesteps)
    reference = getattr(diffusers, scheduler).from_config(STABLE_DIFFUSION)
    assert_same_map(table, reference, timesteps=timesteps)


@pytest.mark.parametrize("scheduler", DISTILLED)
def test_more_steps_than_were_distilled_are_refused(scheduler: str) -> None:
    with pytest.raises(RequestError, match="51 steps, but the model was distilled on 50 timesteps"):
        schedule(scheduler, STABLE_DIFFUSION, num_inference_steps=51)
    config = {**STABLE_DIFFUSION, "original_inference_steps": 1001}
    with pytest.raises(RequestError, match="original_inference_steps=1001 is more than the 1000"):
        schedule(scheduler, config, num_inference_steps=4)


def test_tcd_refuses_a_gamma_above_one() -> None:
    with pytest.raises(RequestError, match=r"eta=1\.5"):
        schedule("TCD", STABLE_DIFFUSION, num_inference_steps=4, eta=1.5)


def test_share_of_a_timestep_is_torchs() -> None:
    t = torch.arange(1000)
    for eta in np.linspace(0, 1, 101).tolist():
        assert _share(1 - eta, t.double().numpy()).tolist() == torch.floor((1 - eta) * t).tolist()


def test_short_warm_up_is_refused() -> None:
    with pytest.raises(RequestError, match="4 steps or more"):
        schedule("PNDM PRK", STABLE_DIFFUSION, num_inference_steps=3)


@pytest.mark.parametrize("steps", [4, 20])
def test_inversion_undoes_ddim(steps: int) -> None:
    """With one noise prediction throughout, DDIM from the inverted latents gives the picture back."""
    config = {**STABLE_DIFFUSION, "set_alpha_to_one": True}
    up = schedule("DDIM Inverse", config, num_inference_steps=steps)
    down = schedule("DDIM", config, num_inference_steps=steps)
    assert up.timesteps.tolist() == down.timesteps[::-1].tolist()
    assert up.noising[0].tolist() == [1.0, 0.0]
    assert map_of_table(up)[-1, 0] * map_of_table(down)[-1, 0] == pytest.approx(1, abs=1e-12)


def test_strength_of_an_inversion_leaves_out_the_noisy_end() -> None:
    half = schedule("DDIM Inverse", STABLE_DIFFUSION, num_inference_steps=10, strength=0.5)
    whole = schedule("DDIM Inverse", STABLE_DIFFUSION, num_inference_steps=10)
    assert half.timesteps.tolist() == whole.timesteps[:5].tolist()
    np.testing.assert_array_equal(half.matrix, whole.matrix[:5])


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("DDIMInverseScheduler", {"clip_sample": True}),
    ("DDIMInverseScheduler", {"timestep_spacing": "linspace"}),
    ("LCMScheduler", {"clip_sample": True}),
    ("LCMScheduler", {"thresholding": True}),
    ("LCMScheduler", {"original_inference_steps": None}),
    ("TCDScheduler", {"original_inference_steps": None}),
    ("TCDScheduler", {"thresholding": True}),
]


@pytest.mark.parametrize(("scheduler", "options"), REFUSED, ids=str)
def test_unsupported_option_is_refused_by_name(scheduler: str, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        schedule(scheduler, {**STABLE_DIFFUSION, **options}, num_inference_steps=4)
