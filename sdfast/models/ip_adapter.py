"""IP-Adapters: images that a U-Net's cross-attention is told of beside the prompt.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", 2023.
CLIP's image encoder sees the image, a projection makes tokens of what it gives, and each cross-attention
layer has further weights for their keys and values. None of it changes in the loop: keys and values are
computed once an image, by `ImageContext`, and enter the U-Net beside those of the prompt. Attention is linear
in the values, so how much an image counts in each layer is multiplied into them outside the loop, too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.layers import LayerNorm, Linear, PackedLinear, Part
from sdfast.models.unet import UNet, UNetConfig, context_parts
from sdfast.models.weights import load_weights

Form = Literal["plain", "plus", "full"]
Reads = Literal["image_embeds", "hidden_states"]
HEAD = 64  # channels of a head of the resampler

_SECTIONS = ("down_blocks", "up_blocks", "mid_block")
"""The order in which files number the cross-attention layers: that of the attributes of diffusers' U-Net."""


@dataclass(frozen=True)
class IPAdapterConfig:
    """What an adapter is built from.

    form: "plain" projects the embedding of the whole image, "plus" has a resampler look at all of the
    image, "full" projects every part of it. tokens: that the image becomes. inputs: the width of what it
    reads; outputs: of the tokens. inner, hidden and depth: of the resampler, its attention's width, its own,
    and its layers.
    """

    form: Form
    tokens: int
    inputs: int
    outputs: int
    inner: int = 0
    hidden: int = 0
    depth: int = 0

    @property
    def reads(self) -> Reads:
        """Which result of the image encoder it reads."""
        return "image_embeds" if self.form == "plain" else "hidden_states"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Transformer(NamedTuple):
    """Cross-attention layers that follow one another, by how diffusers' scales name their place:
    "down.block_1.0" or "mid". channels: of the keys, and of the values, of each."""

    name: str
    channels: int
    layers: int


def transformers(config: UNetConfig) -> list[Transformer]:
    """Those of a U-Net, in the order in which the context has their keys and values."""
    with torch.device("meta"):
        parts = context_parts(UNet(config))
    found: dict[str, list[int]] = {}
    for part in parts[::2]:
        section, first, _, third, *_ = part.name.split(".")
        way = section.removesuffix("_blocks")
        found.setdefault("mid" if way == "mid_block" else f"{way}.block_{first}.{third}", []).append(
            part.rows
        )
    return [Transformer(name, rows[0], len(rows)) for name, rows in found.items()]


def layer_keys(config: UNetConfig) -> list[tuple[str, int]]:
    """How files name the weights of each part of the context, without ".weight", and their rows."""
    with torch.device("meta"):
        parts = context_parts(UNet(config))
    layers = [part.name.rpartition(".")[0] for part in parts[::2]]
    numbered = sorted(layers, key=lambda name: _SECTIONS.index(name.partition(".")[0]))
    number = {name: 2 * place + 1 for place, name in enumerate(numbered)}  # self-attention has the even ones
    return [
        (f"ip_adapter.{number[part.name.rpartition('.')[0]]}.{part.name.rpartition('.')[2]}_ip", part.rows)
        for part in parts
    ]


class ImageProjection(nn.Module):
    """The embedding of an image -> tokens, all in one product."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.proj = Linear(config.inputs, config.tokens * config.outputs)
        self.norm = LayerNorm(config.outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, D] -> [B, T, D']
        y: Tensor = self.norm(self.proj(x).unflatten(-1, (self.tokens, -1)))
        return y


class FullProjection(nn.Module):
    """Each part of an image -> a token. The empty place is the activation that files count in their names."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj = nn.ModuleList(
            [
                Linear(config.inputs, config.inputs),
                nn.Identity(),
                Linear(config.inputs, config.outputs),
                LayerNorm(config.outputs),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D']
        first, _, second, norm = self.proj
        y: Tensor = norm(second(F.gelu(first(x))))
        return y


class ResamplerAttention(nn.Module):
    """Learnt queries look at the parts of an image, and at each other (Alayrac et al., "Flamingo", 2022)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.heads = config.inner // HEAD
        self.norm1 = LayerNorm(config.hidden)
        self.norm2 = LayerNorm(config.hidden)
        self.to_q = Linear(config.hidden, config.inner, bias=False)
        self.to_kv = Linear(config.hidden, 2 * config.inner, bias=False)
        self.to_out = Linear(config.inner, config.hidden, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:  # [B, N, H], [B, T, H] -> [B, T, H]
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        y: Tensor = self.to_out(ops.attention(self.to_q(latents), k, v, self.heads, False))
        return y


class ResamplerFeedForward(nn.ModuleList):
    """A list, for files name its layers by their places."""

    def __init__(self, config: IPAdapterConfig) -> None:
        width, wide = config.hidden, 4 * config.hidden
        layers = [LayerNorm(width), Linear(width, wide, False), nn.Identity(), Linear(wide, width, False)]
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, H]
        norm, first, _, second = self
        y: Tensor = second(F.gelu(first(norm(x))))
        return y


class Resampler(nn.Module):
    """The parts of an image -> a few tokens, by queries of a number of its own."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, config.tokens, config.hidden))
        self.proj_in = Linear(config.inputs, config.hidden)
        self.layers = nn.ModuleList(
            [
                nn.ModuleList([ResamplerAttention(config), ResamplerFeedForward(config)])
                for _ in range(config.depth)
            ]
        )
        self.proj_out = Linear(config.hidden, config.outputs)
        self.norm_out = LayerNorm(config.outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, T, D']
        x, latents = self.proj_in(x), self.latents.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            parts: nn.ModuleList = layer  # type: ignore[assignment]
            latents = latents + parts[0](x, latents)
            latents = latents + parts[1](latents)
        y: Tensor = self.norm_out(self.proj_out(latents))
        return y


_PROJECTIONS: Mapping[Form, type[nn.Module]] = {
    "plain": ImageProjection,
    "plus": Resampler,
    "full": FullProjection,
}


class ImageContext(nn.Module):
    """An image's keys and values for every cross-attention layer, as `Context` has those of a prompt.

    Its layers have the names that files have for them.
    """

    def __init__(self, config: IPAdapterConfig, unet: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = _PROJECTIONS[config.form](config)
        self.proj = PackedLinear(config.outputs, [Part(name, rows) for name, rows in layer_keys(unet)])

    def forward(self, image: Tensor) -> Tensor:
        """image: what the adapter reads of the image encoder's results, [B, D] or [B, N, D] -> [B, T, KV]."""
        y: Tensor = self.proj(self.image_proj(image))
        return y


def load_image_context(
    config: IPAdapterConfig,
    unet: UNetConfig,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> ImageContext:
    """The module on the weights of an adapter, by the names that its file has for them, cast if asked."""
    with torch.device("meta"):
        module = ImageContext(config, unet)
    load_weights("ip_adapter", [module], state_dict, dtype)
    return module.eval()


class ImageEncoder(nn.Module):
    """Wraps transformers' CLIPVisionModelWithProjection."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """pixel_values [B, 3, S, S], normalised -> image_embeds [B, P], and the last hidden states but one,
        [B, N, D], of which the first is the class token's."""
        output = self.model(pixel_values, output_hidden_states=True)
        return output.image_embeds, output.hidden_states[-2]
