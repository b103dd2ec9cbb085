"""Layers of a network on rounded numbers, of whichever kinds it has."""

from collections.abc import Sequence

from sdfast.models import fp8, int8
from sdfast.models.layers import N


def rounded(network: N, in_fp8: Sequence[str] = (), in_int8: Sequence[str] = ()) -> N:
    """Put the layers with these names into FP8, and those into INT8."""
    return int8.convert(fp8.convert(network, in_fp8), in_int8)
