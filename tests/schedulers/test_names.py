"""What people call a scheduler."""

from typing import Any

import diffusers
import numpy as np
import pytest

from sdfast.errors import RequestError
from sdfast.schedulers import SAMPLERS, Sampler, resolve, schedule
from tests.schedulers.diffusers_map import STABLE_DIFFUSION, defaults_of

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
    "heun": "heun",
    "lms": "lms",
    "LMS Karras": "lms_karras",
    "dpm_2": "dpm2",
    "DPM2 Karras": "dpm2_karras",
    "DPM2 Automatic": "dpm2_karras",
    "dpm_2_ancestral": "dpm2_a",
    "DPM2 a Karras": "dpm2_a_karras",
    "dpmpp_sde": "dpmpp_sde",
    "DPM++ SDE Karras": "dpmpp_sde_karras",
    "dpm_2_karras": "dpm2_karras",
    "k_dpmpp_sde karras": "dpmpp_sde_karras",
    "Heun Beta": "heun_beta",
    "heun_beta": "heun_beta",
    "Euler Exponential": "euler_exponential",
    "LMS Uniform": "lms",
    "Euler a SGM Uniform": "euler_a_sgm_uniform",
    "ddim_sgm_uniform": "ddim_sgm_uniform",
    "euler_simple": "euler_simple",
    "euler_normal": "euler_normal",
    "euler_ddim_uniform": "euler_ddim",
    "Euler a Karras": "euler_a_karras",
    "euler_a_karras": "euler_a_karras",
    "Euler KL Optimal": "euler_kl_optimal",
    "DPM++ 2M Align Your Steps": "dpmpp_2m_align_your_steps",
    "dpmpp_2m_ays": "dpmpp_2m_align_your_steps",
    "LMS Polyexponential": "lms_polyexponential",
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
    ("name", "fields", "schedule_type"),
    [
        ("Euler Beta", {"use_beta_sigmas": True}, "Beta"),
        ("Heun Exponential", {"use_exponential_sigmas": True}, "Exponential"),
        ("DPM++ 2M Beta", {"use_beta_sigmas": True}, "Beta"),
        ("DPM2 a Beta", {"use_beta_sigmas": True}, "Beta"),
        ("Euler a SGM Uniform", {"timestep_spacing": "trailing"}, "SGM Uniform"),
        ("DDIM Simple", {"timestep_spacing": "trailing"}, "Simple"),
        ("LMS Turbo", {"timestep_spacing": "trailing"}, "Turbo"),
        ("DPM++ SDE Normal", {"timestep_spacing": "linspace"}, "Normal"),
        ("Euler DDIM", {"timestep_spacing": "leading", "steps_offset": 1}, "DDIM"),
    ],
)
def test_a_schedule_type_is_config_fields(name: str, fields: dict[str, Any], schedule_type: str) -> None:
    """And it holds against what the config says, also where that asks for another layout."""
    sampler = resolve(name)
    assert fields.items() <= sampler.overrides.items()
    assert sampler.overrides.keys() <= defaults_of(sampler.scheduler).keys()
    config = {**STABLE_DIFFUSION, "use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 5}
    by_name = schedule(name, config, num_inference_steps=12)
    assert (by_name.sampler, by_name.schedule_type) == (sampler.sampler, schedule_type)
    settled = {**config, "use_karras_sigmas": False, **sampler.overrides}
    by_class = schedule(sampler.scheduler, settled, num_inference_steps=12)
    np.testing.assert_array_equal(by_name.matrix, by_class.matrix)
    np.testing.assert_array_equal(by_name.timesteps, by_class.timesteps)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPM++ 2M Align Your Steps GITS", "is not known here. Take one of Karras"),
        ("Euler Linear Quadratic", "is not known here"),
        ("DDIM Beta", "DDIMScheduler decides its own noise levels, here as in diffusers"),
        ("PLMS KL Optimal", "PNDMScheduler decides its own"),
        ("LCM SGM Uniform", "LCMScheduler decides its own"),
        ("EDM Euler Karras", "EDMEulerScheduler decides its own"),
        ("DPM++ 2S Normal", "DPMSolverSinglestepScheduler decides its own"),
        ("LMS Karras Beta", "unknown scheduler"),
        ("Karras", "unknown scheduler"),
    ],
)
def test_a_schedule_type_that_a_sampler_does_not_have_is_refused(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve(name)


def test_a_name_decides_the_variant_whatever_the_config_says() -> None:
    config = {**STABLE_DIFFUSION, "solver_type": "heun", "algorithm_type": "dpmsolver", "solver_order": 3}
    for name in ("DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DPM++ 2S"):
        assert schedule(name, config, num_inference_steps=5).sampler == name


@pytest.mark.parametrize(
    ("name", "nearest"), [("DPM 2M Karas", "DPM++ 2M Karras"), ("eular", "Euler"), ("dimm", "DDIM")]
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RequestError) as refusal:
        resolve(name)
    assert f"did you mean '{nearest}'?" in str(refusal.value)
    assert all(sampler.name in str(refusal.value) for sampler in SAMPLERS)


def words(names: str) -> list[str]:
    return names.split()


AUTOMATIC1111 = words("""k_euler_a k_euler_ancestral k_euler k_lms k_heun k_dpm_2 k_dpm_2_a k_dpmpp_2m
    k_dpmpp_sde k_dpmpp_2m_sde k_dpmpp_3m_sde k_dpmpp_2m_sde_heun k_lms_ka k_dpm_2_ka
    k_dpm_2_a_ka k_dpmpp_2m_ka
    k_dpmpp_sde_ka k_dpmpp_2m_sde_ka k_dpmpp_2m_sde_exp k_dpmpp_3m_sde_ka k_dpmpp_3m_sde_exp ddim plms unipc
    lcm""")
COMFYUI = words("""euler euler_ancestral heun dpm_2 dpm_2_ancestral lms dpmpp_sde dpmpp_sde_gpu dpmpp_2m
    dpmpp_2m_sde
    dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm deis
    sa_solver ddim uni_pc uni_pc_bh2""")
COMFYUI_TYPES = words("normal karras exponential sgm_uniform simple ddim_uniform beta kl_optimal")


@pytest.mark.parametrize("name", [*AUTOMATIC1111, *COMFYUI])
def test_every_name_that_other_programs_have_resolves(name: str) -> None:
    assert schedule(name, STABLE_DIFFUSION, num_inference_steps=5)


@pytest.mark.parametrize("schedule_type", COMFYUI_TYPES)
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_3m_sde", "lms", "uni_pc"])
def test_every_schedule_type_of_comfyui_resolves(name: str, schedule_type: str) -> None:
    assert schedule(f"{name}_{schedule_type}", STABLE_DIFFUSION, num_inference_steps=5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DPM adaptive", "chooses its steps by looking at the picture"),
        ("DPM++ 2S a Karras", "nothing to prove it against; take DPM\\+\\+ 2S or"),
        ("dpmpp_2s_ancestral", "nothing to prove it against"),
        ("Restart", "take Heun"),
        ("DDIM CFG++", "the negative prompt's output apart"),
        ("euler_ancestral_cfg_pp", "the negative prompt's output apart"),
        ("er_sde", "no counterpart in diffusers"),
    ],
)
def test_a_sampler_that_is_not_here_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        resolve(name)


@pytest.mark.parametrize("name", ["", "Restarted", None, 7])
def test_unknown_name_lists_what_there_is(name: Any) -> None:
    with pytest.raises(RequestError, match=r"Known: DPM\+\+ 2M Karras"):
        resolve(name)
