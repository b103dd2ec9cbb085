"""The arithmetic on a device: one batch of torch operations for all rows, steps and noise in tensors.

`advance` reads and writes the same tensors every time and asks the host for nothing, so that it can be part
of a CUDA graph. What differs from one call to the next (tables, time shifts, guidance, noise) lies in
tensors that `place` and `feed` fill.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sdfast.arithmetic.plan import Buffers, Capacity, Plan, by_step, step_matrices, step_noising
from sdfast.schedulers import Schedule

NOISE = 256 * 2**20  # bytes of noise that lie on the device at a time: that of all steps, unless it is more


class DeviceArithmetic:
    """The tables of the rows lie one below the other, each in `steps + 1` lines and ended by an idle line,
    which keeps the registers; a row's place in them is a number on the device."""

    def __init__(self, buffers: Buffers, capacity: Capacity) -> None:
        _, *shape = buffers.output.shape
        device, n, registers = buffers.sample.device, capacity.rows, capacity.registers
        numbers, self._lines_a_row = int(np.prod(shape)), capacity.steps + 1
        self._buffers, self._capacity = buffers, capacity
        # how many rows have a negative, a first further output, and so on; and how many there are
        self._layers = [*filter(None, [capacity.guided]), *capacity.further, n]

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(size, device=device, dtype=dtype)

        # registers, then the guided model output, then the noise: what a step's matrix is applied to
        self._state = zeros(n, registers + 2, numbers)
        views = self._state.view(n, registers + 2, *shape)
        self._registers, self._latents, self._m = views[:, :-2], views[:, 0], views[:, -2]
        # and what comes out of it: the new registers, then the next sample
        self._product = zeros(n, registers + 1, numbers)
        self._next_sample = self._product[:, -1].view(n, *shape)
        self._matrices = zeros(n * self._lines_a_row, registers + 1, registers + 2)
        told = capacity.unet_rows
        like = buffers.time_shift
        self._time_shifts = zeros(told * self._lines_a_row, like.shape[1], dtype=like.dtype)
        self._lines = zeros(n + len(like), dtype=torch.int64)  # of the tables, then of the time shifts
        self._stride = zeros(n + len(like), dtype=torch.int64)  # 0 for a row on its idle line
        self._table_line, self._shift_line = self._lines[:n], self._lines[n:]
        self._idle = zeros(n, 1, 1, dtype=torch.bool)
        self._guidance, self._rescale = zeros(capacity.guided, 1, 1, 1), zeros(capacity.guided, 1, 1, 1)
        self._further = [zeros(having, 1, 1, 1) for having in capacity.further]
        self._weights = [self._guidance, *self._further]
        varying = self._weights if capacity.varies else []
        self._weights_by_line = [zeros(len(weight) * self._lines_a_row) for weight in varying]
        self._window = max(1, min(capacity.steps, NOISE // (4 * n * numbers))) if capacity.draws else 0
        self._noise = zeros(n * self._window + 1, numbers)  # the last line is no noise
        self._noise_lines = zeros(n * self._lines_a_row, dtype=torch.int64)
        kept = n if capacity.keeps else 0
        self._kept = zeros(kept, numbers, dtype=torch.bool)
        self._image, self._image_noise = zeros(kept, numbers), zeros(kept, numbers)
        # after each step: what the image and its noise weigh, and the scale of the next sample
        self._keeping = zeros(kept * self._lines_a_row, 3)
        self._plans: Sequence[Plan] = ()
        self._finished: set[int] = set()
        self._ordinals: list[dict[int, int]] = []  # of each row: step → which of its draws that is

    @property
    def latents(self) -> torch.Tensor:
        return self._latents

    def registers(self, i: int) -> torch.Tensor:
        return self._registers[i, : self._plans[i].schedule.registers].clone()

    def output(self, i: int) -> torch.Tensor:
        return self._m[i]

    def place(self, plans: Sequence[Plan], steps: Sequence[int], registers: Sequence[torch.Tensor]) -> None:
        self._plans, self._finished = plans, set()
        self._ordinals = [_draws_from(k, plan.schedule) for k, plan in zip(steps, plans, strict=True)]
        self._place_tables(plans)
        self._place_time_shifts(plans, steps)
        self._place_guidance(plans)
        if self._capacity.keeps:
            self._place_kept(plans)
        self._idle.zero_()
        self._state.zero_()
        for i, values in enumerate(registers):
            self._registers[i, : len(values)].copy_(values)

    def _place_tables(self, plans: Sequence[Plan]) -> None:
        n, each, registers = len(plans), self._lines_a_row, self._capacity.registers
        matrices = np.zeros(self._matrices.shape, np.float32)
        noise_lines = np.full(n * each, n * self._window)
        for i, plan in enumerate(plans):
            steps = len(plan.schedule)
            matrices[i * each :][:steps] = step_matrices(plan.schedule, registers)
            matrices[i * each + steps] = _idle_line(registers)
            for k, ordinal in self._ordinals[i].items():
                noise_lines[i * each + k] = i * self._window + ordinal % self._window
        self._matrices.copy_(torch.from_numpy(matrices))
        self._noise_lines.copy_(torch.from_numpy(noise_lines))

    def prepare(self, steps: Sequence[int]) -> None:
        scales = [
            np.append(plan.schedule.input_scale, 1.0)[k] for k, plan in zip(steps, self._plans, strict=True)
        ]
        scale = torch.tensor(scales, dtype=torch.float32, device=self._state.device)
        torch.mul(self._latents, scale.view(-1, 1, 1, 1), out=self._next_sample)
        self._fill()

    def feed(self, steps: Sequence[int]) -> None:
        for i, (k, plan) in enumerate(zip(steps, self._plans, strict=True)):
            if k == len(plan.schedule) and i not in self._finished:
                self._finish(i)
        if self._window:
            self._draw(steps)

    def advance(self) -> None:
        self._guide()
        if self._window:
            noise_line = self._noise_lines.index_select(0, self._table_line)
            self._state[:, -1] = self._noise.index_select(0, noise_line)
        # An idle line weighs the output with zero, and zero times NaN would be NaN.
        self._state[:, -2:].masked_fill_(self._idle, 0)
        torch.bmm(self._matrices.index_select(0, self._table_line), self._state, out=self._product)
        self._state[:, :-2] = self._product[:, :-1]
        if self._capacity.keeps:
            self._put_back()
        self._lines.add_(self._stride)
        self._fill()

    def _fill(self) -> None:
        buffers, start = self._buffers, 0
        sample = buffers.sample[:, : buffers.output.shape[1]]
        for having in self._layers:
            sample[start : start + having] = self._next_sample[:having]
            start += having
        torch.index_select(self._time_shifts, 0, self._shift_line, out=buffers.time_shift)

    def _put_back(self) -> None:
        a, b, next_scale = self._keeping.index_select(0, self._table_line).unsqueeze(-1).unbind(1)
        image = a * self._image + b * self._image_noise
        latents = torch.where(self._kept, image, self._state[:, 0])
        self._state[:, 0] = latents
        self._product[:, -1] = latents * next_scale

    def _guide(self) -> None:
        guided, layers = self._capacity.guided, self._layers
        outputs = torch.split(self._buffers.output[: sum(layers)], layers)
        self._m[guided:] = outputs[-1][guided:]
        if not guided:
            return
        if self._capacity.varies:
            self._weigh()
        negative, positive = outputs[0].float(), outputs[-1][:guided].float()
        mixed = torch.lerp(negative, positive, self._guidance)
        for weight, output in zip(self._further, outputs[1:], strict=False):
            having = len(weight)
            mixed[:having] += weight * (output.float() - negative[:having])
        if self._capacity.rescales:
            mixed = rescale_guidance(mixed, positive, self._rescale)
        self._m[:guided] = mixed

    def _weigh(self) -> None:
        """The weights of the step at which each row stands."""
        for weight, by_line in zip(self._weights, self._weights_by_line, strict=True):
            weight.copy_(by_line.index_select(0, self._table_line[: len(weight)]).view_as(weight))

    def _draw(self, steps: Sequence[int]) -> None:
        """More noise for the rows that have used up theirs, as much as there is room for.

        Draw by draw, as rows that share a generator draw: the first of them at a step draws for all.
        """
        due: list[tuple[int, list[int]]] = []  # rows, and the steps that they draw for
        for i, (k, ordinals) in enumerate(zip(steps, self._ordinals, strict=True)):
            if k in ordinals and ordinals[k] % self._window == 0:
                due.append((i, list(ordinals)[ordinals[k] :][: self._window]))
        drawn: list[list[torch.Tensor]] = [[] for _ in due]
        for turn in range(max((len(wanted) for _, wanted in due), default=0)):
            for lines, (i, wanted) in zip(drawn, due, strict=True):
                if turn < len(wanted):
                    lines.append(self._plans[i].noise(wanted[turn]))
        for lines, (i, _) in zip(drawn, due, strict=True):
            whole = torch.stack(lines).flatten(1)
            if self._noise.is_cuda and not whole.is_cuda:
                whole = whole.pin_memory()  # only from there can the copy go on beside the host
            self._noise[i * self._window :][: len(lines)].copy_(whole, non_blocking=True)

    def _place_time_shifts(self, plans: Sequence[Plan], steps: Sequence[int]) -> None:
        n, each = len(plans), self._lines_a_row
        lines = np.zeros(len(self._lines), np.int64)
        lines[:n] = np.arange(n) * each + steps
        for i, (plan, step) in enumerate(zip(plans, steps, strict=True)):
            for place, shifts in zip(self._capacity.places(i), plan.time_shifts, strict=True):
                lines[n + place] = place * each + step
                self._time_shifts[place * each :][: len(shifts)] = shifts
                self._time_shifts[place * each + len(shifts)] = shifts[-1]
        self._lines.copy_(torch.from_numpy(lines))
        self._stride[: n + self._capacity.unet_rows] = 1

    def _place_guidance(self, plans: Sequence[Plan]) -> None:
        guided, each = plans[: self._capacity.guided], self._lines_a_row
        rescale = torch.tensor([plan.guidance_rescale for plan in guided], dtype=torch.float32)
        self._rescale.copy_(rescale.view(-1, 1, 1, 1))
        for j, target in enumerate(self._weights):
            weights = np.zeros((len(target), each), np.float32)  # the last line is the idle one
            for own, plan in zip(weights, plans, strict=False):
                steps = len(plan.schedule)
                own[:steps] = by_step((plan.guidance, *plan.further)[j], steps)
            target.copy_(torch.from_numpy(weights[:, :1].copy()).view(-1, 1, 1, 1))
            if self._weights_by_line:
                self._weights_by_line[j].copy_(torch.from_numpy(weights.ravel()))

    def _place_kept(self, plans: Sequence[Plan]) -> None:
        keeping = np.ones((len(plans), self._lines_a_row, 3), np.float32)
        self._kept.zero_()
        for i, plan in enumerate(plans):
            steps = len(plan.schedule)
            keeping[i, :steps, 2] = np.append(plan.schedule.input_scale[1:], 1.0)
            if plan.keep is None:
                continue
            keeping[i, :steps, :2] = step_noising(plan.schedule)
            keeping[i, steps, :2] = 1, 0  # the idle line
            self._kept[i] = ~plan.keep.anew.expand(plan.keep.latents.shape).flatten()
            self._image[i], self._image_noise[i] = plan.keep.latents.flatten(), plan.keep.noise.flatten()
        self._keeping.copy_(torch.from_numpy(keeping.reshape(self._keeping.shape)))

    def _finish(self, i: int) -> None:
        """Row i is on its idle line now, and stays there.

        Numbers are filled in: one that is assigned to a single place is copied there, and waited for.
        """
        n = self._capacity.rows
        self._finished.add(i)
        self._idle[i].fill_(True)
        for line in (i, *(n + place for place in self._capacity.places(i))):
            self._stride[line].zero_()


def _draws_from(k: int, schedule: Schedule) -> dict[int, int]:
    """step → which of the draws from step k on that is."""
    steps = [step for step in np.flatnonzero(schedule.draws_noise).tolist() if step >= k]
    return {step: ordinal for ordinal, step in enumerate(steps)}


def _idle_line(registers: int) -> np.ndarray:
    """The matrix that keeps the registers, and makes the latents the next sample: [R + 1, R + 2]."""
    idle = np.eye(registers + 1, registers + 2)
    idle[-1] = idle[0]
    return idle


def rescale_guidance(guided: torch.Tensor, positive: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Give the guided output the spread of the positive one, by `amount` in [0, 1].

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.
    All tensors are [n, C, h, w]; `amount` is [n, 1, 1, 1].
    """
    axes = tuple(range(1, guided.ndim))
    spread = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (amount * spread + (1 - amount))
