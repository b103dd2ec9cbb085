"""Which kernels were the fastest on this machine, remembered from export to export.

Measured again, a near tie may fall to the other side, and what is traced with another kernel is other code:
it would be compiled again, and the same engine exported twice would differ in its last bits. So what was
measured is kept in a file beside the compiled code. Who measures first has chosen, for all exports after.
"""

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from sdfast.backends.measured import Measured
from sdfast.errors import first_line

VERSION = 1


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    milliseconds: dict[str, float]
    rows: int
    refused: dict[str, str]


class _File(BaseModel):
    """choices: machine → what was measured → the outcome."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = VERSION
    choices: dict[str, dict[str, _Entry]] = {}


class Choices:
    """A `Memory` in the JSON file at `path`, for one machine.

    machine: all that the times depend on beside the shape: the device, and the versions of what computes.
    say: told of a file that cannot be read. What it held is measured again.
    """

    def __init__(self, path: Path, machine: str, say: Callable[[str], None]) -> None:
        self._path, self._machine, self._say = path, machine, say

    def recall(self, what: str, kinds: Collection[str]) -> Measured | None:
        return self._found(self._read(), what, kinds)

    def keep(self, what: str, measured: Measured, kinds: Collection[str]) -> Measured:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._path}.lock"):
            content = self._read()
            earlier = self._found(content, what, kinds)
            if earlier is not None:
                return earlier
            content.choices.setdefault(self._machine, {})[what] = _Entry(
                kind=measured.kind,
                milliseconds=dict(measured.milliseconds),
                rows=measured.rows,
                refused=dict(measured.refused),
            )
            self._write(content)
        return measured

    def _found(self, content: _File, what: str, kinds: Collection[str]) -> Measured | None:
        entry = content.choices.get(self._machine, {}).get(what)
        if entry is None or entry.kind not in kinds:
            return None
        return Measured(entry.kind, entry.milliseconds, entry.rows, entry.refused)

    def _read(self) -> _File:
        """What the file says; nothing where there is none, or one that is damaged or of another version."""
        try:
            content = _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _File()
        except (OSError, ValidationError) as error:
            self._say(f"{self._path} cannot be read ({first_line(error)}); kernels are measured again")
            return _File()
        if content.version != VERSION:
            self._say(f"{self._path} is of version {content.version}; kernels are measured again")
            return _File()
        return content

    def _write(self, content: _File) -> None:
        """All or nothing: whoever reads meets the old file or the new one."""
        place = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        text = json.dumps(content.model_dump(), indent=1, sort_keys=True)
        place.write_text(text, encoding="utf-8")
        place.replace(self._path)
