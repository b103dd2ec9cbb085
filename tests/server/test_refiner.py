"""A job that two engines share: what crosses, one bar over both parts, AUTOMATIC1111's fields for it."""

import io
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from sdfast.engine import Engine
from sdfast.ensemble import Ensemble
from sdfast.errors import BackendError, RequestError
from sdfast.first_latents import Over
from sdfast.images import from_bytes
from sdfast.infotext import parse
from sdfast.manifest import read_manifest
from sdfast.request import Request
from sdfast.server.handover import STATE, packed, unpacked
from sdfast.server.in_turn import in_turn, parts_of
from sdfast.server.jobs import Begun, Done, Event, Failed, Job, Preview, Queued, QueueFull, Refiner, Step
from sdfast.server.studio import Post, WorkerStudio, info_of
from sdfast.server.worker import messages
from tests.fakes import FakeEngine
from tests.server.studio import FakeStudio, engine
from tests.server.test_automatic1111 import Client
from tests.server.test_batcher import Ear, Open, open_batcher
from tests.test_image_to_image import image
from tests.test_pipeline import ours

__all__ = ["open_batcher"]  # a fixture
pytestmark = pytest.mark.anyio


def asked(**fields: Any) -> Request:
    given = {"prompts": ("a boat",), "negative_prompts": (None,), "height": 64, "width": 64, "seed": 3}
    return Request.make(**{**given, "num_inference_steps": 5, "scheduler": "euler_a", **fields})


@pytest.fixture
def api(http: httpx.AsyncClient) -> Client:
    return Client(http)


def crossed(job: Job) -> Job:
    """As it comes out at the worker."""
    told = messages.job_of(messages.take(job))
    assert replace(told, deadline=None) == replace(job, deadline=None)
    return told


@pytest.mark.parametrize("over", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_parts_are_the_ensembles_pictures(
    sdxl_engine: Path, refiner_engine: Path, open_batcher: Open, over: bool
) -> None:
    """Two of them, with a sampler that draws noise in every step, begun from noise and over an image."""
    pipes = ours(sdxl_engine), ours(refiner_engine)
    request = asked(num_images_per_prompt=2, strength=0.9 if over else None)
    given = {"image": image().tobytes()} if over else {}
    base, model = info_of(pipes[0].engine.manifest), pipes[1].engine.manifest.model
    job = Job("1", base.name, request, refiner=Refiner("refiner", 0.5), **given)
    begun, finished = parts_of(job, base, model)
    ear = Ear()
    open_batcher(pipes[0].engine).submit(crossed(begun), ear)
    left = ear.done()
    ear = Ear()
    handed = replace(finished, handed=b"".join(left.pngs))
    open_batcher(pipes[1].engine).submit(crossed(handed), ear)
    images = [Image.open(io.BytesIO(png)) for png in ear.done().pngs]
    drawn_over = Over(from_bytes(given["image"], 64, 64)) if over else None
    expected = Ensemble(*pipes, 0.5).generate(request, drawn_over).images
    for found, due in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(due))
    told = parse(images[1].text["parameters"])
    assert (told.model, told.steps, told.seed) == (base.name, 5, 4)
    digest = info_of(pipes[1].engine.manifest).unet_digest[:10]
    refined = {"Refiner": f"refiner [{digest}]", "Refiner switch at": "0.5"}
    assert told.extra == ({"Denoising strength": "0.9"} if over else {}) | refined


def test_what_crosses_is_what_was_left() -> None:
    sources = [torch.Generator().manual_seed(seed) for seed in (1, 2**64 - 1)]
    latents = torch.randn(2, 4, 2, 3, generator=sources[0])
    handed = b"".join(packed(*each) for each in zip(latents, sources, strict=True))
    assert len(handed) == 2 * (4 * latents[0].numel() + STATE)
    found, generators = unpacked(handed, 2, (4, 2, 3))
    assert torch.equal(found, latents)
    for own, source in zip(generators, sources, strict=True):
        assert own.initial_seed() == source.initial_seed()
        assert torch.equal(torch.randn(5, generator=own), torch.randn(5, generator=source))


def test_too_few_bytes_are_refused(refiner_engine: Path, open_batcher: Open) -> None:
    batcher = open_batcher(Engine.open(refiner_engine))
    short = Job("1", "refiner", asked(denoising_start=0.5), handed=bytes(4 * 4 * 64 + STATE - 1))
    with pytest.raises(RequestError, match=r"^refiner: 6079 bytes of latents were handed over, but 6080"):
        batcher.submit(short, Ear())


# One job to whoever asked for it


class SecondPost:
    """A second engine's supervisor. before: what it raises before it takes a job in."""

    def __init__(self, events: list[Event], before: list[Exception] | None = None) -> None:
        self._events, self._before, self.jobs = events, before or [], list[Job]()

    def submit(self, job: Job) -> AsyncIterator[Event]:
        if self._before:
            raise self._before.pop(0)
        self.jobs.append(job)
        return several(self._events)


async def several(events: list[Event]) -> AsyncIterator[Event]:
    for event in events:
        yield event


