"""What `DeviceArithmetic.advance` does, in two launches in place of some ten.

The first takes every row from its step to the next: guidance, the step's matrix, what is put back of an
image, the next sample. The second moves the rows' lines on and fetches the time shifts of the step after.

Every number of the latents goes its own way: its registers are read once, and written once. What differs from
row to row is looked up by the line that the row stands on, so that nothing is asked of the host. Lines are
read by many programs of a launch and so cannot be moved in it: the first launch writes them moved into a
second tensor, and the second launch writes them back.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 256  # of the latents, that a program of the first launch takes
COPIED = 4096  # numbers of a time shift, that a program of the second takes
ROW_WARPS = 2  # four numbers a thread: a number's registers are all in one thread, and nothing is exchanged
COPY_WARPS = 4


@dataclass(frozen=True)
class Tables:
    """The tensors of a `DeviceArithmetic`, all contiguous, for n rows of N numbers in U-Net calls of B rows.

    state [n, R + 2, N]: registers, the guided output, the noise. matrices [lines, R + 1, R + 2].
    guidance [guided]. lines, stride [n + B] int64: where each row stands in the tables, then each of the
    U-Net's in the time shifts; and by how much they move. idle [n] bool.
    noise [lines of noise, N], None where no row draws; noise_lines [lines] int64: which of them a step draws.
    kept [n, N] bool, None where no row keeps a part of an image; image, image_noise [n, N]; keeping
    [lines, 3].
    output [B, C, h, w], sample [B, C or more, h, w], time_shift [B, T], time_shifts [lines, T]: the U-Net's.
    All are float32 where nothing else is said; those of the U-Net have the engine's dtype.
    """

    state: Tensor
    matrices: Tensor
    guidance: Tensor
    lines: Tensor
    stride: Tensor
    idle: Tensor
    noise: Tensor | None
    noise_lines: Tensor
    kept: Tensor | None
    image: Tensor
    image_noise: Tensor
    keeping: Tensor
    output: Tensor
    sample: Tensor
    time_shift: Tensor
    time_shifts: Tensor


@triton.jit
def advance_rows_kernel(
    state: tl.tensor,
    matrices: tl.tensor,
    guidance: tl.tensor,
    lines: tl.tensor,
    stride: tl.tensor,
    moved: tl.tensor,
    idle: tl.tensor,
    noise: tl.tensor,
    noise_lines: tl.tensor,
    kept: tl.tensor,
    image: tl.tensor,
    image_noise: tl.tensor,
    keeping: tl.tensor,
    output: tl.tensor,
    sample: tl.tensor,
    N: tl.tensor,
    sample_stride: tl.tensor,
    guided: tl.tensor,
    all_lines: tl.tensor,
    R: tl.constexpr,
    DRAWS: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid: tiles of N, n. The layouts are those of `Tables`; moved is lines + stride."""
    row = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own, at = numbers < N, row * N + numbers
    line = tl.load(lines + row)
    resting = tl.load(idle + row) != 0

    # guidance, as torch.lerp has it: exact at both ends
    m = tl.load(output + (guided + row) * N + numbers, mask=own, other=0.0).to(tl.float32)
    if row < guided:
        negative = tl.load(output + at, mask=own, other=0.0).to(tl.float32)
        weight = tl.load(guidance + row)
        below = negative + weight * (m - negative)
        above = m - (m - negative) * (1.0 - weight)
        m = tl.where(tl.abs(weight) < 0.5, below, above)
    # An idle line weighs the output and the noise with zero, and zero times NaN would be NaN.
    m = tl.where(resting, 0.0, m)
    z = tl.zeros([BLOCK_N], tl.float32)
    if DRAWS:
        drawn = tl.load(noise_lines + line)
        z = tl.where(resting, 0.0, tl.load(noise + drawn * N + numbers, mask=own, other=0.0))

    # [registers; m; z], and each line of the step's matrix by it
    places = tl.arange(0, BLOCK_S)
    held = state + row * (R + 2) * N
    old = tl.load(
        held + places[:, None] * N + numbers[None, :], mask=(places < R)[:, None] & own[None, :], other=0.0
    )
    old = tl.where((places == R)[:, None], m[None, :], old)
    old = tl.where((places == R + 1)[:, None], z[None, :], old)
    matrix = matrices + line * (R + 1) * (R + 2)
    latents = tl.zeros([BLOCK_N], tl.float32)
    for r in tl.static_range(R):
        weights = tl.load(matrix + r * (R + 2) + places, mask=places < R + 2, other=0.0)
        new = tl.sum(weights[:, None] * old, 0)
        if KEEPS and r == 0:
            stays = tl.load(kept + at, mask=own, other=0) != 0
            a, b = tl.load(keeping + line * 3), tl.load(keeping + line * 3 + 1)
            new = tl.where(
                stays, a * tl.load(image + at, mask=own) + b * tl.load(image_noise + at, mask=own), new
            )
            latents = new
        tl.store(held + r * N + numbers, new, mask=own)
    tl.store(held + R * N + numbers, m, mask=own)

    if KEEPS:
        next_sample = latents * tl.load(keeping + line * 3 + 2)
    else:
        weights = tl.load(matrix + R * (R + 2) + places, mask=places < R + 2, other=0.0)
        next_sample = tl.sum(weights[:, None] * old, 0)
    told = next_sample.to(sample.dtype.element_ty)
    tl.store(sample + (guided + row) * sample_stride + numbers, told, mask=own)
    if row < guided:
        tl.store(sample + row * sample_stride + numbers, told, mask=own)

    if (tl.program_id(0) == 0) & (row == 0):
        every = tl.arange(0, BLOCK_L)
        here = tl.load(lines + every, mask=every < all_lines, other=0)
        on = tl.load(stride + every, mask=every < all_lines, other=0)
        tl.store(moved + every, here + on, mask=every < all_lines)


