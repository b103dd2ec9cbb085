"""The fields of txt2img and img2img, and the `sdfast.request.Request` that they ask for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from sdfast.errors import RequestError
from sdfast.experts import SWITCH_AT
from sdfast.request import (
    DEFAULT_IMAGE_GUIDANCE,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SIDE,
    MAX_STEPS,
    SEED_LIMIT,
    UPSCALERS,
    Hires,
    MaskedContent,
    Request,
    Upscaler,
    check_text,
)
from sdfast.schedulers import Sampler
from sdfast.server.automatic1111 import controlnet, networks
from sdfast.server.automatic1111.controlnet import Unit
from sdfast.server.automatic1111.options import clip_skip_of, emphasis_of
from sdfast.server.automatic1111.samplers import eta_of, sampler_of
from sdfast.server.body import Neutral, check_neutral
from sdfast.server.jobs import EngineInfo
from sdfast.server.problems import Problem, of_request_error

SAMPLER, STEPS, GUIDANCE = "Euler", 50, 7.0  # AUTOMATIC1111's, where nothing is said
DENOISING_STRENGTH, MASK_BLUR, HR_SCALE = 0.75, 4, 2.0
UPSCALERS_HERE: Mapping[str, Upscaler] = {**UPSCALERS, "None": "lanczos"}
"""AUTOMATIC1111's names; without an upscaler pictures are resized by Lanczos there, too."""
MASKED_CONTENTS: Sequence[MaskedContent] = ("fill", "original", "latent_noise", "latent_nothing")
"""What `inpainting_fill` numbers; where it says nothing, the first."""

_NO_SCRIPTS = "there are no scripts here but ControlNet; leave it out"
_SAVES_NOTHING = "the server saves nothing; save what it answers"
_NEUTRAL: Mapping[str, Neutral] = {
    "styles": (([],), "there are no styles here; put their text into the prompt"),
    "restore_faces": ((False,), "faces are as the engine draws them; leave it out"),
    "tiling": ((False,), "pictures are not made to tile; leave it out"),
    "s_churn": ((0,), "samplers add no noise of their own; take an ancestral sampler such as Euler a"),
    "s_min_uncond": ((0,), "every step has its negative prompt; leave it out"),
    "firstpass_image": ((), "txt2img starts from noise; take img2img"),
    "comments": (({},), "it has no meaning in a request; leave it out"),
    "script_name": (("", "None"), _NO_SCRIPTS),
    "script_args": (([],), _NO_SCRIPTS),
    "save_images": ((False,), _SAVES_NOTHING),
    "infotext": (("",), "say what it says in the fields themselves"),
    "initial_noise_multiplier": ((1,), "noise has its scheduler's strength; leave it out"),
    "latent_mask": ((), "give mask"),
    "mask_round": ((True,), "a mask is rounded for the latents; leave it out"),
}
"""Fields that mean nothing here."""


