"""ControlNets: a second way down beside a U-Net's, which reads a control image and adds to the U-Net's skips.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023. A step runs both networks
as one, `ControlledUNet`. As with the U-Net alone, what depends only on the prompt, the timestep or the
control image is computed outside the loop: by `ControlledContext` and `ControlledTimeShift`, for both
networks, and by `ControlEmbedding`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.errors import CheckpointError
from sdfast.models import ops
from sdfast.models.config import UNetConfig
from sdfast.models.fields import Fields
from sdfast.models.layers import Conv1x1, Conv3x3
from sdfast.models.unet import (
    Attending,
    Context,
    TimeShift,
    UNet,
    WayDown,
    context_parts,
    load_unet,
    shift_parts,
    skip_channels,
)
from sdfast.models.weights import load_weights

CLASS = "ControlNetModel"  # of diffusers'; its other ControlNets are other networks
WIDTHS = (16, 32, 96, 256)  # of the embedding, by diffusers' default
_EMBEDDING = "controlnet_cond_embedding."  # before the names of its weights
_OWN = (  # fields that a U-Net's config does not have
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)


@dataclass(frozen=True)
class ControlNetConfig:
    """way_down: of a U-Net, of which the levels up mean nothing here.

    embedding: channels of the control image's embedding, each half as large as the one before.
    bgr: whether it reads blue first.
    """

    way_down: UNetConfig
    embedding: tuple[int, ...]
    bgr: bool

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "ControlNetConfig":
        """The content of a ControlNet's `config.json`; CheckpointError names what is not supported."""
        stated = config.get("_class_name", CLASS)
        if stated != CLASS:
            raise CheckpointError(f"controlnet/config.json is of a {stated}; supported: {CLASS}")
        fields = Fields("controlnet", config)
        fields.require({"global_pool_conditions": False, "conditioning_channels": 3}, set())
        middle = "UNetMidBlock2DCrossAttn"
        fields.choose("mid_block_type", (middle, "UNetMidBlock2D"), middle)
        order = fields.choose("controlnet_conditioning_channel_order", ("rgb", "bgr"), "rgb")
        way_down = {name: value for name, value in config.items() if name not in _OWN}
        levels = way_down.get("down_block_types", ("",) * 4)
        if isinstance(levels, (list, tuple)):  # or else that is refused by name
            way_down["up_block_types"] = ("UpBlock2D",) * len(levels)
        return cls(UNetConfig.from_diffusers(way_down, "controlnet"), _embedding(fields), order == "bgr")

    @property
    def channels(self) -> int:
        """Of the embedded control image."""
        return self.way_down.down[0].channels

    def check_fits(self, unet: UNetConfig, latent_channels: int, factor: int) -> None:
        """Raises `CheckpointError` naming the first thing in which it was made for another U-Net.

        factor: pixels a latent, in each direction.
        """
        own = self.way_down
        for what, found, needed in (
            ("in_channels", own.in_channels, latent_channels),
            ("channels and ResNet blocks of the levels", _levels(own), _levels(unet)),
            ("a middle", own.mid is not None, unet.mid is not None),
            ("cross_attention_dim", own.cross_attention_dim, unet.cross_attention_dim),
            ("width of the pooled prompt", own.pooled_dim(), unet.pooled_dim()),
            ("pixels that are one of its embedding", 2 ** (len(self.embedding) - 1), factor),
        ):
            if found != needed:
                raise CheckpointError(
                    f"the ControlNet does not fit the U-Net: {what}: {found}, but {needed} is needed; it was "
                    "made for another kind of Stable Diffusion: take one for this checkpoint's"
                )


def _embedding(fields: Fields) -> tuple[int, ...]:
    name = "conditioning_embedding_out_channels"
    widths = fields.take(name, WIDTHS)
    if (
        not isinstance(widths, (list, tuple))
        or not widths
        or any(type(n) is not int or n < 1 for n in widths)
    ):
        raise fields.refuse(name, "a list of positive integers")
    return tuple(widths)


def _levels(config: UNetConfig) -> list[tuple[int, int]]:
    return [(level.channels, level.resnets) for level in config.down]


