"""What a document says, for a terminal: the rows, what each side costs beside them, and the goals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.comparison import within
from benchmarks.gpu.sides import EAGER
from sdfast.columns import columns

GOAL_GPU = "H200"
# (what, the part, a row's field, the bound, whether it is the least or the most)
GOALS: dict[str, tuple[tuple[str, str, str, float, str], ...]] = {
    "sd15": (
        ("guided step, it/s", "step/batch 1", "iterations_per_second", 200.0, "at least"),
        ("guided step, times stock eager", "step/batch 1", "ratio_to_eager", 3.0, "at least"),
        ("guided step, times stock compiled", "step/batch 1", "ratio_to_compiled", 1.3, "at least"),
        ("picture of 20 steps, ms", "picture/20 steps/batch 1", "milliseconds", 130.0, "at most"),
    ),
    "sdxl": (("guided step, it/s", "step/batch 1", "iterations_per_second", 28.0, "at least"),),
}
FIRST_PICTURE = 10.0  # seconds
# Which module's error of a validation stands beside which timed part.
_MODULES = {
    "step": "step",
    "modules/unet": "unet",
    "modules/vae_decoder": "vae_decoder",
    "modules/text_encoder": "text_encoder.hidden_states",
    "modules/text_encoder_2": "text_encoder_2.hidden_states",
}


def summary(parts: Mapping[str, Any], workload: str, gpu: str | None) -> dict[str, Any]:
    """The rows of every comparison with the errors beside them; costs of each side; the goals."""
    return {
        "rows": list(_rows(parts)),
        "verdicts": list(_verdicts(parts)),
        "costs": list(_costs(parts)),
        "goals": list(goals(parts, workload, gpu)),
    }


def _rows(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, part in parts.items():
        if name.split("/")[0] in ("step", "modules", "picture", "choice") and part["result"]:
            for row in part["result"]["rows"]:
                yield {"part": name, **row, **_module_error(parts, name, row["side"])}


def _module_error(parts: Mapping[str, Any], name: str, side: str) -> dict[str, Any]:
    """The validation's figures for a step or a module; a picture's row has its own."""
    what, _, batch = name.rpartition("/")
    if what not in _MODULES:
        return {}
    figures = {"relative_l2": None, "stock_relative_l2": None, "within_bar": None}
    for found in _modules(parts, side, batch):
        if found["name"] == _MODULES[what]:
            return {field: found[field] for field in figures}
    return figures


def _modules(parts: Mapping[str, Any], side: str, batch: str) -> list[dict[str, Any]]:
    """Stock's own error is told beside any engine's."""
    result = (parts.get(f"accuracy/{side}/{batch}") or {}).get("result")
    if result:
        found: list[dict[str, Any]] = result["modules"]
        return found
    if side != EAGER:
        return []
    for name, part in parts.items():
        if name.startswith("accuracy/") and name.endswith("/" + batch) and part["result"]:
            return [
                {**one, "relative_l2": one["stock_relative_l2"], "within_bar": None}
                for one in part["result"]["modules"]
            ]
    return []


def _verdicts(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The design's rule for each side of sdfast: every module, and its pictures together.

    In any one picture rounding is chance; so all of a side's are taken together, by their mean square.
    """
    rows = [row for name, part in parts.items() if name.startswith("picture/") for row in _good_rows(part)]
    for side in sorted({row["side"] for row in rows if row["side"].startswith("sdfast")}):
        own = [row for row in rows if row["side"] == side and row["within_bar"] is not None]
        modules = [
            one["within_bar"]
            for name, part in parts.items()
            if name.startswith(f"accuracy/{side}/") and part["result"]
            for one in part["result"]["modules"]
        ]
        error = _together([row["relative_l2"] for row in own])
        stock = _together([row["stock_relative_l2"] for row in own])
        yield {
            "side": side,
            "modules": len(modules),
            "modules_within_bar": sum(modules),
            "pictures": len(own),
            "relative_l2": error,
            "stock_relative_l2": stock,
            "within_bar": within(side, error, stock),
        }


def _good_rows(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in (part["result"] or {}).get("rows", []) if row["failed"] is None]


def _together(errors: Sequence[float | str]) -> float | None:
    """The root of the mean square; a figure that is no number makes it one."""
    if not errors:
        return None
    return math.sqrt(sum(float(error) ** 2 for error in errors) / len(errors))


