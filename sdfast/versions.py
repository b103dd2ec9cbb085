"""Which packages are installed, in which version, and which code sdfast itself is."""

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Package name → version, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_digest(*names: str, beside: tuple[str, ...] = ()) -> str:
    """A digest of sdfast's Python files, so that a change shows which the version does not tell.

    names: the folders and files of sdfast that count (default: all). beside: those that do not.
    """
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        first = path.relative_to(ROOT).parts[0]
        if (not names or first in names) and first not in beside:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
