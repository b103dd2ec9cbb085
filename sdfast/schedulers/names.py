"""What people call a scheduler: diffusers class names, AUTOMATIC1111 and ComfyUI names, short names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from sdfast.errors import RequestError
from sdfast.schedulers.layouts import LAYOUTS
from sdfast.schedulers.solvers import SOLVERS

_PLAIN = {"use_karras_sigmas": False}
_KARRAS = {"use_karras_sigmas": True}
_UNCLIPPED = {"clip_sample": False}  # latents have no bounds to clip to; the class default is for pixels
_NO_OTHER_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}
_DPMPP_2M = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}
_DRAWN_ANEW = "; noise is drawn anew, where AUTOMATIC1111 and ComfyUI follow one Brownian path"
_EXPONENTIAL = _NO_OTHER_SIGMAS | _PLAIN | {"use_exponential_sigmas": True}
_HEUN = {"solver_type": "heun"}
_DPMPP_2M_SDE = _DPMPP_2M | {"algorithm_type": "sde-dpmsolver++"}
_DPMPP_3M = _DPMPP_2M | {"solver_order": 3}
_DPMPP_3M_SDE = _DPMPP_2M_SDE | {"solver_order": 3}
_DPM_SOLVER = _DPMPP_2M | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPMPP_2S = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_flow_sigmas": False,
}
_UNIPC = {"solver_order": 3, "predict_x0": True, "lower_order_final": True, "use_flow_sigmas": False}
_BH1 = {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}  # diffusers' bh1 has no number for no noise
_BH2 = {"solver_type": "bh2"}


PLAIN_TYPES = ("Automatic", "Uniform")
"""AUTOMATIC1111's schedule types that leave the noise levels as the scheduler's config spaces them."""

_AS_SPACED = _NO_OTHER_SIGMAS | _PLAIN | {"use_lu_lambdas": False}
SCHEDULE_TYPES: Mapping[str, Mapping[str, Any]] = {
    "Karras": _AS_SPACED | _KARRAS,
    "Exponential": _AS_SPACED | {"use_exponential_sigmas": True},
    "Beta": _AS_SPACED | {"use_beta_sigmas": True},
    "Normal": _AS_SPACED | {"timestep_spacing": "linspace"},
    "SGM Uniform": _AS_SPACED | {"timestep_spacing": "trailing"},
    "Simple": _AS_SPACED | {"timestep_spacing": "trailing"},
    "Turbo": _AS_SPACED | {"timestep_spacing": "trailing"},
    "DDIM": _AS_SPACED | {"timestep_spacing": "leading", "steps_offset": 1},
}
"""AUTOMATIC1111's other schedule types, as config fields. Where the number of steps does not divide that of
the training timesteps, diffusers' timesteps, which are whole, may be one off theirs for the last four."""