@triton.jit
def fetch_time_shifts_kernel(
    lines: tl.tensor,
    moved: tl.tensor,
    time_shifts: tl.tensor,
    time_shift: tl.tensor,
    T: tl.tensor,
    rows: tl.tensor,
    all_lines: tl.tensor,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """lines = moved; time_shift[j] = time_shifts[moved[rows + j]]. Grid: tiles of T, B."""
    row = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    line = tl.load(moved + rows + row)
    values = tl.load(time_shifts + line * T + numbers, mask=numbers < T)
    tl.store(time_shift + row * T + numbers, values, mask=numbers < T)
    if (tl.program_id(0) == 0) & (row == 0):
        every = tl.arange(0, BLOCK_L)
        tl.store(lines + every, tl.load(moved + every, mask=every < all_lines), mask=every < all_lines)


class Advance:
    """The two launches on fixed tensors. Making it allocates; calling it neither allocates nor waits."""

    def __init__(self, tables: Tables) -> None:
        """Raises ValueError when a tensor is not contiguous."""
        for name, value in vars(tables).items():
            if value is not None and not value.is_contiguous():
                raise ValueError(f"{name} must be contiguous, not of strides {list(value.stride())}")
        self._tables, self._moved = tables, torch.empty_like(tables.lines)
        self._rows, (registers, self._numbers) = tables.state.shape[0], tables.state.shape[1:]
        self._registers = registers - 2
        self._device = tables.state.get_device()  # -1 on the processor, where the guard does nothing
        self._block_l = triton.next_power_of_2(len(tables.lines))

    def __call__(self) -> None:
        tables, guided = self._tables, len(self._tables.guidance)
        with torch.cuda.device(self._device):  # Triton launches on the current device
            advance_rows_kernel[(triton.cdiv(self._numbers, NUMBERS), self._rows)](
                tables.state,
                tables.matrices,
                tables.guidance,
                tables.lines,
                tables.stride,
                self._moved,
                tables.idle,
                tables.state if tables.noise is None else tables.noise,
                tables.noise_lines,
                tables.idle if tables.kept is None else tables.kept,
                tables.image,
                tables.image_noise,
                tables.keeping,
                tables.output,
                tables.sample,
                self._numbers,
                tables.sample.stride(0),
                guided,
                len(tables.lines),
                R=self._registers,
                DRAWS=tables.noise is not None,
                KEEPS=tables.kept is not None,
                BLOCK_S=triton.next_power_of_2(self._registers + 2),
                BLOCK_L=self._block_l,
                BLOCK_N=NUMBERS,
                num_warps=ROW_WARPS,
            )
            batch, width = tables.time_shift.shape
            fetch_time_shifts_kernel[(triton.cdiv(width, COPIED), batch)](
                tables.lines,
                self._moved,
                tables.time_shifts,
                tables.time_shift,
                width,
                self._rows,
                len(tables.lines),
                BLOCK_L=self._block_l,
                BLOCK_T=COPIED,
                num_warps=COPY_WARPS,
            )
