"""The routes `POST /v1/images/generations` and `GET /v1/models`."""

import asyncio
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
from sdfast.server.openai.control import check_control, check_ip_adapter, controls_of, seen_of
from sdfast.server.openai.fields import (
    CONTROL_IMAGE,
    IP_ADAPTER_IMAGE,
    Generation,
    check_begins,
    engine_of,
)
from sdfast.server.uploads import of_base64


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
        asked = await read_json(request, Generation)
        if asked.control_image is None and asked.ip_adapter_image is None:
            order = _order(asked, desk)
        else:  # to open it takes time
            order = await asyncio.to_thread(_order, asked, desk)
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
    return {
        "sizes": engine.sizes,
        "default_size": size,
        "edits": engine.edits,
        "controlled": engine.controlled,
        "controlnets": engine.controlnets,
        "loras": engine.loras,
        "ip_adapters": engine.ip_adapters,
        "step_cache": engine.step_cache,
        "pag": engine.pag,
        "refines": engine.refines,
        "instructed": engine.instructed,
    }


def _order(asked: Generation, desk: Desk) -> Order:
    """Takes processor time where there is an image. Raises `Problem`."""
    engine = engine_of(asked.model, desk.studio.engines)
    images, adapted = _images(asked.control_image), _images(asked.ip_adapter_image)
    check_begins(engine, desk.studio.engines)
    check_control(engine, desk.studio.engines, images)
    check_ip_adapter(engine, desk.studio.engines, adapted)
    asked = asked.under_control([one is None for one in images]) if images else asked
    asked = asked.seeing([one is None for one in adapted]) if adapted else asked
    request = asked.request(engine.default_height, engine.default_width)
    desk.check_size(engine.name, request)
    control = controls_of(images, lambda text: of_base64(text, CONTROL_IMAGE), request.height, request.width)
    seen = seen_of(adapted, lambda text: of_base64(text, IP_ADAPTER_IMAGE), engine)
    job = desk.job(engine.name, request, previews=asked.partial_images or 0, control=control, ip_adapter=seen)
    return Order.make("image_generation", asked, job)


def _images(given: str | list[str | None] | None) -> list[str | None]:
    """One for each ControlNet or IP-Adapter."""
    return given if isinstance(given, list) else [] if given is None else [given]
