"""The loop: rows of latents, advanced together one step at a time.

One tick draws the noise that the rows' schedulers ask for, runs the U-Net on all of them and does the
arithmetic around it. Between two ticks rows join and leave, and what goes on moves to another bucket.

With step caching, one tick in so many runs the whole U-Net, and the others its outer part alone. All rows of
a tick do the same, so rows that share ticks are in one phase: no row's picture depends on those beside it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch

from sdfast.arithmetic import Arithmetic, Buffers, Capacity, arithmetic_for
from sdfast.bucket import Bucket, Buckets, StepNetwork
from sdfast.errors import NumericalError
from sdfast.row import Member, Row


class Rows:
    """Rows of one picture size, stepping together on one engine; others may join and leave between ticks.

    Their prompts are of one length, and those that have steps left are in one phase of step caching.

    Between two changes they have a bucket of just their capacity, and a tick is the bucket's. At a change
    every row's registers move to the next bucket, where it goes on from its own step with its own noise.

    Rows with guidance come first in the registers, so that the U-Net's batch is [negatives; positives] as in
    diffusers, with further guides between; `latents` gives them back in the caller's order.
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
        self._places: list[list[int]] = []  # each one's rows of the U-Net
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
        for member, places in zip(self._placed, self._places, strict=True):
            for place, told in zip(places, member.told, strict=True):
                context = told.later.get(member.step) if member.step < member.end else None
                if context is not None:
                    bucket.context[place] = context

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
        for i, (member, places) in enumerate(zip(self._placed, self._places, strict=True)):
            member.registers, member.deep = self._bucket.arithmetic.registers(i), None
            if self._bucket.deep is not None and member.between:
                member.deep = self._bucket.deep[places]
        if not discard:
            self._buckets.give(self._key, self._bucket)
        self._bucket, self._placed, self._places = None, [], []

    def _place(self) -> None:
        for member in self._members:
            member.renew()
        self._order = sorted(range(len(self._members)), key=lambda i: -len(self._members[i].told))
        self._caller_order = torch.tensor(np.argsort(self._order), device=self._engine.device)
        placed = [self._members[i] for i in self._order]
        capacity, first = Capacity.of([m.plan for m in placed]), placed[0].row
        cached = any(m.row.cache_interval > 1 for m in placed)
        self._key = (capacity, *self._size, len(first.positive.context), self._chosen, cached)
        bucket = self._buckets.take(
            self._key, lambda: Bucket.make(self._engine, first, capacity, *self._size, self._chosen, cached)
        )
        steps = [m.step for m in placed]
        places = [capacity.places(i) for i in range(len(placed))]
        for member, own in zip(placed, places, strict=True):
            for place, told in zip(own, member.told, strict=True):
                bucket.context[place] = told.context_at(member.step)
                if bucket.image_context is not None and told.image is not None:
                    bucket.image_context[place] = told.image
                if told.beside is not None:
                    bucket.buffers.sample[place, -len(told.beside) :] = told.beside
                if bucket.control is not None and member.row.control is not None:
                    bucket.control[place] = member.row.control
            if bucket.deep is not None and member.deep is not None:
                bucket.deep[own] = member.deep[-len(own) :]  # the positive's alone, where guidance has ended
        bucket.arithmetic.place([m.plan for m in placed], steps, [m.registers for m in placed])
        bucket.arithmetic.prepare(steps)
        self._bucket, self._placed, self._places = bucket, placed, places


def _phases(members: Iterable[Member]) -> set[tuple[int, int]]:
    return {member.phase for member in members if member.phase is not None}


def check_finite(latents: torch.Tensor) -> None:
    """Raises `NumericalError` when some of the latents is not a finite number."""
    if not math.isfinite(float(latents.sum())):  # so when all are, up to some 1e33
        raise NumericalError(
            "the latents are not finite numbers: the networks overflowed; "
            "export the engine in fp32, or lower the guidance scale"
        )
