"""What two engines are asked for that share the denoising of a picture: one begins it, and another goes on.

What SDXL's base and refiner are for; see `sdfast.schedulers.experts` for which steps each of them does.
"""

from collections.abc import Mapping
from typing import Any

from sdfast.errors import RequestError
from sdfast.manifest import Model
from sdfast.request import Request

SWITCH_AT = 0.8  # of the denoising, as SDXL's authors use its refiner
_NOT_SHARED: Mapping[str, Any] = {"guidance_start": 0.0, "guidance_end": 1.0}


def halves(request: Request, switch_at: float, refiner: Model) -> tuple[Request, Request]:
    """What is asked of the base and of the refiner, for a whole picture that switches there.

    The refiner reads what the base's first text encoder reads, and has no ControlNet, no IP-Adapter
    and no shallow steps; of LoRAs those that it has, and perturbed-attention guidance if it has layers for
    that.
    Raises `RequestError` for what is not shared so.
    """
    for name, usual in _NOT_SHARED.items():
        if getattr(request, name) != usual:
            raise RequestError(f"{name}: is a share of the steps of one engine; leave it out with a refiner")
    fields = dict(request)
    alone: dict[str, Any] = {
        "strength": None,
        "controlnet_conditioning_scale": None,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
        "control_mode": None,
        "control_layer_scales": None,
        "ip_adapter_scale": None,
        "cache_interval": 1,
        "loras": {name: scale for name, scale in request.loras.items() if name in refiner.loras},
    }
    if not refiner.pag:
        alone |= {"pag_scale": 0.0, "pag_adaptive_scale": 0.0}
    if refiner.scored:
        names = ("prompts_2", "negative_prompts_2", "target_size", "negative_target_size")
        alone |= dict.fromkeys(names)
    return (
        Request.make(**{**fields, "denoising_end": switch_at}),
        Request.make(**{**fields, **alone, "denoising_start": switch_at}),
    )


def check_alike(base: Model, refiner: Model) -> None:
    """Raises `RequestError` for engines of which one cannot read the latents of the other."""
    told = [(m.family, m.latent_channels, m.vae_scale_factor) for m in (base, refiner)]
    if told[0] != told[1]:
        raise RequestError(
            f"refiner: is of {refiner.family}, with {refiner.latent_channels} channels of latents, and the "
            f"base of {base.family}, with {base.latent_channels}: it cannot go on with that one's; take two "
            "of one family"
        )
