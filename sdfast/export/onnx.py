"""Writing a module as ONNX: one graph file, its weights in one file beside it.

The networks' named operations (`sdfast.models.ops`) arrive in the traced graph as one node each, and are
replaced there by what a table of lowerings writes for them: one table for each execution provider. Nothing
is recognised by pattern; what the table writes is what runs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript.values import Op, Opset
from torch import Tensor, nn

from sdfast.errors import ExportError, cause_line
from sdfast.export.onnx_cpu import CPU
from sdfast.export.onnx_graph import Graph, Lowerings, Value
from sdfast.export.quiet import quiet
from sdfast.export.tracing import Dynamic, dynamic_shapes, example
from sdfast.models import ops

OPSET = 20
DOMAIN = "sdfast"
SHARD = 512 * 2**20  # bytes


def export_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    dynamic: Dynamic,
    outputs: Sequence[str],
    path: Path,
    lowerings: Lowerings = CPU,
) -> None:
    """Write `module` to `path` (NAME.onnx) and its weights to NAME.onnx.data beside it.

    More than `SHARD` bytes of weights go to several files (NAME-00001-of-00008.onnx.data), which are read and
    verified side by side.

    inputs: an example of each input, by the name that `forward` has for it; an axis that is not in `dynamic`
    has the example's size for ever. dynamic: input name -> {axis: (name, lowest, highest)}; axes of one name
    are the same number. outputs: names for what `forward` returns. The weights keep their dtype
    and go from where they lie to the file, so those of a memory-mapped checkpoint never fill memory.

    Raises ExportError if the module cannot be traced or written.
    """
    model = trace(module, inputs, dynamic, outputs)
    lower(model, lowerings)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.setdefault("com.microsoft", 1)
    save_model(model, path)


def save_model(model: onnx_ir.Model, path: Path) -> None:
    """Write a graph to `path` (NAME.onnx), its weights beside it as `export_module` does."""
    try:
        onnx_ir.save(
            model,
            str(path),
            external_data=f"{path.name}.data",
            size_threshold_bytes=1024,
            max_shard_size_bytes=SHARD,
        )
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}") from error


def lower(model: onnx_ir.Model, lowerings: Lowerings) -> None:
    """Replace every named operation of `model` by what its lowering writes."""
    memory: dict[tuple[str, Value], Any] = {}
    for node in list(model.graph):
        if node.domain == DOMAIN:
            graph = Graph(model.graph, memory)
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            result = lowerings[node.op_type](graph, *node.inputs, **attributes)
            onnx_ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], graph.nodes, node.outputs, [result]
            )
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], dynamic: Dynamic, outputs: Sequence[str]
) -> onnx_ir.Model:
    """The graph of `module`, its named operations one node each. Arguments as in `export_module`."""
    try:
        with torch.no_grad(), quiet("torch.onnx"), ops.as_nodes():
            program = torch.onnx.export(
                module.eval(),
                kwargs={name: example(tensor, dynamic.get(name, {})) for name, tensor in inputs.items()},
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes(inputs, dynamic),
                custom_translation_table=_translations(),
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"{type(module).__name__} cannot be exported: {cause_line(error)}") from error
    if program is None:
        raise ExportError(f"{type(module).__name__} was exported to nothing")
    return program.model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    targets = [getattr(torch.ops.sdfast, name).default for name in ops.NAMES]
    return {target: _as_one_node(target) for target in targets}


def _as_one_node(target: Any) -> Callable[..., Any]:
    """Write a call of the operation as one ONNX node: tensors are its inputs, all else its attributes."""
    kind, schema = onnx.defs.OpSchema, target._schema
    tensors = [argument.name for argument in schema.arguments if "Tensor" in str(argument.type)]
    types = {"float": kind.AttrType.FLOAT, "List[int]": kind.AttrType.INTS}
    node = Op(
        Opset(DOMAIN, 1),
        schema.name.split("::")[1],
        onnx.defs.OpSchema(
            schema.name.split("::")[1],
            DOMAIN,
            1,
            inputs=[
                kind.FormalParameter(n, "T", param_option=kind.FormalParameterOption.Optional)
                for n in tensors
            ],
            outputs=[kind.FormalParameter("output", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
            attributes=[
                kind.Attribute(argument.name, types.get(str(argument.type), kind.AttrType.INT))
                for argument in schema.arguments
                if argument.name not in tensors
            ],
        ),
    )

    def translate(*args: Any) -> Any:
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=True))
        return node(*(given.pop(name) for name in tensors), **given)

    return translate
