"""The networks' operations for ONNX Runtime's TensorRT provider: standard operators alone.

TensorRT takes no operator of com.microsoft, and fuses by itself what it is given in parts. What is not here
is written as for the CPU.
"""

import numpy as np
import onnx_ir

from sdfast.export.onnx_cpu import PLAIN, group_norm, linear
from sdfast.export.onnx_graph import Graph, Lowerings, Value


def group_norm_silu(g: Graph, x: Value, weight: Value, bias: Value, groups: int, eps: float) -> Value:
    normal = group_norm(g, x, weight, bias, groups, eps)
    return g.Mul(normal, g.Sigmoid(normal))


def shifted_group_norm_silu(
    g: Graph, x: Value, shift: Value, weight: Value, bias: Value, groups: int, eps: float
) -> Value:
    total = g.Add(x, g.Unsqueeze(shift, g.ints(2, 3)))
    total.shape, total.dtype = x.shape, x.dtype
    return group_norm_silu(g, total, weight, bias, groups, eps)


def attention(g: Graph, q: Value, k: Value, v: Value, heads: int, upcast: bool) -> Value:
    return _attend(g, [q, k, v], heads, q.shape[-1] // heads, q.dtype, upcast)


def self_attention(
    g: Graph, x: Value, weight: Value, bias: Value | None = None, *, heads: int, upcast: bool
) -> Value:
    qkv = g.split(linear(g, x, weight, bias), 3, x.dtype)
    return _attend(g, list(qkv), heads, weight.shape[0] // 3 // heads, x.dtype, upcast)


def _attend(
    g: Graph, qkv: list[Value], heads: int, size: int, dtype: onnx_ir.DataType, upcast: bool
) -> Value:
    """softmax(q kᵀ / √d) v: q [B, N, heads · size], k and v [B, L, heads · size] of `dtype`."""
    single = onnx_ir.DataType.FLOAT
    casts = upcast and dtype != single
    if casts:
        qkv = [g.Cast(t, to=single) for t in qkv]
    split = [g.Reshape(t, g.ints(0, 0, heads, size)) for t in qkv]
    by_head, across = [0, 2, 1, 3], [0, 2, 3, 1]
    q, k, v = (g.Transpose(t, perm=p) for t, p in zip(split, (by_head, across, by_head), strict=True))
    scale = g.constant(np.array(size**-0.5, (single if casts else dtype).numpy()))
    out = g.MatMul(g.Softmax(g.MatMul(g.Mul(q, scale), k), axis=-1), v)
    out = g.Reshape(g.Transpose(out, perm=by_head), g.ints(0, 0, heads * size))
    return g.Cast(out, to=dtype) if casts else out


TENSORRT: Lowerings = {
    **PLAIN,
    "group_norm_silu": group_norm_silu,
    "shifted_group_norm_silu": shifted_group_norm_silu,
    "attention": attention,
    "self_attention": self_attention,
}