class Generation(BaseModel):
    """What both calls have. Null is the same as nothing.

    What means something beside another field only has the right type, no more: s_tmin, s_tmax and s_noise
    with s_churn, refiner_switch_at with refiner_checkpoint.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    prompt: str | None = None
    negative_prompt: str | None = None
    styles: list[str] | None = None
    seed: int | None = Field(default=None, ge=-1, lt=SEED_LIMIT)
    subseed: int | None = Field(default=None, ge=-1, lt=SEED_LIMIT)
    subseed_strength: float | None = Field(default=None, ge=0, le=1)
    seed_resize_from_h: int | None = Field(default=None, ge=-1, le=MAX_SIDE)
    seed_resize_from_w: int | None = Field(default=None, ge=-1, le=MAX_SIDE)
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    n_iter: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    cfg_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)
    width: int | None = None
    height: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    eta: float | None = Field(default=None, ge=0, le=1)
    denoising_strength: float | None = Field(default=None, ge=0, le=1)
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = Field(default=None, gt=0, le=1)
    disable_extra_networks: bool | None = None
    firstpass_image: Any = None
    comments: dict[str, Any] | None = None
    force_task_id: str | None = Field(default=None, max_length=256)
    script_name: str | None = None
    script_args: list[Any] | None = None
    send_images: bool | None = None
    save_images: bool | None = None
    alwayson_scripts: dict[str, Any] | None = None
    infotext: str | None = None

    @field_validator("*")
    @classmethod
    def _text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and info.field_name != "mask":
            check_text(value)
        return value

    @field_validator(*_NEUTRAL, check_fields=False)  # some are of one call alone
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        check_neutral(value, _NEUTRAL[str(info.field_name)], json.dumps)
        return value

    @field_validator("prompt")
    @classmethod
    def _understood(cls, prompt: str | None) -> str | None:
        networks.parse(prompt or "")
        return prompt

    @field_validator("seed_resize_from_h", "seed_resize_from_w")
    @classmethod
    def _of_whole_latents(cls, side: int | None) -> int | None:
        if side and side > 0 and side % 8:
            raise ValueError("must be a multiple of 8")
        return side

    @field_validator("refiner_checkpoint")
    @classmethod
    def _some_refiner(cls, checkpoint: str | None) -> str | None:
        return None if checkpoint in ("", "None") else checkpoint

    @field_validator("alwayson_scripts")
    @classmethod
    def _no_others(cls, scripts: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, script in (scripts or {}).items():
            if name.lower() == controlnet.SCRIPT:  # which `unit_of` looks at
                continue
            if not isinstance(script, dict) or script.get("args"):
                raise ValueError(f"{name:.60} is not supported: {_NO_SCRIPTS}")
        return scripts

    @field_validator("n_iter")
    @classmethod
    def _not_too_many(cls, iterations: int | None, info: ValidationInfo) -> int | None:
        if (iterations or 1) * (info.data.get("batch_size") or 1) > MAX_IMAGES:
            raise ValueError(f"times batch_size must be {MAX_IMAGES} pictures at most in one request")
        return iterations

    @field_validator("override_settings_restore_afterwards")
    @classmethod
    def _restored(cls, restored: bool | None, info: ValidationInfo) -> bool | None:
        if restored is False and info.data.get("override_settings"):
            raise ValueError(
                "is not supported: settings are for one request; for all, POST the checkpoint to /options"
            )
        return restored

    @property
    def images(self) -> int:
        return (self.batch_size or 1) * (self.n_iter or 1)

    def request(
        self, engine: EngineInfo, units: Sequence[Unit | None] = (), adapters: Sequence[Unit | None] = ()
    ) -> tuple[Request, Sampler]:
        """What `engine` is to draw, its ControlNets as `units` say and its IP-Adapters as `adapters` do, and
        the sampler that does.

        Raises `Problem` naming the API's field.
        """
        scheduler, sampler = sampler_of(self.sampler_name or self.sampler_index or SAMPLER, self.scheduler)
        try:
            told = {**controlnet.fields_of(units), **controlnet.adapter_fields_of(adapters)}
            return self._request(engine, told, scheduler, eta_of(self.eta, sampler)), sampler
        except RequestError as error:
            raise of_request_error(error, type(self).model_fields) from None

    def _request(self, engine: EngineInfo, told: Mapping[str, Any], scheduler: str, eta: float) -> Request:
        prompt, loras = self._parsed(self.prompt or "", engine, "prompt")
        return Request.make(
            prompts=(prompt,),
            negative_prompts=(self.negative_prompt,),
            height=self.size(engine)[0],
            width=self.size(engine)[1],
            num_inference_steps=self.steps or STEPS,
            scheduler=scheduler,
            guidance_scale=GUIDANCE if self.cfg_scale is None else self.cfg_scale,
            eta=eta,
            **self.over(engine),
            num_images_per_prompt=self.images,
            clip_skip=clip_skip_of(self.override_settings or {}, engine),
            long_prompts="chunk",
            emphasis=emphasis_of(self.override_settings or {}),
            prompt_editing=True,
            loras=loras,
            hires=self.second_pass(engine, scheduler),
            **told,
            **({} if self.seed in (None, -1) else {"seed": self.seed}),
            **self._variation(),
        )

    def _variation(self) -> dict[str, Any]:
        """`Request`'s fields of it. Raises `Problem` for half a size."""
        sides = [max(side or 0, 0) for side in (self.seed_resize_from_h, self.seed_resize_from_w)]
        if any(sides) and not all(sides):
            raise Problem(
                422,
                "seed_resize_from_w: give seed_resize_from_h beside it, or neither",
                param="seed_resize_from_w",
            )
        resized = {"seed_resize_from": tuple(sides)} if all(sides) else {}
        if not self.subseed_strength:
            return resized
        seed = None if self.subseed == -1 else self.subseed
        return {**resized, "variation_seed": seed, "variation_strength": self.subseed_strength}

    def _parsed(self, prompt: str, engine: EngineInfo, field: str) -> tuple[str, dict[str, networks.Scales]]:
        """The text of a prompt, and the LoRAs in it. Raises `Problem` for one that is not there."""
        text, loras = networks.parse(prompt)
        if self.disable_extra_networks:
            return text, {}
        networks.check_known(loras, engine, field)
        return text, loras

    @property
    def switch_at(self) -> float:
        """The share of the denoising at which it does."""
        return SWITCH_AT if self.refiner_switch_at is None else self.refiner_switch_at

    def over(self, engine: EngineInfo) -> Mapping[str, Any]:
        """`Request`'s fields of an image; none without one."""
        return {}

    def size(self, engine: EngineInfo) -> tuple[int, int]:
        """`Request`'s height and width."""
        height = engine.default_height if self.height is None else self.height
        return height, engine.default_width if self.width is None else self.width

    def second_pass(self, engine: EngineInfo, scheduler: str) -> Hires | None:
        """`Request.hires`. scheduler: the first pass's. Raises `Problem`."""
        return None

    def echo(self) -> dict[str, Any]:
        """What the answer repeats."""
        return self.model_dump()


