"""What the call around a compiled module costs: a module of next to no work, called through each backend.

    python -m benchmarks.calls

Both sides are called in turn in one process: the backend's bound call, and the same operation in plain torch.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from benchmarks import machine
from sdfast.backends import loader
from sdfast.backends.target import this_machine
from sdfast.export.code_store import CodeStore
from sdfast.export.inductor import Compiler
from sdfast.export.modules import Form, ModuleSpec
from sdfast.export.onnx import export_module
from sdfast.manifest import Span
from sdfast.timing import Comparison, clocked, compare, table

CPU = torch.device("cpu")
CALLS = 2000


class Small(nn.Module):
    """Three inputs of 16 numbers, as the U-Net has three."""

    def forward(self, sample: Tensor, time_shift: Tensor, context: Tensor) -> Tensor:  # [1, 16] each
        return torch.relu(sample + time_shift * context)


def inputs() -> dict[str, Tensor]:
    return {name: torch.randn(1, 16) for name in ("sample", "time_shift", "context")}


def export_onnx(place: Path) -> Path:
    export_module(Small(), inputs(), {}, ("output",), place / "small.onnx")
    return place / "small.onnx"


def export_inductor(place: Path) -> Path:
    spec = ModuleSpec("small", Small, lambda *_: inputs(), {}, ("output",), (), (Form(Span.exactly(1)),))
    Compiler(this_machine(CPU), False, CodeStore(place / "code")).compile(spec, place)
    return place / "small.pt2"


BACKENDS: dict[str, Callable[[Path], Path]] = {"inductor": export_inductor, "onnx": export_onnx}


@click.command()
@click.option("--rounds", type=int, default=15, show_default=True)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(rounds: int, keep: bool) -> None:
    """Compare the call of a small module with the same operations in plain torch."""
    torch.set_num_threads(1)
    rows = [call(backend, rounds) for backend in BACKENDS]
    click.echo(
        f"a call of three operations on 16 numbers, {CALLS} calls a measure, plain torch as the stock side"
    )
    click.echo(table(rows))
    if keep:
        command = shlex.join(["python", "-m", "benchmarks.calls", *sys.argv[1:]])
        result = {"comparisons": [row.as_json() for row in rows]}
        click.echo(f"kept in {machine.keep('calls-cpu', command, result)}")


def call(backend: str, rounds: int) -> Comparison:
    """Seconds of one call."""
    with tempfile.TemporaryDirectory() as place:
        module = loader(backend, CPU, 1)(BACKENDS[backend](Path(place)))
        given, output, plain = inputs(), {"output": torch.zeros(1, 16)}, Small()
        bound = module.bind(given, output)

        def repeated(work: Callable[[], object]) -> Callable[[], float]:
            measure = clocked(lambda: [work() for _ in range(CALLS)])
            return lambda: measure() / CALLS

        return compare(backend, repeated(lambda: plain(**given)), repeated(bound), rounds=rounds)


if __name__ == "__main__":
    main()
