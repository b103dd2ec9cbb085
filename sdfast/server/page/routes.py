"""The routes of the page: its files, read once, and what it must know that the API does not tell."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from sdfast.schedulers import resolve
from sdfast.server.openai.fields import GUIDANCE, SCHEDULER, STEPS
from sdfast.server.page.samplers import groups
from sdfast.server.problems import Problem
from sdfast.server.settings import Settings

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The page runs its own files and speaks to its own server, whatever text comes into it."""

_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def routes(settings: Settings) -> APIRouter:
    """They ask for the key like all others: browsers prompt for it, and send it as Basic's password."""
    router = APIRouter(include_in_schema=False)
    kept = {file.name: file.read_bytes() for file in (files(__package__) / "static").iterdir()}
    known = {
        "key": settings.key is not None,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "scheduler": resolve(SCHEDULER).name,
        "samplers": groups(),
    }

    @router.get("/")
    async def page() -> Response:
        return _file("index.html", kept["index.html"])

    @router.get("/page/known")
    async def what_the_page_must_know() -> dict[str, Any]:
        return known

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in kept:
            raise Problem(404, "the page has no such file")
        return _file(name, kept[name])

    return router


def _file(name: str, content: bytes) -> Response:
    kind = _TYPES[name[name.rindex(".") :]]
    return Response(content, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)
