"""Writing a module for the eager backend: its weights as safetensors, its config in their header."""

import json
from pathlib import Path
from typing import Any

from sdfast.backends.eager import HEADER
from sdfast.export.checkpoint import Checkpoint
from sdfast.export.modules import ModuleSpec
from sdfast.export.weights import save_weights
from sdfast.manifest import Span, Variant
from sdfast.models.config import controlnet_names
from sdfast.models.controlnet import ControlledUNet
from sdfast.models.half_range import changed_eps
from sdfast.models.ip_adapter import ImageContext
from sdfast.models.step_cache import ShallowUNet
from sdfast.models.unet import UNet
from sdfast.models.vae import VAEDecoder, VAEEncoder


def compile_eager(spec: ModuleSpec, place: Path, checkpoint: Checkpoint) -> list[Variant]:
    """Write `spec` to one file in `place`, which serves every size and batch that the spec's forms span."""
    component = checkpoint.component(spec.components[0])
    network = spec.load()
    header: dict[str, Any] = {
        "module": spec.name,
        "class": component.class_name,
        "family": checkpoint.family,
        "config": dict(component.config),
        "fp8": spec.fp8,
        "int8": spec.int8,
    }
    beside = controlnet_names(len(checkpoint.controlnets))
    if beside and set(beside) <= set(spec.components):
        header["controlnets"] = [dict(checkpoint.component(name).config) for name in beside]
    if isinstance(network, UNet | ShallowUNet) and network.branch is not None:
        header["cache_branch"] = network.branch
    stepping = network.unet if isinstance(network, ControlledUNet) else network
    if isinstance(stepping, UNet | ShallowUNet) and stepping.switch is not None:
        header["perturbed"] = stepping.switch.layers
    if checkpoint.chosen and component.name in ("unet", *checkpoint.text_encoders):
        header["loras"] = {"count": len(checkpoint.chosen), "ranks": checkpoint.ranks(component.name)}
    if checkpoint.ip_adapters and "unet" in spec.components:
        header["image_tokens"] = [adapter.config.tokens for adapter in checkpoint.ip_adapters]
    if isinstance(network, ImageContext):
        header["unet"] = dict(checkpoint.component("unet").config)
    if isinstance(network, VAEDecoder | VAEEncoder) and (eps := changed_eps(network)):
        header["eps"] = eps
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    path = place / f"{spec.name}.safetensors"
    save_weights(state, path, {HEADER: json.dumps(header)})
    batch = Span(low=1, high=max(form.batch.high for form in spec.forms))
    sizes = dict.fromkeys((form.height, form.width, form.tokens) for form in spec.forms)
    return [
        Variant(file=path.name, batch=batch, height=height, width=width, tokens=tokens)
        for height, width, tokens in sizes
    ]