def _costs(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Builds and first pictures."""
    for name, part in parts.items():
        kind, _, what = name.partition("/")
        if kind in ("build", "first") and part["result"]:
            result = part["result"]
            yield {
                "part": kind,
                "what": what,
                "seconds": result["seconds"],
                "peak_allocated_bytes": result.get("peak_allocated_bytes"),
                "peak_device_bytes": result.get("peak_device_bytes"),
            }


def goals(parts: Mapping[str, Any], workload: str, gpu: str | None) -> Iterator[dict[str, Any]]:
    """Each goal for each side of sdfast. met: None where it was not measured on the GPU that it speaks of."""
    sides = sorted({name.split("/")[1] for name in parts if name.startswith("first/sdfast")})
    right = gpu is not None and GOAL_GPU in gpu and workload in GOALS
    for side in sides:
        for what, part, field, bound, sense in GOALS.get(workload, ()):
            value = _value(parts, part, side, field)
            yield _goal(what, side, value if right else None, bound, sense)
        first = (parts.get(f"first/{side}/batch 1") or {}).get("result")
        value = first["seconds"] if first else None
        yield _goal("first picture of a process, s", side, value if right else None, FIRST_PICTURE, "at most")


def _value(parts: Mapping[str, Any], part: str, side: str, field: str) -> float | None:
    result = (parts.get(part) or {}).get("result") or {"rows": []}
    found = [row[field] for row in result["rows"] if row["side"] == side]
    return found[0] if found else None


def _goal(what: str, side: str, value: float | None, bound: float, sense: str) -> dict[str, Any]:
    met = None
    if value is not None:
        met = value >= bound if sense == "at least" else value <= bound
    return {"goal": what, "side": side, "value": value, "bound": bound, "sense": sense, "met": met}


# ---------------------------------------------------------------- text


def text(content: Mapping[str, Any]) -> str:
    """The document's summary as tables."""
    told = content["summary"]
    blocks = [_table(_HEAD, [_line(row) for row in told["rows"]])]
    blocks.append(_table(_COST_HEAD, [_cost(row) for row in told["costs"]]))
    blocks += [
        _modules_table(content["parts"]),
        _verdict_table(told["verdicts"]),
        _goals_table(told["goals"]),
        _kernels_table(content["parts"]),
        _failures(content["parts"]),
    ]
    if content["left"]:
        blocks.append("left, run the command again: " + ", ".join(content["left"]))
    return "\n\n".join(block for block in blocks if block)


_HEAD = ("", "side", "it/s", "ms", "× eager", "× compiled", "roofline", "error / stock's")
_COST_HEAD = ("", "", "seconds", "allocated", "on the device")


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["failed"] is not None:
        return row["part"], row["side"], "failed"
    share = row["roofline_share"]
    return (
        row["part"],
        row["side"],
        _number(row["iterations_per_second"], ".1f"),
        _number(row["milliseconds"], ".2f"),
        _number(row["ratio_to_eager"], ".2f"),
        _number(row["ratio_to_compiled"], ".2f"),
        _number(None if share is None else share * 100, ".1f") + " %" * (share is not None),
        _error(row),
    )


def _error(row: Mapping[str, Any]) -> str:
    error, stock = row.get("relative_l2"), row.get("stock_relative_l2")
    if error is None:
        return "–"
    mark = {None: "", True: " ✓", False: " ✗"}[row.get("within_bar")]
    return f"{_number(error, '.2e')} / {_number(stock, '.2e')}{mark}"


def _cost(row: Mapping[str, Any]) -> tuple[str, ...]:
    memory = (row["peak_allocated_bytes"], row["peak_device_bytes"])
    sizes = (
        _number(None if size is None else size / 2**30, ".2f") + " GiB" * (size is not None)
        for size in memory
    )
    return (
        {"build": "build", "first": "first picture"}[row["part"]],
        row["what"],
        _number(row["seconds"], ".2f"),
        *sizes,
    )


def _modules_table(parts: Mapping[str, Any]) -> str:
    rows = [
        (name.removeprefix("accuracy/"), one["name"], _error(one))
        for name, part in parts.items()
        if name.startswith("accuracy/") and part["result"]
        for one in part["result"]["modules"]
    ]
    return _table(("", "module", "error / stock's"), rows) if rows else ""


def _verdict_table(told: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            one["side"],
            f"{one['modules_within_bar']} of {one['modules']} modules",
            f"{one['pictures']} kinds of picture together",
            _error(one),
        )
        for one in told
    ]
    return (
        _table(("within 1.1 x stock's error, or the bar of FP8", "", "", "error / stock's"), rows)
        if rows
        else ""
    )


def _goals_table(told: Sequence[Mapping[str, Any]]) -> str:
    verdict = {None: f"not measured on an {GOAL_GPU}", True: "met", False: "not met"}
    rows = [
        (
            one["goal"],
            one["side"],
            f"{one['sense']} {one['bound']:g}",
            _number(one["value"], ".2f"),
            verdict[one["met"]],
        )
        for one in told
    ]
    return _table(("goal", "side", "", "measured", ""), rows) if rows else ""


def _kernels_table(parts: Mapping[str, Any]) -> str:
    """Single kernels, each shape's in the order in which they were measured."""
    rows = [
        (
            name.removeprefix("kernels/"),
            row["side"],
            _number(row["milliseconds"], ".4f"),
            _number(None if row["roofline_share"] is None else row["roofline_share"] * 100, ".1f"),
        )
        for name, part in parts.items()
        if name.split("/")[0] in ("tick", "kernels") and part["result"]
        for row in part["result"]["rows"]
        if row["failed"] is None
    ]
    return _table(("single kernels", "by", "ms", "% of the roofline"), rows) if rows else ""


def _failures(parts: Mapping[str, Any]) -> str:
    """Every part and every side of a part that failed, with its reason."""
    lines = []
    for name, part in parts.items():
        rows = (part["result"] or {}).get("rows", [])
        lines += [f"{name}, {row['side']}: {row['failed']}" for row in rows if row["failed"] is not None]
        if part["state"] == "failed":
            lines.append(f"{name}: {part['error']}")
    return "\n".join(["failed:", *lines]) if lines else ""


def _number(value: Any, form: str) -> str:
    """A figure; a dash where there is none; as it is where it is no number that JSON has."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return columns([tuple(row) + ("",) * (len(head) - len(row)) for row in (head, *rows)])
