"""What a form of a module is traced with: example inputs, and the axes that stay free."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, export

from sdfast.errors import ExportError
from sdfast.export.modules import Form, ModuleSpec
from sdfast.manifest import ONE_CHUNK, Span

SIDE = 8
"""Pixels of which a recipe's sides are multiples."""
Dynamic = Mapping[str, Mapping[int, tuple[str, int, int]]]  # input → {axis: (name, lowest, highest)}


def traced_with(spec: ModuleSpec, form: Form) -> tuple[dict[str, Tensor], Dynamic]:
    """Example inputs of a form, and its free axes: those that span a range; the others are fixed."""
    spans = {"batch": form.batch, "height": form.height, "width": form.width, "tokens": form.tokens}
    inputs = spec.inputs(*(span.low if span else 8 for span in spans.values()))
    dynamic = {}
    for name, axes in spec.free.items():
        free = {axis: (kind, *_bounds(spans[kind], inputs[name].shape[axis])) for axis, kind in axes.items()}
        dynamic[name] = {axis: bounds for axis, bounds in free.items() if bounds[1] < bounds[2]}
    return inputs, {name: axes for name, axes in dynamic.items() if axes}


def _bounds(span: Span | None, lowest: int) -> tuple[int, int]:
    """The range of an axis whose example, `lowest`, stands for the low end of `span`."""
    if span is None:
        return lowest, lowest
    return lowest, lowest * span.high // span.low


def example(tensor: Tensor, axes: Mapping[int, Any]) -> Tensor:
    """A tensor whose dynamic axes are not 1, a size for which tracing would make the axis static."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor


def dynamic_shapes(
    inputs: Mapping[str, Tensor], dynamic: Dynamic, pictures: Collection[str] = ()
) -> dict[str, dict[int, Any]] | None:
    """torch.export's form of the free axes; axes of one name are the same number.

    pictures: inputs whose free sides are said to be multiples of `SIDE`. Of convolutions that halve a side
    which may be odd, torch.export cannot tell that the result has any columns, and refuses them.
    """
    unknown = set(dynamic) - set(inputs)
    if unknown:
        raise ExportError(f"dynamic axes of {sorted(unknown)}, but the inputs are {list(inputs)}")
    if not any(dynamic.values()):
        return None
    dims: dict[tuple[str, int, int], Any] = {}
    for axes in dynamic.values():
        for name, low, high in axes.values():
            dims.setdefault((name, low, high), export.Dim(name, min=low, max=high))
    for name in pictures:
        for kind, low, high in dynamic.get(name, {}).values():
            if kind in ("height", "width"):
                dims[kind, low, high] = SIDE * export.Dim(
                    f"{kind}_by_{SIDE}", min=low // SIDE, max=high // SIDE
                )
    return {name: {axis: dims[dim] for axis, dim in dynamic.get(name, {}).items()} for name in inputs}


def file_stem(spec: ModuleSpec, form: Form) -> str:
    """`unet` when there is one form, else `unet-512x768-b2`, and with `-long` for long prompts."""
    if len(spec.forms) == 1:
        return spec.name
    parts = [spec.name]
    if form.height is not None:
        parts.append(f"{form.width}x{form.height}".replace("..", "to"))
    if len({other.batch for other in spec.forms}) > 1:
        parts.append(f"b{form.batch}".replace("..", "to"))
    if form.tokens != ONE_CHUNK and len({other.tokens for other in spec.forms}) > 1:
        parts.append("long")
    return "-".join(parts)
