"""One generation request: the only place where what a caller asks for is checked."""

import math
import secrets
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sdfast.emphasis import Emphasis
from sdfast.errors import RequestError

MAX_PROMPT = 32_768  # characters
MAX_STEPS = 1_000
MAX_IMAGES = 128  # of one request
MAX_SIDE = 8_192  # pixels
MAX_GUIDANCE = 100.0
MAX_CONTROL = 10.0
SEED_LIMIT = 2**64
_SHOWN = 60  # characters of a bad value that an error repeats


class Request(BaseModel):
    """What to draw. Every field is checked; unknown fields are refused.

    `seed` gives image i of the request the generator of seed + i; `None` picks one at random when the request
    is made, so that it can always be told. `num_inference_steps`, `timesteps` and `sigmas` are alternatives.
    `strength`, with an image to draw over: the share of the steps that is done, as in diffusers.
    `controlnet_conditioning_scale`, with a control image: how much the ControlNet adds, in the steps between
    `control_guidance_start` and `control_guidance_end`, which are shares of all steps, as in diffusers.

    `long_prompts`: what becomes of prompts longer than the text encoder reads (75 tokens): "truncate" cuts
    them, as diffusers does, "chunk" reads them 75 tokens at a time, as AUTOMATIC1111 does. `emphasis`: how
    `(words:1.3)` count, see `sdfast.emphasis`; by default brackets are text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    prompts: tuple[str, ...] = Field(min_length=1)
    negative_prompts: tuple[str | None, ...]
    height: int = Field(ge=8, le=MAX_SIDE)  # pixels
    width: int = Field(ge=8, le=MAX_SIDE)  # pixels
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    timesteps: tuple[float, ...] | None = Field(default=None, max_length=MAX_STEPS)
    sigmas: tuple[float, ...] | None = Field(default=None, max_length=MAX_STEPS + 1)
    scheduler: str | None = None
    guidance_scale: float = Field(default=7.5, ge=0.0, le=MAX_GUIDANCE)
    guidance_rescale: float = Field(default=0.0, ge=0.0, le=1.0)
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    strength: float | None = Field(default=None, gt=0.0, le=1.0)
    controlnet_conditioning_scale: float | None = Field(default=None, ge=0.0, le=MAX_CONTROL)
    control_guidance_start: float = Field(default=0.0, ge=0.0, le=1.0)
    control_guidance_end: float = Field(default=1.0, ge=0.0, le=1.0)
    num_images_per_prompt: int = Field(default=1, ge=1, le=MAX_IMAGES)
    clip_skip: int | None = Field(default=None, ge=0, le=64)
    long_prompts: Literal["truncate", "chunk"] = "truncate"
    emphasis: Emphasis | None = None
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**32), ge=0, lt=SEED_LIMIT)

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """A checked request. Raises `RequestError` naming the field, what was given, and what is allowed."""
        given = {name: _plain(value) for name, value in fields.items()}
        try:
            return cls(**given)
        except ValidationError as error:
            raise RequestError(_explain(error)) from None

    @property
    def images(self) -> int:
        """How many pictures are asked for in all."""
        return len(self.prompts) * self.num_images_per_prompt

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed for each picture."""
        return tuple(self.seed + i for i in range(self.images))

    @field_validator("prompts", "negative_prompts")
    @classmethod
    def _drawable(cls, texts: tuple[str | None, ...]) -> tuple[str | None, ...]:
        for text in texts:
            if text is not None:
                check_text(text)
        return texts

    @field_validator("height", "width")
    @classmethod
    def _multiple_of_eight(cls, side: int) -> int:
        if side % 8:
            low = side // 8 * 8
            raise ValueError(f"must be a multiple of 8; the nearest are {low} and {low + 8}")
        return side

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [n for n in ("num_inference_steps", "timesteps", "sigmas") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of num_inference_steps, timesteps, sigmas (got {given or 'none'})"
            )
        if len(self.negative_prompts) != len(self.prompts):
            raise ValueError(
                f"negative_prompts: {len(self.negative_prompts)} for {len(self.prompts)} prompts; "
                "give one for each, or a single one for all"
            )
        if self.images > MAX_IMAGES:
            raise ValueError(
                f"num_images_per_prompt: {self.num_images_per_prompt} for {len(self.prompts)} prompts are "
                f"{self.images} pictures; at most {MAX_IMAGES} in one request"
            )
        span = (self.control_guidance_start, self.control_guidance_end)
        if span[0] >= span[1]:
            raise ValueError(
                f"control_guidance_start: {span[0]:g} is not below control_guidance_end, {span[1]:g}"
            )
        if self.controlnet_conditioning_scale is None and span != (0.0, 1.0):
            raise ValueError(
                "control_guidance_start and control_guidance_end are for a control image; give one, or leave "
                "them out"
            )
        if self.seed + self.images > SEED_LIMIT:
            raise ValueError(f"seed: {self.seed} leaves no seeds below 2**64 for {self.images} pictures")
        return self


def check_text(text: str) -> None:
    if len(text) > MAX_PROMPT:
        raise ValueError(f"{len(text)} characters; at most {MAX_PROMPT}")
    if "\0" in text:
        raise ValueError("holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text; remove it") from None


def _plain(value: Any) -> Any:
    """Numpy scalars and lists as the strict schema wants them; everything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, np.ndarray)):
        return tuple(_plain(item) for item in value)
    return value


def _explain(error: ValidationError) -> str:
    """One line: the field, what is wrong with it, what was given."""
    first: Mapping[str, Any] = error.errors()[0]
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if not first["loc"]:
        return message
    field, given = ".".join(str(part) for part in first["loc"]), first["input"]
    if first["type"] == "missing":
        return f"{field}: is missing"
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown; the fields are: {', '.join(Request.model_fields)}"
    if isinstance(given, float) and not math.isfinite(given):
        message = "must be a finite number"
    return f"{field}: {message} (got {shown(given)})"


def shown(value: Any) -> str:
    """A value in short, on one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integers beyond some thousand digits
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
