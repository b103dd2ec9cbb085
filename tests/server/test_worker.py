"""The engine's process: what it draws, what becomes of jobs when it fails, and that another follows it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdfast.errors import BackendError, EngineError, RequestError
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.jobs import Begun, Done, Preview, Queued, QueueFull, Step
from sdfast.server.worker import supervisor
from tests.fakes import FakeEngine
from tests.server.fake_worker import MAX_QUEUE, MAX_ROWS
from tests.server.house import Heard, House, alive, request, until

SLOW = {"unet": {"kind": "slow", "seconds": 0.02}}
LONG = 900  # steps: 18 s with `SLOW`
READY = b'{"kind": "ready", "id": "", "fields": {}, "parts": []}'


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worker") / "failpoints.json"


@pytest.fixture(scope="module")
def shared(file: Path) -> Iterator[House]:
    command = [sys.executable, "-m", "tests.server.fake_worker", str(file)]
    house = House(command, max_queue=MAX_QUEUE, step_timeout=1.0, silence=1.5, backoff=0.05)
    yield house
    house.close()


@pytest.fixture
def house(shared: House, file: Path) -> Iterator[House]:
    """A worker at work, with nothing to do."""
    shared.ready()
    shared.fail(file)
    yield shared
    shared.cancel_all()
    assert not shared.running.done()


def assert_drawn(done: Done, asked: Request) -> None:
    """The pictures are the pipeline's."""
    assert done.seeds == asked.seeds
    for png, image in zip(done.pngs, Pipeline(FakeEngine()).generate(asked).images, strict=True):
        assert np.array_equal(np.asarray(Image.open(BytesIO(png))), np.asarray(image))


def assert_goes_on(house: House, restarts: int) -> None:
    """Another worker is there, and draws what is asked."""
    until(lambda: house.studio.statistics()["fake"].restarts == restarts + 1)
    house.ready()
    asked = request("after", seed=9)
    assert_drawn(house.submit(asked).done(), asked)


def occupied(house: House) -> tuple[list[Heard], int]:
    """Jobs that run and a job that waits, none of which ends soon; and how often the worker was replaced."""
    jobs = [house.submit(request(seed=seed, steps=LONG)) for seed in range(MAX_ROWS + 1)]
    until(lambda: any(isinstance(event, Step) for event in jobs[MAX_ROWS - 1].events))
    assert house.studio.waiting() == 1
    return jobs, house.studio.statistics()["fake"].restarts


def test_pictures_and_events_come_through(house: House) -> None:
    asked = request("the sea and all", seed=7, images=2, scheduler="euler_a", steps=5)
    heard = house.submit(asked, previews=1)
    done = heard.done()
    assert_drawn(done, asked)
    assert done.truncated == (" and all"[1:],)
    assert set(done.seconds) == {"waiting", "encoding", "denoising", "decoding"}
    kinds = [type(event) for event in heard.events]
    assert kinds[:2] == [Queued, Begun]
    assert kinds.count(Preview) == 1
    [preview] = [event for event in heard.events if isinstance(event, Preview)]
    assert Image.open(BytesIO(preview.png)).size == (16, 16)
    assert [event for event in heard.events if isinstance(event, Step)][-1] == Step(10, 10)


def test_what_cannot_be_done_is_told_at_once(house: House) -> None:
    with pytest.raises(
        RequestError, match=r"size 64x64 is not one of this engine's \(width x height: 16x16\)"
    ):
        house.submit(request(height=64, width=64))
    with pytest.raises(RequestError, match="'other' is not here; there are: fake"):
        house.submit(request(), engine="other")
    unable = house.submit(request(scheduler="DPM++ 2M Karras", steps=None, timesteps=(900.0, 1.0)))
    assert unable.failed().kind == "request" and len(unable.events) == 1
    past = time.monotonic() - 1
    assert house.submit(request(), deadline=past).failed().kind == "timeout"


