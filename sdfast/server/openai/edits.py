"""The route `POST /v1/images/edits`: an image is drawn over, or the part of it that a mask leaves open."""

import asyncio
from collections.abc import Iterable

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from sdfast.errors import RequestError
from sdfast.masked_area import MaskedArea
from sdfast.request import shown
from sdfast.server.body import checked
from sdfast.server.desk import Desk
from sdfast.server.form import Form, read_form, typed
from sdfast.server.health import check_open
from sdfast.server.jobs import EngineInfo
from sdfast.server.openai import schema
from sdfast.server.openai.answers import Order, answer
from sdfast.server.openai.control import check_control, check_ip_adapter, controls_of, seen_of
from sdfast.server.openai.fields import CONTROL_IMAGE, IP_ADAPTER_IMAGE, Edit, engine_of
from sdfast.server.problems import Problem
from sdfast.server.uploads import decode, halved, mask_of_alpha, on_white, pixels, shades_of_alpha

_IMAGE, _MASK, _CONTROL = ("image", "image[]"), "mask", (CONTROL_IMAGE, f"{CONTROL_IMAGE}[]")
_ADAPTED = (IP_ADAPTER_IMAGE, f"{IP_ADAPTER_IMAGE}[]")
_PADDING = "padding_mask_crop"
_ALL_STAYS = "nothing of it is transparent; make transparent what is to be drawn anew"
_FILES = (*_IMAGE, _MASK, *_CONTROL, *_ADAPTED)


def routes(desk: Desk) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/images/edits",
        openapi_extra={"requestBody": schema.body(Edit)},
        responses=schema.answers("image_edit"),
    )
    async def edits(request: Request) -> Response:
        """Draw over an image, or draw anew what a mask leaves open of it."""
        check_open(request, desk.studio)
        form = await _form(request)
        asked = checked(typed(form.texts, Edit), Edit)
        engine = _engine_of(asked, desk)
        check_control(engine, desk.studio.engines, _each(form, _CONTROL))
        check_ip_adapter(engine, desk.studio.engines, _each(form, _ADAPTED))
        try:
            order = await asyncio.to_thread(_order, asked, form, engine, desk)
            return await answer(request.receive, order, desk)
        except Problem as problem:
            raise _with_a_way_out(problem, asked) from None

    return router


async def _form(request: Request) -> Form:
    """Raises `Problem`; of JSON, which the API has for images that are elsewhere, with the reason."""
    if request.headers.get("content-type", "").lower().startswith("application/json"):
        raise Problem(
            415,
            "content-type: must be multipart/form-data, with the file as image; the server fetches nothing, "
            "so that images cannot be given as addresses in JSON",
        )
    form = await read_form(request)
    for name in _FILES:
        if name in form.texts:
            message = "must be a file, with a filename; the server fetches nothing"
            raise _refused(name, f"{message} (got {shown(form.texts[name][:64])})")
    return form


def _engine_of(asked: Edit, desk: Desk) -> EngineInfo:
    engines = desk.studio.engines
    engine = engine_of(asked.model, engines)
    if not engine.edits:
        able = ", ".join(name for name, info in engines.items() if info.edits) or "none"
        raise Problem(
            422,
            f"model: {engine.name} cannot draw over images: it was exported without the encoder that reads "
            f"them; here can: {able}",
            param="model",
            code="unsupported_model",
        )
    return engine


def _order(asked: Edit, form: Form, engine: EngineInfo, desk: Desk) -> Order:
    """Takes processor time. Raises `Problem`."""
    image, mask = _opened(form)
    asked = asked.over(masked=mask is not None, instructed=engine.instructed)
    controls, adapted = _each(form, _CONTROL), _each(form, _ADAPTED)
    asked = asked.under_control([not one for one in controls]) if controls else asked
    asked = asked.seeing([not one for one in adapted]) if adapted else asked
    own = (image.height, image.width)
    if asked.padding_mask_crop is not None:
        own = (engine.default_height, engine.default_width)
    request = asked.request(*own)
    side = request.height, request.width
    desk.check_size(engine.name, request)
    area = _area(image, mask, asked.padding_mask_crop, *side)
    job = desk.job(
        engine.name,
        request,
        previews=asked.partial_images or 0,
        image=pixels(image if area is None else area.cut(area.image), *side),
        mask=_open_parts(mask, area, *side),
        control=controls_of(controls, lambda data: decode(data, CONTROL_IMAGE), *side, area),
        ip_adapter=seen_of(adapted, lambda data: decode(data, IP_ADAPTER_IMAGE), engine),
    )
    return Order.make("image_edit", asked, job, area)


def _area(
    image: Image.Image, mask: Image.Image | None, padding: int | None, height: int, width: int
) -> MaskedArea | None:
    """The part of the image that is drawn; None for all of it. Raises `Problem`."""
    if padding is None:
        return None
    if mask is None:
        told = "is for what a mask leaves open; send a mask, or leave it out"
        raise Problem(422, f"{_PADDING}: {told}", param=_PADDING)
    image, shades = on_white(image), shades_of_alpha(mask)
    if shades.getbbox() is None:
        raise _refused(_MASK, _ALL_STAYS)
    try:
        return MaskedArea.make(image, shades, padding_mask_crop=padding, height=height, width=width)
    except RequestError as error:  # of a part that is too long
        raise _refused(_MASK, str(error).partition(": ")[2]) from None


def _open_parts(mask: Image.Image | None, area: MaskedArea | None, height: int, width: int) -> bytes | None:
    """`Job.mask`. Raises `Problem` for a mask that leaves nothing open."""
    if mask is None:
        return None
    parts = mask_of_alpha(mask, height, width)
    if area is not None:
        parts = halved(area.cut(area.mask).convert("L")).tobytes()
    if b"\xff" not in parts:
        raise _refused(_MASK, _ALL_STAYS)
    return parts


def _opened(form: Form) -> tuple[Image.Image, Image.Image | None]:
    """The image and its mask, of one size. Raises `Problem`."""
    unknown = [name for name in form.files if name not in _FILES]
    if unknown:
        message = f"no such file is taken; the files are: image, {_MASK}, {CONTROL_IMAGE}, {IP_ADAPTER_IMAGE}"
        raise _refused(unknown[0][:60], message, "unknown_field")
    images = [data for name in _IMAGE for data in form.files.get(name, [])]
    masks = form.files.get(_MASK, [])
    if not images:
        raise Problem(422, "image: is missing", param="image", code="missing_field")
    for field, sent in (("image", images), (_MASK, masks)):
        if len(sent) > 1:
            raise _refused(field, f"{len(sent)} were sent; these engines take a single one")
    image = decode(images[0], "image")
    if not masks:
        return image, None
    mask = decode(masks[0], _MASK)
    if mask.size != image.size:
        told = f"{mask.width}x{mask.height}, but the image has {image.width}x{image.height}; make them alike"
        raise _refused(_MASK, told)
    return image, mask


def _each(form: Form, names: Iterable[str]) -> list[bytes | None]:
    """The files of these names, for each ControlNet or IP-Adapter; None for an empty one."""
    return [data or None for name in names for data in form.files.get(name, [])]


def _refused(field: str, message: str, code: str = "invalid_image") -> Problem:
    return Problem(422, f"{field}: {message}", param=field, code=code)


def _with_a_way_out(problem: Problem, asked: Edit) -> Problem:
    """A size that nobody asked for is the image's."""
    if problem.param != "size" or asked.size not in (None, "auto"):
        return problem
    advice = "this is the image's own size; give a size, and the image is resampled to it"
    return Problem(problem.status, f"{problem.message}; {advice}", param="size", code=problem.code)
