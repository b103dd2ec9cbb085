"""The routes `POST /v1/images/generations` and `GET /v1/models`."""

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdfast.server.body import read_json
from sdfast.server.desk import Desk
from sdfast.server.health import check_open
from sdfast.server.jobs import EngineInfo
from sdfast.server.openai import schema
from sdfast.server.openai.answers import Order, answer
from sdfast.server.openai.fields import Generation, engine_of


def routes(desk: Desk) -> APIRouter:
    router, started = APIRouter(), int(time.time())

    @router.post(
        "/v1/images/generations",
        openapi_extra={"requestBody": schema.body(Generation)},
        responses=schema.answers("image_generation"),
    )
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt."""
        check_open(request, desk.studio)
        order = _order(await read_json(request, Generation), desk)
        return await answer(request.receive, order, desk)

    @router.get("/v1/models", responses={200: {"model": schema.Models}})
    async def models() -> dict[str, Any]:
        """The engines, and what each can do."""
        fixed = {"object": "model", "created": started, "owned_by": "sdfast"}
        listed = [{"id": name, **fixed, **_abilities(engine)} for name, engine in desk.studio.engines.items()]
        return {"object": "list", "data": listed}

    return router


def _abilities(engine: EngineInfo) -> dict[str, Any]:
    """What a client may ask an engine for, beside what the API tells of a model."""
    size = f"{engine.default_width}x{engine.default_height}"
    return {"sizes": engine.sizes, "default_size": size, "edits": engine.edits}


def _order(asked: Generation, desk: Desk) -> Order:
    engine = engine_of(asked.model, desk.studio.engines)
    request = asked.request(engine.default_height, engine.default_width)
    job = desk.job(engine.name, request, previews=asked.partial_images or 0)
    return Order.make("image_generation", asked, job)
