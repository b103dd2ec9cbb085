"""Scheduler configs as diffusers writes them: one model per class, its fields and its defaults.

A checkpoint's `scheduler_config.json` was written for one class and is read by another whenever a user picks
a scheduler. `read` does what diffusers' `Class.from_config(config, **overrides)` does: fields of other
classes are ignored, missing ones take the class's defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sdfast.errors import RequestError

MAX_TRAIN_TIMESTEPS = 100_000

_NOT_LINEAR = "it is not linear, so it cannot be a table; write false into the scheduler config"
_SPACING = "only Karras sigmas and the plain timestep spacings are supported; set it to false"


class SchedulerConfig(BaseModel):
    """The fields that every supported class shares."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    scheduler: ClassVar[str]  # the diffusers class
    accepts: ClassVar[frozenset[str]] = frozenset()  # of "timesteps", "sigmas", "eta"
    refused: ClassVar[Mapping[str, str]] = {}  # options that must be off, and why

    num_train_timesteps: int = Field(1000, ge=1, le=MAX_TRAIN_TIMESTEPS)
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = Field(0, ge=0, le=MAX_TRAIN_TIMESTEPS)
    rescale_betas_zero_snr: bool = False

    @field_validator("trained_betas", mode="before")
    @classmethod
    def _as_tuple(cls, betas: Any) -> Any:
        """JSON has a list, a scheduler object may have an array; anything else goes on and is refused."""
        if isinstance(betas, np.ndarray):
            return tuple(betas.tolist())
        return tuple(betas) if isinstance(betas, list) else betas


class DDPMConfig(SchedulerConfig):
    scheduler = "DDPMScheduler"
    accepts = frozenset({"timesteps"})
    refused: ClassVar[Mapping[str, str]] = {"clip_sample": _NOT_LINEAR, "thresholding": _NOT_LINEAR}

    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"


class DDIMConfig(SchedulerConfig):
    scheduler = "DDIMScheduler"
    accepts = frozenset({"eta"})
    refused: ClassVar[Mapping[str, str]] = {"clip_sample": _NOT_LINEAR, "thresholding": _NOT_LINEAR}

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"


class PNDMConfig(SchedulerConfig):
    scheduler = "PNDMScheduler"

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"

    @field_validator("rescale_betas_zero_snr", mode="before")
    @classmethod
    def _not_an_option_here(cls, _: Any) -> bool:
        return False  # the diffusers class has none: what another class's config says of it is ignored


class EulerConfig(SchedulerConfig):
    scheduler = "EulerDiscreteScheduler"
    accepts = frozenset({"timesteps", "sigmas"})
    refused: ClassVar[Mapping[str, str]] = {"use_exponential_sigmas": _SPACING, "use_beta_sigmas": _SPACING}

    prediction_type: Literal["epsilon", "sample", "v_prediction", "original_sample"] = "epsilon"  # type: ignore[assignment]
    interpolation_type: Literal["linear"] = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = Field(None, gt=0, allow_inf_nan=False)
    sigma_max: float | None = Field(None, gt=0, allow_inf_nan=False)
    timestep_type: Literal["discrete"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @field_validator("prediction_type", mode="before")
    @classmethod
    def _old_name(cls, prediction: Any) -> Any:
        return "sample" if prediction == "original_sample" else prediction


class EulerAncestralConfig(SchedulerConfig):
    scheduler = "EulerAncestralDiscreteScheduler"

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class DPMSolverConfig(SchedulerConfig):
    """The last two fields are not the diffusers class's own, but its Karras sigmas obey them when they come
    along in the config of another class."""

    scheduler = "DPMSolverMultistepScheduler"
    accepts = frozenset({"timesteps"})
    refused: ClassVar[Mapping[str, str]] = {
        "thresholding": _NOT_LINEAR,
        "use_exponential_sigmas": _SPACING,
        "use_beta_sigmas": _SPACING,
        "use_lu_lambdas": _SPACING,
        "use_flow_sigmas": "flow models are not supported; set it to false",
        "use_dynamic_shifting": "flow models are not supported; set it to false",
        "variance_type": "models that predict a variance are not supported; set it to null",
    }

    solver_order: Literal[1, 2] = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    sigma_min: float | None = Field(None, gt=0, allow_inf_nan=False)
    sigma_max: float | None = Field(None, gt=0, allow_inf_nan=False)

    @field_validator("algorithm_type", mode="before")
    @classmethod
    def _deis_means_dpmpp(cls, algorithm: Any) -> Any:
        return "dpmsolver++" if algorithm == "deis" else algorithm  # as diffusers does

    @field_validator("solver_type", mode="before")
    @classmethod
    def _other_solvers_mean_midpoint(cls, solver: Any) -> Any:
        return "midpoint" if solver in ("logrho", "bh1", "bh2") else solver  # as diffusers does


Config = TypeVar("Config", bound=SchedulerConfig)


@dataclass(frozen=True)
class Run:
    """What one request asks, already checked: [K] timesteps, or [K + 1] sigmas, or just K steps."""

    steps: int
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    eta: float


def own_config(scheduler: Any) -> dict[str, Any]:
    """The config of a diffusers scheduler object, marked as its own: it holds as it stands."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def read(model: type[Config], config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """`config` as the class `model` sees it. Raises RequestError naming each field that cannot be honoured.

    `_use_default_values` lists the fields that the config's author never set. Another class fills those with
    its own defaults, as in diffusers; the class that wrote the config reads them as they stand.
    """
    own = config.get("_class_name") == model.scheduler
    unset = () if own else config.get("_use_default_values") or ()
    fields = {name: config[name] for name in model.model_fields if name in config and name not in unset}
    try:
        settings = model(**{**fields, **overrides})
    except ValidationError as error:
        raise RequestError(
            f"{model.scheduler}: {_story(error)}; change the scheduler config or take another one"
        ) from None
    for name, reason in model.refused.items():
        if getattr(settings, name):
            raise RequestError(
                f"{model.scheduler}: {name}={getattr(settings, name)!r} is not supported: {reason}"
            )
    _check_betas(settings)
    return settings


def _story(error: ValidationError) -> str:
    """One clause per refused field: its name, its value, what is allowed."""
    clauses = [f"{'.'.join(map(str, e['loc']))}={repr(e['input'])[:60]} ({e['msg']})" for e in error.errors()]
    return "cannot honour " + "; ".join(clauses[:3])


def _check_betas(settings: SchedulerConfig) -> None:
    betas, T = settings.trained_betas, settings.num_train_timesteps
    if betas is None:
        return
    if len(betas) != T:
        raise RequestError(
            f"trained_betas has {len(betas)} values for num_train_timesteps={T}; give one per timestep"
        )
    if not all(0 < beta < 1 for beta in betas):
        raise RequestError("trained_betas must all lie between 0 and 1 (exclusive)")
