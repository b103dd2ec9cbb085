"""A job under way: what has become of it so far, and the rows of one size and length of prompts that jobs
have in the loop."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import torch

from sdfast.loop import Rows
from sdfast.preparation import Prepared
from sdfast.row import Member, Row
from sdfast.server.jobs import Begun, Done, Event, Failed, Job, Queued, Step

Listener = Callable[[Event], None]


class Work:
    """A job, from its arrival to its last event.

    Once it is in the queue, the batcher's thread owns everything but `cancelled` and `preview_asked`, which
    anyone may set, and `tell`, which any thread may call: after a job's last event nothing more is told.
    """

    def __init__(
        self, job: Job, listener: Listener, number: int, steps: int, patience: float, second_steps: int = 0
    ) -> None:
        """number: how many jobs arrived before it. steps: network evaluations of each picture; second_steps:
        of its second pass, where there is one. patience: seconds that it may wait for each picture, see
        `places`."""
        self.job, self.number, self._patience = job, number, patience
        self._first_steps, self._second_steps = steps, second_steps
        self.cancelled = False
        self._position: int | None = None  # in the queue, as it was last told
        self.prepared: Prepared | None = None
        self.waiting: deque[int] = deque(range(job.request.images))  # for a place, whatever their pass
        self.second: dict[int, Row] = {}  # rows of the pictures that have done their first pass of two
        self.running: dict[Row, int] = {}  # rows in the loop, and which picture each is
        self.aside: dict[int, Member] = {}  # pictures that were begun and gave their places to others
        self.preview_asked = False
        self._planned: set[int] = set()  # a preview is due after so many steps of the first picture
        self._previews = 0
        self.pngs: dict[int, Future[bytes]] = {}  # of each picture that was decoded, or what is handed over
        self.generators: list[torch.Generator] = []  # of each picture that two engines share
        self.seconds = dict.fromkeys(("waiting", "encoding", "denoising", "decoding"), 0.0)
        self._listener, self._lock = listener, threading.Lock()
        self._ended = False
        self._done_steps = 0
        self._arrived = self._begun = time.monotonic()

    @property
    def ended(self) -> bool:
        return self._ended

    def tell(self, event: Event) -> None:
        """Give the listener an event, unless it has had the last one."""
        with self._lock:
            if self._ended:
                return
            self._ended = isinstance(event, Done | Failed)
            self._listener(event)

    def queued(self, position: int) -> None:
        """It waits, and so many jobs come before it."""
        if position != self._position:
            self._position = position
            self.tell(Queued(position))

    def begin(self) -> None:
        """It waits no more."""
        self.seconds["waiting"] = time.monotonic() - self._arrived
        self.tell(Begun())

    def prepare(self, prepare: Callable[[], Prepared]) -> None:
        start = time.monotonic()
        self.prepared = prepare()
        self._begun = time.monotonic()
        self.seconds["encoding"] = self._begun - start
        steps = self._steps
        wanted = min(self.job.previews, steps - 1)  # after the last step comes the picture itself
        self._planned = {(i + 1) * steps // (wanted + 1) for i in range(wanted)}

    def due(self, picture: int) -> float:
        """When a picture has waited long enough, on the monotonic clock. One after the other they are."""
        return self._arrived + self._patience * (picture + 1)

    @property
    def unfinished(self) -> list[int]:
        """The pictures that have steps left, in order."""
        return sorted([*self.running.values(), *self.aside, *self.waiting])

    def enter(self, picture: int) -> Row | Member:
        """A picture's row, or what it left as; it runs from now on."""
        if picture in self.aside:
            member = self.aside.pop(picture)
            self.running[member.row] = picture
            return member
        self.waiting.remove(picture)
        row = self.second[picture] if picture in self.second else self.ready.rows[picture]
        self.running[row] = picture
        return row

    def goes_on(self, picture: int) -> bool:
        """Whether a picture that has no steps left has a second pass before it."""
        return self._second_steps > 0 and picture not in self.second

    def draw_over(self, picture: int, second: Callable[[], Row]) -> None:
        """A picture has done its first pass and waits for a place with the row of its second."""
        start = time.monotonic()
        self.second[picture] = second()
        self.waiting.append(picture)
        self.seconds["encoding"] += time.monotonic() - start

    def hand_over(self, picture: int, packed: bytes) -> None:
        """A picture is left to another engine."""
        self.pngs[picture] = Future()
        self.pngs[picture].set_result(packed)

    def put_aside(self, row: Row, member: Member) -> None:
        """A row that runs gives its place to another's."""
        self.aside[self.running.pop(row)] = member

    @property
    def first_running(self) -> Row | None:
        """The row of the first picture that is still in the loop."""
        return min(self.running, key=lambda row: self.running[row], default=None)

    def preview_due(self, row: Row, step: int) -> bool:
        """Whether a preview is wanted after this step of the first running row, asked for or planned."""
        picture = self.running[row]
        done = step + (self._first_steps if picture in self.second else 0)
        planned = picture == 0 and done in self._planned
        due = (planned or self.preview_asked) and done < self._steps  # the last has the picture itself
        if due:
            self.preview_asked = False
        return due

    def next_preview(self) -> int:
        """The number of a preview, counted from 0."""
        self._previews += 1
        return self._previews - 1

    def stepped(self, rows: int) -> None:
        """So many of its rows have done another step."""
        self._done_steps += rows
        self.seconds["denoising"] = time.monotonic() - self._begun
        self.tell(Step(self._done_steps, self._total_steps))

    @property
    def _steps(self) -> int:
        """Of each picture, in all its passes."""
        return self._first_steps + self._second_steps

    @property
    def _total_steps(self) -> int:
        return self._steps * self.job.request.images

    @property
    def waiting_steps(self) -> int:
        """Of its pictures that wait for a place."""
        again = sum(picture in self.second for picture in tuple(self.waiting))
        return self._steps * len(self.waiting) - self._first_steps * again

    @property
    def running_steps(self) -> int:
        """Those that its rows still have to do."""
        return self._total_steps - self._done_steps - self.waiting_steps

    @property
    def ready(self) -> Prepared:
        if self.prepared is None:
            raise RuntimeError(f"job {self.job.id} is not prepared")
        return self.prepared

    @property
    def complete(self) -> bool:
        """Whether all of its pictures were decoded."""
        return len(self.pngs) == self.job.request.images

    def deliver(self, tokens: int) -> None:
        """Tell its pictures, once all are complete; waits for PNGs that are still being written.

        tokens: that were read of its prompts.
        """
        if self.cancelled:
            self.tell(Failed("cancelled", "the job was cancelled"))
            return
        pngs = tuple(self.pngs[i].result() for i in range(self.job.request.images))
        self.tell(Done(pngs, self.job.request.seeds, self.ready.truncated, dict(self.seconds), tokens))


