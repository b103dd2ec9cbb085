"""Whether a request's control image, or that it has none, suits the engine."""

from collections.abc import Mapping

from sdfast.server.jobs import EngineInfo
from sdfast.server.openai.fields import CONTROL_IMAGE
from sdfast.server.problems import Problem


def check_control(engine: EngineInfo, engines: Mapping[str, EngineInfo], *, given: bool) -> None:
    """Raises `Problem`; before the image is opened."""
    if engine.controlled and not given:
        raise Problem(
            422,
            f"{CONTROL_IMAGE}: is missing; {engine.name} has a ControlNet, which draws every picture under "
            "the guidance of one",
            param=CONTROL_IMAGE,
            code="missing_field",
        )
    if given and not engine.controlled:
        able = ", ".join(name for name, info in engines.items() if info.controlled) or "none"
        raise Problem(
            422,
            f"{CONTROL_IMAGE}: {engine.name} has no ControlNet; leave it out, or ask an engine that has one; "
            f"here have: {able}",
            param=CONTROL_IMAGE,
            code="unsupported_model",
        )
