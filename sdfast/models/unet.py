"""The U-Net of Stable Diffusion 1.x, 2.x, SDXL and their inpainting, LCM and turbo relatives.

A step network is prompt-free and timestep-free. What depends on the prompt or the timestep alone is
computed once, outside the loop, by `Context` and `TimeShift`, and enters `UNet` as two tensors.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.config import Level, UNetConfig
from sdfast.models.layers import (
    Conv3x3,
    Downsample,
    GroupNorm,
    LayerNorm,
    Linear,
    PackedLinear,
    Part,
    ResBlock,
    Upsample,
)
from sdfast.models.lora import Choosing
from sdfast.models.pag import Perturbable, Perturbing
from sdfast.models.weights import load_weights

__all__ = ["Context", "TimeShift", "UNet", "UNetConfig", "load_unet"]

Told = Sequence[tuple[Tensor, Tensor]]
"""What a cross-attention layer is told: keys and values [B, L, C] of the prompt, then those of each image."""


class SelfAttention(Perturbable):
    def __init__(self, channels: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.attend: ops.Attend = ops.attention
        self.to_qkv = PackedLinear(channels, [Part(name, channels) for name in ("to_q", "to_k", "to_v")])
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        qkv = self.to_qkv
        whole = self.attend is ops.attention and self.switch is None
        if whole and isinstance(qkv, PackedLinear) and qkv.branch is None:
            h = ops.self_attention(x, qkv.weight, qkv.bias, self.heads, self.upcast)
        else:
            q, k, v = qkv(x).chunk(3, dim=-1)
            h = self.attend(q, k, v, self.heads, self.upcast)
            h = h if self.switch is None else self.switch.taken(h, v)
        y: Tensor = self.to_out[0](h)
        return y


class CrossAttention(nn.Module):
    """Attention to the prompt, whose keys and values `Context` has computed; and to images, by themselves.

    The answers are added up (Ye et al., "IP-Adapter", 2023, equation 5). How much an image counts is in its
    values, see `ip_adapter`.
    """

    def __init__(self, channels: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.channels, self.heads, self.upcast = channels, heads, upcast
        self.attend: ops.Attend = ops.attention
        self.to_q = Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor, told: Told) -> Tensor:  # x [B, N, C]
        q, ((k, v), *images) = self.to_q(x), told
        h = self.attend(q, k, v, self.heads, self.upcast)
        for k, v in images:
            h = ops.add(h, self.attend(q, k, v, self.heads, self.upcast))
        y: Tensor = self.to_out[0](h)
        return y


class GEGLU(nn.Module):
    """compute: what computes it, in place of the definition, on weights that are not rounded to FP8."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.compute: ops.LinearGeGLU = ops.linear_geglu
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        proj: nn.Module = self.proj
        if isinstance(proj, Linear) and proj.bias is not None and proj.branch is None:
            return self.compute(x, proj.weight, proj.bias)
        return ops.geglu(proj(x))


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # The empty place is the dropout that diffusers counts in its names.
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net[2](self.net[0](x))
        return y


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads, upcast)
        self.norm2 = LayerNorm(channels)
        self.attn2 = CrossAttention(channels, heads, upcast)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Iterator[Told]) -> Tensor:  # x [B, N, C]
        x = ops.add(x, self.attn1(self.norm1(x)))
        x = ops.add(x, self.attn2(self.norm2(x), next(context)))
        return ops.add(x, self.ff(self.norm3(x)))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of an image."""

    def __init__(self, config: UNetConfig, level: Level, depth: int) -> None:
        super().__init__()
        channels = level.channels
        self.norm = GroupNorm(channels, config.norm_num_groups, 1e-6)
        # A 1×1 convolution in some checkpoints, a linear layer in others: on tokens the two are the same.
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, level.heads, config.upcast_attention) for _ in range(depth)]
        )
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, context: Iterator[Told]) -> Tensor:  # x [B, C, H, W]
        h = self.proj_in(ops.tokens_from_image(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, context)
        return ops.add(x, ops.image_from_tokens(self.proj_out(h), x))


class Block(nn.Module):
    """The ResNet blocks of one level, each followed by its transformer if the level has attention."""

    def __init__(self, config: UNetConfig, level: Level, inputs: list[int]) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = nn.ModuleList([ResBlock(n, level.channels, groups, eps, shifted=True) for n in inputs])
        self.attentions = nn.ModuleList([Transformer(config, level, depth) for depth in level.depths])


class DownBlock(Block):
    def __init__(self, config: UNetConfig, level: Level, inputs: int, last: bool) -> None:
        super().__init__(config, level, [inputs] + [level.channels] * (level.resnets - 1))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(level.channels)])

    def forward(self, x: Tensor, shifts: Iterator[Tensor], context: Iterator[Told]) -> list[Tensor]:
        """Every intermediate image: the skips that the way up consumes, the last one also the result."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(shifts))
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        return skips + [down(x) for down in self.downsamplers]


