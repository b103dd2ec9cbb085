"""The server on a real socket: OpenAI's client, clients that misbehave, and signals."""

import base64
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from sdfast.errors import SettingsError
from sdfast.server import listening, logs
from sdfast.server.app import create_app
from sdfast.server.jobs import Failed
from sdfast.server.listening import Server, configuration, listen
from sdfast.server.openai import answers as api
from sdfast.server.settings import Settings
from tests.server.conftest import KEY, problem
from tests.server.studio import FakeStudio

ROOT = Path(__file__).parents[2]


def wait_until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.02)


@contextmanager
def served(studio: FakeStudio) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    settings = Settings.make(port=0, api_key=KEY, max_body=100_000)
    app = create_app(studio, settings)
    server = Server(configuration(app, settings), app, drain=5)
    with listen(settings) as bound:
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        wait_until(lambda: server.started)
        yield bound.getsockname()[1]
        server.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        assert not thread.is_alive()
    assert not server.cut_short


@pytest.fixture
def port(studio: FakeStudio) -> Iterator[int]:
    with served(studio) as port:
        yield port


@contextmanager
def logging_to(stream: StringIO) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("sdfast", "uvicorn")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    logs.set_up(stream)
    try:
        yield
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def sdk(port: int, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)


def head(port: int, *headers: str) -> bytes:
    """A request's head to generations."""
    lines = ["POST /v1/images/generations HTTP/1.1", f"Host: 127.0.0.1:{port}", *headers]
    return "\r\n".join(
        [*lines, f"Authorization: Bearer {KEY}", "Content-Type: application/json", "", ""]
    ).encode()


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer after which the server closes."""
    received = b""
    while chunk := connection.recv(65_536):
        received += chunk
    status, _, rest = received.partition(b"\r\n")
    fields, _, body = rest.partition(b"\r\n\r\n")
    assert b"x-request-id: " in fields.lower()
    return int(status.split()[1]), json.loads(body)


def test_the_real_client_on_a_real_socket(port: int, studio: FakeStudio) -> None:
    with sdk(port) as client:
        answer = client.images.generate(prompt="a boat", n=2, extra_body={"seed": 3})
        assert [picture.seed for picture in answer.data] == [3, 4]
        with client.images.generate(prompt="a boat", stream=True, partial_images=3) as stream:
            assert [event.type.rpartition(".")[2] for event in stream] == ["partial_image"] * 3 + [
                "completed"
            ]
        with pytest.raises(openai.AuthenticationError):
            sdk(port, "wrong").images.generate(prompt="a")


def test_an_image_is_drawn_over_on_a_real_socket(port: int, studio: FakeStudio) -> None:
    file = BytesIO()
    Image.new("RGB", (96, 64), (1, 2, 3)).save(file, "PNG")
    file.seek(0)
    with sdk(port) as client:
        answer = client.images.edit(image=file, prompt="a boat", extra_body={"strength": 0.5})
        drawn = Image.open(BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert (drawn.size, drawn.getpixel((9, 9))) == ((96, 64), (1, 2, 3))
        with client.images.edit(
            image=file.getvalue(), prompt="a", stream=True, extra_body={"seed": 1}
        ) as stream:
            assert [event.type for event in stream] == ["image_edit.completed"]
        with pytest.raises(openai.UnprocessableEntityError, match="no PNG, JPEG or WebP"):
            client.images.edit(image=b"%!PS", prompt="a")
        with pytest.raises(openai.APIStatusError) as caught:
            client.images.edit(image=b"x" * 200_000, prompt="a")
    assert caught.value.status_code == 413


def test_partial_pictures_come_while_the_job_runs(port: int, studio: FakeStudio) -> None:
    studio.seconds = 0.3
    with sdk(port) as client, client.images.generate(prompt="a", stream=True, partial_images=1) as stream:
        next(iter(stream))
        assert studio.live


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_job(port: int, studio: FakeStudio, stream: bool) -> None:
    studio.hang = True
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(port, f"Content-Length: {len(body)}") + body)
        wait_until(lambda: studio.live)
    wait_until(lambda: studio.cancelled)
    assert studio.cancelled == [studio.jobs[0].id]


def test_a_stream_begins_when_its_job_is_taken_in(port: int, studio: FakeStudio) -> None:
    studio.hang = True  # after the first event
    body = {"prompt": "a", "stream": True, "progress": True}
    url = f"http://127.0.0.1:{port}/v1/images/generations"
    with httpx.stream("POST", url, json=body, headers={"authorization": f"Bearer {KEY}"}) as answer:
        assert answer.status_code == 200
        assert next(answer.iter_lines()) == "event: image_generation.progress"
    wait_until(lambda: studio.cancelled == [studio.jobs[0].id])


def test_a_client_that_leaves_within_its_body_harms_nobody(port: int, studio: FakeStudio) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(port, "Content-Length: 500") + b"{")
    with sdk(port) as client:
        client.images.generate(prompt="a")
    assert len(studio.jobs) == 1


def test_a_body_over_the_limit_is_refused_by_its_length(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(port, "Content-Length: 1000000000"))
        status, body = answer_on(connection)
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_is_refused_reads_why_while_it_still_sends(port: int) -> None:
    for _ in range(20):  # a close with bytes unread would reset most of these connections
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head(port, "Content-Length: 2000000"))
            for _ in range(20):
                connection.sendall(b" " * 100_000)
            status, body = answer_on(connection)
        assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_refused_client_that_never_ends_is_cut_off(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "LINGER_SECONDS", 0.2)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        connection.sendall(head(port, "Content-Length: 1000000000"))
        until = time.monotonic() + 10
        while time.monotonic() < until:
            connection.sendall(b" " * 1_000)
            time.sleep(0.01)


def test_endless_chunks_end_with_413(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(port, "Transfer-Encoding: chunked"))
        for _ in range(101):
            connection.sendall(b"3e8\r\n" + b" " * 1_000 + b"\r\n")
        status, body = answer_on(connection)
    assert (status, body["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("sent", [b"", b"GET /health/live HTTP/1.1\r\nHost: "])
def test_headers_that_do_not_come_are_408(port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        status, body = answer_on(connection)
    assert (status, body["error"]["code"]) == (408, "request_timeout")


def test_slow_headers_on_a_connection_that_was_used_are_408(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # idle, which is allowed for longer
        connection.sendall(b"GET /health")
        assert answer_on(connection)[0] == 408


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_never_reads_loses_its_connection(
    port: int, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    size = 12_000_000  # more than the socket's own buffers
    monkeypatch.setattr(listening, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(api, "encode", lambda png, format, quality: (b"x" * size, True))
    body = json.dumps({"prompt": "a", "stream": stream, "partial_images": int(stream)}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(port, f"Content-Length: {len(body)}") + body)
        wait_until(lambda: studio.jobs and not studio.live)
        time.sleep(1.0)
        with sdk(port) as other:
            assert other.models.list().data
        received = 0
        with pytest.raises(ConnectionResetError):
            while chunk := connection.recv(2**20):
                received += len(chunk)
            raise ConnectionResetError  # an end without a reset is as good
        assert received < size


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 not HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000])
def test_what_is_not_http_is_400_in_the_same_shape(port: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        status, body = answer_on(connection)
    assert (status, body["error"]["code"]) == (400, "invalid_request")


def test_too_many_connections_are_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "CONNECTIONS", 1)
    address = ("127.0.0.1", port)
    with socket.create_connection(address), socket.create_connection(address, timeout=10) as second:
        status, body = answer_on(second)
    assert (status, body["error"]["code"]) == (503, "too_many_connections")


def test_the_log_has_the_traceback_of_a_bug_under_the_answers_id(port: int, studio: FakeStudio) -> None:
    studio.bug = True
    log = StringIO()
    with logging_to(log), sdk(port) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="a")
        wait_until(lambda: '"traceback"' in log.getvalue())
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    [bug] = [line for line in lines if "traceback" in line]
    assert "a bug in the studio" in bug["traceback"]
    assert bug["request_id"] == caught.value.request_id
    assert [line["status"] for line in lines if line["message"] == "answered"] == [500]
    assert KEY not in log.getvalue()
    assert not [line for line in lines if line["logger"] == "uvicorn.access"]  # the guard's line is enough


def test_the_log_has_the_reason_of_a_failure(port: int, studio: FakeStudio) -> None:
    studio.failure = Failed("engine", "the device fell off the bus")
    log = StringIO()
    with logging_to(log), sdk(port) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="a")
        wait_until(lambda: '"answered"' in log.getvalue())
    failure, answered = [json.loads(line) for line in log.getvalue().splitlines()]
    assert (failure["kind"], failure["error"]) == ("engine", "the device fell off the bus")
    assert failure["request_id"] == answered["request_id"] == caught.value.request_id


def test_an_address_that_is_taken_is_told() -> None:
    with listen(Settings.make(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"127.0.0.1:{port}: cannot be listened on"):
            listen(Settings.make(port=port))


class Process:
    """A server in a process of its own."""

    def __init__(self, seconds: float, drain: float = 20.0) -> None:
        with listen(Settings.make(port=0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "tests.server.serving", str(self.port), str(seconds), str(drain)]
        self._process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"authorization": "Bearer secret-key"},
            timeout=30,
        )
        wait_until(self._listens, 30)

    def _listens(self) -> bool:
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            assert self._process.poll() is None, "the server ended"
            return False

    def draw(self) -> httpx.Response:
        return self.http.post("/v1/images/generations", json={"prompt": "a"})

    def busy(self) -> bool:
        return 'sdfast_running_rows{engine="tiny"} 1.0' in self.http.get("/metrics").text

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def ended(self) -> tuple[int, list[dict[str, Any]]]:
        """The exit status and the log."""
        _, log = self._process.communicate(timeout=20)
        self.http.close()
        return self._process.returncode, [json.loads(line) for line in log.splitlines()]


def test_after_sigterm_ready_is_503_and_running_work_is_finished() -> None:
    server = Process(seconds=1.5)
    with ThreadPoolExecutor() as pool:
        drawing = pool.submit(server.draw)
        wait_until(server.busy)
        server.terminate()
        wait_until(lambda: server.http.get("/health/ready").status_code == 503)
        assert server.http.get("/health/live").status_code == 200
        assert server.draw().json()["error"]["code"] == "not_ready"
        assert drawing.result().status_code == 200
    status, log = server.ended()
    assert status == 0
    answered = [line for line in log if line["message"] == "answered"]
    assert {200, 503} <= {line["status"] for line in answered}
    assert all(line["request_id"].startswith("req_") for line in answered)
    assert "secret-key" not in json.dumps(log)


@pytest.mark.parametrize("again", [True, False])
def test_a_second_signal_or_the_time_ends_what_still_runs(again: bool) -> None:
    server = Process(seconds=60, drain=20 if again else 0.2)
    with ThreadPoolExecutor() as pool:
        drawing = pool.submit(server.draw)
        wait_until(server.busy)
        server.terminate()
        if again:
            wait_until(lambda: server.http.get("/health/ready").status_code == 503)
            server.terminate()
        status, log = server.ended()
        assert status == 1
        assert any("what still runs is ended" in line["message"] for line in log)
        assert problem(drawing.result(), 503)["message"].startswith("the server was stopped")
