"""Reading a folder that `optimum-cli export onnx` wrote: diffusers' layout, with ONNX graphs for networks.

Nothing in it is trusted: a graph's weights lie in it or in plain files beside it, every tensor within them,
and its operations are those of ONNX and ONNX Runtime.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from sdfast.backends.onnx import external_tensors
from sdfast.errors import CheckpointError, DependencyError, first_line
from sdfast.export import layout
from sdfast.export.checkpoint import Checkpoint, Component, check_config, tokenizer_folder
from sdfast.export.files import Files

MODEL = "model.onnx"
VAE_ENCODER, VAE_DECODER = "vae_encoder", "vae_decoder"
DOMAINS = ("", "ai.onnx", "com.microsoft")
OLDEST_OPSET = 13  # from which on Squeeze and Unsqueeze have their axes as an input
_GRAPHS: Mapping[layout.Family, tuple[str, ...]] = {
    "sd": ("text_encoder", "unet", VAE_DECODER),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", VAE_DECODER),
}
_OWN = "ORT"  # what optimum's pipelines put before the names of diffusers' classes


def holds_graphs(names: Collection[str]) -> bool:
    """Whether the folder with these files holds graphs, and not weights that they may have been made of."""
    return f"unet/{MODEL}" in names and not any(n.startswith("unet/diffusion_pytorch_model") for n in names)


def read_graphs(files: Files, variant: str | None) -> Checkpoint:
    """The checkpoint in such a folder, each of its files verified."""
    source = files.source
    if variant is not None:
        raise CheckpointError(f"{source}: graphs that optimum exported have no variants; leave variant out")
    index = files.json("model_index.json")
    index["_class_name"] = _stock_name(index.get("_class_name"))
    family = layout.check_index(index, source)
    if layout.is_refiner(index):
        raise CheckpointError(f"{source}: graphs of SDXL's refiner are not supported; give its weights")
    optional = (VAE_ENCODER,) if f"{VAE_ENCODER}/{MODEL}" in files.names else ()
    return Checkpoint(
        source=source,
        revision=None,
        folder=files.folder,
        family=family,
        index=index,
        components={name: _component(files, name, index) for name in (*_GRAPHS[family], *optional)},
        scheduler_config=files.json("scheduler/scheduler_config.json"),
        tokenizers={name: tokenizer_folder(files, name) for name in layout.TOKENIZERS[family]},
        graphs=True,
    )


def _stock_name(name: Any) -> Any:
    return name.removeprefix(_OWN) if isinstance(name, str) else name


def _component(files: Files, name: str, index: Mapping[str, Any]) -> Component:
    class_name = index["vae" if name in (VAE_ENCODER, VAE_DECODER) else name][1]
    config = files.json(f"{name}/config.json")
    if str(config.get("_class_name", "")).startswith(_OWN):
        del config["_class_name"]  # it says what runs the graph
    check_config(config, name, class_name, files)
    return Component(name, class_name, config, (files.path(f"{name}/{MODEL}"), *_beside(files, name)))


def _beside(files: Files, name: str) -> list[Any]:
    """The files with the weights of a graph, after a look at all that the graph says of them."""
    try:
        import onnx
    except ImportError as error:
        raise DependencyError('reading ONNX graphs needs onnx: pip install "sdfast[export]"') from error
    told = f"{files.source}: {name}/{MODEL}"
    try:
        model = onnx.load(str(files.path(f"{name}/{MODEL}")), load_external_data=False)
    except Exception as error:  # protobuf's decoder raises its own types
        raise CheckpointError(f"{told} is not an ONNX file ({first_line(error)}); export it again") from error
    _check_operations(model, told)
    found: dict[str, Any] = {}
    for tensor in external_tensors(model, onnx.TensorProto):
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        if not location or PurePosixPath(location).name != location or "\\" in location or "\0" in location:
            raise CheckpointError(
                f"{told}: its weights are said to lie at {location!r}, which is not a file beside it; "
                "do not trust this folder"
            )
        if location not in found:
            found[location] = files.path(f"{name}/{location}")
        _check_extent(tensor, place, found[location].stat().st_size, told)
    return [found[location] for location in sorted(found)]


def _check_operations(model: Any, told: str) -> None:
    """Refuse a graph of another set of operations, or of one that is too old."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    foreign = sorted({*versions} - {*DOMAINS}) or sorted({function.domain for function in model.functions})
    if foreign:
        raise CheckpointError(
            f"{told}: it has operations of {foreign[0]!r}; those of ONNX and of com.microsoft are supported"
        )
    version = versions.get("", versions.get("ai.onnx", 0))
    if version < OLDEST_OPSET:
        raise CheckpointError(
            f"{told}: opset {version}; export it again with --opset {OLDEST_OPSET} or above"
        )


def _check_extent(tensor: Any, place: Mapping[str, str], size: int, told: str) -> None:
    """Refuse a tensor that does not lie within its file, or has not the length that its shape asks for."""
    import onnx

    try:
        offset, needed = int(place.get("offset", 0)), _nbytes(tensor, onnx)
        length = int(place.get("length", needed))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{told}: {tensor.name!r} cannot be read ({first_line(error)}); export it again"
        ) from error
    if offset < 0 or length != needed or offset + length > size:
        raise CheckpointError(
            f"{told}: {tensor.name!r} needs {needed} bytes, and is said to be {length} at {offset} of a file "
            f"of {size}; the folder is damaged: export it again"
        )


def _nbytes(tensor: Any, onnx: Any) -> int:
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"shape {list(tensor.dims)}")
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * itemsize)
