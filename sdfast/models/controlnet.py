"""ControlNets: a second way down beside a U-Net's, which reads a control image and adds to the U-Net's skips.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023. A step runs all networks
as one, `ControlledUNet`. As with the U-Net alone, what depends only on the prompt, the timestep or the
control images is computed outside the loop: by `ControlledContext` and `ControlledTimeShift`, for all
networks, and by `ControlEmbedding`. What several ControlNets add is added up, each by its own scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.errors import CheckpointError
from sdfast.models import ops
from sdfast.models.config import UNetConfig, controlnet_names
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
    told_layers,
)
from sdfast.models.weights import load_weights

Part = TypeVar("Part", bound=nn.Module)

CLASS = "ControlNetModel"  # of diffusers'; its other ControlNets are other networks
WIDTHS = (16, 32, 96, 256)  # of the embedding, by diffusers' default
_EMBEDDING = "controlnet_cond_embedding."  # before the names of its weights
POOLS = "global_pool_conditions"  # a field of its config
_OWN = (  # fields that a U-Net's config does not have
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    POOLS,
)


@dataclass(frozen=True)
class ControlNetConfig:
    """way_down: of a U-Net, of which the levels up mean nothing here.

    embedding: channels of the control image's embedding, each half as large as the one before.
    bgr: whether it reads blue first. pools: whether what it adds is averaged over the picture, as those do
    that are told of a style or of colours ("shuffle").
    """

    way_down: UNetConfig
    embedding: tuple[int, ...]
    bgr: bool
    pools: bool = False

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "ControlNetConfig":
        """The content of a ControlNet's `config.json`; CheckpointError names what is not supported."""
        stated = config.get("_class_name", CLASS)
        if stated != CLASS:
            raise CheckpointError(f"controlnet/config.json is of a {stated}; supported: {CLASS}")
        fields = Fields("controlnet", config)
        fields.require({"conditioning_channels": 3}, set())
        pools = fields.flag(POOLS, False)
        middle = "UNetMidBlock2DCrossAttn"
        fields.choose("mid_block_type", (middle, "UNetMidBlock2D"), middle)
        order = fields.choose("controlnet_conditioning_channel_order", ("rgb", "bgr"), "rgb")
        way_down = {name: value for name, value in config.items() if name not in _OWN}
        levels = way_down.get("down_block_types", ("",) * 4)
        if isinstance(levels, (list, tuple)):  # or else that is refused by name
            way_down["up_block_types"] = ("UpBlock2D",) * len(levels)
        levels_down = UNetConfig.from_diffusers(way_down, "controlnet")
        return cls(levels_down, _embedding(fields), order == "bgr", pools)

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

    def __init__(self, config: UNetConfig, pools: bool = False) -> None:
        super().__init__(config)
        self.pools = pools
        self.controlnet_down_blocks = nn.ModuleList([Conv1x1(n, n) for n in skip_channels(config)])
        self.controlnet_mid_block = Conv1x1(config.down[-1].channels, config.down[-1].channels)
        self.shift_widths = [part.rows for part in shift_parts(self)]
        self.context_widths = [part.rows for part in context_parts(self)]

    def forward(self, sample: Tensor, time_shift: Tensor, context: Tensor, control: Tensor) -> list[Tensor]:
        """sample [B, C, h, w], time_shift [B, T], context [B, L, KV], control [B, C_0, h, w], of one dtype.

        control comes from `ControlEmbedding`. The last of the result is the middle's. What is averaged over
        the picture is [B, C, 1, 1]; it is averaged before its convolution, of one pixel: the same numbers.
        """
        shifts = iter(time_shift.split_with_sizes(self.shift_widths, dim=-1))
        kv = iter(told_layers(self.context_widths, context))
        skips, middle = self.descend(ops.add(control, self.conv_in(sample)), shifts, kv)
        found = [ops.mean_of_pixels(x) for x in (*skips, middle)] if self.pools else [*skips, middle]
        convolutions = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        return [conv(x) for conv, x in zip(convolutions, found, strict=True)]


