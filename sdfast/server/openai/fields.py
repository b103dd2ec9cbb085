"""The fields of `/v1/images/generations` and `edits`, and the `sdfast.request.Request` that they ask for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from sdfast.emphasis import Emphasis
from sdfast.errors import RequestError
from sdfast.request import DEFAULT_IMAGE_GUIDANCE, ControlMode, Request, check_text
from sdfast.schedulers import resolve
from sdfast.server.body import Neutral, check_neutral
from sdfast.server.encoding import Format
from sdfast.server.jobs import EngineInfo
from sdfast.server.problems import Problem, of_request_error

STEPS, GUIDANCE, SCHEDULER = 20, 7.0, "dpmpp_2m_karras"  # as `sdfast generate`'s own
STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # as diffusers' pipelines for images, and for images with masks
CONTROL_SCALE = 1.0  # as diffusers' pipelines with ControlNets
CONTROL_IMAGE = "control_image"
IMAGE_SCALE = 1.0  # as diffusers' pipelines with IP-Adapters
IP_ADAPTER_IMAGE = "ip_adapter_image"
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_ONE_PICTURE = "pictures do not move here; leave it out"
_NO_SVG = "pictures have pixels; leave it out"
NEUTRAL: Mapping[str, Neutral] = {
    "response_format": (
        ("b64_json",),
        "the server keeps no files that a url could lead to; ask for b64_json",
    ),
    "quality": (("auto", "standard"), "give num_inference_steps instead; more steps take longer"),
    "style": (("vivid",), "say it in the prompt"),  # vivid is what the API means where nothing is said
    "background": (("auto", "opaque"), "pictures have no transparency here; leave it out"),
    "moderation": (("auto", "low"), "the server does not moderate; leave it out"),
    "complexity": ((), _NO_SVG),
    "svg": ((), _NO_SVG),
    "frame_count": ((1,), _ONE_PICTURE),
    "frame_duration_ms": ((), _ONE_PICTURE),
    "input_fidelity": (("low",), "a lower strength keeps more of the image"),
}
"""Fields of the API that mean nothing here."""


class Generation(BaseModel):
    """A body, checked field by field; null is the same as nothing.

    user, safety_identifier: who asks, for a service that watches its users; checked and forgotten. progress:
    of a stream, whether it tells the job's place in the queue and its steps. control_image: a file as base64,
    or of several ControlNets a list of one for each; of a form they are files, and not among its texts.
    ip_adapter_image: likewise, of IP-Adapters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    prompt: str
    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=10)
    size: str | None = None
    quality: str | None = None
    response_format: str | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    background: str | None = None
    moderation: str | None = None
    style: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    complexity: str | None = None
    svg: Any = None
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    negative_prompt: str | None = None
    seed: int | None = None  # from here on, `sdfast.request.Request` knows the bounds
    variation_seed: int | None = None
    variation_strength: float | None = None
    seed_resize_from: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    cache_interval: int | None = None
    pag_scale: float | None = None
    pag_adaptive_scale: float | None = None
    scheduler: str | None = None
    eta: float | None = None
    clip_skip: int | None = None
    long_prompts: Literal["truncate", "chunk"] | None = None
    emphasis: Emphasis | None = None
    prompt_editing: bool | None = None
    control_image: str | list[str | None] | None = None
    controlnet_conditioning_scale: float | list[float] | None = None
    control_guidance_start: float | list[float] | None = None
    control_guidance_end: float | list[float] | None = None
    control_mode: ControlMode | list[ControlMode] | None = None
    loras: dict[str, float | list[float]] | None = None
    ip_adapter_image: str | list[str | None] | None = None
    ip_adapter_scale: float | dict[str, Any] | list[float | dict[str, Any]] | None = None
    progress: bool | None = None

    @field_validator("*")
    @classmethod
    def _text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and info.field_name not in (CONTROL_IMAGE, IP_ADAPTER_IMAGE):
            check_text(value)
        return value

    @field_validator(*NEUTRAL, check_fields=False)  # some are of edits alone
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        check_neutral(value, NEUTRAL[str(info.field_name)])
        return value

    @field_validator("size")
    @classmethod
    def _pixels(cls, size: str | None) -> str | None:
        if size is not None and size != "auto" and _SIZE.fullmatch(size) is None:
            raise ValueError('must be "auto", or WIDTHxHEIGHT in pixels, such as "512x512"')
        return size

    @field_validator("seed_resize_from")
    @classmethod
    def _of_another(cls, size: str | None) -> str | None:
        if size is not None and _SIZE.fullmatch(size) is None:
            raise ValueError('must be WIDTHxHEIGHT in pixels, such as "512x512"')
        return size

    @field_validator("output_compression")
    @classmethod
    def _of_lossy(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, 100) and info.data.get("output_format") not in ("webp", "jpeg"):
            raise ValueError("is for output_format webp and jpeg; leave it out, PNG loses nothing")
        return value

    @field_validator("partial_images", "progress")
    @classmethod
    def _of_streams(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not info.data.get("stream"):
            raise ValueError("needs stream: true")
        return value

    @property
    def format(self) -> Format:
        return self.output_format or "png"

    @property
    def compression(self) -> int:
        """The quality of webp and jpeg, 100 the best, as the API counts it."""
        return 100 if self.output_compression is None else self.output_compression

    def under_control(self, off: Sequence[bool]) -> Self:
        """With a scale for the control images, where none is given the one that diffusers' pipelines have.

        off: of each ControlNet, whether it has no image and is to add nothing.
        """
        scale = _scale_of(self.controlnet_conditioning_scale, CONTROL_SCALE, off)
        return self.model_copy(update={"controlnet_conditioning_scale": scale})

    def seeing(self, off: Sequence[bool]) -> Self:
        """The same of the images of IP-Adapters."""
        scale = _scale_of(self.ip_adapter_scale, IMAGE_SCALE, off)
        return self.model_copy(update={"ip_adapter_scale": scale})

    def request(self, height: int, width: int) -> Request:
        """What is to be drawn, of this size in pixels where none is asked for. Raises `Problem` naming the
        API's field."""
        given = self.model_dump(include=_SAME, exclude_none=True)
        if self.size not in (None, "auto"):
            width, height = map(int, str(self.size).split("x"))
        if self.seed_resize_from is not None:
            given["seed_resize_from"] = tuple(map(int, self.seed_resize_from.split("x")))[::-1]
        try:
            return Request.make(
                prompts=(self.prompt,),
                negative_prompts=(self.negative_prompt,),
                height=height,
                width=width,
                num_images_per_prompt=self.n or 1,
                **{**_DEFAULTS, **given, "scheduler": self._sampler()},
            )
        except RequestError as error:
            raise of_request_error(error, FIELDS) from None

    def _sampler(self) -> str:
        """The scheduler's name, which is a known one."""
        if self.scheduler is None:
            return SCHEDULER
        try:
            resolve(self.scheduler)
        except RequestError as error:
            raise of_request_error(error, FIELDS, "scheduler") from None
        return self.scheduler


class Edit(Generation):
    """The texts of a form. strength: how much of the image is drawn over, 1.0 all of it.
    image_guidance_scale: in its place, of an engine that edits images as the prompt says. padding_mask_crop:
    that only what the mask leaves open, with so many pixels around, is drawn."""

    strength: float | None = Field(default=None, gt=0.0, le=1.0)
    image_guidance_scale: float | None = None
    padding_mask_crop: int | None = None
    input_fidelity: str | None = None

    def over(self, masked: bool, instructed: bool) -> Self:
        """With a strength, or for an engine that edits images a guidance, where none is given those that
        diffusers' pipelines have."""
        if instructed:
            guidance = self.image_guidance_scale
            if guidance is None and self.strength is None:
                guidance = DEFAULT_IMAGE_GUIDANCE
            return self.model_copy(update={"image_guidance_scale": guidance})
        if self.image_guidance_scale is not None:
            return self  # which is refused by name
        default = MASKED_STRENGTH if masked else STRENGTH
        return self.model_copy(update={"strength": self.strength or default})


def _scale_of(given: Any, usual: float, off: Sequence[bool]) -> Any:
    """What is given, or else the usual scale; 0 of those that are off."""
    scale = usual if given is None else given
    each = scale if isinstance(scale, list) else [scale] * len(off)
    if not any(off) or len(each) != len(off):  # which is refused by name
        return scale
    return [0.0 if it else one for one, it in zip(each, off, strict=True)]


FIELDS = frozenset(Edit.model_fields)
_SAME = {
    "seed",
    "variation_seed",
    "variation_strength",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "guidance_start",
    "guidance_end",
    "cache_interval",
    "pag_scale",
    "pag_adaptive_scale",
    "eta",
    "clip_skip",
    "long_prompts",
    "emphasis",
    "prompt_editing",
    "strength",
    "image_guidance_scale",
    "padding_mask_crop",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "control_mode",
    "loras",
    "ip_adapter_scale",
}
_DEFAULTS: Mapping[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


def check_begins(engine: EngineInfo, engines: Mapping[str, EngineInfo]) -> None:
    """Raises `Problem` for an engine that only goes on with pictures, or edits them."""
    if engine.refines or engine.instructed:
        begin = (name for name, info in engines.items() if not (info.refines or info.instructed))
        able = ", ".join(begin) or "none"
        does = "is SDXL's refiner, which draws over images" if engine.refines else "edits images as told"
        raise Problem(
            422,
            f"model: {engine.name} {does}: send one to /v1/images/edits, or take another engine; here are: "
            f"{able}",
            param="model",
            code="unsupported_model",
        )


def engine_of(name: str | None, engines: Mapping[str, EngineInfo]) -> EngineInfo:
    """The engine that a request names; the only one when it names none. Raises `Problem`."""
    there = ", ".join(engines)
    if name is None and len(engines) == 1:
        return next(iter(engines.values()))
    if name is None:
        raise Problem(422, f"model: is missing; there are: {there}", param="model", code="missing_field")
    if name not in engines:
        raise Problem(
            404, f"model: {name:.60} is not here; there are: {there}", param="model", code="model_not_found"
        )
    return engines[name]
