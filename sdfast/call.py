"""The call that diffusers' pipelines take, made into a `Request` and what else was given.

What is not supported is refused by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from sdfast.control import asked_scale, controlnets_of
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.first_latents import Over
from sdfast.images import read_controls, read_images, read_masks
from sdfast.ip_adapter import asked_scale as asked_image_scale
from sdfast.ip_adapter import check_scale
from sdfast.ip_adapter import read_images as read_seen
from sdfast.manifest import Model
from sdfast.masked_area import MaskedArea
from sdfast.request import DEFAULT_IMAGE_GUIDANCE, Hires, Request

DEFAULT_STEPS = 50  # as in diffusers
DEFAULT_GUIDANCE = {"sd": 7.5, "sdxl": 5.0}  # as in diffusers
# As in diffusers: over a whole image, and with a mask.
DEFAULT_STRENGTH = {"sd": (0.8, 1.0), "sdxl": (0.3, 0.9999)}

# Arguments of diffusers' that are not supported, at the values at which they ask for nothing.
NEUTRAL = {
    "callback_steps": 1,
}

StepCallback = Callable[[Any, int, float, dict[str, torch.Tensor]], Mapping[str, torch.Tensor] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """What a call gives.

    images: PIL images; or [n, H, W, 3] float32 in [0, 1] ("np"); or a tensor [n, 3, H, W] ("pt"); or the
    latents [n, C, h, w] ("latent").
    seeds: one for each picture; `None` when the caller's generators or latents were used. variation_seeds:
    likewise of variations, `None` without.
    truncated: the text that was cut from each prompt, "" for none.
    """

    images: Any
    seeds: tuple[int, ...] | None
    truncated: tuple[str, ...]
    nsfw_content_detected: None = None  # sdfast runs no safety checker
    variation_seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Given:
    """Tensors that a caller may give in place of what the pipeline would make; what is drawn over; and the
    control images of N ControlNets, [m, N 3, H, W] float32, which the pictures take in turn; and the images
    of IP-Adapters, as `sdfast.ip_adapter.read_images` gives them.

    seeded: the generators are those of the request's seeds, so that each picture is what it is alone."""

    generators: torch.Generator | Sequence[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    over: Over | None = None
    control: torch.Tensor | None = None
    ip_adapter_images: torch.Tensor | None = None
    seeded: bool = False


class DiffusersCall(ABC):
    """A pipeline that draws requests, to be called as diffusers' pipelines are."""

    engine: Engine
    _loras: Mapping[str, Any] = MappingProxyType({})  # how much of LoRAs is added where a call does not say
    _ip_adapter_scale: Any = None

    @abstractmethod
    def generate(
        self,
        request: Request,
        given: Given | None = None,
        output_type: str = "pil",
        callback: StepCallback | None = None,
    ) -> PipelineOutput:
        """Draw what `request` asks for."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        image: Any = None,
        mask_image: Any = None,
        padding_mask_crop: int | None = None,
        strength: float | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        image_guidance_scale: float | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        control_mode: str | Sequence[str] | None = None,
        control_layer_scales: Sequence[float] | Sequence[Sequence[float] | None] | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_scale: Any = None,
        seed: int | None = None,
        scheduler: str | None = None,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        cache_interval: int = 1,
        pag_scale: float = 0.0,
        pag_adaptive_scale: float = 0.0,
        long_prompts: str = "truncate",
        emphasis: str | None = None,
        prompt_editing: bool = False,
        loras: Mapping[str, float | tuple[float, float]] | None = None,
        hires: Hires | Mapping[str, Any] | None = None,
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        seed_resize_from: tuple[int, int] | None = None,
        **refused: Any,
    ) -> Any:
        """Draw pictures. The arguments are those of diffusers' pipelines; beyond them:

        seed: image i gets its own generator, seeded with seed + i (default: a random seed, told in the
            output). `scheduler`: for this call only, by diffusers, AUTOMATIC1111 or short name.
        variation_strength: how far the first noise is turned from the seed's to that of `variation_seed`, by
            default a random one; image i then has variation_seed + i, and all have the same seed, as with
            AUTOMATIC1111. seed_resize_from: the (height, width) of a picture whose first noise is put in the
            middle of this one's.
        guidance_scale: 7.5 by default, 5 for SDXL, as in diffusers.
        guidance_start, guidance_end: between which shares of the steps is guidance; the others cost half.
        cache_interval: one evaluation of the U-Net in so many is a whole one, the others are shallow, on
            engines with a cache branch; see `Request`.
        pag_scale: perturbed-attention guidance, on engines with layers for it, by default none;
            pag_adaptive_scale: how much less of it there is for each timestep below 1000; see `Request`.
        long_prompts: "truncate" cuts prompts after 75 tokens, as diffusers does; "chunk" reads all of them,
            75 at a time. emphasis: how `(words:1.3)` count, "original" as with AUTOMATIC1111, "no_norm" or
            "ignore"; by default brackets are text. See `sdfast.emphasis`.
        prompt_editing: whether `[from:to:when]` and `[this|that]` change the prompts between steps, as with
            AUTOMATIC1111; see `sdfast.editing`.
        loras: how much is added of each LoRA that the engine has for requests to choose, `{"oil": 0.8}`; or
            two numbers, how much in the text encoders and how much in the U-Net; default: nothing.
        hires: a second pass over the pictures at another size, such as `{"height": 1024, "width": 1024,
            "strength": 0.5}`; see `sdfast.request.Hires`. Steps are counted, and told, in each pass anew;
            pictures that are interrupted in the first one stay at its size.
        prompt_2, negative_prompt_2, and the sizes and crops: for SDXL, as in diffusers; aesthetic_score and
            negative_aesthetic_score for its refiner.
        image: what is drawn over, of the picture's size; mask_image: white where it is drawn anew; see
            `sdfast.images`. strength: the share of the steps that is done, as in diffusers, and by default
            what it is there: 0.8, or 1 with a mask; for SDXL 0.3 and 0.9999.
        padding_mask_crop: draw only the part of `image` that `mask_image` has white, and so many pixels
            around it, at height x width, by default the engine's own size; and paste it into the image, as
            in diffusers. Image, mask and control images are PIL images of one size, whatever it is, which
            is the size of the pictures.
        denoising_end: the share of the denoising at which the run leaves its latents, for another to go on
            (`output_type="latent"`); denoising_start: the share at which it takes over those in `image`, to
            which no noise is added; `strength` says nothing then. As in diffusers' SDXL pipelines, and for
            every engine.
        image_guidance_scale: of an engine of InstructPix2Pix, which edits `image` as the prompt says: how
            much the image guides, by default 1.5. There is no strength then.
        control_image: what guides an engine with a ControlNet, of the picture's size; see `sdfast.images`.
            controlnet_conditioning_scale: how much of the ControlNet is added, by default 1;
            control_guidance_start, control_guidance_end: between which shares of the steps. With several
            ControlNets a list of an image for each, None for one that is to add nothing; and for the rest a
            list of a number for each, or one for all. guess_mode: as in diffusers, which is `control_mode`
            "guess"; others are "prompt" and "control", as sd-webui-controlnet has them, see `Request`.
            control_layer_scales: the share of each layer, in place of a mode's; with several ControlNets a
            list of them, or None, for each.
        ip_adapter_image: what an engine with IP-Adapters is told beside the prompt: one image for all
            pictures, with several adapters a list of one for each; see `sdfast.ip_adapter`. By default
            pictures are drawn without. ip_adapter_scale: how much it counts, by default 1, or what
            `set_ip_adapter_scale` said; a number, or numbers by layers as there, or a list of one for each.

        Sizes are in pixels; by default the image's, or the control image's, or else the engine's own. Returns
        a `PipelineOutput`, or (images, None) with `return_dict=False`.
        """
        refuse(refused, "the call", NEUTRAL)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise RequestError(f"output_type: {output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")
        if list(callback_on_step_end_tensor_inputs or ["latents"]) != ["latents"]:
            raise RequestError(
                f"callback_on_step_end_tensor_inputs: {callback_on_step_end_tensor_inputs!r}, but a step "
                "callback gets and may change ['latents'] only"
            )
        if seed is not None and generator is not None:
            raise RequestError("give seed or generator, not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise RequestError("give negative_prompt or negative_prompt_embeds, not both")
        area = self._area(image, mask_image, padding_mask_crop, height, width)
        if area is not None:
            image, mask_image, control_image = (
                area.cut(image),
                area.cut(mask_image),
                area.cut_controls(control_image),
            )
            height, width = area.height, area.width
        model, control, scale = self.engine.manifest.model, None, controlnet_conditioning_scale
        if control_image is not None:
            control = read_controls(control_image, controlnets_of(model))
            scale = asked_scale(model, control_image, scale)
        seen, counts = None, None
        if ip_adapter_image is not None:
            seen = read_seen(model, ip_adapter_image)
            counts = self._ip_adapter_scale if ip_adapter_scale is None else ip_adapter_scale
            counts = asked_image_scale(model, ip_adapter_image, counts)
        elif ip_adapter_scale is not None:
            raise RequestError(
                "ip_adapter_scale: is for an image of an IP-Adapter; give ip_adapter_image too"
            )
        given = Given(
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            self._over(
                image,
                mask_image,
                area,
                latents,
                strength=strength,
                denoising_start=denoising_start,
                image_guidance_scale=image_guidance_scale,
            ),
            control,
            seen,
        )
        if timesteps is not None or sigmas is not None:
            num_inference_steps = None  # their length is the number of steps, as in diffusers
        elif num_inference_steps is None:
            num_inference_steps = DEFAULT_STEPS
        own_height, own_width = self._size_of(given)
        fields = {
            **_texts(prompt, negative_prompt, prompt_embeds, prompt_2, negative_prompt_2),
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": target_size,
            "negative_original_size": negative_original_size,
            "negative_crops_coords_top_left": negative_crops_coords_top_left,
            "negative_target_size": negative_target_size,
            "aesthetic_score": aesthetic_score,
            "negative_aesthetic_score": negative_aesthetic_score,
            "height": own_height if height is None else height,
            "width": own_width if width is None else width,
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "scheduler": scheduler,
            "guidance_scale": DEFAULT_GUIDANCE[model.family] if guidance_scale is None else guidance_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_start": guidance_start,
            "guidance_end": guidance_end,
            "cache_interval": cache_interval,
            "pag_scale": pag_scale,
            "pag_adaptive_scale": pag_adaptive_scale,
            "eta": eta,
            **asked_over(model, given.over, strength, denoising_start, image_guidance_scale),
            "padding_mask_crop": padding_mask_crop,
            "denoising_start": denoising_start,
            "denoising_end": denoising_end,
            "controlnet_conditioning_scale": scale,
            "control_guidance_start": control_guidance_start,
            "control_guidance_end": control_guidance_end,
            "control_mode": _control_mode(control_mode, guess_mode),
            "control_layer_scales": _layer_scales(control_layer_scales, model),
            "ip_adapter_scale": counts,
            "num_images_per_prompt": num_images_per_prompt,
            "clip_skip": clip_skip,
            "long_prompts": long_prompts,
            "emphasis": emphasis,
            "prompt_editing": prompt_editing,
            "loras": dict(self._loras if loras is None else loras),
            "hires": Hires.make(**hires) if isinstance(hires, Mapping) else hires,
            "variation_seed": variation_seed,
            "variation_strength": variation_strength,
            "seed_resize_from": seed_resize_from,
        }
        if seed is not None:
            fields["seed"] = seed
        output = self.generate(Request.make(**fields), given, output_type, callback_on_step_end)
        return output if return_dict else (output.images, None)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """How much the image of an IP-Adapter counts in the calls from now on that do not say it.

        As in diffusers: a number; or numbers by the places of layers, `{"up": {"block_0": [0.0, 1.0, 0.0]}}`,
        0 for those not named; or a list with one of these for each adapter.
        """
        check_scale(self.engine.manifest.model, scale)
        self._ip_adapter_scale = scale

    def _area(
        self, image: Any, mask: Any, padding: int | None, height: int | None, width: int | None
    ) -> MaskedArea | None:
        """The part of a call's image that is drawn; None for all of it. Raises `RequestError`."""
        if padding is None:
            return None
        for name, given in (("image", image), ("mask_image", mask)):
            if not isinstance(given, Image.Image):
                what = "is missing" if given is None else f"{type(given).__name__} is not a PIL image"
                raise RequestError(
                    f"{name}: {what}; with padding_mask_crop give one image and one mask, as PIL images"
                )
        own_height, own_width = self._size_of_part(image)
        return MaskedArea.make(
            image,
            mask,
            padding_mask_crop=padding,
            height=own_height if height is None else height,
            width=own_width if width is None else width,
        )

    def _size_of_part(self, image: Image.Image) -> tuple[int, int]:
        """Height and width in pixels at which a part of `image` is drawn where nobody says."""
        model = self.engine.manifest.model
        return model.default_height, model.default_width

    def _over(
        self, image: Any, mask: Any, area: MaskedArea | None, latents: Any, **how: float | None
    ) -> Over | None:
        """What a call is to draw over. area: where image and mask were cut out."""
        if image is None:
            if mask is not None or any(value is not None for value in how.values()):
                raise RequestError(
                    f"mask_image, {', '.join(how)} are for an image to draw over; give image too"
                )
            return None
        if latents is not None and not self.engine.manifest.model.instructed:
            raise RequestError("latents: with an image the first latents come from it; leave them out")
        channels = self.engine.manifest.model.latent_channels
        return Over(read_images(image, channels), None if mask is None else read_masks(mask), area)

    def _size_of(self, given: Given) -> tuple[int, int]:
        """Height and width in pixels of a picture of which nobody says more."""
        model = self.engine.manifest.model
        if given.over is None:
            if given.control is not None:
                return given.control.shape[2], given.control.shape[3]
            return model.default_height, model.default_width
        _, channels, height, width = given.over.image.shape
        factor = 1 if channels == 3 else model.vae_scale_factor
        return height * factor, width * factor


def asked_over(
    model: Model, over: Over | None, strength: float | None, start: float | None, guidance: float | None
) -> dict[str, float | None]:
    """A request's `strength` and `image_guidance_scale`: those that were given, or else diffusers' defaults
    of such a model over such an image. start: `denoising_start`."""
    if over is not None and model.instructed:
        if (strength, start, guidance) == (None, None, None):
            guidance = DEFAULT_IMAGE_GUIDANCE
    elif over is not None and guidance is None:
        strength = strength_over(model, over, strength, start)
    return {"strength": strength, "image_guidance_scale": guidance}


def strength_over(model: Model, over: Over, given: float | None, start: float | None) -> float | None:
    """The strength with which an image is drawn over: none where `denoising_start` says where that begins."""
    if start is not None:
        return None
    return DEFAULT_STRENGTH[model.family][over.mask is not None] if given is None else given


def _control_mode(mode: Any, guess: bool) -> Any:
    """diffusers' `guess_mode` as one of the modes."""
    if not isinstance(guess, bool):
        raise RequestError(f"guess_mode: must be True or False (got {guess!r:.60})")
    if guess and mode is not None:
        raise RequestError("guess_mode: is a control_mode, and another is given; leave one of them out")
    return "guess" if guess else mode


def _layer_scales(given: Any, model: Model) -> Any:
    """Those of a single ControlNet as a list of one."""
    flat = isinstance(given, (list, tuple)) and all(isinstance(one, (int, float)) for one in given)
    return (given,) if flat and model.controlnets == 1 else given


def _texts(
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str | None] | None,
    embeds: torch.Tensor | None,
    second: str | Sequence[str] | None,
    negative_second: str | Sequence[str | None] | None,
) -> dict[str, Any]:
    """The prompts, one negative prompt for each, and what a second text encoder reads."""
    if (prompt is None) == (embeds is None):
        raise RequestError("give prompt or prompt_embeds, one of them")
    if embeds is not None:
        if second is not None:
            raise RequestError("prompt_2: with prompt_embeds no prompt is read; leave it out")
        if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3:
            raise RequestError("prompt_embeds: must be a tensor of shape (prompts, tokens, width)")
        prompts: Any = ("",) * len(embeds)
    else:
        prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(f"prompt: must be a string or a list of strings (got {type(prompt).__name__})")
    count = len(prompts)
    return {
        "prompts": prompts,
        "negative_prompts": _for_each("negative_prompt", negative, count),
        # diffusers takes an empty one for none
        "prompts_2": _for_each("prompt_2", second, count) if second else None,
        "negative_prompts_2": _for_each("negative_prompt_2", negative_second, count)
        if negative_second
        else None,
    }


def _for_each(name: str, texts: str | Sequence[str | None] | None, count: int) -> Sequence[str | None]:
    """A text for each of `count` prompts."""
    if texts is None or isinstance(texts, str):
        return (texts,) * count
    if not isinstance(texts, (list, tuple)):
        raise RequestError(f"{name}: must be a string or a list of strings (got {type(texts).__name__})")
    return texts


def refuse(given: Mapping[str, Any], where: str, neutral: Mapping[str, Any] | None = None) -> None:
    """Raises `RequestError` for arguments that ask for something: `None` and neutral values pass."""
    neutral = neutral or {}

    def asks(name: str, value: Any) -> bool:
        unasked = neutral.get(name)
        return value is not None and not (type(value) is type(unasked) and value == unasked)

    asked = [name for name, value in given.items() if asks(name, value)]
    if asked:
        raise RequestError(
            f"{', '.join(asked)}: not supported by {where} of sdfast; leave it out, or use diffusers"
        )
