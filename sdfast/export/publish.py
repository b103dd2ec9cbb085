"""Putting a finished directory in its place: whole or not at all, whatever happens in between.

An engine is built in a hidden directory beside its target, on the same disk; every file is flushed to the
disk; then one rename makes it visible. A lock keeps two exporters of one engine apart.
"""

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from sdfast.errors import ExportError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def locked(target: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `target`. Another export of it is waited for, which is said once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting(f"another export of {target} is running; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def clear_leftovers(target: Path) -> None:
    """Remove what a killed export of the same target left behind; to be called under its lock."""
    for left in target.parent.glob(f".{escape(target.name)}.part-*"):
        shutil.rmtree(left)


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty hidden directory beside `target`, gone afterwards unless it was published."""
    place = target.parent / f".{target.name}.part-{os.getpid()}"
    place.mkdir()
    try:
        yield place
    finally:
        if place.exists():
            shutil.rmtree(place)


def check_space(target: Path, needed: int) -> None:
    """Raises `ExportError` when the disk of `target` has less than `needed` bytes free."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ExportError(
            f"{target}: needs about {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB "
            "free; make room, or choose another directory with -o"
        )


def publish(place: Path, target: Path) -> None:
    """Make the finished directory `place` visible as `target`, in one step, in place of an older one."""
    for path in [*place.rglob("*"), place]:
        _flush(path)
    if target.exists():
        _exchange(place, target)  # `place` is now the older one, which the workplace removes
    else:
        place.rename(target)
    _flush(target.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content in one step."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    _flush(part)
    part.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories atomically, where the system can; else with a moment between two renames."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(first), os.fsencode(second)
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    aside = first.with_name(first.name + "-old")
    second.rename(aside)
    first.rename(second)
    aside.rename(first)
