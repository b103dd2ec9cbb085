"""Writing weights as safetensors."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdfast.errors import ExportError


def save_weights(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors to `path`, with a header of texts by name.

    safetensors orders several texts differently each time: one of them keeps the file the same.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(header) if header else None)
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    except SafetensorError as error:  # what it makes of a full disk
        raise ExportError(f"{path.name}: cannot be written ({error}); is the disk full?") from error
