"""The routes: `POST /v1/images/generations` and `GET /v1/models`."""

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdfast.server.body import read_json
from sdfast.server.desk import Desk, unless_gone
from sdfast.server.health import check_open
from sdfast.server.jobs import EngineInfo, Job, Studio
from sdfast.server.metrics import Metrics
from sdfast.server.openai.answers import EventStream, Order, answer
from sdfast.server.openai.fields import FIELDS, Generation, engine_of
from sdfast.server.settings import Settings

_BODY = {"content": {"application/json": {"schema": Generation.model_json_schema()}}, "required": True}


def routes(studio: Studio, settings: Settings, metrics: Metrics) -> APIRouter:
    """The API's routes, over one studio."""
    router, started = APIRouter(), int(time.time())
    desk = Desk(studio, settings, metrics, FIELDS)

    @router.post("/v1/images/generations", openapi_extra={"requestBody": _BODY})
    async def generations(request: Request) -> Response:
        check_open(request, studio)
        order = _order(await read_json(request, Generation), desk)
        events = desk.submit(order.job)
        if order.asked.stream:
            return EventStream(order, desk, events)
        async with desk.under_way(order.job, events):
            body = await unless_gone(request.receive, answer(order, desk.outcome(events)))
        return Response(body, media_type="application/json")

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        fixed = {"object": "model", "created": started, "owned_by": "sdfast"}
        listed = [{"id": name, **fixed, **_abilities(engine)} for name, engine in studio.engines.items()]
        return {"object": "list", "data": listed}

    return router


def _abilities(engine: EngineInfo) -> dict[str, Any]:
    """What a client may ask an engine for, beside what the API tells of a model."""
    size = f"{engine.default_width}x{engine.default_height}"
    return {"sizes": engine.sizes, "default_size": size, "edits": engine.edits}


def _order(asked: Generation, desk: Desk) -> Order:
    engine = engine_of(asked.model, desk.studio.engines)
    job = Job(
        id=secrets.token_hex(12),
        engine=engine.name,
        request=asked.request(engine),
        deadline=time.monotonic() + desk.settings.timeout,
        previews=asked.partial_images or 0,
    )
    return Order(asked, job, int(time.time()))
