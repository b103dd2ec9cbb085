"""The networks' operations for ONNX Runtime's CUDA provider: its fused operators, images channels last.

Each function writes one operation of `sdfast.models.ops` into a graph. The networks speak of images
[B, C, H, W], ONNX Runtime's fused operators of [B, H, W, C]. So an operation's result is written in both
forms, and the memory of the graph keeps the second for the operations that follow: they take it, and the
transpose between the two is dropped at the end with everything else that nobody took. What stays is one
transpose where an image enters the graph and one where it leaves.

In the same way a product is written with its bias and without, and a sum as one tensor, while the memory
keeps its parts: an operation whose operator adds them itself (a bias, a residual) takes the parts.

What each operator allows is stated beside its use; where it does not allow a size, the standard operators
that have CUDA kernels are written. The facts are those of ONNX Runtime 1.20 and later.

Cross-attention gets its K and V as two inputs, not packed as [B, L, heads, 2, d]. Packed, the context that
`Context` computes would have to be laid out by head, so that it meant something else on every provider (the
CPU's operator takes no packed K and V), or be laid out anew in every step. And only the TensorRT kernels for
cross-attention read packed K and V as they are: the flash and memory-efficient kernels unpack them first, and
where none of these runs some versions refuse them.
"""

import numpy as np
import onnx_ir

from sdfast.export import onnx_cpu
from sdfast.export.onnx_graph import MICROSOFT, Array, Graph, Lowerings, Value

# What the memory of a graph keeps, by (note, value):
FORM = "form"  # the value as operators here take it: of an image [B, C, H, W], the same with channels last
PRODUCT = "product"  # (product, bias), in that form, of a value that is their sum
SUM = "sum"  # (product, bias or None, skip), in that form, of an image not yet asked for that is their sum

# The widths that the kernels of every version take; newer ones take more.
BIAS_SPLIT_GELU = (2560, 5120, 10240)
BIAS_ADD = (320, 640, 1280)


def form(g: Graph, x: Value) -> Value:
    """x as the operators here take it; written now if it was not before."""
    g.memory.pop((SUM, x), None)
    if (FORM, x) not in g.memory:
        g.memory[FORM, x] = g.Transpose(x, perm=[0, 2, 3, 1]) if len(x.shape) == 4 else x
    return g.memory[FORM, x]


def image(g: Graph, x: Value) -> Value:
    """The operation's result for x [B, H, W, C]."""
    result = g.Transpose(x, perm=[0, 3, 1, 2])
    g.memory[FORM, result] = x
    return result


def pixels(g: Graph, x: Value) -> list[int | Value]:
    """Height and width of an image [B, C, H, W]: numbers, or one-element tensors where they are dynamic."""
    return [
        d if isinstance(d, int) else g.Shape(form(g, x), start=axis, end=axis + 1)
        for axis, d in enumerate(x.shape[2:], 1)
    ]


