"""Compiling a module for ONNX Runtime, in every form that the recipe asks for."""

from pathlib import Path

from sdfast.engine import sha256
from sdfast.export.modules import ModuleSpec
from sdfast.export.onnx import export_module
from sdfast.export.onnx_cpu import CPU, CPU_COMPACT
from sdfast.export.onnx_cuda import CUDA
from sdfast.export.onnx_graph import Lowerings
from sdfast.export.onnx_tensorrt import TENSORRT
from sdfast.export.recipe import Recipe
from sdfast.export.tracing import file_stem, traced_with
from sdfast.manifest import Variant


def lowerings(recipe: Recipe) -> Lowerings:
    """How the networks' operations are written for the recipe's provider."""
    cpu = CPU_COMPACT if recipe.winograd is False else CPU
    return {"cpu": cpu, "cuda": CUDA, "tensorrt": TENSORRT}[recipe.provider or "cpu"]


def compile_onnx(spec: ModuleSpec, place: Path, table: Lowerings) -> list[Variant]:
    """Write `spec` to `place` as one ONNX file a form. Forms of the same weights share the files on disk."""
    network = spec.load()
    variants = []
    stored: dict[str, Path] = {}
    for form in spec.forms:
        path = place / f"{file_stem(spec, form)}.onnx"
        before = set(place.glob("*.data"))
        inputs, dynamic = traced_with(spec, form)
        export_module(network, inputs, dynamic, spec.outputs, path, table)
        for weights in sorted(set(place.glob("*.data")) - before):
            _share(weights, stored)
        variants.append(
            Variant(
                file=path.name,
                batch=form.batch,
                height=form.height,
                width=form.width,
                tokens=form.tokens,
            )
        )
    return variants


def _share(weights: Path, stored: dict[str, Path]) -> None:
    """Make a file whose content is stored already a second name of that. `stored`: digest → first file."""
    first = stored.setdefault(sha256(weights), weights)
    if first is not weights:
        weights.unlink()
        weights.hardlink_to(first)
