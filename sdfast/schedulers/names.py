"""What people call a scheduler: diffusers class names, AUTOMATIC1111 and ComfyUI names, short names."""

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType

from sdfast.errors import RequestError
from sdfast.schedulers.layouts import LAYOUTS
from sdfast.schedulers.samplers import SAMPLERS, Sampler
from sdfast.schedulers.schedule_types import NOT_HERE, PLAIN_TYPES, SCHEDULE_TYPES, TYPE_ALIASES
from sdfast.schedulers.solvers import SOLVERS

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
    for schedule_type in (*SCHEDULE_TYPES, *LAYOUTS, *TYPE_ALIASES, "Uniform", *NOT_HERE):
        suffix = f" {_key(schedule_type)}"
        sampler = _BY_NAME.get(key.removesuffix(suffix)) if key.endswith(suffix) else None
        if sampler is not None and sampler.schedule_type in PLAIN_TYPES:
            known = TYPE_ALIASES.get(schedule_type, schedule_type)
            return sampler if known == "Uniform" else _laid_out(sampler, known)
    return None


def _laid_out(sampler: Sampler, schedule_type: str) -> Sampler:
    """A sampler in the form of a schedule type. Raises RequestError where diffusers has none."""
    named = _BY_NAME.get(_key(f"{sampler.sampler} {schedule_type}"))
    if named is not None:
        return named
    if schedule_type in NOT_HERE:
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