def test_the_queue_is_bounded_here(house: House, file: Path) -> None:
    house.fail(file, **SLOW)
    jobs, _ = occupied(house)
    jobs += [house.submit(request(seed=seed, steps=LONG)) for seed in range(MAX_QUEUE - 1)]
    with pytest.raises(QueueFull) as full:
        house.submit(request())
    assert full.value.retry_after >= 1
    assert house.studio.waiting() == MAX_QUEUE
    until(lambda: house.studio.running() == MAX_ROWS)
    house.cancel_all()
    assert {job.failed().kind for job in jobs} == {"cancelled"}
    assert not house.studio.cancel("job1")
    assert not house.studio.preview("job1")
    assert (house.studio.waiting(), house.studio.running()) == (0, 0)


def test_steps_are_told_ten_times_a_second_and_previews_on_demand(house: House, file: Path) -> None:
    house.fail(file, **SLOW)
    heard = house.submit(request(steps=40), id="watched")
    until(lambda: any(isinstance(event, Step) for event in heard.events))
    assert house.studio.preview("watched")
    heard.done()
    steps = [event for event in heard.events if isinstance(event, Step)]
    assert 4 <= len(steps) <= 12
    assert [event.index for event in heard.events if isinstance(event, Preview)] == [0]


def test_numbers_of_the_work(house: House, file: Path) -> None:
    before = house.studio.statistics()["fake"].load
    asked = request(images=3, steps=10)
    house.submit(asked).done()
    until(lambda: sum(house.studio.statistics()["fake"].load.ticks) >= sum(before.ticks) + 20)
    after = house.studio.statistics()["fake"].load
    assert 0 < after.tick_seconds - before.tick_seconds < 5
    assert after.memory["resident"] > 2**26
    house.fail(file, **SLOW)
    occupied(house)
    until(lambda: house.studio.statistics()["fake"].load.waiting_steps == LONG)
    load = house.studio.statistics()["fake"].load
    assert (load.rows, load.waiting_steps) == (MAX_ROWS, LONG)
    assert LONG < load.running_steps < MAX_ROWS * LONG


def test_signals_for_the_server_are_not_for_the_worker(house: House) -> None:
    assert os.getsid(house.pid) != os.getsid(0)  # what a terminal signals goes to a session's group
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(house.pid, number)
    asked = request("unmoved")
    assert_drawn(house.submit(asked).done(), asked)


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGKILL, r"signal 9 \(SIGKILL.*too little memory"), (signal.SIGSEGV, r"signal 11 \(SIGSEGV\)")],
)
def test_a_worker_that_is_killed_fails_its_jobs_at_once_and_is_replaced(
    house: House, file: Path, number: int, told: str
) -> None:
    house.fail(file, **SLOW)
    jobs, restarts = occupied(house)
    killed = time.monotonic()
    os.kill(house.pid, number)
    for job in jobs:
        failed = job.failed()
        assert failed.kind == "engine"
        assert re.search(told, failed.message), failed.message
        assert job.ended_at - killed < 1
    assert not house.studio.ready
    with pytest.raises(BackendError, match="'fake' is not ready"):
        house.submit(request())
    assert_goes_on(house, restarts)


@pytest.mark.parametrize(
    ("kind", "told"), [("hang", "nothing went on in its process"), ("grip", "gave no sign of life")]
)
def test_a_worker_that_hangs_is_replaced(house: House, file: Path, kind: str, told: str) -> None:
    house.fail(file, **SLOW)
    jobs, restarts = occupied(house)
    hung, began = house.pid, time.monotonic()
    house.fail(file, unet={"kind": kind})
    for job in jobs:
        assert told in job.failed().message
        assert 0.9 < job.ended_at - began < 3  # 1 s, or 1.5 s of silence
    until(lambda: not alive(hung), 1)
    assert_goes_on(house, restarts)


def test_a_long_row_of_short_calls_is_no_hang(house: House, file: Path) -> None:
    """Calls that take less than the limit each, but more together, in one encoding and one tick."""
    restarts = house.studio.statistics()["fake"].restarts
    house.fail(file, unet={"kind": "slow", "seconds": 0.7}, text_encoder={"kind": "slow", "seconds": 0.7})
    house.submit(request("slow", negative_prompts=("slower",), steps=1)).done()
    assert house.studio.statistics()["fake"].restarts == restarts


