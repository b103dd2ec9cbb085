"""A `WorkerStudio` on an event loop of its own, for tests that look at it from outside."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sdfast.request import Request
from sdfast.server.jobs import Done, Event, Failed, Job
from sdfast.server.studio import Post, WorkerStudio
from sdfast.server.worker.supervisor import Patience, Supervisor
from tests.fakes import FakeEngine

PATIENCE = 20  # seconds; nothing here takes one
T = TypeVar("T")


def request(prompt: str = "a", seed: int = 1, images: int = 1, steps: int = 4, **fields: Any) -> Request:
    given = {"num_inference_steps": steps, "height": 16, "width": 16, "negative_prompts": (None,), **fields}
    return Request.make(prompts=(prompt,), seed=seed, num_images_per_prompt=images, **given)


class Heard:
    """The events of a job, and when the last one came (by `time.monotonic`)."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended_at = 0.0
        self.over = threading.Event()

    def end(self) -> Done | Failed:
        assert self.over.wait(PATIENCE), f"no end after {self.events}"
        last = self.events[-1]
        assert isinstance(last, Done | Failed)
        assert not any(isinstance(event, Done | Failed) for event in self.events[:-1])
        return last

    def done(self) -> Done:
        end = self.end()
        assert isinstance(end, Done), end
        return end

    def failed(self) -> Failed:
        end = self.end()
        assert isinstance(end, Failed), end
        return end


class House:
    """One engine named "fake", run by what `command` starts."""

    def __init__(self, command: Sequence[str], *, max_queue: int = 64, **patience: Any) -> None:
        self.supervisor = Supervisor("fake", command, max_queue=max_queue, patience=Patience(**patience))
        self.studio = WorkerStudio([Post(FakeEngine().manifest, self.supervisor)])
        self._loop, self._jobs = asyncio.new_event_loop(), dict[str, Heard]()
        self._thread = threading.Thread(target=self._loop.run_forever, name="house")
        self._thread.start()
        self.running = asyncio.run_coroutine_threadsafe(self.studio.run(), self._loop)

    def close(self) -> None:
        self.call(self.studio.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def ready(self) -> None:
        until(lambda: self.studio.ready)

    def submit(self, asked: Request, **fields: Any) -> Heard:
        """Raises what the studio raises."""
        job = Job(**{"id": f"job{len(self._jobs)}", "engine": "fake", "request": asked, **fields})
        heard = Heard()

        async def listen(events: Any) -> None:
            async for event in events:
                heard.events.append(event)
            heard.ended_at = time.monotonic()
            heard.over.set()

        async def hand_in() -> None:
            self._loop.create_task(listen(self.studio.submit(job)))

        self.call(hand_in())
        self._jobs[job.id] = heard
        return heard

    def cancel_all(self) -> None:
        """Until no job is under way."""
        for name, heard in self._jobs.items():
            self._loop.call_soon_threadsafe(self.studio.cancel, name)
            heard.end()

    def fail(self, file: Path, **failpoints: Any) -> None:
        """Have the worker, a `fake_worker`, fail from now on."""
        file.write_text(json.dumps(failpoints), "utf-8")
        os.kill(self.pid, signal.SIGUSR1)
        until(lambda: not file.exists())

    @property
    def pid(self) -> int:
        mine = [pid for pid in children_of(os.getpid()) if "tests.server.fake_worker" in command_of(pid)]
        [pid] = mine  # other tests have children too
        return pid


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, without those that have ended."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split() if alive(int(child))]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def until(true: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
