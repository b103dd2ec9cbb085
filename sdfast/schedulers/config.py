"""Scheduler configs as diffusers writes them: what all classes share, and how a config is read.

A checkpoint's `scheduler_config.json` was written for one class and is read by another whenever a user picks
a scheduler. `read` does what diffusers' `Class.from_config(config, **overrides)` does: fields of other
classes are ignored, missing ones take the class's defaults.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sdfast.errors import RequestError

MAX_TRAIN_TIMESTEPS = 100_000

_NOT_LINEAR = "it is not linear, so it cannot be a table; write false into the scheduler config"
FLOW = "flow models are not supported; set it to false"
REFUSED = {  # options that must be off in every class that has them, and why
    "clip_sample": _NOT_LINEAR,
    "thresholding": _NOT_LINEAR,
    "use_flow_sigmas": FLOW,
    "use_dynamic_shifting": FLOW,
}


class SchedulerConfig(BaseModel):
    """The fields that every supported class shares."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    scheduler: ClassVar[str]  # the diffusers class
    sampler_name: ClassVar[str]  # AUTOMATIC1111's
    accepts: ClassVar[frozenset[str]] = frozenset()  # of "timesteps", "sigmas", "eta"
    refused: ClassVar[Mapping[str, str]] = {}  # further options that must be off, and why
    whole_timesteps: ClassVar[bool] = True  # whether custom timesteps must be whole
    lacks: ClassVar[frozenset[str]] = frozenset()  # shared fields that this class ignores, as in diffusers
    ends_noisy: ClassVar[bool] = False  # whether a run cannot end at σ = 0

    num_train_timesteps: int = Field(1000, ge=1, le=MAX_TRAIN_TIMESTEPS)
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = Field(0, ge=0, le=MAX_TRAIN_TIMESTEPS)
    rescale_betas_zero_snr: bool = False

    @property
    def sampler(self) -> str:
        """AUTOMATIC1111's name of the sampler, for the parameters written into a picture."""
        return self.sampler_name

    @property
    def schedule_type(self) -> str:
        """AUTOMATIC1111's name of how the noise levels are laid out."""
        return "Automatic"

    @field_validator("trained_betas", mode="before")
    @classmethod
    def _as_tuple(cls, betas: Any) -> Any:
        """JSON has a list, a scheduler object may have an array; anything else goes on and is refused."""
        if isinstance(betas, np.ndarray):
            return tuple(betas.tolist())
        return tuple(betas) if isinstance(betas, list) else betas


class Clipping(BaseModel):
    """The fields of classes that can clip x0."""

    clip_sample: bool = False
    clip_sample_range: float = 1.0


class Thresholding(BaseModel):
    """The fields of classes that can threshold x0 dynamically."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0


class FlowSigmas(BaseModel):
    """The fields of classes that can also serve flow models."""

    use_flow_sigmas: bool = False
    flow_shift: float = 1.0


class DynamicShifting(FlowSigmas):
    """Those of classes that can shift a flow model's noise levels by the picture's size."""

    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"


class SigmaConfig(SchedulerConfig):
    """The fields of classes that can lay their noise levels out anew.

    sigma_min, sigma_max: not every class's own, but levels laid out anew obey them also when they come along
    in the config of another class.
    """

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = Field(None, gt=0, allow_inf_nan=False)
    sigma_max: float | None = Field(None, gt=0, allow_inf_nan=False)

    @property
    def schedule_type(self) -> str:
        return self.respacing or "Automatic"

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """(σ_min, σ_max) of levels laid out anew, where the config says them."""
        return self.sigma_min, self.sigma_max

    @property
    def respacing(self) -> str | None:
        """AUTOMATIC1111's name of the layout that replaces the timesteps', if any."""
        if self.use_karras_sigmas:
            return "Karras"
        if self.use_exponential_sigmas:
            return "Exponential"
        return "Beta" if self.use_beta_sigmas else None

    @model_validator(mode="after")
    def _one_respacing(self) -> Self:
        chosen = [name for name in RESPACINGS if getattr(self, name, False)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; set one of them")
        return self


RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

Config = TypeVar("Config", bound=SchedulerConfig)


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
    known = [name for name in model.model_fields if name not in model.lacks]
    fields = {name: config[name] for name in known if name in config and name not in unset}
    try:
        settings = model(**{**fields, **overrides})
    except ValidationError as error:
        raise RequestError(
            f"{model.scheduler}: {_story(error)}; change the scheduler config or take another one"
        ) from None
    for name, reason in {**REFUSED, **model.refused}.items():
        if getattr(settings, name, None):
            raise RequestError(
                f"{model.scheduler}: {name}={getattr(settings, name)!r} is not supported: {reason}"
            )
    _check_betas(settings)
    return settings


def ending_at(config: Config, sigma: float) -> Config:
    """`config` for a run whose noise levels are given, the last one `sigma`: it decides nothing of them.

    Raises RequestError for a class that cannot go to no noise.
    """
    if config.ends_noisy and not sigma:
        raise RequestError(
            f"{config.scheduler} cannot go to sigma 0, here as in diffusers; end the sigmas above 0"
        )
    decided = dict.fromkeys(RESPACINGS, False)
    final = {"final_sigmas_type": "sigma_min" if sigma else "zero"}
    fields = type(config).model_fields
    return config.model_copy(update={n: value for n, value in (decided | final).items() if n in fields})


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
