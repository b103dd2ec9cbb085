"""`sdfast bench`."""

import json
from pathlib import Path
from typing import Any

import click

from sdfast.cli.options import ATTENTION


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--size", help="WIDTHxHEIGHT in pixels. [default: the engine's own]")
@click.option("--count", type=int, default=1, show_default=True, help="Pictures of a call.")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--guidance", type=float, default=7.0, show_default=True)
@click.option("--scheduler", default="dpmpp_2m_karras", show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True, help="How often each part is measured.")
@click.option("--reference", is_flag=True, help="Beside stock diffusers on the same checkpoint, in turn.")
@click.option("--checkpoint", help="With --reference. [default: the checkpoint the engine was made from]")
@click.option("--device", help="[default: what the engine is for]")
@click.option("--compile", is_flag=True, help="For eager engines: draw through torch.compile.")
@click.option("--attention", type=click.Choice(ATTENTION), help="For eager engines.")
@click.option("--json", "as_json", is_flag=True, help="The seconds of every round.")
def bench(engine: Path, size: str | None, count: int, guidance: float, as_json: bool, **how: Any) -> None:
    """Measure ENGINE on this machine: prompts, steps, decoding and whole pictures."""
    from sdfast.bench import bench as run
    from sdfast.pictures import parse_size

    told = run(
        engine,
        size=parse_size("--size", size),
        images=count,
        guidance_scale=guidance,
        progress=lambda part: click.echo(f"  {part}", err=True),
        **how,
    )
    click.echo(json.dumps(told.as_json(), indent=1) if as_json else told.table())