class Room:
    """The rows of one size, length of prompts and interval of step caching: those in the loop, and who joins
    and leaves at the next change. A row joins where the others are in its phase."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._joining: list[Row | Member] = []
        self._leaving: set[Row] = set()
        self._discard = False

    def join(self, row: Row | Member) -> None:
        self._joining.append(row)

    def leave(self, row: Row) -> None:
        staying = [other for other in self._joining if row_of(other) is not row]
        if len(staying) == len(self._joining):
            self._leaving.add(row)
        self._joining = staying

    def put_aside(self, row: Row) -> Member:
        """A row that is in the loop, or about to be, leaves it, and may join again later."""
        for waiting in self._joining:
            if row_of(waiting) is row:
                self._joining.remove(waiting)
                return waiting if isinstance(waiting, Member) else Member(waiting)
        self._leaving.add(row)
        return self.rows.member(row)

    def discard(self) -> None:
        """Something failed in the tensors that the rows are in: at the next change they get others."""
        self._discard = True

    def settle(self) -> None:
        """Let the rows come and go. Raises what the lack of memory raises; then the rows are there, but not
        placed: some of them must leave, and it is to be settled again."""
        joining, leaving, discard = self._fitting(), self._leaving, self._discard
        if not (joining or leaving or discard):
            return
        self._joining = [row for row in self._joining if row not in joining]
        self._leaving, self._discard = set(), False
        self.rows.change(joining, leaving, discard=discard)

    def _fitting(self) -> list[Row | Member]:
        """Who can join now: those in the phase of the rows that stay, or of the first to join if none do. The
        others' turn comes within an interval."""
        phase = self.rows.phase_without(self._leaving)
        if phase is None and self._joining:
            phase = _phase(self._joining[0])
        return [waiting for waiting in self._joining if _phase(waiting) == phase]

    @property
    def last(self) -> Row:
        """The row that joined last and stays."""
        return [row for row in [*self.rows.rows, *map(row_of, self._joining)] if row not in self._leaving][-1]

    @property
    def empty(self) -> bool:
        return not self._joining and not set(self.rows.rows) - self._leaving


def row_of(joining: Row | Member) -> Row:
    """The row that joins, or joins again."""
    return joining.row if isinstance(joining, Member) else joining


def _phase(joining: Row | Member) -> tuple[int, int] | None:
    return joining.phase if isinstance(joining, Member) else joining.phase_at(0)
