"""A VAE that overflows float16, written so that it does not. What it computes is the same.

Everything on a VAE's residual stream is read by a GroupNorm, which does not care for scale:
norm(s x; s² eps) = norm(x; eps). So the stream may be held s times as large:

    what adds to it (conv_in, conv2, the attention's to_out)    weight · s, bias · s
    what it passes through (conv_shortcut, up- and downsamplers) bias · s
    the norms that read it                                       eps · s²

and in the same way the result of each ResNet's conv1, which norm2 alone reads, by a scale of its own. What
reads a normalised tensor is as it was. The scales are powers of two, so that nothing is rounded by them: in
float32 and float64 the results are the same bit by bit.

Which scales a network needs, `sdfast.export.magnitudes` finds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdfast.models.layers import Conv1x1, Conv3x3, Downsample, GroupNorm, Linear, ResBlock, Upsample
from sdfast.models.vae import EPS, Attention, VAEDecoder, VAEEncoder

VAE = VAEDecoder | VAEEncoder
Layer = Conv1x1 | Conv3x3 | Linear


@dataclass(frozen=True)
class Scales:
    """Powers of two, 1 at most. firsts: of each ResNet's conv1, by the ResNet's name."""

    stream: float
    firsts: Mapping[str, float]

    @property
    def neutral(self) -> bool:
        return {self.stream, *self.firsts.values()} == {1.0}

    @property
    def smallest(self) -> float:
        return min(self.stream, *self.firsts.values())


def rescale(vae: VAE, scales: Scales) -> None:
    """Write the network on a stream of another scale. Its tensors are replaced, not changed: they may be the
    checkpoint's own, as it lies on the disk. With scales of 1 nothing is done."""
    for _, layer in adding(vae):
        _multiply(layer, scales.stream)
    for layer in passing(vae):
        _multiply(layer, scales.stream, bias_alone=True)
    for _, norm in readers(vae):
        norm.eps *= scales.stream**2
    for name, resnet in resnets(vae):
        _multiply(resnet.conv1, scales.firsts[name])
        resnet.norm2.eps *= scales.firsts[name] ** 2


def _multiply(layer: Layer, scale: float, *, bias_alone: bool = False) -> None:
    if scale == 1.0:
        return
    if not bias_alone:
        layer.weight = nn.Parameter(layer.weight.detach() * scale, requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach() * scale, requires_grad=False)


def changed_eps(vae: VAE) -> dict[str, float]:
    """The eps of every norm, by its name, that `rescale` changed."""
    norms = ((name, layer) for name, layer in vae.named_modules() if isinstance(layer, GroupNorm))
    return {name: norm.eps for name, norm in norms if norm.eps != EPS}


def set_eps(vae: nn.Module, eps: Mapping[str, float]) -> None:
    """Give norms the eps that `changed_eps` found. Raises `KeyError` for what is none of its norms."""
    norms = {name: layer for name, layer in vae.named_modules() if isinstance(layer, GroupNorm)}
    for name, value in eps.items():
        norms[name].eps = value


# ---------------------------------------------------------------- what is where


def resnets(vae: VAE) -> Iterator[tuple[str, ResBlock]]:
    return ((name, layer) for name, layer in vae.named_modules() if isinstance(layer, ResBlock))


def attentions(vae: VAE) -> Iterator[tuple[str, Attention]]:
    return ((name, layer) for name, layer in vae.named_modules() if isinstance(layer, Attention))


def body(vae: VAE) -> Any:
    return vae.decoder if isinstance(vae, VAEDecoder) else vae.encoder


def adding(vae: VAE) -> list[tuple[str, Layer]]:
    """What adds to the stream."""
    found: list[tuple[str, Layer]] = [("conv_in", body(vae).conv_in)]
    found += [(f"{name}.conv2", resnet.conv2) for name, resnet in resnets(vae)]
    for name, attention in attentions(vae):
        found += [(f"{name}.to_out.0", out) for out in attention.to_out if isinstance(out, Linear)]
    return found


def passing(vae: VAE) -> list[Layer]:
    """What the stream passes through."""
    shortcuts = [resnet.conv_shortcut for _, resnet in resnets(vae)]
    found: list[Layer] = [shortcut for shortcut in shortcuts if shortcut is not None]
    return found + [layer.conv for layer in vae.modules() if isinstance(layer, (Upsample, Downsample))]


def readers(vae: VAE) -> list[tuple[str, GroupNorm]]:
    """The norms that read the stream."""
    found = [(f"{name}.norm1", resnet.norm1) for name, resnet in resnets(vae)]
    found += [(f"{name}.group_norm", attention.group_norm) for name, attention in attentions(vae)]
    return [*found, ("conv_norm_out", body(vae).conv_norm_out)]