class MidBlock(Block):
    def __init__(self, config: UNetConfig, level: Level) -> None:
        super().__init__(config, level, [level.channels] * level.resnets)

    def forward(self, x: Tensor, shifts: Iterator[Tensor], context: Iterator[Told]) -> Tensor:
        x = self.resnets[0](x, next(shifts))
        for attention, resnet in zip(self.attentions, list(self.resnets)[1:], strict=True):
            x = resnet(attention(x, context), next(shifts))
        return x


class UpBlock(Block):
    def __init__(self, config: UNetConfig, level: Level, inputs: list[int], last: bool) -> None:
        super().__init__(config, level, inputs)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(level.channels)])

    def consume(
        self, i: int, x: Tensor, skips: list[Tensor], shifts: Iterator[Tensor], context: Iterator[Told]
    ) -> Tensor:
        """ResNet block `i` consumes the last of `skips`; the last block ends in the size of the next one."""
        x = self.resnets[i](ops.concat_channels(x, skips.pop()), next(shifts))
        if self.attentions:
            x = self.attentions[i](x, context)
        if i == len(self.resnets) - 1:
            for up in self.upsamplers:
                x = up(x, like=skips[-1])
        return x


class Attending(Perturbing):
    """A network whose attention and gated products may be computed otherwise than by their definitions."""

    def use_attention(self, attend: ops.Attend) -> None:
        """Compute every attention of this network by `attend`, in place of the definition."""
        for module in self.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.attend = attend

    def use_geglu(self, compute: ops.LinearGeGLU) -> None:
        """Compute every gated product of this network by `compute`, in place of the definition."""
        for module in self.modules():
            if isinstance(module, GEGLU):
                module.compute = compute


class WayDown(Attending):
    """The first convolution, the levels on the way down, and the middle: what a ControlNet has of a U-Net."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.down[0].channels, len(config.down) - 1
        self.conv_in = Conv3x3(config.in_channels, first)
        widths = [first] + [level.channels for level in config.down]
        self.down_blocks = nn.ModuleList(
            [DownBlock(config, level, widths[i], i == last) for i, level in enumerate(config.down)]
        )
        self.mid_block = MidBlock(config, config.mid) if config.mid else None

    def descend(
        self, x: Tensor, shifts: Iterator[Tensor], context: Iterator[Told]
    ) -> tuple[list[Tensor], Tensor]:
        """x: what `conv_in` gave -> every skip in order, x itself the first, and what leaves the middle."""
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], shifts, context)
        return skips, skips[-1] if self.mid_block is None else self.mid_block(skips[-1], shifts, context)


class BothWays(WayDown):
    """The way down and the way up: what a whole evaluation and a shallow one have in common."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        first, last = config.down[0].channels, len(config.up) - 1
        self.rungs = rungs(config)
        inputs = [rung.channels + n for rung, n in zip(self.rungs, skip_channels(config), strict=True)]
        self.up_blocks = nn.ModuleList()
        for level in config.up:
            own = [inputs.pop() for _ in range(level.resnets)]
            self.up_blocks.append(UpBlock(config, level, own, len(self.up_blocks) == last))
        self.conv_norm_out = GroupNorm(first, config.norm_num_groups, config.norm_eps, silu=True)
        self.conv_out = Conv3x3(first, config.out_channels)
        self.shift_widths = [part.rows for part in shift_parts(self)]
        self.context_widths = [part.rows for part in context_parts(self)]

    def climb(
        self,
        x: Tensor,
        skips: list[Tensor],
        shifts: Iterator[Tensor],
        context: Iterator[Told],
        left: int = 0,
    ) -> Tensor:
        """The way up from where x enters, beside the last of `skips`, to where `left` are left of them."""
        while len(skips) > left:
            rung = self.rungs[len(skips) - 1]
            block: UpBlock = self.up_blocks[rung.level]  # type: ignore[assignment]
            x = block.consume(rung.place, x, skips, shifts, context)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """What leaves the way up -> [B, C_out, H, W]."""
        y: Tensor = self.conv_out(self.conv_norm_out(x))
        return y


