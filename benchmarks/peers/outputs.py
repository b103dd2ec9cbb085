"""How far what the sides computed is from stock diffusers in float32: like is to be timed with like."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.task import ASKED

REFERENCE = "diffusers"


def distances(folder: Path, sides: Mapping[str, Collection[str]]) -> dict[str, dict[str, float]]:
    """side -> the relative L2 of each module's output, and the PSNR of the picture in dB.

    sides: side -> what it computed. The PSNR of equal pictures is infinite. Nothing where the reference is
    not among the sides.
    """
    if REFERENCE not in sides:
        return {}
    told: dict[str, dict[str, float]] = {side: {} for side in sides if side != REFERENCE}
    for measure in ASKED:
        reference = np.load(folder / REFERENCE / f"{measure}.npy")
        for side, figures in told.items():
            if measure not in sides[side]:
                continue
            output = np.load(folder / side / f"{measure}.npy")
            if output.shape != reference.shape:
                raise ValueError(f"{side}: {measure} is {output.shape}, not {reference.shape}")
            figures[measure] = (psnr if measure == "picture" else relative_l2)(output, reference)
    return told


def psnr(picture: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """dB, of pictures in [0, 1]."""
    error = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def relative_l2(output: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    difference = output.astype(np.float64) - reference
    return float(np.linalg.norm(difference.ravel()) / np.linalg.norm(reference.ravel().astype(np.float64)))
