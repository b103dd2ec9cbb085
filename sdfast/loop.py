"""The loop: rows of latents, advanced together one step at a time.

A row is one picture being denoised. What distinguishes rows (scheduler, step count, guidance, prompt, seed)
is data, so the loop knows no scheduler. One tick draws the noise that schedulers ask for, runs the U-Net on
all rows and does the arithmetic around it (`arithmetic.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sdfast.arithmetic import Arithmetic, Buffers, Plan, arithmetic_for
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

    def __init__(
        self,
        engine: StepNetwork,
        rows: Sequence[Row],
        height: int,
        width: int,
        arithmetic: Callable[[Sequence[Plan], Buffers], Arithmetic] | None = None,
    ) -> None:
        """`arithmetic`: by default the faster one on the engine's device."""
        guided = [i for i, row in enumerate(rows) if row.negative is not None]
        plain = [i for i, row in enumerate(rows) if row.negative is None]
        self.order = guided + plain
        self.rows = [rows[i] for i in self.order]
        self.step = [0] * len(rows)
        self._ends = [len(row.schedule) for row in self.rows]
        self._draws = [[*row.schedule.draws_noise.tolist(), False] for row in self.rows]
        self._caller_order = torch.tensor(np.argsort(self.order), device=engine.device)
        told = [row.negative for row in self.rows if row.negative is not None]
        told += [row.positive for row in self.rows]
        buffers, context = _place(engine, told, self.rows[0].latents.shape, height, width)
        self._arithmetic = (arithmetic or arithmetic_for(engine.device))([*map(_plan, self.rows)], buffers)
        self._noise = self._arithmetic.noise.unbind()
        self._run_unet = engine.bind(
            "unet",
            {"sample": buffers.sample, "time_shift": buffers.time_shift, "context": context},
            {"output": buffers.output},
            height,
            width,
        )
        self._arithmetic.latents.copy_(torch.stack([row.latents for row in self.rows]))
        self._arithmetic.prepare(self.step)

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
        self._draw_noise()
        self._run_unet()
        self._arithmetic.advance(self.step)
        self.step = [k + (k < end) for k, end in zip(self.step, self._ends, strict=True)]

    def check(self) -> None:
        """Raises `NumericalError` when some latent is not a finite number."""
        if not math.isfinite(float(self._arithmetic.latents.sum())):  # so when all are, up to some 1e33
            raise NumericalError(
                "the latents are not finite numbers: the networks overflowed; "
                "export the engine in fp32, or lower the guidance scale"
            )

    def _draw_noise(self) -> None:
        for i, k in enumerate(self.step):
            if self._draws[i][k]:
                self._noise[i].copy_(self.rows[i].noise(k))


def _plan(row: Row) -> Plan:
    told = [row.positive] if row.negative is None else [row.negative, row.positive]
    return Plan(row.schedule, [c.time_shift for c in told], row.guidance, row.guidance_rescale)


def _place(
    engine: StepNetwork, told: Sequence[Conditioning], latent_shape: Sequence[int], height: int, width: int
) -> tuple[Buffers, torch.Tensor]:
    """The U-Net's inputs and output on the device: buffers, and the contexts [B, L, KV]."""
    unet_rows = engine.rows("unet", len(told), height, width)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(unet_rows, *shape, device=engine.device, dtype=engine.dtype)

    context = zeros(*told[0].context.shape)
    for i, conditioning in enumerate(told):
        context[i] = conditioning.context
    return Buffers(zeros(*latent_shape), zeros(*latent_shape), zeros(told[0].time_shift.shape[1])), context
