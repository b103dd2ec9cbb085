"""OpenAI's Images API: `fields.py` and `control.py` what it takes, `answers.py` what it gives,
`generations.py` and `edits.py` its routes, `schema.py` how they are described."""

from fastapi import APIRouter

from sdfast.server.desk import Desk
from sdfast.server.jobs import Studio
from sdfast.server.metrics import Metrics
from sdfast.server.openai import edits, generations
from sdfast.server.openai.fields import FIELDS
from sdfast.server.settings import Settings


def routes(studio: Studio, settings: Settings, metrics: Metrics) -> APIRouter:
    """The API's routes, over one studio."""
    router, desk = APIRouter(), Desk(studio, settings, metrics, FIELDS)
    router.include_router(generations.routes(desk))
    router.include_router(edits.routes(desk))
    return router
