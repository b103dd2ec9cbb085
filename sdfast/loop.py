"""The loop: rows of latents, advanced together one step at a time.

A row is one picture being denoised. What distinguishes rows (scheduler, step count, guidance, prompt, seed)
is data, so the loop knows no scheduler. One tick draws the noise that schedulers ask for, runs the U-Net on
all rows and does the arithmetic around it (`arithmetic/`). On CUDA a tick is one graph.

With step caching, one tick in so many runs the whole U-Net, and the others its outer part alone. All rows of
a tick do the same, so rows that share ticks are in one phase: no row's picture depends on those beside it.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from sdfast.arithmetic import Arithmetic, Buffers, Capacity, Keep, Noise, Plan, arithmetic_for
from sdfast.errors import NumericalError
from sdfast.graph import Graph
from sdfast.manifest import SHALLOW, StepCache
from sdfast.schedulers import Schedule


class StepNetwork(Protocol):
    """What the loop needs of an engine."""

    device: torch.device
    dtype: torch.dtype

    @property
    def step_cache(self) -> StepCache | None: ...

    @property
    def capturable(self) -> bool: ...

    def rows(
        self,
        name: str,
        batch: int,
        height: int | None = None,
        width: int | None = None,
        tokens: int | None = None,
    ) -> int: ...

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
    later: contexts of the same shape that take its place, each from its step on, in the order of the steps.
    """

    context: torch.Tensor
    time_shift: torch.Tensor
    later: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def context_at(self, step: int) -> torch.Tensor:
        """The context of a step."""
        starts = [start for start in self.later if start <= step]
        return self.later[starts[-1]] if starts else self.context


@dataclass(frozen=True, eq=False)
class Row:
    """One picture to be denoised; two rows are the same only if they are one object.

    latents: the first ones, [C, h, w] float32, scaled by the schedule's `init_noise_sigma`.
    guided: the steps in which it is guided away from its negative, if it has one; default: all.
    noise: unit noise for the steps that draw some. keep: what it keeps of an image that it is drawn over.
    beside: what an inpainting U-Net is told beside the latents, [E, h, w]. control: the embedded control
    image of a ControlNet, [C_0, h, w]; every row of an engine has one, or none has. cache_interval: N, where
    the steps 0, N, 2N, … run the whole U-Net and the others are shallow; above 1 on engines with a step cache
    alone, and only if guidance, where there is some, begins with the first step.
    """

    schedule: Schedule
    latents: torch.Tensor
    positive: Conditioning
    negative: Conditioning | None
    guidance: float
    noise: Noise
    guidance_rescale: float = 0.0
    keep: Keep | None = None
    beside: torch.Tensor | None = None
    control: torch.Tensor | None = None
    guided: range | None = None
    cache_interval: int = 1

    def __post_init__(self) -> None:
        late = self.negative is not None and self.guided and self.guided.start > 0
        if self.cache_interval > 1 and late:
            raise ValueError("a row whose steps are cached is guided from the first step on, or not at all")

    def phase_at(self, step: int) -> tuple[int, int]:
        """What rows that share ticks have in common: the interval, and the step's place in it."""
        return self.cache_interval, step % self.cache_interval

    def told_at(self, step: int) -> list[Conditioning]:
        """What its U-Net rows are told at a step: the negative's first, where it is guided."""
        if self.negative is None or (self.guided is not None and step not in self.guided):
            return [self.positive]
        return [self.negative, self.positive]


