"""`sdfast demo`."""

import sys
from pathlib import Path

import click

from sdfast.cli.stages import Stages


@click.command()
@click.option("--engines", type=click.Path(path_type=Path), default=Path("engines"), show_default=True)
@click.option("--outputs", type=click.Path(path_type=Path), default=Path("outputs"), show_default=True)
def demo(engines: Path, outputs: Path) -> None:
    """Export the built-in checkpoint, draw a picture, validate the engine."""
    from sdfast.demo import run

    passed = run(engines, outputs, Stages(), click.echo)
    if not passed:
        sys.exit(1)
