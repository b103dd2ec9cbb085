"""The JSON document: every part's result, written as soon as it is there."""

import json
import math
import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sdfast
from benchmarks import machine
from sdfast.versions import code_digest, installed

PACKAGES = ("torch", "triton", "diffusers", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu")
# Of sdfast's code, what neither the speed of engines nor their pictures depend on.
_ASIDE = ("cli", "demo.py", "doctor.py", "infotext.py", "landscapes", "server", "validation")


class Document:
    """Finished parts by name. A part counts as finished for the key that it was measured under."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"parts": {}, "earlier": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.content["parts"]
        return found

    def head(self, fields: Mapping[str, Any]) -> None:
        """What stands above the parts; replaces what stood there."""
        kept = {name: self.content[name] for name in ("parts", "earlier")}
        self.content = {**fields, **kept}
        self._write()

    def set_aside(self, key: Mapping[str, Any]) -> None:
        """Move parts of other versions, another GPU or older code from "parts" to "earlier".

        A part whose own key has no "code" is of any.
        """
        now = _plain(key)
        for name, part in list(self.parts.items()):
            old = {field: part["key"].get(field) for field in now}
            if old != {**now, "code": now["code"] if old["code"] else None}:
                self.content["earlier"][name] = self.parts.pop(name)
        self._write()

    def foot(self, **fields: Any) -> None:
        """What stands below the parts."""
        self.content.update(fields)
        self._write()

    def finished(self, name: str, key: Mapping[str, Any], sides: Collection[str] = ()) -> bool:
        """Whether the part was measured under this key, and has a row that did not fail for each side."""
        part = self.parts.get(name)
        if part is None or part["key"] != _plain(key) or part["state"] == "failed":
            return False
        good = {row["side"] for row in part["result"].get("rows", []) if row["failed"] is None}
        return set(sides) <= good

    def result(self, name: str) -> dict[str, Any] | None:
        """What a part gave, if it did not fail."""
        part = self.parts.get(name)
        return part["result"] if part and part["state"] != "failed" else None

    def record(self, name: str, key: Mapping[str, Any], seconds: float, result: dict[str, Any]) -> None:
        """Keep a part's result; rows of sides that took no part this time stay as they were."""
        rows = result.get("rows")
        if rows is not None:
            result = {**result, "rows": self._older_rows(name, key, rows) + rows}
        failures = [row["failed"] for row in result.get("rows", []) if row["failed"] is not None]
        state = "partial" if failures else "done"
        self._put(name, key, seconds, state, result, failures[0] if failures else None)

    def fail(self, name: str, key: Mapping[str, Any], seconds: float, error: str) -> None:
        """Keep why a part gave no result."""
        self._put(name, key, seconds, "failed", None, error)

    def _older_rows(self, name: str, key: Mapping[str, Any], rows: list[Any]) -> list[Any]:
        old = self.parts.get(name)
        if old is None or old["key"] != _plain(key) or not old["result"]:
            return []
        new = {row["side"] for row in rows}
        return [row for row in old["result"]["rows"] if row["side"] not in new]

    def _put(
        self, name: str, key: Mapping[str, Any], seconds: float, state: str, result: Any, error: str | None
    ) -> None:
        self.parts[name] = _plain(
            {
                "key": key,
                "state": state,
                "error": error,
                "seconds": round(seconds, 2),
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "result": result,
            }
        )
        self._write()

    def _write(self) -> None:
        """All or nothing: whoever reads meets the old document or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        place = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        text = json.dumps(_plain(self.content), indent=1, ensure_ascii=False, allow_nan=False)
        with place.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        place.replace(self.path)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the GPU (None on a CPU)."""
    found = machine.describe()
    found["versions"] = {**installed(PACKAGES), "sdfast": sdfast.__version__, "cuda": torch.version.cuda}
    found["code"] = code_digest(beside=_ASIDE)[:12]
    found["gpu"] = None
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found["gpu"] = facts.name
        found["gpu_memory_gib"] = round(facts.total_memory / 2**30, 1)
        found["gpu_capability"] = f"{facts.major}.{facts.minor}"
        found["gpu_multiprocessors"] = facts.multi_processor_count
    return found


def one_line(error: BaseException) -> str:
    """An error for the document."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _plain(value: Any) -> Any:
    """As JSON gives it back; a number that JSON lacks ("nan", "inf") as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
