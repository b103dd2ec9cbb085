"""Jobs of two passes: their pictures, their place beside others, and what ends them on the way."""

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from PIL import Image

from sdfast.errors import BackendError, RequestError
from sdfast.manifest import Span
from sdfast.pipeline import Pipeline
from sdfast.request import Hires, Request
from sdfast.row import Row
from sdfast.server.app import create_app
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Done, EngineInfo, Event, Failed, Job, Preview, Statistics, Step
from sdfast.server.places import PATIENCE as PLACES_PATIENCE
from sdfast.server.settings import Settings
from sdfast.server.studio import Post, WorkerStudio, info_of
from sdfast.server.work import Work
from sdfast.server.worker import messages
from sdfast.server.worker.supervisor import Supervisor
from tests.fakes import Failpoint, FakeEngine
from tests.server.test_batcher import Ear, Held, Open, open_batcher, pixels, request, submit, until

__all__ = ["open_batcher"]  # a fixture

SMALL, LARGE = 16, 32
SIZES = tuple((Span.exactly(side), Span.exactly(side)) for side in (SMALL, LARGE))


def twice(prompt: str = "a", images: int = 1, seed: int = 1, **hires: Any) -> Request:
    """Four steps, and then by default as many again at twice the size."""
    given = {"height": LARGE, "width": LARGE, **hires}
    return request(prompt, seed=seed, images=images, hires=Hires.make(**given))


def large_engine(**options: Any) -> FakeEngine:
    return FakeEngine(sizes=SIZES, **options)


def assert_drawn(done: Done, asked: Request) -> None:
    pipe = Pipeline(large_engine())
    pipe.set_progress_bar_config(disable=True)
    for png, image in zip(done.pngs, pipe.generate(asked).images, strict=True):
        assert (pixels(png) == pixels_of(image)).all()


def pixels_of(image: Image.Image) -> Any:
    file = io.BytesIO()
    image.save(file, "PNG")
    return pixels(file.getvalue())


def steps_of(ear: Ear) -> list[Step]:
    return [event for event in ear.events if isinstance(event, Step)]


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_jobs_of_two_passes_are_the_pipelines_pictures_beside_others(
    open_batcher: Open, upscaler: str
) -> None:
    engine = large_engine()
    batcher = open_batcher(engine, max_rows=3)
    asked = twice("the sea", images=3, seed=7, upscaler=upscaler, num_inference_steps=3, scheduler="euler_a")
    plain, other = request("a boat", images=2), twice("a hill", strength=0.5, prompts=("a lake",))
    with Held(engine):
        ears = [submit(batcher, one) for one in (asked, plain, other)]
    for ear, one in zip(ears, (asked, plain, other), strict=True):
        assert_drawn(ear.done(), one)
    told = steps_of(ears[0])
    assert [step.done for step in told] == sorted({step.done for step in told})
    assert told[-1].done == 3 * (4 + 3) and {step.total for step in told} == {3 * (4 + 3)}
    assert batcher.running() == 0 and batcher.load().running_steps == batcher.load().waiting_steps == 0
    assert set(ears[0].done().seconds) == {"waiting", "encoding", "denoising", "decoding"}


def test_latents_are_enlarged_without_the_vae(open_batcher: Open) -> None:
    engine = large_engine()
    submit(open_batcher(engine), twice()).done()
    assert (engine.calls["vae_encoder"], engine.calls["vae_decoder"]) == ([], [1])
    submit(open_batcher(engine), twice(upscaler="nearest")).done()
    assert (engine.calls["vae_encoder"], engine.calls["vae_decoder"]) == ([1], [1, 1, 1])


@pytest.mark.parametrize("previews", [0, 7])
def test_a_second_pass_does_not_wait_for_who_came_later(open_batcher: Open, previews: int) -> None:
    """Not even when the other has got the place meanwhile, since a preview was decoded first."""
    engine = large_engine()
    batcher, ended = open_batcher(engine, max_rows=1), list[str]()

    def heard(name: str) -> Callable[[Event], None]:
        return lambda event: ended.append(name) if isinstance(event, Done) else None

    with Held(engine):
        for name, asked in (("two passes", twice()), ("one pass", request(num_inference_steps=16))):
            batcher.submit(Job(name, "fake", asked, previews=previews), heard(name))
    until(lambda: len(ended) == 2)
    assert ended == ["two passes", "one pass"]


