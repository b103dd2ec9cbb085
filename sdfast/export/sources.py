"""What a source names: a folder or a file on this disk, or a repository on the Hub."""

import os
import re
from pathlib import Path
from typing import Literal

from sdfast.errors import CheckpointError
from sdfast.export import layout
from sdfast.export.files import reason

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def kind_of(source: str | Path, wanted: str) -> Literal["folder", "file", "hub"]:
    """What a source is. What is on this disk wins over the Hub, and a Path is never a Hub id.

    Raises `CheckpointError` for what is none of them, saying what is `wanted`.
    """
    name = os.fspath(source)
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return "folder"
        if name and path.exists():
            return "file"
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name!r}: {reason(error)}; give a folder, a file or a Hub id") from error
    if "://" in name:
        raise CheckpointError(
            f"{name}: sdfast fetches no URLs; give the Hub id (org/name), or the path of a downloaded file"
        )
    if name.lower().endswith((".safetensors", *layout.PICKLE_SUFFIXES)):
        raise CheckpointError(f"{name}: no such file; check the path")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name!r}: no such folder or file, and not a Hub id (org/name); {wanted}")
    return "hub"
