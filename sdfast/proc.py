"""What Linux tells of memory under /proc. Standard library alone: peers' environments read it."""

from pathlib import Path


def bytes_of(path: str, name: str) -> int | None:
    """The line `NAME: … kB` of a file such as "/proc/meminfo", in bytes; None where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
