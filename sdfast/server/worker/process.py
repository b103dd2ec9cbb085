"""What a worker process runs: an engine and its batcher, at the end of a socket.

Its main thread opens the engine and runs the batcher. A thread reads what the server asks and ends the
process when the server is gone; another writes what the batcher tells, and between that how it is. Whatever
goes wrong in a worker ends it: the server starts another.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NoReturn

from sdfast.errors import BackendError, RequestError
from sdfast.server import logs
from sdfast.server.jobs import Event, Failed, Job, QueueFull, Step
from sdfast.server.worker import leash, messages
from sdfast.server.worker.frames import Decoder, Frame, FrameError, encoded

if TYPE_CHECKING:
    from sdfast.engine import Engine
    from sdfast.server.batcher import Batcher
    from sdfast.server.colours import Previews

STEP_SECONDS = 0.1
"""A job's steps are told so often at most: each wakes the server, beside the processor's own work."""

REPORT_SECONDS = 0.2

_READ = 2**18  # bytes at a time

log = logging.getLogger(__name__)


def run(
    open_engine: "Callable[[], Engine]",
    *,
    max_rows: int | None,
    max_queue: int,
    previews: "Previews" = "auto",
) -> NoReturn:
    """Be the worker at the other end of standard input, until the server goes or the engine fails."""
    leash.put_on()
    logs.set_up()
    Process(socket.socket(fileno=leash.take_channel())).run(open_engine, max_rows, max_queue, previews)


class Process:
    """This process, as its server sees it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._outbox: SimpleQueue[list[bytes]] = SimpleQueue()
        self._batcher: Batcher | None = None

    def run(
        self,
        open_engine: "Callable[[], Engine]",
        max_rows: int | None,
        max_queue: int,
        previews: "Previews",
    ) -> NoReturn:
        self._start(self._read)
        try:
            engine = open_engine()
            self._batcher = _batcher(engine, max_rows, max_queue, previews)
        except Exception as error:  # the server is to tell why there is no engine, whatever it is
            log.error("the engine cannot be opened", exc_info=error)
            self._send(encoded(messages.of_broken(error)))
            os._exit(1)
        self._send(encoded(Frame(messages.READY)))
        self._start(self._write)
        try:
            self._batcher.run()
        except Exception as error:
            log.error("the batcher ended", exc_info=error)
        threading.Event().wait()  # for the thread that writes: it tells, and ends the process
        raise AssertionError("one of the threads ends the process")

    def _start(self, task: Callable[[], None]) -> None:
        """Do it in a thread, with which the process ends."""

        def run() -> None:
            status = 1
            try:
                task()
                status = 0
            except Exception as error:  # nobody may wait for a worker that is deaf or mute
                log.error("the worker ends", exc_info=error)
            os._exit(status)

        threading.Thread(target=run, name=f"sdfast-{task.__name__.strip('_')}", daemon=True).start()

    # For the thread that reads:

    def _read(self) -> None:
        decoder = Decoder()
        while data := self._received():
            for frame in decoder.feed(data):
                self._hear(frame)

    def _received(self) -> bytes:
        try:
            return self._channel.recv(_READ)
        except ConnectionResetError:  # the server died with something unread
            return b""

    def _hear(self, frame: Frame) -> None:
        batcher = self._ready_batcher
        if frame.kind == messages.TAKE:
            self._take(batcher, messages.job_of(frame))
        elif frame.kind == messages.CANCEL:
            batcher.cancel(frame.id)
        elif frame.kind == messages.PREVIEW:
            batcher.preview(frame.id)
        else:
            raise FrameError(f"{frame.kind[:60]!r} is nothing that a server tells")

    def _take(self, batcher: "Batcher", job: Job) -> None:
        tell = _Teller(job.id, self._outbox)
        try:
            batcher.submit(job, tell)
        except RequestError as error:
            tell(Failed("request", str(error)))
        except (BackendError, QueueFull) as error:  # the engine failed just now; the server counts the queue
            tell(Failed("engine", str(error)))

    # For the thread that writes:

    def _write(self) -> None:
        """Send what there is, and when it is time, a report."""
        due = 0.0
        while True:
            with suppress(Empty):
                self._send(self._outbox.get(timeout=max(0.0, due - time.monotonic())))
            if time.monotonic() >= due:
                self._report()
                due = time.monotonic() + REPORT_SECONDS

    def _report(self) -> None:
        """Raises `BackendError`, told to the server too, when the engine has failed for good."""
        batcher = self._ready_batcher
        if not batcher.healthy:
            while not self._outbox.empty():
                self._send(self._outbox.get())
            error = BackendError(f"the engine failed for good: {batcher.fault}")
            self._send(encoded(messages.of_broken(error)))
            raise error
        report = messages.Report(batcher.stalled(), batcher.retry_after(), batcher.load())
        self._send(encoded(messages.of_report(report)))

    def _send(self, buffers: list[bytes]) -> None:
        try:
            for buffer in buffers:
                self._channel.sendall(buffer)
        except (BrokenPipeError, ConnectionResetError):  # the server is gone, and nobody is left to tell
            os._exit(0)

    @property
    def _ready_batcher(self) -> "Batcher":
        if self._batcher is None:
            raise RuntimeError("the engine is not open yet")
        return self._batcher


def _batcher(engine: "Engine", max_rows: int | None, max_queue: int, previews: "Previews") -> "Batcher":
    from sdfast.server.batcher import Batcher  # imports torch, during which the server may go

    return Batcher(engine, max_rows=max_rows, max_queue=max_queue, previews=previews, own_thread=False)


class _Teller:
    """Puts a job's events into the outbox, not all of its steps."""

    def __init__(self, job_id: str, outbox: SimpleQueue[list[bytes]]) -> None:
        self._id, self._outbox = job_id, outbox
        self._told = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step) and event.done < event.total:
            if time.monotonic() - self._told < STEP_SECONDS:
                return
            self._told = time.monotonic()
        self._outbox.put(self._encoded(event))

    def _encoded(self, event: Event) -> list[bytes]:
        try:
            return encoded(messages.of_event(self._id, event))
        except FrameError as error:
            return self._encoded(Failed("request", f"the pictures are too large: {error}; ask for fewer"))
