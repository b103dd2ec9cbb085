"""One engine's worker, seen from the server: started, watched, and replaced by another when it fails.

Everything here is for one event loop. A job that is handed in gets its events from whatever worker took it,
and one `Failed` when that worker ends before the job does.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from sdfast.errors import BackendError, RequestError, SdfastError
from sdfast.server.jobs import Done, Event, Failed, Job, Load, Queued, QueueFull, Statistics
from sdfast.server.worker import messages
from sdfast.server.worker.frames import Decoder, Frame, FrameError, encoded

END_SECONDS = 2.0
"""So long a worker has to end when its socket is closed; then it is killed."""

KILL_SECONDS = 10.0
"""So long the system has to end a process that was killed: one that waits for a driver may not end."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """What is borne of a worker.

    step_timeout: seconds in which its batcher does not go on (see `Batcher.stalled`). silence: seconds
    without a report, which its threads send as long as they get Python's lock. failures: so many workers
    after each other, none of which finished a picture. backoff: seconds before the second of them is started,
    doubled each time.
    """

    step_timeout: float = 120.0
    silence: float = 10.0
    failures: int = 5
    backoff: float = 0.5


def command(
    folder: Path,
    device: str | None,
    *,
    max_rows: int | None,
    max_queue: int,
    previews: str = "auto",
) -> list[str]:
    """What starts a worker of the engine in `folder`."""
    chosen = [] if device is None else ["--device", device]
    rows = [] if max_rows is None else ["--max-rows", str(max_rows)]
    limits = [*rows, "--max-queue", str(max_queue), "--previews", previews]
    return [sys.executable, "-P", "-m", "sdfast.server.worker", str(folder), *chosen, *limits]


class Supervisor:
    """Keeps one engine at work.

    >>> supervisor = Supervisor("landscapes", command(folder, None, max_rows=16, max_queue=64), max_queue=64)
    >>> asyncio.create_task(supervisor.run())
    """

    def __init__(
        self, name: str, command: Sequence[str], *, max_queue: int, patience: Patience | None = None
    ) -> None:
        self._name, self._command, self._max_queue = name, command, max_queue
        self._patience = patience or Patience()
        self._life: _Life | None = None  # a worker that is at work
        self._jobs: dict[str, _Asked] = {}  # all that have not had their last event
        self._failures = self._restarts = 0

    async def run(self) -> None:
        """Have a worker at work until this is cancelled.

        Raises what opening the engine raises in the worker, and `BackendError` when workers fail too often.
        """
        while True:
            ended = await self._live()
            self._failures += 1
            if ended.final is not None:
                raise ended.final
            if self._failures >= self._patience.failures:
                raise BackendError(
                    f"engine {self._name!r} was given up: {self._failures} of its processes ended one after "
                    f"another without a finished picture; of the last: {ended.why}"
                )
            delay = self._patience.backoff * 2 ** (self._failures - 1)
            log.error(
                "the worker of %r ended: %s; another starts in %g s",
                self._name,
                ended.why,
                delay,
                extra={"fields": {"engine": self._name}},
            )
            await asyncio.sleep(delay)
            self._restarts += 1

    @property
    def ready(self) -> bool:
        return self._life is not None

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """As `Studio.submit`. Raises `QueueFull`, and `BackendError` while no worker is ready."""
        if self._life is None:
            raise BackendError(f"engine {self._name!r} is not ready; try again")
        if job.id in self._jobs:
            raise ValueError(f"job {job.id!r} is under way already")
        if self.waiting() >= self._max_queue:
            raise QueueFull(self._life.report.retry_after)
        try:
            self._life.send(messages.take(job))
        except FrameError as error:
            raise RequestError(f"the request is too large: {error}") from None
        asked = self._jobs[job.id] = _Asked()
        return _until_the_last(asked.events, lambda: self.cancel(job.id))

    def cancel(self, job_id: str) -> bool:
        return self._ask(messages.CANCEL, job_id)

    def preview(self, job_id: str) -> bool:
        return self._ask(messages.PREVIEW, job_id)

    def waiting(self) -> int:
        """How many jobs wait. Those that the worker has not looked at yet do."""
        return sum(asked.waits for asked in self._jobs.values())

    def statistics(self) -> Statistics:
        load = self._life.report.load if self._life is not None else Load()
        if not self._jobs:  # the last report may be older than that
            load = replace(load, rows=0, waiting_steps=0, running_steps=0)
        return Statistics(self.ready, self._restarts, self.waiting(), load)

    def _ask(self, kind: str, job_id: str) -> bool:
        if self._life is None or job_id not in self._jobs:
            return False
        self._life.send(Frame(kind, job_id))
        return True

    async def _live(self) -> "_Ended":
        """The life of one worker, and why it ended."""
        process, life = await _started(self._command, self._patience, self._begin, self._tell)
        try:
            ended = await life.over()
            self._life = None
            if ended is None:
                ended = _Ended(_exit(await _stopped(process)))
            else:
                process.kill()
            self._fail_all(f"the engine failed: {ended.why}; try again")
            return ended
        finally:  # when this is cancelled, the jobs have not been told
            self._life = None
            self._fail_all("the server ends")
            life.close()
            await _stopped(process)

    def _begin(self, life: "_Life") -> None:
        self._life = life
        log.info("the engine %r is ready", self._name)

    def _fail_all(self, message: str) -> None:
        jobs, self._jobs = self._jobs, {}
        for asked in jobs.values():
            asked.events.put_nowait(Failed("engine", message))

    def _tell(self, job_id: str, event: Event) -> None:
        """Give a job its event."""
        asked = self._jobs.get(job_id)
        if asked is None:
            raise FrameError(f"an event of {job_id[:60]!r}, a job that is not under way")
        asked.waits = asked.waits and isinstance(event, Queued)
        if isinstance(event, Done):
            self._failures = 0
        if isinstance(event, (Done, Failed)):
            del self._jobs[job_id]
        asked.events.put_nowait(event)


@dataclass
class _Asked:
    """A job under way, and what was told of it."""

    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    waits: bool = True


@dataclass(frozen=True)
class _Ended:
    """Why a worker ended. final: what is to be raised because another would end like it."""

    why: str
    final: SdfastError | None = None


class _Life(asyncio.Protocol):
    """The server's end of a worker's socket."""

    def __init__(
        self,
        patience: Patience,
        begin: "Callable[[_Life], None]",
        tell: Callable[[str, Event], None],
    ) -> None:
        """begin: called when the worker is ready. tell: with each event of a job."""
        self.report = messages.Report(0.0, 1.0, Load())
        self._patience, self._begin, self._tell = patience, begin, tell
        self._decoder, self._ready, self._heard = Decoder(), False, 0.0
        self._transport: asyncio.Transport | None = None
        self._over: asyncio.Future[_Ended | None] = asyncio.get_running_loop().create_future()

    async def over(self) -> _Ended | None:
        """Until the worker has closed its socket (None), has said that it ends, or is not to be borne."""
        watching = asyncio.create_task(self._watch())
        try:
            return await self._over
        finally:
            watching.cancel()

    def send(self, frame: Frame) -> None:
        """Raises `FrameError` for what is too large. What is sent after the end is lost, as its job is."""
        buffers = encoded(frame)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(buffers)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._over.done():
            return
        try:
            for frame in self._decoder.feed(data):
                self._hear(frame)
        except FrameError as error:
            self._end(_Ended(f"its process sent what is no message ({error})"))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(None)

    def _hear(self, frame: Frame) -> None:
        """Raises `FrameError`."""
        self._heard = time.monotonic()
        if frame.kind == messages.REPORT:
            self.report = messages.report_of(frame)
        elif frame.kind == messages.READY:
            self._ready = True
            self._begin(self)
        elif frame.kind == messages.BROKEN:
            error = messages.error_of(frame)
            self._end(_Ended(str(error), None if self._ready else error))
        else:
            self._tell(frame.id, messages.event_of(frame))

    def _end(self, ended: _Ended | None) -> None:
        if not self._over.done():
            self._over.set_result(ended)

    async def _watch(self) -> None:
        """End a worker that hangs. While the engine is opened, which may take any time, it may."""
        step_timeout, silence = self._patience.step_timeout, self._patience.silence
        period = min(0.5, step_timeout / 4, silence / 4)
        while True:
            due = time.monotonic() + period
            await asyncio.sleep(period)
            late = time.monotonic() - due > period  # this process was held up: what came has to be read first
            if late or not self._ready:
                continue
            if self.report.stalled > step_timeout:
                self._end(_Ended(f"it hung: for {self.report.stalled:.1f} s nothing went on in its process"))
            elif time.monotonic() - self._heard > silence:
                self._end(_Ended(f"it hung: for {silence:g} s its process gave no sign of life"))


async def _started(
    command: Sequence[str],
    patience: Patience,
    begin: Callable[[_Life], None],
    tell: Callable[[str, Event], None],
) -> tuple[subprocess.Popen[bytes], _Life]:
    """A new process, whose standard input is a socket to us; whatever it prints goes to our stderr.

    It is the leader of a session: what a terminal signals, it does not get. It imports from where we do.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        _, life = await asyncio.get_running_loop().create_unix_connection(
            lambda: _Life(patience, begin, tell), sock=ours
        )
        try:
            process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=2,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        except OSError as error:
            life.close()
            raise BackendError(f"the engine's process cannot be started: {error}") from error
    return process, life


async def _stopped(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process whose socket is closed; it is killed when it goes on."""
    try:
        return await asyncio.to_thread(process.wait, END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    try:
        return await asyncio.to_thread(process.wait, KILL_SECONDS)
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"the engine's process {process.pid} was killed, but does not end: its device's driver hangs; "
            "restart the machine"
        ) from None


def _exit(status: int) -> str:
    """What an exit status tells, for people."""
    if status >= 0:
        return f"its process ended with exit status {status}"
    name = signal.Signals(-status).name
    memory = ", as the system does when it has too little memory" if -status == signal.SIGKILL else ""
    return f"its process was killed by signal {-status} ({name}{memory})"


async def _until_the_last(
    events: asyncio.Queue[Event], cancel: Callable[[], object]
) -> AsyncGenerator[Event]:
    ended = False
    try:
        while not ended:
            event = await events.get()
            ended = isinstance(event, (Done, Failed))
            yield event
    finally:
        if not ended:
            cancel()
