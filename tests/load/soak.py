"""Clients that ask for pictures in every way, leave, and err; and what each of them must get."""

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import httpx
import numpy as np
from PIL import Image

from sdfast.pipeline import Pipeline
from tests.load.memory import Memory

WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"size": "8000x8000"}, "size"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"scheduler": "none"}, "scheduler"),
    ({"seed": -1}, "seed"),
    ({"nothing": 1}, "nothing"),
)
KINDS = {"whole": 60, "stream": 18, "wrong": 10, "leaves": 12}  # of a hundred


@dataclass(frozen=True)
class Order:
    """A picture that may be asked for, and what it is: [H, W, 3] uint8."""

    body: dict[str, Any]
    picture: Any


@dataclass
class Outcome:
    """What clients got. wrong: what they should not have got, in words."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of whole answers
    wrong: list[str] = field(default_factory=list)
    took: float = 0.0


def orders(pipe: Pipeline, count: int, steps: int) -> list[Order]:
    """Pictures that differ in prompt, seed, scheduler and number of steps."""
    pipe.set_progress_bar_config(disable=True)
    made = []
    for i in range(count):
        call: dict[str, Any] = {
            "num_inference_steps": steps + i % 3,
            "scheduler": ("Euler a", "DPM++ 2M Karras", "DDIM")[i % 3],
            "guidance_scale": (1.0, 4.0)[i % 2],
            "seed": i * 7919,
        }
        prompt = f"{i} hills"
        picture = np.asarray(pipe(prompt, **call).images[0], dtype=np.int16)
        made.append(Order({"prompt": prompt, **call}, picture))
    return made


class Soak:
    """Sends requests to a server, so many at a time."""

    def __init__(self, url: str, asked: list[Order], tolerance: int, patience: float) -> None:
        """tolerance: levels of 255 by which a picture may be off. patience: seconds after which some go."""
        self._url, self._orders, self._tolerance, self._patience = url, asked, tolerance, patience
        self._chance = random.Random(0)
        self.outcome = Outcome()

    async def run(self, requests: int, users: int, memory: Memory) -> Outcome:
        left = iter(range(requests))
        ended, start = 0, time.monotonic()

        async def user() -> None:
            nonlocal ended
            async with httpx.AsyncClient(base_url=self._url, timeout=120) as http:
                for i in left:
                    await self._ask(http, i)
                    ended += 1
                    if ended % max(1, requests // 200) == 0:
                        memory.sample(ended)

        await asyncio.gather(*(user() for _ in range(users)))
        self.outcome.took = time.monotonic() - start
        await self._check_idle()
        return self.outcome

    async def _ask(self, http: httpx.AsyncClient, number: int) -> None:
        kind = self._chance.choices(list(KINDS), list(KINDS.values()))[0]
        order = self._chance.choice(self._orders)
        ask: dict[str, Callable[[httpx.AsyncClient, Order], Any]] = {
            "whole": self._whole,
            "stream": self._stream,
            "wrong": self._err,
            "leaves": self._leave,
        }
        try:
            wrong = await ask[kind](http, order)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            wrong = f"no answer: {error!r}"
        self.outcome.counts[kind] += 1
        if wrong:
            self.outcome.wrong.append(f"request {number}, {kind}: {wrong}")

    async def _post(self, http: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        """An answer that is not that the queue is full: then it is asked again."""
        while True:
            answer = await http.post("/v1/images/generations", json=body)
            if answer.status_code != 429:
                return answer
            self.outcome.counts["429, asked again"] += 1
            await asyncio.sleep(self._chance.uniform(0.01, 0.1))

    async def _whole(self, http: httpx.AsyncClient, order: Order) -> str:
        start = time.monotonic()
        answer = await self._post(http, order.body)
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        self.outcome.seconds.append(time.monotonic() - start)
        return self._differs(answer.json()["data"], order)

    async def _stream(self, http: httpx.AsyncClient, order: Order) -> str:
        answer = await self._post(http, {**order.body, "stream": True, "partial_images": 1})
        lines = [
            line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")
        ]
        if answer.status_code != 200 or lines[-1] != "[DONE]":
            return f"{answer.status_code} {answer.text[-200:]}"
        events = [json.loads(line) for line in lines[:-1]]
        completed = [event for event in events if event["type"] == "image_generation.completed"]
        return self._differs(completed, order)

    async def _err(self, http: httpx.AsyncClient, order: Order) -> str:
        change, param = self._chance.choice(WRONG)
        answer = await self._post(http, {**order.body, **change})
        if answer.status_code != 422 or answer.json()["error"]["param"] != param:
            return f"{change}: {answer.status_code} {answer.text[:200]}"
        return ""

    async def _leave(self, http: httpx.AsyncClient, order: Order) -> str:
        """Hang up at some time, or get the answer before."""
        try:
            async with asyncio.timeout(self._chance.uniform(0, self._patience)):
                return await self._whole(http, order)
        except TimeoutError:
            self.outcome.counts["left before the answer"] += 1
            return ""

    def _differs(self, data: list[dict[str, Any]], order: Order) -> str:
        """Why these are not the one picture that was asked for; "" when they are."""
        if [one["seed"] for one in data] != [order.body["seed"]]:
            return f"the seeds are {[one['seed'] for one in data]} of {order.body}"
        picture = Image.open(BytesIO(base64.b64decode(data[0]["b64_json"])))
        if f"Seed: {order.body['seed']}," not in picture.info["parameters"]:
            return f"another's parameters: {picture.info['parameters']}"
        off = int(np.abs(np.asarray(picture, dtype=np.int16) - order.picture).max())
        return f"{off} levels off: another's picture? {order.body}" if off > self._tolerance else ""

    async def _check_idle(self) -> None:
        """Nothing of those who left is still there."""
        async with httpx.AsyncClient(base_url=self._url) as http:
            until = time.monotonic() + 10
            while time.monotonic() < until:
                lines = (await http.get("/metrics")).text.splitlines()
                names = ("sdfast_queue_length{", "sdfast_running_rows{")
                left = [line for line in lines if line.startswith(names) and not line.endswith(" 0.0")]
                if not left:
                    return
                await asyncio.sleep(0.1)
            self.outcome.wrong.append(f"still there: {left}")


def table(outcome: Outcome, memory: Memory) -> str:
    seconds = sorted(outcome.seconds)
    lines = [f"{name:<24} {count:>8}" for name, count in outcome.counts.items()]
    lines.append(f"{'answered wrongly':<24} {len(outcome.wrong):>8}")
    for name, share in (("median", 0.5), ("p99", 0.99)):
        lines.append(f"{'whole answer, ' + name:<24} {seconds[int(share * (len(seconds) - 1))]:>8.3f} s")
    total = sum(outcome.counts[kind] for kind in KINDS)
    lines.append(f"{'requests a second':<24} {total / outcome.took:>8.1f}")
    for name in memory.samples:
        first, last = memory.first_and_last(name)
        told = (
            f"{first / 1e6:>8.1f} to {last / 1e6:.1f} MB, {memory.slope(name):+.0f} bytes a request at last"
        )
        lines.append(f"{'memory of the ' + name:<24} {told}")
    return "\n".join([*lines, *outcome.wrong[:20]])
