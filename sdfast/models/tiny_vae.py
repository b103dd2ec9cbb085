"""The tiny autoencoder (TAESD, Boer Bohan 2023), distilled from a VAE: it encodes and decodes the same
latents by a small part of the work, to nearly the same pictures.

Its layers are numbered through, as in diffusers' AutoencoderTiny.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.fields import Fields
from sdfast.models.layers import Conv3x3

REACH = 3.0  # beyond which latents are squeezed before they are decoded


@dataclass(frozen=True)
class TinyVAEConfig:
    """channels: of all layers within. encoder_blocks, decoder_blocks: residual blocks of each resolution, in
    the order in which they are run."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    scaling_factor: float
    shift_factor: float

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "TinyVAEConfig":
        """The content of a checkpoint's `vae/config.json`; CheckpointError names what is not supported."""
        fields = Fields("vae", config)
        fixed = {"upsampling_scaling_factor": 2, "upsample_fn": "nearest"}
        # Of no use in a picture: how latents are stored as bytes, and what diffusers derives.
        fields.require(fixed, {"latent_magnitude", "latent_shift", "force_upcast", "block_out_channels"})
        fields.choose("act_fn", ("relu",), "relu")
        encoder_blocks = _blocks(fields, "num_encoder_blocks", (1, 3, 3, 3))
        decoder_blocks = _blocks(fields, "num_decoder_blocks", (3, 3, 3, 1))
        if len(encoder_blocks) != len(decoder_blocks):
            raise fields.refuse("num_decoder_blocks", f"{len(encoder_blocks)}, as in num_encoder_blocks")
        fields.levels = len(encoder_blocks)
        sides = ("encoder_block_out_channels", "decoder_block_out_channels")
        widths = {width for side in sides for width in fields.integers(side, 64)}
        if len(widths) > 1:
            raise fields.refuse(sides[1], "one number of channels throughout, in the encoder too")
        tiny = cls(
            in_channels=fields.integer("in_channels", 3),
            out_channels=fields.integer("out_channels", 3),
            latent_channels=fields.integer("latent_channels", 4),
            channels=widths.pop(),
            encoder_blocks=encoder_blocks,
            decoder_blocks=decoder_blocks,
            scaling_factor=fields.number("scaling_factor", 1.0),
            shift_factor=fields.number("shift_factor", 0.0),
        )
        fields.finish()
        return tiny

    @property
    def scale(self) -> int:
        """Pixels of the picture for each latent, along height and width."""
        return int(2 ** (len(self.decoder_blocks) - 1))


def _blocks(fields: Fields, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    fields.levels = len(fields.config.get(name) or default)
    return fields.integers(name, default)


class ReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class UpsampleTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.upsample_twice(x)


class TinyBlock(nn.Module):
    """Three convolutions beside the identity, with a ReLU after each and after their sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [Conv3x3(channels, channels) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], ReLU(), convolutions[1], ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return ops.relu(ops.add(x, self.conv(x)))


class Layers(nn.Module):
    """Layers that follow one another, in the dtype of their weights. What they are given, and give, is
    float32."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x.to(self.dtype))
        return y.float()


def _blocks_of(channels: int, count: int) -> list[nn.Module]:
    return [TinyBlock(channels) for _ in range(count)]


def _encoder(config: TinyVAEConfig) -> Layers:
    channels = config.channels
    layers: list[nn.Module] = []
    for level, count in enumerate(config.encoder_blocks):
        first = Conv3x3(config.in_channels, channels)
        enters = Conv3x3(channels, channels, stride=2, bias=False) if level else first
        layers += [enters, *_blocks_of(channels, count)]
    return Layers([*layers, Conv3x3(channels, config.latent_channels)])


def _decoder(config: TinyVAEConfig) -> Layers:
    channels, (smallest, *larger) = config.channels, config.decoder_blocks
    layers: list[nn.Module] = [Conv3x3(config.latent_channels, channels), ReLU()]
    layers += _blocks_of(channels, smallest)
    for count in larger:
        layers += [UpsampleTwice(), Conv3x3(channels, channels, bias=False), *_blocks_of(channels, count)]
    return Layers([*layers, Conv3x3(channels, config.out_channels)])


class TinyDecoder(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = _decoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """As `VAEDecoder`: latents [B, c, h, w] as the loop leaves them -> pictures [B, 3, H, W] in [0, 1].

        Both are float32, whatever the dtype of the weights. What is not finite is NaN in the picture.
        """
        x = latents / self.config.scaling_factor + self.config.shift_factor
        picture: Tensor = self.decoder(torch.tanh(x / REACH) * REACH)
        return picture.clamp(0, 1) + (picture - picture)


class TinyEncoder(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> its latents as the loop has them, [B, c, h, w].

        There is no spread around them, and nothing is drawn. Both are float32, whatever the dtype of the
        weights.
        """
        latents: Tensor = self.encoder((image + 1) / 2)
        return (latents - self.config.shift_factor) * self.config.scaling_factor
