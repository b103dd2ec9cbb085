"""Drawing with the stock pipeline: a request of sdfast's, in diffusers' own arguments and pipelines."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdfast.errors import BackendError, RequestError
from sdfast.first_latents import Over, check_pasted
from sdfast.hires import enlarged_images, enlarged_latents
from sdfast.noise import generator
from sdfast.request import SCORES, TOLD_SIZES, Hires, Request, each
from sdfast.schedulers import resolve
from sdfast.validation.hooks import cached_steps, guided_steps
from sdfast.validation.reading import as_given, embeddings, is_plain
from sdfast.validation.reference import (
    is_instructed,
    is_scored,
    pipeline_class,
    quiet,
    set_loras,
    stock,
    tokenizers_of,
)

INPAINTED_CHANNELS = (4, 9)  # of the U-Nets that diffusers' inpainting pipelines take


def generate(
    pipe: Any,
    request: Request,
    *,
    scheduler: Any = None,
    output_type: str = "pil",
    over: Over | None = None,
    control: torch.Tensor | None = None,
    cache_branch: int | None = None,
    ip_adapter_images: torch.Tensor | None = None,
) -> Any:
    """The pictures of `request` by the stock pipeline, the way sdfast's `Pipeline.generate` draws them.

    Image i has the generator of seed + i. scheduler: a diffusers scheduler in place of the one that the
    request names. over: what a request with an image is drawn over, by the stock pipeline for that, on the
    networks of `pipe`; pictures of a part of an image are pasted into it. control: the control images of a
    pipeline with N ControlNets, [m, N 3, H, W], which the pictures take in turn.
    cache_branch: of a request with a `cache_interval`, see `cached_steps`.
    ip_adapter_images: of a pipeline with IP-Adapters, as `sdfast.ip_adapter.read_images` gives them; without,
    it is told of black ones that count for nothing.
    Returns a list of PIL images; or for `output_type="pt"` a tensor [n, 3, H, W] float32 in [0, 1], for
    "latent" the latents [n, C, h, w] float32.

    Raises `RequestError` and `BackendError` for what that pipeline cannot do.
    """
    if request.prompt_editing:
        raise RequestError("prompt_editing: diffusers has none; leave it out, or draw with an engine")
    if request.varied:
        raise RequestError(
            "variation_strength, seed_resize_from: diffusers has neither; leave them out, or draw with an "
            "engine"
        )
    if any(len(parts) > 1 or parts[0][1] != 1 for parts in request.composed):
        raise RequestError(
            "prompt: diffusers adds no prompts up, and knows no weight at the end of one; write it "
            "otherwise, or draw with an engine"
        )
    if set(each(request.control_mode)) - {None} not in (set(), {"guess"}) or request.control_layer_scales:
        raise RequestError(
            "control_mode, control_layer_scales: diffusers has no mode but guess, for all ControlNets; leave "
            "them out, or draw with an engine"
        )
    check_pasted(over, output_type)
    if request.hires is not None:
        return _generate_twice(
            pipe, request, request.hires, scheduler, output_type, cache_branch, ip_adapter_images
        )
    set_loras(pipe, {name: request.lora_scales(name) for name in request.loras})
    drawing = pipe if over is None or is_instructed(pipe) else _pipeline_over(pipe, request, over)
    own = drawing.scheduler
    drawing.scheduler = scheduler or stock_scheduler(pipe, request.scheduler)
    try:
        with quiet():
            parts = [
                _generate_one(
                    drawing, request, i, output_type, over, control, cache_branch, ip_adapter_images
                )
                for i in range(len(request.prompts))
            ]
    finally:
        drawing.scheduler = own
    if output_type in ("pt", "latent"):
        return torch.cat(parts).float()
    images = [image for part in parts for image in part]
    if over is None or over.area is None:
        return images
    return [over.area.pasted(image) for image in images]


def _generate_twice(
    pipe: Any,
    request: Request,
    hires: Hires,
    scheduler: Any,
    output_type: str,
    cache_branch: int | None,
    ip_adapter_images: torch.Tensor | None,
) -> Any:
    """Text to image, what that gives enlarged, and image to image over it."""

    def draw(asked: Request, scheduler: Any, output_type: str, over: Over | None = None) -> Any:
        return generate(
            pipe,
            asked,
            scheduler=scheduler,
            output_type=output_type,
            over=over,
            cache_branch=cache_branch,
            ip_adapter_images=ip_adapter_images,
        )

    first, second = request.model_copy(update={"hires": None}), request.passes[-1]
    factor = pipe.vae_scale_factor
    if hires.latent:
        latents = draw(first, scheduler, "latent")
        over = Over(enlarged_latents(latents, request, hires, factor))
    else:
        images = draw(first, scheduler, "pil")
        over = Over(enlarged_images(np.stack(images), request, hires, factor))
    own = None if hires.scheduler is not None else scheduler
    return draw(second, own, output_type, over)


def _pipeline_over(pipe: Any, request: Request, over: Over) -> Any:
    """diffusers' own image-to-image or inpainting pipeline, on the networks of `pipe`."""
    channels = pipe.unet.config.in_channels
    if over.mask is not None and channels not in INPAINTED_CHANNELS:
        raise BackendError(
            f"diffusers' inpainting takes U-Nets of 4 or 9 channels, and this one has {channels}; leave the "
            "mask out, or draw with an engine"
        )
    sdxl, controlnet = hasattr(pipe, "text_encoder_2"), hasattr(pipe, "controlnet")
    if request.guidance_rescale and (controlnet or not sdxl):
        raise RequestError("guidance_rescale: diffusers takes none over an image; leave it at 0")
    without: dict[str, Any] = {"add_watermarker": False} if sdxl else {"requires_safety_checker": False}
    kind = pipeline_class(
        "sdxl" if sdxl else "sd",
        controlnet=controlnet,
        masked=over.mask is not None,
        pag=bool(request.pag_scale),
    )
    if not hasattr(stock(), kind):
        raise RequestError(f"pag_scale: diffusers has no {kind}; leave it out, or draw with an engine")
    if request.pag_scale:
        without["pag_applied_layers"] = pipe.pag_applied_layers
    with quiet():
        # Of the VAE it would take the class alone that its signature names.
        taken = {"vae": pipe.vae, "torch_dtype": pipe.unet.dtype}
        made = getattr(stock(), kind).from_pipe(pipe, **taken, **without)
    made.set_progress_bar_config(**pipe._progress_bar_config)
    return made


