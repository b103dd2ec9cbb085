"""The tensors that rows are in while they are drawn, and the tick that works on them.

A tick runs the U-Net on all rows and does the arithmetic around it (`arithmetic/`). On CUDA it is one graph.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from sdfast.arithmetic import Arithmetic, Buffers, Capacity
from sdfast.graph import Graph
from sdfast.manifest import SHALLOW, StepCache
from sdfast.row import Row


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
class Bucket:
    """The tensors of as many rows of one size as a U-Net call has, and the tick that works on them.

    context: [B, L, KV]. image_context: [B, I, KV], where there are IP-Adapters. control: [B, C_0, h, w],
    where there is a ControlNet. deep: [B, C_d, h_d, w_d], what a whole tick leaves for shallow ones, on
    engines with a step cache. shallow_tick: for rows that have some.
    One set of rows at a time; others of the same capacity may follow.
    """

    buffers: Buffers
    context: torch.Tensor
    arithmetic: Arithmetic
    tick: Callable[[], None]
    control: torch.Tensor | None = None
    image_context: torch.Tensor | None = None
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
        rows = engine.rows("unet", capacity.unet_rows, height, width, tokens)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(rows, *shape, device=engine.device, dtype=engine.dtype)

        (channels, *size), told = like.latents.shape, like.positive
        more = 0 if told.beside is None else len(told.beside)
        sample, output = zeros(channels + more, *size), zeros(channels, *size)
        buffers = Buffers(sample, output, zeros(told.time_shift.shape[1]))
        context = zeros(*told.context.shape)
        inputs = {"sample": buffers.sample, "time_shift": buffers.time_shift, "context": context}
        control = None if like.control is None else zeros(*like.control.shape)
        if control is not None:
            inputs["control"] = control
        image = None if told.image is None else zeros(*told.image.shape)
        if image is not None:
            inputs["image_context"] = image
        result = {"output": buffers.output}
        worker, cache = arithmetic(buffers, capacity), engine.step_cache
        if cache is None:
            run_unet = engine.bind("unet", inputs, result, height, width)
            return cls(buffers, context, worker, _tick(engine, run_unet, worker), control, image)
        deep = zeros(*cache.shape(*size))
        run_unet = engine.bind("unet", inputs, {**result, "deep": deep}, height, width)
        tick, shallow_tick = _tick(engine, run_unet, worker), None
        if cached:
            run_shallow = engine.bind(SHALLOW, {**inputs, "deep": deep}, result, height, width)
            shallow_tick = _tick(engine, run_shallow, worker)
        return cls(buffers, context, worker, tick, control, image, deep, shallow_tick)

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