def control_layers(unet: UNetConfig) -> int:
    """How many numbers say how much of a ControlNet beside such a U-Net is added: one for each skip, and the
    middle's."""
    return len(skip_channels(unet)) + 1


class _Beside(nn.Module, Generic[Part]):
    """A module with one for each ControlNet, by their names."""

    count: int

    def _put(self, parts: Sequence[Part]) -> None:
        self.count = len(parts)
        for name, part in zip(controlnet_names(len(parts)), parts, strict=True):
            self.add_module(name, part)

    @property
    def controlnets(self) -> list[Part]:
        return [cast(Part, getattr(self, name)) for name in controlnet_names(self.count)]


class ControlledUNet(Attending, _Beside[ControlNet]):
    """A U-Net and its ControlNets, as one network."""

    def __init__(self, unet: UNet, controlnets: Sequence[ControlNet]) -> None:
        super().__init__()
        self.unet = unet
        self._put(controlnets)
        self.layers = control_layers(unet.config)
        self.shift_widths = [
            sum(unet.shift_widths),
            *(sum(one.shift_widths) for one in controlnets),
            *(1 for _ in range(self.layers * len(controlnets))),
        ]
        self.context_widths = [sum(unet.context_widths), *(sum(one.context_widths) for one in controlnets)]

    def forward(
        self,
        sample: Tensor,
        time_shift: Tensor,
        context: Tensor,
        control: Tensor,
        image_context: Tensor | None = None,
    ) -> Tensor:
        """sample [B, C, h, w], time_shift [B, T + N], context [B, L, KV], control [B, N C_0, h, w]
        -> [B, C_out, h, w], all of one dtype, with N ControlNets. image_context: as for the U-Net, which
        alone is told it.

        time_shift is that of `ControlledTimeShift`, and after it a column for each of what each ControlNet
        adds, with the scale of each row: how much of it is added, to each skip in turn and in the middle. It
        goes with the rows and the steps, as the time shifts do. The scales of LoRAs come last.
        """
        unet, count = self.unet, self.count
        time_shift = unet.told_last(time_shift)
        own_shift, *told = time_shift.split_with_sizes(self.shift_widths, dim=-1)
        own_context, *contexts = context.split_with_sizes(self.context_widths, dim=-1)
        shifts = iter(own_shift.split_with_sizes(unet.shift_widths, dim=-1))
        kv = iter(told_layers(unet.context_widths, own_context, image_context, unet.image_tokens))
        skips, x = unet.descend(unet.conv_in(sample), shifts, kv)
        images = [control] if count == 1 else control.chunk(count, dim=1)
        scales = [told[start : start + self.layers] for start in range(count, len(told), self.layers)]
        every = zip(self.controlnets, told[:count], scales, contexts, images, strict=True)
        for controlnet, shift, by_layer, its_context, image in every:
            seen = controlnet.config.in_channels  # the latents; a U-Net for inpainting has more beside them
            latents = sample if seen == unet.config.in_channels else sample[:, :seen]
            added = controlnet(latents, shift, its_context, image)
            sums = zip([*skips, x], added, by_layer, strict=True)
            *skips, x = [ops.add_scaled(y, a, scale) for y, a, scale in sums]
        return unet.finish(unet.climb(x, skips, shifts, kv))


class ControlledTimeShift(_Beside[TimeShift]):
    """The time shifts of a U-Net, then those of each of its ControlNets."""

    def __init__(self, unet: TimeShift, controlnets: Sequence[TimeShift]) -> None:
        super().__init__()
        self.unet = unet
        self._put(controlnets)

    def forward(
        self,
        timesteps: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        loras: Tensor | None = None,
    ) -> Tensor:
        """As `TimeShift`. A guidance embedding and LoRAs are the U-Net's alone. -> [N, T]."""
        own = self.unet(timesteps, text_embeds, time_ids, timestep_cond, loras)
        added = [controlnet(timesteps, text_embeds, time_ids) for controlnet in self.controlnets]
        return torch.cat([own, *added], dim=-1)


