"""Engines of this process as a `Studio`: a batcher for each, its events brought to the event loop."""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import torch

from sdfast.engine import Engine
from sdfast.errors import BackendError, EngineError, RequestError, SdfastError
from sdfast.first_latents import Over, encoded
from sdfast.manifest import Manifest, read_manifest
from sdfast.pipeline import Given, Pipeline
from sdfast.request import Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Done, EngineInfo, Event, Failed, Job, Step

STEP_SECONDS = 0.1
"""A job's steps are told so often at most: each wakes the event loop, beside the processor's own work."""

WARM_UP_STEPS = 2  # the first loads kernels, on CUDA the second is captured


class LocalStudio:
    """The engines in some directories, opened, warmed up and run in this process."""

    def __init__(
        self, folders: Sequence[Path], device: str | None = None, *, max_rows: int = 16, max_queue: int = 64
    ) -> None:
        """Reads the manifests; `open` does the rest. Raises `EngineError` for what is no engine, and for two
        of one name."""
        self._folders: dict[str, Path] = {}
        self._engines: dict[str, EngineInfo] = {}
        for folder in folders:
            info = _info(read_manifest(folder))
            if info.name in self._engines:
                raise EngineError(
                    f"{folder}: {self._folders[info.name]} has the name {info.name!r} too; rename one of them"
                )
            self._folders[info.name], self._engines[info.name] = folder, info
        self._device, self._max_rows, self._max_queue = device, max_rows, max_queue
        self._batchers: dict[str, Batcher] = {}

    @property
    def engines(self) -> Mapping[str, EngineInfo]:
        return self._engines

    @property
    def ready(self) -> bool:
        opened = len(self._batchers) == len(self._engines)
        return opened and all(batcher.healthy for batcher in tuple(self._batchers.values()))

    def open(self, stop: threading.Event | None = None) -> None:
        """Open, verify, load and warm up every engine, one after the other, until `stop` is set.

        Raises what opening an engine and drawing with it raise.
        """
        for name, folder in self._folders.items():
            if stop is not None and stop.is_set():
                return
            engine = Engine.open(folder, self._device, load=True)
            warm_up(engine)
            self._batchers[name] = Batcher(engine, max_rows=self._max_rows, max_queue=self._max_queue)

    def close(self) -> None:
        """End what still runs, and the engines' threads."""
        for batcher in self._batchers.values():
            batcher.close(drain=False)

    def submit(self, job: Job) -> AsyncIterator[Event]:
        batcher = self._batcher(job.engine)
        loop, events, told = asyncio.get_running_loop(), asyncio.Queue[Event](), 0.0

        def listen(event: Event) -> None:
            nonlocal told
            if isinstance(event, Step) and event.done < event.total:
                if time.monotonic() - told < STEP_SECONDS:
                    return
                told = time.monotonic()
            if not loop.is_closed():  # the server has ended before the batcher
                loop.call_soon_threadsafe(events.put_nowait, event)

        batcher.submit(job, listen)
        return _until_the_last(events, lambda: batcher.cancel(job.id))

    def cancel(self, job_id: str) -> bool:
        return any(batcher.cancel(job_id) for batcher in self._batchers.values())

    def preview(self, job_id: str) -> bool:
        return any(batcher.preview(job_id) for batcher in self._batchers.values())

    def waiting(self) -> int:
        return sum(batcher.waiting() for batcher in tuple(self._batchers.values()))

    def running(self) -> int:
        return sum(batcher.running() for batcher in tuple(self._batchers.values()))

    def _batcher(self, name: str) -> Batcher:
        if name not in self._engines:
            raise RequestError(f"engine {name!r} is not here; there are: {', '.join(self._engines)}")
        if name not in self._batchers:
            raise BackendError(f"engine {name!r} is not ready yet")
        return self._batchers[name]


async def _until_the_last(events: asyncio.Queue[Event], cancel: Callable[[], object]) -> AsyncIterator[Event]:
    ended = False
    try:
        while not ended:
            event = await events.get()
            ended = isinstance(event, (Done, Failed))
            yield event
    finally:
        if not ended:
            cancel()


def warm_up(engine: Engine) -> None:
    """Draw a picture of each size that the engine was exported for, the smallest of a range.

    So the first request meets nothing that is done only once, and what cannot draw is not served.
    """
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    model = engine.manifest.model
    sizes = [(form.height, form.width) for form in engine.manifest.modules["unet"].variants]
    for height, width in dict.fromkeys(sizes):
        request = Request.make(
            prompts=("",),
            negative_prompts=(None,),
            height=height.low if height else model.default_height,
            width=width.low if width else model.default_width,
            num_inference_steps=WARM_UP_STEPS,
            seed=0,
        )
        try:
            if model.inpaints:
                pipe.generate(request.model_copy(update={"strength": 1.0}), Given(over=_nothing(request)))
                continue
            if engine.manifest.edits:
                encoded(engine, _nothing(request).image)
            pipe.generate(request)
        except SdfastError as error:
            raise type(error)(f"engine {engine.manifest.name!r} cannot draw: {error}") from error


def _nothing(request: Request) -> Over:
    """A black image of the request's size, all of it to be drawn anew."""
    black = torch.zeros(1, 3, request.height, request.width)
    return Over(black, torch.ones_like(black[:, :1]))


def _info(manifest: Manifest) -> EngineInfo:
    weights = sorted(manifest.checkpoint.weights.items())
    forms = manifest.modules["unet"].variants
    return EngineInfo(
        name=manifest.name,
        family=manifest.model.family,
        default_height=manifest.model.default_height,
        default_width=manifest.model.default_width,
        sizes=tuple(dict.fromkeys(f"{form.width}x{form.height}" for form in forms)),
        max_images=manifest.max_images,
        checkpoint=manifest.checkpoint.source,
        checkpoint_digest=hashlib.sha256(repr(weights).encode()).hexdigest(),
        edits=manifest.edits,
    )
