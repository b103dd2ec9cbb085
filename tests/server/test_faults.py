"""What clients do wrong: a 4xx that names the field, before anything reaches a studio."""

import asyncio
import base64
import gzip
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from sdfast.server import guard
from sdfast.server.app import create_app
from sdfast.server.jobs import Failed
from sdfast.server.settings import Settings
from tests.server.conftest import KEY, problem
from tests.server.studio import FakeStudio, engine

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": }',
        b"prompt=a",
        b'"a"',
        b"[]",
        b"\xff\xfe",
        b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}",
        b'{"prompt": ' + b"[" * 50_000 + b"}",
        b'{"prompt": "a", "seed": NotANumber}',
    ],
)
async def test_a_body_that_is_not_a_json_object(post: Any, studio: FakeStudio, body: bytes) -> None:
    assert problem(await post(body), 400)["code"] == "invalid_json"
    assert studio.jobs == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 7),
        ("prompt", None),
        ("prompt", ["a"]),
        ("prompt", "a\0b"),
        ("prompt", "a\ud800b"),
        ("prompt", "a" * 32_769),
        ("negative_prompt", "\0"),
        ("negative_prompt", {"a": 1}),
        ("model", "\ud800"),
        ("n", 0),
        ("n", 11),
        ("n", 10**9),
        ("n", 1.5),
        ("n", True),
        ("n", "1"),
        ("size", "0x64"),
        ("size", "-8x8"),
        ("size", "65x64"),
        ("size", "512"),
        ("size", "٦٤x٦٤"),
        ("size", "99999x64"),
        ("size", "512x512"),
        ("size", 512),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("num_inference_steps", 0),
        ("num_inference_steps", 10**9),
        ("num_inference_steps", float("inf")),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", -float("inf")),
        ("guidance_scale", "7"),
        ("guidance_scale", 1e9),
        ("guidance_rescale", 2),
        ("eta", -0.5),
        ("clip_skip", 65),
        ("scheduler", "Euler z"),
        ("scheduler", "\0"),
        ("output_format", "gif"),
        ("output_format", "tiff"),
        ("output_compression", 101),
        ("output_compression", 50),
        ("partial_images", 4),
        ("partial_images", 1),
        ("stream", "yes"),
        ("progress", True),
        ("progress", 1),
        ("user", "u" * 513),
        ("safety_identifier", "\ud800"),
        ("response_format", "url"),
        ("quality", "hd"),
        ("style", "natural"),
        ("background", "transparent"),
        ("moderation", "strict"),
        ("complexity", "high"),
        ("svg", {"model": "a"}),
        ("frame_count", 2),
        ("frame_duration_ms", 40),
        ("image", "http://169.254.169.254/"),
        ("steps", 20),
    ],
)
async def test_a_wrong_field_is_named(post: Any, studio: FakeStudio, field: str, value: Any) -> None:
    answer = await post({"prompt": "a", field: value})
    error = problem(answer, 422, field)
    assert field in error["message"]
    assert studio.jobs == []


async def test_a_finite_number_may_not_hide_an_infinite_one(post: Any) -> None:
    body = b'{"prompt": "a", "guidance_scale": 1e999}'
    assert "finite" in problem(await post(body), 422, "guidance_scale")["message"]


async def test_names_that_are_no_text_are_answered_as_text(post: Any) -> None:
    error = problem(await post(b'{"prompt": "a", "\\ud800": 1}'), 422, "\\ud800")
    assert "lone surrogate" in error["message"]
    problem(await post({"prompt": "a", "x" * 5_000: 1}), 422, "x" * 60)


async def test_a_missing_prompt_and_a_field_given_twice(post: Any) -> None:
    assert problem(await post({}), 422, "prompt")["code"] == "missing_field"
    assert "twice" in problem(await post(b'{"prompt": "a", "seed": 1, "seed": 2}'), 422, "seed")["message"]


async def test_neutral_values_and_nulls_ask_for_nothing(post: Any, studio: FakeStudio) -> None:
    neutral = {
        "quality": "auto",
        "style": "vivid",
        "background": "opaque",
        "moderation": "low",
        "response_format": "b64_json",
        "frame_count": 1,
        "size": "auto",
        "stream": False,
        "partial_images": 0,
        "output_compression": 100,
        "user": "u",
    }
    assert (await post({"prompt": "a", **neutral})).status_code == 200
    assert (await post({"prompt": "a", **dict.fromkeys(neutral)})).status_code == 200
    assert len(studio.jobs) == 2


async def test_seeds_at_the_limit(post: Any) -> None:
    answer = await post({"prompt": "a", "seed": 2**64 - 1})
    assert answer.json()["data"][0]["seed"] == 2**64 - 1
    problem(await post({"prompt": "a", "seed": 2**64 - 1, "n": 2}), 422, "seed")


async def test_a_size_that_no_engine_has_lists_those_it_has(post: Any) -> None:
    assert "64x64, 96x64" in problem(await post({"prompt": "a", "size": "128x128"}), 422, "size")["message"]