class ControlledContext(_Beside[Context]):
    """The keys and values of a U-Net for a prompt, then those of each of its ControlNets."""

    def __init__(self, unet: Context, controlnets: Sequence[Context]) -> None:
        super().__init__()
        self.unet = unet
        self._put(controlnets)

    def forward(self, hidden_states: Tensor, loras: Tensor | None = None) -> Tensor:
        """As `Context`; LoRAs are the U-Net's alone."""
        added = [controlnet(hidden_states) for controlnet in self.controlnets]
        return torch.cat([self.unet(hidden_states, loras), *added], dim=-1)


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


class ControlEmbeddings(_Beside[ControlEmbedding]):
    """The control images of several ControlNets, each as its own one's embedding has it."""

    def __init__(self, configs: Sequence[ControlNetConfig]) -> None:
        super().__init__()
        self._put([ControlEmbedding(config) for config in configs])

    def forward(self, image: Tensor) -> Tensor:  # [B, N 3, H, W] -> [B, N C_0, h, w]
        images = image.chunk(self.count, dim=1)
        return torch.cat([one(image) for one, image in zip(self.controlnets, images, strict=True)], dim=1)


def control_embedding(configs: Sequence[ControlNetConfig]) -> ControlEmbedding | ControlEmbeddings:
    """What embeds the control images of ControlNets, made on the default device."""
    return ControlEmbedding(configs[0]) if len(configs) == 1 else ControlEmbeddings(configs)


class Controlled(NamedTuple):
    """The modules of a U-Net and its ControlNets, in the order of `load_unet`'s."""

    unet: ControlledUNet
    time_shift: ControlledTimeShift
    context: ControlledContext

    @classmethod
    def of(
        cls, unet: UNet, time_shift: TimeShift, context: Context, configs: Sequence[ControlNetConfig]
    ) -> "Controlled":
        """A U-Net's modules, and beside each those of ControlNets, made on the default device."""
        controlnets = [ControlNet(config.way_down, config.pools) for config in configs]
        both = list(zip(configs, controlnets, strict=True))
        return cls(
            ControlledUNet(unet, controlnets),
            ControlledTimeShift(time_shift, [TimeShift(c.way_down, shift_parts(one)) for c, one in both]),
            ControlledContext(context, [Context(c.way_down, context_parts(one)) for c, one in both]),
        )


def load_controlled(
    unet: UNetConfig,
    unet_weights: Mapping[str, Tensor],
    configs: Sequence[ControlNetConfig],
    weights: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
    image_tokens: Sequence[int] = (),
) -> Controlled:
    """What `load_unet` builds, with ControlNets beside it.

    weights: of diffusers' ControlNetModel, for each; those of its embedding are left to `load_embedding`.
    """
    own = load_unet(unet, unet_weights, dtype, image_tokens=image_tokens)
    with torch.device("meta"):
        made = Controlled.of(*own, configs)
    for number, (name, tensors) in enumerate(zip(controlnet_names(len(configs)), weights, strict=True)):
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(_EMBEDDING)}
        load_weights(name, [part.controlnets[number] for part in made], rest, dtype)
    return Controlled(made.unet.eval(), made.time_shift.eval(), made.context.eval())


def load_embedding(
    configs: Sequence[ControlNetConfig],
    weights: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
) -> ControlEmbedding | ControlEmbeddings:
    """The embedding of the control images on the weights of diffusers' ControlNetModel, cast likewise."""
    with torch.device("meta"):
        embedding = control_embedding(configs)
    each = [embedding] if isinstance(embedding, ControlEmbedding) else embedding.controlnets
    for name, one, tensors in zip(controlnet_names(len(configs)), each, weights, strict=True):
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(_EMBEDDING)}
        load_weights(name, [one], own, dtype)
    return embedding.eval()
