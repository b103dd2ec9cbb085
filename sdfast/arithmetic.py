"""The arithmetic of a tick around the U-Net: guidance, the step's matrix, the next sample.

    m         = negative + guidance · (positive − negative)
    registers = matrix[k] @ [registers; m; z]                   register 0 is the latents
    sample    = latents · input_scale[k + 1]

Two ways to the same numbers. `DeviceArithmetic` keeps everything on the device, step indices included: rows
of different schedules and lengths are one batch of tensor operations, and the host waits for nothing.
`HostArithmetic` is for the processor. There the operations around a small network cost by their number, and
torch's cost some twenty times what they take alone once the network has swept the caches: it goes row by row
in numpy, which takes a third of that.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sdfast.schedulers import Schedule

Float32s = NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Plan:
    """What the arithmetic needs to know of a row.

    time_shifts: [K, T] for each of its U-Net rows: the negative's, if it has guidance, then the positive's.
    guidance, guidance_rescale: the latter in [0, 1]; without a negative neither is used.
    """

    schedule: Schedule
    time_shifts: Sequence[torch.Tensor]
    guidance: float
    guidance_rescale: float

    @property
    def guided(self) -> bool:
        return len(self.time_shifts) == 2


@dataclass(frozen=True)
class Buffers:
    """The tensors between the arithmetic and the U-Net.

    [B, …] for the U-Net's B rows: the guided rows' negatives, then all rows in order, then padding. `sample`
    and `output` are [B, C, h, w] in the engine's dtype, `time_shift` is [B, T].
    """

    sample: torch.Tensor
    output: torch.Tensor
    time_shift: torch.Tensor


class Arithmetic(Protocol):
    """The registers of n rows, guided ones first. `latents` and `noise` are views [n, C, h, w], float32."""

    latents: torch.Tensor
    noise: torch.Tensor

    def prepare(self, steps: Sequence[int]) -> None:
        """Write the sample and the time shifts for rows that stand at these steps, from their latents."""
        ...

    def advance(self, steps: Sequence[int]) -> None:
        """Take each row from its step to the next and prepare that. A row at its end stays as it is."""
        ...


class HostArithmetic:
    """On the processor: numpy, row by row, on the memory of the tensors."""

    def __init__(self, plans: Sequence[Plan], buffers: Buffers) -> None:
        _, *shape = buffers.sample.shape
        registers = max(plan.schedule.registers for plan in plans)
        state = np.zeros((len(plans), registers + 2, int(np.prod(shape))), np.float32)
        views = torch.from_numpy(state).view(*state.shape[:2], *shape)
        self.latents, self.noise = views[:, 0], views[:, -1]
        guided = sum(plan.guided for plan in plans)
        self._rows = [
            _HostRow(
                plan, state[i], buffers, slice(i if plan.guided else guided + i, guided + i + 1, guided or 1)
            )
            for i, plan in enumerate(plans)
        ]

    def prepare(self, steps: Sequence[int]) -> None:
        for k, row in zip(steps, self._rows, strict=True):
            row.prepare(k)

    def advance(self, steps: Sequence[int]) -> None:
        for k, row in zip(steps, self._rows, strict=True):
            row.advance(k)


class _HostRow:
    """One row: its state [R + 2, C·h·w], and in the buffers the one or two U-Net rows that are its own."""

    def __init__(self, plan: Plan, state: Float32s, buffers: Buffers, own: slice) -> None:
        self._state, self._registers, self._m = state, state[:-2], state[-2]
        self._product = np.empty((len(state) - 1, state.shape[1]), np.float32)
        self._matrices = step_matrices(plan.schedule, len(state) - 2).astype(np.float32)
        self._scales = np.append(plan.schedule.input_scale, 1.0).astype(np.float32)
        self._guidance, self._rescale = np.float32(plan.guidance), plan.guidance_rescale
        self._sample = buffers.sample.flatten(1).numpy()[own]
        output = buffers.output.flatten(1).numpy()[own]
        self._negative, self._positive = (output[0] if plan.guided else None), output[-1]
        self._time_shift = buffers.time_shift.numpy()[own]
        self._time_shifts = torch.stack([*plan.time_shifts], dim=1).numpy()  # [K, 1 or 2, T]

    def prepare(self, k: int) -> None:
        self._write(self._state[0] * self._scales[k], k)

    def advance(self, k: int) -> None:
        if k == len(self._matrices):
            return
        self._guide()
        np.matmul(self._matrices[k], self._state, out=self._product)
        self._registers[:] = self._product[:-1]
        self._write(self._product[-1], k + 1)

    def _guide(self) -> None:
        m, negative, positive = self._m, self._negative, self._positive
        if negative is None:
            m[:] = positive
            return
        np.subtract(positive, negative, out=m, dtype=_FLOAT32)
        m *= self._guidance
        m += negative
        if self._rescale:
            spread = positive.astype(np.float32).std(ddof=1) / m.std(ddof=1)
            m *= self._rescale * spread + (1 - self._rescale)

    def _write(self, sample: Float32s, k: int) -> None:
        self._sample[:] = sample
        if k < len(self._time_shifts):
            self._time_shift[:] = self._time_shifts[k]


class DeviceArithmetic:
    """On any device: one batch of torch operations for all rows, steps and indices in tensors."""

    def __init__(self, plans: Sequence[Plan], buffers: Buffers) -> None:
        _, *shape = buffers.sample.shape
        device, n, self._guided = buffers.sample.device, len(plans), sum(plan.guided for plan in plans)
        registers = max(plan.schedule.registers for plan in plans)
        self._plans, self._buffers = plans, buffers
        # registers, then the guided model output, then the noise: what a step's matrix is applied to
        self._state = torch.zeros(n, registers + 2, int(np.prod(shape)), device=device)
        views = self._state.view(*self._state.shape[:2], *shape)
        self.latents, self._m, self.noise = views[:, 0], views[:, -2], views[:, -1]
        # and what comes out of it: the new registers, then the next sample
        self._product = torch.zeros(n, registers + 1, self._state.shape[2], device=device)
        self._next_sample = self._product[:, -1].view(n, *shape)
        self._place_tables(registers, device)
        self._place_guidance(device)
        self._finished: set[int] = set()

    def prepare(self, steps: Sequence[int]) -> None:
        scales = [
            np.append(plan.schedule.input_scale, 1.0)[k] for k, plan in zip(steps, self._plans, strict=True)
        ]
        scale = torch.tensor(scales, dtype=torch.float32, device=self.latents.device)
        torch.mul(self.latents, scale.view(-1, 1, 1, 1), out=self._next_sample)
        self._fill()

    def advance(self, steps: Sequence[int]) -> None:
        self._guide()
        for i in self._finished:  # its idle line weighs the output with zero; zero times NaN would be NaN
            self._state[i, -2:] = 0
        torch.bmm(self._matrices.index_select(0, self._table_line), self._state, out=self._product)
        self._state[:, :-2] = self._product[:, :-1]
        self._lines.add_(self._stride)
        for i, (k, plan) in enumerate(zip(steps, self._plans, strict=True)):
            if k == len(plan.schedule) - 1:
                self._finish(i)
        self._fill()

    def _fill(self) -> None:
        n, guided, buffers = len(self._plans), self._guided, self._buffers
        buffers.sample[:guided] = self._next_sample[:guided]
        buffers.sample[guided : guided + n] = self._next_sample
        torch.index_select(self._time_shifts, 0, self._shift_line, out=buffers.time_shift)

    def _guide(self) -> None:
        n, guided, output = len(self._plans), self._guided, self._buffers.output
        self._m[guided:] = output[2 * guided : n + guided]
        if not guided:
            return
        negative, positive = output[:guided].float(), output[guided : 2 * guided].float()
        mixed = torch.lerp(negative, positive, self._guidance)
        if self._rescale is not None:
            mixed = rescale_guidance(mixed, positive, self._rescale)
        self._m[:guided] = mixed

    def _place_tables(self, registers: int, device: torch.device) -> None:
        """The rows' tables one below the other, each ended by an idle line that keeps the registers."""
        plans = self._plans
        idle = np.eye(registers + 1, registers + 2)
        idle[-1] = idle[0]
        tables = [np.concatenate([step_matrices(p.schedule, registers), idle[None]]) for p in plans]
        self._matrices = torch.from_numpy(np.concatenate(tables).astype(np.float32)).to(device)
        told = [plan.time_shifts[0] for plan in plans if plan.guided] + [p.time_shifts[-1] for p in plans]
        like = self._buffers.time_shift
        shifts = torch.cat([line for shift in told for line in (shift, shift[-1:])])
        self._time_shifts = shifts.to(device, like.dtype)  # [lines, T]
        padding = [0] * (len(like) - len(told))
        starts = _starts([plan.schedule for plan in plans]) + _starts(told) + padding
        self._lines = torch.tensor(starts, device=device)  # of the tables, then of the time shifts
        self._stride = torch.ones_like(self._lines)  # 0 for a row on its idle line
        self._stride[len(starts) - len(padding) :] = 0
        self._table_line, self._shift_line = self._lines[: len(plans)], self._lines[len(plans) :]

    def _place_guidance(self, device: torch.device) -> None:
        guided = self._plans[: self._guided]
        self._guidance = torch.tensor([plan.guidance for plan in guided], device=device).view(-1, 1, 1, 1)
        rescale = [plan.guidance_rescale for plan in guided]
        self._rescale = torch.tensor(rescale, device=device).view(-1, 1, 1, 1) if any(rescale) else None

    def _finish(self, i: int) -> None:
        """Row i is on its idle line now, and stays there."""
        n = len(self._plans)
        self._finished.add(i)
        self._stride[i] = 0
        self._stride[n + self._guided + i] = 0
        if i < self._guided:
            self._stride[n + i] = 0


