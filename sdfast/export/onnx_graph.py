"""The nodes that a lowering writes in place of one of the networks' operations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir
from onnx_ir.tape import Tape

Array: TypeAlias = np.ndarray[Any, Any]
Value: TypeAlias = Any  # an onnx_ir.Value: a tensor of the graph that is being written
Lowerings: TypeAlias = Mapping[str, Callable[..., Value]]
MICROSOFT = "com.microsoft"


class Graph(Tape):  # type: ignore[misc]
    """Nodes to be written: `graph.Conv(x, weight, pads=…)` adds one and gives its result.

    memory: what lowerings noted of values for the lowerings of later operations, by (note, value).
    """

    def __init__(self, graph: onnx_ir.Graph, memory: dict[tuple[str, Value], Any] | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.memory = {} if memory is None else memory

    def __getattr__(self, kind: str) -> Callable[..., Value]:
        def node(*inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
            return self.op(kind, inputs, attributes, domain=domain)

        return node

    def constant(self, array: Array) -> Value:
        """A tensor in the graph; equal ones are stored once."""
        tensor = onnx_ir.tensor(array)
        name = f"{tensor.dtype.name.lower()}_{'_'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if name not in self.graph.initializers:
            tensor.name = name
            self.graph.register_initializer(self.initializer(tensor))
        return self.graph.initializers[name]

    def transformed(
        self,
        weight: Value,
        name: str,
        shape: tuple[int, ...],
        function: Callable[[Array], Array],
        dtype: onnx_ir.DataType | None = None,
    ) -> Value:
        """A weight that is computed from another one only when it is written to the file.

        Of the same dtype, unless another is given that the function's results have. Asked for twice under one
        name, it is stored once.
        """
        source, full_name = weight.const_value, f"{weight.name}.{name}"
        if full_name not in self.graph.initializers:
            tensor = onnx_ir.LazyTensor(
                lambda: onnx_ir.tensor(np.ascontiguousarray(function(source.numpy()))),
                dtype=dtype or source.dtype,
                shape=onnx_ir.Shape(shape),
                name=full_name,
            )
            self.graph.register_initializer(self.initializer(tensor))
        return self.graph.initializers[full_name]

    def split(self, x: Value, parts: int, dtype: onnx_ir.DataType) -> Sequence[Value]:
        """Equal parts of x along its last axis, of `dtype` as x is."""
        split: Sequence[Value] = self.op_multi_out(
            "Split", [x], {"axis": -1, "num_outputs": parts}, num_outputs=parts
        )
        for value in split:
            value.dtype = dtype
        return split

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
