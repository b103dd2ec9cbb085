"""The batcher: jobs come in, their pictures share the loop as rows, events go out.

One thread owns the engine. Each of its turns lets rows come and go, ticks the rows of one size, and decodes
at most one picture, so that nobody's step waits for more than that. Sizes take turns, and so do rows whose
prompts are of different lengths, or whose steps are cached in different intervals. The clerk writes PNG
files, in a thread of its own.

Which pictures have the places in the loop, when there are more pictures than places, is said in `places`.
"""

import logging
import threading
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image

from sdfast.bucket import Buckets
from sdfast.call import Given
from sdfast.engine import Engine
from sdfast.errors import BackendError, EngineError, NumericalError, SdfastError, first_line
from sdfast.loop import Rows, check_finite
from sdfast.pipeline import Pipeline, to_uint8
from sdfast.row import Row
from sdfast.server.clerk import Clerk
from sdfast.server.colours import Approximately, Previews
from sdfast.server.given import check_given, given_of
from sdfast.server.handover import packed
from sdfast.server.jobs import TICK_SECONDS, Failed, FailureKind, Job, Load, QueueFull
from sdfast.server.memory import memory_of
from sdfast.server.places import Pace, Picture, changes
from sdfast.server.previews import previews_due
from sdfast.server.work import Listener, Room, Work, row_of
from sdfast.server.works import Works

log = logging.getLogger(__name__)

FAILURES = 3
"""After so many failures of the engine with no picture between them it is given up."""

ROWS = {"cpu": 4, "cuda": 16}
"""So many rows by default. On a processor a row takes nearly as long beside others as alone: with more rows
each of them only takes longer."""

AHEAD = 2
"""So many ticks the host may be ahead of a CUDA device: one that runs, and one that waits for its end."""

DEVICE_ERRORS = (BackendError, EngineError, RuntimeError)  # torch and its kernels raise RuntimeError


@dataclass(frozen=True)
class Latents:
    """Latents [C, h, w] float32 on their way to the decoder, or to a second pass: of the job's picture or
    preview `index`."""

    work: Work
    index: int
    latents: torch.Tensor