def test_what_there_is_to_do_is_counted_in_both_passes(open_batcher: Open) -> None:
    """With one place for two pictures: the second waits with all its steps, the first only with its last."""
    engine = large_engine()
    batcher = open_batcher(engine, max_rows=1)
    engine.failpoints["unet"] = Failpoint("hang", after=5)  # the first picture's second step at the new size
    ear = submit(batcher, twice(images=2))
    until(lambda: bool(steps_of(ear)) and steps_of(ear)[-1].done == 5)
    load = batcher.load()
    assert (load.rows, load.running_steps, load.waiting_steps) == (1, 3, 8)
    engine.failpoints["unet"].released.set()
    ear.done()


def test_a_picture_that_waits_for_its_second_pass_waits_with_that_alone() -> None:
    job, rows = Job("1", "fake", twice(images=2)), [cast(Row, "first"), cast(Row, "second")]
    work = Work(job, lambda event: None, 0, 4, 1.0, 3)
    work.prepared = cast(Any, SimpleNamespace(rows=rows))
    assert work.waiting_steps == 2 * 7
    del work.running[cast(Row, work.enter(0))]
    assert (work.waiting_steps, work.goes_on(0)) == (7, True)
    work.draw_over(0, lambda: cast(Row, "again"))
    assert (work.waiting_steps, work.goes_on(0), work.unfinished) == (7 + 3, False, [0, 1])
    assert (work.enter(0), work.waiting_steps) == ("again", 7)


def test_its_patience_is_that_of_both_passes(open_batcher: Open) -> None:
    batcher = open_batcher(large_engine())
    with Held(batcher._engine):  # type: ignore[arg-type]
        submit(batcher, request())
        until(lambda: batcher.running() == 1)
        for _ in range(4):
            batcher._pace.ticked(1.0, 1, SMALL, SMALL)
        asked = twice(num_inference_steps=3)
        ear = Ear()
        batcher.submit(Job("two", "fake", asked), ear)
        [work] = batcher._works.queue
        assert work.due(0) - work._arrived == pytest.approx(PLACES_PATIENCE * (4 + 3 * 4))


def test_previews_are_spread_over_both_passes(open_batcher: Open) -> None:
    ear = submit(open_batcher(large_engine()), twice(), previews=7)
    ear.done()
    shown = [event for event in ear.events if isinstance(event, Preview)]
    assert [preview.index for preview in shown] == list(range(7))
    sizes = [Image.open(io.BytesIO(preview.png)).size for preview in shown]
    assert sizes == [(SMALL, SMALL)] * 4 + [(LARGE, LARGE)] * 3


def test_a_job_is_cancelled_in_its_second_pass(open_batcher: Open) -> None:
    engine = large_engine()
    batcher = open_batcher(engine)
    point = engine.failpoints["unet"] = Failpoint("hang", after=5)
    ear = submit(batcher, twice(), "cancelled")
    until(lambda: len(engine.calls["unet"]) == 6)
    assert batcher.cancel("cancelled")
    point.released.set()
    assert ear.failed() == "cancelled"
    until(lambda: batcher.running() == 0)
    assert steps_of(ear)[-1].done == 6  # with the step that was under way
    assert_drawn(submit(batcher, twice()).done(), twice())


@pytest.mark.parametrize(
    ("module", "point", "kind"),
    [
        ("unet", Failpoint("nan", after=4), "numerical"),
        ("vae_encoder", Failpoint("memory"), "memory"),
        ("vae_encoder", Failpoint("nan"), "numerical"),
        ("vae_decoder", Failpoint("nan", calls=1), "numerical"),
    ],
)
def test_what_fails_between_the_passes_ends_the_job_alone(
    open_batcher: Open, module: str, point: Failpoint, kind: str
) -> None:
    engine = large_engine()
    batcher = open_batcher(engine)
    engine.failpoints[module] = point
    assert submit(batcher, twice(upscaler="lanczos")).failed() == kind
    engine.failpoints.clear()
    assert_drawn(submit(batcher, twice()).done(), twice())


def test_what_it_cannot_draw_is_refused_at_once(open_batcher: Open) -> None:
    engine = large_engine(edits=False)
    batcher = open_batcher(engine)
    for hires, told in (
        ({"height": 48}, "size 32x48"),
        ({"scheduler": "nothing"}, "nothing"),
        ({"upscaler": "lanczos"}, "no VAE encoder"),
    ):
        with pytest.raises(RequestError, match=told):
            submit(batcher, twice(**hires))
    assert not any(engine.calls.values())


