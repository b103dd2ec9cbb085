"""Calls of txt2img and img2img that are under way: how far they are, and their early end."""

import asyncio
import base64
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from sdfast.server.desk import Desk, without_end
from sdfast.server.jobs import Done, Event, Job, Preview, Queued, Step, Studio

PATIENCE = 5.0
"""Seconds that a call which is to end early waits for a picture of how far it is."""

_BEGUN = 0.01  # of the progress: 0 would mean that nothing is under way
_REMEMBERED = 16  # tasks that have ended


class Call:
    """One call, from its arrival to its answer. All of it is the event loop's."""

    def __init__(self, name: str, job: Job, task: str | None) -> None:
        """name: "txt2img" or "img2img". task: the client's own id of it."""
        self.name, self.job, self.task = name, job, task or f"task({job.id})"
        self.timestamp = time.strftime("%Y%m%d%H%M%S")
        self.preview: Preview | None = None
        self.interrupted = self.skipped = False
        self._began = time.monotonic()
        self._done, self._total = 0, 0
        self._over = asyncio.Event()

    @property
    def begun(self) -> bool:
        """Whether a step was done."""
        return self._done > 0

    @property
    def progress(self) -> float:
        """From 0.01 to 1."""
        return max(_BEGUN, self._done / self._total) if self.begun else _BEGUN

    @property
    def eta(self) -> float:
        """Seconds that it still takes, by its pace so far; 0 while that is not known."""
        elapsed = time.monotonic() - self._began
        return elapsed * (1 - self.progress) / self.progress if self.begun else 0.0

    def state(self, running: bool) -> dict[str, Any]:
        """AUTOMATIC1111's state. Its pictures go on together, so it is one job of all their steps."""
        steps = self.job.request.num_inference_steps or 0
        if self.job.request.hires is not None:
            steps += self.job.request.hires.num_inference_steps or steps
        return {
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "stopping_generation": False,
            "job": f"scripts_{self.name}" if running else "",
            "job_count": int(running),
            "job_timestamp": self.timestamp,
            "job_no": 0,
            "sampling_step": steps * self._done // self._total if self.begun else 0,
            "sampling_steps": steps,
        }

    async def pictures(self, desk: Desk, events: AsyncIterator[Event]) -> Done | None:
        """The pictures; None for a call that was ended before they were there. Raises `Problem`."""
        drawing = asyncio.ensure_future(self._follow(desk, events))
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait((drawing, over), return_when=asyncio.FIRST_COMPLETED)
            return drawing.result() if drawing.done() else None
        finally:
            for task in (drawing, over):
                task.cancel()
            await asyncio.gather(drawing, over, return_exceptions=True)

    def end(self, studio: Studio) -> None:
        """Answer soon: with a picture after the next step, if there is a step to wait for."""
        if self.begun and studio.preview(self.job.id):
            asyncio.get_running_loop().call_later(PATIENCE, self._over.set)
        else:
            self._over.set()

    async def _follow(self, desk: Desk, events: AsyncIterator[Event]) -> Done | None:
        async with aclosing(desk.watched(events)) as watched:
            async for event in watched:
                if isinstance(event, Done):
                    return event
                self._notice(event)
                if isinstance(event, Preview) and (self.interrupted or self.skipped):
                    return None
        raise without_end()

    def _notice(self, event: Event) -> None:
        if isinstance(event, Queued):
            self._began = time.monotonic()
        elif isinstance(event, Step):
            self._done, self._total = event.done, event.total
        elif isinstance(event, Preview):
            self.preview = event


class Calls:
    """All calls of one server, in the order in which they came."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._under_way: dict[str, Call] = {}  # by their jobs' ids
        self._ended: deque[tuple[str, dict[str, Any]]] = deque(maxlen=_REMEMBERED)  # task and last state

    @contextmanager
    def under_way(self, call: Call) -> Iterator[None]:
        self._under_way[call.job.id] = call
        try:
            yield
        finally:
            del self._under_way[call.job.id]
            self._ended.append((call.task, call.state(False)))  # not the call, which has its images

    def interrupt(self) -> None:
        """End all."""
        for call in self._under_way.values():
            call.interrupted = True
            call.end(self._studio)

    def skip(self) -> None:
        """End the first."""
        for call in list(self._under_way.values())[:1]:
            call.skipped = True
            call.end(self._studio)

    def progress(self, skip_current_image: bool) -> dict[str, Any]:
        """`GET /sdapi/v1/progress`: of the first call; when none is there, of nothing."""
        call = next(iter(self._under_way.values()), None)
        if call is None:
            return {
                "progress": 0.0,
                "eta_relative": 0.0,
                "state": self._ended[-1][1] if self._ended else _NEVER,
                "current_image": None,
                "textinfo": None,
            }
        image = None if skip_current_image else self._watch(call)
        return {
            "progress": call.progress,
            "eta_relative": call.eta,
            "state": call.state(True),
            "current_image": image and base64.b64encode(image.png).decode(),
            "textinfo": None,
        }

    def progress_of(self, task: str, seen: int) -> dict[str, Any]:
        """`POST /internal/progress`: of one task. seen: the last preview that the client has; -1 for none."""
        call = next((call for call in self._under_way.values() if call.task == task), None)
        told: dict[str, Any] = {
            "active": call is not None and call.begun,
            "queued": call is not None and not call.begun,
            "paused": False,
            "completed": any(ended == task for ended, _ in self._ended),
            "progress": None,
            "eta": None,
            "live_preview": None,
            "id_live_preview": -1,
            "textinfo": None,
        }
        if call is None or not call.begun:
            return {**told, "textinfo": "Waiting..." if call is None else "In queue..."}
        told |= {"progress": call.progress, "eta": call.eta, "id_live_preview": seen}
        preview = self._watch(call)
        if preview is not None and preview.index != seen:
            told["live_preview"] = f"data:image/png;base64,{base64.b64encode(preview.png).decode()}"
            told["id_live_preview"] = preview.index
        return told

    def _watch(self, call: Call) -> Preview | None:
        """The latest picture of a call; the next one is asked for."""
        self._studio.preview(call.job.id)
        return call.preview


_NEVER = {
    "skipped": False,
    "interrupted": False,
    "stopping_generation": False,
    "job": "",
    "job_count": 0,
    "job_timestamp": "0",
    "job_no": 0,
    "sampling_step": 0,
    "sampling_steps": 0,
}
"""The state of a server that was never called."""
