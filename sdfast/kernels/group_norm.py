"""Group normalisation of channels-last images, with the shift before it and the SiLU after it.

A channels-last [B, C, H, W] lies in memory as [B, P, C], with P = H * W pixels. The definition is
`ops.group_norm` and its two relatives. Two ways to it:

whole: one launch, a program for each picture and group. It reads its part of the image twice, the second time
    from the L2 cache. A group is a few neighbouring channels of every pixel, so that a program reads short
    pieces; and there are only B * groups of them. Good for small images.
parts: three launches over tiles of pixels and channels that know nothing of groups, so that everything is
    read and written in whole cache lines, by as many programs as the image is large.
    1. the moments of every channel in every chunk of pixels; 2. those merged into the moments of the groups,
    as a centre and a scale for every channel; 3. both applied.

Moments are a mean and a sum of squared deviations from it, in float32. Each lane of a program updates its own
by Welford's step, and they are merged by Chan's formula (Chan, Golub & LeVeque 1983). Nothing is ever
subtracted from a sum of squares, so a large mean costs no digits; and the order of the additions depends on
P, C and the number of groups alone: neither on the other pictures of the batch nor on the run.

The shift is the same for all pixels: it moves a channel's mean, and is added there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

WHOLE_TILE = 4096  # numbers that a program of `whole` holds at a time
PARTS_PIXELS, PARTS_CHANNELS = 64, 64  # a tile of `parts`
MERGED = 2048  # moments that a program of `parts` merges at a time
WARPS = 8


def chunk_pixels(channels: int) -> int:
    """How many pixels a chunk of `parts` has.

    The wide layers of a U-Net are small images: short chunks make enough programs. The narrow layers of a VAE
    are large ones: long chunks keep the moments few. The image's size has no say, for it may be symbolic.
    """
    return 1024 if channels <= 256 else 128


@triton.jit
def _welford(
    mean: tl.tensor, squares: tl.tensor, values: tl.tensor, inside: tl.tensor, share: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Takes one more value into the moments of each lane. share: 1 / how many it has then."""
    difference = tl.where(inside, values - mean, 0.0)
    mean += difference * share
    squares += difference * (values - mean)
    return mean, squares


@triton.jit
def _silu(y: tl.tensor) -> tl.tensor:
    return y / (1.0 + tl.exp(-y))


