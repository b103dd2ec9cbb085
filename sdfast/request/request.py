"""`Request`, what to draw, with what a part of an image and a second pass are told."""

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdfast.composition import composed
from sdfast.emphasis import Emphasis
from sdfast.request.checked import Checked
from sdfast.request.consistency import check_consistent
from sdfast.request.fields import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SCORE,
    MAX_SIDE,
    MAX_STEPS,
    SEED_LIMIT,
    AdapterScale,
    ControlModes,
    ControlScales,
    LayerScales,
    Loras,
    MaskedContent,
    SeedSize,
    Shares,
    ToldSize,
    Upscaler,
    each,
)


class Crop(Checked):
    """What is cut out of an image: what its mask leaves open, with so many pixels more on each side, to be
    drawn at height x width; see `sdfast.masked_area`."""

    padding_mask_crop: int = Field(ge=0, le=MAX_SIDE)  # pixels of the image
    height: int = Field(ge=8, le=MAX_SIDE)  # pixels
    width: int = Field(ge=8, le=MAX_SIDE)  # pixels


class Hires(Checked):
    """A second pass over pictures, at another size: what AUTOMATIC1111 calls hires fix.

    A picture, or for a latent `upscaler` its latents, is enlarged until it covers height x width, cropped
    around its middle, and drawn over there. `num_inference_steps` are the steps that are done, by default as
    many as the first pass has: the last ones of a schedule of which they are the share `strength`, as
    AUTOMATIC1111 counts. The scheduler, the prompts and the LoRAs are the first pass's unless others are
    given; what is not here is as in the first pass.
    """

    height: int = Field(ge=8, le=MAX_SIDE)  # pixels
    width: int = Field(ge=8, le=MAX_SIDE)  # pixels
    upscaler: Upscaler = "latent"
    strength: float = Field(default=0.75, gt=0.0, le=1.0)
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    scheduler: str | None = None
    prompts: tuple[str, ...] | None = Field(default=None, min_length=1)
    negative_prompts: tuple[str | None, ...] | None = None
    loras: Loras | None = None

    @property
    def latent(self) -> bool:
        """Whether it is latents that are enlarged."""
        return self.upscaler.startswith("latent")

    def laid_out(self, steps: int) -> int:
        """Of how many steps the schedule is, of which so many are done."""
        return int(steps / min(self.strength, 0.999))


