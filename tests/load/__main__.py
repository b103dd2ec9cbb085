"""The soak by hand: python -m tests.load [ENGINE] [--requests N]; exits 1 when something was wrong."""

import asyncio
import sys
from pathlib import Path
from subprocess import DEVNULL

import click

from sdfast.pipeline import Pipeline
from tests.fakes import FakeEngine
from tests.load.memory import Memory
from tests.load.soak import Soak, orders, table
from tests.server.test_serve import free_port, serving, started, wait_for

USERS = 24
SLOPE = 1_000  # bytes a request: 10 MB in 10,000


@click.command()
@click.argument("engine", required=False, type=click.Path(path_type=Path))
@click.option("--requests", type=int, default=10_000, show_default=True)
def main(engine: Path | None, requests: int) -> None:
    """Load a server of ENGINE, or of a FakeEngine."""
    if engine is None:
        port = free_port()
        with started("-m", "tests.load.server", port, log=DEVNULL) as process:
            url = f"http://127.0.0.1:{port}"
            passed = soak(
                process.pid, url, Soak(url, orders(Pipeline(FakeEngine()), 300, 2), 0, 0.05), requests
            )
    else:
        with serving(engine, log=DEVNULL) as (process, url):
            asked = orders(Pipeline.from_engine(engine), 24, 2)
            passed = soak(process.pid, url, Soak(url, asked, 1, 2.0), requests)
    sys.exit(0 if passed else 1)


def soak(pid: int, url: str, clients: Soak, requests: int) -> bool:
    wait_for(f"{url}/health/ready", 200)
    memory = Memory(pid)
    outcome = asyncio.run(clients.run(requests, USERS, memory))
    click.echo(table(outcome, memory))
    return not outcome.wrong and all(memory.slope(name) < SLOPE for name in memory.samples)


if __name__ == "__main__":
    main()
