"""Prompts that are added up, as AUTOMATIC1111 reads them: `a castle :1.2 AND a full moon :0.6`.

The network is evaluated for each of them, and what each says beyond the negative prompt is added by its
weight, 1 where none is written:

    m = negative + guidance · Σ weight · (prompt − negative)

(Liu et al., "Compositional Visual Generation with Composable Diffusion Models", 2022, equation 11.)
A weight at the end of a prompt that stands alone counts, too, as there.
"""

import math
import re

from sdfast.errors import RequestError

MAX_PROMPTS = 8
"""So many prompts of a picture may be added up: each is a row of the U-Net in every step."""

_AND = re.compile(r"\bAND\b")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


def composed(prompt: str) -> list[tuple[str, float]]:
    """The prompts that a prompt consists of, each with its weight.

    Raises `RequestError` for more than `MAX_PROMPTS`, and a weight that is no number of float64.
    """
    parts = [_weighed(part) for part in _AND.split(prompt)]
    if len(parts) > MAX_PROMPTS:
        raise RequestError(f"prompt: AND joins {len(parts)} prompts; at most {MAX_PROMPTS} are added up")
    return parts


def _weighed(part: str) -> tuple[str, float]:
    text, colon, number = part.rstrip().rpartition(":")
    if not colon or not _NUMBER.fullmatch(number.lstrip()):
        return part, 1.0
    weight = float(number)
    if not math.isfinite(weight):
        raise RequestError(f"prompt: {number.strip():.20} is not a weight; give a number")
    return text.rstrip(), weight
