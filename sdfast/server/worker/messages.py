"""What the frames between the server and a worker mean.

To the worker: a job to take, one to cancel, one to preview. To the server: that the engine is ready, or why
it never will be; each job's events; and several times a second a report. Deadlines cross as seconds that are
left, requests as their JSON, pictures as bytes: each a part of its frame.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from sdfast import errors
from sdfast.request import Request
from sdfast.server.jobs import Begun, Done, Event, Failed, Job, Load, Origin, Preview, Queued, Step
from sdfast.server.worker.frames import Frame, FrameError

T = TypeVar("T")

TAKE, CANCEL, PREVIEW = "take", "cancel", "preview"
READY, BROKEN, REPORT = "ready", "broken", "report"


@dataclass(frozen=True)
class Report:
    """How the worker is. stalled: see `Batcher.stalled`. retry_after: seconds until the queue has a place."""

    stalled: float
    retry_after: float
    load: Load


@dataclass(frozen=True)
class Broken:
    """The worker ends: its engine cannot be opened, or failed for good. error: the name of its class."""

    error: str
    message: str


PictureOfJob = Literal["image", "mask", "control", "ip_adapter", "handed"]
"""The pictures that a job may have, and the latents that it may be handed, by their names in `Job`."""


@dataclass(frozen=True)
class _Take:
    engine: str
    seconds: float | None  # until the deadline
    previews: int
    pictures: tuple[PictureOfJob, ...]  # the parts after the request, in their order
    hands_over: bool = False
    origin: Origin | None = None


_EVENTS: Mapping[str, type[Event]] = {
    kind.__name__.lower(): kind for kind in (Queued, Begun, Step, Preview, Done, Failed)
}
_ADAPTERS: Mapping[type, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (Report, Broken, _Take, *_EVENTS.values())
}


def take(job: Job) -> Frame:
    pictures = {name: part for name in get_args(PictureOfJob) if (part := getattr(job, name)) is not None}
    seconds = None if job.deadline is None else job.deadline - time.monotonic()
    told = _Take(job.engine, seconds, job.previews, tuple(pictures), job.hands_over, job.origin)
    fields = asdict(told)
    return Frame(TAKE, job.id, fields, (job.request.model_dump_json().encode(), *pictures.values()))


def job_of(frame: Frame) -> Job:
    """The job of a `take` frame. Raises `FrameError`."""
    told = _read(_Take, frame)
    names = ("request", *told.pictures)
    if len(frame.parts) != len(names) or len(set(names)) < len(names):
        raise FrameError(f"a job of {len(frame.parts)} parts, which are said to be: {', '.join(names)}")
    try:
        request = Request.model_validate_json(frame.parts[0])
    except ValidationError as error:
        raise FrameError(f"a request that is none: {error.errors()[0]['msg']}") from None
    parts: dict[str, Any] = dict(zip(told.pictures, frame.parts[1:], strict=True))
    deadline = None if told.seconds is None else time.monotonic() + told.seconds
    parts |= {"hands_over": told.hands_over, "origin": told.origin}
    return Job(frame.id, told.engine, request, deadline, told.previews, **parts)


def of_event(job_id: str, event: Event) -> Frame:
    """An event; its pictures are the frame's parts."""
    fields, parts = asdict(event), tuple[bytes, ...]()
    if isinstance(event, Done):
        parts = fields.pop("pngs")
    elif isinstance(event, Preview):
        parts = (fields.pop("png"),)
    return Frame(type(event).__name__.lower(), job_id, fields, parts)


def event_of(frame: Frame) -> Event:
    """A job's event. Raises `FrameError`."""
    kind, fields = _EVENTS.get(frame.kind), dict(frame.fields)
    if kind is None:
        raise FrameError(f"{frame.kind[:60]!r} is nothing that a worker tells")
    if kind is Done:
        fields["pngs"] = frame.parts
    elif kind is Preview and len(frame.parts) == 1:
        fields["png"] = frame.parts[0]
    return _read(kind, replace(frame, fields=fields))


def of_report(report: Report) -> Frame:
    return Frame(REPORT, fields=asdict(report))


def report_of(frame: Frame) -> Report:
    return _read(Report, frame)


def of_broken(error: Exception) -> Frame:
    """Only what sdfast raises on purpose keeps its class."""
    known = isinstance(error, errors.SdfastError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    return Frame(BROKEN, fields=asdict(Broken(type(error).__name__ if known else "BackendError", message)))


def error_of(frame: Frame) -> errors.SdfastError:
    """What a `broken` frame tells, to be raised here."""
    broken = _read(Broken, frame)
    kind = getattr(errors, broken.error, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.SdfastError)):
        raise FrameError(f"{broken.error[:60]!r} is no error of sdfast")
    return kind(broken.message)


def _read(kind: type[T], frame: Frame) -> T:
    """The fields of a frame as a message. Raises `FrameError`."""
    try:
        read: T = _ADAPTERS[kind].validate_python(frame.fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FrameError(f"{frame.kind}: {where}: {first['msg']}") from None
    return read
