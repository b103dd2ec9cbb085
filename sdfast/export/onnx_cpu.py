"""The networks' operations for ONNX Runtime's CPU provider, in the form that ran fastest there.

Each function writes one operation of `sdfast.models.ops` into a graph; its result's shape is already known.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir

from sdfast.export.onnx_conv import of_enlarged, winograd, winograd_pays
from sdfast.export.onnx_graph import MICROSOFT, Graph, Lowerings, Value
from sdfast.models import ops

ENLARGED = "enlarged"  # a note on a value: the image that it has each pixel of four times
BLOCK = 16  # channels of a block in ONNX Runtime's layout for convolutions, with AVX-512; 8 without
Affine = Callable[[Graph, Value, Value, Value], Value]
ROWS = "rows"  # a note on tokens [B, N, C]: the same as a matrix, [B N, C]
PARTS = "parts"  # a note on what a linear layer gave: writes the rows of a part of its outputs
Part = Callable[[Graph, Value], Value]  # of a weight or bias of all outputs, that of some
ZERO = 128  # what stands for 0 among unsigned numbers
LIKE = "like"  # a note on tokens: earlier ones of the same B and N


def linear(g: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    # Gemm takes the weights as they lie and adds the bias as it starts; MatMul would need both changed.
    rows = rows_of(g, x)

    def product(g: Graph, part: Part) -> Value:
        return g.Gemm(rows, part(g, weight), *([] if bias is None else [part(g, bias)]), transB=1)

    return in_parts(g, product, x, weight.shape[0])


def linear_int8(g: Graph, x: Value, weight: Value, scale: Value, bias: Value | None = None) -> Value:
    rows, row_scale = whole_rows(g, rows_of(g, x))
    one, zero = g.constant(np.array(1, np.float32)), g.constant(np.array(ZERO, np.uint8))

    def product(g: Graph, part: Part) -> Value:
        own = part(g, weight)
        columns = g.transformed(own, "columns", tuple(own.shape)[::-1], lambda w: w.T)
        total = g.MatMulIntegerToFloat(rows, columns, one, part(g, scale), zero, domain=MICROSOFT)
        result = g.Mul(total, row_scale)
        return result if bias is None else g.Add(result, part(g, bias))

    return in_parts(g, product, x, weight.shape[0])


def in_parts(g: Graph, product: Callable[[Graph, Part], Value], like: Value, width: int) -> Value:
    """The product as [..., width], where `like` is [..., I]. How to write parts of it is noted, see
    `geglu_in_halves`."""
    rows = product(g, lambda g, weight: weight)
    result = rows if len(like.shape) == 2 else tokens_of(g, rows, like, width)
    g.memory[PARTS, result] = product
    return result


def part_of(number: int, count: int) -> Part:
    """Of `count` equal parts of a layer's outputs the one with this number."""

    def part(g: Graph, weight: Value) -> Value:
        rows, *rest = weight.shape
        size = rows // count
        own = slice(number * size, (number + 1) * size)
        return g.transformed(weight, f"part_{number}_of_{count}", (size, *rest), lambda w: w[own])

    return part


def whole_rows(g: Graph, rows: Value) -> tuple[Value, Value]:
    """`ops.whole_rows` of [M, I]: uint8 [M, I], to which `ZERO` is added, and float32 [M, 1].

    Unsigned, since processors multiply unsigned by signed numbers. The largest magnitude is found without a
    pass that writes all magnitudes, and rows are divided where they are rounded.
    """
    axis = g.ints(1)
    highest, lowest = (reduce(rows, axis, keepdims=1) for reduce in (g.ReduceMax, g.ReduceMin))
    smallest, largest = (g.constant(np.array(n, np.float32)) for n in (ops.SMALLEST, ops.INT8_MAX))
    scale = g.Div(g.Max(highest, g.Neg(lowest), smallest), largest)
    per_row = g.Squeeze(scale, axis)
    zeros = g.ConstantOfShape(g.Shape(per_row), value=onnx_ir.tensor(np.array([ZERO], np.uint8)))
    return g.QuantizeLinear(rows, per_row, zeros, axis=0), scale


def rows_of(g: Graph, x: Value) -> Value:
    """x [..., I] as a matrix, [M, I]."""
    return x if len(x.shape) == 2 else g.memory.get((ROWS, x)) or g.Reshape(x, g.ints(-1, x.shape[-1]))


