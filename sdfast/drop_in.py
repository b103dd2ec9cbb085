"""The drop-ins for diffusers' classes: their arguments, in their order.

They are `Pipeline`'s otherwise, and documented there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Self

from PIL import Image

from sdfast.call import Given
from sdfast.errors import RequestError
from sdfast.pipeline import Pipeline
from sdfast.request import TOLD_SIZES

_PARTS = ("text_encoder", "text_encoder_2", "unet")  # what LoRAs change
_STEPS = ("num_inference_steps", "timesteps", "sigmas")
_CALLBACK = ("clip_skip", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
_ADAPTER = ("ip_adapter_image", "ip_adapter_image_embeds")
_OUTPUT = ("output_type", "return_dict", "cross_attention_kwargs")
_CONTROL = ("controlnet_conditioning_scale", "guess_mode", "control_guidance_start", "control_guidance_end")
_SCORES = ("aesthetic_score", "negative_aesthetic_score")
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_EMBEDS_XL = (*_EMBEDS, *_POOLED)
_DRAWN = ("num_images_per_prompt", "eta", "generator")
_MASKED = ("image", "mask_image", "masked_image_latents", "height", "width", "padding_mask_crop", "strength")
_MASKED_CONTROL = ("image", "mask_image", "control_image")
_GUIDED = ("guidance_scale", "negative_prompt")
_PAG = ("pag_scale", "pag_adaptive_scale")
_PAG_SCALE = {"pag_scale": 3.0}  # diffusers' default
_ENDS = ("denoising_start", "denoising_end")
_REST = (*_ADAPTER, *_OUTPUT, *_CALLBACK)
_REST_XL = (*_DRAWN, "latents", *_EMBEDS_XL, *_ADAPTER, *_OUTPUT, "guidance_rescale", *TOLD_SIZES)


Order = tuple[str, ...]


class _InOrder(Pipeline):
    """order: of the positional arguments. defaults: where they are others than `Pipeline`'s. needs: what has
    to be given, for what `needed_for`. names: what `Pipeline` calls arguments that are called otherwise."""

    order: ClassVar[Order]
    defaults: ClassVar[Mapping[str, Any]]
    needs: ClassVar[tuple[str, ...]] = ()
    needed_for: ClassVar[str] = "draws over an image"
    names: ClassVar[Mapping[str, str]] = {}
    _adapters: Mapping[str, Any] = MappingProxyType({})

    def __call__(self, *args: Any, **given: Any) -> Any:
        if len(args) > len(self.order):
            raise RequestError(f"{len(args)} positional arguments; there are {len(self.order)}")
        placed = dict(zip(self.order, args, strict=False))
        if twice := sorted(placed.keys() & given.keys()):
            raise RequestError(f"{twice[0]}: given twice, by its place and by its name")
        call = {**self.defaults, **placed, **given}
        for name in self.needs:
            if call.get(name) is None:
                raise RequestError(f"{name}: is missing; {type(self).__name__} {self.needed_for}")
        return super().__call__(**{self.names.get(name, name): value for name, value in call.items()})

    def load_lora_weights(self, *_args: Any, **_options: Any) -> NoReturn:
        """Raises `RequestError`: an engine has its LoRAs from its export."""
        raise RequestError(
            "load_lora_weights: an engine has its LoRAs from its export; give them to "
            'from_pretrained(..., loras=[...]), those for set_adapters as {"source": …, "on_request": True}'
        )

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """As diffusers': add these LoRAs, which the engine has for requests, in later calls without `loras`.

        adapter_weights: one scale for all, or a list of one for each, by default 1; of each None for 1, or
        {"text_encoder": …, "unet": …}, where what is not said is 1.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(names) != len(weights):
            raise RequestError(
                f"adapter_weights: {len(weights)} for {len(names)} adapters; give one for each"
            )
        missing = [name for name in names if name not in self.engine.manifest.model.loras]
        if missing:
            there = ", ".join(self.engine.manifest.model.loras) or "none"
            raise RequestError(f"adapter_names: {missing[0]!r:.100} is not there; there are: {there}")
        self._adapters = {name: _scales_of(weight) for name, weight in zip(names, weights, strict=True)}
        self.enable_lora()

    def get_active_adapters(self) -> list[str]:
        """As diffusers': the LoRAs that are added."""
        return list(self._loras)

    def disable_lora(self) -> None:
        """As diffusers': add none until `enable_lora` or `set_adapters`."""
        self._loras = {}

    def enable_lora(self) -> None:
        """As diffusers': add again those of `set_adapters`."""
        self._loras = self._adapters

    def load_textual_inversion(self, *_args: Any, **_options: Any) -> NoReturn:
        """Raises `RequestError`: an engine has its embeddings from its export."""
        raise RequestError(
            "load_textual_inversion: embeddings are put into an engine when it is exported; give them to "
            "from_pretrained(..., embeddings=[...])"
        )

    def load_ip_adapter(self, *_args: Any, **_options: Any) -> NoReturn:
        """Raises `RequestError`: an engine has its IP-Adapters from its export."""
        raise RequestError(
            "load_ip_adapter: IP-Adapters are put into an engine when it is exported; give them to "
            "from_pretrained(..., ip_adapters=[...])"
        )


