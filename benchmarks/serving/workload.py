"""Who asks for what, and when: Poisson arrivals of requests of mixed lengths and schedulers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STEPS = {8: 25, 12: 15, 20: 35, 30: 15, 50: 10}
SCHEDULERS = {"DPM++ 2M Karras": 50, "Euler a": 20, "Euler": 15, "UniPC": 15}
"""Of a hundred requests, so many. Most people leave the settings as they are."""

SHORT = 12
"""A request of so many steps, or fewer, is a short one."""

SUBJECTS = ("a cabin", "a lighthouse", "a lone tree", "a bridge", "a boat")
PLACES = ("in misty mountains", "by a lake", "on a beach", "in a forest", "in the desert")


@dataclass(frozen=True)
class Arrival:
    """A request that is sent `at` seconds after the start. body: of `POST /v1/images/generations`."""

    at: float
    body: dict[str, Any]

    @property
    def steps(self) -> int:
        return int(self.body["num_inference_steps"])

    @property
    def short(self) -> bool:
        return self.steps <= SHORT


def arrivals(rate: float, seconds: float, seed: int) -> Sequence[Arrival]:
    """What arrives within `seconds`, `rate` requests a second on the average; the same for the same seed."""
    draw, made, at = random.Random(seed), [], 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        body = {
            "prompt": f"{draw.choice(SUBJECTS)} {draw.choice(PLACES)}, watercolor style",
            "num_inference_steps": _choice(draw, STEPS),
            "scheduler": _choice(draw, SCHEDULERS),
            "seed": draw.randrange(2**32),
        }
        made.append(Arrival(at, body))
    return made


def _choice(draw: random.Random, shares: dict[Any, int]) -> Any:
    return draw.choices(list(shares), list(shares.values()))[0]
