"""The loop: rows of latents, advanced together one step at a time.

A row is one picture being denoised. What distinguishes rows (scheduler, step count, guidance, prompt, seed)
is data, so the loop knows no scheduler. One tick draws the noise that schedulers ask for, runs the U-Net on
all rows and does the arithmetic around it (`arithmetic/`). On CUDA a tick is one graph.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sdfast.arithmetic import Arithmetic, Buffers, Capacity, Noise, Plan, arithmetic_for
from sdfast.errors import NumericalError
from sdfast.graph import Graph
from sdfast.schedulers import Schedule


class StepNetwork(Protocol):
    """What the loop needs of an engine."""

    device: torch.device
    dtype: torch.dtype

    @property
    def capturable(self) -> bool: ...

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


@dataclass(frozen=True)
class Bucket:
    """The tensors of as many rows of one size as a U-Net call has, and the tick that works on them.

    context: [B, L, KV]. One set of rows at a time; others of the same capacity may follow.
    """

    buffers: Buffers
    context: torch.Tensor
    arithmetic: Arithmetic
    tick: Callable[[], None]

    @classmethod
    def make(
        cls,
        engine: StepNetwork,
        like: Row,
        capacity: Capacity,
        height: int,
        width: int,
        arithmetic: Callable[[Buffers, Capacity], Arithmetic],
    ) -> "Bucket":
        """On the engine's device. like: a row, for the shapes of what it is told."""
        rows = engine.rows("unet", capacity.rows + capacity.guided, height, width)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(rows, *shape, device=engine.device, dtype=engine.dtype)

        latents, told = like.latents.shape, like.positive
        buffers = Buffers(zeros(*latents), zeros(*latents), zeros(told.time_shift.shape[1]))
        context = zeros(*told.context.shape)
        inputs = {"sample": buffers.sample, "time_shift": buffers.time_shift, "context": context}
        run_unet = engine.bind("unet", inputs, {"output": buffers.output}, height, width)
        worker = arithmetic(buffers, capacity)
        return cls(buffers, context, worker, _tick(engine, run_unet, worker))


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

    def give(self, key: tuple[object, ...], bucket: Bucket) -> None:
        with self._lock:
            self._free.setdefault(key, []).append(bucket)
            self._free.move_to_end(key)
            while sum(map(len, self._free.values())) > self._most:
                oldest = next(iter(self._free))
                self._free[oldest].pop()
                if not self._free[oldest]:
                    del self._free[oldest]


class Rows:
    """Rows of one picture size, stepping together on one engine.

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
        tensors from, and to leave them with `close`."""
        guided = [i for i, row in enumerate(rows) if row.negative is not None]
        plain = [i for i, row in enumerate(rows) if row.negative is None]
        self.order = guided + plain
        self.rows = [rows[i] for i in self.order]
        self.step = [0] * len(rows)
        self._ends = [len(row.schedule) for row in self.rows]
        self._caller_order = torch.tensor(np.argsort(self.order), device=engine.device)
        plans = [*map(_plan, self.rows)]
        capacity, chosen = Capacity.of(plans), arithmetic or arithmetic_for(engine.device)
        self._buckets, self._key = buckets or Buckets(), (capacity, height, width, chosen)
        self._bucket = self._buckets.take(
            self._key, lambda: Bucket.make(engine, self.rows[0], capacity, height, width, chosen)
        )
        self._arithmetic = self._bucket.arithmetic
        told = [row.negative for row in self.rows if row.negative is not None]
        for i, conditioning in enumerate([*told, *(row.positive for row in self.rows)]):
            self._bucket.context[i] = conditioning.context
        self._arithmetic.place(plans)
        self._arithmetic.latents.copy_(torch.stack([row.latents for row in self.rows]))
        self._arithmetic.prepare(self.step)

    def close(self) -> None:
        """Leave the tensors to the next rows; these are not to be used any more."""
        self._buckets.give(self._key, self._bucket)

    @property
    def active(self) -> bool:
        """Whether some row has steps left."""
        return self.step != self._ends

    @property
    def latents(self) -> torch.Tensor:
        """The current latents in the caller's order, [n, C, h, w] float32."""
        return self._arithmetic.latents[self._caller_order]

    @latents.setter
    def latents(self, value: torch.Tensor) -> None:
        self._arithmetic.latents.copy_(value[self.order])
        self._arithmetic.prepare(self.step)

    def tick(self) -> None:
        """Advance every row by one step. A row that has no steps left keeps its latents."""
        self._arithmetic.feed(self.step)
        self._bucket.tick()
        self.step = [k + (k < end) for k, end in zip(self.step, self._ends, strict=True)]

    def check(self) -> None:
        """Raises `NumericalError` when some latent is not a finite number."""
        if not math.isfinite(float(self._arithmetic.latents.sum())):  # so when all are, up to some 1e33
            raise NumericalError(
                "the latents are not finite numbers: the networks overflowed; "
                "export the engine in fp32, or lower the guidance scale"
            )


def _plan(row: Row) -> Plan:
    told = [row.positive] if row.negative is None else [row.negative, row.positive]
    return Plan(row.schedule, [c.time_shift for c in told], row.guidance, row.guidance_rescale, row.noise)