def test_a_worker_whose_device_failed_for_good_is_replaced(house: House, file: Path) -> None:
    house.fail(file, unet={"kind": "raise"})
    pid, restarts = house.pid, house.studio.statistics()["fake"].restarts
    for seed in range(3):  # the batcher gives up after so many
        failed = house.submit(request(seed=seed)).failed()
        assert (failed.kind, failed.message) == ("engine", "the engine failed: a failpoint raised")
    until(lambda: not alive(pid), 2)
    assert_goes_on(house, restarts)


@pytest.fixture
def house_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Houses whose worker is a few lines of Python, with `channel`, a socket."""
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.3)
    houses: list[House] = []

    def make(code: str, **patience: Any) -> House:
        start = f"import os, socket, time; channel = socket.socket(fileno=0)\n{code}"
        houses.append(House([sys.executable, "-c", start], **{"backoff": 0.01, **patience}))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


def framed(header: bytes, parts: bytes = b"") -> bytes:
    return len(header).to_bytes(4) + header + parts


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"\xff\xff\xff\xff", "a header of 4294967295 bytes"),
        (framed(b"junk"), "is no header"),
        (framed(b"[]"), "is no header"),
        (framed(READY.replace(b"ready", b"gone")), "'gone' is nothing that a worker tells"),
        (framed(READY.replace(b"[]", b"[9000000000]")), "1 parts of 9000000000 bytes"),
        (framed(READY.replace(b"[]", b"[-1]")), "is no header"),
        (framed(READY.replace(b"ready", b"report")), "report: stalled"),
        (framed(READY.replace(b"ready", b"queued")), "queued: position"),
        (framed(READY.replace(b"ready", b"begun").replace(b'""', b'"else"')), "'else', a job that is not"),
    ],
)
def test_a_worker_that_talks_nonsense_is_replaced(house_of: Any, sent: bytes, told: str) -> None:
    house = house_of(
        f"channel.sendall({framed(READY)!r}); channel.recv(1); channel.sendall({sent!r}); time.sleep(60)"
    )
    house.ready()
    failed = house.submit(request()).failed()
    assert failed.kind == "engine" and told in failed.message
    until(lambda: house.studio.statistics()["fake"].restarts == 1)
    house.ready()


@pytest.mark.parametrize("code", ["os._exit(9)", f"channel.sendall({framed(READY)!r}); os._exit(9)"])
def test_workers_that_only_fail_are_given_up(house_of: Any, code: str) -> None:
    start = time.monotonic()
    house = house_of(code, failures=4, backoff=0.1)
    with pytest.raises(BackendError, match=r"'fake' was given up: 4 .* exit status 9"):
        house.running.result(10)
    assert time.monotonic() - start > 0.1 + 0.2 + 0.4
    assert not house.studio.ready


def test_what_keeps_an_engine_from_opening_is_raised_here(house_of: Any) -> None:
    broken = (
        b'{"kind": "broken", "id": "", "fields": {"error": "EngineError", "message": "no unet"}, "parts": []}'
    )
    house = house_of(f"channel.sendall({framed(broken)!r}); time.sleep(60)")
    with pytest.raises(EngineError, match=r"^no unet$"):
        house.running.result(10)


def test_a_command_that_cannot_be_started_is_told() -> None:
    house = House(["/nowhere/python"])
    with pytest.raises(BackendError, match=r"cannot be started: .*No such file"):
        house.running.result(10)
    house.close()


def test_a_worker_ends_with_its_socket_even_while_it_opens_an_engine() -> None:
    code = (
        "import time\n"
        "from sdfast.server.worker import leash, process\n"
        "leash.put_on = lambda: print('not on Linux', flush=True)\n"
        "process.run(lambda: time.sleep(60), max_rows=1, max_queue=1)"
    )
    ours, theirs = socket.socketpair()
    with theirs, ours:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "not on Linux\n"
    assert process.wait(1) == 0
    process.stdout.close()