class Request(Checked):
    """What to draw. Every field is checked; unknown fields are refused.

    `seed` gives image i of the request the generator of seed + i; `None` picks one at random when the request
    is made, so that it can always be told. `num_inference_steps`, `timesteps` and `sigmas` are alternatives.
    `strength`, with an image to draw over: the share of the steps that is done, as in diffusers.
    `denoising_start`, in its place: the run takes over at this share of the denoising, without new noise, the
    latents that another run has left. `denoising_end`: it leaves them at this share. As in diffusers' SDXL
    pipelines, the steps are told apart by their timesteps, not by their number.
    `image_guidance_scale`, with an image that an InstructPix2Pix U-Net edits: how much what it says of the
    image counts beyond what it says of neither image nor prompt (Brooks et al. 2023, section 3.2.1).
    `padding_mask_crop`, with an image and a mask: they are a part of larger ones, cut out with so many pixels
    around what the mask leaves open. Whoever cuts pastes the pictures back, see `sdfast.masked_area`; the run
    itself is that of any other image and mask.
    `masked_content`, with an image and a mask: what the run begins with where the mask leaves the image open,
    as in AUTOMATIC1111: the image, or what whoever gave it has filled it with; or in place of its latents the
    noise that is added to them, once more, or zeros. It then counts with a `strength` of 1 too, with which a
    run without it begins from noise alone, as in diffusers.
    `controlnet_conditioning_scale`, with a control image: how much the ControlNet adds, in the steps between
    `control_guidance_start` and `control_guidance_end`, which are shares of all steps, as in diffusers. With
    several ControlNets each of these is a list of a number for each, or one for all.
    `control_mode`, one for all ControlNets or one for each: "balanced" adds alike in all layers and for both
    prompts; "prompt" less in the outer layers, "control" that too, and nothing for the negative prompt, as
    sd-webui-controlnet does it; "guess" as diffusers' `guess_mode` does it, whose layers count a little
    otherwise. By default it is what diffusers does: balanced, or guess if the first ControlNet pools.
    `control_layer_scales`: of each ControlNet the share of every layer in place of the mode's, or None.

    `ip_adapter_scale`, with an image for an IP-Adapter: how much it counts, a number or numbers by layers;
    with several adapters a list of one of these for each, or one for all.

    `guidance_start` and `guidance_end`: the shares of the steps between which there is guidance (Kynkäänniemi
    et al. 2024). The others cost half as much; the picture is another one than with guidance in all.

    `cache_interval`: N, where one evaluation of the U-Net in N is a whole one, the first among them, and the
    others are shallow and take what lies deep from that (step caching, Ma et al. 2023); 1: all are whole. A
    solver of two evaluations a step counts both. It costs less, and the picture is another one.

    `long_prompts`: what becomes of prompts longer than the text encoder reads (75 tokens): "truncate" cuts
    them, as diffusers does, "chunk" reads them 75 tokens at a time, as AUTOMATIC1111 does. `emphasis`: how
    `(words:1.3)` count, see `sdfast.emphasis`; by default brackets are text. With it AND adds prompts up, see
    `sdfast.composition`. `prompt_editing`: whether `[from:to:when]` and `[this|that]` change prompts between
    steps, see `sdfast.editing`; what else there is in brackets is read as `emphasis` says.

    For SDXL alone: `prompts_2` and `negative_prompts_2`, what its second text encoder reads in place of the
    prompts, `None` for the same; and the sizes (height, width) and crops (top, left) in pixels that
    it is told, by default the picture's own (Podell et al. 2023, section 2.2).

    For SDXL's refiner alone, in place of the target sizes: how beautiful the picture is to be, and what it is
    guided away from, by the usual numbers of diffusers'.

    `loras`: how much is added of each LoRA that the engine has for requests to choose: 1 is all, 0, where it
    is not named, nothing; or two numbers, how much in the text encoders and how much in the U-Net.

    `pag_scale`, for engines with layers to be perturbed: how much a picture is guided away from what comes
    out where these look at nothing but themselves (Ahn et al. 2024), with a negative prompt or without; 0 not
    at all. It costs one evaluation more. `pag_adaptive_scale`: how much less that is for each timestep below
    1000, as in diffusers; it ends at 0.

    `variation_strength`: how far the noise that a picture begins with is turned from that of `seed` to that
    of another, `variation_seed`, which is picked at random where it is `None`: 0 not at all, 1 all the way.
    As with AUTOMATIC1111 image i of the request then has variation_seed + i and all have `seed`, from whose
    generators comes the noise of later steps. `seed_resize_from`: the (height, width) in pixels of a picture
    whose first noise is put in the middle of this one's, so that a seed's pictures of two sizes are alike.

    `hires`: a second pass over the pictures of this one, at another size.
    """

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
    guidance_start: float = Field(default=0.0, ge=0.0, le=1.0)
    guidance_end: float = Field(default=1.0, ge=0.0, le=1.0)
    cache_interval: int = Field(default=1, ge=1, le=MAX_STEPS)
    pag_scale: float = Field(default=0.0, ge=0.0, le=MAX_GUIDANCE)
    pag_adaptive_scale: float = Field(default=0.0, ge=0.0, le=MAX_GUIDANCE)
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    strength: float | None = Field(default=None, gt=0.0, le=1.0)
    denoising_start: float | None = Field(default=None, gt=0.0, lt=1.0)
    denoising_end: float | None = Field(default=None, gt=0.0, le=1.0)
    image_guidance_scale: float | None = Field(default=None, ge=1.0, le=MAX_GUIDANCE)
    padding_mask_crop: int | None = Field(default=None, ge=0, le=MAX_SIDE)
    masked_content: MaskedContent | None = None
    controlnet_conditioning_scale: ControlScales | None = None
    control_guidance_start: Shares = 0.0
    control_guidance_end: Shares = 1.0
    control_mode: ControlModes | None = None
    control_layer_scales: tuple[LayerScales | None, ...] | None = None
    ip_adapter_scale: AdapterScale | Annotated[tuple[AdapterScale, ...], Field(min_length=1)] | None = None
    num_images_per_prompt: int = Field(default=1, ge=1, le=MAX_IMAGES)
    clip_skip: int | None = Field(default=None, ge=0, le=64)
    long_prompts: Literal["truncate", "chunk"] = "truncate"
    emphasis: Emphasis | None = None
    prompt_editing: bool = False
    prompts_2: tuple[str | None, ...] | None = None
    negative_prompts_2: tuple[str | None, ...] | None = None
    original_size: ToldSize | None = None
    crops_coords_top_left: ToldSize = (0, 0)
    target_size: ToldSize | None = None
    negative_original_size: ToldSize | None = None
    negative_crops_coords_top_left: ToldSize = (0, 0)
    negative_target_size: ToldSize | None = None
    aesthetic_score: float = Field(default=6.0, ge=0.0, le=MAX_SCORE)
    negative_aesthetic_score: float = Field(default=2.5, ge=0.0, le=MAX_SCORE)
    loras: Loras = Field(default_factory=dict)
    hires: Hires | None = None
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**32), ge=0, lt=SEED_LIMIT)
    variation_strength: float = Field(default=0.0, ge=0.0, le=1.0)
    variation_seed: int | None = Field(default=None, ge=0, lt=SEED_LIMIT, validate_default=True)
    seed_resize_from: SeedSize | None = None

    @property
    def images(self) -> int:
        """How many pictures are asked for in all."""
        return len(self.prompts) * self.num_images_per_prompt

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed for each picture; variations have the same."""
        return tuple(self.seed if self.variation_strength else self.seed + i for i in range(self.images))

    @property
    def variation_seeds(self) -> tuple[int, ...]:
        """The other seed of each picture; none without variations."""
        first = self.variation_seed
        return () if first is None else tuple(first + i for i in range(self.images))

    @property
    def varied(self) -> bool:
        """Whether the first noise is another than the seeds' own."""
        return bool(self.variation_strength) or self.seed_resize_from is not None

    @property
    def over(self) -> bool:
        """Whether it is drawn over an image, or its latents, or edits one."""
        given = (self.strength, self.denoising_start, self.image_guidance_scale)
        return any(value is not None for value in given)

    @property
    def steps(self) -> int | None:
        """How many there are before `strength` leaves some out, if they are counted."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return self.num_inference_steps if self.sigmas is None else len(self.sigmas) - 1

    def guided(self, steps: int) -> range:
        """The steps, of so many, that have guidance: counted as diffusers' guiders count."""
        return range(int(self.guidance_start * steps), int(self.guidance_end * steps))

    @property
    def pairs(self) -> list[tuple[str, str | None]]:
        """Each prompt, and what a second text encoder reads in its place."""
        return list(zip(self.prompts, self.prompts_2 or (None,) * len(self.prompts), strict=True))

    @property
    def composed(self) -> list[list[tuple[tuple[str, str | None], float]]]:
        """Each pair as those that are added up, each with its weight; see `sdfast.composition`."""
        if self.emphasis is None:
            return [[(pair, 1.0)] for pair in self.pairs]
        return [
            [((text, second), weight) for text, weight in composed(prompt)] for prompt, second in self.pairs
        ]

    @property
    def composed_pairs(self) -> list[tuple[str, str | None]]:
        """The pairs of `composed` alone, one prompt's behind the other's."""
        return [pair for parts in self.composed for pair, _ in parts]

    @property
    def negative_pairs(self) -> list[tuple[str | None, str | None]]:
        """Each negative prompt likewise."""
        seconds = self.negative_prompts_2 or (None,) * len(self.prompts)
        return list(zip(self.negative_prompts, seconds, strict=True))

    @property
    def control_spans(self) -> list[tuple[float, float]]:
        """Between which shares of the steps ControlNets add something: of each, or of all."""
        starts: tuple[float, ...] = each(self.control_guidance_start)
        ends: tuple[float, ...] = each(self.control_guidance_end)
        if 1 < len(starts) != len(ends) > 1:
            raise ValueError(
                f"control_guidance_start: {len(starts)} numbers, but control_guidance_end has {len(ends)}; "
                "give one for each ControlNet, or one for all"
            )
        count = max(len(starts), len(ends))
        shares = (each(self.control_guidance_start, count), each(self.control_guidance_end, count))
        return list(zip(*shares, strict=True))

    @property
    def of_mask(self) -> str | None:
        """The first field that says something of a mask; None where none does."""
        names = ("padding_mask_crop", "masked_content")
        return next((name for name in names if getattr(self, name) is not None), None)

    def lora_scales(self, name: str) -> tuple[float, float]:
        """How much of a LoRA is added in the text encoders, and in the U-Net."""
        scale = self.loras.get(name, 0.0)
        return scale if isinstance(scale, tuple) else (scale, scale)

    @property
    def passes(self) -> tuple["Request", ...]:
        """The runs that it takes: its first pass, and the second, which draws over what that has drawn."""
        return (self,) if self.hires is None else (self, self._second(self.hires))

    def _second(self, hires: Hires) -> "Request":
        steps = hires.num_inference_steps or self.num_inference_steps or 1
        laid_out = hires.laid_out(steps)
        fields: dict[str, Any] = {
            "hires": None,
            "height": hires.height,
            "width": hires.width,
            "num_inference_steps": laid_out,
            "timesteps": None,
            "sigmas": None,
            "strength": min(1.0, (steps + 0.5) / laid_out),  # which is just so many steps
            "scheduler": hires.scheduler or self.scheduler,
        }
        if hires.prompts is not None:
            fields |= {"prompts": hires.prompts, "prompts_2": None}
        if hires.negative_prompts is not None:
            fields |= {"negative_prompts": hires.negative_prompts, "negative_prompts_2": None}
        if hires.loras is not None:
            fields["loras"] = hires.loras
        return self.model_copy(update=fields)

    def alone(self, picture: int) -> "Request":
        """The request of one of its pictures."""
        texts = ("prompts", "negative_prompts", "prompts_2", "negative_prompts_2")
        one = slice(picture // self.num_images_per_prompt, picture // self.num_images_per_prompt + 1)

        def of_one(asked: Request | Hires) -> dict[str, Any]:
            given = {name: getattr(asked, name, None) for name in texts}
            return {name: prompts[one] for name, prompts in given.items() if prompts is not None}

        fields = {**of_one(self), "num_images_per_prompt": 1, "seed": self.seeds[picture]}
        if self.variation_seeds:
            fields["variation_seed"] = self.variation_seeds[picture]
        if self.hires is not None:
            fields["hires"] = self.hires.model_copy(update=of_one(self.hires))
        return self.model_copy(update=fields)

    @field_validator("variation_seed")
    @classmethod
    def _some_variation(cls, seed: int | None, info: ValidationInfo) -> int | None:
        """One where none is given for a variation."""
        return secrets.randbelow(2**32) if seed is None and info.data.get("variation_strength") else seed

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_consistent(self)
        return self