def tokens_of(g: Graph, rows: Value, like: Value, width: int) -> Value:
    """rows [N, width] as [..., width], where `like` is [..., I]. The rows are noted: see `row_wise`."""
    leading = [-1 if not isinstance(d, int) else d for d in like.shape[:-1]]
    if leading.count(-1) > 1:
        first: Value = g.memory.get((LIKE, like), like)
        result = g.reshape(rows, *g.sizes(first, 0, len(first.shape) - 1), width)
        g.memory[LIKE, result] = first
    else:
        result = g.Reshape(rows, g.ints(*leading, width))
    g.memory[ROWS, result] = rows
    return result


def row_wise(g: Graph, make: Callable[..., Value], *tokens: Value, width: int) -> Value:
    """make(*tokens) [..., width], which does the same to each row by itself: of their rows, if all are noted.

    So what follows one another goes on with matrices, and the shapes between, for which nobody asks, are
    dropped.
    """
    rows = [g.memory.get((ROWS, each)) for each in tokens]
    return make(*tokens) if None in rows else tokens_of(g, make(*rows), tokens[0], width)


def conv3x3(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, stride: int, padding: Sequence[int]
) -> Value:
    before, after = padding
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.Conv(*inputs, kernel_shape=[3, 3], strides=[stride, stride], pads=[before, before, after, after])


def conv3x3_enlarged(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, stride: int, padding: Sequence[int]
) -> Value:
    small = g.memory.get((ENLARGED, x))
    if small is not None and stride == 1 and list(padding) == [1, 1]:
        return of_enlarged(g, small, weight, bias)
    return conv3x3(g, x, weight, bias, stride=stride, padding=padding)


def conv3x3_fast(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, stride: int, padding: Sequence[int]
) -> Value:
    pays = stride == 1 and list(padding) == [1, 1] and winograd_pays(x, weight)
    if pays and (ENLARGED, x) not in g.memory:
        return winograd(g, x, weight, bias)
    return conv3x3_enlarged(g, x, weight, bias, stride=stride, padding=padding)


