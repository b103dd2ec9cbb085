"""The arithmetic on the processor: numpy, row by row, on the memory of the tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sdfast.arithmetic.plan import Buffers, Capacity, Keep, Plan, by_step, step_matrices, step_noising
from sdfast.schedulers import Schedule

Float32s = NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)


class HostArithmetic:
    """On the processor: numpy, row by row, on the memory of the tensors."""

    def __init__(self, buffers: Buffers, capacity: Capacity) -> None:
        _, *shape = buffers.output.shape
        self._state = np.zeros((capacity.rows, capacity.registers + 2, int(np.prod(shape))), np.float32)
        self._latents = torch.from_numpy(self._state[:, 0]).view(-1, *shape)
        self._buffers, self._capacity = buffers, capacity
        self._rows: list[_HostRow] = []
        self._steps: Sequence[int] = ()

    @property
    def latents(self) -> torch.Tensor:
        return self._latents

    def place(self, plans: Sequence[Plan], steps: Sequence[int], registers: Sequence[torch.Tensor]) -> None:
        self._steps = steps
        self._rows = [
            _HostRow(plan, self._state[i], self._buffers, self._capacity.places(i))
            for i, plan in enumerate(plans)
        ]
        for row, values in zip(self._rows, registers, strict=True):
            row.registers[: len(values)].copy_(values)

    def registers(self, i: int) -> torch.Tensor:
        return self._rows[i].registers.clone()

    def output(self, i: int) -> torch.Tensor:
        return self._rows[i].output

    def prepare(self, steps: Sequence[int]) -> None:
        for k, row in zip(steps, self._rows, strict=True):
            row.prepare(k)

    def feed(self, steps: Sequence[int]) -> None:
        self._steps = steps
        for k, row in zip(steps, self._rows, strict=True):
            row.draw(k)

    def advance(self) -> None:
        for k, row in zip(self._steps, self._rows, strict=True):
            row.advance(k)


class _HostRow:
    """One row: its state [R + 2, C·h·w], and in the buffers the U-Net rows that are its own."""

    def __init__(self, plan: Plan, state: Float32s, buffers: Buffers, places: Sequence[int]) -> None:
        state = state[: plan.schedule.registers + 2]  # the rest of the registers is another row's need
        state[:] = 0
        self._state, self._registers, self._m = state, state[:-2], state[-2]
        shape = buffers.output.shape[1:]
        self.registers = torch.from_numpy(self._registers).view(-1, *shape)
        self.output = torch.from_numpy(self._m).view(shape)
        self._noise = torch.from_numpy(state[-1]).view(shape)
        self._draw, self._draws = plan.noise, [*plan.schedule.draws_noise.tolist(), False]
        self._product = np.empty((len(state) - 1, state.shape[1]), np.float32)
        self._matrices = step_matrices(plan.schedule, len(state) - 2).astype(np.float32)
        self._scales = np.append(plan.schedule.input_scale, 1.0).astype(np.float32)
        self._kept = _Kept(plan.keep, plan.schedule) if plan.keep else None
        steps = len(self._matrices)
        self._guidance, self._rescale = by_step(plan.guidance, steps), plan.guidance_rescale
        samples, outputs = buffers.sample.flatten(1).numpy(), buffers.output.flatten(1).numpy()
        shifts, own = buffers.time_shift.numpy(), state.shape[1]
        self._told = [
            (samples[place, :own], shifts[place], told.numpy())
            for place, told in zip(places, plan.time_shifts, strict=True)
        ]
        negative, *further, self._positive = (outputs[place] for place in [places[0], *places])
        self._negative = negative if plan.guided else None
        weights = [by_step(weight, steps) for weight in plan.further]
        self._further = list(zip(weights, further[1:], strict=True))

    def prepare(self, k: int) -> None:
        self._write(self._state[0] * self._scales[k], k)

    def draw(self, k: int) -> None:
        if self._draws[k]:
            self._noise.copy_(self._draw(k))

    def advance(self, k: int) -> None:
        if k == len(self._matrices):
            return
        self._guide(k)
        np.matmul(self._matrices[k], self._state, out=self._product)
        self._registers[:] = self._product[:-1]
        if self._kept is None:
            self._write(self._product[-1], k + 1)
        else:
            self._kept.put_back(self._registers[0], k)
            self.prepare(k + 1)

    def _guide(self, k: int) -> None:
        m, negative, positive = self._m, self._negative, self._positive
        if negative is None:
            m[:] = positive
            return
        np.subtract(positive, negative, out=m, dtype=_FLOAT32)
        m *= self._guidance[k]
        m += negative
        for weight, output in self._further:
            m += weight[k] * np.subtract(output, negative, dtype=_FLOAT32)
        if self._rescale:
            spread = positive.astype(np.float32).std(ddof=1) / m.std(ddof=1)
            m *= self._rescale * spread + (1 - self._rescale)

    def _write(self, sample: Float32s, k: int) -> None:
        for own, time_shift, time_shifts in self._told:
            own[:] = sample
            if k < len(time_shifts):
                time_shift[:] = time_shifts[k]


class _Kept:
    """What a row keeps of an image, [C·h·w] each."""

    def __init__(self, keep: Keep, schedule: Schedule) -> None:
        self._where = ~keep.anew.expand(keep.latents.shape).flatten().numpy()
        self._image, self._noise = keep.latents.flatten().numpy(), keep.noise.flatten().numpy()
        self._noising = step_noising(schedule).astype(np.float32)

    def put_back(self, latents: Float32s, k: int) -> None:
        """Into the latents after step k."""
        a, b = self._noising[k]
        np.copyto(latents, a * self._image + b * self._noise, where=self._where)
