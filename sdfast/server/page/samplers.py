"""The samplers as the page's choice shows them: in groups, with advice."""

from typing import Any

from sdfast.schedulers import SAMPLERS

_OTHERS = "Others"


def groups() -> list[dict[str, Any]]:
    """Every sampler by its AUTOMATIC1111 name, in groups of one first word; loners come together, last."""
    found: dict[str, list[dict[str, Any]]] = {}
    for sampler in SAMPLERS:
        told = {"name": sampler.name, "evaluations": sampler.evaluations, "advice": sampler.advice}
        found.setdefault(sampler.sampler.partition(" ")[0], []).append(told)
    shared = {group: listed for group, listed in found.items() if len(listed) > 1}
    lonely = [listed[0] for listed in found.values() if len(listed) == 1]
    return [{"group": group, "samplers": listed} for group, listed in {**shared, _OTHERS: lonely}.items()]
