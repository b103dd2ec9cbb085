"""The clients: each request goes out when it is due, whether the ones before it were answered or not."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from benchmarks.serving.workload import Arrival

PATIENCE = 600.0  # seconds


@dataclass(frozen=True)
class Answered:
    """What became of a request. seconds: from when it was due to the end of its answer."""

    arrival: Arrival
    status: int
    seconds: float
    ended: float


async def send(url: str, load: Sequence[Arrival]) -> Sequence[Answered]:
    """Send all, and wait for every answer."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        await client.get("/health/live")
        start = time.perf_counter()
        return await asyncio.gather(*(_one(client, start, arrival) for arrival in load))


async def _one(client: httpx.AsyncClient, start: float, arrival: Arrival) -> Answered:
    due = start + arrival.at
    await asyncio.sleep(due - time.perf_counter())
    answer = await client.post("/v1/images/generations", json=arrival.body)
    ended = time.perf_counter()
    if answer.status_code == 200:
        [picture] = answer.json()["data"]
        if picture["seed"] != arrival.body["seed"]:
            raise RuntimeError(f"seed {arrival.body['seed']} was answered with another's picture")
    return Answered(arrival, answer.status_code, ended - due, ended - start)
