"""Which rows of a run each of two networks does, where one begins a picture and another finishes it.

An ensemble of experts (Balaji et al. 2022, arXiv:2211.01324), as SDXL's base and its refiner: they meet at a
share of the denoising, which says a timestep. diffusers' SDXL pipelines count as here: `denoising_end` leaves
the timesteps from that one up, `denoising_start` takes those below it.
"""

import numpy as np
from numpy.typing import NDArray

from sdfast.errors import RequestError


def first_row(
    timesteps: NDArray[np.float64], denoising_start: float, train_timesteps: int, evaluations: int
) -> int:
    """The row with which a run that takes over at this share of the denoising begins.

    timesteps: [K] of the whole run. evaluations: of a step; no run begins in the middle of one.
    """
    rows = int((timesteps < _boundary(denoising_start, train_timesteps)).sum())
    if evaluations == 2 and rows % 2 == 0:
        rows += 1
    if not rows:
        raise _no_step("denoising_start", denoising_start, len(timesteps), "below")
    return len(timesteps) - rows


def rows_until(timesteps: NDArray[np.float64], denoising_end: float, train_timesteps: int) -> int:
    """How many of these rows [K] a run does that ends at this share of the denoising."""
    rows = int((timesteps >= _boundary(denoising_end, train_timesteps)).sum())
    if not rows:
        raise _no_step("denoising_end", denoising_end, len(timesteps), "at or above")
    return rows


def _boundary(share: float, train_timesteps: int) -> int:
    """The timestep at which the one leaves off and the other takes over."""
    return round(train_timesteps - share * train_timesteps)


def _no_step(name: str, share: float, rows: int, where: str) -> RequestError:
    return RequestError(
        f"{name}={share:g} leaves no step to do: none of {rows} timesteps lies {where} its own; take more "
        "steps, or another share"
    )