async def test_a_refusal_in_the_engine_names_the_field(post: Any, studio: FakeStudio) -> None:
    studio.failure = Failed("request", "eta: DPM++ 2M has no noise to scale; leave it out")
    assert problem(await post({"prompt": "a", "eta": 0.5}), 422, "eta")["code"] == "invalid_value"


async def test_a_megabyte_of_prompt_is_not_read(post: Any, studio: FakeStudio) -> None:
    error = problem(await post({"prompt": "a" * 1_000_000}), 413)
    assert "100000 bytes" in error["message"]
    assert studio.jobs == []


async def test_endless_chunks_are_read_to_the_limit_alone(http: httpx.AsyncClient) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1_000
            yield b" " * 1_000

    answer = await http.post(
        "/v1/images/generations", content=chunks(), headers={"content-type": "application/json"}
    )
    problem(answer, 413)
    assert answer.headers["connection"] == "close"
    assert sent <= 102_000


async def test_compressed_bodies_are_not_unpacked(post: Any) -> None:
    bomb = gzip.compress(b" " * 10**6)
    assert "content-encoding" in problem(await post(bomb, content_encoding="gzip"), 415)["message"]


async def test_a_form_is_not_json(post: Any) -> None:
    problem(await post(b'{"prompt": "a"}', content_type="text/plain"), 415)
    assert (await post({"prompt": "a"}, content_type="application/json; charset=utf-8")).status_code == 200


