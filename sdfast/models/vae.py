"""The autoencoder between pictures and latents (Rombach et al. 2022)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.fields import Fields
from sdfast.models.layers import (
    Conv1x1,
    Conv3x3,
    Downsample,
    GroupNorm,
    Linear,
    PackedLinear,
    Part,
    ResBlock,
    Upsample,
)
from sdfast.models.tiny_vae import TinyDecoder, TinyEncoder, TinyVAEConfig
from sdfast.models.weights import load_weights

EPS = 1e-6
LOG_VARIANCE = (-30.0, 20.0)  # what the encoder's log variances are clamped to, as in diffusers
# What the attention's layers were called before diffusers 0.15; old checkpoints still have it.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """The content of a checkpoint's `vae/config.json`; CheckpointError names what is not supported."""
        fields = Fields("vae", config)
        fields.require({"latents_mean": None, "latents_std": None}, {"sample_size"})
        fields.choose("act_fn", ("silu", "swish"), "silu")
        down = fields.blocks("down_block_types", ("DownEncoderBlock2D",), ("DownEncoderBlock2D",))
        fields.levels = len(down)
        up = fields.blocks("up_block_types", ("UpDecoderBlock2D",), ("UpDecoderBlock2D",))
        if len(up) != len(down):
            raise fields.refuse("up_block_types", f"{len(down)} blocks, as in down_block_types")
        vae = cls(
            in_channels=fields.integer("in_channels", 3),
            out_channels=fields.integer("out_channels", 3),
            latent_channels=fields.integer("latent_channels", 4),
            block_out_channels=fields.integers("block_out_channels", (64,)),
            layers_per_block=fields.integer("layers_per_block", 1),
            norm_num_groups=fields.integer("norm_num_groups", 32),
            scaling_factor=fields.number("scaling_factor", 0.18215),
            shift_factor=0.0
            if fields.take("shift_factor", None) is None
            else fields.number("shift_factor", 0.0),
            use_quant_conv=fields.flag("use_quant_conv", True),
            use_post_quant_conv=fields.flag("use_post_quant_conv", True),
            mid_block_add_attention=fields.flag("mid_block_add_attention", True),
        )
        fields.flag("force_upcast", True)  # where diffusers takes float32; see `sdfast.models.half_range`
        fields.finish()
        return vae

    @property
    def scale(self) -> int:
        """Pixels of the picture for each latent, along height and width."""
        return int(2 ** (len(self.block_out_channels) - 1))


