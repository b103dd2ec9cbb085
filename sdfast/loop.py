"""The loop: rows of latents, advanced together one step at a time.

A row is one picture being denoised. What distinguishes rows (scheduler, step count, guidance, prompt, seed)
is data: tables, indices and vectors that lie on the device. So the loop knows no scheduler, and one tick is

    sample  = latents · input_scale[k]
    output  = unet(sample, time_shift[k], context)             rows with guidance take two U-Net rows
    m       = negative + guidance · (positive − negative)
    registers = matrix[k] @ [registers; m; z]                   register 0 is the latents
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sdfast.errors import NumericalError
from sdfast.schedulers import Schedule

Noise = Callable[[int], torch.Tensor]  # step → unit noise [C, h, w], drawn in the order of the steps


class StepNetwork(Protocol):
    """What the loop needs of an engine."""

    device: torch.device
    dtype: torch.dtype

    def rows(self, name: str, batch: int, height: int | None = None, width: int | None = None) -> int: ...

    def bind(
        self,
        name: str,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        height: int | None = None,
        width: int | None = None,
    ) -> Callable[[], None]: ...


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told of one prompt.

    context: packed cross-attention keys and values of every layer, [L, KV].
    time_shift: packed time projections of every ResNet, one for each step, [K, T].
    """

    context: torch.Tensor
    time_shift: torch.Tensor


@dataclass(frozen=True)
class Row:
    """One picture to be denoised.

    latents: the first ones, [C, h, w] float32, scaled by the schedule's `init_noise_sigma`.
    noise: unit noise for the steps that draw some.
    """

    schedule: Schedule
    latents: torch.Tensor
    positive: Conditioning
    negative: Conditioning | None
    guidance: float
    noise: Noise
    guidance_rescale: float = 0.0


