"""Kernels of our own for NVIDIA GPUs of compute capability 8.0 and up, written in Triton.

Each computes what a definition in `models/ops.py` or `arithmetic/device.py` says, and is there because it
reads and writes less. Importing this package loads no Triton; a kernel's module does: ask `why_none` first.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # the loop imports this package, and needs no networks
    from sdfast.models.ops import GroupNormKernel, LinearGeGLU

LEAST = (8, 0)  # compute capability: from there on, tensor cores take bfloat16 and copies run asynchronously


def why_none(device: torch.device) -> str:
    """Why these kernels cannot run on the device, or "" when they can."""
    if device.type != "cuda":
        return f"they run on NVIDIA GPUs, not on the device {str(device)!r}"
    if torch.version.hip is not None:
        return f"they are for NVIDIA GPUs, and this PyTorch is built for ROCm {torch.version.hip}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"the package triton cannot be imported ({error}); install it with: pip install triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        has, needs = (".".join(map(str, pair)) for pair in (capability, LEAST))
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {has}, and they need {needs}"
    return ""


def group_norms() -> "Mapping[str, GroupNormKernel]":
    """The group norms by name. x and the result are channels-last. Raises ImportError without Triton."""
    from sdfast.kernels.group_norm import group_norm_parts, group_norm_whole

    return {"triton whole": group_norm_whole, "triton parts": group_norm_parts}


def linear_geglus() -> "Mapping[str, LinearGeGLU]":
    """The linear layers that end in GEGLU, by name. Raises ImportError without Triton."""
    from sdfast.kernels.geglu import linear_geglu

    return {"triton": linear_geglu}


def convolution_fp8() -> "Callable[..., torch.Tensor]":
    """3×3 convolutions of numbers rounded to E4M3, for compute capability 8.9 and up.

    Raises ImportError without Triton.
    """
    from sdfast.kernels.conv3x3_fp8 import conv3x3_fp8

    kernel: Callable[..., torch.Tensor] = conv3x3_fp8
    return kernel
