"""The clock of kernels: the time of one call, without what the host takes to launch it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sdfast.backends import clock
from sdfast.backends.clock import CALLS, RUNS, WARM_UP, clock_of, milliseconds

CUDA = torch.device("cuda", 0)


def test_on_a_processor_it_is_the_median_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    ticks = iter([0.0, 5.0] * 4 + [0.0, 0.002] * 10)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    assert clock_of(torch.device("cpu"))(lambda: calls.append(1)) == pytest.approx(2.0)
    assert len(calls) == WARM_UP + RUNS == 14


class FakeCuda:
    """A device on which a kernel takes 0.02 ms, and a launch by the host 1 ms."""

    def __init__(self, patch: pytest.MonkeyPatch, *, captures: bool = True) -> None:
        self.now, self.capturing, self.captures = 0.0, False, captures
        self.launched, self.reset = 0, 0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Graph:
            kernels = 0

            def replay(self) -> None:
                fake.now += 0.02 * self.kernels

            def reset(self) -> None:
                fake.reset += 1

        class Stream:
            def wait_stream(self, other: object) -> None:
                """Nothing runs beside."""

        @contextmanager
        def graph(into: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            fake.capturing, before = True, fake.launched
            try:
                yield
            finally:
                fake.capturing = False
            into.kernels = fake.launched - before

        @contextmanager
        def entered(_: object) -> Iterator[None]:
            yield

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "graph": graph,
            "stream": entered,
            "device": entered,
            "current_stream": Stream,
            "synchronize": lambda: None,
        }.items():
            patch.setattr(torch.cuda, name, value)

    def kernel(self) -> None:
        if self.capturing and not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.launched += 1
        self.now += 0.0 if self.capturing else 1.02


def test_on_cuda_the_host_has_no_share_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are captured as a graph after those that warm up; what is told is a call's share of it."""
    cuda = FakeCuda(monkeypatch)
    assert milliseconds(cuda.kernel, CUDA) == pytest.approx(0.02)
    assert (cuda.launched, cuda.reset) == (WARM_UP + CALLS, 1)


def test_what_cannot_be_captured_is_timed_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, captures=False)
    assert milliseconds(cuda.kernel, CUDA) == pytest.approx(1.02)
    assert cuda.launched == WARM_UP + RUNS


def test_what_does_not_run_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)

    def broken() -> None:
        raise RuntimeError("no kernel for this shape")

    with pytest.raises(RuntimeError, match="no kernel for this shape"):
        milliseconds(broken, CUDA)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_small_kernel_takes_microseconds_on_a_gpu() -> None:
    x = torch.zeros(1024, device=CUDA)
    assert 0 < milliseconds(lambda: x + 1, CUDA) < 0.02