def test_it_crosses_to_the_worker_whole() -> None:
    asked = twice(prompts=("the sea",), upscaler="latent_bicubic", num_inference_steps=3)
    assert messages.job_of(messages.take(Job("1", "fake", asked))).request == asked


class Studio:
    """One engine, run by a batcher in this process."""

    ready = True

    def __init__(self, batcher: Batcher, engine: FakeEngine) -> None:
        self.batcher = batcher
        self.engines: Mapping[str, EngineInfo] = {"fake": info_of(engine.manifest)}

    def check_size(self, engine: str, request: Request) -> None:
        for one in request.passes:
            self.batcher._engine.check_size(one.height, one.width)

    async def submit(self, job: Job) -> AsyncIterator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self.batcher.submit(job, lambda event: loop.call_soon_threadsafe(events.put_nowait, event) and None)
        try:
            while True:
                yield (event := await events.get())
                if isinstance(event, Done | Failed):
                    return
        finally:
            self.batcher.cancel(job.id)

    def cancel(self, job_id: str) -> bool:
        return self.batcher.cancel(job_id)

    def preview(self, job_id: str) -> bool:
        return self.batcher.preview(job_id)

    def waiting(self) -> int:
        return self.batcher.waiting()

    def running(self) -> int:
        return self.batcher.running()

    def statistics(self) -> Mapping[str, Statistics]:
        return {"fake": Statistics(True, 0, self.waiting(), self.batcher.load())}


@pytest.fixture
def house(open_batcher: Open) -> Iterator[tuple[FakeEngine, Studio]]:
    engine = large_engine()
    yield engine, Studio(open_batcher(engine), engine)
    for point in engine.failpoints.values():
        point.released.set()


@asynccontextmanager
async def client_of(studio: Studio) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(studio, Settings.make()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost/sdapi/v1/") as client:
        yield client


async def come(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


CALL = {"width": SMALL, "height": SMALL, "steps": 4, "seed": 1, "enable_hr": True}


@pytest.mark.anyio
async def test_one_bar_over_both_passes_and_an_interrupt_in_the_second(
    house: tuple[FakeEngine, Studio],
) -> None:
    engine, studio = house
    engine.failpoints["unet"] = Failpoint("hang", after=6)
    async with client_of(studio) as http:
        call = asyncio.create_task(http.post("txt2img", json=CALL))
        await come(lambda: len(engine.calls["unet"]) == 7)
        told = (await http.get("progress?skip_current_image=true")).json()
        assert told["progress"] == pytest.approx(6 / 8)
        assert (told["state"]["sampling_step"], told["state"]["sampling_steps"]) == (6, 8)
        assert told["state"]["job_count"] == 1
        await http.post("interrupt")
        point = engine.failpoints.pop("unet")
        point.released.set()
        answer = (await call).json()
        [image] = answer["images"]
        assert Image.open(io.BytesIO(base64.b64decode(image))).size == (LARGE, LARGE)
        assert (await http.get("progress")).json()["state"]["interrupted"] is True
        await come(lambda: studio.running() == 0 and not studio.batcher._works.all)
        whole = (await http.post("txt2img", json=CALL)).json()
        assert Image.open(io.BytesIO(base64.b64decode(whole["images"][0]))).size == (LARGE, LARGE)


@pytest.mark.anyio
async def test_a_client_that_leaves_in_the_second_pass_frees_its_place(
    house: tuple[FakeEngine, Studio],
) -> None:
    engine, studio = house
    engine.failpoints["unet"] = Failpoint("hang", after=6)
    async with client_of(studio) as http:
        call = asyncio.create_task(http.post("txt2img", json=CALL))
        await come(lambda: len(engine.calls["unet"]) == 7)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        engine.failpoints.pop("unet").released.set()
        await come(lambda: studio.running() == 0 and not studio.batcher._works.all)
        assert len(engine.calls["unet"]) == 7
        answer = await http.post("txt2img", json=CALL)
        assert answer.status_code == 200


def test_the_server_knows_both_sizes_without_its_worker() -> None:
    manifest = large_engine().manifest
    studio = WorkerStudio([Post(manifest, Supervisor("fake", ["true"], max_queue=1))])
    with pytest.raises(RequestError, match="size 32x48"):
        studio.submit(Job("1", "fake", twice(height=48)))
    with pytest.raises(BackendError):  # which is not up, but was asked
        studio.submit(Job("1", "fake", twice()))
