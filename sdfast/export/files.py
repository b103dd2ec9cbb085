"""Reading a checkpoint's files without trusting them: no way out of the folder, no pickle, no half file."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from sdfast.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_JSON_LIMIT = 64 * 2**20
_HASH_BLOCK = 2**22


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint folder: which there are, and safe ways to reach them.

    home: the checkpoint's or snapshot's folder, of one that is a part of it.
    """

    folder: Path
    source: str
    home: Path | None = None

    @cached_property
    def names(self) -> frozenset[str]:
        """Relative POSIX paths of the files in the folder and one level below: the layout has no more."""
        try:
            below = [path for path in self.folder.iterdir() if path.is_dir()]
            paths = [*self.folder.iterdir(), *(path for parent in below for path in parent.iterdir())]
            return frozenset(path.relative_to(self.folder).as_posix() for path in paths if not path.is_dir())
        except OSError as error:
            raise CheckpointError(f"{self.source}: {reason(error)}; check its permissions") from error

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """Where a file may really lie: in the folder; for a snapshot in the Hub's cache, in its blobs too."""
        home = self.home or self.folder
        if home.parent.name != "snapshots":
            return (self.folder,)
        repository = home.parent.parent
        return (self.folder, repository / "blobs", repository.parent / "blobs")

    def path(self, name: str) -> Path:
        """The path of a file that is there, is a file, and does not lead out of the folder."""
        path = self.folder / name
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.source}: {name} is missing or unreadable ({reason(error)}); download it again"
            ) from error
        if not any(real.is_relative_to(root) for root in self.roots):
            raise CheckpointError(
                f"{self.source}: {name} is a link out of the folder, to {real}; put the file itself there"
            )
        if not real.is_file():
            raise CheckpointError(f"{self.source}: {name} is not a file; download it again")
        try:
            real.open("rb").close()
        except OSError as error:
            raise CheckpointError(f"{self.source}: {name} cannot be read ({reason(error)})") from error
        return path

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object in the folder, of a sane size and without NaN or Infinity."""
        path = self.path(name)
        try:
            if path.stat().st_size > _JSON_LIMIT:
                raise CheckpointError(f"{self.source}: {name} has over {_JSON_LIMIT} bytes; not a config")
            parsed = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.source}: {name} cannot be read as JSON ({reason(error)}); download it again"
            ) from error
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{self.source}: {name} is not a JSON object; download it again")
        return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def tensor_names(path: Path, source: str) -> list[str]:
    """The names in a safetensors header; the header is checked against the size of the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, source, error) from error


def tensor_shapes(path: Path, source: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of every tensor in a safetensors header, by name, and the texts that the header holds."""
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, source, error) from error


def numbers_in(names: Iterable[str], numbered: str) -> set[int]:
    """The numbers in the group of a pattern, of the tensors whose names begin so."""
    found = (re.match(numbered, name) for name in names)
    return {int(match[1]) for match in found if match}


def load_tensors(path: Path, source: str) -> "dict[str, torch.Tensor]":
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise unreadable(path, source, error) from error


def unreadable(path: Path, source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{source}: {path.parent.name}/{path.name} is truncated, or not safetensors ({reason(error)}); "
        "download it again"
    )


def sha256(path: Path, source: str) -> str:
    """The SHA-256 of a file, in hex. Errors speak of `source`."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{source}: {path} cannot be read ({reason(error)})") from error
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """The first line of an error, without the path that an OSError repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