@dataclass(frozen=True)
class Bucket:
    """The tensors of as many rows of one size as a U-Net call has, and the tick that works on them.

    context: [B, L, KV]. control: [B, C_0, h, w], where there is a ControlNet. deep: [B, C_d, h_d, w_d], what
    a whole tick leaves for shallow ones, on engines with a step cache. shallow_tick: for rows that have some.
    One set of rows at a time; others of the same capacity may follow.
    """

    buffers: Buffers
    context: torch.Tensor
    arithmetic: Arithmetic
    tick: Callable[[], None]
    control: torch.Tensor | None = None
    deep: torch.Tensor | None = None
    shallow_tick: Callable[[], None] | None = None

    @classmethod
    def make(
        cls,
        engine: StepNetwork,
        like: Row,
        capacity: Capacity,
        height: int,
        width: int,
        arithmetic: Callable[[Buffers, Capacity], Arithmetic],
        cached: bool = False,
    ) -> "Bucket":
        """On the engine's device. like: a row, for the shapes. cached: with a shallow tick."""
        tokens = len(like.positive.context)
        rows = engine.rows("unet", capacity.rows + capacity.guided, height, width, tokens)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(rows, *shape, device=engine.device, dtype=engine.dtype)

        (channels, *size), told = like.latents.shape, like.positive
        more = 0 if like.beside is None else len(like.beside)
        sample, output = zeros(channels + more, *size), zeros(channels, *size)
        buffers = Buffers(sample, output, zeros(told.time_shift.shape[1]))
        context = zeros(*told.context.shape)
        inputs = {"sample": buffers.sample, "time_shift": buffers.time_shift, "context": context}
        control = None if like.control is None else zeros(*like.control.shape)
        if control is not None:
            inputs["control"] = control
        result = {"output": buffers.output}
        worker, cache = arithmetic(buffers, capacity), engine.step_cache
        if cache is None:
            run_unet = engine.bind("unet", inputs, result, height, width)
            return cls(buffers, context, worker, _tick(engine, run_unet, worker), control)
        deep = zeros(*cache.shape(*size))
        run_unet = engine.bind("unet", inputs, {**result, "deep": deep}, height, width)
        tick, shallow_tick = _tick(engine, run_unet, worker), None
        if cached:
            run_shallow = engine.bind(SHALLOW, {**inputs, "deep": deep}, result, height, width)
            shallow_tick = _tick(engine, run_shallow, worker)
        return cls(buffers, context, worker, tick, control, deep, shallow_tick)

    def tick_at(self, place: int) -> Callable[[], None]:
        """The tick of rows at that place in their interval of step caching."""
        if place == 0:
            return self.tick
        if self.shallow_tick is None:
            raise ValueError("rows whose steps are cached need an engine with a cache branch")
        return self.shallow_tick


def _tick(engine: StepNetwork, run_unet: Callable[[], None], arithmetic: Arithmetic) -> Callable[[], None]:
    """The U-Net, then the arithmetic; on CUDA as one graph, or what of it can be in one."""

    def whole() -> None:
        run_unet()
        arithmetic.advance()

    if engine.device.type != "cuda":
        return whole
    if engine.capturable:
        return Graph(whole, engine.device)
    advance = Graph(arithmetic.advance, engine.device)

    def apart() -> None:
        run_unet()
        advance()

    return apart


class Buckets:
    """Buckets of one engine that wait for their next rows, the most recent ones."""

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._free: OrderedDict[tuple[object, ...], list[Bucket]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: tuple[object, ...], make: Callable[[], Bucket]) -> Bucket:
        """A bucket that nobody uses; it is the caller's until `give`."""
        with self._lock:
            waiting = self._free.pop(key, [])
            if waiting:
                bucket = waiting.pop()
                if waiting:
                    self._free[key] = waiting
                return bucket
        return make()

    def clear(self) -> None:
        """Let go of all that wait, for the memory that they hold."""
        with self._lock:
            self._free.clear()

    def give(self, key: tuple[object, ...], bucket: Bucket) -> None:
        with self._lock:
            self._free.setdefault(key, []).append(bucket)
            self._free.move_to_end(key)
            while sum(map(len, self._free.values())) > self._most:
                oldest = next(iter(self._free))
                self._free[oldest].pop()
                if not self._free[oldest]:
                    del self._free[oldest]


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
        self.plan = Plan(row.schedule, shifts, row.guidance, row.guidance_rescale, self.noise, row.keep)

    def advance(self) -> None:
        if self.step < self.end:
            self.noise.done(self.step)
            self.step += 1


