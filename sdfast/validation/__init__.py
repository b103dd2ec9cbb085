"""Validation: an engine beside the stock diffusers pipeline, and the report that proves it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdfast.validation.comparison import validate
    from sdfast.validation.drawing import generate
    from sdfast.validation.reference import reference_pipeline
    from sdfast.validation.report import Report

_HOMES = {
    "Report": "report",
    "generate": "drawing",
    "reference_pipeline": "reference",
    "validate": "comparison",
}

__all__ = ["Report", "generate", "reference_pipeline", "validate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