class Attention(nn.Module):
    """Self-attention of one head over the pixels of an image, added to it. Its softmax is always float32."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(channels, groups, EPS)
        self.to_qkv = PackedLinear(channels, [Part(n, channels) for n in ("to_q", "to_k", "to_v")], bias=True)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        tokens, qkv = ops.tokens_from_image(self.group_norm(x)), self.to_qkv
        h = self.to_out[0](ops.self_attention(tokens, qkv.weight, qkv.bias, 1, True))
        return ops.add(x, ops.image_from_tokens(h, x))


def _resnets(config: VAEConfig, inputs: int, outputs: int, count: int) -> nn.ModuleList:
    widths = [inputs] + [outputs] * (count - 1)
    return nn.ModuleList([ResBlock(n, outputs, config.norm_num_groups, EPS, shifted=False) for n in widths])


class Mid(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(
            [ResBlock(channels, channels, groups, EPS, shifted=False) for _ in range(2)]
        )
        attends = config.mid_block_add_attention
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        y: Tensor = self.resnets[1](x)
        return y


class Level(nn.Module):
    """ResNet blocks of one resolution; most end by doubling it (decoder) or halving it (encoder)."""

    def __init__(self, config: VAEConfig, inputs: int, outputs: int, resnets: int) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (resnets - 1)
        self.resnets = nn.ModuleList(
            [ResBlock(n, outputs, config.norm_num_groups, EPS, shifted=False) for n in widths]
        )

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class DownLevel(Level):
    def __init__(self, config: VAEConfig, inputs: int, outputs: int, last: bool) -> None:
        super().__init__(config, inputs, outputs, config.layers_per_block)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(outputs, padding=(0, 1))])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for down in self.downsamplers:
            x = down(x)
        return x


class UpLevel(Level):
    def __init__(self, config: VAEConfig, inputs: int, outputs: int, last: bool) -> None:
        super().__init__(config, inputs, outputs, config.layers_per_block + 1)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for up in self.upsamplers:
            x = up(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = Conv3x3(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            [DownLevel(config, widths[max(i - 1, 0)], width, i == last) for i, width in enumerate(widths)]
        )
        self.mid_block = Mid(config)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, EPS, silu=True)
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        y: Tensor = self.conv_out(self.conv_norm_out(self.mid_block(x)))
        return y


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = Conv3x3(config.latent_channels, widths[0])
        self.mid_block = Mid(config)
        self.up_blocks = nn.ModuleList(
            [UpLevel(config, widths[max(i - 1, 0)], width, i == last) for i, width in enumerate(widths)]
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, EPS, silu=True)
        self.conv_out = Conv3x3(widths[-1], config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        y: Tensor = self.conv_out(self.conv_norm_out(x))
        return y


class VAEDecoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.post_quant_conv = Conv1x1(channels, channels) if config.use_post_quant_conv else None
        self.decoder = Decoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, c, h, w] as the loop leaves them -> pictures [B, 3, H, W] in [0, 1].

        Both are float32, whatever the dtype of the weights. What is not finite is NaN in the picture.
        """
        x = latents / self.config.scaling_factor + self.config.shift_factor
        x = x.to(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        image: Tensor = self.decoder(x)
        picture = image.float() / 2 + 0.5
        # Clamped, an infinity would be a white or black pixel, and some backends' clamps lose NaN as well.
        return picture.clamp(0, 1) + (picture - picture)


class VAEEncoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = Conv1x1(channels, channels) if config.use_quant_conv else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> mean and standard deviation of its latents, [B, c, h, w] each.

        Of the latents as the loop has them: a sample is mean + std · unit noise. All are float32, whatever
        the dtype of the weights.
        """
        moments: Tensor = self.encoder(image.to(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = (log_variance.clamp(*LOG_VARIANCE) / 2).exp()
        scale, shift = self.config.scaling_factor, self.config.shift_factor
        return (mean - shift) * scale, std * scale


AnyVAEConfig = VAEConfig | TinyVAEConfig
AnyDecoder = VAEDecoder | TinyDecoder
AnyEncoder = VAEEncoder | TinyEncoder
TINY = "AutoencoderTiny"
CLASSES: Mapping[str, type[VAEConfig] | type[TinyVAEConfig]] = {
    "AutoencoderKL": VAEConfig,
    TINY: TinyVAEConfig,
}
"""diffusers' classes of autoencoders, and what is read of their configs."""


def vae_config(class_name: str, config: Mapping[str, Any]) -> AnyVAEConfig:
    """What a VAE of one of the `CLASSES` is built from; CheckpointError names what is not supported."""
    return CLASSES[class_name].from_diffusers(config)


def vae_decoder(config: AnyVAEConfig) -> AnyDecoder:
    return TinyDecoder(config) if isinstance(config, TinyVAEConfig) else VAEDecoder(config)


def vae_encoder(config: AnyVAEConfig) -> AnyEncoder:
    return TinyEncoder(config) if isinstance(config, TinyVAEConfig) else VAEEncoder(config)


def load_vae(
    config: AnyVAEConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[AnyDecoder, AnyEncoder | None]:
    """Build both halves on the weights of diffusers' network, cast to `dtype` if given.

    As with `load_unet`, what needs no change is not copied, and CheckpointError names what does not fit. Of
    weights without an encoder's there is none.
    """
    with torch.device("meta"):
        decoder = vae_decoder(config)
        encoder = vae_encoder(config) if has_encoder(state_dict) else None
    halves = [half for half in (decoder, encoder) if half is not None]
    load_weights("vae", halves, {_current_name(n): t for n, t in state_dict.items()}, dtype)
    for half in halves:
        half.eval()
    return decoder, encoder


def has_encoder(names: Iterable[str]) -> bool:
    """Whether some of a VAE's tensors are an encoder's: some checkpoints are stored without."""
    return any(name.startswith("encoder.") for name in names)


def _current_name(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    path, _, last = layer.rpartition(".")
    if ".attentions." in name and last in OLD_NAMES:
        return f"{path}.{OLD_NAMES[last]}.{leaf}"
    return name