def arithmetic_for(device: torch.device) -> type[HostArithmetic] | type[DeviceArithmetic]:
    """The faster way on this device."""
    return HostArithmetic if device.type == "cpu" else DeviceArithmetic


def rescale_guidance(guided: torch.Tensor, positive: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Give the guided output the spread of the positive one, by `amount` in [0, 1].

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.
    All tensors are [n, C, h, w]; `amount` is [n, 1, 1, 1].
    """
    axes = tuple(range(1, guided.ndim))
    spread = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (amount * spread + (1 - amount))


def step_matrices(schedule: Schedule, registers: int) -> NDArray[np.float64]:
    """[K, R + 1, R + 2]: a schedule's matrices for a file of R `registers`, those it lacks kept as they are.

    The added row is the sample of the step after: the new latents by its input scale.
    """
    steps, own, _ = schedule.matrix.shape
    wide = np.tile(np.eye(registers + 1, registers + 2), (steps, 1, 1))
    wide[:, :own, :own] = schedule.matrix[:, :, :own]
    wide[:, :own, registers:] = schedule.matrix[:, :, own:]
    next_scale = np.append(schedule.input_scale[1:], 1.0)
    wide[:, registers] = wide[:, 0] * next_scale[:, None]
    return wide


def _starts(tables: Sequence[Sized]) -> list[int]:
    """The first lines of tables that lie one below the other, each followed by an idle line."""
    starts = [0]
    for table in tables:
        starts.append(starts[-1] + len(table) + 1)
    return starts[:-1]