class Rows:
    """Rows of one picture size, stepping together on one engine; others may join and leave between ticks.

    Their prompts are of one length, and those that have steps left are in one phase of step caching.

    Between two changes they have a bucket of just their capacity, and a tick is the bucket's. At a change
    every row's registers move to the next bucket, where it goes on from its own step with its own noise.

    Rows with guidance come first in the registers, so that the U-Net's batch is [negatives; positives] as in
    diffusers; `latents` gives them back in the caller's order.
    """

    def __init__(
        self,
        engine: StepNetwork,
        rows: Sequence[Row],
        height: int,
        width: int,
        arithmetic: Callable[[Buffers, Capacity], Arithmetic] | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        """`arithmetic`: by default the faster one on the engine's device. `buckets`: where to take the
        tensors from, and to leave them."""
        self._engine, self._size = engine, (height, width)
        self._chosen = arithmetic or arithmetic_for(engine.device)
        self._buckets = buckets or Buckets()
        self._bucket: Bucket | None = None
        self._key: tuple[object, ...] = ()
        self._members: list[Member] = []  # in the caller's order
        self._placed: list[Member] = []  # in that of the registers
        self.change(joining=rows)

    def change(
        self, joining: Sequence[Row | Member] = (), leaving: Collection[Row] = (), *, discard: bool = False
    ) -> None:
        """Rows join at their first step, or as members that left at another; and leave at any.

        discard: do not use the present tensors again, after a tick that failed. When there is no memory for
        the rows that join, the others are kept, and are placed by the next change without those.

        Raises `ValueError` for rows of another phase than those that stay, or than one another.
        """
        joined = [m if isinstance(m, Member) else Member(m) for m in joining]
        members = [m for m in self._members if m.row not in leaving] + joined
        if len(_phases(members)) > 1:
            raise ValueError(f"rows of different phases of step caching: {sorted(_phases(members))}")
        self._rest(discard)
        self._members = members
        if self._members:
            self._place()

    def close(self) -> None:
        """Leave the tensors to the next rows; these are not to be used any more."""
        self.change(leaving=[m.row for m in self._members])

    @property
    def active(self) -> bool:
        """Whether some row has steps left."""
        return any(m.step < m.end for m in self._members)

    def phase_without(self, leaving: Collection[Row]) -> tuple[int, int] | None:
        """`Row.phase_at` of the rows that have steps left, without these; None where there are none."""
        return next(iter(_phases(m for m in self._members if m.row not in leaving)), None)

    @property
    def rows(self) -> list[Row]:
        """All rows, in the caller's order."""
        return [m.row for m in self._members]

    @property
    def steps(self) -> dict[Row, int]:
        """How many steps each row has done."""
        return {m.row: m.step for m in self._members}

    def member(self, row: Row) -> Member:
        """What a row needs to go on, from the change on in which it leaves."""
        return next(m for m in self._members if m.row is row)

    @property
    def finished(self) -> list[Row]:
        """The rows that have no steps left."""
        return [m.row for m in self._members if m.step == m.end]

    @property
    def latents(self) -> torch.Tensor:
        """The current latents in the caller's order, [n, C, h, w] float32."""
        return self._arithmetic.latents[self._caller_order]

    @latents.setter
    def latents(self, value: torch.Tensor) -> None:
        self._arithmetic.latents.copy_(value[self._order])
        self._arithmetic.prepare([m.step for m in self._placed])

    def latents_of(self, row: Row) -> torch.Tensor:
        """A copy of one row's current latents, [C, h, w] float32."""
        return self._arithmetic.latents[self._index(row)].clone()

    def output_of(self, row: Row) -> torch.Tensor:
        """A copy of the guided model output of a row's last step, [C, h, w] float32."""
        return self._arithmetic.output(self._index(row)).clone()

    def tick(self) -> None:
        """Advance every row by one step. A row that has no steps left keeps its latents.

        Where a row's guidance begins or ends, all of them move to another bucket first.
        """
        if not self._members:
            return
        if any(m.stale for m in self._members):
            self.change()
        self._edit(self._occupied)
        self._arithmetic.feed([m.step for m in self._placed])
        self._occupied.tick_at(max((place for _, place in _phases(self._placed)), default=0))()
        for member in self._placed:
            member.advance()

    def _edit(self, bucket: Bucket) -> None:
        """Give the rows whose prompts change before the next step their new contexts."""
        for i, (member, part) in enumerate(_own_rows(self._placed)):
            told = member.told[part]
            context = told.later.get(member.step) if member.step < member.end else None
            if context is not None:
                bucket.context[i] = context

    def check(self) -> None:
        """Raises `NumericalError` when some latent is not a finite number."""
        check_finite(self._arithmetic.latents)

    @property
    def _occupied(self) -> Bucket:
        if self._bucket is None:
            raise RuntimeError("no rows are placed: there are none, or the last change failed")
        return self._bucket

    @property
    def _arithmetic(self) -> Arithmetic:
        return self._occupied.arithmetic

    def _index(self, row: Row) -> int:
        """A row's place in the registers."""
        return [m.row for m in self._placed].index(row)

    def _rest(self, discard: bool) -> None:
        """Take every row's registers out of the bucket, and leave that to others."""
        if self._bucket is None:
            return
        guided = sum(member.plan.guided for member in self._placed)
        for i, member in enumerate(self._placed):
            member.registers, member.deep = self._bucket.arithmetic.registers(i), None
            if self._bucket.deep is not None and member.between:
                own = slice(i if member.plan.guided else guided + i, guided + i + 1, guided or 1)
                member.deep = self._bucket.deep[own].clone()
        if not discard:
            self._buckets.give(self._key, self._bucket)
        self._bucket, self._placed = None, []

    def _place(self) -> None:
        for member in self._members:
            member.renew()
        self._order = sorted(range(len(self._members)), key=lambda i: not self._members[i].plan.guided)
        self._caller_order = torch.tensor(np.argsort(self._order), device=self._engine.device)
        placed = [self._members[i] for i in self._order]
        capacity, first = Capacity.of([m.plan for m in placed]), placed[0].row
        cached = any(m.row.cache_interval > 1 for m in placed)
        self._key = (capacity, *self._size, len(first.positive.context), self._chosen, cached)
        bucket = self._buckets.take(
            self._key, lambda: Bucket.make(self._engine, first, capacity, *self._size, self._chosen, cached)
        )
        steps = [m.step for m in placed]
        for i, (member, part) in enumerate(_own_rows(placed)):
            row = member.row
            bucket.context[i] = member.told[part].context_at(member.step)
            if row.beside is not None:
                bucket.buffers.sample[i, -len(row.beside) :] = row.beside
            if bucket.control is not None and row.control is not None:
                bucket.control[i] = row.control
            if bucket.deep is not None and member.deep is not None:
                bucket.deep[i] = member.deep[part]
        bucket.arithmetic.place([m.plan for m in placed], steps, [m.registers for m in placed])
        bucket.arithmetic.prepare(steps)
        self._bucket, self._placed = bucket, placed


def _own_rows(placed: Sequence[Member]) -> list[tuple[Member, int]]:
    """Whose each of the U-Net's rows is, the negatives first; and which part of what that is told."""
    return [*((m, 0) for m in placed if m.plan.guided), *((m, -1) for m in placed)]


def _phases(members: Iterable[Member]) -> set[tuple[int, int]]:
    return {member.phase for member in members if member.phase is not None}


def check_finite(latents: torch.Tensor) -> None:
    """Raises `NumericalError` when some of the latents is not a finite number."""
    if not math.isfinite(float(latents.sum())):  # so when all are, up to some 1e33
        raise NumericalError(
            "the latents are not finite numbers: the networks overflowed; "
            "export the engine in fp32, or lower the guidance scale"
        )
