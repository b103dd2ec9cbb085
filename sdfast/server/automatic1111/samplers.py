"""Samplers and schedule types by AUTOMATIC1111's names."""

from typing import Any

from sdfast.errors import RequestError
from sdfast.schedulers import SAMPLERS, SCHEDULE_TYPES, SOLVERS, Sampler, resolve
from sdfast.schedulers.schedule_types import PLAIN_TYPES
from sdfast.server.problems import Problem

AUTOMATIC = "Automatic"
_NOT_FOR_DRAWING = "DDIM Inverse"


def sampler_of(name: str, schedule_type: str | None) -> tuple[str, Sampler]:
    """The scheduler to ask for, and what it means.

    name: a sampler's, which may end in a schedule type, as in old versions; that one counts where
    `schedule_type` is automatic. Raises `Problem`.
    """
    found = _named(name)
    if schedule_type and schedule_type.casefold() != AUTOMATIC.casefold():
        full = f"{found.sampler} {schedule_type}"
    elif found.schedule_type in PLAIN_TYPES and not name.casefold().endswith("uniform"):
        full = f"{found.sampler} {_usual_type(found)}"
    else:
        full = f"{found.sampler} {found.schedule_type}"
    try:
        return full, resolve(full)
    except RequestError as error:
        raise Problem(422, f"scheduler: {error}", param="scheduler") from None


def _usual_type(sampler: Sampler) -> str:
    """What "Automatic" means to a sampler."""
    automatic = f"{sampler.sampler} {AUTOMATIC}"
    return next(
        (other.schedule_type for other in SAMPLERS if automatic in other.aliases), sampler.schedule_type
    )


def _named(name: str) -> Sampler:
    try:
        return resolve(name)
    except RequestError as error:
        raise Problem(
            404, f"sampler_name: {error}", param="sampler_name", short="Sampler not found"
        ) from None


def eta_of(eta: float | None, sampler: Sampler) -> float:
    """`sdfast.request.Request`'s eta. Raises `Problem`.

    Clients send AUTOMATIC1111's default, 1, whatever the sampler. It is what ancestral samplers do; most
    others have no eta.
    """
    model, _ = SOLVERS[sampler.scheduler]
    if "eta" in model.accepts:
        return eta or 0.0
    noisy = sampler.sampler.endswith(" a") or "SDE" in sampler.sampler
    if eta is None or eta == 1 or (eta == 0 and not noisy):
        return 0.0
    allowed = "1" if noisy else "0 and 1, which mean nothing to it"
    raise Problem(422, f"eta: {sampler.sampler} takes {allowed}; leave it out (got {eta:g})", param="eta")


def list_samplers() -> list[dict[str, Any]]:
    """`GET /sdapi/v1/samplers`: each once, with its schedule type where nothing is said."""
    listed = []
    for name in dict.fromkeys(sampler.sampler for sampler in SAMPLERS if sampler.sampler != _NOT_FOR_DRAWING):
        forms = [sampler for sampler in SAMPLERS if sampler.sampler == name]
        _, usual = sampler_of(name, None)
        options = {} if usual.schedule_type in PLAIN_TYPES else {"scheduler": _short(usual.schedule_type)}
        if usual.evaluations == 2:
            options["second_order"] = "True"
        aliases = [alias for form in forms for alias in form.aliases if " " not in alias]
        listed.append({"name": name, "aliases": aliases, "options": options})
    return listed


def list_schedulers() -> list[dict[str, Any]]:
    """`GET /sdapi/v1/schedulers`: the schedule types."""
    return [
        {"name": _short(label), "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}
        for label in (*PLAIN_TYPES, *SCHEDULE_TYPES)
    ]


def _short(label: str) -> str:
    return label.casefold().replace(" ", "_")
