"""Configs are read as diffusers reads them; what cannot be honoured is refused by name."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest

from sdfast.errors import RequestError
from sdfast.schedulers import SAMPLERS, Sampler, own_config, schedule
from sdfast.schedulers.solvers import SOLVERS
from tests.schedulers.diffusers_map import (
    STABLE_DIFFUSION,
    assert_same_map,
    defaults_of,
)


@pytest.mark.parametrize("scheduler", SOLVERS)
def test_defaults_are_diffusers(scheduler: str) -> None:
    """Every field of the diffusers class is known here, with its default."""
    model, _ = SOLVERS[scheduler]
    known = {name: f.default for name, f in model.model_fields.items()}
    for name in known.keys() - defaults_of(scheduler).keys():  # shared by the models
        assert name in model.lacks or (name in ("sigma_min", "sigma_max") and known[name] is None)
        del known[name]
    assert known == defaults_of(scheduler)


FOREIGN_CONFIGS: dict[str, dict[str, Any]] = {
    "stable-diffusion-1.5": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "karras-bounds": {
        **STABLE_DIFFUSION,
        "_class_name": "EulerDiscreteScheduler",
        "sigma_min": 0.05,
        "sigma_max": 9.0,
    },
    "from-an-object": dict(diffusers.DDIMScheduler(**STABLE_DIFFUSION).config),
    "unknown-fields": {**STABLE_DIFFUSION, "_class_name": "SomethingElse", "colour": "green"},
}


@pytest.mark.parametrize("config", FOREIGN_CONFIGS.values(), ids=FOREIGN_CONFIGS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.short_name)
def test_config_is_read_as_from_config_reads_it(sampler: Sampler, config: dict[str, Any]) -> None:
    overrides = {k: v for k, v in sampler.overrides.items() if k in defaults_of(sampler.scheduler)}
    assert overrides == sampler.overrides
    reference = getattr(diffusers, sampler.scheduler).from_config(config, **overrides)
    for k in (5, 8) if config.get("_class_name") == "PNDMScheduler" else (8,):
        table = schedule(sampler.name, config, num_inference_steps=k)
        assert_same_map(table, reference, num_inference_steps=k)
    own = schedule(sampler.scheduler, own_config(reference), num_inference_steps=8)
    np.testing.assert_array_equal(own.matrix, table.matrix)
    assert (own.sampler, own.schedule_type) == (sampler.sampler, sampler.schedule_type)


def test_own_config_holds_as_it_stands() -> None:
    """A field that was changed after construction counts, though diffusers still lists it as never set."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **{k: STABLE_DIFFUSION[k] for k in ("beta_start", "beta_end")}
    )
    scheduler.register_to_config(timestep_spacing="trailing")
    assert "timestep_spacing" in scheduler.config["_use_default_values"]
    table = schedule("DPMSolverMultistepScheduler", own_config(scheduler), num_inference_steps=4)
    scheduler.set_timesteps(4)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()


REFUSED_OPTIONS = [
    ("DDIMScheduler", "clip_sample", True),
    ("DDIMScheduler", "thresholding", True),
    ("DDPMScheduler", "clip_sample", True),
    ("DDPMScheduler", "thresholding", True),
    ("DDPMScheduler", "variance_type", "learned_range"),
    ("DDPMScheduler", "variance_type", "fixed_large_log"),
    ("DDPMScheduler", "beta_schedule", "sigmoid"),
    ("EulerDiscreteScheduler", "interpolation_type", "cubic"),
    ("EulerDiscreteScheduler", "timestep_type", "noise"),
    ("HeunDiscreteScheduler", "clip_sample", True),
    ("KDPM2DiscreteScheduler", "prediction_type", "sample"),
    ("KDPM2AncestralDiscreteScheduler", "prediction_type", "sample"),
    ("DPMSolverSDEScheduler", "prediction_type", "sample"),
    ("DPMSolverSDEScheduler", "noise_sampler_seed", -1),
    ("LMSDiscreteScheduler", "beta_schedule", "exp"),
    ("EDMEulerScheduler", "prediction_type", "sample"),
    ("EDMEulerScheduler", "sigma_schedule", "linear"),
    ("EDMEulerScheduler", "sigma_min", 0.0),
    ("EDMDPMSolverMultistepScheduler", "thresholding", True),
    ("EDMDPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
    ("EulerDiscreteScheduler", "use_karras_sigmas", None),
    ("EulerAncestralDiscreteScheduler", "prediction_type", "sample"),
    ("DPMSolverMultistepScheduler", "thresholding", True),
    ("DPMSolverMultistepScheduler", "algorithm_type", "unipc"),
    ("DPMSolverMultistepScheduler", "solver_order", 4),
    ("DPMSolverMultistepScheduler", "solver_type", "rk4"),
    ("DPMSolverMultistepScheduler", "prediction_type", "flow_prediction"),
    ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
    ("DPMSolverMultistepScheduler", "use_dynamic_shifting", True),
    ("DPMSolverMultistepScheduler", "variance_type", "learned"),
    ("DPMSolverMultistepScheduler", "lambda_min_clipped", 99.0),
    ("DDIMScheduler", "timestep_spacing", "random"),
    ("DDIMScheduler", "beta_start", math.nan),
    ("DDIMScheduler", "beta_end", 1.5),
    ("DDIMScheduler", "num_train_timesteps", 10**12),
    ("DDIMScheduler", "steps_offset", 0.5),
    ("DDIMScheduler", "trained_betas", [0.1, 0.2]),
    ("DDIMScheduler", "trained_betas", [0.0] * 1000),
    ("DDIMScheduler", "trained_betas", ["a"] * 1000),
    ("DDIMScheduler", "trained_betas", 5),
]


@pytest.mark.parametrize(("scheduler", "option", "value"), REFUSED_OPTIONS, ids=lambda v: str(v)[:30])
def test_unsupported_option_is_refused_by_name(scheduler: str, option: str, value: Any) -> None:
    with pytest.raises(RequestError, match=option):
        schedule(scheduler, {**STABLE_DIFFUSION, option: value}, num_inference_steps=4)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_epsilon_model_with_zero_terminal_snr_is_refused(scheduler: str) -> None:
    config = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match=r"step 1 of 4, timestep 999.*prediction_type"):
        schedule(scheduler, config, num_inference_steps=4)
