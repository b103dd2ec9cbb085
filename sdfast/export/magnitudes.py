"""How large the numbers in a VAE become, and so by which scales it fits float16, if any.

The float32 network is run once on probes, which are the same each time, so that an export is too.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.errors import CheckpointError
from sdfast.models.half_range import (
    VAE,
    Layer,
    Scales,
    adding,
    attentions,
    body,
    passing,
    readers,
    resnets,
)
from sdfast.models.layers import Conv1x1, Conv3x3, GroupNorm
from sdfast.models.tiny_vae import TinyBlock, TinyDecoder, TinyEncoder
from sdfast.models.vae import Attention, VAEDecoder

LARGEST = 65504.0  # of float16
SMALLEST = 2.0**-14  # of its normal numbers
# The probes are few and small: real pictures meet larger numbers, sums inside a kernel are larger than their
# results, and a missed overflow costs the picture. Four bits of the exponent cost nothing: there are 26 more
# between 65504 / 16 and the smallest normal number.
HEADROOM = 16
# Of what no scale helps: it follows a norm, so that it varies less, and the alternative is float32.
FIXED_HEADROOM = 4
PROBE_SIDE = 32  # latents


@dataclass
class Extent:
    """How far the numbers at some places reach, over all probes.

    largest: magnitude. faintest: the least root mean square of a group of channels that a norm reads there.
    """

    largest: float = 0.0
    squares: dict[str, Tensor] = field(default_factory=dict)  # norm -> mean square of each group, per probe
    probes: int = 0

    def meet(self, x: Tensor, bias: Tensor | None = None) -> None:
        """bias: of the layer whose result x is: some graphs hold the product without it."""
        largest = float(x.abs().max()) + (0.0 if bias is None else float(bias.abs().max()))
        if not math.isfinite(largest):
            raise CheckpointError(
                "the VAE's numbers are not finite in float32 either; check the checkpoint's VAE weights"
            )
        self.largest = max(self.largest, largest)

    def read(self, norm: str, x: Tensor, groups: int) -> None:
        square = x.double().reshape(x.shape[0], groups, -1).square().mean(dim=(0, 2))
        self.squares[norm] = self.squares.get(norm, torch.zeros(())) + square

    @property
    def faintest(self) -> float:
        return math.sqrt(min(float(square.min()) for square in self.squares.values()) / self.probes)


@dataclass(frozen=True)
class Extents:
    """stream: of the residual stream and what is added to it. firsts: of each ResNet's conv1, by the ResNet's
    name. fixed: of what has no scale: after the norms, queries, keys and values, the ends."""

    stream: Extent
    firsts: Mapping[str, Extent]
    fixed: Extent

    @property
    def largest(self) -> float:
        """The magnitude of what can be scaled."""
        return max(extent.largest for extent in (self.stream, *self.firsts.values()))


class DoesNotFit(Exception):
    """No scales keep this VAE in float16; the message says why."""


# ---------------------------------------------------------------- looking


def probes(vae: VAE | TinyDecoder | TinyEncoder) -> list[Tensor]:
    """Inputs [1, C, H, W] float32 that are the same each time: noise, a smooth field, one colour.

    Latents as the loop leaves them, of its unit variance and of the threefold that strong guidance brings; or
    pictures in [-1, 1].
    """
    decodes = isinstance(vae, VAEDecoder | TinyDecoder)
    channels = vae.config.latent_channels if decodes else vae.config.in_channels
    side = PROBE_SIDE if decodes else PROBE_SIDE * vae.config.scale
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, channels, side, side, generator=generator)
    coarse = torch.randn(1, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear")
    flat = torch.ones(1, channels, side // 2, side // 2)  # a larger one would show no more
    given = [noise, 3 * noise, 2 * smooth, 2 * flat, -2 * flat]
    return given if decodes else [probe.clamp(-1, 1) for probe in given]


@torch.no_grad()
def extents(vae: VAE) -> Extents:
    """How far the numbers of a float32 VAE reach, wherever float16 would hold them.

    Raises `CheckpointError` when they are not finite.
    """
    found = Extents(Extent(), {name: Extent() for name, _ in resnets(vae)}, Extent())
    given = probes(vae)
    with ExitStack() as hooks:
        for handle in _watch(vae, found):
            hooks.callback(handle.remove)
        for probe in given:
            vae(probe)
    for extent in (found.stream, *found.firsts.values()):
        extent.probes = len(given)
    return found


@torch.no_grad()
def largest_of(vae: TinyDecoder | TinyEncoder) -> float:
    """The largest magnitude in a float32 tiny VAE. Raises `CheckpointError` when it is not finite."""
    found = Extent()
    with ExitStack() as hooks:
        for layer in vae.modules():
            if isinstance(layer, Conv3x3 | TinyBlock):
                hook = layer.register_forward_hook(lambda _layer, _given, x: found.meet(x))
                hooks.callback(hook.remove)
        for probe in probes(vae):
            vae(probe)
    return found.largest


def _watch(vae: VAE, found: Extents) -> Iterator[Any]:
    """Hooks that write down what they see; hooks on layers of the network, until they are removed."""

    def result(extent: Extent, layer: nn.Module) -> Any:
        bias = getattr(layer, "bias", None) if not isinstance(layer, GroupNorm) else None
        return layer.register_forward_hook(lambda _layer, _given, x: extent.meet(x, bias))

    def input_of(name: str, norm: GroupNorm, extent: Extent) -> Any:
        return norm.register_forward_pre_hook(lambda _norm, given: extent.read(name, given[0], norm.groups))

    for layer in (*(layer for _, layer in adding(vae)), *passing(vae)):
        yield result(found.stream, layer)
    for name, norm in readers(vae):
        yield input_of(name, norm, found.stream)
    for name, resnet in resnets(vae):
        yield result(found.stream, resnet)
        yield result(found.firsts[name], resnet.conv1)
        yield input_of(name, resnet.norm2, found.firsts[name])
    for _, attention in attentions(vae):
        yield result(found.stream, attention)
        yield attention.group_norm.register_forward_hook(_projections(attention, found.fixed))
    fixed = [body(vae).conv_out, *(layer for layer in vae.children() if isinstance(layer, Conv1x1))]
    for layer in (*fixed, *(layer for layer in vae.modules() if isinstance(layer, GroupNorm))):
        yield result(found.fixed, layer)


def _projections(attention: Attention, extent: Extent) -> Any:
    """A hook after the attention's norm. No value of the attention is larger than the largest of `v`, and its
    scores are float32 in any case."""
    qkv = attention.to_qkv

    def hook(_norm: nn.Module, _given: Any, x: Tensor) -> None:
        extent.meet(F.linear(x.flatten(2).transpose(1, 2), qkv.weight, qkv.bias), qkv.bias)

    return hook


# ---------------------------------------------------------------- scaling


def scales_for(vae: VAE, found: Extents) -> Scales:
    """The scales that leave `HEADROOM` below float16's largest number; 1 where there is room already.

    A scale also makes numbers smaller, and float16 holds those below `SMALLEST` less exactly. While the root
    mean square of a layer's weights, and of a group of channels, is above that, it loses no more there than
    to the rounding of every number. Raises `DoesNotFit` where it is below, or where no scale helps.
    """
    if found.fixed.largest * FIXED_HEADROOM > LARGEST:
        raise DoesNotFit(
            f"numbers up to {found.fixed.largest:.2g} where no scale helps (float16 ends at 65504, and "
            f"{FIXED_HEADROOM} times as much must fit)"
        )
    heaviest = max(float(tensor.abs().max()) for tensor in vae.parameters())
    if heaviest > LARGEST:
        raise DoesNotFit(f"its weights are up to {heaviest:.2g}, and float16 ends at 65504")
    scales = Scales(_scale(found.stream), {name: _scale(extent) for name, extent in found.firsts.items()})
    _check_small(scales.stream, found.stream, adding(vae))
    for name, resnet in resnets(vae):
        _check_small(scales.firsts[name], found.firsts[name], [(f"{name}.conv1", resnet.conv1)])
    return scales


def check_tiny(vae: TinyDecoder | TinyEncoder, largest: float) -> None:
    """Raises `DoesNotFit` for a tiny VAE that float16 does not hold: no norm reads what its layers make, so
    that no scale helps."""
    largest = max(largest, *(float(tensor.abs().max()) for tensor in vae.parameters()))
    if largest * HEADROOM > LARGEST:
        raise DoesNotFit(
            f"numbers up to {largest:.2g}, of which no norm makes smaller ones (float16 ends at 65504, and "
            f"{HEADROOM} times as much must fit)"
        )


def _scale(extent: Extent) -> float:
    if extent.largest * HEADROOM <= LARGEST:
        return 1.0
    return float(2.0 ** math.floor(math.log2(LARGEST / HEADROOM / extent.largest)))


def _check_small(scale: float, extent: Extent, layers: list[tuple[str, Layer]]) -> None:
    if scale == 1.0:
        return
    small = [
        (f"the weights of {name}", float(layer.weight.double().square().mean()) ** 0.5)
        for name, layer in layers
    ]
    what, size = min([*small, ("a group of channels", extent.faintest)], key=lambda pair: pair[1])
    if size * scale < SMALLEST:
        raise DoesNotFit(
            f"numbers up to {extent.largest:.2g} need a scale of 1/{round(1 / scale)}, with which {what}, "
            f"{size:.2g} in root mean square, would be too small for float16"
        )
