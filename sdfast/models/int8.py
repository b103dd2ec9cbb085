"""The U-Net's linear layers in INT8: a quarter of the weights, and products at up to three times the speed of
float32 on processors with instructions for them.

An approximation, made only when asked for. A weight is rounded once, when the engine is made, with a scale
for each output channel; what a layer is given is rounded on the way, with a scale for each token.

Converted: the projections and feed-forwards of the transformers. Not converted:
- layers that are too narrow to gain by it.
- convolutions, those of 1×1 pixels too: an image would have to be laid out anew to be tokens, and back.
- the time embedding and the prompt's keys and values, which are computed outside the loop.
"""

from collections.abc import Iterable

from torch import nn

from sdfast.models import ops
from sdfast.models.layers import Linear, N, RoundedLinear, replace_layers

# A product takes I · O of a row, rounding what it is given I, and scaling what it gives O: the gain grows
# with I · O / (I + O). Measured with ONNX Runtime on a processor with AVX-512 VNNI: from 100 on every layer
# is faster, 1.5 times at 160, twice from 300 on, 3 times at 1024; below 90 none is.
PAYS_FROM = 100


class LinearInt8(RoundedLinear):
    """weight: [O, I] int8; scale: [O] float32."""

    def __init__(self, layer: Linear) -> None:
        super().__init__(layer, *ops.whole_rows(layer.weight.detach()), ops.linear_int8)


def int8_layers(network: nn.Module) -> tuple[str, ...]:
    """The names of the layers that are to be converted."""
    return tuple(
        name
        for name, layer in network.named_modules()
        if isinstance(layer, Linear) and _pays(*layer.weight.shape)
    )


def _pays(outputs: int, inputs: int) -> bool:
    return inputs * outputs >= PAYS_FROM * (inputs + outputs)


def convert(network: N, names: Iterable[str]) -> N:
    """Put these layers into INT8: their weights, or only their shapes if those are on the meta device."""
    return replace_layers(network, names, {Linear: LinearInt8})