async def test_a_body_that_dribbles_in_is_given_up(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(20):
            await asyncio.sleep(0.03)
            yield b" "

    answer = await http.post(
        "/v1/images/generations", content=slow(), headers={"content-type": "application/json"}
    )
    problem(answer, 408)


async def test_many_bodies_at_once_are_bounded_together(studio: FakeStudio) -> None:
    """Ten clients send theirs slowly, and there is memory for four: the others are told to come again."""
    settings = Settings.make(api_key=KEY, max_body=100_000, max_bodies=400_000)
    transport = httpx.ASGITransport(create_app(studio, settings))
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"prompt": "a"'
        for _ in range(9):
            yield b" " * 10_000
            await asyncio.sleep(0)
        await go_on.wait()
        yield b"}"

    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
        route = "/v1/images/generations"
        slow_ones = [asyncio.create_task(http.post(route, content=slow())) for _ in range(10)]
        async with asyncio.timeout(10):
            while sum(task.done() for task in slow_ones) < 6:
                await asyncio.sleep(0.01)
        length = {"content-length": "90000"}  # of which nothing is read
        refused = [task.result() for task in slow_ones if task.done()]
        refused.append(await http.post(route, content=_unread(), headers=length))
        for answer in refused:
            assert problem(answer, 503)["code"] == "too_many_bodies"
            assert (answer.headers["retry-after"], answer.headers["connection"]) == ("5", "close")
        assert (await http.get("/v1/models")).status_code == 200
        go_on.set()
        answers = [await task for task in slow_ones]
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [503] * 6
        later = [http.post(route, content=b'{"prompt": "a"' + b" " * 90_000 + b"}") for _ in range(4)]
        assert [answer.status_code for answer in await asyncio.gather(*later)] == [200] * 4


async def _unread() -> AsyncIterator[bytes]:
    raise AssertionError("the body was read")
    yield b""


@pytest.mark.parametrize(
    "path", ["/page", "/redoc", "/v1/images", "/v1/images/generations/", "/%00", "/../etc/passwd"]
)
async def test_there_is_nothing_else(http: httpx.AsyncClient, path: str) -> None:
    assert problem(await http.get(path), 404)["code"] == "not_found"


async def test_another_method_is_told_in_the_same_shape(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/images/generations")
    assert problem(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Token {KEY}",
        KEY,
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        "Basic " + base64.b64encode(f"{KEY}:wrong".encode()).decode(),
        "Bearer ключ",
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/health/ready", "/openapi.json", "/docs", "/nowhere"]
)
async def test_without_the_key_nobody_comes_in(
    http: httpx.AsyncClient, authorization: str, path: str
) -> None:
    answer = await http.get(path, headers={b"authorization": authorization.encode()})  # type: ignore[dict-item]
    assert problem(answer, 401)["code"] == "invalid_api_key"
    assert KEY not in answer.text
    assert "Basic" in answer.headers["www-authenticate"]


async def test_the_key_opens_as_bearer_and_as_basics_password(http: httpx.AsyncClient) -> None:
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for header in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic}"):
        assert (await http.get("/v1/models", headers={"authorization": header})).status_code == 200
    http.headers.pop("authorization")
    assert (await http.get("/health/live")).json() == {"status": "alive"}


async def test_a_body_is_not_read_for_who_has_no_key(http: httpx.AsyncClient) -> None:
    headers = {"authorization": "Bearer wrong", "content-type": "application/json"}
    problem(await http.post("/v1/images/generations", content=_unread(), headers=headers), 401)


async def test_no_websocket_comes_in(studio: FakeStudio, settings: Settings) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b""}
    await create_app(studio, settings)(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_server_without_a_key_answers_to_local_names_only(studio: FakeStudio) -> None:
    transport = httpx.ASGITransport(create_app(studio, Settings.make()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        assert (await client.get("/v1/models")).status_code == 200
        for host in ("localhost", "LOCALHOST:1", "[::1]:8000"):
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1"):
            error = problem(await client.get("/v1/models", headers={"host": host}), 403)
            assert error["code"] == "unknown_host"


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2:3_4", True), ("a b", False), ("x" * 129, False), ("é", False), ("", False)]
)
async def test_every_answer_has_a_request_id(http: httpx.AsyncClient, given: str, kept: bool) -> None:
    answer = await http.get("/health/live", headers={b"x-request-id": given.encode()})  # type: ignore[dict-item]
    told = answer.headers["x-request-id"]
    assert (told == given) == kept
    assert kept or told.startswith("req_")


async def test_not_ready_is_503_with_the_reason_while_live(
    http: httpx.AsyncClient, post: Any, studio: FakeStudio
) -> None:
    studio.ready = False
    for answer in (await http.get("/health/ready"), await post({"prompt": "a"})):
        error = problem(answer, 503)
        assert (error["code"], answer.headers["retry-after"]) == ("not_ready", "5")
        assert "not ready" in error["message"]
    assert (await http.get("/health/live")).status_code == 200
    studio.ready = True
    assert (await http.get("/health/ready")).json() == {"status": "ready"}


async def test_an_engine_that_is_not_up_leaves_the_others_open(
    http: httpx.AsyncClient, post: Any, studio: FakeStudio
) -> None:
    studio.engines["other"] = engine("other")
    studio.ready, studio.resting = False, {"other"}
    assert problem(await http.get("/health/ready"), 503)["code"] == "not_ready"
    assert (await post({"prompt": "a", "model": "tiny"})).status_code == 200
    refused = await post({"prompt": "a", "model": "other"})
    assert (problem(refused, 503)["code"], refused.headers["retry-after"]) == ("engine_error", "5")


async def test_metrics_count_what_happened(http: httpx.AsyncClient, post: Any, studio: FakeStudio) -> None:
    await post({"prompt": "a"})
    await post({"prompt": 1})
    await http.get("/nowhere")
    studio.full = True
    await post({"prompt": "a"})
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    route = 'route="/v1/images/generations"'
    for line in (
        f'sdfast_requests_total{{{route},status="200"}} 1.0',
        f'sdfast_requests_total{{{route},status="422"}} 1.0',
        f'sdfast_requests_total{{{route},status="429"}} 1.0',
        'sdfast_requests_total{route="unmatched",status="404"} 1.0',
        f"sdfast_request_seconds_count{{{route}}} 3.0",
        'sdfast_stage_seconds_count{stage="denoising"} 1.0',
        'sdfast_failures_total{kind="queue_full"} 1.0',
        'sdfast_worker_up{engine="tiny"} 1.0',
        'sdfast_worker_restarts_total{engine="tiny"} 2.0',
        'sdfast_queue_length{engine="tiny"} 3.0',
        'sdfast_running_rows{engine="tiny"} 0.0',
        'sdfast_steps{engine="tiny",state="waiting"} 5.0',
        'sdfast_steps{engine="tiny",state="running"} 7.0',
        'sdfast_tick_seconds_bucket{engine="tiny",le="0.001"} 2.0',
        'sdfast_tick_seconds_bucket{engine="tiny",le="0.0025"} 3.0',
        'sdfast_tick_seconds_bucket{engine="tiny",le="60.0"} 3.0',
        'sdfast_tick_seconds_bucket{engine="tiny",le="+Inf"} 4.0',
        'sdfast_tick_seconds_count{engine="tiny"} 4.0',
        'sdfast_tick_seconds_sum{engine="tiny"} 99.5',
        'sdfast_device_memory_bytes{engine="tiny",kind="allocated"} 1000.0',
    ):
        assert line in lines


async def test_a_burst_is_refused_at_once_while_the_accepted_go_on(post: Any, studio: FakeStudio) -> None:
    studio.hang = True
    accepted = [asyncio.create_task(post({"prompt": "a"})) for _ in range(4)]
    while len(studio.live) < 4:
        await asyncio.sleep(0.01)
    studio.full = True
    async with asyncio.timeout(5):
        for answer in await asyncio.gather(*(post({"prompt": "b"}) for _ in range(40))):
            problem(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
    for ended in studio.live.values():
        ended.set()
    assert [answer.status_code for answer in await asyncio.gather(*accepted)] == [200] * 4


async def test_a_job_has_a_deadline_and_its_passing_is_504(
    post: Any, studio: FakeStudio, settings: Settings
) -> None:
    import time

    studio.failure = Failed("timeout", "the job waited for 60 s; the server is busy: try again later")
    assert problem(await post({"prompt": "a"}), 504)["code"] == "timeout"
    [job] = studio.jobs
    assert job.deadline is not None
    assert job.deadline - time.monotonic() == pytest.approx(settings.timeout, abs=5)
