"""Writes `docs/schedulers.md`: what of the schedulers is proved, from the tests' own cases.

    python -m tests.schedulers.coverage

Every test module here that has a `test_table_is_diffusers_map` is read: its cases and step counts, as pytest
is given them.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType

from sdfast.schedulers import SAMPLERS, SOLVERS
from sdfast.schedulers.layouts import LAYOUTS
from tests.schedulers.diffusers_map import NOISE_SCHEDULES, PREDICTIONS, SPACINGS, Case
from tests.schedulers.test_sigmas import CASES, OF_LEVELS, SIGMAS

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
PROOF = "test_table_is_diffusers_map"

HEAD = """\
# Schedulers

<!-- Written by `python -m tests.schedulers.coverage` from the tests' cases; do not edit. -->

A scheduler is a table of small matrices (`sdfast/schedulers/`). That a table is right is proved by algebra: a
diffusers scheduler object is run on basis vectors, so that the latents after each of its steps are the row of
coefficients of everything that went in, and the composed table must be the same map.

A **case** is a scheduler with its options; a **proof** is a case at one number of steps. Each proof compares
every coefficient after every step, relative to its row's norm, with diffusers' formulas run in float64
(1e-12) and with diffusers as it runs, where float32 is what limits the comparison (1e-5, or what the case
names: there diffusers is the less exact one). Timesteps, draws of noise, input scales and the start of a
partial run must agree too.

"""


def page() -> str:
    """The whole page."""
    runs = sorted(set(proofs()), key=lambda run: (run[0].scheduler, str(run[0]), run[1]))
    by_class = {name: list(group) for name, group in groupby(runs, key=lambda run: run[0].scheduler)}
    total = f"In all {len({str(case) for case, _ in runs}):,} cases and {len(runs):,} proofs.\n\n"
    total += sigmas_page()
    parts = [section(name, by_class.get(name, [])) for name in SOLVERS]
    return HEAD + total + summary(by_class) + "\n" + "\n".join(parts)


def sigmas_page() -> str:
    """What is proved of noise levels that the caller gives."""
    names = ", ".join(f"`{name}`" for name in OF_LEVELS)
    lengths = ", ".join(str(len(sigmas) - 1) for sigmas in SIGMAS.values())
    layouts = ", ".join(LAYOUTS)
    return (
        f"Custom `sigmas` ({len(SIGMAS)} lists, of {lengths} steps) are proved to 1e-11 in {len(CASES)}"
        f" cases of every class that goes by noise levels, also where diffusers' own `set_timesteps` takes"
        f" none: {names}. The layouts {layouts} reach these classes as such lists where no config says"
        " them.\n\n"
    )


def proofs() -> Iterator[tuple["Listed", int]]:
    """Every case and number of steps that some test proves."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = import_module(f"{__package__}.{path.stem}")
        if hasattr(module, PROOF):
            yield from ((Listed(case), steps) for case, steps in _parametrized(module))


class Listed:
    """A case by what it says: equal cases of two modules count once."""

    def __init__(self, case: Case) -> None:
        self.case, self.scheduler = case, case.scheduler

    def __str__(self) -> str:
        return str(self.case)

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def _parametrized(module: ModuleType) -> Iterator[tuple[Case, int]]:
    """The pairs that the mark on the module's proof makes."""
    [mark] = getattr(module, PROOF).pytestmark
    for given in mark.args[1]:
        case, every = given.values
        yield from ((case, steps) for steps in every)


def summary(by_class: dict[str, list[tuple[Listed, int]]]) -> str:
    """One line a diffusers class."""
    lines = ["| diffusers class | samplers | cases | proofs |", "| --- | --- | ---: | ---: |"]
    for name in SOLVERS:
        runs = by_class.get(name, [])
        names = ", ".join(s.name for s in SAMPLERS if s.scheduler == name) or "–"
        lines.append(
            f"| [{name}](#{name.lower()}) | {names} | {len({str(c) for c, _ in runs})} | {len(runs)} |"
        )
    return "\n".join(lines) + "\n"


def section(name: str, runs: Iterable[tuple[Listed, int]]) -> str:
    """One scheduler: a line for each set of options."""
    rows: dict[str, list[tuple[Case, int]]] = {}
    for listed, steps in runs:
        rows.setdefault(_options(listed.case), []).append((listed.case, steps))
    lines = [
        f"## {name}\n",
        "| options | spacing | prediction | eta | strength | steps | proofs |",
        "| --- | --- | --- | --- | --- | --- | ---: |",
    ]
    for options, proved in rows.items():
        cases = [case for case, _ in proved]
        cells = [
            options,
            _values((_field(case, "timestep_spacing") for case in cases), SPACINGS),
            _values((_field(case, "prediction_type") for case in cases), PREDICTIONS),
            _values(f"{case.eta:g}" for case in cases),
            _values(f"{case.strength:g}" for case in cases),
            ", ".join(map(str, sorted({steps for _, steps in proved}))),
            str(len(proved)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _options(case: Case) -> str:
    """What the case sets besides spacing and prediction; a noise schedule by its name."""
    named = NOISE_SCHEDULES.get(case.label, {})
    own = {
        name: value
        for name, value in case.options.items()
        if name not in ("timestep_spacing", "prediction_type") and name not in named
    }
    parts = [f"{case.label} noise levels"] if case.label else []
    return ", ".join([*parts, *(f"`{name}={value}`" for name, value in own.items())]) or "–"


def _field(case: Case, name: str) -> str:
    """The case's value, or its class's default; "–" where the class has no such option."""
    model, _ = SOLVERS[case.scheduler]
    return "–" if name in model.lacks else str(case.options.get(name, model.model_fields[name].default))


def _values(values: Iterable[str], order: tuple[str, ...] = ()) -> str:
    """The different values, in `order`, then as they sort."""
    found = set(values)
    return ", ".join([v for v in order if v in found] + sorted(found - set(order)))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
