"""A network that is put beside those of a checkpoint, or in the place of one, from a source of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import Component
from sdfast.export.files import sha256


@dataclass(frozen=True)
class Added:
    """A network on this disk, verified as far as its headers go.

    source: what the user gave. revision: the commit on the Hub. digests: the SHA-256 of each of its weights
    files, by name. names: of a single file: diffusers' names of its tensors, by its own.
    """

    source: str
    revision: str | None
    component: Component
    digests: Mapping[str, str]
    names: Mapping[str, str] | None = None

    @property
    def folder(self) -> Path:
        return self.component.weights[0].parent

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by diffusers' names, as `Checkpoint.state_dict` has those of a component."""
        tensors = self.component.tensors(self.source)
        if self.names is None:
            return tensors
        return {theirs: tensors[name] for name, theirs in self.names.items()}


def digests_of(component: Component, source: str) -> dict[str, str]:
    """The SHA-256 of each of its weights files, by the file's name. Errors speak of `source`."""
    return {path.name: sha256(path, source) for path in component.weights}


def refuse_unused(source: str, kind: str, noun: str, **given: str | None) -> None:
    """Raises `CheckpointError` for a setting that has no meaning for this kind of source."""
    unused = {"folder": ("revision",), "file": ("revision", "variant")}.get(kind, ())
    for name in unused:
        if given[name] is not None:
            raise CheckpointError(
                f"{source}: is a {noun}'s {kind}, for which {name} has no meaning; leave it out"
            )
