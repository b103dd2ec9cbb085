"""One picture being denoised: what is decided of it when it is prepared, and where it stands in the loop.

What distinguishes rows (scheduler, step count, guidance, prompt, seed) is data, so the loop knows no
scheduler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sdfast.arithmetic import Keep, Noise, Plan, Weight
from sdfast.schedulers import Schedule


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told of one prompt.

    context: packed cross-attention keys and values of every layer, [L, KV].
    time_shift: packed time projections of every ResNet, one for each step, [K, T].
    later: contexts of the same shape that take its place, each from its step on, in the order of the steps.
    beside: what is told beside the latents, [E, h, w]: to an inpainting U-Net, or one that edits an image.
    image: on engines with IP-Adapters, those of the images' tokens, [I, KV], zeros where there are none.
    """

    context: torch.Tensor
    time_shift: torch.Tensor
    later: Mapping[int, torch.Tensor] = field(default_factory=dict)
    beside: torch.Tensor | None = None
    image: torch.Tensor | None = None

    def context_at(self, step: int) -> torch.Tensor:
        """The context of a step."""
        starts = [start for start in self.later if start <= step]
        return self.later[starts[-1]] if starts else self.context


@dataclass(frozen=True)
class Guide:
    """A further evaluation of a row's network: what it is told, and how much of what it says, less what the
    negative says, is added to what is guided."""

    told: Conditioning
    weight: Weight


@dataclass(frozen=True, eq=False)
class Row:
    """One picture to be denoised; two rows are the same only if they are one object.

    latents: the first ones, [C, h, w] float32, scaled by the schedule's `init_noise_sigma`.
    guided: the steps in which it is guided away from its negative, if it has one; default: all.
    further: what else guides it, in all steps; such a row has a negative.
    noise: unit noise for the steps that draw some. keep: what it keeps of an image that it is drawn over.
    control: the embedded control image of a ControlNet, [C_0, h, w]; every row of an engine has one, or none
    has. cache_interval: N, where the steps 0, N, 2N, … run the whole U-Net and the others are shallow; above
    1 on engines with a step cache alone, and only if guidance, where there is some, begins with the first
    step.
    """

    schedule: Schedule
    latents: torch.Tensor
    positive: Conditioning
    negative: Conditioning | None
    guidance: Weight
    noise: Noise
    guidance_rescale: float = 0.0
    keep: Keep | None = None
    control: torch.Tensor | None = None
    guided: range | None = None
    cache_interval: int = 1
    further: Sequence[Guide] = ()

    def __post_init__(self) -> None:
        late = self.negative is not None and self.guided and self.guided.start > 0
        if self.cache_interval > 1 and late:
            raise ValueError("a row whose steps are cached is guided from the first step on, or not at all")
        always = self.negative is not None and len(self.guided or self.schedule) == len(self.schedule)
        if self.further and not always:
            raise ValueError("a row of further guides has a negative in all steps")

    def phase_at(self, step: int) -> tuple[int, int]:
        """What rows that share ticks have in common: the interval, and the step's place in it."""
        return self.cache_interval, step % self.cache_interval

    def told_at(self, step: int) -> list[Conditioning]:
        """What its U-Net rows are told at a step: where it is guided, the negative is first."""
        if self.negative is None or (self.guided is not None and step not in self.guided):
            return [self.positive]
        return [self.negative, *(one.told for one in self.further), self.positive]


class _Drawn:
    """A row's noise. What was drawn ahead stays until its step is done: a row that moves asks again."""

    def __init__(self, draw: Noise) -> None:
        self._draw = draw
        self._waiting: dict[int, torch.Tensor] = {}

    def __call__(self, step: int) -> torch.Tensor:
        if step not in self._waiting:
            self._waiting[step] = self._draw(step)
        return self._waiting[step]

    def done(self, step: int) -> None:
        self._waiting.pop(step, None)


class Member:
    """A row among others: where it stands, and while no bucket holds it, its registers [r, C, h, w].

    One that has left may join again, the same rows or others, and goes on where it was.

    told, plan: what it was placed with. stale: whether it is to be placed anew before its next step, since
    that is guided and its last was not, or the other way round. deep: while no bucket holds it, and its next
    step is a shallow one: what that takes from its last whole one, for each of its U-Net rows.
    """

    def __init__(self, row: Row) -> None:
        self.row, self.noise = row, _Drawn(row.noise)
        self.step, self.end = 0, len(row.schedule)
        self._lay_out()
        self.registers = row.latents[None]
        self.deep: torch.Tensor | None = None

    @property
    def between(self) -> bool:
        """Whether its next step is a shallow one."""
        return self.phase is not None and self.phase[1] > 0

    @property
    def phase(self) -> tuple[int, int] | None:
        """See `Row.phase_at`. None of one that has no steps left: it may be beside any others."""
        return self.row.phase_at(self.step) if self.step < self.end else None

    @property
    def stale(self) -> bool:
        return self.step < self.end and len(self.told) != len(self.row.told_at(self.step))

    def renew(self) -> None:
        """Have the plan for the step where it stands."""
        if self.stale:
            self._lay_out()

    def _lay_out(self) -> None:
        row = self.row
        self.told = row.told_at(self.step)
        shifts = [one.time_shift for one in self.told]
        further = [one.weight for one in row.further]
        self.plan = Plan(
            row.schedule, shifts, row.guidance, row.guidance_rescale, self.noise, row.keep, further
        )

    def advance(self) -> None:
        if self.step < self.end:
            self.noise.done(self.step)
            self.step += 1