class Rows:
    """Rows of one picture size, stepping together on one engine.

    Rows with guidance come first in the registers, so that the U-Net's batch is [negatives; positives] as in
    diffusers; `latents` gives them back in the caller's order.
    """

    def __init__(self, engine: StepNetwork, rows: Sequence[Row], height: int, width: int) -> None:
        guided = [i for i, row in enumerate(rows) if row.negative is not None]
        plain = [i for i, row in enumerate(rows) if row.negative is None]
        self.order = guided + plain
        self.rows = [rows[i] for i in self.order]
        self.guided = len(guided)
        self.step = [0] * len(rows)
        self._place(engine, height, width)
        self._run_unet = engine.bind(
            "unet",
            {"sample": self._sample, "time_shift": self._time_shift, "context": self._context},
            {"output": self._output},
            height,
            width,
        )

    @property
    def active(self) -> bool:
        """Whether some row has steps left."""
        return any(k < len(row.schedule) for k, row in zip(self.step, self.rows, strict=True))

    @property
    def latents(self) -> torch.Tensor:
        """The current latents in the caller's order, [n, C, h, w] float32."""
        return self._latents[self._caller_order]

    @latents.setter
    def latents(self, value: torch.Tensor) -> None:
        self._latents.copy_(value[self.order])

    def tick(self) -> None:
        """Advance every row by one step. A row that has no steps left keeps its latents."""
        self._draw_noise()
        self._fill_sample()
        torch.index_select(self._time_shifts, 0, self._shift_index, out=self._time_shift)
        self._run_unet()
        self._guide()
        self._silence_finished()
        matrix = self._matrices.index_select(0, self._table_index)  # [n, R, R+2]
        self._registers.copy_(torch.bmm(matrix, self._state))
        self._advance()

    def check(self) -> None:
        """Raises `NumericalError` when some latent is not a finite number."""
        if not bool(torch.isfinite(self._latents).all()):
            raise NumericalError(
                "the latents are not finite numbers: the networks overflowed; "
                "export the engine in fp32, or lower the guidance scale"
            )

    def _place(self, engine: StepNetwork, height: int, width: int) -> None:
        """Put everything a tick reads or writes on the device."""
        device, dtype, n, guided = engine.device, engine.dtype, len(self.rows), self.guided
        registers = max(row.schedule.matrix.shape[1] for row in self.rows)
        channels, h, w = self.rows[0].latents.shape
        unet_rows = engine.rows("unet", n + guided, height, width)
        self._caller_order = torch.tensor(np.argsort(self.order), device=device)

        # registers, then the guided model output, then the noise: what a step's matrix is applied to
        self._state = torch.zeros(n, registers + 2, channels * h * w, device=device)
        self._registers = self._state[:, :registers]
        self._latents = self._state[:, 0].view(n, channels, h, w)
        self._guided_output = self._state[:, registers].view(n, channels, h, w)
        self._noise = self._state[:, registers + 1].view(n, channels, h, w)
        self._latents.copy_(torch.stack([row.latents for row in self.rows]))

        self._place_tables(registers, device)
        self._place_conditioning(unet_rows, device, dtype)
        self._sample = torch.zeros(unet_rows, channels, h, w, device=device, dtype=dtype)
        self._output = torch.zeros(unet_rows, channels, h, w, device=device, dtype=dtype)
        self._scaled = torch.empty(n, channels, h, w, device=device)
        guidance = [row.guidance for row in self.rows[:guided]]
        self._guidance = torch.tensor(guidance, device=device).view(guided, 1, 1, 1)
        rescale = [row.guidance_rescale for row in self.rows[:guided]]
        self._rescale = torch.tensor(rescale, device=device).view(guided, 1, 1, 1) if any(rescale) else None

    def _place_tables(self, registers: int, device: torch.device) -> None:
        """The rows' tables one below the other; each ends in an idle line, which keeps the registers."""
        matrices, scales = [], []
        for row in self.rows:
            matrices += [_widened(row.schedule.matrix, registers), _identity(registers)]
            scales += [row.schedule.input_scale, np.ones(1)]
        starts, ends = _lines([len(row.schedule) for row in self.rows])
        table = np.concatenate(matrices).astype(np.float32)
        self._matrices = torch.from_numpy(table).to(device)  # [lines, R, R+2]
        scale = np.concatenate(scales).astype(np.float32)
        self._scales = torch.from_numpy(scale).to(device)  # [lines]
        self._table_index = torch.tensor(starts, device=device)  # [n]
        self._table_end = torch.tensor(ends, device=device)

    def _place_conditioning(self, unet_rows: int, device: torch.device, dtype: torch.dtype) -> None:
        told = [row.negative for row in self.rows if row.negative is not None]
        told += [row.positive for row in self.rows]
        length, width = told[0].context.shape
        self._context = torch.zeros(unet_rows, length, width, device=device, dtype=dtype)
        for i, conditioning in enumerate(told):
            self._context[i] = conditioning.context
        shifts = [line for c in told for line in (c.time_shift, c.time_shift[-1:])]  # the last: the idle line
        self._time_shifts = torch.cat(shifts).to(device, dtype)  # [lines, T]
        starts, ends = _lines([len(conditioning.time_shift) for conditioning in told])
        padding = [0] * (unet_rows - len(told))
        self._shift_index = torch.tensor(starts + padding, device=device)  # [unet rows]
        self._shift_end = torch.tensor(ends + padding, device=device)
        self._time_shift = torch.empty(unet_rows, self._time_shifts.shape[1], device=device, dtype=dtype)

    def _draw_noise(self) -> None:
        for i, (k, row) in enumerate(zip(self.step, self.rows, strict=True)):
            if k < len(row.schedule) and row.schedule.draws_noise[k]:
                self._noise[i].copy_(row.noise(k))

    def _fill_sample(self) -> None:
        n, guided = len(self.rows), self.guided
        scale = self._scales.index_select(0, self._table_index).view(n, 1, 1, 1)
        torch.mul(self._latents, scale, out=self._scaled)
        self._sample[guided : guided + n].copy_(self._scaled)
        self._sample[:guided].copy_(self._scaled[:guided])

    def _guide(self) -> None:
        n, guided = len(self.rows), self.guided
        positive = self._output[guided : guided + n]
        if guided < n:
            self._guided_output[guided:].copy_(positive[guided:])
        if guided:
            negative, positive = self._output[:guided].float(), positive[:guided].float()
            mixed = negative + self._guidance * (positive - negative)
            if self._rescale is not None:
                mixed = rescale_guidance(mixed, positive, self._rescale)
            self._guided_output[:guided].copy_(mixed)

    def _silence_finished(self) -> None:
        """A finished row's idle line weighs the network's output with zero; zero times NaN would be NaN."""
        for i, (k, row) in enumerate(zip(self.step, self.rows, strict=True)):
            if k >= len(row.schedule):
                self._state[i, -2:] = 0

    def _advance(self) -> None:
        torch.minimum(self._table_index + 1, self._table_end, out=self._table_index)
        torch.minimum(self._shift_index + 1, self._shift_end, out=self._shift_index)
        self.step = [min(k + 1, len(row.schedule)) for k, row in zip(self.step, self.rows, strict=True)]


def rescale_guidance(guided: torch.Tensor, positive: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Give the guided output the spread of the positive one, by `amount` in [0, 1].

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.
    All tensors are [n, C, h, w]; `amount` is [n, 1, 1, 1].
    """
    axes = tuple(range(1, guided.ndim))
    spread = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (amount * spread + (1 - amount))


def _widened(matrix: np.ndarray, registers: int) -> np.ndarray:
    """A schedule's matrices [K, r, r+2] for a file of `registers`: the added ones stay as they are."""
    steps, own, _ = matrix.shape
    wide = np.tile(_identity(registers), (steps, 1, 1))
    wide[:, :own, :own] = matrix[:, :, :own]
    wide[:, :own, registers:] = matrix[:, :, own:]
    return wide


def _identity(registers: int) -> np.ndarray:
    """The matrix [1, R, R+2] that changes nothing."""
    return np.eye(registers, registers + 2)[None]


def _lines(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """The first line and the idle line of each of several tables that lie one below the other."""
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length + 1
    return starts, [start + length for start, length in zip(starts, lengths, strict=True)]
