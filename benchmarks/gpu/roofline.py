"""What the device can do, measured: a large half-precision matrix product, and a large copy."""

import statistics
from typing import Any

import torch

from benchmarks.gpu.measure import burst

ROUNDS = 15


def measure(device: torch.device, gemm: int, copy_bytes: int) -> dict[str, Any]:
    """Operations a second of a [gemm, gemm] product in float16, bytes read and written a second of a copy."""
    product, copy = _product_seconds(device, gemm), _copy_seconds(device, copy_bytes)
    return {
        "gemm_side": gemm,
        "gemm_dtype": "float16",
        "gemm_seconds": product,
        "flops_per_second": 2 * gemm**3 / product,
        "copy_bytes": copy_bytes,
        "copy_seconds": copy,
        "bytes_per_second": 2 * copy_bytes / copy,
    }


def _product_seconds(device: torch.device, side: int) -> float:
    """Of random matrices: on zeros a GPU draws less power and runs faster than on any real data."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(a)
    return _median(lambda: torch.mm(a, b, out=out), device)


def _copy_seconds(device: torch.device, nbytes: int) -> float:
    source = torch.randint(0, 2**31 - 1, (nbytes // 4,), device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    return _median(lambda: target.copy_(source), device)


def _median(work: Any, device: torch.device) -> float:
    once = burst(work, device)
    once()
    return statistics.median(once() for _ in range(ROUNDS))