def conv1x1(g: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.Conv(*inputs, kernel_shape=[1, 1])


def times_and_plus(g: Graph, x: Value, weight: Value, bias: Value) -> Value:
    """x [B, C, H, W], weight and bias [C] -> x · weight + bias."""
    return g.Add(g.Mul(x, g.Reshape(weight, g.ints(-1, 1, 1))), g.Reshape(bias, g.ints(-1, 1, 1)))


def times_and_plus_at_once(g: Graph, x: Value, weight: Value, bias: Value) -> Value:
    """The same as a convolution of each channel by itself, which ONNX Runtime runs in the blocked layout of
    the convolution that follows, if the channels fill its blocks."""
    channels = weight.shape[0]
    if channels % BLOCK:
        return times_and_plus(g, x, weight, bias)
    filters = g.transformed(weight, "filters", (channels, 1, 1, 1), lambda w: w.reshape(-1, 1, 1, 1))
    return g.Conv(x, filters, bias, kernel_shape=[1, 1], group=channels)


def group_norm(
    g: Graph,
    x: Value,
    weight: Value,
    bias: Value,
    groups: int,
    eps: float,
    affine: Affine = times_and_plus,
) -> Value:
    one, zero = (g.constant(np.full(groups, v, x.dtype.numpy())) for v in (1, 0))
    normal = g.InstanceNormalization(g.Reshape(x, g.ints(0, groups, -1)), one, zero, epsilon=eps)
    return affine(g, g.reshape(normal, *g.sizes(x, 0, 4)), weight, bias)


def group_norm_silu(
    g: Graph,
    x: Value,
    weight: Value,
    bias: Value,
    groups: int,
    eps: float,
    affine: Affine = times_and_plus,
) -> Value:
    normal = group_norm(g, x, weight, bias, groups, eps, affine)
    return g.QuickGelu(normal, alpha=1.0, domain=MICROSOFT)


def shifted_group_norm_silu(
    g: Graph,
    x: Value,
    shift: Value,
    weight: Value,
    bias: Value,
    groups: int,
    eps: float,
    affine: Affine = times_and_plus,
) -> Value:
    total = g.Add(x, g.Unsqueeze(shift, g.ints(2, 3)))
    total.shape, total.dtype = x.shape, x.dtype
    return group_norm_silu(g, total, weight, bias, groups, eps, affine)


def layer_norm(g: Graph, x: Value, weight: Value, bias: Value, eps: float) -> Value:
    return row_wise(
        g,
        lambda rows: g.LayerNormalization(rows, weight, bias, axis=-1, epsilon=eps),
        x,
        width=weight.shape[0],
    )


def relu(g: Graph, x: Value) -> Value:
    return g.Relu(x)


def add(g: Graph, x: Value, branch: Value) -> Value:
    return row_wise(g, g.Add, x, branch, width=x.shape[-1])


def add_scaled(g: Graph, x: Value, branch: Value, scale: Value) -> Value:
    return g.Add(x, g.Mul(branch, g.Unsqueeze(scale, g.ints(2, 3))))


def mean_of_pixels(g: Graph, x: Value) -> Value:
    return g.ReduceMean(x, g.ints(2, 3), keepdims=1)


def scale_channels(g: Graph, x: Value, scale: Value) -> Value:
    between = range(1, len(x.shape) - 1) if len(x.shape) < 4 else (2, 3)
    return g.Mul(x, g.Unsqueeze(scale, g.ints(*between)) if between else scale)


def concat_channels(g: Graph, x: Value, y: Value) -> Value:
    return g.Concat(x, y, axis=1)


def attention(g: Graph, q: Value, k: Value, v: Value, heads: int, upcast: bool) -> Value:
    casts = upcast and q.dtype != onnx_ir.DataType.FLOAT
    inputs = [g.Cast(t, to=onnx_ir.DataType.FLOAT) for t in (q, k, v)] if casts else [q, k, v]
    result = g.MultiHeadAttention(*inputs, num_heads=heads, domain=MICROSOFT)
    return g.Cast(result, to=q.dtype) if casts else result


def self_attention(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, heads: int, upcast: bool
) -> Value:
    q, k, v = g.split(linear(g, x, weight, bias), 3, x.dtype)
    return attention(g, q, k, v, heads, upcast)


def geglu(g: Graph, x: Value) -> Value:
    return row_wise(g, lambda rows: gated(g, *g.split(rows, 2, x.dtype)), x, width=x.shape[-1] // 2)


def geglu_in_halves(g: Graph, x: Value) -> Value:
    """Of what a linear layer gave, its halves as products of their own: none is copied out of the whole."""
    product = g.memory.get((PARTS, x))
    if product is None:
        return geglu(g, x)
    rows = gated(g, *(product(g, part_of(number, 2)) for number in (0, 1)))
    return rows if len(x.shape) == 2 else tokens_of(g, rows, x, x.shape[-1] // 2)


def gated(g: Graph, value: Value, gate: Value) -> Value:
    return g.Mul(value, g.Gelu(gate))


def upsample_nearest(g: Graph, x: Value, like: Value) -> Value:
    height, width = g.sizes(like, 2, 4)
    if [height, width] == [2 * side if isinstance(side, int) else None for side in x.shape[2:]]:
        return upsample_twice(g, x)
    parts = [g.ints(s) if isinstance(s, int) else s for s in (*g.sizes(x, 0, 2), height, width)]
    return g.Resize(
        x,
        None,
        None,
        g.Concat(*parts, axis=0),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def upsample_twice(g: Graph, x: Value) -> Value:
    twice = g.constant(np.array([1, 1, 2, 2], np.float32))
    result = g.Resize(
        x, None, twice, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    if x.dtype == onnx_ir.DataType.FLOAT:
        g.memory[ENLARGED, result] = x
    return result


def tokens_from_image(g: Graph, x: Value) -> Value:
    return g.Transpose(g.Reshape(x, g.ints(0, x.shape[1], -1)), perm=[0, 2, 1])


def image_from_tokens(g: Graph, x: Value, like: Value) -> Value:
    return g.reshape(g.Transpose(x, perm=[0, 2, 1]), *g.sizes(like, 0, 4))


PLAIN: Lowerings = {
    lowering.__name__: lowering
    for lowering in (
        linear,
        conv3x3,
        conv1x1,
        group_norm,
        group_norm_silu,
        shifted_group_norm_silu,
        layer_norm,
        relu,
        add,
        add_scaled,
        mean_of_pixels,
        scale_channels,
        concat_channels,
        attention,
        self_attention,
        geglu,
        upsample_nearest,
        upsample_twice,
        tokens_from_image,
        image_from_tokens,
    )
}

# For the CPU's provider alone; the others' tables take what they have no better form of from PLAIN.
CPU_COMPACT: Lowerings = {
    **PLAIN,
    "linear_int8": linear_int8,
    "geglu": geglu_in_halves,
    "conv3x3": conv3x3_enlarged,
    **{
        norm.__name__: partial(norm, affine=times_and_plus_at_once)
        for norm in (group_norm, group_norm_silu, shifted_group_norm_silu)
    },
}

# Faster, for some more memory: at SD 1.5 and 32 × 32 latents 4.2 GB of weights in place of 3.2.
CPU: Lowerings = {**CPU_COMPACT, "conv3x3": conv3x3_fast}
