"""FP8 on a GPU: cuBLAS's and CUTLASS's products, through PyTorch, and convolutions by an own kernel."""

from collections.abc import Callable

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


def gathering(kernel: Callable[..., Tensor]) -> ops.Convolution:
    """`ops.conv3x3_fp8` by a kernel on numbers that are rounded already, see `kernels.convolution_fp8`."""

    def convolution(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: list[int],
        size: list[int] | None,
    ) -> Tensor:
        pixels, pixel_scale = ops.quantised_rows(x.permute(0, 2, 3, 1))
        given = pixels.contiguous(), pixel_scale[..., 0].contiguous(), weight, scale, bias
        return kernel(*given, x.dtype, stride, padding, size).permute(0, 3, 1, 2)

    return convolution
