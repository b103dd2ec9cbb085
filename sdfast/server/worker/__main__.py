"""`python -m sdfast.server.worker ENGINE`: the process that `sdfast serve` starts for each engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from sdfast.server.worker.process import run

if TYPE_CHECKING:
    from sdfast.engine import Engine


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--device", help="[default: what the engine is for]")
@click.option("--max-rows", type=int, help="[default: what suits the device]")
@click.option("--max-queue", type=int, required=True)
@click.option("--previews", type=click.Choice(["auto", "full", "fast"]), default="auto")
def main(
    engine: Path,
    device: str | None,
    max_rows: int | None,
    max_queue: int,
    previews: Literal["auto", "full", "fast"],
) -> None:
    """Run ENGINE for the server at the other end of standard input, which is a socket."""

    def opened() -> "Engine":
        from sdfast.server.worker.opening import open_engine  # imports torch

        return open_engine(engine, device)

    run(opened, max_rows=max_rows, max_queue=max_queue, previews=previews)


if __name__ == "__main__":
    main()
