"""What people call a scheduler."""

from typing import Any

import diffusers
import numpy as np
import pytest

from sdfast.errors import RequestError
from sdfast.schedulers import SAMPLERS, Sampler, resolve, schedule
from tests.schedulers.diffusers_map import STABLE_DIFFUSION

NAMES = {
    "DPM++ 2M Karras": "dpmpp_2m_karras",
    "dpm++ 2m karras": "dpmpp_2m_karras",
    "DPM++ 2M Automatic": "dpmpp_2m_karras",
    "dpmpp_2m_karras": "dpmpp_2m_karras",
    "dpmpp-2m-karras": "dpmpp_2m_karras",
    "DPM++ 2M": "dpmpp_2m",
    "dpmpp_2m": "dpmpp_2m",
    "DPM++ 2M Uniform": "dpmpp_2m",
    "DPM++ 2M SDE Karras": "dpmpp_2m_sde_karras",
    "DPM++ 2M SDE Exponential": "dpmpp_2m_sde_exponential",
    "DPM++ 2M SDE Automatic": "dpmpp_2m_sde_exponential",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun Karras": "dpmpp_2m_sde_heun_karras",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde_heun",
    "DPM++ 3M SDE Karras": "dpmpp_3m_sde_karras",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_3m": "dpmpp_3m",
    "DPM++ 2S Karras": "dpmpp_2s_karras",
    "dpmpp_2s": "dpmpp_2s",
    "DPM-Solver": "dpm_solver_2m",
    "deis": "deis",
    "UniPC": "unipc",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc_bh2",
    "SA-Solver": "sa_solver",
    "sa_solver": "sa_solver",
    "Euler a": "euler_a",
    "EULER A": "euler_a",
    "euler_ancestral": "euler_a",
    "k_euler_ancestral": "euler_a",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "Euler": "euler",
    "k_euler": "euler",
    " euler ": "euler",
    "Euler Karras": "euler_karras",
    "euler_karras": "euler_karras",
    "DDIM": "ddim",
    "DDIMScheduler": "ddim",
    "ddpm": "ddpm",
    "LCM": "lcm",
    "lcm": "lcm",
    "LCMScheduler": "lcm",
    "TCD": "tcd",
    "PLMS": "plms",
    "pndm": "plms",
    "PNDMScheduler": "plms",
    "PNDM PRK": "pndm_prk",
    "DDIM Inverse": "ddim_inverse",
    "DDIMInverseScheduler": "ddim_inverse",
    "DDPMScheduler": "ddpm",
}


@pytest.mark.parametrize(("name", "short"), NAMES.items(), ids=NAMES)
def test_name_resolves(name: str, short: str) -> None:
    assert resolve(name).short_name == short


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.short_name)
def test_every_name_of_a_sampler_resolves_to_it(sampler: Sampler) -> None:
    names = (sampler.name, sampler.short_name, f"{sampler.sampler} {sampler.schedule_type}", *sampler.aliases)
    assert [resolve(name) for name in names] == [sampler] * len(names)
    assert hasattr(diffusers, sampler.scheduler)


@pytest.mark.parametrize("karras", [False, True])
def test_class_name_leaves_karras_to_the_config(karras: bool) -> None:
    config = {**STABLE_DIFFUSION, "use_karras_sigmas": karras}
    by_class = schedule("DPMSolverMultistepScheduler", config, num_inference_steps=20)
    by_name = schedule("DPM++ 2M Karras" if karras else "DPM++ 2M", STABLE_DIFFUSION, num_inference_steps=20)
    np.testing.assert_array_equal(by_class.matrix, by_name.matrix)
    assert (by_class.sampler, by_class.schedule_type) == ("DPM++ 2M", "Karras" if karras else "Uniform")
    assert resolve("DPMSolverMultistepScheduler").overrides == {}


@pytest.mark.parametrize(
    ("name", "nearest"), [("DPM 2M Karas", "DPM++ 2M Karras"), ("eular", "Euler"), ("dimm", "DDIM")]
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RequestError) as refusal:
        resolve(name)
    assert f"did you mean '{nearest}'?" in str(refusal.value)
    assert all(sampler.name in str(refusal.value) for sampler in SAMPLERS)


@pytest.mark.parametrize("name", ["", "Restart", None, 7])
def test_unknown_name_lists_what_there_is(name: Any) -> None:
    with pytest.raises(RequestError, match=r"Known: DPM\+\+ 2M Karras"):
        resolve(name)