def linear(g: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    product = g.FusedMatMul(x, weight, transB=1, domain=MICROSOFT)  # takes the weights as they lie
    if bias is None:
        return product
    result = g.Add(product, bias)
    g.memory[PRODUCT, result] = (product, bias)
    return result


def conv3x3(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, stride: int, padding: list[int]
) -> Value:
    source, (before, after) = form(g, x), padding
    if before != after:  # cuDNN's convolutions pad both ends alike
        source = g.Pad(source, g.ints(0, before, before, 0, 0, after, after, 0))
        before = 0
    return _conv(g, source, weight, bias, kernel_shape=[3, 3], strides=[stride, stride], pads=[before] * 4)


def conv1x1(g: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return _conv(g, form(g, x), weight, bias, kernel_shape=[1, 1])


def _conv(g: Graph, x: Value, weight: Value, bias: Value | None, **attributes: list[int]) -> Value:
    """x [B, H, W, I], weight [O, I, h, w], which NhwcConv wants as [O, h, w, I]."""
    outputs, inputs, *kernel = weight.shape
    filters = g.transformed(
        weight, "channels_last", (outputs, *kernel, inputs), lambda w: w.transpose(0, 2, 3, 1)
    )
    product = g.NhwcConv(x, filters, **attributes, domain=MICROSOFT)
    if bias is None:
        return image(g, product)
    result = image(g, g.NhwcConv(x, filters, bias, **attributes, domain=MICROSOFT))
    g.memory[PRODUCT, result] = (product, bias)
    return result


def group_norm_fits(channels: int, groups: int) -> bool:
    """Whether GroupNorm has a kernel: a thread reads two channels of one group, a block 512 channels."""
    size = channels // groups
    return channels % groups == 0 and groups <= 32 and size % 2 == 0 and size <= 512


def group_norm(g: Graph, x: Value, weight: Value, bias: Value, groups: int, eps: float) -> Value:
    return _group_norm(g, x, weight, bias, groups, eps, silu=False)


def group_norm_silu(g: Graph, x: Value, weight: Value, bias: Value, groups: int, eps: float) -> Value:
    return _group_norm(g, x, weight, bias, groups, eps, silu=True)


def _group_norm(g: Graph, x: Value, weight: Value, bias: Value, groups: int, eps: float, silu: bool) -> Value:
    if not group_norm_fits(x.shape[1], groups):
        plain = onnx_cpu.group_norm_silu if silu else onnx_cpu.group_norm
        return plain(g, x, weight, bias, groups, eps)
    scale, attributes = _scale(g, weight, bias), _attributes(groups, eps, silu)
    if (SUM, x) not in g.memory:
        return image(g, g.GroupNorm(form(g, x), *scale, **attributes, domain=MICROSOFT))
    product, addend, skip = g.memory.pop((SUM, x))
    inputs = [product, *scale, skip] if addend is None else [product, *scale, skip, addend]
    y, g.memory[FORM, x] = g.op_multi_out(
        "SkipGroupNorm", inputs, attributes, num_outputs=2, domain=MICROSOFT
    )
    return image(g, y)


def shifted_group_norm_silu(
    g: Graph, x: Value, shift: Value, weight: Value, bias: Value, groups: int, eps: float
) -> Value:
    if not group_norm_fits(x.shape[1], groups):
        return onnx_cpu.shifted_group_norm_silu(g, x, shift, weight, bias, groups, eps)
    scale, attributes = _scale(g, weight, bias), _attributes(groups, eps, silu=True)
    return image(g, g.SkipGroupNorm(form(g, x), *scale, shift, **attributes, domain=MICROSOFT))


def _scale(g: Graph, weight: Value, bias: Value) -> list[Value]:
    """GroupNorm takes its gamma and beta in float32 only."""
    single = onnx_ir.DataType.FLOAT
    return [
        w
        if w.const_value.dtype == single
        else g.transformed(w, "float32", tuple(w.shape), lambda a: a.astype(np.float32), single)
        for w in (weight, bias)
    ]


def _attributes(groups: int, eps: float, silu: bool) -> dict[str, int | float]:
    return {"groups": groups, "epsilon": eps, "activation": int(silu), "channels_last": 1}


def relu(g: Graph, x: Value) -> Value:
    return image(g, g.Relu(form(g, x)))


def add(g: Graph, x: Value, branch: Value) -> Value:
    """The sum, for a later operator with the branch's bias as a summand of its own."""
    product, bias = g.memory.get((PRODUCT, branch)) or (form(g, branch), None)
    skip = form(g, x)
    total = g.Add(product, skip) if bias is None else _bias_add(g, branch, product, bias, skip)
    if len(x.shape) != 4:
        return total
    result = image(g, total)
    g.memory[SUM, result] = (product, bias, skip)
    return result


def _bias_add(g: Graph, branch: Value, product: Value, bias: Value, skip: Value) -> Value:
    """product + bias + skip, where product + bias is branch. BiasAdd wants [B, N, C] and one of a few C."""
    shape = branch.shape
    channels, *sizes = shape[1:] if len(shape) == 4 else shape[-1:]
    if channels not in BIAS_ADD or not all(isinstance(size, int) for size in sizes):
        return g.Add(form(g, branch), skip)
    if not sizes:
        return g.BiasAdd(product, bias, skip, domain=MICROSOFT)
    tokens = [g.Reshape(t, g.ints(0, -1, channels)) for t in (product, skip)]
    return g.Reshape(g.BiasAdd(tokens[0], bias, tokens[1], domain=MICROSOFT), g.ints(0, *sizes, channels))


def add_scaled(g: Graph, x: Value, branch: Value, scale: Value) -> Value:
    return image(g, g.Add(form(g, x), g.Mul(form(g, branch), g.Unsqueeze(scale, g.ints(2, 3)))))


def mean_of_pixels(g: Graph, x: Value) -> Value:
    return image(g, g.ReduceMean(form(g, x), g.ints(1, 2), keepdims=1))


def scale_channels(g: Graph, x: Value, scale: Value) -> Value:
    if len(x.shape) != 4:
        return onnx_cpu.scale_channels(g, x, scale)
    return image(g, g.Mul(form(g, x), g.Unsqueeze(scale, g.ints(1, 2))))


def concat_channels(g: Graph, x: Value, y: Value) -> Value:
    return image(g, g.Concat(form(g, x), form(g, y), axis=3))


def self_attention(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, heads: int, upcast: bool
) -> Value:
    """q, k and v packed as [B, N, heads, 3, d]: the rows of their weights are put into that order.

    Only in float16 and for d that are multiples of 8: for others the fused attention kernels are not there,
    or not for short sequences, and without them some versions of MultiHeadAttention refuse packed input.
    """
    rows = weight.shape[0]
    size = rows // 3 // heads
    if upcast or x.dtype != onnx_ir.DataType.FLOAT16 or size % 8:
        q, k, v = g.split(linear(g, x, weight, bias), 3, x.dtype)
        return onnx_cpu.attention(g, q, k, v, heads, upcast)
    weights = [
        None
        if w is None
        else g.transformed(w, f"by_{heads}_heads", tuple(w.shape), lambda a: by_head(a, heads))
        for w in (weight, bias)
    ]
    packed = g.Reshape(linear(g, x, *weights), g.ints(0, 0, heads, 3, size))
    return g.MultiHeadAttention(packed, num_heads=heads, domain=MICROSOFT)


def by_head(weight: Array, heads: int) -> Array:
    """Rows in the order [3 (q, k, v), heads, d] -> [heads, 3, d]."""
    rows = np.arange(len(weight)).reshape(3, heads, -1).swapaxes(0, 1)
    packed: Array = weight[rows.ravel()]
    return packed


def geglu(g: Graph, x: Value) -> Value:
    if x.shape[-1] not in BIAS_SPLIT_GELU or (PRODUCT, x) not in g.memory:
        return onnx_cpu.geglu(g, x)
    return g.BiasSplitGelu(*g.memory[PRODUCT, x], domain=MICROSOFT)


def upsample_nearest(g: Graph, x: Value, like: Value) -> Value:
    now, then = x.shape[2:], like.shape[2:]
    if all(isinstance(size, int) for size in (*now, *then)) and not any(map(int.__mod__, then, now)):
        return _resize(g, x, [b // a for a, b in zip(now, then, strict=True)])
    # Of sizes that are free, or not whole multiples, Resize must be told the result's.
    batch = x.shape[0] if isinstance(x.shape[0], int) else g.Shape(form(g, x), start=0, end=1)
    sizes = [batch, *pixels(g, like), x.shape[1]]
    target = g.Concat(*(g.ints(s) if isinstance(s, int) else s for s in sizes), axis=0)
    return image(g, g.Resize(form(g, x), None, None, target, **NEAREST))


def upsample_twice(g: Graph, x: Value) -> Value:
    return _resize(g, x, [2, 2])


NEAREST = {
    "mode": "nearest",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}


def _resize(g: Graph, x: Value, factors: list[int]) -> Value:
    scales = g.constant(np.array([1, *factors, 1], np.float32))
    return image(g, g.Resize(form(g, x), None, scales, **NEAREST))


def tokens_from_image(g: Graph, x: Value) -> Value:
    return g.Reshape(form(g, x), g.ints(0, -1, x.shape[1]))


def image_from_tokens(g: Graph, x: Value, like: Value) -> Value:
    shape = (0, *pixels(g, like), like.shape[1])
    result = image(g, g.reshape(x, *shape))
    if (PRODUCT, x) in g.memory:
        product, bias = g.memory[PRODUCT, x]
        g.memory[PRODUCT, result] = (g.reshape(product, *shape), bias)
    return result


CUDA: Lowerings = {
    lowering.__name__: lowering
    for lowering in (
        linear,
        conv3x3,
        conv1x1,
        group_norm,
        group_norm_silu,
        shifted_group_norm_silu,
        onnx_cpu.layer_norm,
        relu,
        add,
        add_scaled,
        mean_of_pixels,
        scale_channels,
        concat_channels,
        onnx_cpu.attention,
        self_attention,
        geglu,
        upsample_nearest,
        upsample_twice,
        tokens_from_image,
        image_from_tokens,
    )
}