def _scales_of(weight: Any) -> Any:
    """Of what diffusers takes for one adapter, the scales in the text encoders and in the U-Net."""
    if not isinstance(weight, Mapping):
        return 1.0 if weight is None else weight
    parts = {"text_encoder": 1.0, "text_encoder_2": weight.get("text_encoder", 1.0), "unet": 1.0, **weight}
    if len(parts) > len(_PARTS) or parts["text_encoder"] != parts["text_encoder_2"]:
        raise RequestError(
            f"adapter_weights: {weight!r:.100}: a LoRA has one scale in all text encoders, and one in the "
            'U-Net: give {"text_encoder": …, "unet": …}'
        )
    return parts["text_encoder"], parts["unet"]


class StableDiffusionPipeline(_InOrder):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (
        *("prompt", "height", "width", *_STEPS, *_GUIDED, *_DRAWN, "latents", *_EMBEDS),
        *(*_ADAPTER, *_OUTPUT, "guidance_rescale", *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"guidance_scale": 7.5}


class StableDiffusionXLPipeline(_InOrder):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (
        *("prompt", "prompt_2", "height", "width", *_STEPS, "denoising_end", *_GUIDED, "negative_prompt_2"),
        *(*_REST_XL, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"guidance_scale": 5.0}


class _AtOwnSize(_InOrder):
    def _size_of(self, given: Given) -> tuple[int, int]:
        """The engine's own, as in diffusers: there the size of the image says nothing."""
        return super()._size_of(Given())


class _Inpainting(_AtOwnSize):
    needs = ("image", "mask_image")


class StableDiffusionImg2ImgPipeline(_InOrder):
    """The drop-in for diffusers' class of this name."""

    needs = ("image",)
    order: ClassVar[Order] = (
        *("prompt", "image", "strength", *_STEPS, *_GUIDED, *_DRAWN, *_EMBEDS),
        *_REST,
    )
    defaults: ClassVar[Mapping[str, Any]] = {"strength": 0.8, "guidance_scale": 7.5}


class StableDiffusionInstructPix2PixPipeline(_InOrder):
    """The drop-in for diffusers' class of this name."""

    needs = ("image",)
    needed_for = "edits an image"
    order: ClassVar[Order] = (
        *("prompt", "image", "num_inference_steps", "guidance_scale", "image_guidance_scale"),
        *("negative_prompt", *_DRAWN, "latents", *_EMBEDS, *_ADAPTER, "output_type", "return_dict"),
        *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "cross_attention_kwargs"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 100, "guidance_scale": 7.5}


class StableDiffusionInpaintPipeline(_Inpainting):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (
        *("prompt", *_MASKED, *_STEPS, *_GUIDED, *_DRAWN, "latents", *_EMBEDS),
        *_REST,
    )
    defaults: ClassVar[Mapping[str, Any]] = {"strength": 1.0, "guidance_scale": 7.5}


class _Controlled(_InOrder):
    needs = ("image",)
    needed_for = "draws under the guidance of a control image"
    names: ClassVar[Mapping[str, str]] = {"image": "control_image"}


class StableDiffusionControlNetPipeline(_Controlled):
    """The drop-in for diffusers' class of this name: `image` is the control image."""

    order: ClassVar[Order] = (
        *("prompt", "image", "height", "width", *_STEPS, *_GUIDED, *_DRAWN, "latents", *_EMBEDS),
        *(*_ADAPTER, *_OUTPUT, *_CONTROL, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"guidance_scale": 7.5, "controlnet_conditioning_scale": 1.0}


class StableDiffusionXLControlNetPipeline(_Controlled):
    """The drop-in for diffusers' class of this name: `image` is the control image."""

    order: ClassVar[Order] = (
        *("prompt", "prompt_2", "image", "height", "width", *_STEPS, "denoising_end", *_GUIDED),
        *("negative_prompt_2", *_DRAWN, "latents", *_EMBEDS_XL, *_ADAPTER, *_OUTPUT, *_CONTROL),
        *(*TOLD_SIZES, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"guidance_scale": 5.0, "controlnet_conditioning_scale": 1.0}


class _ControlledOver(_InOrder):
    needed_for = "draws over an image under the guidance of a control image"

    def _size_of_part(self, image: Image.Image) -> tuple[int, int]:
        """The image's own, in whole latents, as in diffusers."""
        factor = self.engine.manifest.model.vae_scale_factor
        return image.height // factor * factor, image.width // factor * factor


class StableDiffusionControlNetImg2ImgPipeline(_ControlledOver):
    """The drop-in for diffusers' class of this name."""

    needs = ("image", "control_image")
    order: ClassVar[Order] = (
        *("prompt", "image", "control_image", "height", "width", "strength", "num_inference_steps", *_GUIDED),
        *(*_DRAWN, "latents", *_EMBEDS, *_ADAPTER, *_OUTPUT, *_CONTROL, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "strength": 0.8,
        "guidance_scale": 7.5,
        "controlnet_conditioning_scale": 0.8,
    }


class StableDiffusionControlNetInpaintPipeline(_ControlledOver):
    """The drop-in for diffusers' class of this name."""

    needs = _MASKED_CONTROL
    order: ClassVar[Order] = (
        *("prompt", *_MASKED_CONTROL, "height", "width", "padding_mask_crop", "strength"),
        *("num_inference_steps", *_GUIDED, *_DRAWN, "latents", *_EMBEDS),
        *(*_ADAPTER, *_OUTPUT, *_CONTROL, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "strength": 1.0,
        "guidance_scale": 7.5,
        "controlnet_conditioning_scale": 0.5,
    }


class StableDiffusionXLControlNetImg2ImgPipeline(_ControlledOver):
    """The drop-in for diffusers' class of this name."""

    needs = ("image", "control_image")
    order: ClassVar[Order] = (
        *("prompt", "prompt_2", "image", "control_image", "height", "width", "strength"),
        *("num_inference_steps", *_GUIDED, "negative_prompt_2", *_DRAWN, "latents", *_EMBEDS_XL),
        *(*_ADAPTER, *_OUTPUT, *_CONTROL, *TOLD_SIZES, *_SCORES, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "strength": 0.8,
        "guidance_scale": 5.0,
        "controlnet_conditioning_scale": 0.8,
    }


class StableDiffusionXLControlNetInpaintPipeline(_ControlledOver):
    """The drop-in for diffusers' class of this name. The negative prompt's sizes go by their names alone."""

    needs = _MASKED_CONTROL
    order: ClassVar[Order] = (
        *("prompt", "prompt_2", *_MASKED_CONTROL, "height", "width", "padding_mask_crop", "strength"),
        *("num_inference_steps", *_ENDS, *_GUIDED, "negative_prompt_2", *_DRAWN, "latents", *_EMBEDS),
        *(*_ADAPTER, *_POOLED, *_OUTPUT, *_CONTROL, "guidance_rescale", *TOLD_SIZES[:3]),
        *(*_SCORES, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "strength": 0.9999,
        "guidance_scale": 5.0,
        "controlnet_conditioning_scale": 1.0,
    }


class StableDiffusionXLImg2ImgPipeline(_InOrder):
    """The drop-in for diffusers' class of this name."""

    needs = ("image",)
    order: ClassVar[Order] = (
        *("prompt", "prompt_2", "image", "strength", *_STEPS, *_ENDS, *_GUIDED, "negative_prompt_2"),
        *(*_REST_XL, *_SCORES, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"strength": 0.3, "guidance_scale": 5.0}


class StableDiffusionXLInstructPix2PixPipeline(_AtOwnSize):
    """The drop-in for diffusers' class of this name."""

    needs = ("image",)
    needed_for = "edits an image"
    order: ClassVar[Order] = (
        *("prompt", "prompt_2", "image", "height", "width", "num_inference_steps", "denoising_end"),
        *("guidance_scale", "image_guidance_scale", "negative_prompt", "negative_prompt_2"),
        *(*_DRAWN, "latents"),
        *(*_EMBEDS_XL, "output_type", "return_dict", "callback", "callback_steps", "cross_attention_kwargs"),
        *("guidance_rescale", "original_size", "crops_coords_top_left", "target_size"),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 100, "guidance_scale": 5.0}


class StableDiffusionXLInpaintPipeline(_Inpainting):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (
        *("prompt", "prompt_2", *_MASKED, *_STEPS, *_ENDS, *_GUIDED, "negative_prompt_2"),
        *(*_REST_XL, *_SCORES, *_CALLBACK),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"strength": 0.9999, "guidance_scale": 7.5}


def _without_guess_mode(order: Order) -> Order:
    """Of the PAG pipelines under ControlNets, two take none in diffusers."""
    return tuple(name for name in order if name != "guess_mode")


class _Perturbed(_InOrder):
    """The engine has to have layers to be perturbed; by default they are diffusers'."""

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, **options: Any) -> Self:
        """As `Pipeline.from_pretrained`, with `pag_applied_layers="mid"` by default, as diffusers has it."""
        return super().from_pretrained(checkpoint, **{"pag_applied_layers": "mid", **options})


class StableDiffusionPAGPipeline(_Perturbed, StableDiffusionPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (*StableDiffusionPipeline.order, *_PAG)
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionPipeline.defaults, **_PAG_SCALE}


class StableDiffusionPAGImg2ImgPipeline(_Perturbed, StableDiffusionImg2ImgPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (*StableDiffusionImg2ImgPipeline.order, *_PAG)
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionImg2ImgPipeline.defaults, **_PAG_SCALE}


class StableDiffusionPAGInpaintPipeline(_Perturbed, StableDiffusionInpaintPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (
        *("prompt", *_MASKED, *_STEPS, *_GUIDED, *_DRAWN, "latents", *_EMBEDS),
        *(*_ADAPTER, *_OUTPUT, "guidance_rescale", *_CALLBACK, *_PAG),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        **StableDiffusionInpaintPipeline.defaults,
        **_PAG_SCALE,
        "strength": 0.9999,
    }


class StableDiffusionControlNetPAGPipeline(_Perturbed, StableDiffusionControlNetPipeline):
    """The drop-in for diffusers' class of this name: `image` is the control image."""

    order: ClassVar[Order] = (*StableDiffusionControlNetPipeline.order, *_PAG)
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionControlNetPipeline.defaults, **_PAG_SCALE}


class StableDiffusionControlNetPAGInpaintPipeline(_Perturbed, StableDiffusionControlNetInpaintPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (
        *_without_guess_mode(StableDiffusionControlNetInpaintPipeline.order),
        *_PAG,
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        **StableDiffusionControlNetInpaintPipeline.defaults,
        **_PAG_SCALE,
    }


class StableDiffusionXLPAGPipeline(_Perturbed, StableDiffusionXLPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (*StableDiffusionXLPipeline.order, *_PAG)
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionXLPipeline.defaults, **_PAG_SCALE}


class StableDiffusionXLPAGImg2ImgPipeline(_Perturbed, StableDiffusionXLImg2ImgPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (*StableDiffusionXLImg2ImgPipeline.order, *_PAG)
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionXLImg2ImgPipeline.defaults, **_PAG_SCALE}


class StableDiffusionXLPAGInpaintPipeline(_Perturbed, StableDiffusionXLInpaintPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (*StableDiffusionXLInpaintPipeline.order, *_PAG)
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionXLInpaintPipeline.defaults, **_PAG_SCALE}


class StableDiffusionXLControlNetPAGPipeline(_Perturbed, StableDiffusionXLControlNetPipeline):
    """The drop-in for diffusers' class of this name: `image` is the control image."""

    order: ClassVar[Order] = (
        *_without_guess_mode(StableDiffusionXLControlNetPipeline.order),
        *_PAG,
    )
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionXLControlNetPipeline.defaults, **_PAG_SCALE}


class StableDiffusionXLControlNetPAGImg2ImgPipeline(_Perturbed, StableDiffusionXLControlNetImg2ImgPipeline):
    """The drop-in for diffusers' class of this name."""

    order: ClassVar[Order] = (*StableDiffusionXLControlNetImg2ImgPipeline.order, *_PAG)
    defaults: ClassVar[Mapping[str, Any]] = {
        **StableDiffusionXLControlNetImg2ImgPipeline.defaults,
        **_PAG_SCALE,
    }
