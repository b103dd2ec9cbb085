"""How long a kernel takes: milliseconds of one call, on the device's own clock.

A kernel of tens of microseconds ends before the host has launched the next. So on CUDA several calls are
captured as one graph, which is launched once; events around its replays then see the kernels alone.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP, RUNS = 3, 11
CALLS = 10  # of a graph

Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Milliseconds that a call takes."""


def clock_of(device: torch.device) -> Clock:
    """The clock of kernels on `device`."""
    return lambda run: milliseconds(run, device)


def milliseconds(run: Run, device: torch.device) -> float:
    """The median of several calls of `run`, after some that warm up.

    What cannot be captured, such as a kernel that asks something of the device, is timed call by call.
    """
    if device.type == "cpu":
        return float(statistics.median(_wall(run) for _ in range(WARM_UP + RUNS)))
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
            torch.cuda.synchronize()
            graph = _captured(run, stream)
            if graph is None:
                return _median(run)
            graph.replay()
            time_of_graph = _median(graph.replay)
            graph.reset()
        return time_of_graph / CALLS


def _captured(run: Run, stream: Any) -> torch.cuda.CUDAGraph | None:
    """`CALLS` calls as a graph; None where they cannot be one."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads of a server allocate in the meantime, which the default would not allow.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                run()
    except RuntimeError:
        return None
    return graph


def _median(work: Run) -> float:
    """Milliseconds of one of several runs, by events on the current stream."""
    events = [(_event(), _event()) for _ in range(RUNS)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events))


def _wall(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