class ControlNet(WayDown):
    """What a control image adds to each skip of a U-Net, and to what leaves its middle."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.controlnet_down_blocks = nn.ModuleList([Conv1x1(n, n) for n in skip_channels(config)])
        self.controlnet_mid_block = Conv1x1(config.down[-1].channels, config.down[-1].channels)
        self.shift_widths = [part.rows for part in shift_parts(self)]
        self.context_widths = [part.rows for part in context_parts(self)]

    def forward(self, sample: Tensor, time_shift: Tensor, context: Tensor, control: Tensor) -> list[Tensor]:
        """sample [B, C, h, w], time_shift [B, T], context [B, L, KV], control [B, C_0, h, w], of one dtype.

        control comes from `ControlEmbedding`. The last of the result is the middle's.
        """
        shifts = iter(time_shift.split_with_sizes(self.shift_widths, dim=-1))
        kv = iter(context.split_with_sizes(self.context_widths, dim=-1))
        skips, middle = self.descend(ops.add(control, self.conv_in(sample)), shifts, kv)
        last: Tensor = self.controlnet_mid_block(middle)
        return [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)] + [last]


class ControlledUNet(Attending):
    """A U-Net and its ControlNet, as one network."""

    def __init__(self, unet: UNet, controlnet: ControlNet) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet
        self.shift_widths = [sum(unet.shift_widths), sum(controlnet.shift_widths), 1]
        self.context_widths = [sum(unet.context_widths), sum(controlnet.context_widths)]

    def forward(self, sample: Tensor, time_shift: Tensor, context: Tensor, control: Tensor) -> Tensor:
        """sample [B, C, h, w], time_shift [B, T + 1], context [B, L, KV], control [B, C_0, h, w]
        -> [B, C_out, h, w], all of one dtype.

        time_shift is that of `ControlledTimeShift`, and after it a column with the scale of each row: how
        much of the ControlNet is added. It goes with the rows and the steps, as the time shifts do.
        """
        unet = self.unet
        own_shift, added_shift, scale = time_shift.split_with_sizes(self.shift_widths, dim=-1)
        own_context, added_context = context.split_with_sizes(self.context_widths, dim=-1)
        shifts = iter(own_shift.split_with_sizes(unet.shift_widths, dim=-1))
        kv = iter(own_context.split_with_sizes(unet.context_widths, dim=-1))
        skips, x = unet.descend(unet.conv_in(sample), shifts, kv)
        told = self.controlnet.config.in_channels  # the latents; a U-Net for inpainting has more beside them
        latents = sample if told == unet.config.in_channels else sample[:, :told]
        added = self.controlnet(latents, added_shift, added_context, control)
        *skips, x = [ops.add_scaled(y, a, scale) for y, a in zip([*skips, x], added, strict=True)]
        return unet.finish(unet.climb(x, skips, shifts, kv))


class ControlledTimeShift(nn.Module):
    """The time shifts of a U-Net, then those of its ControlNet."""

    def __init__(self, unet: TimeShift, controlnet: TimeShift) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(
        self,
        timesteps: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """As `TimeShift`. A guidance embedding is the U-Net's alone. -> [N, T]."""
        own = self.unet(timesteps, text_embeds, time_ids, timestep_cond)
        return torch.cat([own, self.controlnet(timesteps, text_embeds, time_ids)], dim=-1)


class ControlledContext(nn.Module):
    """The keys and values of a U-Net for a prompt, then those of its ControlNet."""

    def __init__(self, unet: Context, controlnet: Context) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, L, D] -> [B, L, KV]
        return torch.cat([self.unet(hidden_states), self.controlnet(hidden_states)], dim=-1)


class ControlEmbedding(nn.Module):
    """A control image, as the ControlNet adds it to its first convolution."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.bgr = config.bgr
        self.controlnet_cond_embedding = _Convolutions(config.embedding, config.channels)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W], numbers in [0, 1] -> [B, C_0, h, w], in the dtype of both."""
        y: Tensor = self.controlnet_cond_embedding(image.flip(1) if self.bgr else image)
        return y


class _Convolutions(nn.Module):
    def __init__(self, widths: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.conv_in = Conv3x3(3, widths[0])
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(widths):
            self.blocks.extend([Conv3x3(narrow, narrow), Conv3x3(narrow, wide, stride=2)])
        self.conv_out = Conv3x3(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C_0, h, w]
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        y: Tensor = self.conv_out(x)
        return y


class Controlled(NamedTuple):
    """The modules of a U-Net and its ControlNet, in the order of `load_unet`'s."""

    unet: ControlledUNet
    time_shift: ControlledTimeShift
    context: ControlledContext

    @classmethod
    def of(
        cls, unet: UNet, time_shift: TimeShift, context: Context, config: ControlNetConfig
    ) -> "Controlled":
        """A U-Net's modules, and beside each that of a ControlNet, made on the default device."""
        controlnet = ControlNet(config.way_down)
        return cls(
            ControlledUNet(unet, controlnet),
            ControlledTimeShift(time_shift, TimeShift(config.way_down, shift_parts(controlnet))),
            ControlledContext(context, Context(config.way_down, context_parts(controlnet))),
        )


def load_controlled(
    unet: UNetConfig,
    unet_weights: Mapping[str, Tensor],
    controlnet: ControlNetConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Controlled:
    """What `load_unet` builds, with the ControlNet beside it.

    weights: of diffusers' ControlNetModel; those of its embedding are left to `load_embedding`.
    """
    own = load_unet(unet, unet_weights, dtype)
    with torch.device("meta"):
        made = Controlled.of(*own, controlnet)
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(_EMBEDDING)}
    load_weights("controlnet", [part.controlnet for part in made], rest, dtype)
    return Controlled(made.unet.eval(), made.time_shift.eval(), made.context.eval())


def load_embedding(
    config: ControlNetConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> ControlEmbedding:
    """The control image's embedding on the weights of diffusers' ControlNetModel, cast likewise."""
    with torch.device("meta"):
        embedding = ControlEmbedding(config)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(_EMBEDDING)}
    load_weights("controlnet", [embedding], own, dtype)
    return embedding.eval()
