"""The jobs under way: who waits in the queue, who was begun, and whether more are taken.

Every thread asks for them here, behind one lock; the batcher's alone begins and ends them.
"""

import threading
from bisect import insort
from collections.abc import Callable

from sdfast.errors import BackendError
from sdfast.server.places import Picture
from sdfast.server.work import Work


class Works:
    """All jobs that have not had their last event."""

    def __init__(self, max_queue: int) -> None:
        """max_queue: jobs that wait, none of whose rows is in."""
        self._max_queue = max_queue
        self._changed = threading.Condition()  # guards the others
        self._by_id: dict[str, Work] = {}
        self._queue: list[Work] = []  # who is due the earliest comes first
        self._begun: list[Work] = []
        self._arrived = 0
        self._closing = False
        self._healthy = True

    # For every thread:

    def take_in(self, job_id: str, make: Callable[[int], Work]) -> bool:
        """Put a job into the queue; False when that is full. make: from how many jobs arrived before it.

        Raises `BackendError` when no more jobs are taken; `ValueError` for the id of one that is under way.
        """
        with self._changed:
            if self._closing or not self._healthy:
                raise BackendError("the engine takes no more jobs: it is closed, or it failed too often")
            if job_id in self._by_id:
                raise ValueError(f"job {job_id!r} is under way already")
            if len(self._queue) >= self._max_queue:
                return False
            work = self._by_id[job_id] = make(self._arrived)
            insort(self._queue, work, key=lambda waiting: Picture(waiting, 0).due)
            work.queued(self._queue.index(work))
            self._arrived += 1
            self._changed.notify()
            return True

    def cancel(self, job_id: str) -> bool:
        """Have a job ended; False when none of this id is under way."""
        with self._changed:
            work = self._by_id.get(job_id)
            if work is None:
                return False
            work.cancelled = True
            self._changed.notify()
            return True

    def preview(self, job_id: str) -> bool:
        """Ask for a preview of a job; False when none of this id is under way."""
        with self._changed:
            work = self._by_id.get(job_id)
            if work is not None:
                work.preview_asked = True
            return work is not None

    def close(self, *, drain: bool) -> None:
        """Take no more jobs; those that are there are cancelled, unless they are to be drained."""
        with self._changed:
            self._closing = True
            if not drain:
                for work in self._by_id.values():
                    work.cancelled = True
            self._changed.notify()

    def give_up(self) -> None:
        """The engine failed for good: take no more jobs."""
        with self._changed:
            self._healthy = False

    @property
    def healthy(self) -> bool:
        """Whether the engine was not given up."""
        return self._healthy

    @property
    def all(self) -> list[Work]:
        with self._changed:
            return list(self._by_id.values())

    @property
    def queue(self) -> list[Work]:
        """Those that wait, none of whose rows is in; who is due the earliest comes first."""
        with self._changed:
            return list(self._queue)

    @property
    def begun(self) -> list[Work]:
        """Those that wait no more, in the order in which they were begun."""
        return list(self._begun)

    # For the batcher's thread:

    def wait(self) -> bool:
        """Until there is a job; False when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            return bool(self._queue)

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        with self._changed:
            return bool(self._queue or self._begun)

    def candidates(self) -> tuple[int, list[Work]]:
        """How many jobs have arrived, and those that may have places: who has begun comes first."""
        with self._changed:
            return self._arrived, self._begun + self._queue

    def begin(self, work: Work) -> None:
        """It waits no more."""
        with self._changed:
            self._queue.remove(work)
            self._begun.append(work)

    def leave(self, work: Work) -> None:
        """There is nothing more to do for it, other than to tell its last event."""
        with self._changed:
            for works in (self._queue, self._begun):
                if work in works:
                    works.remove(work)

    def forget(self, work: Work) -> None:
        """Its last event is next: it cannot be cancelled any more, and its id is free."""
        with self._changed:
            del self._by_id[work.job.id]
