"""One copy on disk of what several engines hold: files of the same content are links to one file.

Two engines of a checkpoint, say of two sizes, have the same weights. Linked, they fill the disk once, and a
processor's memory too, where they are mapped.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdfast.engine import sha256
from sdfast.errors import EngineError
from sdfast.manifest import File, read_manifest

LARGE = 2**20  # bytes: smaller files are not worth looking for


def link_or_copy(old: Path, new: Path) -> None:
    """The same file in a second place; a copy where the disk has no hard links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def share_with(target: Path, place: Path, files: Sequence[File]) -> None:
    """Make large files of `place`, which will be the engine `target`, links to those that it or an engine
    beside it already has."""
    large: dict[str, list[Path]] = {}
    for file in files:
        if file.size >= LARGE:
            large.setdefault(file.sha256, []).append(place / file.path)
    for other, digest in _known(target.parent):
        new = [path for path in large.get(digest, ()) if not path.samefile(other)]
        if new and sha256(other) == digest:
            for path in new:
                _replace(path, other)
            del large[digest]


def _known(folder: Path) -> Iterator[tuple[Path, str]]:
    """The large files of the engines in a directory, with the digests that their manifests say."""
    for manifest in sorted(folder.glob("*/manifest.json")):
        try:
            known = read_manifest(manifest.parent).files
        except EngineError:  # damaged, or of another version: none of ours to use
            continue
        yield from (
            (path, file.sha256)
            for file in known
            if file.size >= LARGE and (path := manifest.parent / file.path).is_file()
        )


def _replace(new: Path, other: Path) -> None:
    beside = new.with_name(f"{new.name}.link")
    try:
        os.link(other, beside)
    except OSError:  # no hard links there: two copies it is
        return
    beside.replace(new)
