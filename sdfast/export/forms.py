"""Compiling a module for ONNX Runtime, in every form that the recipe asks for."""

from pathlib import Path

from torch import nn

from sdfast.engine import sha256
from sdfast.export.modules import Form, ModuleSpec
from sdfast.export.onnx import export_module
from sdfast.export.onnx_cpu import CPU, CPU_COMPACT
from sdfast.export.onnx_cuda import CUDA
from sdfast.export.onnx_graph import Lowerings
from sdfast.export.onnx_tensorrt import TENSORRT
from sdfast.export.recipe import Recipe
from sdfast.manifest import Span, Variant


def lowerings(recipe: Recipe) -> Lowerings:
    """How the networks' operations are written for the recipe's provider."""
    cpu = CPU if recipe.winograd else CPU_COMPACT
    return {"cpu": cpu, "cuda": CUDA, "tensorrt": TENSORRT}[recipe.provider or "cpu"]


def compile_onnx(spec: ModuleSpec, place: Path, table: Lowerings) -> list[Variant]:
    """Write `spec` to `place` as one ONNX file a form. Forms of the same weights share the files on disk."""
    network = spec.load()
    variants = []
    stored: dict[str, Path] = {}
    for form in spec.forms:
        path = place / _file_name(spec, form)
        before = set(place.glob("*.data"))
        _export(network, spec, form, path, table)
        for weights in sorted(set(place.glob("*.data")) - before):
            _share(weights, stored)
        variants.append(Variant(file=path.name, batch=form.batch, height=form.height, width=form.width))
    return variants


def _export(network: nn.Module, spec: ModuleSpec, form: Form, path: Path, table: Lowerings) -> None:
    """One form: axes that span a range are free in the graph, the others are fixed."""
    spans = {"batch": form.batch, "height": form.height, "width": form.width}
    example = [span.low if span else 8 for span in spans.values()]
    inputs = spec.inputs(*example)
    dynamic = {}
    for name, axes in spec.free.items():
        free = {axis: (kind, *_bounds(spans[kind], inputs[name].shape[axis])) for axis, kind in axes.items()}
        dynamic[name] = {axis: bounds for axis, bounds in free.items() if bounds[1] < bounds[2]}
    dynamic = {name: axes for name, axes in dynamic.items() if axes}
    export_module(network, inputs, dynamic, spec.outputs, path, table)


def _bounds(span: Span | None, lowest: int) -> tuple[int, int]:
    """The range of an axis whose example, `lowest`, stands for the low end of `span`."""
    if span is None:
        return lowest, lowest
    return lowest, lowest * span.high // span.low


def _file_name(spec: ModuleSpec, form: Form) -> str:
    """`unet.onnx` when there is one form, else `unet-512x768-b2.onnx`."""
    if len(spec.forms) == 1:
        return f"{spec.name}.onnx"
    parts = [spec.name]
    if form.height is not None:
        parts.append(f"{form.width}x{form.height}".replace("..", "to"))
    if len({other.batch for other in spec.forms}) > 1:
        parts.append(f"b{form.batch}".replace("..", "to"))
    return "-".join(parts) + ".onnx"


def _share(weights: Path, stored: dict[str, Path]) -> None:
    """Make a file whose content is stored already a second name of that. `stored`: digest → first file."""
    first = stored.setdefault(sha256(weights), weights)
    if first is not weights:
        weights.unlink()
        weights.hardlink_to(first)
