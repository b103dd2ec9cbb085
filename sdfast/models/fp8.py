"""The U-Net's layers in FP8 (E4M3): half the weights, and products at twice the speed of fp16.

An approximation, made only when asked for. A weight is rounded once, when the engine is made, with a scale
for each output channel; what a layer is given is rounded on the way, with a scale for each token or pixel.

Converted: the projections and feed-forwards of the transformers; the 1×1 convolutions, which on pixels with
their channels last are linear too; and 3×3 convolutions, but in a compiled engine only those that were
measured to be faster so. Not converted, and in fp16 still:
- the first and the last convolution.
- layers with a width that is no multiple of 16, which the GPUs' FP8 products need.
- 3×3 convolutions that LoRAs of requests have a branch beside (see `lora`), which is in fp16 everywhere.
- output projections of attention with up to 640 channels. What comes before the others rounds on its way; for
  these it takes a pass of its own over what attention wrote, which takes as long as is saved.
- the time embedding and the prompt's keys and values, which are computed outside the loop.
"""

import re
from collections.abc import Iterable

from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.layers import (
    Conv1x1,
    Conv3x3,
    Downsample,
    Linear,
    N,
    ResBlock,
    RoundedLinear,
    Upsample,
    replace_layers,
)

MULTIPLE = 16  # of both widths of a product
PASS_PAYS_ABOVE = 640  # channels
_ATTENTION_OUTPUT = re.compile(r"\.attn\d\.to_out\.0$")


class LinearFP8(RoundedLinear):
    """weight: [O, I] float8; scale: [O] float32."""

    def __init__(self, layer: Linear | Conv1x1) -> None:
        super().__init__(layer, *ops.quantised_rows(layer.weight.detach().flatten(1)), ops.linear_fp8)


class Conv1x1FP8(LinearFP8):
    def forward(self, x: Tensor) -> Tensor:  # [B, I, H, W] -> [B, O, H, W]
        return self.with_branch(x, self.rounded(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Conv3x3FP8(nn.Module):
    """A 3×3 convolution on rounded numbers. weight: [O, 9, I] float8; scale: [O] float32.

    compute: what computes it, in place of the definition.
    """

    def __init__(self, layer: Conv3x3) -> None:
        super().__init__()
        taps = layer.weight.detach().permute(0, 2, 3, 1).flatten(1, 2)  # [O, 9, I]
        weight, scale = ops.quantised_rows(taps.flatten(1))
        self.stride, self.padding = layer.stride, layer.padding
        self.compute: ops.Convolution = ops.conv3x3_fp8
        self.weight = nn.Parameter(weight.view(taps.shape), requires_grad=False)
        self.scale = nn.Parameter(scale.flatten(), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        """x [B, I, h, w] -> [B, O, H, W]. size: what x is enlarged to before."""
        return self.compute(x, self.weight, self.scale, self.bias, self.stride, self.padding, size)


FORMS = {Linear: LinearFP8, Conv1x1: Conv1x1FP8, Conv3x3: Conv3x3FP8}


def fp8_layers(network: nn.Module) -> tuple[str, ...]:
    """The names of the linear layers that are to be converted, 1×1 convolutions among them."""
    return tuple(name for name, layer in network.named_modules() if _converts(name, layer))


def fp8_convolutions(network: nn.Module) -> tuple[str, ...]:
    """The names of the 3×3 convolutions that can be converted: those of ResNet blocks, and those that make
    images smaller or larger."""
    places = ((ResBlock, "conv1"), (ResBlock, "conv2"), (Downsample, "conv"), (Upsample, "conv"))
    return tuple(
        f"{name}.{own}"
        for name, module in network.named_modules()
        for kind, own in places
        if isinstance(module, kind) and _may_convert(module.get_submodule(own))
    )


def _may_convert(convolution: nn.Module) -> bool:
    return isinstance(convolution, Conv3x3) and convolution.branch is None and _has_widths(convolution)


def _has_widths(layer: nn.Module) -> bool:
    outputs, inputs = layer.get_parameter("weight").shape[:2]
    return outputs % MULTIPLE == 0 and inputs % MULTIPLE == 0


def _converts(name: str, layer: nn.Module) -> bool:
    if not isinstance(layer, (Linear, Conv1x1)) or not _has_widths(layer):
        return False
    inputs = layer.weight.shape[1]
    return inputs > PASS_PAYS_ABOVE or _ATTENTION_OUTPUT.search(name) is None


def convert(network: N, names: Iterable[str]) -> N:
    """Put these layers into FP8: their weights, or only their shapes if those are on the meta device."""
    return replace_layers(network, names, FORMS)


def use_product(network: nn.Module, product: ops.Product) -> None:
    """Compute every converted linear layer by `product`, in place of the definition."""
    for module in network.modules():
        if isinstance(module, LinearFP8):
            module.product = product


def use_convolution(network: nn.Module, compute: ops.Convolution) -> None:
    """Compute every converted 3×3 convolution by `compute`, in place of the definition."""
    for module in network.modules():
        if isinstance(module, Conv3x3FP8):
            module.compute = compute
