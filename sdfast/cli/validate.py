"""`sdfast validate`."""

import sys
from pathlib import Path
from typing import Any

import click

from sdfast.cli.options import ATTENTION
from sdfast.errors import RequestError


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="The reference. [default: the checkpoint the engine was made from]")
@click.option("--prompts", type=click.Path(path_type=Path), help="A text file, one prompt a line.")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option(
    "--guidance-start", type=float, default=0.0, help="Price guidance from this share of the steps on."
)
@click.option("--guidance-end", type=float, default=1.0, help="Price guidance to this share of the steps.")
@click.option("--cache-interval", type=int, default=1, help="Price step caching with this interval.")
@click.option("--device", help="[default: what the engine is for]")
@click.option("--compile", is_flag=True, help="For eager engines: run through torch.compile.")
@click.option("--attention", type=click.Choice(ATTENTION), help="For eager engines.")
def validate(
    engine: Path,
    checkpoint: str | None,
    prompts: Path | None,
    device: str | None,
    compile: bool,
    attention: str | None,
    **how: Any,
) -> None:
    """Run stock diffusers beside ENGINE and compare modules, steps and pictures."""
    from sdfast.engine import Engine
    from sdfast.validation import validate as run

    lines = _prompt_lines(prompts) if prompts else None
    opened = Engine.open(engine, device, compile=compile, attention=attention)
    report = run(opened, checkpoint=checkpoint, prompts=lines, progress=click.echo, **how)
    click.echo(report.table())
    click.echo(f"report: {engine / 'validation' / 'report.html'}")
    if not report.passed:
        sys.exit(1)


def _prompt_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path}: cannot be read as text ({error}); give a file of one prompt a line"
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise RequestError(f"{path}: holds no prompts; give a file of one prompt a line")
    return prompts
