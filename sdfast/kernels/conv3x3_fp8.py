"""3×3 convolutions of numbers in E4M3, as a matrix product that gathers its rows as it multiplies.

A row of the product is a pixel of the result, a column one of its channels; the sum goes over nine taps, and
over the channels of the pixel that each reads. Nothing is unfolded: a tile of pixels is read anew for each
tap, from the L2 cache mostly, a byte a number. A pixel of the padding is read as zeros. Where the convolution
reads an image that is enlarged twice, the small image is what is read, at half of each coordinate.

The definition is `ops.conv3x3_fp8`, of which the rounding is left to the compiler: it joins what computes
the input. Each pixel has a scale of its own, and nine pixels enter a sum: what the tensor cores have summed
of one tap is multiplied by the scale of the pixel that it read, and added in float32. So their accumulators,
of some 14 bits on Hopper, never hold more than a tap.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

GROUPED_ROWS = 8  # row tiles that walk the columns together, so that a weight tile is read while it is in L2
CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 128, 128, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 64, 128, 4, 3),
        (128, 64, 64, 4, 4),
        (64, 128, 128, 4, 3),
        (64, 64, 128, 4, 4),
        (64, 32, 128, 4, 4),
    )
]


@triton.jit
def conv3x3_fp8_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    H_read: tl.tensor,
    W_read: tl.tensor,
    h: tl.tensor,
    w: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    STRIDE: tl.constexpr,
    BEFORE: tl.constexpr,
    TWICE: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """x [B, h, w, I] and its scale [B, h, w], weight [O, 9, I], scale and bias [O] -> y [B, H, W, O].

    M: B * H * W. TWICE: x is read as if enlarged to H_read * W_read. Grid: tiles of M * O.
    """
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_N)
    program = tl.program_id(0)
    band = program // (GROUP_M * across)
    height = tl.minimum(down - band * GROUP_M, GROUP_M)
    within = program % (GROUP_M * across)
    rows = (band * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)

    # What lies beyond the edges of the result is read from elsewhere in the tensors, and not written.
    pixel = rows % M
    first_line = (pixel // W) % H * STRIDE - BEFORE
    first_column = pixel % W * STRIDE - BEFORE
    image = pixel // (H * W) * h
    depth = tl.arange(0, BLOCK_K)
    taps = weight + (columns % O)[None, :] * (9 * I) + depth[:, None]

    # One loop over taps and channels, for the next tap's first tiles are fetched while this one is summed.
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    BLOCKS: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    for step in range(9 * BLOCKS):
        tap, first = step // BLOCKS, step % BLOCKS * BLOCK_K
        line, column = first_line + tap // 3, first_column + tap % 3
        inside = (line >= 0) & (line < H_read) & (column >= 0) & (column < W_read)
        if TWICE:
            line, column = line >> 1, column >> 1
        place = (image + line) * w + column
        tile = x + place.to(tl.int64)[:, None] * I + (first + depth)[None, :]
        if I % BLOCK_K == 0:
            a = tl.load(tile, mask=inside[:, None], other=0.0)
            b = tl.load(taps + (tap * I + first))
        else:
            own = first + depth < I
            a = tl.load(tile, mask=inside[:, None] & own[None, :], other=0.0)
            b = tl.load(taps + (tap * I + first), mask=own[:, None], other=0.0)
        part = tl.dot(a, b, part)
        if first + BLOCK_K >= I:
            total += part * tl.load(x_scale + place, mask=inside, other=0.0)[:, None]
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    own = columns < O
    total *= tl.load(scale + columns, mask=own, other=0.0)[None, :]
    if BIASED:
        total += tl.load(bias + columns, mask=own, other=0.0).to(tl.float32)[None, :]
    out = y + rows.to(tl.int64)[:, None] * O + columns[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(rows < M)[:, None] & own[None, :])


kernel = triton.autotune(CONFIGS, key=["M", "O", "I", "STRIDE", "TWICE"])(conv3x3_fp8_kernel)


@triton_op("sdfast_triton::conv3x3_fp8", mutates_args={})
def conv3x3_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    stride: int,
    padding: Sequence[int],
    size: Sequence[int] | None,
) -> Tensor:
    """x [B, h, w, I] float8 and its scale [B, h, w], weight [O, 9, I] float8 and its scale [O], bias [O]
    -> [B, H, W, O] of `dtype`.

    stride, padding, size: as of `ops.conv3x3_fp8`. The tile sizes are the fastest ones for the shape, tried
    out at the first call or, in a compiled package, at its export; other tiles may round differently on the
    way, see `linear_geglu`. Raises ValueError when the tensors do not fit.
    """
    _check(x, x_scale, weight, scale, bias, size)
    batch, height, width, inputs = x.shape
    outputs = weight.shape[0]
    seen = (height, width) if size is None else (size[0], size[1])
    lines, columns = ((side + sum(padding) - 3) // stride + 1 for side in seen)
    pixels = batch * lines * columns
    y = torch.empty([batch, lines, columns, outputs], dtype=dtype, device=x.device)

    def grid(config: dict[str, int]) -> tuple[int]:
        return (-(-pixels // config["BLOCK_M"]) * -(-outputs // config["BLOCK_N"]),)

    wrap_triton(kernel)[grid](
        x,
        x_scale,
        weight,
        scale,
        scale if bias is None else bias,
        y,
        pixels,
        lines,
        columns,
        *seen,
        height,
        width,
        outputs,
        I=inputs,
        STRIDE=stride,
        BEFORE=padding[0],
        TWICE=size is not None,
        BIASED=bias is not None,
        GROUP_M=GROUPED_ROWS,
    )
    return y


def _check(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    size: Sequence[int] | None,
) -> None:
    if weight.ndim != 3 or weight.shape[1:] != (9, x.shape[-1]):
        raise ValueError(f"weight must be [O, 9, {x.shape[-1]}], not {list(weight.shape)}")
    if x_scale.shape != x.shape[:-1]:
        raise ValueError(f"the scale of x must be {list(x.shape[:-1])}, not {list(x_scale.shape)}")
    for name, values in (("scale", scale), ("bias", bias)):
        if values is not None and values.shape != weight.shape[:1]:
            raise ValueError(f"{name} must be [{weight.shape[0]}], not {list(values.shape)}")
    if not all(t is None or t.is_contiguous() for t in (x, x_scale, weight, scale, bias)):
        raise ValueError("all tensors must be contiguous: call .contiguous() before")
    for name, numbers in (("x", x), ("weight", weight)):
        if numbers.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} must be float8_e4m3fn, not {numbers.dtype}")
    if size is not None and any((n + 1) // 2 != own for n, own in zip(size, x.shape[1:3], strict=True)):
        raise ValueError(f"x of {list(x.shape[1:3])} pixels is not enlarged twice to {list(size)}")
