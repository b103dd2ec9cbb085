"""Whether the server is alive, whether it is ready, and its numbers."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from sdfast.server.guard import OPEN
from sdfast.server.jobs import Studio
from sdfast.server.metrics import CONTENT_TYPE, Metrics
from sdfast.server.problems import Problem


def check_open(request: Request, studio: Studio) -> None:
    """Raises `Problem` 503 with the reason while no work is begun here."""
    draining = request.app.state.draining
    if draining or not studio.ready:
        reason = "the server is shutting down" if draining else "the engines are not ready"
        raise Problem(503, f"{reason}; try again later", code="not_ready", headers={"retry-after": "5"})


def routes(studio: Studio, metrics: Metrics) -> APIRouter:
    """The routes that watchers of the server ask."""
    router = APIRouter()

    @router.get(OPEN)
    async def live() -> dict[str, str]:
        """Whether the process answers; asks for no key."""
        return {"status": "alive"}

    @router.get("/health/ready")
    async def ready(request: Request) -> dict[str, str]:
        """Whether every engine is loaded, warmed up and at work."""
        check_open(request, studio)
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    return router
