"""An app over a `FakeStudio`, and the clients that talk to it."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from sdfast.server.app import create_app
from sdfast.server.settings import Settings
from tests.server.studio import FakeStudio

KEY = "k3y-of-the-tests"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def studio() -> FakeStudio:
    return FakeStudio()


@pytest.fixture
def settings() -> Settings:
    return Settings.make(api_key=KEY, max_body=100_000)


@pytest.fixture
async def http(studio: FakeStudio, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Raw HTTP with the right key."""
    transport = httpx.ASGITransport(create_app(studio, settings), raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        yield client


@pytest.fixture
def sdk(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return client_of(http)


def client_of(http: httpx.AsyncClient, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=key, base_url="http://test/v1", http_client=http, max_retries=0)


@pytest.fixture
def post(http: httpx.AsyncClient) -> Callable[..., Any]:
    """Sends a body, a dict or raw bytes, to generations."""

    async def send(body: Any = None, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"content-type": "application/json", **named}
        return await http.post("/v1/images/generations", content=content, headers=sent)

    return send


def problem(answer: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The error of an answer, which must have exactly the envelope's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] and error["code"]
    assert error["param"] == param
    return error
