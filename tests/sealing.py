"""Changing an engine and sealing it again: what an attacker can do that accidental damage cannot."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Document = dict[str, Any]


def seal(document: Document) -> Document:
    """The document with the seal that belongs to it."""
    rest = {key: value for key, value in document.items() if key != "seal"}
    return {**rest, "seal": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def reseal(engine: Path, change: Callable[[Document], object]) -> None:
    """Change the manifest, and make every file's size and digest, and the seal, what they now are."""
    path = engine / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    change(document)
    for file in document.get("files", ()):
        target = engine / file["path"]
        if target.is_file():
            content = target.read_bytes()
            file["size"], file["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(seal(document)), "utf-8")
