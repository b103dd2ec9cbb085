"""How much memory an engine has taken."""

import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


def memory_of(device: torch.device) -> dict[str, int]:
    """Bytes by kind: "allocated" and "reserved" of a CUDA device, else "resident" of the process (Linux)."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
        }
    if not _STATM.exists():
        return {}
    return {"resident": int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
