"""Whether the server is alive, whether it is ready, and its numbers."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from sdfast.server.guard import OPEN
from sdfast.server.jobs import Studio
from sdfast.server.metrics import CONTENT_TYPE, Metrics
from sdfast.server.problems import Problem


def check_open(request: Request, studio: Studio) -> None:
    """Raises `Problem` 503 with the reason while no work is begun here; one engine that is up may do some."""
    if request.app.state.draining:
        raise _not_ready("the server is shutting down")
    if not any(numbers.up for numbers in studio.statistics().values()):
        raise _not_ready("the engines are not ready")


def _not_ready(reason: str) -> Problem:
    return Problem(503, f"{reason}; try again later", code="not_ready", headers={"retry-after": "5"})


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
        if not studio.ready:
            raise _not_ready("some engines are not ready")
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    return router
