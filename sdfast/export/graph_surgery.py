"""Graph surgery: a few nodes at the ends of a graph that give it other inputs and outputs.

What the graph must be for that is looked at first: one that is not as optimum exports it is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sdfast.errors import CheckpointError, first_line
from sdfast.export.checkpoint import Checkpoint
from sdfast.export.onnx import OPSET
from sdfast.export.onnx_graph import Graph, Value
from sdfast.export.optimum import MODEL

FLOAT, INT64 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64
_RANKS = {"context": 3, "time_shift": 2, "text_embeds": 2}  # of outputs; the others have four axes
_KEEPS_ELEMENTS = ("Unsqueeze", "Squeeze", "Reshape", "Identity", "Cast")


class Opened:
    """A graph that is being changed. tape: where nodes are written until they are placed."""

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        self.name = name
        self._source = checkpoint.source
        path = checkpoint.folder / name / MODEL
        try:
            self._model = onnx_ir.load(str(path))
        except Exception as error:  # what it raises for a graph that makes no sense has no base class
            raise CheckpointError(
                f"{self._source}: {name}/{MODEL} cannot be read: {first_line(error)}"
            ) from error
        self._graph = self._model.graph
        self.inputs: dict[str, Value] = {str(value.name): value for value in self._graph.inputs}
        self.outputs: dict[str, Value] = {str(value.name): value for value in self._graph.outputs}
        self.tape = Graph(self._graph)

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {self.name}/{MODEL} {what}")

    def check_inputs(self, *needed: str) -> None:
        """Refuse a graph with other inputs, or with floating point inputs that are not float32."""
        if sorted(self.inputs) != sorted(needed):
            raise self.refuse(
                f"takes {', '.join(sorted(self.inputs))}, and sdfast knows such graphs with "
                f"{', '.join(sorted(needed))}; export the checkpoint itself"
            )
        for name, value in self.inputs.items():
            whole = name == "input_ids"
            allowed = (INT64, onnx_ir.DataType.INT32) if whole else (FLOAT,)
            if value.dtype not in allowed:
                raise self.refuse(
                    f"takes {name} as {value.dtype}, not {' or '.join(map(str, allowed))}; export the "
                    "checkpoint again with a newer optimum, in fp32"
                )

    def check_outputs(self, *needed: str) -> None:
        for name in needed:
            if name not in self.outputs:
                raise self.refuse(
                    f"gives {', '.join(self.outputs)}, and no {name}; export the checkpoint again with a "
                    "newer optimum"
                )

    def output(self, name: str) -> Value:
        self.check_outputs(name)
        return self.outputs[name]

    def size(self, name: str, axis: int) -> int | None:
        """The size of an axis of an input; None where it is free."""
        shape = self.inputs[name].shape
        if shape is None or len(shape) <= axis:
            raise self.refuse(f"does not say the shape of {name}; export it again")
        return shape[axis] if isinstance(shape[axis], int) else None

    def number(self, value: float) -> Value:
        return self.tape.constant(np.array(value, np.float32))

    def input(self, name: str, kind: onnx_ir.DataType, shape: Sequence[int | str]) -> Value:
        """A new input."""
        value = new_value(name, kind, shape)
        old = self.inputs.get(name)
        if old is not None:
            old.name = f"optimum.{name}"
        self._graph.inputs.append(value)
        return value

    def rename(self, old: str, new: str) -> None:
        self.inputs[old].name = new

    def replace(self, name: str, value: Value) -> None:
        """Have the graph read `value` where it reads an input."""
        self.inputs[name].replace_all_uses_with(value)

    def spread(self, name: str, rows: Value) -> None:
        """Have the graph read `rows` [B] where it has spread the one number of an input over its rows.

        On the way there the number's shape alone may change; anything else is refused.
        """
        value = self.inputs[name]
        while True:
            uses = [node for node, _ in value.uses()]
            if len(uses) != 1 or uses[0].op_type not in (*_KEEPS_ELEMENTS, "Expand"):
                break
            value = uses[0].outputs[0]
            if uses[0].op_type == "Cast" and uses[0].attributes["to"].value != FLOAT:
                break
            if uses[0].op_type == "Expand":
                value.replace_all_uses_with(rows)
                return
        raise self.refuse(
            f"does not spread its {name} over the rows as optimum's exports do; export the checkpoint itself"
        )

    def prepend(self) -> None:
        """Place the nodes that were written, before all others."""
        self._graph.insert_before(self._graph[0], self.tape.nodes)
        self.tape = Graph(self._graph)

    def append(self) -> Graph:
        """Where nodes are written that `finished` places, after all others."""
        self.tape = Graph(self._graph)
        return self.tape

    def finished(self, inputs: Sequence[str], outputs: Mapping[str, Value]) -> onnx_ir.Model:
        """The graph with these inputs and outputs alone, in this order."""
        self._graph.extend(self.tape.nodes)
        by_name = {value.name: value for value in self._graph.inputs}
        self._graph.inputs[:] = [by_name[name] for name in inputs]
        self._graph.outputs[:] = _named(outputs)
        RemoveUnusedNodesPass()(self._model)
        self._model.metadata_props.clear()
        return self._model


def new_value(name: str, kind: onnx_ir.DataType, shape: Sequence[int | str]) -> Value:
    """A value of that type that no node gives."""
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(kind), shape=onnx_ir.Shape(shape))


def _named(outputs: Mapping[str, Value]) -> list[Value]:
    for name, value in outputs.items():
        value.name, value.type = name, onnx_ir.TensorType(FLOAT)
        value.shape = onnx_ir.Shape([f"{name}_{axis}" for axis in range(_RANKS.get(name, 4))])
    return list(outputs.values())


def new_model(inputs: list[Value], outputs: Mapping[str, Value], nodes: list[Any]) -> onnx_ir.Model:
    """A graph of these nodes, in this order."""
    graph = onnx_ir.Graph(inputs, _named(outputs), nodes=nodes, opset_imports={"": OPSET}, name="module")
    return onnx_ir.Model(graph, ir_version=10)
