"""The kernels of one guided step: a table of those that take longest, and a trace for chrome://tracing."""

from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.measure import finish
from benchmarks.gpu.sides import Side
from benchmarks.gpu.workloads import PROMPT, SEED, Draw, Workload
from sdfast.noise import generator

STEPS, TOP = 4, 25


def one_step(side: Side, workload: Workload, device: torch.device, trace: Path) -> dict[str, Any]:
    """Profile the third step of a run, between the callbacks that end the second and the third.

    That includes what sdfast does for a callback alone: one sum of the latents. On a CPU the operations stand
    in for kernels.
    """
    side.draw(Draw(STEPS, 1, True), "latent")  # nothing is loaded or compiled while the profiler looks
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler = profile(activities=activities)

    def at_step_end(_pipe: Any, k: int, _t: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if k == 1:
            finish(device)
            profiler.start()
        elif k == 2:
            finish(device)
            profiler.stop()
        return {}

    side.pipe(  # type: ignore[attr-defined]
        prompt=PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=Draw(STEPS, 1, True).guidance,
        height=workload.height,
        width=workload.width,
        generator=generator(SEED),
        output_type="latent",
        callback_on_step_end=at_step_end,
    )
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return {"trace": trace.name, **_table(profiler, device)}


def _table(profiler: Any, device: torch.device) -> dict[str, Any]:
    """Kernels by the time that they take, the longest first; microseconds."""
    cuda = device.type == "cuda"
    kind, field = (
        (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    )
    events = [
        event
        for event in profiler.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    events.sort(key=lambda event: getattr(event, field), reverse=True)
    total = sum(getattr(event, field) for event in events)
    return {
        "what": "kernels" if cuda else "operations",
        "launches": sum(event.count for event in events),
        "total_microseconds": total,
        "top": [
            {
                "name": event.key[:200],
                "calls": event.count,
                "microseconds": getattr(event, field),
                "share": getattr(event, field) / total if total else None,
            }
            for event in events[:TOP]
        ],
    }
