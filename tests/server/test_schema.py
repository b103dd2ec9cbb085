"""The schema is right: Schemathesis sends every route what the schema allows, and what it forbids."""

import re
from functools import partial
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance
from schemathesis.transport.serialization import Binary

from sdfast.server.app import create_app
from sdfast.server.documentation import page
from sdfast.server.openai.fields import Edit, Generation
from sdfast.server.settings import Settings
from tests.server.conftest import KEY
from tests.server.studio import FakeStudio
from tests.server.test_edits import png

PICTURE = png(Image.new("RGBA", (64, 64)))  # of a size that the engine has; as a mask it leaves all open
schemathesis.openapi.format(
    "binary", st.sampled_from([Binary(data) for data in (PICTURE, PICTURE[:99], b"")])
)
SHOWN = {"authorization": f"Bearer {KEY}"}
schema = schemathesis.openapi.from_asgi(
    "/openapi.json", create_app(FakeStudio(), Settings.make(api_key=KEY)), headers=SHOWN
)


drawn = partial(
    settings, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@schema.parametrize()
@drawn(max_examples=10)
def test_every_route_answers_as_the_schema_says(case: schemathesis.Case) -> None:
    """Keys have tests of their own; and what an engine takes, the schema of all engines cannot tell."""
    answers(case)


@pytest.mark.slow
@schema.parametrize()
@drawn(max_examples=100)
def test_every_route_answers_whatever_it_is_sent(case: schemathesis.Case) -> None:
    answers(case)


def answers(case: schemathesis.Case) -> None:
    case.call_and_validate(headers=SHOWN, excluded_checks=[ignored_auth, positive_data_acceptance])


@pytest.fixture
async def told(http: httpx.AsyncClient) -> dict[str, Any]:
    described: dict[str, Any] = (await http.get("/openapi.json")).json()
    return described


@pytest.mark.anyio
async def test_the_schema_tells_every_field_and_what_it_is(told: dict[str, Any]) -> None:
    for path, kind, model, files in (
        ("/v1/images/generations", "application/json", Generation, set[str]()),
        ("/v1/images/edits", "multipart/form-data", Edit, {"image", "mask", "control_image"}),
    ):
        body = told["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]
        assert body["properties"].keys() == model.model_fields.keys() | files
        assert body["additionalProperties"] is False
        assert "strength" not in body["properties"] or "0.8" in body["properties"]["strength"]["description"]
        answered = told["paths"][path]["post"]["responses"]
        assert answered.keys() == {"200", "4XX", "5XX"}
        assert answered["200"]["content"].keys() == {"application/json", "text/event-stream"}


@pytest.mark.anyio
async def test_every_operation_has_a_description_and_its_errors(told: dict[str, Any]) -> None:
    for path, operations in told["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            assert {"4XX", "5XX"} <= operation["responses"].keys()
            assert operation["responses"]["200"]["content"]


@pytest.mark.anyio
async def test_the_keys_are_told_where_there_are_some(told: dict[str, Any]) -> None:
    assert told["security"] == [{"bearer": []}, {"basic": []}]
    assert told["components"]["securitySchemes"].keys() == {"bearer", "basic"}
    assert told["paths"]["/health/live"]["get"]["security"] == []
    assert "security" not in create_app(FakeStudio(), Settings.make()).openapi()


@pytest.mark.anyio
async def test_the_page_tells_every_route_and_field(http: httpx.AsyncClient, told: dict[str, Any]) -> None:
    answer = await http.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    for path in told["paths"]:
        assert f" {path}</code></h2>" in answer.text
    for name in Edit.model_fields:
        assert f"<td><code>{name}</code></td>" in answer.text


@pytest.mark.anyio
async def test_the_page_loads_nothing(http: httpx.AsyncClient) -> None:
    answer = await http.get("/docs")
    loaded: list[tuple[str, str | None]] = []

    class Loading(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loaded.extend((tag, value) for name, value in attrs if name in ("src", "href", "data", "action"))
            assert tag not in ("script", "link", "iframe", "img")

    Loading().feed(answer.text)
    assert loaded == [("a", "openapi.json")]
    assert not re.search(r"https?://|@import|url\(", answer.text)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_the_page_shows_names_as_text() -> None:
    wicked = {"info": {"title": "<b>", "version": "1"}, "paths": {"/<script>": {"get": {"responses": {}}}}}
    assert "<script>" not in page(wicked) and "<b>" not in page(wicked)
