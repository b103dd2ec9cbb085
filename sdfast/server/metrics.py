"""What Prometheus may know: requests, latencies, the queue, the rows, failures."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sdfast.server.jobs import Studio

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


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
        queue = Gauge("sdfast_queue_length", "Jobs that wait.", registry=self._registry)
        queue.set_function(studio.waiting)
        rows = Gauge("sdfast_running_rows", "Rows that are being denoised.", registry=self._registry)
        rows.set_function(studio.running)

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
