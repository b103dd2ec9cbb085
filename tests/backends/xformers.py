"""A stand-in for xFormers, which needs a GPU: the signature and layout of its function, and the formula."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """query [B, M, H, K], key and value [B, N, H, K] -> [B, M, H, K]."""
    if attn_bias is not None or p or op is not None or output_dtype is not None:
        raise NotImplementedError("not in this stand-in")
    if {query.ndim, key.ndim, value.ndim} != {4} or key.shape != value.shape:
        raise ValueError("query, key and value are [B, M, H, K]")
    if query.shape[2:] != key.shape[2:] or query.shape[0] != key.shape[0]:
        raise ValueError(f"query {tuple(query.shape)} does not go with key {tuple(key.shape)}")
    scores = torch.einsum("bmhk,bnhk->bhmn", query, key) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), value).contiguous()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import xformers.ops` find the stand-in."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import xformers.ops` fail as where it is not installed."""
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