class TextToImage(Generation):
    """`/txt2img`. denoising_strength, hr_* and firstphase_* mean something with enable_hr only."""

    enable_hr: bool | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = Field(default=None, ge=0, le=MAX_STEPS)
    hr_resize_x: int | None = Field(default=None, ge=0, le=MAX_SIDE)
    hr_resize_y: int | None = Field(default=None, ge=0, le=MAX_SIDE)
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None

    @field_validator("hr_prompt")
    @classmethod
    def _understood_again(cls, prompt: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("enable_hr"):
            networks.parse(prompt or "")
        return prompt

    @field_validator("hr_upscaler")
    @classmethod
    def _known(cls, name: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("enable_hr") and name and name not in UPSCALERS_HERE:
            raise ValueError(f"is not here; there are: {', '.join(UPSCALERS_HERE)}")
        return name

    @field_validator("hr_checkpoint_name")
    @classmethod
    def _same_engine(cls, name: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("enable_hr") and name not in (None, "", "Use same checkpoint"):
            raise ValueError("is not supported: one engine draws both passes; leave it out")
        return name

    def size(self, engine: EngineInfo) -> tuple[int, int]:
        first = (self.firstphase_height or 0, self.firstphase_width or 0)
        if not self.enable_hr or first == (0, 0):
            return super().size(engine)
        if not all(first):
            raise Problem(
                422,
                "firstphase_width: give firstphase_height beside it, or neither",
                param="firstphase_width",
            )
        return first

    def second_pass(self, engine: EngineInfo, scheduler: str) -> Hires | None:
        if not self.enable_hr:
            return None
        (height, width), named = self._target(engine)
        own = self._sampler_again(scheduler)
        prompt, loras = self._parsed(self.hr_prompt or "", engine, "hr_prompt")
        try:
            return Hires.make(
                height=height,
                width=width,
                upscaler=UPSCALERS_HERE[self.hr_upscaler or next(iter(UPSCALERS_HERE))],
                strength=_strength(self.denoising_strength),
                num_inference_steps=self.hr_second_pass_steps or None,
                scheduler=own,
                prompts=(prompt,) if self.hr_prompt else None,
                loras=loras if self.hr_prompt else None,
                negative_prompts=(self.hr_negative_prompt,) if self.hr_negative_prompt else None,
            )
        except RequestError as error:
            field = str(error).partition(":")[0]
            names = {"strength": "denoising_strength", "height": named[0], "width": named[1]}
            raise of_request_error(error, type(self).model_fields, names.get(field)) from None

    def _target(self, engine: EngineInfo) -> tuple[tuple[int, int], tuple[str, str]]:
        """The second pass's height and width, and the fields that say so.

        What follows from others is rounded down to whole latents, as there.
        """
        (height, width), x, y = self.size(engine), self.hr_resize_x or 0, self.hr_resize_y or 0
        if not x and not y:
            scale = HR_SCALE if self.hr_scale is None else self.hr_scale
            return (_whole(height * scale), _whole(width * scale)), ("hr_scale", "hr_scale")
        if not y:
            return (_whole(x * height // width), x), ("hr_resize_x", "hr_resize_x")
        if not x:
            return (y, _whole(y * width // height)), ("hr_resize_y", "hr_resize_y")
        return (y, x), ("hr_resize_y", "hr_resize_x")

    def _sampler_again(self, scheduler: str) -> str | None:
        """The second pass's scheduler; None for the first's."""
        first = self.sampler_name or self.sampler_index or SAMPLER
        name = first if self.hr_sampler_name in (None, "", "Use same sampler") else self.hr_sampler_name
        kind = self.scheduler
        if self.hr_scheduler not in (None, "", "Use same scheduler"):
            kind = self.hr_scheduler
        try:
            own, sampler = sampler_of(str(name), kind)
        except Problem as problem:
            problem.message = f"hr_sampler_name: {problem.message}"
            problem.param = "hr_sampler_name"
            raise
        eta_of(self.eta, sampler)
        return None if own == scheduler else own


class ImageToImage(Generation):
    """`/img2img`. What is said of a mask means something with one only. image_cfg_scale means something with
    engines that edit images as the prompt says alone, and denoising_strength nothing there."""

    denoising_strength: float | None = Field(default=None, ge=0, le=1, validate_default=True)
    init_images: list[str]
    resize_mode: Literal[0, 1, 2, 3] | None = None
    image_cfg_scale: float | None = None
    mask_blur: int | None = Field(default=None, ge=0, le=256)
    mask_blur_x: int | None = Field(default=None, ge=0, le=256)
    mask_blur_y: int | None = Field(default=None, ge=0, le=256)
    mask_round: bool | None = None
    inpainting_fill: Literal[0, 1, 2, 3] | None = None
    inpaint_full_res: bool | int | None = None
    inpaint_full_res_padding: int | None = Field(default=None, ge=0, le=MAX_SIDE)
    inpainting_mask_invert: Literal[0, 1] | bool | None = None
    mask: str | None = None
    initial_noise_multiplier: float | None = None
    latent_mask: Any = None
    include_init_images: bool | None = None

    @field_validator("init_images")
    @classmethod
    def _one(cls, images: list[str]) -> list[str]:
        if len(images) != 1:
            raise ValueError(f"holds {len(images)} images; send one, and each other in a request of its own")
        return images

    @field_validator("resize_mode")
    @classmethod
    def _resized(cls, mode: int | None) -> int | None:
        if mode in (2, 3):
            raise ValueError("is not supported: take 0 (just resize) or 1 (crop and resize)")
        return mode

    @field_validator("denoising_strength")
    @classmethod
    def _some_step(cls, strength: float | None, info: ValidationInfo) -> float | None:
        steps = info.data.get("steps") or STEPS
        if int(steps * _strength(strength)) < 1:
            raise ValueError(f"leaves none of {steps} steps to do; raise one of the two")
        return strength

    def over(self, engine: EngineInfo) -> Mapping[str, Any]:
        if engine.instructed:
            guidance = self.image_cfg_scale
            return {"image_guidance_scale": DEFAULT_IMAGE_GUIDANCE if guidance is None else guidance}
        return {
            "strength": _strength(self.denoising_strength),
            "padding_mask_crop": self.padding,
            "masked_content": self.masked_content,
        }

    @property
    def masked_content(self) -> MaskedContent | None:
        """What pictures begin with where a mask leaves the image open; None without one."""
        return None if self.mask is None else MASKED_CONTENTS[self.inpainting_fill or 0]

    @property
    def padding(self) -> int | None:
        """How many pixels around what the mask leaves open are drawn with it; None for the whole image.

        Where nothing is said it is that part alone, and none around it, as there.
        """
        if self.mask is None or not (self.inpaint_full_res is None or self.inpaint_full_res):
            return None
        return self.inpaint_full_res_padding or 0

    @property
    def blur(self) -> tuple[int, int]:
        """The mask's blur in x and y, as a Gaussian's standard deviation in pixels."""
        x, y = (self.mask_blur_x, self.mask_blur_y) if self.mask_blur is None else (self.mask_blur,) * 2
        return (MASK_BLUR if x is None else x), (MASK_BLUR if y is None else y)

    def echo(self) -> dict[str, Any]:
        hidden = {} if self.include_init_images else {"init_images": None, "mask": None}
        return {**self.model_dump(), **hidden}


def _whole(side: float) -> int:
    """Pixels, of whole latents."""
    return int(side) // 8 * 8


def _strength(given: float | None) -> float:
    return DENOISING_STRENGTH if given is None else given
