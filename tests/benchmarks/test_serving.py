"""The benchmark of serving: its load, its figures, and that its baselines draw the right pictures."""

import asyncio
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from benchmarks.serving.baselines import Batches, _alike, _together
from benchmarks.serving.client import Answered
from benchmarks.serving.report import Point, capacity, ratios
from benchmarks.serving.workload import STEPS, Arrival, arrivals
from sdfast.bucket import Buckets
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.jobs import Done, EngineInfo, Job
from tests.fakes import FakeEngine


def point(side: str, rate: float, p99: float, short: float = 1.0) -> Point:
    return Point(side, rate, 10, 0, rate, p99 / 2, p99, p99, short, short)


def job(seed: int, steps: int, scheduler: str = "euler") -> Job:
    request = Request.make(
        prompts=(f"picture {seed}",),
        negative_prompts=(None,),
        height=16,
        width=16,
        num_inference_steps=steps,
        scheduler=scheduler,
        seed=seed,
    )
    return Job(f"job{seed}", "fake", request)


def test_arrivals_come_at_the_rate_and_repeat() -> None:
    load = arrivals(50.0, 60.0, seed=3)
    assert load == arrivals(50.0, 60.0, seed=3) != arrivals(50.0, 60.0, seed=4)
    assert 2_800 < len(load) < 3_200
    assert 0 < load[0].at < load[-1].at < 60
    share = sum(arrival.steps == 20 for arrival in load) / len(load)
    assert abs(share - STEPS[20] / 100) < 0.03


def test_a_points_figures() -> None:
    def answered(at: float, seconds: float, steps: int, status: int = 200) -> Answered:
        return Answered(Arrival(at, {"num_inference_steps": steps}), status, seconds, at + seconds)

    rounds = [[answered(1, 2, 50), answered(2, 1, 8), answered(3, 2, 20, status=429)], [answered(2, 4, 50)]]
    found = Point.of("sdfast", 2.0, rounds)
    assert (found.answered, found.failed) == (3, 1)
    assert found.throughput == pytest.approx(3 / 8)  # from 1 to 5, and from 2 to 6
    assert (found.p50, found.short_p99) == (2.0, 1.0)


def test_capacity_is_where_p99_meets_the_limit() -> None:
    assert capacity([point("a", 1, 1), point("a", 2, 4), point("a", 3, 16)], 4.0) == 2
    assert capacity([point("a", 1, 1), point("a", 2, 16)], 4.0) == pytest.approx(1.5)
    assert capacity([point("a", 1, 9)], 4.0) == 0
    told = ratios(
        {"stock": [point("stock", 1, 4, 6)], "sdfast": [point("sdfast", 1, 1, 2), point("sdfast", 3, 4)]}, 4
    )
    assert told["stock"] == {"throughput_at_equal_p99": 3.0, "short_p99": {"1": 3.0}}


def test_jobs_that_are_drawn_together_are_each_their_own() -> None:
    pipeline = Pipeline(FakeEngine())
    pipeline.set_progress_bar_config(disable=True)
    jobs = [job(1, 3), job(2, 7, "ddim"), job(3, 5)]
    images = _together(pipeline, Buckets(4), jobs)
    for made, asked in zip(images, jobs, strict=True):
        assert np.array_equal(np.asarray(made), np.asarray(pipeline.generate(asked.request).images[0]))


def test_a_batch_takes_what_fits_and_the_rest_waits() -> None:
    batches: list[list[str]] = []
    pipeline = Pipeline(FakeEngine())

    def draw(jobs: object) -> list[Image.Image]:
        batches.append([one.id for one in jobs])  # type: ignore[attr-defined]
        return [Image.new("RGB", (16, 16), (one.request.seed, 0, 0)) for one in jobs]  # type: ignore[attr-defined]

    info = EngineInfo("fake", "sd", 16, 16, ("16x16",), 8, "fake", "0" * 64)
    studio = Batches(info, 2, _alike, lambda: (pipeline, draw))  # type: ignore[arg-type,return-value]

    async def all_of(*jobs: Job) -> list[int]:
        async def red(one: Job) -> int:
            [done] = [event async for event in studio.submit(one)]
            assert isinstance(done, Done)
            pixel = Image.open(BytesIO(done.pngs[0])).getpixel((0, 0))
            return int(pixel[0])  # type: ignore[index]

        with studio._changed:  # nothing is taken until all are there
            waiting = [asyncio.ensure_future(red(one)) for one in jobs]
            for _ in jobs:
                await asyncio.sleep(0)
        return list(await asyncio.gather(*waiting))

    reds = asyncio.run(all_of(job(1, 3), job(2, 3), job(3, 5), job(4, 3)))
    assert reds == [1, 2, 3, 4]
    assert batches == [["job1", "job2"], ["job3"], ["job4"]]