class UNet(BothWays):
    """branch: the skip up to which a later step may be shallow, see `step_cache`; None where none may be.
    image_tokens: of the image of each IP-Adapter; none where there are none."""

    def __init__(
        self, config: UNetConfig, branch: int | None = None, image_tokens: Sequence[int] = ()
    ) -> None:
        super().__init__(config)
        self.branch = branch
        self.image_tokens = list(image_tokens)

    def forward(
        self, sample: Tensor, time_shift: Tensor, context: Tensor, image_context: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """sample [B, C, H, W], time_shift [B, T], context [B, L, KV] -> [B, C_out, H, W], all of one dtype.

        time_shift comes from `TimeShift` and context from `Context` of the same checkpoint. With LoRAs that
        requests choose, more columns follow it, see `lora`, and with layers to be perturbed one more, see
        `pag`. image_context, with IP-Adapters: the images' tokens [B, I, KV], those of one adapter after
        those of the other, from `ip_adapter.ImageContext`. With a branch there is a second result, its deep
        feature, [B, C_d, H / s, W / s] rounded up; see `step_cache`.
        """
        time_shift = self.told_last(time_shift)
        shifts = iter(time_shift.split_with_sizes(self.shift_widths, dim=-1))
        kv = iter(told_layers(self.context_widths, context, image_context, self.image_tokens))
        skips, x = self.descend(self.conv_in(sample), shifts, kv)
        if self.branch is None:
            return self.finish(self.climb(x, skips, shifts, kv))
        deep = self.climb(x, skips, shifts, kv, left=self.branch + 1)
        return self.finish(self.climb(deep, skips, shifts, kv)), deep


def told_layers(
    widths: list[int], context: Tensor, image_context: Tensor | None = None, image_tokens: Sequence[int] = ()
) -> list[Told]:
    """What each cross-attention layer is told. widths: of its keys and of its values, for all in turn."""
    parts = [context]
    if image_context is not None:
        parts += (
            image_context.split_with_sizes(list(image_tokens), dim=1) if image_tokens[1:] else [image_context]
        )
    split = [part.split_with_sizes(widths, dim=-1) for part in parts]
    return [[(kv[i], kv[i + 1]) for kv in split] for i in range(0, len(widths), 2)]


class Rung(NamedTuple):
    """A ResNet block on the way up: its level, its place there, and the channels of what enters it beside a
    skip."""

    level: int
    place: int
    channels: int


def rungs(config: UNetConfig) -> list[Rung]:
    """For each skip, in the order of `skip_channels`, the ResNet block that consumes it."""
    found, entering = [], config.down[-1].channels
    for number, level in enumerate(config.up):
        for place in range(level.resnets):
            found.append(Rung(number, place, entering))
            entering = level.channels
    return found[::-1]


def skip_channels(config: UNetConfig) -> list[int]:
    """Channels of every skip in the order in which the way down leaves them."""
    channels = [config.down[0].channels]
    for i, level in enumerate(config.down):
        channels += [level.channels] * (level.resnets + (i < len(config.down) - 1))
    return channels


def skip_levels(config: UNetConfig) -> list[int]:
    """How often the sides of each skip were halved, in the same order."""
    levels = [0]
    for i, level in enumerate(config.down):
        levels += [i] * level.resnets + [i + 1] * (i < len(config.down) - 1)
    return levels


def shift_parts(network: WayDown) -> list[Part]:
    """The time projections of every ResNet block, in the order in which the network consumes them."""
    blocks = [(name, m) for name, m in network.named_modules() if isinstance(m, ResBlock)]
    return [Part(f"{name}.time_emb_proj", m.outputs, f"{name}.conv1.bias") for name, m in blocks]


def context_parts(network: WayDown) -> list[Part]:
    """Keys and values of every cross-attention, in the order in which the network consumes them."""
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, CrossAttention)]
    return [Part(f"{name}.{kv}", m.channels) for name, m in layers for kv in ("to_k", "to_v")]


class Embedding(nn.Module):
    """A two-layer perceptron over an embedding."""

    def __init__(self, inputs: int, outputs: int, condition: int | None = None) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, outputs)
        self.cond_proj = Linear(condition, inputs, bias=False) if condition else None
        self.linear_2 = Linear(outputs, outputs)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None:
            x = x + self.cond_proj(condition)
        y: Tensor = self.linear_2(nn.functional.silu(self.linear_1(x)))
        return y


