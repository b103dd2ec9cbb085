"""The linear layer of a feed-forward with its GEGLU: y = (x Wv + bv) * GELU(x Wg + bg), written once.

A matrix product of its own and a GEGLU after it write [M, 2 F] and read it again: for Stable Diffusion 1.5 at
512 x 512, two pictures with guidance, that is 168 MB for each of the widest layers, against 42 MB of result.
Here a program computes one tile of both halves from the same tile of x, and only their product leaves it.

The definition is `ops.geglu(ops.linear(x, weight, bias))`. Sums are in float32, and so is everything up to
the rounding of the result; the definition rounds the halves to the dtype of x in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

DEPTH = 64  # every BLOCK_K divides it
GROUPED_ROWS = 8  # row tiles that walk the columns together, so that a weight tile is read while it is in L2
HALF_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 3),
        (128, 64, 32, 4, 4),
        (64, 128, 64, 8, 3),
        (64, 64, 64, 4, 4),
        (64, 32, 64, 4, 4),
    )
]
"""For float16 and bfloat16 on tensor cores. A tile of N columns is 2 N of the weight."""
FULL_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in ((64, 32, 32, 4, 3), (64, 64, 16, 8, 3), (32, 32, 32, 4, 3))
]
"""For float32 without tensor cores, which would round x to ten bits of mantissa."""


@triton.jit
def linear_geglu_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    I: tl.tensor,  # noqa: E741
    F: tl.tensor,
    EVEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """x [M, I], weight [2 F, I], bias [2 F] -> y [M, F]. EVEN: I is full of BLOCK_K. Grid: tiles of M * F."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_N)
    program = tl.program_id(0)
    band = program // (GROUP_M * across)
    height = tl.minimum(down - band * GROUP_M, GROUP_M)
    within = program % (GROUP_M * across)
    rows = (band * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)

    # What lies beyond the edges is read from elsewhere in the tensors, and not written.
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + (rows % M).to(tl.int64)[:, None] * I + depth[None, :]
    value_tile = weight + (columns % F)[None, :] * I + depth[:, None]
    gate_tile = value_tile + F * I
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, I, BLOCK_K):
        if EVEN:
            a = tl.load(x_tile)
            b = tl.load(value_tile)
            c = tl.load(gate_tile)
        else:
            inside = first + depth < I
            a = tl.load(x_tile, mask=inside[None, :], other=0.0)
            b = tl.load(value_tile, mask=inside[:, None], other=0.0)
            c = tl.load(gate_tile, mask=inside[:, None], other=0.0)
        value = tl.dot(a, b, value, input_precision="ieee")
        gate = tl.dot(a, c, gate, input_precision="ieee")
        x_tile += BLOCK_K
        value_tile += BLOCK_K
        gate_tile += BLOCK_K

    own = columns < F
    value += tl.load(bias + columns, mask=own, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + F + columns, mask=own, other=0.0).to(tl.float32)[None, :]
    value *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    out = y + rows.to(tl.int64)[:, None] * F + columns[None, :]
    tl.store(out, value.to(y.dtype.element_ty), mask=(rows < M)[:, None] & own[None, :])


half_kernel = triton.autotune(HALF_CONFIGS, key=["M", "I", "F"])(linear_geglu_kernel)
full_kernel = triton.autotune(FULL_CONFIGS, key=["M", "I", "F"])(linear_geglu_kernel)


@triton_op("sdfast_triton::linear_geglu", mutates_args={})
def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., I], weight [2 F, I], bias [2 F], all of one dtype -> [..., F].

    The tile sizes are the fastest ones for (M, I, F), tried out at the first call or, in a compiled package,
    at its export. A row is always added up from the first column of x to the last, but other tiles may make
    the hardware round differently on the way: a row's result may differ in its last bit between numbers of
    rows that were tuned apart, and between two exports of the same engine. Within one of them it does not.
    Raises ValueError when the tensors do not fit.
    """
    _check(x, weight, bias)
    width, features = x.shape[-1], weight.shape[0] // 2
    rows = x.reshape(-1, width).contiguous()
    count = rows.shape[0]
    y = torch.empty([count, features], dtype=x.dtype, device=x.device)

    def grid(config: dict[str, int]) -> tuple[int]:
        down, across = -(-count // config["BLOCK_M"]), -(-features // config["BLOCK_N"])
        return (down * across,)

    even = width % DEPTH == 0
    if x.dtype == torch.float32:
        wrap_triton(full_kernel)[grid](
            rows, weight, bias, y, count, width, features, EVEN=even, GROUP_M=GROUPED_ROWS
        )
    else:
        wrap_triton(half_kernel)[grid](
            rows, weight, bias, y, count, width, features, EVEN=even, GROUP_M=GROUPED_ROWS
        )
    return y.view(*x.shape[:-1], features)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [2 F, {x.shape[-1]}], not {list(weight.shape)}")
    if bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], not {list(bias.shape)}")
    if not weight.is_contiguous() or not bias.is_contiguous():
        raise ValueError("weight and bias must be contiguous: call .contiguous() before")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x must be float16, bfloat16 or float32, not {x.dtype}")
    if weight.dtype != x.dtype or bias.dtype != x.dtype:
        raise ValueError(f"x, weight and bias are {x.dtype}, {weight.dtype} and {bias.dtype}: make them one")
