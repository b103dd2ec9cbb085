"""What one engine leaves to another that goes on with its pictures, as bytes: latents and generators' states.

Engines live in processes of their own, so this is all that crosses from the one to the other.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdfast.errors import RequestError

STATE = 5056  # bytes of the state of a generator on the CPU


def packed(latents: Tensor, source: torch.Generator) -> bytes:
    """One picture's latents [C, h, w] float32, and the generator that goes on with its noise."""
    return latents.cpu().numpy().tobytes() + source.get_state().numpy().tobytes()


def check_handed(handed: bytes, count: int, shape: Sequence[int]) -> None:
    """Raises `RequestError` unless the bytes are as many as those of so many pictures' latents."""
    due = count * (4 * math.prod(shape) + STATE)
    if len(handed) != due:
        raise RequestError(
            f"refiner: {len(handed)} bytes of latents were handed over, but {due} are needed; both engines "
            "must have latents of one shape"
        )


def unpacked(handed: bytes, count: int, shape: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """The latents [count, C, h, w] of pictures, and the generator of each."""
    numbers, each = 4 * math.prod(shape), len(handed) // count
    latents, sources = [], []
    for i in range(count):
        part = bytearray(handed[i * each : (i + 1) * each])
        latents.append(torch.frombuffer(part[:numbers], dtype=torch.float32).reshape(*shape))
        source = torch.Generator()
        source.set_state(torch.frombuffer(part[numbers:], dtype=torch.uint8))
        sources.append(source)
    return torch.stack(latents), sources
