"""The arithmetic of a tick beside the U-Net: torch's operations, the same compiled, and the own kernels."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import random_weights
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.document import one_line
from benchmarks.gpu.work import unet_on_meta
from benchmarks.gpu.workloads import GUIDANCE, SCHEDULER, Workload
from sdfast import kernels
from sdfast.arithmetic import Buffers, Capacity, DeviceArithmetic, Plan
from sdfast.backends.clock import milliseconds
from sdfast.export.quiet import quiet_compiler
from sdfast.schedulers import schedule

STEP = 1  # where the rows stand: the first at which a multistep solver has a history

Make = Callable[[Buffers, Capacity], DeviceArithmetic]


def measure(bench: Bench, batch: int) -> dict[str, Any]:
    """A row for each way: milliseconds of one `advance`, and how far its latents are from torch's.

    The rows are guided, and stand still, so that every call finds them at the same step.
    """
    ways: dict[str, tuple[Make, bool]] = {"torch": (DeviceArithmetic, False)}
    why = kernels.why_none(bench.device)
    if bench.device.type == "cuda":
        ways["compiled"] = (DeviceArithmetic, True)
    if not why:
        from sdfast.arithmetic import FusedArithmetic

        ways["own"] = (FusedArithmetic, False)
    truth: torch.Tensor | None = None
    rows = []
    for name, (make, compiles) in ways.items():
        row: dict[str, Any] = {"side": name, "failed": None, "milliseconds": None, "roofline_share": None}
        try:
            latents, row["milliseconds"] = _one(bench, batch, make, compiles)
            truth = latents if truth is None else truth
            row["difference"] = float((latents - truth).abs().max() / truth.abs().max())
        except Exception as error:  # the other ways go on
            row["failed"] = one_line(error)
        rows.append(row)
    return {"rows": rows, "without_own": why}


@torch.no_grad()
def _one(bench: Bench, batch: int, make: Make, compiles: bool) -> tuple[torch.Tensor, float]:
    """The latents after one step, and what a step takes."""
    arithmetic = _placed(bench.workload, batch, make, bench.device)
    advance: Callable[[], object] = arithmetic.advance
    with quiet_compiler():
        if compiles:
            advance = torch.compile(advance, dynamic=False, mode="max-autotune-no-cudagraphs")
        advance()
        latents = arithmetic.latents.clone()
        arithmetic._stride.zero_()  # or else the rows would run off the end of their tables
        return latents, milliseconds(advance, bench.device)


def _placed(load: Workload, batch: int, make: Make, device: torch.device) -> DeviceArithmetic:
    """Guided rows of random numbers, the same for every way."""
    unet, inputs = unet_on_meta(load.architecture, 2 * batch, load.height, load.width)
    sample, time_shift, _ = inputs
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    buffers = Buffers(
        random(*sample.shape).to(sample.dtype),
        random(len(sample), unet.config.out_channels, *sample.shape[2:]).to(sample.dtype),
        random(*time_shift.shape).to(time_shift.dtype),
    )
    config = random_weights.configs(load.architecture)["scheduler/scheduler_config.json"]
    table = schedule(SCHEDULER, config, num_inference_steps=load.guided[0])
    shifts = [random(len(table), time_shift.shape[1]).to(time_shift.dtype) for _ in range(2)]

    def noise(step: int) -> torch.Tensor:
        raise ValueError(f"{SCHEDULER} draws no noise, and is asked for that of step {step}")

    plans = [Plan(table, shifts, GUIDANCE, 0.0, noise) for _ in range(batch)]
    arithmetic = make(buffers, Capacity.of(plans))
    registers = [random(table.registers, *buffers.output.shape[1:]) for _ in plans]
    arithmetic.place(plans, [STEP] * batch, registers)
    arithmetic.prepare([STEP] * batch)
    arithmetic.feed([STEP] * batch)
    return arithmetic
