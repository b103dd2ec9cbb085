"""AUTOMATIC1111's schedule types: how the noise levels are spaced, as fields of a scheduler's config."""

from collections.abc import Mapping
from typing import Any

NO_OTHER_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}
PLAIN = {"use_karras_sigmas": False}
KARRAS = {"use_karras_sigmas": True}
EXPONENTIAL = NO_OTHER_SIGMAS | PLAIN | {"use_exponential_sigmas": True}

PLAIN_TYPES = ("Automatic", "Uniform")
"""AUTOMATIC1111's schedule types that leave the noise levels as the scheduler's config spaces them."""

_AS_SPACED = NO_OTHER_SIGMAS | PLAIN | {"use_lu_lambdas": False}
SCHEDULE_TYPES: Mapping[str, Mapping[str, Any]] = {
    "Karras": _AS_SPACED | KARRAS,
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

NOT_HERE = ("Align Your Steps GITS", "Align Your Steps 11", "Align Your Steps 32", "Linear Quadratic")
"""Those of AUTOMATIC1111's that are not here."""

TYPE_ALIASES = {  # names that others have for them, and AUTOMATIC1111's own short ones
    "DDIM Uniform": "DDIM",
    "AYS": "Align Your Steps",
    "SGMUniform": "SGM Uniform",
    "ka": "Karras",
    "exp": "Exponential",
}