class Batcher:
    """Runs jobs on one engine.

    >>> batcher = Batcher(Engine.open("engines/landscapes"))
    >>> batcher.submit(job, print)
    >>> batcher.close()
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int | None = None,
        max_queue: int = 64,
        buckets: int | None = None,
        previews: Previews = "auto",
        own_thread: bool = True,
    ) -> None:
        """max_rows: in the loop at a time, of all sizes; default: see `ROWS`.
        max_queue: jobs that wait, none of whose rows is in.
        buckets: how many row counts' tensors and CUDA graphs are kept for their return (default: max_rows).
        previews: how they are made; "auto" is in full where the engine takes no images.

        Raises `BackendError` for fast previews of an engine that takes no images.
        own_thread: start one; without, the caller is the batcher's thread, and calls `run`. A process that
        only does this should do it on the thread that opened the engine: OpenMP gives each thread that
        computes a pool, and with more threads in them than there are cores its barriers no longer spin, which
        was seen to halve PyTorch's speed on a processor.
        """
        self.pipeline, self._engine = Pipeline(engine), engine
        self._max_rows = ROWS.get(engine.device.type, ROWS["cpu"]) if max_rows is None else max_rows
        self._buckets = Buckets(self._max_rows if buckets is None else buckets)
        self._works = Works(max_queue)
        # By height, width, tokens of the context and cache interval; the next one to tick comes first.
        self._rooms: dict[tuple[int, int, int, int], Room] = {}
        self._estimates: list[Latents] = []  # both wait for the decoder
        self._finished: list[Latents] = []  # who is due the earliest comes first
        self._clerk = Clerk(engine, self.pipeline.prompts, behind=self._max_rows)
        self._approximately = Approximately(engine, previews)
        self._ahead: deque[torch.cuda.Event] = deque()
        self._pace, self._considered = Pace(), 0  # of the jobs that have arrived, when places were last given
        self._run_seconds = 1.0  # that a row takes from its place to its picture, about
        self._failures = 0
        self._ticks, self._tick_seconds = [0] * (len(TICK_SECONDS) + 1), 0.0
        self._moved: float | None = None  # when it last went on with its work; None while there is none
        self.fault = ""
        """What the engine last failed of."""
        engine.on_call = self._go_on
        self._thread = threading.current_thread()
        if own_thread:
            self._thread = threading.Thread(target=self.run, name="sdfast-batcher", daemon=True)
            self._thread.start()

    # For every thread:

    def submit(self, job: Job, listener: Listener) -> None:
        """Take a job in. Its events go to `listener`, the first of them here, its place in the queue, and the
        others from the batcher's threads: it may not block or raise.

        Raises `QueueFull`; `RequestError` for what the engine cannot draw; `BackendError` when it is closed
        or not healthy; `ValueError` for the id of a job that is under way.
        """
        for request in job.request.passes:
            self._engine.check_size(request.height, request.width)
        plans = [self.pipeline.schedule_of(request) for request in job.request.passes]
        steps = list(map(len, plans))
        self.pipeline.prompts.check(job.request, self.pipeline.editing_of(job.request, plans[0]))
        check_given(self._engine, job)
        if job.request.hires is not None:
            self.pipeline.check_hires(job.request, job.request.hires)

        def work(number: int) -> Work:
            patience = sum(map(self._pace.patience, job.request.passes, steps))
            return Work(job, listener, number, steps[0], patience, sum(steps[1:]))

        if not self._works.take_in(job.id, work):
            raise QueueFull(self.retry_after())

    def cancel(self, job_id: str) -> bool:
        """End a job at the next step at the latest; False when none of this id is under way."""
        return self._works.cancel(job_id)

    def preview(self, job_id: str) -> bool:
        """Ask for a preview after a job's next step; False when none of this id is under way."""
        return self._works.preview(job_id)

    @property
    def healthy(self) -> bool:
        """Whether the engine can go on; once it is not, it stays so."""
        return self._works.healthy and self._thread.is_alive()

    def waiting(self) -> int:
        """How many jobs wait, none of their rows begun."""
        return len(self._works.queue)

    def running(self) -> int:
        """How many rows are in the loop."""
        return sum(len(work.running) for work in self._works.begun)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more jobs and end the thread, after the jobs that are there, or else cancelling them.

        Returns whether that was within `timeout` seconds.
        """
        self._works.close(drain=drain)
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._clerk.close()
        return True

    def retry_after(self) -> float:
        """Seconds until some job has left the queue, about."""
        rows = sum(work.job.request.images for work in self._works.queue)
        return max(1.0, rows * self._run_seconds / self._max_rows)

    def stalled(self) -> float:
        """Seconds since the thread last went on with its work; 0 while it has none.

        It goes on when the next part of a turn begins (letting in a job, placing rows, a tick, a decode), and
        when the next call of a network does. So what is looked for here must be longer than any one call: the
        first of a size, in which kernels are loaded, is made by a warm-up, before there is a batcher.
        """
        moved = self._moved
        return 0.0 if moved is None else time.monotonic() - moved

    def load(self) -> Load:
        """What there is to do, and what was done."""
        works = self._works.all
        return Load(
            rows=self.running(),
            waiting_steps=sum(work.waiting_steps for work in works),
            running_steps=sum(work.running_steps for work in works),
            ticks=tuple(self._ticks),
            tick_seconds=self._tick_seconds,
            memory=memory_of(self._engine.device),
        )

    # For its own thread:

    def run(self) -> None:
        """Do the jobs until `close`. Raises what is a bug."""
        with torch.no_grad(), _current(self._engine.device):
            try:
                while self._wait():
                    with self._engine.running():
                        while self._works.busy:
                            self._turn()
            except Exception as error:  # a bug: nobody may wait for this thread
                self._break_down(error, final=True)
                raise

    def _wait(self) -> bool:
        """Until there is a job; False when there will be none."""
        self._moved = None
        return self._works.wait()

    def _go_on(self) -> None:
        self._moved = time.monotonic()

    def _turn(self) -> None:
        try:
            for part in (self._sweep, self._admit, self._settle, self._tick, self._decode):
                self._go_on()
                part()
        except DEVICE_ERRORS as error:
            self._break_down(error)

    def _sweep(self) -> None:
        """End the jobs that were cancelled, and those that waited too long."""
        queue = self._works.queue
        for work in [*queue, *self._works.begun]:
            if work.cancelled:
                self._fail(work, "cancelled", "the job was cancelled")
        for work in queue:
            if not work.ended and work.job.deadline is not None and time.monotonic() > work.job.deadline:
                self._fail(work, "timeout", "the job waited until its deadline and was not begun")

    def _admit(self) -> None:
        """Give the places in the loop to those who are due."""
        arrived, works = self._works.candidates()
        settled = self._considered == arrived and self.running() == self._max_rows
        if not settled and len(self._finished) < self._max_rows:
            self._considered = arrived
            self._give_places(works)
        self._tell_positions()

    def _give_places(self, works: list[Work]) -> None:
        due = changes(works, self._max_rows)
        for picture in due.leaving:
            work = picture.work
            row = next(row for row, index in work.running.items() if index == picture.index)
            work.put_aside(row, self._room(row).put_aside(row))
        for picture in due.joining:
            work = picture.work
            if not work.ended and (work.prepared is not None or self._begin(work)):
                entering = work.enter(picture.index)
                self._room(row_of(entering)).join(entering)

    def _begin(self, work: Work) -> bool:
        """Take a job out of the queue and encode its prompts and its images; False when that ends it."""
        self._works.begin(work)
        work.begin()
        self._go_on()
        request = work.job.request
        with self._failing(work):
            for one in request.passes:
                self.pipeline.prepare_decoder(one, 1)
            given = given_of(self._engine, work.job)
            if isinstance(given.generators, list):
                work.generators = given.generators
            work.prepare(lambda: self.pipeline.prepare(request, given))
        return not work.ended

    @contextmanager
    def _failing(self, work: Work) -> Iterator[None]:
        """What goes wrong with one job ends it, and what goes wrong with the engine is raised."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._fail_memory(work, error)
        except NumericalError as error:
            self._fail(work, "numerical", str(error))
        except (BackendError, EngineError):
            raise
        except SdfastError as error:
            self._fail(work, "request", str(error))

    def _room(self, row: Row) -> Room:
        factor = self._engine.manifest.model.vae_scale_factor
        height, width = (side * factor for side in row.latents.shape[1:])
        size, tokens = (height, width), len(row.positive.context)
        key = (*size, tokens, row.cache_interval)
        if key not in self._rooms:
            self._rooms[key] = Room(Rows(self._engine, [], *size, buckets=self._buckets))
        return self._rooms[key]

    def _tell_positions(self) -> None:
        for position, work in enumerate(self._works.queue):
            work.queued(position)

    def _settle(self) -> None:
        """Let rows come and go; the last to come of those for whom there is no memory ends its job."""
        for key, room in list(self._rooms.items()):
            while True:
                try:
                    room.settle()
                    break
                except torch.OutOfMemoryError as error:
                    self._no_memory(room, error)
            if room.empty:
                del self._rooms[key]

    def _tick(self) -> None:
        """A step of the rows of the room whose turn it is."""
        if not self._rooms:
            return
        key = next(iter(self._rooms))
        room = self._rooms[key] = self._rooms.pop(key)  # the last one now
        due = previews_due(self._works.begun, room.rows, self._engine.scheduler_config)
        start = time.monotonic()
        try:
            room.rows.tick()
        except torch.OutOfMemoryError as error:
            self._no_memory(room, error)
            return
        self._stay_near()
        self._count_tick(time.monotonic() - start, len(room.rows.rows), key[:2])
        present = set(room.rows.rows)
        for work in self._works.begun:
            if stepped := len(present & work.running.keys()):
                work.stepped(stepped)
        self._estimates.extend(Latents(one.work, one.preview, one.clean(room.rows)) for one in due)
        for row in room.rows.finished:
            work = self._owner(row)
            latents = Latents(work, work.running.pop(row), room.rows.latents_of(row))
            insort(self._finished, latents, key=lambda done: Picture(done.work, done.index).due)
            room.leave(row)

    def _count_tick(self, seconds: float, rows: int, size: tuple[int, int]) -> None:
        self._pace.ticked(seconds, rows, *size)
        self._ticks[bisect_left(TICK_SECONDS, seconds)] += 1
        self._tick_seconds += seconds

    def _stay_near(self) -> None:
        """On CUDA: wait for the tick before the last, so that who cancels or joins has not long to wait."""
        if self._engine.device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > AHEAD:
            self._ahead.popleft().synchronize()

    def _decode(self) -> None:
        """Decode the preview that has waited the longest, or else the picture that is due the earliest."""
        for waiting, make in ((self._estimates, self._preview), (self._finished, self._picture)):
            while waiting:
                done = waiting.pop(0)
                if done.work.ended:
                    continue
                with self._failing(done.work):
                    make(done)
                return

    def _picture(self, done: Latents) -> None:
        work = done.work
        if work.goes_on(done.index):
            work.draw_over(done.index, lambda: self._second_pass(done))
            self._considered = -1  # it may be due before others that have the places
            return
        if work.job.hands_over:
            check_finite(done.latents)
            work.hand_over(done.index, packed(done.latents, work.generators[done.index]))
        else:
            self._clerk.picture(work, done.index, self._pixels(done))
        self._failures = 0
        if work.complete:
            self._complete(work)

    def _second_pass(self, done: Latents) -> Row:
        """The row that draws over what a picture's first pass has drawn."""
        check_finite(done.latents)
        request = done.work.job.request.alone(done.index)
        over = self.pipeline.enlarged(done.latents[None], request)
        [row] = self.pipeline.prepare(request.passes[-1], Given(over=over), first=request).rows
        return row

    def _preview(self, done: Latents) -> None:
        try:
            approximately = self._approximately(done.latents)
            self._clerk.preview(done.work, done.index, approximately or self._pixels(done))
        except NumericalError as error:  # an estimate can be far outside what the decoder knows
            log.info("job %s: no preview %d: %s", done.work.job.id, done.index, error)

    def _pixels(self, done: Latents) -> Image.Image:
        start = time.monotonic()
        check_finite(done.latents)
        image = self.pipeline.decode(done.latents[None])
        pixels = Image.fromarray(to_uint8(image)[0].cpu().numpy())
        took = time.monotonic() - start
        done.work.seconds["decoding"] += took
        self._approximately.decoded(done.latents, took)
        return pixels

    def _complete(self, work: Work) -> None:
        self._works.leave(work)
        runs = -(-work.job.request.images // self._max_rows)
        took = (work.seconds["denoising"] + work.seconds["decoding"]) / runs
        self._run_seconds += (took - self._run_seconds) / 8
        self._clerk.deliver(work, self._works.forget)

    def _owner(self, row: Row) -> Work:
        return next(work for work in self._works.begun if row in work.running)

    def _fail(self, work: Work, kind: FailureKind, message: str) -> None:
        """End one job; its rows leave."""
        self._works.leave(work)
        for row in work.running:
            self._room(row).leave(row)
        work.running.clear()
        work.aside.clear()
        self._works.forget(work)
        work.tell(Failed(kind, message))

    def _fail_memory(self, work: Work, error: torch.OutOfMemoryError) -> None:
        self._fail(work, "memory", f"the device has too little memory for this job: {first_line(error)}")
        self._buckets.clear()
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _no_memory(self, room: Room, error: torch.OutOfMemoryError) -> None:
        """The rows of a size have no memory together: the job of the one that came last makes room."""
        room.discard()
        self._fail_memory(self._owner(room.last), error)

    def _break_down(self, error: Exception, *, final: bool = False) -> None:
        """The engine failed, and with it all that is under way."""
        log.error("the engine failed", exc_info=error)
        self.fault = first_line(error)
        self._failures += 1
        if final or self._failures >= FAILURES or not self._answers():
            self._works.give_up()
        failed = self._works.begun + ([] if self._works.healthy else self._works.queue)
        self._rooms.clear()
        self._estimates.clear()
        self._finished.clear()
        self._ahead.clear()
        self._buckets.clear()
        for work in failed:
            work.running.clear()
            self._fail(work, "engine", f"the engine failed: {first_line(error)}")

    def _answers(self) -> bool:
        """Whether the device still does: after some errors CUDA refuses everything until the process ends."""
        if self._engine.device.type == "cuda":
            try:
                torch.cuda.synchronize(self._engine.device)
            except RuntimeError as error:
                log.error("the device does not answer", exc_info=error)
                return False
        return True


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """The device is this thread's current one, if it is a CUDA device."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