_NOT_HERE = ("Align Your Steps GITS", "Align Your Steps 11", "Align Your Steps 32", "Linear Quadratic")
_TYPE_ALIASES = {  # names that others have for them, and AUTOMATIC1111's own short ones
    "DDIM Uniform": "DDIM",
    "AYS": "Align Your Steps",
    "SGMUniform": "SGM Uniform",
    "ka": "Karras",
    "exp": "Exponential",
}
# Distilled for timesteps of their own, or trained on noise levels of their own.
_OWN_LAYOUT = ("LCMScheduler", "TCDScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


_NOT_A_TABLE = "chooses its steps by looking at the picture, which no table can; take DPM++ 2M Karras"
_NO_REFERENCE = "has no counterpart in diffusers, so there is nothing to prove it against; take "
_CFG_PP = (
    "needs the negative prompt's output apart from guidance, which is not supported; take the plain form"
)
_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    _NOT_A_TABLE: ("DPM adaptive", "k_dpm_ad"),
    _CFG_PP: (
        "DDIM CFG++",
        *(f"{name}_cfg_pp" for name in ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2s_ancestral")),
        *(f"{name}_cfg_pp" for name in ("res_multistep", "res_multistep_ancestral", "gradient_estimation")),
    ),
    _NO_REFERENCE + "DPM++ 2S or DPM++ SDE": ("DPM++ 2S a", "k_dpmpp_2s_a", "dpmpp_2s_ancestral"),
    _NO_REFERENCE + "Heun": ("Restart", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde"),
    _NO_REFERENCE + "DPM++ 2M": (
        *("DPM fast", "k_dpm_fast", "ipndm", "ipndm_v", "res_multistep", "res_multistep_ancestral"),
        *("gradient_estimation", "er_sde", "seeds_2", "seeds_3", "sa_solver_pece"),
    ),
}
"""Samplers of AUTOMATIC1111 and ComfyUI that are not here, by the reason."""


@dataclass(frozen=True)
class Sampler:
    """A name that can be asked for, and what it means.

    Attributes:
        scheduler: diffusers class name.
        sampler: AUTOMATIC1111 sampler name.
        schedule_type: AUTOMATIC1111 schedule type.
        short_name: for command lines and requests.
        overrides: config fields that the name decides, whatever the checkpoint's config says. Empty when the
            scheduler was asked for by its class name: then its config decides.
        evaluations: network evaluations a step.
        advice: when to use it, in one line.
        aliases: other names it goes by.
        layout: of `layouts.LAYOUTS`, where that decides the noise levels instead of the config.
    """

    scheduler: str
    sampler: str
    schedule_type: str
    short_name: str
    overrides: Mapping[str, Any]
    evaluations: int
    advice: str
    aliases: tuple[str, ...] = field(default=())
    layout: str = ""

    @property
    def name(self) -> str:
        """The name people know: "DPM++ 2M Karras", "Euler a"."""
        plain = self.schedule_type in PLAIN_TYPES
        return self.sampler if plain else f"{self.sampler} {self.schedule_type}"


def _sampler(
    scheduler: str,
    sampler: str,
    schedule_type: str,
    short: str,
    overrides: Mapping[str, Any],
    advice: str,
    *aliases: str,
    evaluations: int = 1,
) -> Sampler:
    settled = MappingProxyType(dict(overrides))
    return Sampler(scheduler, sampler, schedule_type, short, settled, evaluations, advice, aliases)


SAMPLERS: tuple[Sampler, ...] = (
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        "Karras",
        "dpmpp_2m_karras",
        _DPMPP_2M | _NO_OTHER_SIGMAS | _KARRAS,
        "the usual choice: finished pictures at 20 to 30 steps",
        "DPM++ 2M Automatic",  # AUTOMATIC1111's own default for this sampler
        "dpmpp_2m_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        "Uniform",
        "dpmpp_2m",
        _DPMPP_2M | _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps; often better below 15 steps",
        "k_dpmpp_2m",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        "Exponential",
        "dpmpp_2m_sde_exponential",
        _DPMPP_2M_SDE | _EXPONENTIAL,
        "DPM++ 2M with new noise at every step: more detail, 25 steps or more" + _DRAWN_ANEW,
        "DPM++ 2M SDE Automatic",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        "Karras",
        "dpmpp_2m_sde_karras",
        _DPMPP_2M_SDE | _NO_OTHER_SIGMAS | _KARRAS,
        "as above with Karras levels" + _DRAWN_ANEW,
        "dpmpp_2m_sde_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        "Uniform",
        "dpmpp_2m_sde",
        _DPMPP_2M_SDE | _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps" + _DRAWN_ANEW,
        "k_dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE Heun",
        "Exponential",
        "dpmpp_2m_sde_heun_exponential",
        _DPMPP_2M_SDE | _HEUN | _EXPONENTIAL,
        "DPM++ 2M SDE, the change between steps weighed exactly" + _DRAWN_ANEW,
        "DPM++ 2M SDE Heun Automatic",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE Heun",
        "Karras",
        "dpmpp_2m_sde_heun_karras",
        _DPMPP_2M_SDE | _HEUN | _NO_OTHER_SIGMAS | _KARRAS,
        "as above with Karras levels" + _DRAWN_ANEW,
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE Heun",
        "Uniform",
        "dpmpp_2m_sde_heun",
        _DPMPP_2M_SDE | _HEUN | _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps" + _DRAWN_ANEW,
        "k_dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        "Exponential",
        "dpmpp_3m_sde_exponential",
        _DPMPP_3M_SDE | _EXPONENTIAL,
        "third order with new noise at every step, 30 steps or more" + _DRAWN_ANEW,
        "DPM++ 3M SDE Automatic",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        "Karras",
        "dpmpp_3m_sde_karras",
        _DPMPP_3M_SDE | _NO_OTHER_SIGMAS | _KARRAS,
        "as above with Karras levels" + _DRAWN_ANEW,
        "dpmpp_3m_sde_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        "Uniform",
        "dpmpp_3m_sde",
        _DPMPP_3M_SDE | _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps" + _DRAWN_ANEW,
        "k_dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M",
        "Karras",
        "dpmpp_3m_karras",
        _DPMPP_3M | _NO_OTHER_SIGMAS | _KARRAS,
        "DPM++ 2M with one step more of memory: for low guidance",
        "dpmpp_3m_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M",
        "Uniform",
        "dpmpp_3m",
        _DPMPP_3M | _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM-Solver 2M",
        "Uniform",
        "dpm_solver_2m",
        _DPM_SOLVER | _NO_OTHER_SIGMAS | _PLAIN,
        "DPM-Solver as first published, on the noise; DPM++ 2M bears guidance better",
        "DPM-Solver",
    ),
    _sampler(
        "DPMSolverSinglestepScheduler",
        "DPM++ 2S",
        "Karras",
        "dpmpp_2s_karras",
        _DPMPP_2S | _NO_OTHER_SIGMAS | _KARRAS,
        "pairs of evaluations, each counted as a step; draws no noise, unlike DPM++ 2S a",
        "dpmpp_2s_k",
    ),
    _sampler(
        "DPMSolverSinglestepScheduler",
        "DPM++ 2S",
        "Uniform",
        "dpmpp_2s",
        _DPMPP_2S | _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps",
    ),
    _sampler(
        "DEISMultistepScheduler",
        "DEIS",
        "Automatic",
        "deis",
        _NO_OTHER_SIGMAS | _PLAIN,
        "an exponential Adams method on the noise; 20 to 30 steps",
        "DEIS Uniform",
    ),
    _sampler(
        "DEISMultistepScheduler",
        "DEIS",
        "Karras",
        "deis_karras",
        _NO_OTHER_SIGMAS | _KARRAS,
        "DEIS with Karras levels",
        "deis_k",
    ),
    _sampler(
        "UniPCMultistepScheduler",
        "UniPC",
        "Automatic",
        "unipc",
        _UNIPC | _BH1 | _NO_OTHER_SIGMAS | _PLAIN,
        "third order, each step corrected by the next one's evaluation: good from 8 steps on",
        "uni_pc",
        "UniPC Uniform",
    ),
    _sampler(
        "UniPCMultistepScheduler",
        "UniPC",
        "Karras",
        "unipc_karras",
        _UNIPC | _BH1 | _NO_OTHER_SIGMAS | _KARRAS,
        "UniPC with Karras levels",
        "unipc_k",
        "uni_pc_karras",
    ),
    _sampler(
        "UniPCMultistepScheduler",
        "UniPC bh2",
        "Automatic",
        "unipc_bh2",
        _UNIPC | _BH2 | _NO_OTHER_SIGMAS | _PLAIN,
        "UniPC's other weights, for more than 10 steps",
        "uni_pc_bh2",
        "UniPC bh2 Uniform",
    ),
    _sampler(
        "SASolverScheduler",
        "SA-Solver",
        "Automatic",
        "sa_solver",
        _NO_OTHER_SIGMAS | _PLAIN,
        "predictor, corrector, and noise in the middle of the run; 20 steps or more",
        "SA-Solver Uniform",
    ),
    _sampler(
        "EulerDiscreteScheduler",
        "Euler",
        "Automatic",
        "euler",
        _NO_OTHER_SIGMAS | _PLAIN,
        "simple and predictable; 30 steps or more",
        "k_euler",
        "Euler Uniform",
    ),
    _sampler(
        "EulerDiscreteScheduler",
        "Euler",
        "Karras",
        "euler_karras",
        _NO_OTHER_SIGMAS | _KARRAS,
        "Euler with more of its steps where the detail is made",
    ),
    _sampler(
        "EulerAncestralDiscreteScheduler",
        "Euler a",
        "Automatic",
        "euler_a",
        {},
        "new noise at every step: softer, more varied; the picture never settles with more steps",
        "euler_ancestral",
        "k_euler_a",
        "k_euler_ancestral",
        "Euler a Uniform",
    ),
    _sampler(
        "HeunDiscreteScheduler",
        "Heun",
        "Automatic",
        "heun",
        _NO_OTHER_SIGMAS | _PLAIN | _UNCLIPPED,
        "Euler corrected by a second look at where a step ends: exact, at twice the cost",
        "k_heun",
        "Heun Uniform",
        evaluations=2,
    ),
    _sampler(
        "LMSDiscreteScheduler",
        "LMS",
        "Automatic",
        "lms",
        _NO_OTHER_SIGMAS | _PLAIN,
        "fourth order from the steps before, at Euler's cost; 30 steps or more",
        "k_lms",
        "LMS Uniform",
    ),
    _sampler(
        "LMSDiscreteScheduler",
        "LMS",
        "Karras",
        "lms_karras",
        _NO_OTHER_SIGMAS | _KARRAS,
        "LMS with more of its steps where the detail is made",
    ),
    _sampler(
        "KDPM2DiscreteScheduler",
        "DPM2",
        "Karras",
        "dpm2_karras",
        _NO_OTHER_SIGMAS | _KARRAS,
        "midpoint steps: exact, at twice the cost",
        "DPM2 Automatic",
        evaluations=2,
    ),
    _sampler(
        "KDPM2DiscreteScheduler",
        "DPM2",
        "Uniform",
        "dpm2",
        _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps",
        "dpm_2",
        "k_dpm_2",
        evaluations=2,
    ),
    _sampler(
        "KDPM2AncestralDiscreteScheduler",
        "DPM2 a",
        "Karras",
        "dpm2_a_karras",
        _NO_OTHER_SIGMAS | _KARRAS,
        "DPM2 with new noise at every step",
        "DPM2 a Automatic",
        evaluations=2,
    ),
    _sampler(
        "KDPM2AncestralDiscreteScheduler",
        "DPM2 a",
        "Uniform",
        "dpm2_a",
        _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps",
        "dpm_2_ancestral",
        "k_dpm_2_a",
        "k_dpm_2_ancestral",
        evaluations=2,
    ),
    _sampler(
        "DPMSolverSDEScheduler",
        "DPM++ SDE",
        "Karras",
        "dpmpp_sde_karras",
        _NO_OTHER_SIGMAS | _KARRAS,
        "detailed and varied, finished at 10 to 15 steps of two evaluations; needs torchsde",
        "DPM++ SDE Automatic",
        evaluations=2,
    ),
    _sampler(
        "DPMSolverSDEScheduler",
        "DPM++ SDE",
        "Uniform",
        "dpmpp_sde",
        _NO_OTHER_SIGMAS | _PLAIN,
        "as above with evenly spaced timesteps",
        "k_dpmpp_sde",
        "dpmpp_sde_gpu",
        evaluations=2,
    ),
    _sampler(
        "EDMEulerScheduler",
        "EDM Euler",
        "Automatic",
        "edm_euler",
        {},
        "for checkpoints trained with EDM's preconditioning only, such as CosXL",
    ),
    _sampler(
        "EDMDPMSolverMultistepScheduler",
        "EDM DPM++ 2M",
        "Automatic",
        "edm_dpmpp_2m",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
        "for checkpoints trained with EDM's preconditioning only, such as Playground 2.5",
    ),
    _sampler(
        "DDIMScheduler",
        "DDIM",
        "Automatic",
        "ddim",
        _UNCLIPPED,
        "the classic; eta from 0 (deterministic) to 1 (as noisy as DDPM); 50 steps",
    ),
    _sampler(
        "PNDMScheduler",
        "PLMS",
        "Automatic",
        "plms",
        {"skip_prk_steps": True},
        "Stable Diffusion 1.x's own default: DDIM of fourth order, one evaluation more than steps",
        "pndm",
    ),
    _sampler(
        "PNDMScheduler",
        "PNDM PRK",
        "Automatic",
        "pndm_prk",
        {"skip_prk_steps": False},
        "PLMS warmed up by Runge-Kutta steps: four evaluations in each of the first three, then one",
    ),
    _sampler(
        "LCMScheduler",
        "LCM",
        "Automatic",
        "lcm",
        _UNCLIPPED,
        "for LCM checkpoints and LoRAs only: 4 to 8 steps, guidance 1 to 2",
        "LCM Uniform",
    ),
    _sampler(
        "TCDScheduler",
        "TCD",
        "Automatic",
        "tcd",
        _UNCLIPPED,
        "for TCD checkpoints and LoRAs only: 4 to 20 steps; eta is gamma, 0.3 is usual",
    ),
    _sampler(
        "DDIMInverseScheduler",
        "DDIM Inverse",
        "Automatic",
        "ddim_inverse",
        _UNCLIPPED,
        "not for drawing: takes a picture's latents back to the noise that DDIM would draw them from",
        "ddim_inversion",
    ),
    _sampler(
        "DDPMScheduler",
        "DDPM",
        "Automatic",
        "ddpm",
        _UNCLIPPED,
        "the original chain: 1000 steps at its best, the reference for everything else",
    ),
)


def resolve(name: str) -> Sampler:
    """The sampler of that name: "DPM++ 2M Karras", "dpmpp_2m_karras", "Euler a", "DDIMScheduler".

    A sampler's name may be followed by any of `SCHEDULE_TYPES` and `LAYOUTS`: "Heun Beta", "DDIM SGM
    Uniform", "DPM++ 2M Align Your Steps". Upper and lower case, blanks, "-" and "_" do not matter. Raises
    RequestError for an unknown name, with the nearest known one and the whole list, and for a type that the
    scheduler does not have.
    """
    if not isinstance(name, str):
        raise RequestError(_unknown(name))
    found = _BY_NAME.get(_key(name)) or _with_schedule_type(_key(name))
    if found is None:
        raise RequestError(_unknown(name))
    return found


def _with_schedule_type(key: str) -> Sampler | None:
    """The sampler of a name that ends in a schedule type, if it is one."""
    for schedule_type in (*SCHEDULE_TYPES, *LAYOUTS, *_TYPE_ALIASES, "Uniform", *_NOT_HERE):
        suffix = f" {_key(schedule_type)}"
        sampler = _BY_NAME.get(key.removesuffix(suffix)) if key.endswith(suffix) else None
        if sampler is not None and sampler.schedule_type in PLAIN_TYPES:
            known = _TYPE_ALIASES.get(schedule_type, schedule_type)
            return sampler if known == "Uniform" else _laid_out(sampler, known)
    return None


def _laid_out(sampler: Sampler, schedule_type: str) -> Sampler:
    """A sampler in the form of a schedule type. Raises RequestError where diffusers has none."""
    named = _BY_NAME.get(_key(f"{sampler.sampler} {schedule_type}"))
    if named is not None:
        return named
    if schedule_type in _NOT_HERE:
        raise RequestError(
            f"schedule type {schedule_type!r} is not known here. Take one of"
            f" {', '.join(dict.fromkeys([*SCHEDULE_TYPES, *LAYOUTS]))}, or give the noise levels as sigmas"
        )
    model, _ = SOLVERS[sampler.scheduler]
    fields = {} if sampler.scheduler in _OWN_LAYOUT else model.model_fields
    decided = SCHEDULE_TYPES.get(schedule_type, {})
    lacking = [n for n, value in decided.items() if value and (n not in fields or n in model.lacks)]
    own = decided and not lacking  # whether diffusers' config can say so
    if not own and (not fields or "sigmas" not in model.accepts or schedule_type not in LAYOUTS):
        raise RequestError(
            f"{sampler.sampler} has no {schedule_type} form: {sampler.scheduler} decides its own noise"
            f" levels, here as in diffusers. Take plain {sampler.name!r}"
        )
    overrides = {**sampler.overrides, **{n: value for n, value in decided.items() if n in fields}}
    return replace(
        sampler,
        schedule_type=schedule_type,
        short_name=f"{sampler.short_name}_{_key(schedule_type).replace(' ', '_')}",
        overrides=MappingProxyType(overrides),
        aliases=(),
        layout="" if own else schedule_type,
    )


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold().replace("++", "pp")


def _spellings(sampler: Sampler) -> tuple[str, ...]:
    with_type = f"{sampler.sampler} {sampler.schedule_type}"
    return (sampler.name, with_type, sampler.short_name, *sampler.aliases)


def _by_name() -> dict[str, Sampler]:
    names = {_key(spelling): sampler for sampler in SAMPLERS for spelling in _spellings(sampler)}
    for sampler in reversed(SAMPLERS):
        names[_key(sampler.scheduler)] = replace(sampler, overrides=MappingProxyType({}))
    return names


def _unknown(name: object) -> str:
    key = _key(str(name))
    for reason, names in _ELSEWHERE.items():
        if key in map(_key, names) or any(key.startswith(f"{_key(other)} ") for other in names):
            return f"scheduler {name!r} {reason}"
    known = list(dict.fromkeys([*(s.name for s in SAMPLERS), *(s.short_name for s in SAMPLERS)]))
    known += sorted({s.scheduler for s in SAMPLERS})
    nearest = get_close_matches(_key(str(name)), _BY_NAME, n=1, cutoff=0.5)
    hint = f"; did you mean {_BY_NAME[nearest[0]].name!r}?" if nearest else "."
    return f"unknown scheduler {name!r}{hint} Known: {', '.join(known)}"


_BY_NAME = _by_name()
