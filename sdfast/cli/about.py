"""`sdfast info`, `sdfast schedulers` and `sdfast doctor`: what there is."""

import json
from pathlib import Path

import click

from sdfast.columns import columns


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The whole manifest.")
def info(engine: Path, as_json: bool) -> None:
    """Verify ENGINE and show what it is."""
    from sdfast.engine import verify
    from sdfast.manifest import read_manifest
    from sdfast.summary import summary

    manifest = read_manifest(engine)
    verify(engine, manifest.files)
    click.echo(manifest.to_json() if as_json else summary(manifest))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="With every alias, and what each name decides.")
def schedulers(as_json: bool) -> None:
    """List the samplers: AUTOMATIC1111's name, the short name, the diffusers class; --scheduler takes each.

    A sampler evaluates the network once or twice a step: what a step costs. A plain sampler's name may be
    followed by a schedule type of AUTOMATIC1111, as in "Euler a Karras" or "DPM++ 2M Align Your Steps".
    """
    from sdfast.schedulers import SAMPLERS, SCHEDULE_TYPES

    if as_json:
        listed = [{**vars(s), "name": s.name, "overrides": dict(s.overrides)} for s in SAMPLERS]
        click.echo(json.dumps(listed, indent=2))
        return
    rows = [(s.name, s.short_name, s.scheduler, str(s.evaluations), s.advice) for s in SAMPLERS]
    click.echo(columns([("name", "short name", "diffusers class", "evaluations a step", "when"), *rows]))
    click.echo(f"\nschedule types: {', '.join(SCHEDULE_TYPES)}")


@click.command()
def doctor() -> None:
    """Show versions, devices and providers: what runs here, what is missing, and how to get it."""
    from sdfast.doctor import examine

    click.echo(columns([(finding.name, finding.state, finding.advice) for finding in examine()]))
