"""Compiled code that is kept for the next engine: another size, another checkpoint of the same networks.

An entry holds what compiling one form gave, under a key that is a digest of everything the code depends on.
Weights are none of that. Entries appear whole or not at all; one that was changed is thrown away.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from sdfast.engine import sha256
from sdfast.export.cache import cache_folder
from sdfast.export.sharing import link_or_copy

_DIGESTS = "digests.json"


class CodeStore:
    """A directory of entries, by default `code` in the cache of engines (`SDFAST_CACHE`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder() / "code"

    @property
    def choices(self) -> Path:
        """Where the choices of kernels lie that the code was compiled with."""
        return self._folder / "choices.json"

    def fill(self, key: str, targets: Mapping[str, Path], compile_now: Callable[[], None]) -> None:
        """Fill `targets` from the entry of that key, or by compiling, which makes the entry."""
        if not self.take(key, targets):
            compile_now()
            self.keep(key, targets)

    def take(self, key: str, targets: Mapping[str, Path]) -> bool:
        """Put the entry's files in their places, by name; False when there is no whole entry of that key."""
        entry = self._folder / key
        if not self._is_whole(entry, set(targets)):
            shutil.rmtree(entry, ignore_errors=True)
            return False
        for name, target in targets.items():
            link_or_copy(entry / name, target)
        return True

    def keep(self, key: str, files: Mapping[str, Path]) -> None:
        """Make an entry of these files. One that is there already is as good."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".new-") as place:
            made = Path(place) / "entry"
            made.mkdir()
            for name, file in files.items():
                shutil.copy2(file, made / name)
            digests = {name: sha256(made / name) for name in files}
            (made / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
            try:
                made.rename(self._folder / key)
            except OSError:
                if not (self._folder / key).is_dir():
                    raise

    def _is_whole(self, entry: Path, names: set[str]) -> bool:
        try:
            digests = json.loads((entry / _DIGESTS).read_bytes())
        except (OSError, ValueError):
            return False
        return set(digests) == names and all(
            (entry / name).is_file() and sha256(entry / name) == digest for name, digest in digests.items()
        )