def _ends(pipe: Any, request: Request) -> dict[str, Any]:
    """Between which shares of the denoising the stock pipeline draws. Raises `RequestError` where it draws
    all of it."""
    given = {name: getattr(request, name) for name in ("denoising_start", "denoising_end")}
    asked = {name: share for name, share in given.items() if share is not None}
    taken = inspect.signature(pipe.__call__).parameters
    for name in asked:
        if name not in taken:
            raise RequestError(f"{name}: diffusers' {type(pipe).__name__} takes none; draw with an engine")
    return asked


def _over_arguments(request: Request, rows: range, over: Over) -> dict[str, Any]:
    """What the stock pipeline is told of an image: one for each picture, which its own generator samples."""
    run: dict[str, Any] = {"image": over.image[[i % len(over.image) for i in rows]]}
    if request.strength is not None:
        run["strength"] = request.strength
    if request.image_guidance_scale is not None:
        run["image_guidance_scale"] = request.image_guidance_scale
    if over.mask is not None:
        run |= {"mask_image": over.mask[[i % len(over.mask) for i in rows]]}
        run |= {"height": request.height, "width": request.width}
    return run


def _control_arguments(
    pipe: Any, request: Request, rows: range, control: torch.Tensor, over: Over | None
) -> dict[str, Any]:
    """What the stock pipeline is told of control images, which are its `image` unless it has another."""
    count = control.shape[1] // 3
    images = control[[i % len(control) for i in rows]].chunk(count, dim=1)
    told: dict[str, Any] = {
        "controlnet_conditioning_scale": request.controlnet_conditioning_scale,
        "control_guidance_start": request.control_guidance_start,
        "control_guidance_end": request.control_guidance_end,
    }
    told = {name: list(each(number, count)) if count > 1 else number for name, number in told.items()}
    if request.control_mode is not None:  # which is guess: see `generate`
        if "guess_mode" not in inspect.signature(pipe.__call__).parameters:
            raise RequestError(
                f"control_mode: diffusers' {type(pipe).__name__} takes no guess_mode; draw with an engine"
            )
        told["guess_mode"] = True
    return {"image" if over is None else "control_image": list(images) if count > 1 else images[0], **told}


def _adapter_arguments(pipe: Any, request: Request, images: torch.Tensor | None) -> dict[str, Any]:
    """What a stock pipeline with IP-Adapters is told of their images, once it knows how much they count."""
    if getattr(pipe, "image_encoder", None) is None:
        return {}
    count = pipe.unet.encoder_hid_proj.num_ip_adapters
    scale = request.ip_adapter_scale
    if images is None or scale is None:
        side = pipe.feature_extractor.crop_size["height"]
        images, scale = torch.zeros(count, side, side, 3, dtype=torch.uint8), 0.0
    several = scale if isinstance(scale, tuple) else (scale,) * count
    pipe.set_ip_adapter_scale([_as_lists(one) for one in several])
    return {"ip_adapter_image": [Image.fromarray(image.numpy()) for image in images]}


