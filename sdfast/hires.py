"""What a second pass draws over: latents, or pictures, enlarged."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdfast.request import Hires, Request

_MODES: Mapping[str, tuple[str, bool]] = {
    "latent": ("bilinear", False),
    "latent_antialiased": ("bilinear", True),
    "latent_bicubic": ("bicubic", False),
    "latent_bicubic_antialiased": ("bicubic", True),
    "latent_nearest": ("nearest", False),
    "latent_nearest_exact": ("nearest-exact", False),
}
"""How PyTorch interpolates latents, and whether it smooths them before; as in AUTOMATIC1111."""

_FILTERS: Mapping[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def covering(request: Request, hires: Hires) -> tuple[int, int]:
    """Height and width in pixels to which the first pass's pictures are enlarged: in their own proportions,
    the least that cover the second pass's size, rounded down."""
    if request.width * hires.height < hires.width * request.height:
        return hires.width * request.height // request.width, hires.width
    return hires.height, hires.height * request.width // request.height


def enlarged_latents(latents: Tensor, request: Request, hires: Hires, factor: int) -> Tensor:
    """[n, C, h, w] of the first pass -> [n, C, h', w'] of the second. factor: pixels of a latent's side."""
    height, width = covering(request, hires)
    mode, antialias = _MODES[hires.upscaler]
    size = (height // factor, width // factor)
    large = torch.nn.functional.interpolate(latents, size, mode=mode, antialias=antialias)
    top, left = (size[0] - hires.height // factor) // 2, (size[1] - hires.width // factor) // 2
    return large[..., top : top + hires.height // factor, left : left + hires.width // factor].contiguous()


def enlarged_images(images: np.ndarray, request: Request, hires: Hires, factor: int) -> Tensor:
    """[n, H, W, 3] uint8 of the first pass -> [n, 3, H', W'] float32 in [0, 1] of the second.

    What is cropped is whole latents, as of latents.
    """
    height, width = covering(request, hires)
    top, left = ((height - hires.height) // factor // 2, (width - hires.width) // factor // 2)
    box = (left * factor, top * factor, left * factor + hires.width, top * factor + hires.height)
    large = [
        np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[hires.upscaler]).crop(box))
        for image in images
    ]
    return torch.from_numpy(np.stack(large).astype(np.float32) / np.float32(255)).permute(0, 3, 1, 2)
