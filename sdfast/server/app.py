"""The HTTP server's app: the guard around it, its routes, and one shape for every error."""

from typing import TYPE_CHECKING

from sdfast.server.jobs import Studio
from sdfast.server.packages import check_packages
from sdfast.server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Lifespan


def create_app(studio: Studio, settings: Settings, lifespan: "Lifespan[FastAPI] | None" = None) -> "FastAPI":
    """The app. `app.state.draining`: set it to answer that nothing new is begun.

    lifespan: what must be open around the app, on its event loop. Raises `DependencyError` when a package is
    missing.
    """
    check_packages()
    from fastapi import FastAPI

    from sdfast import __version__
    from sdfast.server import automatic1111, documentation, health, openai, page
    from sdfast.server.guard import Guard
    from sdfast.server.metrics import Metrics

    metrics = Metrics(studio)
    app = FastAPI(
        title="sdfast",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=documentation.ERRORS,
    )
    app.state.draining = False
    app.include_router(health.routes(studio, metrics))
    app.include_router(openai.routes(studio, settings, metrics))
    app.include_router(automatic1111.routes(studio, settings, metrics))
    app.include_router(page.routes(settings))
    documentation.add(app, settings)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    _handle_problems(app)
    return app


def _handle_problems(app: "FastAPI") -> None:
    """No error leaves in another shape than `Problem`'s."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from sdfast.server import problems

    app.add_exception_handler(problems.Problem, problems.answer_problem)
    app.add_exception_handler(HTTPException, problems.answer_unrouted)
    app.add_exception_handler(RequestValidationError, problems.answer_invalid)
    app.add_exception_handler(ClientDisconnect, problems.answer_gone)
    app.add_exception_handler(Exception, problems.answer_bug)
