"""Random embeddings for tiny checkpoints, in every form that their files have."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTHS = {"clip_l": 32, "clip_g": 48}  # of the tiny checkpoints' text encoders


def vectors(count: int, width: int = 32, *, seed: int = 0) -> Tensor:
    """[count, width], of the size that real ones have beside a table's rows: larger."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.5


def automatic1111(path: Path, count: int, *, seed: int = 0) -> Path:
    """Its own name is the token."""
    save_file({"emb_params": vectors(count, seed=seed)}, path)
    return path


def diffusers(path: Path, token: str, count: int, *, seed: int = 0) -> Path:
    """One vector has no axis for their number, as diffusers' training script saves it."""
    found = vectors(count, seed=seed)
    save_file({token: found[0] if count == 1 else found}, path)
    return path


def for_sdxl(path: Path, count: int, *, seed: int = 0) -> Path:
    save_file({name: vectors(count, width, seed=seed) for name, width in WIDTHS.items()}, path)
    return path


def for_family(family: str, path: Path, count: int, *, seed: int = 0) -> Path:
    return (for_sdxl if family == "sdxl" else automatic1111)(path, count, seed=seed)
