"""Jobs and events in frames: what goes in comes out, in whatever pieces; what is too large does not go."""

import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from sdfast.errors import SdfastError
from sdfast.server import studio
from sdfast.server.jobs import Begun, Done, Event, Failed, Job, Load, Preview, Queued, Step
from sdfast.server.settings import Settings
from sdfast.server.studio import WorkerStudio
from sdfast.server.worker import frames, messages
from sdfast.server.worker.frames import Decoder, Frame, FrameError, encoded
from sdfast.server.worker.process import _Teller
from tests.server.house import request


def sent(frame: Frame, size: int = 1) -> Frame:
    """A frame after it went through a stream, in pieces of `size` bytes."""
    data, decoder = b"".join(encoded(frame)), Decoder()
    [came] = [one for i in range(0, len(data), size) for one in decoder.feed(data[i : i + size])]
    return came


@pytest.mark.parametrize("size", [1, 7, 2**20])
@pytest.mark.parametrize(
    "pictures",
    [
        {},
        {"image": b"\0" * 768},
        {"image": b"\1" * 768, "mask": b"\xff" * 256},
        {"control": b"\2" * 768},
        {"image": b"\1" * 768, "control": b"\2" * 768},
        {"image": b"\1" * 768, "mask": b"\xff" * 256, "control": b""},
    ],
)
def test_jobs_go_through(size: int, pictures: dict[str, bytes]) -> None:
    asked = request(
        *("ein Schloß 🏰",),
        **{"seed": 2**64 - 5, "images": 2, "strength": 0.5, "sigmas": (3.0, 1.0, 0.0), "steps": None},
        loras={"öl": 0.5, "ink": (1.0, -0.25)},
    )
    job = Job("id", "fake", asked, time.monotonic() + 5, 2, **pictures)
    came = messages.job_of(sent(messages.take(job), size))
    assert came.deadline == pytest.approx(job.deadline, abs=0.5)
    assert vars(came) | {"deadline": 0} == vars(job) | {"deadline": 0}
    assert messages.job_of(sent(messages.take(Job("id", "fake", asked)))).deadline is None


EVENTS: tuple[Event, ...] = (
    Queued(3),
    Begun(),
    Step(2, 9),
    Preview(1, b"\x89PNG"),
    Done((b"one", b"", b"three"), (1, 2, 2**64 - 1), ("", "ü", ""), {"waiting": 0.25}, 12),
    Failed("numerical", "the latents\nare not finite"),
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_go_through(event: Event) -> None:
    frame = sent(messages.of_event("id", event))
    assert (frame.id, messages.event_of(frame)) == ("id", event)


def test_frames_follow_each_other() -> None:
    data = b"".join(b"".join(encoded(messages.of_event("id", event))) for event in EVENTS)
    assert [messages.event_of(frame) for frame in Decoder().feed(data)] == list(EVENTS)


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (Frame("step", "id", {"done": "x", "total": 1}), "step: done"),
        (Frame("failed", "id", {"kind": "bored", "message": ""}), "failed: kind"),
        (Frame("preview", "id", {"index": 0}), "preview: png"),
        (Frame("done", "id", {"seeds": [1]}, (b"",)), "done: truncated"),
        (Frame("pickle", "id"), "'pickle' is nothing"),
    ],
)
def test_events_that_are_none_are_faults(frame: Frame, told: str) -> None:
    with pytest.raises(FrameError, match=told):
        messages.event_of(frame)


ASKED = request().model_dump_json().encode()


@pytest.mark.parametrize(
    ("pictures", "parts", "told"),
    [
        ([], (), "a job of 0 parts, which are said to be: request$"),
        ([], (b"{}",), "a request that is none"),
        ([], (b"{",), "a request that is none"),
        ([], (ASKED, b""), "a job of 2 parts, which are said to be: request$"),
        (["image", "control"], (ASKED, b""), "a job of 2 parts.*: request, image, control"),
        (["image", "image"], (ASKED, b"", b""), "a job of 3 parts.*: request, image, image"),
        (["engine"], (ASKED, b""), "take: pictures.0"),
        (None, (ASKED,), "take: pictures"),
    ],
)
def test_jobs_that_are_none_are_faults(pictures: Any, parts: tuple[bytes, ...], told: str) -> None:
    fields = {"engine": "fake", "seconds": None, "previews": 0, "pictures": pictures}
    with pytest.raises(FrameError, match=told):
        messages.job_of(Frame("take", "id", fields, parts))


@pytest.mark.parametrize("name", ["Exception", "SdfastErrors", "first_line", "__name__"])
def test_only_errors_of_sdfast_are_raised_here(name: str) -> None:
    with pytest.raises(FrameError, match="no error of sdfast"):
        messages.error_of(Frame("broken", "", {"error": name, "message": "x"}))
    error = messages.error_of(sent(messages.of_broken(ZeroDivisionError("by zero"))))
    assert isinstance(error, SdfastError) and str(error) == "ZeroDivisionError: by zero"


def test_what_is_too_large_is_refused_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "PARTS_BYTES", 1_000)
    with pytest.raises(FrameError, match="2 parts of 1500 bytes; the most are 256 parts and 1000 bytes"):
        encoded(Frame("take", parts=(b"x" * 500, b"x" * 1_000)))
    outbox = SimpleQueue[list[bytes]]()
    _Teller("id", outbox)(Done((b"x" * 1_001,), (1,), ("",), {}))
    [frame] = Decoder().feed(b"".join(outbox.get()))
    failed = messages.event_of(frame)
    assert isinstance(failed, Failed)
    assert failed.kind == "request" and "too large" in failed.message


def test_settings_reach_the_worker(sd_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(studio, "Supervisor", lambda *given, **named: made.append((given, named)))
    given = {"SDFAST_STEP_TIMEOUT": "7", "SDFAST_QUEUE": "5", "SDFAST_PREVIEWS": "fast"}
    settings = Settings.load({"max_rows": 3}, given)
    found = WorkerStudio.of([sd_engine], settings, "cpu")
    assert list(found.engines) == ["sd"]
    [((name, command), named)] = made
    assert (name, named["max_queue"], named["patience"].step_timeout) == ("sd", 5, 7.0)
    limits = ["--max-rows", "3", "--max-queue", "5", "--previews", "fast"]
    assert command[-9:] == [str(sd_engine), "--device", "cpu", *limits]


def test_a_report_goes_through() -> None:
    report = messages.Report(1.5, 2.0, Load(rows=2, waiting_steps=3, memory={"allocated": 2**40}))
    assert messages.report_of(sent(messages.of_report(report))) == report
