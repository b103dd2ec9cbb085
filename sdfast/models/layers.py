"""Layers that hold weights under diffusers' names, and apply one named operation each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from sdfast.models import ops

N = TypeVar("N", bound=nn.Module)


class Layer(nn.Module):
    """A layer that may have a branch beside it (see `lora`): branch(x, y) is what it makes of x with that,
    where y is what it makes of x without."""

    def __init__(self) -> None:
        super().__init__()
        self.branch: nn.Module | None = None

    def with_branch(self, x: Tensor, y: Tensor) -> Tensor:
        if self.branch is None:
            return y
        both: Tensor = self.branch(x, y)
        return both


class Linear(Layer):
    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return self.with_branch(x, ops.linear(x, self.weight, self.bias))


@dataclass(frozen=True)
class Part:
    """One of the checkpoint's linear layers inside a packed one: its name beside the packed layer, and its
    rows. `extra_bias` names one more bias that is added to its own."""

    name: str
    rows: int
    extra_bias: str | None = None


class PackedLinear(Linear):
    """Several of the checkpoint's linear layers with the same input, as one matrix product."""

    def __init__(self, inputs: int, parts: list[Part], bias: bool = False) -> None:
        super().__init__(inputs, sum(part.rows for part in parts), bias)
        self.parts = parts

    def names(self, own: str) -> list[str]:
        """The names of its parts in the checkpoint, if its own name is `own`."""
        beside = own.rpartition(".")[0]
        return [f"{beside}.{part.name}" if beside else part.name for part in self.parts]


class Conv3x3(Layer):
    """padding: zeros before (top, left) and after (bottom, right)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, padding: tuple[int, int] = (1, 1), bias: bool = True
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, list(padding)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.with_branch(x, ops.conv3x3(x, self.weight, self.bias, self.stride, self.padding))


class Conv1x1(Layer):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.with_branch(x, ops.conv1x1(x, self.weight, self.bias))


class GroupNorm(nn.Module):
    """With `silu`, SiLU follows; only then may a shift be added before.

    compute: what computes it, in place of the definition.
    """

    def __init__(self, channels: int, groups: int, eps: float, silu: bool = False) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = groups, eps, silu
        self.compute: ops.GroupNormKernel = ops.normalised
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:  # x [B, C, H, W], shift [B, C]
        return self.compute(x, shift, self.weight, self.bias, self.groups, self.eps, self.silu)


def use_group_norm(network: nn.Module, compute: ops.GroupNormKernel) -> None:
    """Compute every group normalisation of this network by `compute`, in place of the definition."""
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.compute = compute


class LayerNorm(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Downsample(nn.Module):
    def __init__(self, channels: int, padding: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H / 2, W / 2]
        y: Tensor = self.conv(x)
        return y


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        """x [B, C, h, w] -> [B, C, H, W], the height and width of `like`, or else twice its own."""
        conv: nn.Module = self.conv
        if isinstance(conv, Conv3x3):
            y: Tensor = conv(ops.upsample_twice(x) if like is None else ops.upsample_nearest(x, like))
        else:  # on rounded numbers: it reads the small image
            y = conv(x, enlarged_size(x, like))
        return y


def enlarged_size(x: Tensor, like: Tensor | None) -> list[int]:
    """Height and width of x [B, C, h, w] when it is enlarged to those of `like`, or else twice."""
    return [2 * side for side in x.shape[2:]] if like is None else list(like.shape[2:])


class ResBlock(nn.Module):
    """Two convolutions around an addition (He et al. 2016); with `shift`, the timestep enters between them.

    The first convolution of a shifted block has no bias of its own: it is part of the shift.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, eps: float, shifted: bool) -> None:
        super().__init__()
        self.outputs = outputs
        self.norm1 = GroupNorm(inputs, groups, eps, silu=True)
        self.conv1 = Conv3x3(inputs, outputs, bias=not shifted)
        self.norm2 = GroupNorm(outputs, groups, eps, silu=True)
        self.conv2 = Conv3x3(outputs, outputs)
        self.conv_shortcut = Conv1x1(inputs, outputs) if inputs != outputs else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:  # x [B, C, H, W], shift [B, C_out]
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, shift))
        return ops.add(x if self.conv_shortcut is None else self.conv_shortcut(x), h)


class RoundedLinear(Layer):
    """What is made of a linear layer, on rounded numbers. weight: [O, I], rounded; scale: [O] float32.

    product: what computes it, in place of the definition.
    """

    def __init__(
        self, layer: Linear | Conv1x1, weight: Tensor, scale: Tensor, definition: ops.Product
    ) -> None:
        super().__init__()
        self.product = definition
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale.flatten(), requires_grad=False)
        self.bias, self.branch = layer.bias, layer.branch

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        return self.with_branch(x, self.rounded(x))

    def rounded(self, x: Tensor) -> Tensor:
        """Without a branch."""
        return self.product(x, self.weight, self.scale, self.bias)


@torch.no_grad()
def replace_layers(network: N, names: Iterable[str], forms: Mapping[type, type]) -> N:
    """Put the layers with these names into other forms. forms: kind of a layer -> what is made of one."""
    for name in names:
        layer = network.get_submodule(name)
        form = next((form for kind, form in forms.items() if isinstance(layer, kind)), None)
        if form is None:
            kinds = [kind.__name__ for kind in forms]
            told = f"{', '.join(kinds[:-1])} and {kinds[-1]} convert" if kinds[1:] else f"{kinds[0]} converts"
            raise TypeError(f"{name} is a {type(layer).__name__}; {told}")
        network.set_submodule(name, form(layer))
    return network