@triton.jit
def group_norm_whole_kernel(
    x: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    P: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    D: tl.constexpr,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """x, y [B, P, C]; shift [B, C], if SHIFTED; D channels a group. Grid: groups, B."""
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixels = tl.arange(0, BLOCK_P)[:, None]
    channels = tl.arange(0, BLOCK_D)[None, :]
    own = channels < D
    offsets = pixels * C + channels
    start = picture * P * C + group * D

    mean = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    tile, count = x + start, 0.0
    for first in range(0, P, BLOCK_P):
        inside = own & (first + pixels < P)
        values = tl.load(tile + offsets, mask=inside, other=0.0).to(tl.float32)
        count += 1.0
        mean, squares = _welford(mean, squares, values, inside, 1.0 / count)
        tile += BLOCK_P * C

    counts = tl.where(own, (P - pixels + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)
    numbers = 1.0 * P * D
    if SHIFTED:
        shifts = tl.load(shift + picture * shift_stride + group * D + channels, mask=own, other=0.0).to(
            tl.float32
        )
        mean += shifts
    centre = tl.sum(tl.sum(mean * counts, 1), 0) / numbers
    away = mean - centre
    variance = tl.sum(tl.sum(squares + counts * away * away, 1), 0) / numbers
    scales = tl.rsqrt(variance + eps) * tl.load(weight + group * D + channels, mask=own, other=0.0).to(
        tl.float32
    )
    biases = tl.load(bias + group * D + channels, mask=own, other=0.0).to(tl.float32)
    centres = tl.zeros([1, BLOCK_D], tl.float32) + centre
    if SHIFTED:
        centres -= shifts

    tile, out = x + start, y + start
    for first in range(0, P, BLOCK_P):
        inside = own & (first + pixels < P)
        values = tl.load(tile + offsets, mask=inside, other=0.0).to(tl.float32)
        values = (values - centres) * scales + biases
        if SILU:
            values = _silu(values)
        tl.store(out + offsets, values.to(y.dtype.element_ty), mask=inside)
        tile += BLOCK_P * C
        out += BLOCK_P * C


@triton.jit
def group_norm_moments_kernel(
    x: tl.tensor,
    moments: tl.tensor,
    P: tl.tensor,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """x [B, P, C] -> moments [B, chunks, 2, C] float32: mean and squares. Grid: chunks, tiles of C, B."""
    chunk, picture = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pixels = tl.arange(0, BLOCK_P)[:, None]
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = channels < C
    offsets = pixels * C + channels[None, :]
    present = tl.minimum(P - chunk * CHUNK, CHUNK)  # pixels of this chunk

    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    tile, count = x + (picture * P + chunk * CHUNK) * C, 0.0
    for first in range(0, CHUNK, BLOCK_P):
        inside = own[None, :] & (first + pixels < present)
        values = tl.load(tile + offsets, mask=inside, other=0.0).to(tl.float32)
        count += 1.0
        mean, squares = _welford(mean, squares, values, inside, 1.0 / count)
        tile += BLOCK_P * C

    counts = tl.maximum((present - pixels + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)
    centre = tl.sum(mean * counts, 0) / present
    away = mean - centre[None, :]
    out = moments + (picture * tl.num_programs(0) + chunk) * 2 * C + channels
    tl.store(out, centre, mask=own)
    tl.store(out + C, tl.sum(squares + counts * away * away, 0), mask=own)


@triton.jit
def group_norm_merge_kernel(
    moments: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    applied: tl.tensor,
    P: tl.tensor,
    chunks: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    D: tl.constexpr,
    SHIFTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """moments [B, chunks, 2, C] -> applied [B, 2, C] float32: centre and scale. Grid: groups, B."""
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BLOCK_K)[:, None]
    channels = group * D + tl.arange(0, BLOCK_D)[None, :]
    own = tl.arange(0, BLOCK_D)[None, :] < D
    offsets = rows * 2 * C + channels
    numbers = 1.0 * P * D
    shifts = tl.zeros([1, BLOCK_D], tl.float32)
    if SHIFTED:
        shifts = tl.load(shift + picture * shift_stride + channels, mask=own, other=0.0).to(tl.float32)

    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    tile = moments + picture * chunks * 2 * C
    for first in range(0, chunks, BLOCK_K):
        inside = own & (first + rows < chunks)
        counts = tl.minimum(P - (first + rows) * CHUNK, CHUNK).to(tl.float32)
        means = tl.load(tile + offsets, mask=inside, other=0.0)
        total += tl.where(inside, counts * (means + shifts), 0.0)
        tile += BLOCK_K * 2 * C
    centre = tl.sum(tl.sum(total, 1), 0) / numbers

    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    tile = moments + picture * chunks * 2 * C
    for first in range(0, chunks, BLOCK_K):
        inside = own & (first + rows < chunks)
        counts = tl.minimum(P - (first + rows) * CHUNK, CHUNK).to(tl.float32)
        away = tl.load(tile + offsets, mask=inside, other=0.0) + shifts - centre
        squares = tl.load(tile + offsets + C, mask=inside, other=0.0)
        total += tl.where(inside, squares + counts * away * away, 0.0)
        tile += BLOCK_K * 2 * C
    variance = tl.sum(tl.sum(total, 1), 0) / numbers

    scales = tl.rsqrt(variance + eps) * tl.load(weight + channels, mask=own, other=0.0).to(tl.float32)
    out = applied + picture * 2 * C + channels
    tl.store(out, centre - shifts, mask=own)
    tl.store(out + C, scales, mask=own)


@triton.jit
def group_norm_apply_kernel(
    x: tl.tensor,
    applied: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    P: tl.tensor,
    C: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """y = (x - centre) * scale + bias, in [B, P, C]. Grid: tiles of P, tiles of C, B."""
    first, picture = tl.program_id(0) * BLOCK_P, tl.program_id(2).to(tl.int64)
    pixels = tl.arange(0, BLOCK_P)[:, None]
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    own = channels < C
    start = (picture * P + first) * C
    inside = own & (first + pixels < P)
    centres = tl.load(applied + picture * 2 * C + channels, mask=own, other=0.0)
    scales = tl.load(applied + picture * 2 * C + C + channels, mask=own, other=0.0)
    biases = tl.load(bias + channels, mask=own, other=0.0).to(tl.float32)
    values = tl.load(x + start + (pixels * C + channels), mask=inside, other=0.0).to(tl.float32)
    values = (values - centres) * scales + biases
    if SILU:
        values = _silu(values)
    tl.store(y + start + (pixels * C + channels), values.to(y.dtype.element_ty), mask=inside)


@triton_op("sdfast_triton::group_norm_whole", mutates_args={})
def group_norm_whole(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """x [B, C, H, W] channels-last, shift [B, C] or None, weight and bias [C] -> as x, in one launch.

    Raises ValueError when x lies differently, or the shapes do not fit.
    """
    _check(x, shift, weight, bias, groups)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    each = channels // groups
    block = triton.next_power_of_2(each)
    wrap_triton(group_norm_whole_kernel)[(groups, batch)](
        x,
        weight if shift is None else shift,
        weight,
        bias,
        y,
        height * width,
        0 if shift is None else shift.stride(0),
        eps,
        C=channels,
        D=each,
        SHIFTED=shift is not None,
        SILU=silu,
        BLOCK_P=max(1, WHOLE_TILE // block),
        BLOCK_D=block,
        num_warps=WARPS,
    )
    return y


@triton_op("sdfast_triton::group_norm_parts", mutates_args={})
def group_norm_parts(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """x [B, C, H, W] channels-last, shift [B, C] or None, weight and bias [C] -> as x, in three launches.

    Raises ValueError when x lies differently, or the shapes do not fit.
    """
    _check(x, shift, weight, bias, groups)
    batch, channels, height, width = x.shape
    pixels, chunk, each = height * width, chunk_pixels(channels), channels // groups
    chunks, tiles = -(-pixels // chunk), -(-channels // PARTS_CHANNELS)
    moments = torch.empty([batch, chunks, 2, channels], dtype=torch.float32, device=x.device)
    wrap_triton(group_norm_moments_kernel)[(chunks, tiles, batch)](
        x,
        moments,
        pixels,
        C=channels,
        CHUNK=chunk,
        BLOCK_P=PARTS_PIXELS,
        BLOCK_C=PARTS_CHANNELS,
        num_warps=WARPS,
    )
    applied = torch.empty([batch, 2, channels], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(each)
    wrap_triton(group_norm_merge_kernel)[(groups, batch)](
        moments,
        weight if shift is None else shift,
        weight,
        applied,
        pixels,
        chunks,
        0 if shift is None else shift.stride(0),
        eps,
        C=channels,
        D=each,
        SHIFTED=shift is not None,
        CHUNK=chunk,
        BLOCK_K=max(1, MERGED // block),
        BLOCK_D=block,
        num_warps=WARPS,
    )
    y = torch.empty_like(x, memory_format=torch.channels_last)
    wrap_triton(group_norm_apply_kernel)[(-(-pixels // PARTS_PIXELS), tiles, batch)](
        x,
        applied,
        bias,
        y,
        pixels,
        C=channels,
        SILU=silu,
        BLOCK_P=PARTS_PIXELS,
        BLOCK_C=PARTS_CHANNELS,
        num_warps=WARPS,
    )
    return y


def _check(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int) -> None:
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"x must be [B, C, H, W] and channels-last, not {list(x.shape)} with strides {list(x.stride())}: "
            "call x.contiguous(memory_format=torch.channels_last) before"
        )
    channels = x.shape[1]
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
    for name, values in (("weight", weight), ("bias", bias)):
        if values.shape != (channels,) or not values.is_contiguous():
            raise ValueError(f"{name} must be [{channels}] and contiguous, not {list(values.shape)}")
    if shift is not None and (shift.shape != (x.shape[0], channels) or shift.stride(1) != 1):
        raise ValueError(
            f"shift must be {[x.shape[0], channels]} with contiguous rows, not {list(shift.shape)}"
        )
