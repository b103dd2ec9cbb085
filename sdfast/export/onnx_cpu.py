"""The networks' operations for ONNX Runtime's CPU provider, in the form that ran fastest there.

Each function writes one operation of `sdfast.models.ops` into a graph; its result's shape is already known.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir

from sdfast.export.onnx_graph import MICROSOFT, Array, Graph, Lowerings, Value


def linear(g: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    # Gemm takes the weights as they lie and adds the bias as it starts; MatMul would need both changed.
    inputs = [x] if bias is None else [x, bias]
    if len(x.shape) > 2:
        inputs[0] = g.Reshape(x, g.ints(-1, weight.shape[1]))
    result = g.Gemm(inputs[0], weight, *inputs[1:], transB=1)
    if len(x.shape) == 2:
        return result
    leading = [-1 if not isinstance(d, int) else d for d in x.shape[:-1]]
    if leading.count(-1) > 1:
        return g.reshape(result, *g.sizes(x, 0, len(x.shape) - 1), weight.shape[0])
    return g.Reshape(result, g.ints(*leading, weight.shape[0]))


def conv3x3(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, stride: int, padding: Sequence[int]
) -> Value:
    before, after = padding
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.Conv(*inputs, kernel_shape=[3, 3], strides=[stride, stride], pads=[before, before, after, after])


def conv3x3_fast(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, stride: int, padding: Sequence[int]
) -> Value:
    if stride == 1 and list(padding) == [1, 1] and winograd_pays(x, weight):
        return winograd(g, x, weight, bias)
    return conv3x3(g, x, weight, bias, stride=stride, padding=padding)


# Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016): a 4 × 4 tile of the result from a 6 × 6 tile
# of x by 36 multiplications in place of 144. The points 0, ±3/4, ±3/2, ∞ halve the rounding error of the
# usual 0, ±1, ±2, ∞ (how points set the error: Barabasz et al. 2020).
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
TILE = 4


def toom_cook() -> tuple[Array, Array, Array]:
    """Matrices A [6, 4], G [6, 3], B [6, 6]: result = Aᵀ ((G w) · (B x)) is w, three taps, along six of x."""
    n = len(POINTS)
    rest = [[p for p in POINTS if p != point] for point in POINTS]
    scale = np.array(
        [np.prod([point - p for p in others]) for point, others in zip(POINTS, rest, strict=True)]
    )
    infinity = np.eye(1, n)[:, ::-1]
    A = np.vstack([np.vander(POINTS, TILE, increasing=True), infinity[:, n - TILE :]])
    G = np.vstack([np.vander(POINTS, 3, increasing=True) / scale[:, None], infinity[:, n - 3 :]])
    B = np.array([[*np.poly(others)[::-1], 0] for others in rest] + [np.poly(POINTS)[::-1]])
    return A, G, B


def winograd_pays(x: Value, weight: Value) -> bool:
    """Whether it is faster than a convolution: measured, for float32 from 16 × 16 pixels and 128 channels on.

    Its weights are four times as large and its tiles twice as large as x, so pictures of many megabytes go
    without. Of images of unknown size only those of the U-Nets' two outer levels are sure to be large.
    """
    (outputs, inputs), (height, width) = weight.shape[:2], x.shape[2:]
    if x.dtype != onnx_ir.DataType.FLOAT or min(outputs, inputs) < 128:
        return False
    if not isinstance(height, int) or not isinstance(width, int):
        return bool(min(outputs, inputs) >= 320 and outputs * inputs <= 640 * 1280)
    return bool(min(height, width) >= 16 and inputs * height * width <= 2**25)


def winograd(g: Graph, x: Value, weight: Value, bias: Value | None) -> Value:
    A, G, B = toom_cook()
    outputs, inputs = weight.shape[:2]
    (batch,), (height, width) = g.sizes(x, 0, 1), g.sizes(x, 2, 4)
    # Both transforms of x at once: 36 fixed filters over every channel as an image of its own.
    filters = g.constant(np.kron(B, B).reshape(36, 1, 6, 6).astype(np.float32))
    planes = g.reshape(x, -1, 1, height, width)
    tiles = g.Conv(planes, filters, kernel_shape=[6, 6], strides=[TILE, TILE], pads=[1, 1, TILE, TILE])
    tiles = g.Transpose(g.reshape(tiles, batch, inputs, 36, -1), perm=[2, 1, 0, 3])  # [36, I, B, tiles]
    product = g.MatMul(
        g.transformed(weight, "winograd", (36, outputs, inputs), lambda w: _winograd_weight(G, w)),
        g.Reshape(tiles, g.ints(36, inputs, -1)),
    )  # [36, O, B tiles]
    back = g.constant(np.kron(A.T, A.T).astype(np.float32))
    rows, columns = _tiles(g, height), _tiles(g, width)
    result = g.MatMul(back, g.Reshape(product, g.ints(36, -1)))
    result = g.reshape(result, TILE, TILE, outputs, -1, rows, columns)
    result = g.Transpose(result, perm=[3, 2, 4, 0, 5, 1])  # [B, O, rows, 4, columns, 4]
    result = g.reshape(result, batch, outputs, _times(g, rows, TILE), _times(g, columns, TILE))
    result = _crop(g, result, height, width)
    return result if bias is None else g.Add(result, g.Reshape(bias, g.ints(-1, 1, 1)))


def _winograd_weight(G: Array, weight: Array) -> Array:
    """[O, I, 3, 3] float32 -> [36, O, I] float32."""
    flat = weight.reshape(-1, 9).astype(np.float64)
    return (np.kron(G, G) @ flat.T).astype(np.float32).reshape(36, *weight.shape[:2])


def _tiles(g: Graph, size: int | Value) -> int | Value:
    if isinstance(size, int):
        return -(-size // TILE)
    return g.Div(g.Add(size, g.ints(TILE - 1)), g.ints(TILE))


def _times(g: Graph, size: int | Value, factor: int) -> int | Value:
    return size * factor if isinstance(size, int) else g.Mul(size, g.ints(factor))


def _crop(g: Graph, x: Value, height: int | Value, width: int | Value) -> Value:
    """The last tiles may reach over the edge."""
    if isinstance(height, int) and isinstance(width, int) and height % TILE == 0 == width % TILE:
        return x
    ends = [g.ints(s) if isinstance(s, int) else s for s in (height, width)]
    return g.Slice(x, g.ints(0, 0), g.Concat(*ends, axis=0), g.ints(2, 3))


def conv1x1(g: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.Conv(*inputs, kernel_shape=[1, 1])


def group_norm(g: Graph, x: Value, weight: Value, bias: Value, groups: int, eps: float) -> Value:
    one, zero = (g.constant(np.full(groups, v, x.dtype.numpy())) for v in (1, 0))
    normal = g.InstanceNormalization(g.Reshape(x, g.ints(0, groups, -1)), one, zero, epsilon=eps)
    scaled = g.Mul(g.reshape(normal, *g.sizes(x, 0, 4)), g.Reshape(weight, g.ints(-1, 1, 1)))
    return g.Add(scaled, g.Reshape(bias, g.ints(-1, 1, 1)))


def group_norm_silu(g: Graph, x: Value, weight: Value, bias: Value, groups: int, eps: float) -> Value:
    return g.QuickGelu(group_norm(g, x, weight, bias, groups, eps), alpha=1.0, domain=MICROSOFT)


def shifted_group_norm_silu(
    g: Graph, x: Value, shift: Value, weight: Value, bias: Value, groups: int, eps: float
) -> Value:
    total = g.Add(x, g.Unsqueeze(shift, g.ints(2, 3)))
    total.shape, total.dtype = x.shape, x.dtype
    return group_norm_silu(g, total, weight, bias, groups, eps)


def layer_norm(g: Graph, x: Value, weight: Value, bias: Value, eps: float) -> Value:
    return g.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)


def add(g: Graph, x: Value, branch: Value) -> Value:
    return g.Add(x, branch)


def add_scaled(g: Graph, x: Value, branch: Value, scale: Value) -> Value:
    return g.Add(x, g.Mul(branch, g.Unsqueeze(scale, g.ints(2, 3))))


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
    value, gate = g.split(x, 2, x.dtype)
    return g.Mul(value, g.Gelu(gate))


def upsample_nearest(g: Graph, x: Value, like: Value) -> Value:
    height, width = g.sizes(like, 2, 4)
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
    return g.Resize(
        x, None, twice, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


def tokens_from_image(g: Graph, x: Value) -> Value:
    return g.Transpose(g.Reshape(x, g.ints(0, x.shape[1], -1)), perm=[0, 2, 1])


def image_from_tokens(g: Graph, x: Value, like: Value) -> Value:
    return g.reshape(g.Transpose(x, perm=[0, 2, 1]), *g.sizes(like, 0, 4))


CPU_COMPACT: Lowerings = {
    lowering.__name__: lowering
    for lowering in (
        linear,
        conv3x3,
        conv1x1,
        group_norm,
        group_norm_silu,
        shifted_group_norm_silu,
        layer_norm,
        add,
        add_scaled,
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

# Faster, for some more memory: at SD 1.5 and 32 × 32 latents 4.2 GB of weights in place of 3.2.
CPU: Lowerings = {**CPU_COMPACT, "conv3x3": conv3x3_fast}
