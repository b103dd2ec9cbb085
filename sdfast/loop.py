"""The loop: rows of latents, advanced together one step at a time.

A row is one picture being denoised. What distinguishes rows (scheduler, step count, guidance, prompt, seed)
is data: tables, indices and vectors that lie on the device. So the loop knows no scheduler, and one tick is

    output  = unet(sample, time_shift[k], context)             rows with guidance take two U-Net rows
    m       = negative + guidance · (positive − negative)
    registers = matrix[k] @ [registers; m; z]                   register 0 is the latents
    sample  = latents · input_scale[k + 1]                      one more row of that product

Next to a small network on a processor the operations around it count by their number, not their size, so a
tick has as few as it can, on views that are made once.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
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
        self._scale_latents()

    def tick(self) -> None:
        """Advance every row by one step. A row that has no steps left keeps its latents."""
        self._draw_noise()
        torch.index_select(self._time_shifts, 0, self._shift_line, out=self._time_shift)
        self._run_unet()
        self._guide()
        for i in self._finished:  # its idle line weighs the output with zero; zero times NaN would be NaN
            self._state[i, -2:] = 0
        torch.index_select(self._matrices, 0, self._table_line, out=self._matrix)
        torch.bmm(self._matrix, self._state, out=self._product)
        self._registers.copy_(self._new_registers)
        self._fill_sample()
        self._advance()

    def check(self) -> None:
        """Raises `NumericalError` when some latent is not a finite number."""
        if not math.isfinite(float(self._latents.sum())):  # which is so when all are, up to some 1e33
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
        # and what comes out of it: the new registers, then the next sample
        self._product = torch.zeros(n, registers + 1, channels * h * w, device=device)
        self._new_registers = self._product[:, :registers]
        self._next_sample = self._product[:, registers].view(n, channels, h, w)

        self._sample = torch.zeros(unet_rows, channels, h, w, device=device, dtype=dtype)
        self._output = torch.zeros(unet_rows, channels, h, w, device=device, dtype=dtype)
        # A row with guidance has a negative U-Net row in the first part, and every row one in the second.
        self._sample_parts = [
            (self._sample[:guided], self._next_sample[:guided]),
            (self._sample[guided : guided + n], self._next_sample),
        ]
        self._negative, self._positive = self._output[:guided], self._output[guided : 2 * guided]
        self._plain_output = self._output[2 * guided : guided + n]
        self._guided_parts = self._guided_output[:guided], self._guided_output[guided:]
        table_starts = self._place_tables(registers, device)
        shift_starts = self._place_conditioning(unet_rows, device, dtype)
        self._place_guidance(device)
        # which line of the tables each row is on, and each U-Net row of the time shifts
        self._lines = torch.tensor(table_starts + shift_starts, device=device)
        self._table_line, self._shift_line = self._lines[:n], self._lines[n:]
        self._stride = torch.ones_like(self._lines)  # 0 for a row on its idle line
        self._stride[n + n + guided :] = 0  # padding
        self._finished: list[int] = []
        self._latents.copy_(torch.stack([row.latents for row in self.rows]))
        self._scale_latents()

    def _place_guidance(self, device: torch.device) -> None:
        guided = self.rows[: self.guided]
        self._guidance = torch.tensor([row.guidance for row in guided], device=device).view(-1, 1, 1, 1)
        rescale = [row.guidance_rescale for row in guided]
        self._rescale = torch.tensor(rescale, device=device).view(-1, 1, 1, 1) if any(rescale) else None

    def _place_tables(self, registers: int, device: torch.device) -> list[int]:
        """The rows' tables one below the other; each ends in an idle line, which keeps the registers.

        A line is the matrix [R + 1, R + 2] of the registers and, last, of the next step's sample. Returns the
        lines on which the rows start.
        """
        lines = []
        for row in self.rows:
            matrix = np.concatenate([_widened(row.schedule.matrix, registers), _identity(registers)])
            next_scale = np.append(row.schedule.input_scale[1:], [1.0, 1.0])
            lines.append(np.concatenate([matrix, matrix[:, :1] * next_scale[:, None, None]], axis=1))
        table = np.concatenate(lines).astype(np.float32)
        self._matrices = torch.from_numpy(table).to(device)  # [lines, R + 1, R + 2]
        self._matrix = torch.empty(len(self.rows), *table.shape[1:], device=device)
        return _starts([row.schedule for row in self.rows])

    def _place_conditioning(self, unet_rows: int, device: torch.device, dtype: torch.dtype) -> list[int]:
        """The contexts, and the time shifts one below the other; returns where each U-Net row's start."""
        told = [row.negative for row in self.rows if row.negative is not None]
        told += [row.positive for row in self.rows]
        length, width = told[0].context.shape
        self._context = torch.zeros(unet_rows, length, width, device=device, dtype=dtype)
        for i, conditioning in enumerate(told):
            self._context[i] = conditioning.context
        shifts = [line for c in told for line in (c.time_shift, c.time_shift[-1:])]  # the last: the idle line
        self._time_shifts = torch.cat(shifts).to(device, dtype)  # [lines, T]
        self._time_shift = torch.empty(unet_rows, self._time_shifts.shape[1], device=device, dtype=dtype)
        padding = [0] * (unet_rows - len(told))
        return _starts([conditioning.time_shift for conditioning in told]) + padding

    def _scale_latents(self) -> None:
        """The sample of the coming step, from the latents as they stand."""
        coming = [
            row.schedule.input_scale[k] if k < len(row.schedule) else 1.0
            for k, row in zip(self.step, self.rows, strict=True)
        ]
        scale = torch.tensor(coming, device=self._latents.device, dtype=torch.float32).view(-1, 1, 1, 1)
        torch.mul(self._latents, scale, out=self._next_sample)
        self._fill_sample()

    def _draw_noise(self) -> None:
        for i, (k, row) in enumerate(zip(self.step, self.rows, strict=True)):
            if k < len(row.schedule) and row.schedule.draws_noise[k]:
                self._noise[i].copy_(row.noise(k))

    def _fill_sample(self) -> None:
        for sample, latents in self._sample_parts:
            sample.copy_(latents)

    def _guide(self) -> None:
        mixed, plain = self._guided_parts
        if self.guided < len(self.rows):
            plain.copy_(self._plain_output)
        if not self.guided:
            return
        negative, positive = self._negative.float(), self._positive.float()
        if self._rescale is None:
            torch.lerp(negative, positive, self._guidance, out=mixed)
        else:
            guided = torch.lerp(negative, positive, self._guidance)
            mixed.copy_(rescale_guidance(guided, positive, self._rescale))

    def _advance(self) -> None:
        self._lines.add_(self._stride)
        for i, row in enumerate(self.rows):
            if self.step[i] < len(row.schedule):
                self.step[i] += 1
                if self.step[i] == len(row.schedule):
                    self._finish(i)

    def _finish(self, i: int) -> None:
        """Row i is on its idle line now, and stays there."""
        n, guided = len(self.rows), self.guided
        self._finished.append(i)
        self._stride[i] = 0
        self._stride[n + guided + i] = 0
        if i < guided:
            self._stride[n + i] = 0


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


def _starts(tables: Sequence[Sized]) -> list[int]:
    """The first lines of tables that lie one below the other, each followed by an idle line."""
    starts = [0]
    for table in tables:
        starts.append(starts[-1] + len(table) + 1)
    return starts[:-1]
