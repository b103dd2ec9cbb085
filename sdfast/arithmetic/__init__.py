"""The arithmetic of a tick around the U-Net: guidance, the step's matrix, the next sample.

    m         = negative + guidance · (positive − negative) + Σ weight · (further − negative)
    registers = matrix[k] @ [registers; m; z]                   register 0 is the latents
    sample    = latents · input_scale[k + 1]

A row that keeps a part of an image has that put back between the two:

    latents   = drawn anew ? latents : a · image + b · noise    a, b = noising[k + 1]

Two ways to the same numbers. `device.py` keeps everything on the device, step indices and noise included:
rows of different schedules and lengths are one batch of tensor operations, the host waits for nothing, and a
CUDA graph holds them. `host.py` is for the processor. There the operations around a small network cost by
their number, and torch's cost some twenty times what they take alone once the network has swept the caches:
it goes row by row in numpy, which takes a third of that.

`fused.py` is `device.py` in two kernels of our own, on NVIDIA GPUs. Nobody has measured it yet, so nothing
chooses it: give it to `Rows` by name.
"""

import torch

from sdfast.arithmetic.device import DeviceArithmetic, rescale_guidance
from sdfast.arithmetic.fused import FusedArithmetic
from sdfast.arithmetic.host import HostArithmetic
from sdfast.arithmetic.plan import Arithmetic, Buffers, Capacity, Keep, Noise, Plan, Weight

__all__ = [
    "Arithmetic",
    "Buffers",
    "Capacity",
    "DeviceArithmetic",
    "FusedArithmetic",
    "HostArithmetic",
    "Keep",
    "Noise",
    "Plan",
    "Weight",
    "arithmetic_for",
    "rescale_guidance",
]


def arithmetic_for(device: torch.device) -> type[HostArithmetic] | type[DeviceArithmetic]:
    """The faster way on this device."""
    return HostArithmetic if device.type == "cpu" else DeviceArithmetic