class Sinusoid(nn.Module):
    """x [N] float32 -> [N, width] float32: sines then cosines, flipped if `flip` (Vaswani et al. 2017)."""

    def __init__(self, width: int, flip: bool, shift: float) -> None:
        super().__init__()
        self.width, self.flip = width, flip
        half = width // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / (half - shift)
        # Neither a weight nor a buffer: a module cast to half precision must keep its frequencies.
        self.frequencies = exponents.exp()

    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, None] * self.frequencies.to(x.device)
        parts = (angles.cos(), angles.sin()) if self.flip else (angles.sin(), angles.cos())
        return nn.functional.pad(torch.cat(parts, dim=-1), (0, self.width % 2))


class TimeShift(Choosing):
    """What every ResNet block adds for a timestep, in one batched pass for all timesteps of a run."""

    def __init__(self, config: UNetConfig, parts: list[Part]) -> None:
        super().__init__()
        self.config = config
        first, width, sizes = config.down[0].channels, config.time_embed_dim, config.addition_time_embed_dim
        self.sinusoid = Sinusoid(first, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = Embedding(first, width, config.time_cond_proj_dim)
        self.add_sinusoid = Sinusoid(sizes, config.flip_sin_to_cos, config.freq_shift) if sizes else None
        self.add_embedding = (
            Embedding(config.addition_input_dim, width) if config.addition_input_dim else None
        )
        self.proj = PackedLinear(config.time_embed_dim, parts, bias=True)

    def forward(
        self,
        timesteps: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        loras: Tensor | None = None,
    ) -> Tensor:
        """timesteps [N] float32 -> [N, T], in the dtype of the weights.

        text_embeds [N, P] (pooled) and time_ids [N, 6] float32 (original size, crop, target size) belong to
        SDXL, to its refiner [N, 5] (a score in place of the target size); timestep_cond [N, W] (the embedded
        guidance scale) to LCM. Every one that the checkpoint has is needed, and no other. loras [N, n] or
        [1, n]: how much of each LoRA is added, where one changes its layers.
        """
        self._check(text_embeds=text_embeds, time_ids=time_ids, timestep_cond=timestep_cond)
        dtype = self.proj.weight.dtype
        self._told(loras, dtype)
        emb = self.time_embedding(self.sinusoid(timesteps).to(dtype), timestep_cond)
        if self.add_sinusoid and self.add_embedding and text_embeds is not None and time_ids is not None:
            sizes = self.add_sinusoid(time_ids.flatten()).reshape(time_ids.shape[0], -1)
            emb = emb + self.add_embedding(torch.cat([text_embeds.to(dtype), sizes.to(dtype)], dim=-1))
        y: Tensor = self.proj(nn.functional.silu(emb))
        return y

    def _check(self, **given: Tensor | None) -> None:
        names = {name for name, value in given.items() if value is not None}
        if names != set(self.conditions()):
            raise TypeError(f"TimeShift of this checkpoint takes {self.conditions()}, not {sorted(names)}")

    def conditions(self) -> list[str]:
        """Names of the inputs besides `timesteps`, in order."""
        sdxl = ["text_embeds", "time_ids"] if self.config.addition_input_dim else []
        return sdxl + (["timestep_cond"] if self.config.time_cond_proj_dim else [])


class Context(Choosing):
    """Keys and values of every cross-attention layer for a prompt, in one matrix product."""

    def __init__(self, config: UNetConfig, parts: list[Part]) -> None:
        super().__init__()
        self.proj = PackedLinear(config.cross_attention_dim, parts)

    def forward(self, hidden_states: Tensor, loras: Tensor | None = None) -> Tensor:
        """hidden_states [B, L, D] -> [B, L, KV]. loras: as those of `TimeShift`."""
        self._told(loras, self.proj.weight.dtype)
        y: Tensor = self.proj(hidden_states)
        return y


def load_unet(
    config: UNetConfig,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    branch: int | None = None,
    image_tokens: Sequence[int] = (),
) -> tuple[UNet, TimeShift, Context]:
    """Build the three modules on the weights of diffusers' UNet2DConditionModel, cast to `dtype` if given.

    branch, image_tokens: see `UNet`.

    Weights that need neither packing nor casting are used as they are, not copied: tensors of a memory-mapped
    safetensors file stay in the file. Missing, unexpected or wrongly shaped ones raise CheckpointError.
    """
    with torch.device("meta"):
        unet = UNet(config, branch, image_tokens)
        time_shift = TimeShift(config, shift_parts(unet))
        context = Context(config, context_parts(unet))
    load_weights("unet", [unet, time_shift, context], state_dict, dtype)
    return unet.eval(), time_shift.eval(), context.eval()
