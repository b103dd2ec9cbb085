"""A `Studio` without engines: it draws one colour a seed, and fails where it is told to."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image

from sdfast.errors import BackendError, RequestError
from sdfast.infotext import Infotext, png_info
from sdfast.request import Request
from sdfast.server.jobs import (
    TICK_SECONDS,
    Done,
    EngineInfo,
    Event,
    Failed,
    Job,
    Load,
    Preview,
    Queued,
    QueueFull,
    Statistics,
    Step,
)

SIZES = {(64, 64), (64, 96)}  # height, width


def engine(
    name: str = "tiny",
    edits: bool = True,
    controlnets: tuple[str, ...] = (),
    loras: tuple[str, ...] = (),
    step_cache: bool = False,
    refines: bool = False,
    instructed: bool = False,
    vae: tuple[str, str] | None = None,
    pag: bool = False,
) -> EngineInfo:
    digest = name.encode().hex().ljust(64, "0")
    return EngineInfo(
        *(name, "sd", 64, 64, ("64x64", "96x64"), 4, "org/tiny", "0" * 64),
        edits=edits,
        unet_digest=digest,
        controlnets=controlnets,
        loras=loras,
        step_cache=step_cache,
        refines=refines,
        instructed=instructed,
        vae=vae,
        pag=pag,
    )


@dataclass
class FakeStudio:
    """Failpoints: `full`, `down`, `refusal` (the first event), `failure` (the last), `hang` (until
    cancelled), `bug`, `silent` (no last event)."""

    engines: dict[str, EngineInfo] = field(default_factory=lambda: {"tiny": engine()})
    ready: bool = True
    resting: set[str] = field(default_factory=set)  # engines that are not up
    full: bool = False
    down: bool = False
    refusal: Failed | None = None
    failure: Failed | None = None
    hang: bool = False
    bug: bool = False
    silent: bool = False
    ahead: int = 0  # jobs, when one comes in
    seconds: float = 0.0  # of every step
    steps: int = 0  # that are told before the pictures, each with a preview if one was asked for
    asked: set[str] = field(default_factory=set)
    truncated: str = ""
    jobs: list[Job] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    live: dict[str, asyncio.Event] = field(default_factory=dict)

    def check_size(self, engine: str, request: Request) -> None:
        for height, width in ((one.height, one.width) for one in request.passes):
            if (height, width) not in SIZES:
                raise RequestError(f"size {width}x{height} is not one of this engine's (64x64, 96x64)")

    def submit(self, job: Job) -> AsyncIterator[Event]:
        if self.full:
            raise QueueFull(2.5)
        if self.down or job.engine in self.resting:
            raise BackendError("the engine takes no more jobs: it is closed, or it failed too often")
        self.check_size(job.engine, job.request)
        self.jobs.append(job)
        self.live[job.id] = asyncio.Event()
        return self._events(job)

    def cancel(self, job_id: str) -> bool:
        ended = self.live.pop(job_id, None)
        if ended is not None:
            self.cancelled.append(job_id)
            ended.set()
        return ended is not None

    def preview(self, job_id: str) -> bool:
        if job_id in self.live:
            self.asked.add(job_id)
        return job_id in self.live

    def waiting(self) -> int:
        return 3

    def running(self) -> int:
        return len(self.live)

    def statistics(self) -> dict[str, Statistics]:
        load = Load(
            rows=len(self.live),
            waiting_steps=5,
            running_steps=7,
            ticks=(2, 1) + (0,) * (len(TICK_SECONDS) - 2) + (1,),
            tick_seconds=99.5,
            memory={"allocated": 1_000},
        )
        up = self.ready or self.resting
        return {
            name: Statistics(bool(up) and name not in self.resting, 2, self.waiting(), load)
            for name in self.engines
        }

    async def _events(self, job: Job) -> AsyncIterator[Event]:
        if self.refusal is not None:
            del self.live[job.id]
            yield self.refusal
            return
        yield Queued(self.ahead)
        if self.bug:
            raise ValueError("a bug in the studio")
        if self.hang:
            await self.live[job.id].wait()
        for index in range(job.previews):
            await asyncio.sleep(self.seconds)
            yield Step(index + 1, job.previews)
            yield Preview(index, png(job, job.request.seed))
        for index in range(self.steps):
            await asyncio.sleep(self.seconds)
            yield Step(index + 1, self.steps)
            if job.id in self.asked:
                self.asked.discard(job.id)
                yield Preview(index, png(job, job.request.seed))
        await asyncio.sleep(self.seconds)
        self.live.pop(job.id, None)
        if not self.silent:
            yield self.failure or self._done(job)

    def _done(self, job: Job) -> Done:
        seeds, tokens = job.request.seeds, len(job.request.prompts[0].split())
        return Done(
            tuple(png(job, seed) for seed in seeds), seeds, (self.truncated,), {"denoising": 0.5}, tokens
        )


def png(job: Job, seed: int) -> bytes:
    """One colour, with parameters as an engine's picture has them. Of a job with an image: the colour where
    the mask opens it, and the image elsewhere."""
    request, file = job.request, BytesIO()
    told = Infotext(request.prompts[0], steps=request.num_inference_steps, seed=seed)
    colour = (seed % 256, seed // 256 % 256, 99)
    size = request.width, request.height
    picture = Image.new("RGB", size, colour)
    if job.image is not None:
        image = Image.frombytes("RGB", size, job.image)
        mask = Image.frombytes("L", size, job.mask) if job.mask else Image.new("L", size, 0)
        picture = Image.composite(picture, image, mask)
    picture.save(file, "PNG", pnginfo=png_info(told))
    return file.getvalue()
