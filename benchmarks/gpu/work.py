"""How much work the networks are: floating point operations counted on meta tensors, and bytes of weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import random_weights
from sdfast.models.unet import UNet, UNetConfig
from sdfast.models.vae import VAEConfig, VAEDecoder

TOKENS = 77


@dataclass(frozen=True)
class Work:
    """flops: two for each multiply-add. nbytes: that must move at least: weights once, inputs, outputs."""

    flops: float
    nbytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time that it takes where so much can be done."""
        return max(self.flops / flops_per_second, self.nbytes / bytes_per_second)


Meta = tuple[nn.Module, tuple[torch.Tensor, ...]]  # a network and its inputs, all of shapes alone


@cache
def unet(architecture: str, rows: int, height: int, width: int) -> Work:
    """One U-Net call in fp16, without what depends on the prompt or the time alone. Sizes in pixels."""
    network, inputs = unet_on_meta(architecture, rows, height, width)
    return _counted(network, *inputs)


def unet_on_meta(architecture: str, rows: int, height: int, width: int) -> Meta:
    """The U-Net in fp16. Sizes in pixels."""
    files = random_weights.configs(architecture)
    h, w = (side // _factor(files) for side in (height, width))
    with torch.device("meta"):
        network = UNet(UNetConfig.from_diffusers(files["unet/config.json"])).half()
        inputs = (
            torch.empty(rows, network.config.in_channels, h, w).half(),
            torch.empty(rows, sum(network.shift_widths)).half(),
            torch.empty(rows, TOKENS, sum(network.context_widths)).half(),
        )
    return network, inputs


@cache
def vae_decoder(architecture: str, batch: int, height: int, width: int) -> Work:
    """Decoding `batch` pictures, one at a time, in fp16."""
    network, inputs = vae_decoder_on_meta(architecture, height, width)
    one = _counted(network, *inputs)
    return Work(one.flops * batch, one.nbytes * batch)


def vae_decoder_on_meta(architecture: str, height: int, width: int) -> Meta:
    """The decoder of one picture, in fp16."""
    files = random_weights.configs(architecture)
    config = VAEConfig.from_diffusers(files["vae/config.json"])
    with torch.device("meta"):
        network = VAEDecoder(config).half()
        latents = torch.empty(1, config.latent_channels, height // config.scale, width // config.scale)
    return network, (latents,)


@cache
def text_encoder(architecture: str, name: str) -> Work:
    """One prompt of 77 tokens in fp16: the matrix products of a CLIP text model's layers."""
    config = random_weights.configs(architecture)[f"{name}/config.json"]
    d, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    weights = layers * (4 * d * d + 2 * d * inner)
    flops = 2 * weights * TOKENS + layers * 4 * TOKENS * TOKENS * d
    return Work(flops, 2 * weights)


@torch.no_grad()
def _counted(network: nn.Module, *inputs: torch.Tensor) -> Work:
    with FlopCounterMode(display=False) as counter:
        output = network(*inputs)
    tensors = (*network.parameters(), *inputs, output)
    return Work(counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _factor(files: Mapping[str, Any]) -> int:
    return int(math.prod([2] * (len(files["vae/config.json"]["block_out_channels"]) - 1)))
