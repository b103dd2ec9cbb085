"""The networks' operations for ONNX Runtime's CPU provider, in the form that ran fastest there.

Each function writes one operation of `sdfast.models.ops` into a graph; its result's shape is already known.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir
from onnx_ir.tape import Tape

Value: TypeAlias = Any  # an onnx_ir.Value: a tensor of the graph that is being written
Lowerings: TypeAlias = Mapping[str, Callable[..., Value]]
MICROSOFT = "com.microsoft"


class Graph(Tape):  # type: ignore[misc]
    """Nodes to be written: `graph.Conv(x, weight, pads=…)` adds one and gives its result."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        super().__init__()
        self.graph = graph

    def __getattr__(self, kind: str) -> Callable[..., Value]:
        def node(*inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
            return self.op(kind, inputs, attributes, domain=domain)

        return node

    def constant(self, array: np.ndarray[Any, Any]) -> Value:
        """A tensor in the graph; equal ones are stored once."""
        tensor = onnx_ir.tensor(array)
        name = f"{tensor.dtype.name.lower()}_{'_'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if name not in self.graph.initializers:
            tensor.name = name
            self.graph.register_initializer(self.initializer(tensor))
        return self.graph.initializers[name]

    def ints(self, *values: int) -> Value:
        return self.constant(np.array(values, np.int64))

    def reshape(self, x: Value, *sizes: int | Value) -> Value:
        """sizes: numbers (-1: what is left, 0: the size at this place in x) or one-element tensors."""
        if all(isinstance(size, int) for size in sizes):
            return self.Reshape(x, self.ints(*sizes))
        parts = [self.ints(size) if isinstance(size, int) else size for size in sizes]
        return self.Reshape(x, self.Concat(*parts, axis=0))

    def sizes(self, x: Value, first: int, last: int) -> list[int | Value]:
        """Sizes of axes first … last - 1: numbers, or one-element tensors where they are dynamic."""
        dims = [x.shape[axis] for axis in range(first, last)]
        return [
            d if isinstance(d, int) else self.Shape(x, start=axis, end=axis + 1)
            for axis, d in enumerate(dims, first)
        ]


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


def layer_norm(g: Graph, x: Value, weight: Value, bias: Value, eps: float) -> Value:
    return g.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)


def attention(g: Graph, q: Value, k: Value, v: Value, heads: int, upcast: bool) -> Value:
    casts = upcast and q.dtype != onnx_ir.DataType.FLOAT
    inputs = [g.Cast(t, to=onnx_ir.DataType.FLOAT) for t in (q, k, v)] if casts else [q, k, v]
    result = g.MultiHeadAttention(*inputs, num_heads=heads, domain=MICROSOFT)
    return g.Cast(result, to=q.dtype) if casts else result


def geglu(g: Graph, x: Value) -> Value:
    value, gate = g.op_multi_out("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
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


CPU: Lowerings = {
    lowering.__name__: lowering
    for lowering in (
        linear,
        conv3x3,
        conv1x1,
        group_norm,
        group_norm_silu,
        layer_norm,
        attention,
        geglu,
        upsample_nearest,
        upsample_twice,
        tokens_from_image,
        image_from_tokens,
    )
}
