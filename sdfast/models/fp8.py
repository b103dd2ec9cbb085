"""The U-Net's linear layers in FP8 (E4M3): half the weights, and products at twice the speed of fp16.

An approximation, made only when asked for. A weight is rounded once, when the engine is made, with a scale
for each output channel; what a layer is given is rounded on the way, with a scale for each token.

Converted: the projections and feed-forwards of the transformers, and the 1×1 convolutions, which on pixels
with their channels last are linear too. Not converted, and in fp16 still:
- 3×3 convolutions, the first and the last among them. PyTorch has no FP8 convolution; unfolded into a matrix
  product, what they read is written nine times. docs/fp8.md has the arithmetic.
- layers with a width that is no multiple of 16, which the GPUs' FP8 products need.
- output projections of attention with up to 640 channels. What comes before the others rounds on its way; for
  these it takes a pass of its own over what attention wrote, which takes as long as is saved.
- the time embedding and the prompt's keys and values, which are computed outside the loop.
"""

import re
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.layers import Conv1x1, Linear

N = TypeVar("N", bound=nn.Module)
MULTIPLE = 16  # of both widths of a product
PASS_PAYS_ABOVE = 640  # channels
_ATTENTION_OUTPUT = re.compile(r"\.attn\d\.to_out\.0$")


class LinearFP8(nn.Module):
    """A linear layer on rounded numbers. weight: [O, I] float8; scale: [O] float32.

    product: what computes it, in place of the definition.
    """

    def __init__(self, layer: Linear | Conv1x1) -> None:
        super().__init__()
        weight, scale = ops.quantised_rows(layer.weight.detach().flatten(1))
        self.product: ops.Product = ops.linear_fp8
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale.flatten(), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        return self.product(x, self.weight, self.scale, self.bias)


class Conv1x1FP8(LinearFP8):
    def forward(self, x: Tensor) -> Tensor:  # [B, I, H, W] -> [B, O, H, W]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fp8_layers(network: nn.Module) -> tuple[str, ...]:
    """The names of the layers that are to be converted."""
    return tuple(name for name, layer in network.named_modules() if _converts(name, layer))


def _converts(name: str, layer: nn.Module) -> bool:
    if not isinstance(layer, (Linear, Conv1x1)):
        return False
    outputs, inputs = layer.weight.shape[:2]
    if outputs % MULTIPLE or inputs % MULTIPLE:
        return False
    return inputs > PASS_PAYS_ABOVE or _ATTENTION_OUTPUT.search(name) is None


@torch.no_grad()
def convert(network: N, names: Iterable[str]) -> N:
    """Put these layers into FP8: their weights, or only their shapes if those are on the meta device."""
    for name in names:
        layer = network.get_submodule(name)
        if isinstance(layer, Linear):
            network.set_submodule(name, LinearFP8(layer))
        elif isinstance(layer, Conv1x1):
            network.set_submodule(name, Conv1x1FP8(layer))
        else:
            raise TypeError(f"{name} is a {type(layer).__name__}; Linear and Conv1x1 convert")
    return network


def use_product(network: nn.Module, product: ops.Product) -> None:
    """Compute every converted layer by `product`, in place of the definition."""
    for module in network.modules():
        if isinstance(module, LinearFP8):
            module.product = product
