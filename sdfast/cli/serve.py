"""`sdfast serve`."""

import os
import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("engines", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of these settings.")
@click.option("--host", help="[default: 127.0.0.1]")
@click.option("--port", type=int, help="[default: 8000]")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="A file with the key clients must show."
)
@click.option("--max-rows", type=int, help="The most pictures denoised together. [default: 4; on CUDA 16]")
@click.option(
    "--previews",
    type=click.Choice(["auto", "full", "fast"]),
    help="Of pictures under way: decoded, or coarse ones that cost nothing. [default: auto: fast where "
    "decoding takes more than 0.25 s]",
)
@click.option("--queue", type=int, help="The most jobs that wait. [default: 64]")
@click.option("--timeout", type=float, help="Seconds that a job may wait. [default: 60]")
@click.option("--step-timeout", type=float, help="Seconds that a network's call may take. [default: 120]")
@click.option("--drain", type=float, help="Seconds that running work has after SIGTERM. [default: 120]")
@click.option("--max-body", type=int, help="Bytes of a request. [default: 16 MiB]")
@click.option("--max-bodies", type=int, help="Bytes of all requests together. [default: 16 x max-body]")
@click.option("--allow-public", is_flag=True, default=None, help="Listen beyond this machine without a key.")
@click.option("--device", help="[default: what the engines are for]")
def serve(engines: tuple[Path, ...], config: Path | None, device: str | None, **given: Any) -> None:
    """Serve ENGINES over HTTP: the APIs of OpenAI and AUTOMATIC1111, health, metrics.

    Every setting can also be an environment variable (SDFAST_PORT, SDFAST_API_KEY), or stand in the file.
    """
    from sdfast.server.settings import Settings
    from sdfast.server.start import start

    settings = Settings.load(given, os.environ, config)
    if not start(engines, settings, device):
        sys.exit(1)
