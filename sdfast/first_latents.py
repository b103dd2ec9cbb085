"""The latents that a run starts from: noise, or those of an image that is drawn over.

As in diffusers' image-to-image and inpainting pipelines, which draw from the generator first for the latents
of the image, then for the noise, and for inpainting once more, for an image without what the mask covers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdfast.arithmetic import Keep
from sdfast.engine import Engine
from sdfast.errors import NumericalError, RequestError
from sdfast.manifest import Model
from sdfast.masked_area import MaskedArea
from sdfast.noise import NoiseSource
from sdfast.request import MaskedContent, Request
from sdfast.schedulers import Schedule


@dataclass(frozen=True)
class Over:
    """What is drawn over: images [m, 3, H, W] float32 in [0, 1], or their latents [m, C, h, w].

    mask: [k, 1, H, W] float32, 1 where they are drawn anew; None: everywhere. m and k divide the number of
    pictures, which take them in turn. area: where both were cut out, and pictures are pasted.
    """

    image: Tensor
    mask: Tensor | None = None
    area: MaskedArea | None = None


@dataclass(frozen=True)
class Start:
    """latents [n, C, h, w] float32, and of each picture what it keeps, or what its U-Net is told beside them.

    beside: [n, E, h, w] float32: the mask and the latents of the masked image; or those of the image that is
    edited.
    """

    latents: Tensor
    keeps: list[Keep | None]
    beside: Tensor | None = None


def start_over(
    engine: Engine, request: Request, plan: Schedule, noise: NoiseSource, over: Over, *, seeded: bool
) -> Start:
    """Where a run over images starts. Raises `RequestError` for what does not fit the request or the engine.

    seeded: the pictures have the request's seeds, and are what they would be alone; else the generators are
    the caller's, and are drawn from as by diffusers.
    """
    model, n = engine.manifest.model, request.images
    goes_on = request.denoising_start is not None  # with latents as they are
    if over.image.shape[1] == 3:
        check_edits(engine)
    check_fit(request, over, model)
    # diffusers has each generator draw for its picture; in inpainting, though, for each image.
    count = n if noise.apart and (over.mask is None or seeded) else len(over.image)
    if goes_on and over.mask is None:
        return Start(_in_turn(_image_latents(engine, noise, over.image, count), n), [None] * n)
    levels = check_noising(plan)
    # It starts from noise alone, as in diffusers; not in AUTOMATIC1111, where what is masked has a content.
    pure = over.mask is not None and request.strength == 1.0 and request.masked_content is None
    clean = None
    if not (pure and model.inpaints):
        clean = _in_turn(_image_latents(engine, noise, over.image, count), n)
    unit = noise.initial().to(engine.device)
    a, b = (1.0, 0.0) if goes_on else map(float, levels[0])
    anew = None if over.mask is None else _in_turn(_mask_of_latents(engine, over.mask), n)
    if pure or clean is None:
        latents = unit * plan.init_noise_sigma
    else:
        content = None if goes_on else request.masked_content  # with which it was begun
        latents = a * _with_content(content, clean, unit, anew) + b * unit
    if over.mask is None or anew is None:
        return Start(latents, [None] * n)
    keeps: list[Keep | None] = []
    if clean is not None:
        keeps = [Keep(*each) for each in zip(anew, clean, unit, strict=True)]
    if over.image.shape[1] != 3:  # of latents, nothing is hidden by the mask before they are encoded
        return Start(latents, keeps)
    masked = torch.where(over.mask > 0, 0.5, over.image)  # grey, which the encoder takes as 0
    count = n if seeded else len(masked)
    if model.inpaints:
        hidden = _in_turn(_image_latents(engine, noise, masked, count), n)
        return Start(latents, [None] * n, torch.cat([anew.float(), hidden], dim=1))
    if engine.manifest.draws_latents:  # diffusers', of the masked image too, of which this U-Net is not told
        noise.initial(count)
    return Start(latents, keeps)


def edited_latents(engine: Engine, request: Request, over: Over) -> Tensor:
    """What an InstructPix2Pix U-Net is told of the images that it edits, [n, C, h, w] float32: the means of
    their latents, for which nothing is drawn. Raises `RequestError` for what does not fit."""
    model = engine.manifest.model
    check_edits(engine)
    check_fit(request, over, model)
    mean, _ = encoded(engine, over.image)
    return _in_turn(mean * (model.image_latents_scale or 1.0), request.images)


def check_noising(plan: Schedule) -> np.ndarray:
    """The plan's `noising`. Raises `RequestError` for a scheduler that draws over nothing."""
    if plan.noising is None:
        raise RequestError(
            f"{plan.scheduler} has no add_noise, so nothing is drawn over by it; choose another"
        )
    return plan.noising


