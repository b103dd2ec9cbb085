"""FP8 products on a GPU: cuBLAS's and CUTLASS's, through PyTorch."""

import torch
from torch import Tensor

from sdfast.models import ops


def scaled_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`ops.linear_fp8` by `torch._scaled_mm`: x row by row in memory, and the weight column by column.

    Sums are those of the tensor cores alone, of some 14 bits on Hopper: the numbers have 4.
    """
    rows, row_scale = ops.quantised_rows(x)
    y = torch._scaled_mm(
        rows.reshape(-1, x.shape[-1]).contiguous(),  # [M, I]
        weight.t(),  # [I, O]
        scale_a=row_scale.reshape(-1, 1),
        scale_b=scale[None],
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])
