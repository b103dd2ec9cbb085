"""How an export's stages are shown."""

import sys
from typing import Any

import click


class Stages:
    """Shows an export's stages, one line each."""

    def begin(self, stage: str) -> None:
        if sys.stdout.isatty():
            click.echo(f"  {stage:<16} …\r", nl=False)

    def end(self, stage: Any) -> None:
        size = f"{stage.size / 1e6:,.1f} MB" if stage.size else ""
        click.echo(f"  {stage.name:<16} {stage.seconds:>6.1f} s  {size:>12}  {stage.note}".rstrip())

    def say(self, message: str) -> None:
        click.echo(f"  {message}")