def check_fit(request: Request, over: Over, model: Model) -> None:
    """Raises `RequestError` for images or masks of another size or number than the request's, and for latents
    where the U-Net is told what the mask leaves of an image."""
    height, width, latent = request.height, request.width, model.vae_scale_factor
    sizes = {"image": over.image.shape, "mask_image": over.mask.shape if over.mask is not None else None}
    for name, shape in sizes.items():
        if shape is None:
            continue
        factor = 1 if name == "mask_image" or shape[1] == 3 else latent
        if (shape[2] * factor, shape[3] * factor) != (height, width):
            raise RequestError(
                f"{name}: {shape[3] * factor}x{shape[2] * factor}, but the picture is {width}x{height} "
                "(width x height); scale the one, or ask for the other"
            )
        if request.images % shape[0]:
            raise RequestError(
                f"{name}: {shape[0]} for {request.images} pictures; give one for all, or one for each"
            )
    if model.inpaints and over.image.shape[1] != 3:
        raise RequestError(
            "image: this U-Net (inpainting) is told the masked image, and latents cannot be masked; give the "
            "image itself"
        )
    if model.instructed and over.image.shape[1] != 3:
        raise RequestError(
            "image: latents, but this U-Net (InstructPix2Pix) edits the image itself; give that"
        )


def check_strength(request: Request, *, over: bool, masked: bool) -> None:
    """Raises `RequestError` for a strength, or a start, without anything to draw over, and the reverse; and
    for what is said of a mask without one."""
    if request.over != over:
        names = ("denoising_start", "image_guidance_scale")
        name = next((name for name in names if getattr(request, name) is not None), "strength")
        raise RequestError(f"{name} and an image to draw over go together; give both, or neither")
    if request.of_mask is not None and not masked:
        raise RequestError(f"{request.of_mask}: is for what a mask leaves open; give a mask, or leave it out")


def check_pasted(over: Over | None, output_type: str) -> None:
    """Raises `RequestError` for what is to be pasted into an image and will be no picture."""
    if over is not None and over.area is not None and output_type != "pil":
        raise RequestError(
            f"output_type: {output_type!r}, but with padding_mask_crop pictures are pasted into the image, "
            "which is a PIL image; leave it at 'pil', or leave padding_mask_crop out"
        )


def check_edits(engine: Engine) -> None:
    """Raises `RequestError` unless the engine takes images."""
    if not engine.manifest.edits:
        raise RequestError(
            f"engine {engine.manifest.name!r} has no VAE encoder, so it takes no images; export it again "
            "from a checkpoint whose VAE has one"
        )


def encoded(engine: Engine, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """image [m, 3, H, W] in [0, 1] -> mean and standard deviation of its latents, [m, C, h, w] float32; a
    tiny VAE has no deviation, and its latents are the mean.

    Raises `NumericalError` when they are not finite.
    """
    inputs = {"image": (image * 2 - 1).to(engine.device)}
    moments = engine.call("vae_encoder", inputs, *image.shape[2:])
    if not all(bool(torch.isfinite(part).all()) for part in moments.values()):
        raise NumericalError(f"the image's latents are not finite; {engine.manifest.remedy('vae_encoder')}")
    return moments["mean"], moments.get("std")


def _image_latents(engine: Engine, noise: NoiseSource, image: Tensor, count: int) -> Tensor:
    """Latents of so many draws, [count, C, h, w] float32, the images in turn; latents as they are."""
    if image.shape[1] != 3:
        return image.to(engine.device)
    mean, std = encoded(engine, image)
    if std is None:
        return _in_turn(mean, count)
    drawn = noise.initial(count).to(engine.device)
    return _in_turn(mean, count) + _in_turn(std, count) * drawn


def _with_content(content: MaskedContent | None, clean: Tensor, unit: Tensor, anew: Tensor | None) -> Tensor:
    """The image's latents with those in their place where it is drawn anew that AUTOMATIC1111 puts there,
    [n, C, h, w] float32: each picture's own first noise, which it has once more in what noises them; or
    zeros. anew: [n, 1, h, w] bool."""
    if anew is None or content not in ("latent_noise", "latent_nothing"):
        return clean
    return torch.where(anew, unit if content == "latent_noise" else torch.zeros_like(clean), clean)


def _mask_of_latents(engine: Engine, mask: Tensor) -> Tensor:
    """[k, 1, H, W] -> [k, 1, h, w] bool: of each latent the pixel at its corner says whether it is drawn."""
    factor = engine.manifest.model.vae_scale_factor
    return mask[:, :, ::factor, ::factor].bool().to(engine.device)


def _in_turn(values: Tensor, count: int) -> Tensor:
    """The first `count` of the values repeated over and over."""
    return values if len(values) == count else values.repeat(-(-count // len(values)), 1, 1, 1)[:count]