def _as_lists(scale: Any) -> Any:
    """A scale as diffusers takes it, which knows lists alone."""
    if isinstance(scale, Mapping):
        return {name: _as_lists(part) for name, part in scale.items()}
    return list(scale) if isinstance(scale, tuple) else scale


def _generate_one(
    pipe: Any,
    request: Request,
    index: int,
    output_type: str,
    over: Over | None = None,
    control: torch.Tensor | None = None,
    cache_branch: int | None = None,
    ip_adapter_images: torch.Tensor | None = None,
) -> Any:
    """The pictures of one prompt: diffusers takes a missing negative prompt for all prompts or for none."""
    count = request.num_images_per_prompt
    rows = range(index * count, (index + 1) * count)
    seeds = [request.seeds[i] for i in rows]
    run: dict[str, Any] = {"num_inference_steps": request.num_inference_steps}
    if request.timesteps is not None:
        run = {"timesteps": [_whole(t) for t in request.timesteps]}
    if request.sigmas is not None:
        run = {"sigmas": list(request.sigmas)}
    if pipe.scheduler.config.get("noise_sampler_seed", 0) is None:
        # DPM++ SDE would seed its Brownian motion at random; sdfast gives each picture its own
        pipe.scheduler.noise_sampler_seed = seeds
    if over is None:
        run |= {"height": request.height, "width": request.width}
    else:
        run |= _over_arguments(request, rows, over)
    if control is not None:
        run |= _control_arguments(pipe, request, rows, control, over)
    run |= _adapter_arguments(pipe, request, ip_adapter_images)
    run |= _text_arguments(pipe, request, index) if is_plain(request) else embeddings(pipe, request, index)
    run |= _model_arguments(pipe, request)
    run |= _ends(pipe, request)
    with guided_steps(pipe, request), cached_steps(pipe, request.cache_interval, cache_branch):
        return pipe(
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=count,
            eta=request.eta,
            generator=[generator(seed) for seed in seeds],
            output_type=output_type,
            **run,
        ).images


def _text_arguments(pipe: Any, request: Request, index: int) -> dict[str, Any]:
    """Prompt `index` and its negative, which the stock pipeline reads by itself."""
    texts = {"prompt": request.prompts[index], "negative_prompt": request.negative_prompts[index]}
    told: dict[str, Any] = {name: as_given(tokenizers_of(pipe)[0], text) for name, text in texts.items()}
    if hasattr(pipe, "text_encoder_2"):
        # as lists, in which diffusers takes an empty text for one
        seconds = {"prompt_2": request.pairs[index][1], "negative_prompt_2": request.negative_pairs[index][1]}
        for name, text in seconds.items():
            told[name] = None if text is None else [as_given(pipe.tokenizer_2, text)]
    return told


def _model_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """What some stock pipelines take, and others do not. Raises `RequestError` for what this one lacks."""
    taken = inspect.signature(pipe.__call__).parameters
    if request.clip_skip is not None and "clip_skip" not in taken:
        raise RequestError(f"clip_skip: diffusers' {type(pipe).__name__} takes none; draw with an engine")
    if request.pag_scale and "pag_scale" not in taken:
        raise RequestError(f"pag_scale: diffusers' {type(pipe).__name__} takes none; draw with an engine")
    names = ["guidance_rescale", "clip_skip", "pag_scale", "pag_adaptive_scale"]
    if hasattr(pipe, "text_encoder_2"):
        names += TOLD_SIZES
        names += ["height", "width"] if is_instructed(pipe) else []
    names += SCORES if is_scored(pipe) else []
    return {name: getattr(request, name) for name in names if name in taken}


def _whole(timestep: float) -> float:
    return int(timestep) if timestep == int(timestep) else timestep


def stock_scheduler(pipe: Any, name: str | None) -> Any:
    """A new diffusers scheduler with the config of the checkpoint, which the name may override in part.

    name: any that `sdfast.schedulers.resolve` knows; None for the checkpoint's own class.
    """
    config = pipe.scheduler.config
    if name is None:
        return type(pipe.scheduler).from_config(config)
    sampler = resolve(name)
    return getattr(stock(), sampler.scheduler).from_config(config, **sampler.overrides)
