"""What a result was measured on, and where it is kept."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sdfast.proc import bytes_of
from sdfast.versions import installed

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("sdfast", "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "onnx")


def describe() -> dict[str, Any]:
    """The machine and the versions."""
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": installed(PACKAGES),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def keep(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write a result, with the machine and the command that gave it, to `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        **result,
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def free_bytes() -> int | None:
    """Memory that programs can have without others losing theirs; None where Linux does not say."""
    return bytes_of("/proc/meminfo", "MemAvailable")


def instructions() -> str:
    """What instructions the processor has, on which it depends where a program compiled for it runs."""
    return _cpuinfo().get("flags") or platform.processor()


def _cpuinfo() -> dict[str, str]:
    """What Linux tells of the last processor; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in facts.items()}


def _processor() -> str:
    """The processor, with what of its vector instructions decides the speed."""
    facts = _cpuinfo()
    if not facts:
        return platform.processor()
    flags = facts.get("flags", "").split()
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    model = f"family {facts.get('cpu family')} model {facts.get('model')}"
    return f"{facts.get('model name', platform.machine())} ({model}; {', '.join(vectors)})"
