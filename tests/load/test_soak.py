"""A small soak: some hundred requests, none lost, none swapped, nothing left behind."""

import asyncio
from subprocess import DEVNULL

from sdfast.pipeline import Pipeline
from tests.fakes import FakeEngine
from tests.load.memory import Memory
from tests.load.soak import KINDS, Soak, orders
from tests.server.test_serve import free_port, started, wait_for


def test_every_request_gets_its_own_answer() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with started("-m", "tests.load.server", port, log=DEVNULL) as process:
        asked = orders(Pipeline(FakeEngine()), 40, 2)
        wait_for(f"{url}/health/ready", 200)
        memory = Memory(process.pid)
        outcome = asyncio.run(Soak(url, asked, tolerance=0, patience=0.05).run(150, 40, memory))
    assert outcome.wrong == []
    assert sum(outcome.counts[kind] for kind in KINDS) == 150
    assert outcome.counts["left before the answer"] > 0
    assert outcome.counts["429, asked again"] > 0
    for name in memory.samples:
        first, last = memory.first_and_last(name)
        assert last - first < 40e6, name
