"""What Prometheus may know: requests, latencies, failures; of each engine its queue, rows, ticks, memory."""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sdfast.server.jobs import TICK_SECONDS, Load, Studio

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ENGINE = ("engine",)


class Metrics:
    """The numbers of one app, in a registry of its own."""

    def __init__(self, studio: Studio) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "sdfast_requests", "Requests by route and status.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "sdfast_request_seconds",
            "Seconds from a request's head to its answer's end.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = Histogram(
            "sdfast_stage_seconds",
            "Seconds of a finished job in each stage.",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._failures = Counter(
            "sdfast_failures", "Jobs without pictures, by kind.", ("kind",), registry=self._registry
        )
        self._registry.register(_Engines(studio))

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def finished(self, seconds: Mapping[str, float]) -> None:
        for stage, taken in seconds.items():
            self._stages.labels(stage).observe(taken)

    def failed(self, kind: str) -> None:
        self._failures.labels(kind).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engines(Collector):
    """The engines' own numbers, as they are when they are asked for. A new worker counts its ticks anew."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("sdfast_worker_up", "Whether the engine is at work.", labels=_ENGINE)
        restarts = CounterMetricFamily(
            "sdfast_worker_restarts", "Processes of the engine after its first.", labels=_ENGINE
        )
        queue = GaugeMetricFamily("sdfast_queue_length", "Jobs that wait.", labels=_ENGINE)
        rows = GaugeMetricFamily("sdfast_running_rows", "Rows that are being denoised.", labels=_ENGINE)
        steps = GaugeMetricFamily(
            "sdfast_steps", "Network evaluations that are still to be done.", labels=(*_ENGINE, "state")
        )
        ticks = HistogramMetricFamily("sdfast_tick_seconds", "Seconds of the loop's ticks.", labels=_ENGINE)
        memory = GaugeMetricFamily(
            "sdfast_device_memory_bytes", "What the engine has taken.", labels=(*_ENGINE, "kind")
        )
        for name, engine in self._studio.statistics().items():
            load = engine.load
            up.add_metric((name,), engine.up)
            restarts.add_metric((name,), engine.restarts)
            queue.add_metric((name,), engine.waiting)
            rows.add_metric((name,), load.rows)
            steps.add_metric((name, "waiting"), load.waiting_steps)
            steps.add_metric((name, "running"), load.running_steps)
            ticks.add_metric((name,), _buckets(load), load.tick_seconds)
            for kind, size in load.memory.items():
                memory.add_metric((name, kind), size)
        yield from (up, restarts, queue, rows, steps, ticks, memory)


def _buckets(load: Load) -> list[tuple[str, float]]:
    """How many ticks took up to each bound, as Prometheus counts: those of the bounds below included."""
    bounds = [*map(floatToGoString, TICK_SECONDS), "+Inf"]
    return list(zip(bounds, accumulate(map(float, load.ticks)), strict=True))