STAGES = {"waiting": 1.0, "denoising": 2.0}
FIRST = [
    Queued(1),
    Begun(),
    Step(1, 4),
    Preview(0, b"p"),
    Step(4, 4),
    Done((b"a", b"b"), (3,), ("cut",), STAGES, 5),
]
SECOND = [Queued(0), Begun(), Step(1, 1), Preview(0, b"q"), Done((b"png",), (3,), ("",), STAGES, 6)]
FINISHED = parts_of(
    Job("1", "tiny", asked(), refiner=Refiner("r", 0.8)), engine(), FakeEngine().manifest.model
)[1]


async def test_it_is_one_job_with_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfast.server.in_turn.PAUSE", 0)
    refiner = SecondPost(SECOND, [QueueFull(1.0), QueueFull(1.0)])
    told = [event async for event in in_turn(several(FIRST), FINISHED, refiner)]
    last = Done((b"png",), (3,), ("cut",), {"waiting": 2.0, "denoising": 4.0}, 11)
    assert told == [
        *(Queued(1), Begun(), Step(1, 5), Preview(0, b"p"), Step(4, 5)),
        *(Step(5, 5), Preview(1, b"q"), last),
    ]
    assert [job.handed for job in refiner.jobs] == [b"ab"]


@pytest.mark.parametrize(
    ("first", "refiner", "kind"),
    [
        ([Queued(0), Failed("memory", "none")], SecondPost([]), "memory"),
        (FIRST, SecondPost([Failed("numerical", "NaN")]), "numerical"),
        (FIRST, SecondPost([], [BackendError("it is not ready")]), "engine"),
        (FIRST, SecondPost([], [RequestError("too large")]), "request"),
        (FIRST, SecondPost([], [QueueFull(1.0)]), "timeout"),
    ],
)
async def test_a_part_that_fails_is_the_end(first: list[Event], refiner: SecondPost, kind: str) -> None:
    late = replace(FINISHED, deadline=0.0)
    told = [event async for event in in_turn(several(first), late, refiner)]
    assert isinstance(told[-1], Failed) and told[-1].kind == kind
    assert sum(isinstance(event, Done | Failed) for event in told) == 1


@pytest.fixture
def studio_of_two(sdxl_engine: Path, refiner_engine: Path, sd_engine: Path) -> Iterator[WorkerStudio]:
    manifests = map(read_manifest, (sdxl_engine, refiner_engine, sd_engine))
    yield WorkerStudio([Post(manifest, SecondPost(FIRST)) for manifest in manifests])


async def test_a_studio_deals_out_the_parts(studio_of_two: WorkerStudio) -> None:
    job = Job("1", "sdxl", asked(prompts_2=("sea",)), refiner=Refiner("refiner", 0.8))
    told = [event async for event in studio_of_two.submit(job)]
    assert isinstance(told[-1], Done)
    [begun], [finished] = (studio_of_two._posts[name].supervisor.jobs for name in ("sdxl", "refiner"))
    assert (begun.hands_over, begun.request.denoising_end, begun.request.prompts_2) == (True, 0.8, ("sea",))
    assert (finished.handed, finished.request.denoising_start) == (b"ab", 0.8)
    assert finished.request.prompts_2 is None and not finished.hands_over
    for refiner, message in (
        ("gone", "engine 'gone' is not here"),
        ("sd", "refiner: is of sd, with 4 channels"),
    ):
        with pytest.raises(RequestError, match=message):
            studio_of_two.submit(replace(job, refiner=Refiner(refiner, 0.8)))
    with pytest.raises(RequestError, match="guidance_end: is a share of the steps of one engine"):
        studio_of_two.submit(replace(job, request=asked(guidance_end=0.5)))


# AUTOMATIC1111's


async def test_a_refiner_is_named_by_its_checkpoint(api: Client, studio: FakeStudio) -> None:
    studio.engines["xl-refiner"] = engine("xl-refiner")
    told = await api.post("txt2img", prompt="a", refiner_checkpoint="xl-refiner", refiner_switch_at=0.6)
    await api.post("txt2img", prompt="a", refiner_checkpoint="xl-refiner")
    for unasked in ({"refiner_checkpoint": "None"}, {"refiner_switch_at": 0.5}, {}):
        await api.post("txt2img", prompt="a", **unasked)
    await api.post("txt2img", prompt="a", refiner_checkpoint="xl-refiner", refiner_switch_at=1)
    wanted = [job.refiner for job in studio.jobs]
    assert wanted == [Refiner("xl-refiner", 0.6), Refiner("xl-refiner", 0.8), None, None, None, None]
    more = json.loads(told["info"])["extra_generation_params"]
    digest = studio.engines["xl-refiner"].unet_digest[:10]
    assert (more["Refiner"], more["Refiner switch at"]) == (f"xl-refiner [{digest}]", "0.6")


async def test_a_refiner_that_cannot_be_had_is_refused(api: Client, studio: FakeStudio) -> None:
    told = await api.refused("txt2img", 404, prompt="a", refiner_checkpoint="gone")
    assert told.startswith("refiner_checkpoint: 'gone' is not here; there are: tiny")
    told = await api.refused("txt2img", 422, prompt="a", refiner_checkpoint="tiny", refiner_switch_at=2)
    assert told.startswith("refiner_switch_at: must be less than or equal to 1")
    assert studio.jobs == []
