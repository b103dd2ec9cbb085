"""The routes: txt2img, img2img, and what is asked about the calls under way and the options."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sdfast import infotext
from sdfast.server.automatic1111 import controlnet, lists
from sdfast.server.automatic1111.answers import Order, whole
from sdfast.server.automatic1111.calls import Call, Calls
from sdfast.server.automatic1111.fields import Generation, ImageToImage, TextToImage
from sdfast.server.automatic1111.options import Options, list_models
from sdfast.server.automatic1111.pictures import canvas_of, controls_of, seen_of
from sdfast.server.automatic1111.samplers import list_samplers, list_schedulers
from sdfast.server.body import read_json
from sdfast.server.desk import Desk, unless_gone
from sdfast.server.encoding import parameters_of
from sdfast.server.health import check_open
from sdfast.server.jobs import EngineInfo, Refiner, Studio
from sdfast.server.metrics import Metrics
from sdfast.server.problems import Problem, SdapiError
from sdfast.server.settings import Settings
from sdfast.server.uploads import of_base64

_FIELDS = frozenset({*TextToImage.model_fields, *ImageToImage.model_fields})


_OTHERS = ["DELETE", "HEAD", "OPTIONS", "PATCH", "PUT", "TRACE"]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": SdapiError, "description": "The request cannot be served."},
    "5XX": {"model": SdapiError, "description": "The server failed, or is busy."},
}


class _Settings(BaseModel):
    """A body of any options."""

    model_config = ConfigDict(extra="allow")


class _Picture(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    image: str


class _Task(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)  # AUTOMATIC1111's own page sends more
    id_task: str = Field(max_length=256)
    id_live_preview: int = -1


def routes(studio: Studio, settings: Settings, metrics: Metrics) -> APIRouter:
    """The API's routes, over one studio."""
    router = APIRouter(responses=_ERRORS)
    desk, options, calls = Desk(studio, settings, metrics, _FIELDS), Options(studio), Calls(studio)
    lists.add(router)
    _add_beside(router, options)
    controlnet.add(router, studio)

    @router.post("/sdapi/v1/txt2img", openapi_extra=_body(TextToImage))
    async def txt2img(request: Request) -> Response:
        """Draw pictures of a prompt, as AUTOMATIC1111 does."""
        check_open(request, studio)
        asked = await read_json(request, TextToImage)
        engine = options.chosen(asked.override_settings or {})
        return await _answer(request, await _ordered(asked, engine, options, desk), desk, calls)

    @router.post("/sdapi/v1/img2img", openapi_extra=_body(ImageToImage))
    async def img2img(request: Request) -> Response:
        """Draw pictures over an image, as AUTOMATIC1111 does."""
        check_open(request, studio)
        asked = await read_json(request, ImageToImage)
        engine = options.chosen(asked.override_settings or {})
        if not engine.edits:
            raise Problem(
                422, f"init_images: engine {engine.name} takes no images; take txt2img", param="init_images"
            )
        return await _answer(request, await _ordered(asked, engine, options, desk), desk, calls)

    @router.get("/sdapi/v1/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """How far the first call under way is."""
        return calls.progress(skip_current_image)

    @router.post("/internal/progress", openapi_extra=_body(_Task))
    async def progress_of(request: Request) -> dict[str, Any]:
        """How far one task is, by its force_task_id."""
        task = await read_json(request, _Task)
        return calls.progress_of(task.id_task, task.id_live_preview)

    @router.get("/internal/ping")
    async def ping() -> dict[str, Any]:
        """Whether the server answers."""
        return {}

    @router.post("/sdapi/v1/interrupt")
    async def interrupt() -> dict[str, Any]:
        """End all calls of this API; each answers with what it has."""
        calls.interrupt()
        return {}

    @router.post("/sdapi/v1/skip")
    async def skip() -> dict[str, Any]:
        """End the first call of this API; it answers with what it has."""
        calls.skip()
        return {}

    @router.get("/sdapi/v1/options")
    async def told_options() -> dict[str, Any]:
        """The options, of which most are fixed here."""
        return options.told()

    @router.post("/sdapi/v1/options", openapi_extra=_body(_Settings))
    async def set_options(request: Request) -> None:
        """Set the checkpoint for all who name none."""
        options.set((await read_json(request, _Settings)).model_extra or {})

    @router.api_route("/sdapi/v1/options", methods=_OTHERS, include_in_schema=False)
    async def other_methods() -> None:  # the framework would tell of one of the two routes only
        raise HTTPException(405, headers={"allow": "GET, POST"})

    @router.get("/sdapi/v1/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The engines, as checkpoints."""
        return list_models(studio)

    @router.get("/sdapi/v1/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers."""
        return list_samplers()

    @router.get("/sdapi/v1/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The schedule types."""
        return list_schedulers()

    @router.get("/sdapi/v1/cmd-flags")
    async def flags() -> dict[str, Any]:
        """How the server was started."""
        return {"api": True, "nowebui": True, "listen": not settings.local, "port": settings.port}

    @router.post("/sdapi/v1/png-info", openapi_extra=_body(_Picture))
    async def png_info(request: Request) -> dict[str, Any]:
        """How a picture was made, as its file tells."""
        picture = await read_json(request, _Picture)
        return await asyncio.to_thread(_png_info, picture.image)

    return router


def _body(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"content": schema, "required": True}}


async def _ordered(asked: Generation, engine: EngineInfo, options: Options, desk: Desk) -> Order:
    """In a thread where there may be an image to open. Raises `Problem`."""
    wanted = asked.refiner_checkpoint if asked.switch_at < 1 else None
    refiner = options.refiner(wanted) if wanted else None
    if isinstance(asked, ImageToImage) or asked.alwayson_scripts:
        return await asyncio.to_thread(_order, asked, engine, refiner, desk)
    return _order(asked, engine, refiner, desk)


def _order(asked: Generation, engine: EngineInfo, refiner: EngineInfo | None, desk: Desk) -> Order:
    """Raises `Problem`."""
    units = controlnet.units_of(asked.alwayson_scripts, engine, over_image=isinstance(asked, ImageToImage))
    adapters = controlnet.adapter_units_of(asked.alwayson_scripts, engine)
    request, sampler = asked.request(engine, units, adapters)
    desk.check_size(engine.name, request)
    canvas = canvas_of(asked, request.height, request.width) if isinstance(asked, ImageToImage) else None
    job = desk.job(
        engine.name,
        request,
        image=canvas.job_image if canvas else None,
        mask=canvas.job_mask if canvas else None,
        control=controls_of(units, canvas, request.height, request.width),
        ip_adapter=seen_of(adapters, engine),
        refiner=None if refiner is None else Refiner(refiner.name, asked.switch_at),
    )
    call = Call("img2img" if canvas else "txt2img", job, asked.force_task_id)
    return Order(asked, call, engine, sampler, canvas, refiner)


def _add_beside(router: APIRouter, options: Options) -> None:
    """Routes that tell of what prompts may name."""

    @router.get("/sdapi/v1/embeddings")
    async def embeddings() -> dict[str, Any]:
        """The embeddings of the engine that is drawn with."""
        return lists.embeddings_of(options.engine)

    @router.get("/sdapi/v1/sd-vae")
    async def vaes() -> list[dict[str, Any]]:
        """The VAE of the engine that is drawn with, where it is not its checkpoint's own."""
        return lists.vaes_of(options.engine)

    @router.get("/sdapi/v1/loras")
    async def loras() -> list[dict[str, Any]]:
        """The LoRAs that prompts may name for the engine that is drawn with."""
        return lists.loras_of(options.engine)


async def _answer(request: Request, order: Order, desk: Desk, calls: Calls) -> Response:
    events = desk.submit(order.call.job)

    async def answer() -> bytes:
        return await asyncio.to_thread(whole, order, await order.call.pictures(desk, events))

    async with desk.under_way(order.call.job, events):
        with calls.under_way(order.call):
            body = await unless_gone(request.receive, answer())
    return Response(body, media_type="application/json")


def _png_info(image: str) -> dict[str, Any]:
    """What a picture tells of how it was made."""
    picture = of_base64(image, "image")
    text = parameters_of(picture)
    others = {
        name: value
        for name, value in picture.info.items()
        if isinstance(value, str) and name != infotext.PNG_KEY
    }
    return {"info": text, "items": others, "parameters": _settings_of(text) if text else {}}


def _settings_of(text: str) -> dict[str, str]:
    """An infotext's parts by AUTOMATIC1111's names."""
    read, settings = infotext.parse(text), infotext.settings_in(text)
    if read.width is not None and read.height is not None:
        del settings["Size"]
        settings |= {"Size-1": str(read.width), "Size-2": str(read.height)}
    return {"Prompt": read.prompt, "Negative prompt": read.negative_prompt, **settings}
