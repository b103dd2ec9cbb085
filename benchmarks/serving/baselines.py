"""Ways of serving without joining at every step, as studios behind sdfast's HTTP layer.

`one_at_a_time` is the stock pipeline, a call for each request. The other two draw with an sdfast engine, but
batch whole requests: the batch is begun together, and answered when its longest request is done.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdfast.bucket import Buckets
from sdfast.engine import Engine
from sdfast.infotext import infotext_of, png
from sdfast.loop import Rows
from sdfast.pipeline import Pipeline, to_uint8
from sdfast.row import Row
from sdfast.server.jobs import Done, EngineInfo, Event, Job, Load, Statistics
from sdfast.server.worker.opening import warm_up

Draw = Callable[[Sequence[Job]], Sequence[Image.Image]]
Fits = Callable[[Job, Job], bool]


class Batches:
    """A studio that takes jobs of one picture from the head of its queue, as many as fit, and draws them."""

    def __init__(
        self, info: EngineInfo, most: int, fits: Fits, open: Callable[[], tuple[Pipeline, Draw]]
    ) -> None:
        """most: jobs in a batch. fits: whether a job may be in the batch that another one began.
        open: called in the thread that draws, which alone may compute: see `Batcher`.
        """
        self.engines: Mapping[str, EngineInfo] = {info.name: info}
        self.ready = False
        self._most, self._fits, self._open = most, fits, open
        self._changed = threading.Condition()
        self._queue: deque[tuple[Job, Callable[[Event], None]]] = deque()
        self._running = 0
        threading.Thread(target=self._main, daemon=True).start()

    def submit(self, job: Job) -> AsyncIterator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        with self._changed:
            self._queue.append((job, lambda event: loop.call_soon_threadsafe(events.put_nowait, event)))
            self._changed.notify()

        async def told() -> AsyncIterator[Event]:
            yield await events.get()  # there is but one, the last

        return told()

    def cancel(self, job_id: str) -> bool:
        return False  # nobody leaves in this benchmark

    def preview(self, job_id: str) -> bool:
        return False

    def waiting(self) -> int:
        return len(self._queue)

    def running(self) -> int:
        return self._running

    def statistics(self) -> Mapping[str, Statistics]:
        numbers = Statistics(self.ready, 0, self.waiting(), Load(rows=self._running))
        return dict.fromkeys(self.engines, numbers)

    def _main(self) -> None:
        with torch.no_grad():
            pipeline, draw = self._open()
            self.ready = True
            while True:
                batch = self._take()
                self._running = len(batch)
                images = draw([job for job, _ in batch])
                for (job, tell), image in zip(batch, images, strict=True):
                    tell(Done((_png(pipeline, job, image),), job.request.seeds, ("",), {}))
                self._running = 0

    def _take(self) -> list[tuple[Job, Callable[[Event], None]]]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue)
            first = self._queue[0][0]
            batch = [entry for entry in self._queue if self._fits(first, entry[0])][: self._most]
            for entry in batch:
                self._queue.remove(entry)
        return batch


def one_at_a_time(folder: Path, info: EngineInfo, checkpoint: str, most: int) -> Batches:
    """The stock pipeline of the engine's checkpoint."""

    def open() -> tuple[Pipeline, Draw]:
        from sdfast.export.checkpoint import resolve
        from sdfast.validation.drawing import generate
        from sdfast.validation.reference import reference_pipeline

        pipe: Any = reference_pipeline(resolve(checkpoint))
        pipe.set_progress_bar_config(disable=True)

        def draw(jobs: Sequence[Job]) -> Sequence[Image.Image]:
            return [generate(pipe, job.request)[0] for job in jobs]

        return Pipeline(Engine.open(folder)), draw

    return Batches(info, 1, _alike, open)


def alike(folder: Path, info: EngineInfo, checkpoint: str, most: int) -> Batches:
    """Requests of the same settings share a batch, as a diffusers pipeline can have it."""
    return _batches(folder, info, most, _alike)


def mixed(folder: Path, info: EngineInfo, checkpoint: str, most: int) -> Batches:
    """Whatever is there shares a batch, as sdfast's rows can have it; who is done leaves the batch's work."""
    return _batches(folder, info, most, lambda first, other: True)


def _batches(folder: Path, info: EngineInfo, most: int, fits: Fits) -> Batches:
    def open() -> tuple[Pipeline, Draw]:
        engine = Engine.open(folder, load=True)
        warm_up(engine)
        pipeline, buckets = Pipeline(engine), Buckets(most)
        return pipeline, lambda jobs: _together(pipeline, buckets, jobs)

    return Batches(info, most, fits, open)


def _together(pipeline: Pipeline, buckets: Buckets, jobs: Sequence[Job]) -> Sequence[Image.Image]:
    """The pictures of jobs that begin together, in the jobs' order."""
    request, images = jobs[0].request, dict[Row, Image.Image]()
    with pipeline.engine.running():
        rows = [pipeline.prepare(job.request).rows[0] for job in jobs]
        running = Rows(pipeline.engine, rows, request.height, request.width, buckets=buckets)
        while running.rows:
            running.tick()
            done = list(running.finished)
            if done:
                latents = torch.stack([running.latents_of(row) for row in done])
                pixels = to_uint8(pipeline.decode(latents)).cpu().numpy()
                images |= {row: Image.fromarray(p) for row, p in zip(done, pixels, strict=True)}
                running.change([], done)
        running.close()
    return [images[row] for row in rows]


def _alike(first: Job, other: Job) -> bool:
    def settings(job: Job) -> tuple[Any, ...]:
        request = job.request
        return request.num_inference_steps, request.scheduler, request.height, request.width

    return settings(first) == settings(other)


def _png(pipeline: Pipeline, job: Job, image: Image.Image) -> bytes:
    request, manifest = job.request, pipeline.engine.manifest
    plan, weights = pipeline.schedule_of(request), manifest.checkpoint.weights
    return png(image, infotext_of(request, plan, 0, model=manifest.name, weights=weights))
