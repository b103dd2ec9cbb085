"""What the arithmetic is told of rows, and what it is to the loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from sdfast.schedulers import Schedule

Weight = float | Sequence[float]
"""How much an output counts: one number for all steps, or one for each."""
Noise = Callable[[int], torch.Tensor]  # step → unit noise [C, h, w], drawn in the order of the steps


@dataclass(frozen=True, eq=False)
class Keep:
    """What a row keeps of an image: after each step it is put back, at the noise level of the step after.

    anew: [1, h, w] bool, where the row is drawn instead. latents: the image's, noise: what noises them, both
    [C, h, w] float32.
    """

    anew: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What the arithmetic needs to know of a row.

    time_shifts: [K, T] for each of its U-Net rows: the negative's, if it has guidance, those of `further`
    ones, then the positive's.
    guidance, guidance_rescale: the latter in [0, 1]; without a negative neither is used.
    noise: for the steps that draw some. keep: what it keeps of an image; the schedule then has `noising`.
    further: how much of each further output, less the negative, is added to what is guided.
    """

    schedule: Schedule
    time_shifts: Sequence[torch.Tensor]
    guidance: Weight
    guidance_rescale: float
    noise: Noise
    keep: Keep | None = None
    further: Sequence[Weight] = ()

    @property
    def guided(self) -> bool:
        return len(self.time_shifts) > 1

    @property
    def varies(self) -> bool:
        """Whether some output counts more in one step than in another."""
        return any(isinstance(weight, Sequence) for weight in (self.guidance, *self.further))


@dataclass(frozen=True)
class Buffers:
    """The tensors between the arithmetic and the U-Net.

    [B, …] for the U-Net's B rows: the guided rows' negatives, the first further one of each row that has
    some, the second of each that has two, and so on; then all rows in order, then padding. `output` is
    [B, C, h, w] in the engine's dtype, and `sample` too; it may have more channels, which are not the
    arithmetic's. `time_shift` is [B, T].
    """

    sample: torch.Tensor
    output: torch.Tensor
    time_shift: torch.Tensor


@dataclass(frozen=True)
class Capacity:
    """Which rows fit the tensors of an arithmetic: those of the same capacity can follow one another in it.

    Rows of more U-Net rows come first. guided: how many have a negative. further: how many have one further
    output or more, how many two or more, and so on.
    steps, registers: the most that a row may have. draws, rescales, keeps, varies: whether some row draws
    noise, rescales its guidance, keeps a part of an image, or weighs outputs otherwise from step to step.
    """

    rows: int
    guided: int
    steps: int
    registers: int
    draws: bool
    rescales: bool
    keeps: bool
    further: tuple[int, ...] = ()
    varies: bool = False

    @property
    def unet_rows(self) -> int:
        """The U-Net's rows that are somebody's; the others are padding."""
        return self.guided + sum(self.further) + self.rows

    def places(self, i: int) -> list[int]:
        """The U-Net's rows that are row i's: its negative's, its further ones', its positive's."""
        places, start = [], 0
        for having in (self.guided, *self.further):
            if i < having:
                places.append(start + i)
            start += having
        return [*places, start + i]

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> Self:
        """That of these rows, a little generous, so that calls that differ little share it."""
        steps = max(len(plan.schedule) for plan in plans)
        registers = max(plan.schedule.registers for plan in plans)
        return cls(
            rows=len(plans),
            guided=sum(plan.guided for plan in plans),
            steps=max(32, 1 << (steps - 1).bit_length()),
            registers=-(-registers // 4) * 4,
            draws=any(plan.schedule.draws_noise.any() for plan in plans),
            rescales=any(plan.guided and plan.guidance_rescale for plan in plans),
            keeps=any(plan.keep is not None for plan in plans),
            further=tuple(takewhile(bool, (sum(len(p.further) > j for p in plans) for j in count()))),
            varies=any(plan.guided and plan.varies for plan in plans),
        )


class Arithmetic(Protocol):
    """The registers of n rows, those of more U-Net rows first."""

    @property
    def latents(self) -> torch.Tensor:
        """Register 0 of every row, a view [n, C, h, w], float32."""
        ...

    def place(self, plans: Sequence[Plan], steps: Sequence[int], registers: Sequence[torch.Tensor]) -> None:
        """Take these rows in, each at the step where it stands; the step's sample is then `prepare`'s.

        registers: of each row [r, C, h, w] float32, the first r of its registers; the others are 0. A row
        that stands in the middle of its run asks its plan's noise for the steps from there on.
        """
        ...

    def registers(self, i: int) -> torch.Tensor:
        """All registers of row i, a copy [R, C, h, w] float32: what `place` takes in to go on from there."""
        ...

    def output(self, i: int) -> torch.Tensor:
        """The guided model output of row i's last step, a view [C, h, w] float32."""
        ...

    def prepare(self, steps: Sequence[int]) -> None:
        """Write the sample and the time shifts for rows that stand at these steps, from their latents."""
        ...

    def feed(self, steps: Sequence[int]) -> None:
        """What the host does before `advance`, for rows that stand at these steps: it draws their noise."""
        ...

    def advance(self) -> None:
        """Take each row from its step to the next and prepare that. A row at its end stays as it is."""
        ...


def by_step(weight: Weight, steps: int) -> NDArray[np.float32]:
    """[K]: how much an output counts in each of so many steps."""
    return np.broadcast_to(np.asarray(weight, np.float32), steps)


def step_noising(schedule: Schedule) -> NDArray[np.float64]:
    """[K, 2]: what a kept image and its noise weigh after each step."""
    if schedule.noising is None:
        raise ValueError(f"a row keeps a part of an image, but {schedule.scheduler} has no noising")
    return schedule.noising[1:]


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
