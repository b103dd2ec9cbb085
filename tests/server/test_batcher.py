"""The batcher: whoever shares the loop, each job gets its own pictures, and its own faults alone."""

import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdfast import infotext
from sdfast.engine import Engine
from sdfast.errors import BackendError, RequestError
from sdfast.manifest import Span
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server import places, work
from sdfast.server.batcher import FAILURES, ROWS, Batcher
from sdfast.server.jobs import Done, Event, Failed, Job, Preview, Queued, QueueFull, Step
from tests.fakes import Failpoint, FakeEngine

PATIENCE = 20  # seconds; nothing here takes one


def request(prompt: str = "a", seed: int = 1, images: int = 1, **fields: Any) -> Request:
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "negative_prompts": (None,), **fields}
    return Request.make(prompts=(prompt,), seed=seed, num_images_per_prompt=images, **given)


class Ear:
    """What a job's listener was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._last = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self._last.is_set(), f"{event} after the last event"
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self._last.set()

    def end(self) -> Done | Failed:
        assert self._last.wait(PATIENCE), f"no end after {self.events}"
        last = self.events[-1]
        assert isinstance(last, Done | Failed)
        return last

    def done(self) -> Done:
        end = self.end()
        assert isinstance(end, Done), end
        return end

    def failed(self) -> str:
        end = self.end()
        assert isinstance(end, Failed), end
        return end.kind


class Held:
    """A U-Net that waits before every call until it is let go on, so that a test knows where it stands."""

    def __init__(self, engine: FakeEngine) -> None:
        self.point = engine.failpoints["unet"] = Failpoint("hang")

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self.point.released.set()


@pytest.fixture
def open_batcher() -> Iterator[Callable[..., Batcher]]:
    opened: list[Batcher] = []

    def make(engine: Engine, **options: Any) -> Batcher:
        opened.append(Batcher(engine, **options))
        return opened[-1]

    yield make
    for batcher in opened:
        assert batcher.close(drain=False, timeout=PATIENCE)


Open = Callable[..., Batcher]


def submit(batcher: Batcher, asked: Request, name: str | None = None, **fields: Any) -> Ear:
    ear = Ear()
    batcher.submit(Job(name or f"job{time.monotonic_ns()}", "fake", asked, **fields), ear)
    return ear


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.001)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


def assert_drawn(done: Done, asked: Request, pipe: Pipeline, off: int = 0) -> None:
    """The pictures are the pipeline's, up to `off` levels of 255."""
    assert done.seeds == asked.seeds
    for png, image in zip(done.pngs, pipe.generate(asked).images, strict=True):
        assert np.abs(pixels(png) - np.asarray(image, dtype=np.int16)).max() <= off


def test_a_job_alone_is_the_pipelines_pictures(open_batcher: Open) -> None:
    asked = request("the sea", images=3, seed=7, scheduler="euler_a", num_inference_steps=5)
    ear = submit(open_batcher(FakeEngine()), asked)
    assert_drawn(ear.done(), asked, Pipeline(FakeEngine()))
    steps = [event for event in ear.events if isinstance(event, Step)]
    assert [step.done for step in steps] == [3, 6, 9, 12, 15]
    assert {step.total for step in steps} == {15}
    assert set(ear.done().seconds) == {"waiting", "encoding", "denoising", "decoding"}
    assert all(seconds >= 0 for seconds in ear.done().seconds.values())


def test_the_tokens_that_were_read_are_told(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine)
    most = engine.tokenizers[0].max_length
    for fields, tokens in (
        ({"prompt": "the sea"}, 7),
        ({"prompt": "the sea", "images": 2, "negative_prompts": ("fog",)}, 10),
        ({"prompt": "a" * (most + 9)}, most),
        ({"prompt": "a" * (most + 9), "long_prompts": "chunk"}, most + 9),
    ):
        assert submit(batcher, request(**fields)).done().tokens == tokens


def over(masked: bool = False, seed: int = 0) -> dict[str, bytes]:
    """A job's image, and its mask: the right half is drawn anew."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    half = np.repeat(np.array([[0, 255]], np.uint8), 16, axis=0).repeat(8, axis=1)
    return {"image": pixels.tobytes(), **({"mask": half.tobytes()} if masked else {})}


@pytest.mark.parametrize("masked", [False, True])
def test_jobs_over_images_are_the_pipelines_pictures_beside_others(open_batcher: Open, masked: bool) -> None:
    asked = request("the sea", images=3, seed=7, strength=0.6, scheduler="euler_a", num_inference_steps=5)
    given, plain, batcher = over(masked), request("a boat", images=2), open_batcher(FakeEngine(), max_rows=4)
    others, ear = submit(batcher, plain), submit(batcher, asked, **given)
    pipe, last = Pipeline(FakeEngine()), ear.done()
    mask = np.frombuffer(given["mask"], np.uint8).reshape(16, 16) if masked else None
    call = {
        "image": Image.frombytes("RGB", (16, 16), given["image"]),
        "mask_image": None if mask is None else Image.fromarray(mask),
        "strength": 0.6,
        "scheduler": "euler_a",
        "num_inference_steps": 5,
    }
    for png, seed in zip(last.pngs, last.seeds, strict=True):  # each as if it were alone
        [image] = pipe("the sea", seed=seed, **call).images
        assert np.abs(pixels(png) - np.asarray(image, np.int16)).max() == 0
    assert_drawn(others.done(), plain, pipe)
    text = infotext.parse(Image.open(io.BytesIO(last.pngs[0])).info["parameters"])
    assert text.extra["Denoising strength"] == "0.6"


def control(seed: int) -> dict[str, bytes]:
    return {"control": over(seed=seed)["image"]}


def test_jobs_under_control_are_the_pipelines_pictures_beside_others(open_batcher: Open) -> None:
    """Of other images and scales, one of them over an image: rows of one batch."""
    engine = FakeEngine(controlnets=1)
    pipe, batcher = Pipeline(FakeEngine(controlnets=1)), open_batcher(engine, max_rows=4)
    asked: list[tuple[dict[str, Any], dict[str, bytes]]] = [
        ({"controlnet_conditioning_scale": 1.0}, control(1)),
        ({"controlnet_conditioning_scale": 0.25, "control_guidance_start": 0.25}, control(2)),
        ({"controlnet_conditioning_scale": 1.0, "strength": 0.5}, {**over(True), **control(3)}),
    ]
    with Held(engine):
        ears = [submit(batcher, request("a", seed=i, **asked[i][0]), **asked[i][1]) for i in range(3)]
    for i, (fields, given) in enumerate(asked):
        [png] = ears[i].done().pngs
        pictures = {"control_image": Image.frombytes("RGB", (16, 16), given["control"])}
        if "image" in given:
            mask = np.frombuffer(given["mask"], np.uint8).reshape(16, 16)
            pictures["image"] = Image.frombytes("RGB", (16, 16), given["image"])
            pictures["mask_image"] = Image.fromarray(mask)
        run = {"num_inference_steps": 4, "guidance_scale": 7.5}
        [image] = pipe("a", seed=i, **pictures, **fields, **run).images
        assert np.abs(pixels(png) - np.asarray(image, np.int16)).max() == 0
    assert max(engine.calls["unet"]) == 6  # with the prompt and without
    text = infotext.parse(Image.open(io.BytesIO(ears[1].done().pngs[0])).info["parameters"])
    assert text.extra["ControlNet scale"] == "0.25"


def test_jobs_of_other_loras_are_the_pipelines_pictures_beside_others(open_batcher: Open) -> None:
    """In one batch; and their parameters tell them."""
    engine = FakeEngine(loras=("oil", "ink"))
    pipe, batcher = Pipeline(FakeEngine(loras=("oil", "ink"))), open_batcher(engine, max_rows=4)
    asked: list[dict[str, Any]] = [{}, {"oil": 0.5}, {"oil": -1.0, "ink": (0.0, 2.0)}]
    with Held(engine):
        ears = [submit(batcher, request("a", seed=i, loras=asked[i])) for i in range(3)]
    for i, loras in enumerate(asked):
        [png] = ears[i].done().pngs
        [image] = pipe("a", seed=i, loras=loras, num_inference_steps=4, guidance_scale=7.5).images
        assert np.abs(pixels(png) - np.asarray(image, np.int16)).max() == 0
    assert max(engine.calls["unet"]) == 6
    texts = [Image.open(io.BytesIO(ear.done().pngs[0])).info["parameters"] for ear in ears]
    tags = "<lora:oil:-1> <lora:ink:0:2>"
    assert [infotext.parse(text).prompt for text in texts] == ["a", "a <lora:oil:0.5>", f"a {tags}"]
    with pytest.raises(RequestError, match="no LoRA 'oli' for requests to choose; it has: oil, ink"):
        submit(batcher, request("a", loras={"oli": 1.0}))


def test_jobs_under_several_control_images_are_the_pipelines_pictures(open_batcher: Open) -> None:
    pipe, batcher = Pipeline(FakeEngine(controlnets=2)), open_batcher(FakeEngine(controlnets=2))
    fields = {"controlnet_conditioning_scale": (1.0, 0.25), "control_guidance_end": (0.5, 1.0)}
    images = [control(seed)["control"] for seed in (1, 2)]
    [png] = submit(batcher, request("a", seed=0, **fields), control=b"".join(images)).done().pngs
    pictures = [Image.frombytes("RGB", (16, 16), one) for one in images]
    run = {"num_inference_steps": 4, "guidance_scale": 7.5, "seed": 0}
    [image] = pipe("a", control_image=pictures, **fields, **run).images
    assert np.abs(pixels(png) - np.asarray(image, np.int16)).max() == 0
    with pytest.raises(RequestError, match="control_image: 768 bytes, but 2x16x16x3 uint8 are 1536"):
        submit(batcher, request("a", **fields), **control(1))
    with pytest.raises(RequestError, match="control_guidance_end: 3 numbers, but this engine has 2"):
        submit(
            batcher, request("a", **fields | {"control_guidance_end": (1.0,) * 3}), control=b"".join(images)
        )


@pytest.mark.parametrize(
    ("given", "scale", "controlled", "message"),
    [
        ({}, None, True, "^control_image: is missing; this engine has a ControlNet"),
        (over(), None, True, "^control_image: is missing"),
        (control(1), 1.0, False, "^control_image: this engine has no ControlNet"),
        (control(1), None, True, "^controlnet_conditioning_scale and a control image go together"),
        ({}, 1.0, False, "^controlnet_conditioning_scale and a control image go together"),
        ({"control": b"\0" * 769}, 1.0, True, "^control_image: 769 bytes, but 16x16x3 uint8 are 768"),
    ],
)
def test_a_control_image_that_does_not_fit_is_refused_at_once(
    open_batcher: Open, given: dict[str, bytes], scale: float | None, controlled: bool, message: str
) -> None:
    strength = 0.5 if "image" in given else None
    asked = request(controlnet_conditioning_scale=scale, strength=strength)
    engine = FakeEngine(controlnets=int(controlled))
    with pytest.raises(RequestError, match=message):
        submit(open_batcher(engine), asked, **given)
    assert engine.calls["text_encoder"] == []


@pytest.mark.parametrize(
    ("given", "strength", "engine", "message"),
    [
        ({"mask": b"\0" * 256}, None, {}, "mask: is for an image"),
        ({}, 0.5, {}, "strength and an image"),
        (over(), None, {}, "strength and an image"),
        ({"image": b"\0" * 767}, 0.5, {}, "image: 767 bytes, but 16x16x3 uint8 are 768"),
        ({**over(), "mask": b"\0" * 768}, 0.5, {}, "mask: 768 bytes, but 16x16 uint8 are 256"),
        (over(), 0.5, {"edits": False}, "no VAE encoder.*export it again"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_at_once(
    open_batcher: Open, given: dict[str, bytes], strength: float | None, engine: dict[str, bool], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        submit(open_batcher(FakeEngine(**engine)), request(strength=strength), **given)


def test_an_image_whose_latents_are_no_numbers_fails_alone(open_batcher: Open) -> None:
    engine = FakeEngine(failpoints={"vae_encoder": Failpoint("nan", calls=1)})
    batcher = open_batcher(engine)
    assert submit(batcher, request(strength=0.5), **over()).failed() == "numerical"
    submit(batcher, request(strength=0.5), **over()).done()


def test_pictures_hold_their_parameters(open_batcher: Open, tmp_path: Path) -> None:
    asked = Request.make(
        prompts=("cats", "a dog"),
        negative_prompts=("rain", None),
        height=16,
        width=16,
        num_inference_steps=2,
        scheduler="dpmpp_2m_karras",
        num_images_per_prompt=2,
        seed=5,
    )
    done = submit(open_batcher(FakeEngine()), asked).done()
    read = []
    for i, png in enumerate(done.pngs):
        (tmp_path / f"{i}.png").write_bytes(png)
        read.append(infotext.read(tmp_path / f"{i}.png"))
    assert [text.prompt for text in read] == ["cats", "cats", "a dog", "a dog"]
    assert [text.negative_prompt for text in read] == ["rain", "rain", "", ""]
    assert [text.seed for text in read] == [5, 6, 7, 8]
    assert {(t.sampler, t.schedule_type, t.steps, t.model) for t in read} == {
        ("DPM++ 2M", "Karras", 2, "fake")
    }
    assert done.truncated == ("", "")


def test_many_jobs_at_once_are_each_as_if_alone(open_batcher: Open) -> None:
    """Sizes, schedulers, steps, guidance and step caching mixed; some are cancelled on the way."""
    sizes = [(Span.exactly(16), Span.exactly(16)), (Span.exactly(16), Span.exactly(24))]
    engine, chance = FakeEngine(sizes=sizes, cached=True), random.Random(1)
    batcher, pipe = open_batcher(engine, max_rows=5), Pipeline(FakeEngine(sizes=sizes, cached=True))
    jobs: list[tuple[str, Request, Ear]] = []
    for i in range(40):
        interval = chance.choice([1, 2, 3])
        asked = request(
            chance.choice(["a", "the sea", "far too long for this tokenizer"]),
            seed=100 * i,
            images=chance.choice([1, 1, 2, 7]),
            width=chance.choice([16, 24]),
            scheduler=chance.choice(["euler_a", "ddim", "dpmpp_2m_karras", "unipc", "ddpm"]),
            num_inference_steps=chance.randint(1, 9),
            guidance_scale=chance.choice([1.0, 3.0, 7.5]),
            guidance_rescale=chance.choice([0.0, 0.5]),
            guidance_start=chance.choice([0.0, 0.0, 0.4]) if interval == 1 else 0.0,
            guidance_end=chance.choice([1.0, 1.0, 0.6]),
            cache_interval=interval,
            long_prompts=chance.choice(["truncate", "chunk"]),
        )
        jobs.append((f"job{i}", asked, submit(batcher, asked, f"job{i}")))
        if chance.random() < 0.3:
            batcher.cancel(chance.choice(jobs)[0])
        time.sleep(chance.choice([0, 0.001]))
    ends = [ear.end() for _, _, ear in jobs]
    for (_, asked, _), end in zip(jobs, ends, strict=True):
        if isinstance(end, Failed):
            assert end.kind == "cancelled"
        else:
            assert_drawn(end, asked, pipe, off=1)
    assert sum(isinstance(end, Done) for end in ends) > 25
    assert batcher.running() == batcher.waiting() == 0
    assert not any(batcher.cancel(name) for name, _, _ in jobs)  # nothing of them is kept
    assert max(engine.calls["unet"]) > 5


def test_on_a_real_network_alone_and_beside_others(open_batcher: Open, sd_engine: Path) -> None:
    engine = Engine.open(sd_engine)
    batcher, pipe = open_batcher(engine), Pipeline(Engine.open(sd_engine))
    asked = request("a cat", height=64, width=64, scheduler="euler_a")
    assert_drawn(submit(batcher, asked).done(), asked, pipe)
    others = [
        request("the sea", seed=9, images=2, height=64, width=64, scheduler="ddim", num_inference_steps=3),
        request("a dog", seed=4, height=64, width=96, scheduler="unipc", num_inference_steps=5),
        request("a boat", seed=3, height=64, width=64, guidance_scale=1.0, scheduler="dpmpp_2m"),
        request("a (cat:1.3), " * 30, seed=5, height=64, width=64, long_prompts="chunk", emphasis="original"),
    ]
    ears = [(one, submit(batcher, one)) for one in [others[0], asked, *others[1:]]]
    for one, ear in ears:
        assert_drawn(ear.done(), one, pipe, off=1)


def test_a_short_job_does_not_wait_for_all_pictures_of_a_long_one(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=2)
    with Held(engine):
        long = submit(batcher, request(images=30), "long")
        until(lambda: batcher.running() == 2)
        short = submit(batcher, request("b"), "short")
        last = submit(batcher, request("c"), "last")
    short.done(), last.done()
    assert not any(isinstance(event, Done) for event in list(long.events))
    drawn = [event.done for event in long.events if isinstance(event, Step)][-1]
    assert drawn < 30 * 4
    assert len(long.done().pngs) == 30


def test_a_job_does_not_wait_for_the_end_of_one_of_another_cache_interval(open_batcher: Open) -> None:
    engine = FakeEngine(cached=True)
    batcher = open_batcher(engine, max_rows=2)
    with Held(engine):
        long = submit(batcher, request(num_inference_steps=900, cache_interval=3), "long")
        until(lambda: batcher.running() == 1)
        short = submit(batcher, request("b"), "short")
        until(lambda: batcher.waiting() == 1)
    short.done()
    assert not any(isinstance(event, Done) for event in list(long.events))
    batcher.cancel("long")


def test_a_long_job_is_not_starved_by_a_stream_of_short_ones(
    open_batcher: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    batcher, ended = open_batcher(engine, max_rows=2, max_queue=1000), list[str]()
    clock = SimpleNamespace(now=time.monotonic())
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def heard(name: str) -> Callable[[Event], None]:
        return lambda event: ended.append(name) if isinstance(event, Done | Failed) else None

    with Held(engine):
        batcher.submit(Job("long", "fake", request(images=10)), heard("long"))
        until(lambda: batcher.running() == 2)
        for i in range(80):  # four of them come in the time that the long one may wait for each picture
            batcher.submit(Job(f"short{i}", "fake", request(seed=i)), heard(f"short{i}"))
            clock.now += places.PATIENCE * places.STEP_SECONDS * 4 / 4
    until(lambda: len(ended) == 81)
    assert 30 < ended.index("long") < 45


def test_a_picture_put_aside_for_shorter_ones_goes_on_where_it_was(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher, ended = open_batcher(engine, max_rows=2), list[str]()
    asked = [
        request("the sea", seed=5, num_inference_steps=30, scheduler="euler_a"),
        request("a boat", seed=6, num_inference_steps=30, scheduler="dpmpp_2m_karras", guidance_scale=1.0),
        request("the sea", seed=7, num_inference_steps=30, scheduler="unipc", strength=0.9),
    ]
    ears = [Ear() for _ in asked]

    def heard(name: str, ear: Ear) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, Done | Failed):
                ended.append(name)
            ear(event)

        return hear

    with Held(engine):
        for i, (one, ear) in enumerate(zip(asked, ears, strict=True)):
            given = over(masked=True) if one.strength else {}
            batcher.submit(Job(f"long{i}", "fake", one, **given), heard("long", ear))
        until(lambda: len(engine.calls["unet"]) == 1)
        shorts = [(Ear(), request("b", seed=i, num_inference_steps=2)) for i in range(3)]
        for i, (ear, one) in enumerate(shorts):
            batcher.submit(Job(f"short{i}", "fake", one), heard("short", ear))
    for ear, one in shorts:
        assert_drawn(ear.done(), one, Pipeline(FakeEngine()))
    assert ended[:3] == ["short"] * 3
    for one, ear in zip(asked[:2], ears, strict=False):
        assert_drawn(ear.done(), one, Pipeline(FakeEngine()))
    given = over(masked=True)
    [image] = Pipeline(FakeEngine())(
        "the sea",
        seed=7,
        num_inference_steps=30,
        scheduler="unipc",
        strength=0.9,
        image=Image.frombytes("RGB", (16, 16), given["image"]),
        mask_image=Image.fromarray(np.frombuffer(given["mask"], np.uint8).reshape(16, 16)),
    ).images
    assert np.abs(pixels(ears[2].done().pngs[0]) - np.asarray(image, np.int16)).max() == 0


@pytest.mark.parametrize("how", ["cancelled", "engine"])
def test_a_picture_put_aside_ends_with_its_job(open_batcher: Open, how: str) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=1)
    with Held(engine):
        long = submit(batcher, request(num_inference_steps=400), "long")
        until(lambda: batcher.running() == 1)
        short = submit(batcher, request(num_inference_steps=300), "short")
    until(lambda: any(isinstance(event, Step) for event in short.events))
    assert not any(isinstance(event, Done | Failed) for event in [long.events[-1], short.events[-1]])
    if how == "engine":
        engine.failpoints["unet"] = Failpoint("raise", calls=1)
    else:
        batcher.cancel("long")
    assert long.failed() == how
    if how == "engine":
        assert short.failed() == how
        engine.failpoints.clear()
    else:
        short.done()
    assert_drawn(submit(batcher, request()).done(), request(), Pipeline(FakeEngine()))
    assert batcher.running() == batcher.waiting() == 0


def test_previews_come_on_the_way_and_look_like_the_end(open_batcher: Open) -> None:
    asked = request(num_inference_steps=9, images=2, scheduler="euler", guidance_scale=1.0)
    ear = submit(open_batcher(FakeEngine()), asked, previews=2)
    done = ear.done()
    assert_drawn(done, asked, Pipeline(FakeEngine()))
    previews = [event for event in ear.events if isinstance(event, Preview)]
    assert [preview.index for preview in previews] == [0, 1]
    assert all(pixels(preview.png).shape == (16, 16, 3) for preview in previews)
    told = [event for event in ear.events if isinstance(event, Step | Preview)]
    steps = [event.done if isinstance(event, Step) else "preview" for event in told]
    assert steps.index("preview") >= 3

    none = submit(open_batcher(FakeEngine()), request(num_inference_steps=1), previews=5)
    none.done()
    assert not any(isinstance(event, Preview) for event in none.events)


def test_a_processor_has_few_rows_unless_more_are_asked_for(open_batcher: Open) -> None:
    for given, rows in ({}, ROWS["cpu"]), ({"max_rows": 4}, 4):
        engine = FakeEngine()
        batcher = open_batcher(engine, **given)
        with Held(engine):
            ear = submit(batcher, request(images=5))
            until(lambda at=batcher, rows=rows: at.running() == rows)  # type: ignore[misc]
        ear.done()


def test_a_preview_comes_when_it_is_asked_for(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine)
    with Held(engine):
        ear = submit(batcher, request(num_inference_steps=8), "watched")
        assert batcher.preview("watched") and batcher.preview("watched")
        assert not batcher.preview("nobody")
    ear.done()
    previews = [event for event in ear.events if isinstance(event, Preview)]
    assert [preview.index for preview in previews] == [0]


def test_a_preview_is_the_estimate_of_the_clean_latents(open_batcher: Open) -> None:
    """After the third of four steps: from the pipeline's own latents there, and what the network says."""
    asked = request(scheduler="euler", guidance_scale=1.0)
    before: list[torch.Tensor] = []
    pipe = Pipeline(FakeEngine())
    pipe.generate(asked, callback=lambda _, k, t, told: before.append(told["latents"].clone()))
    row = pipe.prepare(asked).rows[0]
    ear = submit(open_batcher(FakeEngine()), asked, previews=3)
    ear.done()
    shown = [pixels(event.png) for event in ear.events if isinstance(event, Preview)]
    assert len(shown) == 3  # after steps 1, 2 and 3
    x, sample = before[1], before[1] * row.schedule.input_scale[2]
    m = sample * 0.5 + row.positive.context[0, 0] / 100 + row.positive.time_shift[2, 0]
    sigma = np.sqrt(1 / row.schedule.input_scale[2] ** 2 - 1)
    due = (pipe.decode(x - sigma * m)[0].permute(1, 2, 0) * 255).round()
    assert np.abs(shown[2] - due.numpy()).max() <= 1


def test_positions_in_the_queue_are_told(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=1)
    with Held(engine):
        submit(batcher, request())
        until(lambda: batcher.running() == 1)
        ears = [submit(batcher, request(seed=i)) for i in range(3)]
        assert [ear.events for ear in ears] == [
            [Queued(place)] for place in range(3)
        ]  # at once, though it hangs
        assert batcher.waiting() == 3
    for place, ear in enumerate(ears):
        ear.done()
        told = [event.position for event in ear.events if isinstance(event, Queued)]
        assert told == list(range(place, -1, -1))


def test_a_full_queue_refuses_and_what_was_accepted_is_drawn(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=1, max_queue=2)
    with Held(engine):
        ears = [submit(batcher, request())]
        until(lambda: batcher.running() == 1)
        ears += [submit(batcher, request(seed=i)) for i in range(2)]
        with pytest.raises(QueueFull) as full:
            submit(batcher, request())
        assert full.value.retry_after >= 1
    for ear in ears:
        ear.done()
    submit(batcher, request()).done()


def test_what_cannot_be_drawn_is_refused_at_once(open_batcher: Open) -> None:
    batcher = open_batcher(FakeEngine())
    with pytest.raises(RequestError, match="size 24x16"):
        submit(batcher, request(width=24))
    with pytest.raises(RequestError, match="unknown scheduler"):
        submit(batcher, request(scheduler="none such"))
    assert submit(batcher, request(clip_skip=9)).failed() == "request"
    submit(batcher, request()).done()


def test_two_jobs_of_one_id_are_refused_while_the_first_is_under_way(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine)
    with Held(engine):
        first = submit(batcher, request(), "same")
        with pytest.raises(ValueError, match="same"):
            submit(batcher, request(), "same")
    first.done()
    until(lambda: not batcher.cancel("same"))
    submit(batcher, request(), "same").done()


def test_cancelling_frees_the_rows_at_the_next_step(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=2)
    with Held(engine):
        running = submit(batcher, request(images=2, num_inference_steps=500), "running")
        until(lambda: batcher.running() == 2)
        queued = submit(batcher, request(), "queued")
        after = submit(batcher, request("c"), "after")
        assert batcher.cancel("running")
        assert batcher.cancel("queued")
        assert not batcher.cancel("nobody")
    assert running.failed() == queued.failed() == "cancelled"
    assert_drawn(after.done(), request("c"), Pipeline(FakeEngine()))
    assert len(engine.calls["unet"]) <= 1 + 4
    until(lambda: not batcher.cancel("running"))


def test_sizes_take_turns(open_batcher: Open) -> None:
    sizes = [(Span.exactly(16), Span.exactly(side)) for side in (16, 24, 32)]
    engine = FakeEngine(sizes=sizes)
    batcher, order = open_batcher(engine), list[int]()

    def noting(side: int) -> Callable[[Event], None]:
        return lambda event: order.append(side) if isinstance(event, Step) else None

    with Held(engine):
        for side in (16, 24, 32):
            batcher.submit(Job(f"{side}", "fake", request(width=side, num_inference_steps=8)), noting(side))
    until(lambda: len(order) == 3 * 8)
    turns = order[3:-3]
    assert all(len({*turns[i : i + 3]}) == 3 for i in range(len(turns) - 2))


def test_a_deadline_that_passes_in_the_queue_costs_no_device_time(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=1)
    with Held(engine):
        first = submit(batcher, request(), deadline=time.monotonic() + PATIENCE)
        until(lambda: len(engine.calls["unet"]) == 1)
        late = submit(batcher, request("late"), deadline=time.monotonic() - 1)
    first.done()
    assert late.failed() == "timeout"
    assert len(engine.calls["text_encoder"]) == 2  # the first job's prompt and its negative one


def test_a_job_whose_latents_are_no_numbers_fails_alone(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher, good = open_batcher(engine), request(seed=2, guidance_scale=1.0)
    with Held(engine):
        blocker = submit(batcher, request(num_inference_steps=1))
        until(lambda: batcher.running() == 1)
        bad = submit(batcher, request(guidance_scale=1.0))
        beside = submit(batcher, good)
        engine.failpoints["unet"] = Failpoint("nan", after=2, rows=[0])
    blocker.done()
    assert bad.failed() == "numerical"
    assert "latents" in bad.events[-1].message  # type: ignore[union-attr]
    assert not engine.failpoints.get("vae_decoder") and len(engine.calls["vae_decoder"]) <= 2
    assert_drawn(beside.done(), good, Pipeline(FakeEngine()))
    engine.failpoints["vae_decoder"] = Failpoint("nan", after=len(engine.calls["vae_decoder"]))
    engine.failpoints.pop("unet")
    assert submit(batcher, good).failed() == "numerical"
    engine.failpoints.clear()
    assert_drawn(submit(batcher, good).done(), good, Pipeline(FakeEngine()))
    assert batcher.healthy


@pytest.mark.parametrize("module", ["text_encoder", "unet", "vae_decoder"])
def test_a_job_without_memory_fails_alone(open_batcher: Open, module: str) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine)
    engine.failpoints[module] = Failpoint("memory", after=len(engine.calls[module]))
    assert submit(batcher, request("none")).failed() == "memory"
    engine.failpoints.clear()
    assert_drawn(submit(batcher, request("some")).done(), request("some"), Pipeline(FakeEngine()))
    assert batcher.healthy


@pytest.mark.parametrize("where", ["joining", "stepping"])
def test_the_job_that_came_last_makes_room_and_the_others_go_on(open_batcher: Open, where: str) -> None:
    """There is memory for a call of two rows: for one picture with guidance."""
    engine = FakeEngine()
    bind, batcher = engine.bind, open_batcher(engine, max_rows=3)
    first, third = request(num_inference_steps=20, scheduler="euler_a"), request("c", seed=3)

    def small(name: str, inputs: Any, *given: Any) -> Any:
        if len(inputs["sample"]) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return bind(name, inputs, *given)

    with Held(engine):
        stays = submit(batcher, first)
        until(lambda: len(engine.calls["unet"]) == 1)
        goes = submit(batcher, request("b", seed=2, images=9))
        if where == "joining":
            engine.bind = small  # type: ignore[method-assign,assignment]
        else:
            engine.failpoints["unet"] = Failpoint("memory", over=2)
    assert goes.failed() == "memory"
    assert_drawn(stays.done(), first, Pipeline(FakeEngine()))
    assert_drawn(submit(batcher, third).done(), third, Pipeline(FakeEngine()))
    assert batcher.healthy


def test_a_failing_engine_fails_what_is_under_way_and_not_what_waits(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher, later = open_batcher(engine, max_rows=2), request("c")
    with Held(engine):
        under_way = [submit(batcher, request(seed=i)) for i in range(2)]
        until(lambda: len(engine.calls["unet"]) == 1)
        waits = submit(batcher, later)
        engine.failpoints["unet"] = Failpoint("raise", calls=1)
    assert [ear.failed() for ear in under_way] == ["engine", "engine"]
    assert_drawn(waits.done(), later, Pipeline(FakeEngine()))
    assert batcher.healthy


@pytest.mark.parametrize("module", ["text_encoder", "vae_decoder"])
def test_any_module_that_fails_is_the_engine_failing(open_batcher: Open, module: str) -> None:
    batcher = open_batcher(FakeEngine(failpoints={module: Failpoint("raise", calls=1)}))
    assert submit(batcher, request()).failed() == "engine"
    assert_drawn(submit(batcher, request()).done(), request(), Pipeline(FakeEngine()))


def test_an_engine_that_fails_again_and_again_is_not_healthy(open_batcher: Open) -> None:
    batcher = open_batcher(FakeEngine(failpoints={"unet": Failpoint("raise")}))
    for _ in range(FAILURES):
        assert batcher.healthy
        assert submit(batcher, request()).failed() == "engine"
    until(lambda: not batcher.healthy)
    with pytest.raises(BackendError, match="failed too often"):
        submit(batcher, request())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_leaves_nobody_waiting(open_batcher: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=1)

    def forget_to_import(*_: object) -> None:
        raise NameError("a bug")

    monkeypatch.setattr(batcher.pipeline, "decode", forget_to_import)
    with Held(engine):
        ears = [submit(batcher, request(seed=i)) for i in range(3)]
    assert [ear.failed() for ear in ears] == ["engine"] * 3
    until(lambda: not batcher.healthy)
    with pytest.raises(BackendError):
        submit(batcher, request())


@pytest.mark.parametrize("seed", [None, 3])
def test_pictures_that_share_a_motion_share_it_at_different_steps(
    open_batcher: Open, seed: int | None
) -> None:
    """With a seed of its own the scheduler draws one Brownian motion for all pictures of a job."""
    pytest.importorskip("torchsde")
    engine, stock = FakeEngine(), FakeEngine()
    for one in (engine, stock):
        one.scheduler_config["noise_sampler_seed"] = seed
    asked = request(images=4, scheduler="dpmpp_sde_karras", num_inference_steps=5)
    batcher = open_batcher(engine, max_rows=3)
    beside = submit(batcher, request("b", num_inference_steps=2))
    assert_drawn(submit(batcher, asked).done(), asked, Pipeline(stock), off=1)
    beside.done()


def test_closing_finishes_what_is_there(open_batcher: Open) -> None:
    engine = FakeEngine()
    batcher = open_batcher(engine, max_rows=1)
    ears = [submit(batcher, request(seed=i)) for i in range(4)]
    assert batcher.close(timeout=PATIENCE)
    for ear in ears:
        ear.done()
    with pytest.raises(BackendError, match="closed"):
        submit(batcher, request())


def test_a_large_job_does_not_hold_up_the_steps_of_others_for_more_than_a_decode(open_batcher: Open) -> None:
    """Eight rows end at once; between two of their decodes the row that goes on has a step."""
    engine = FakeEngine(batches=[Span(low=1, high=16)])
    batcher, order = open_batcher(engine, max_rows=8), list[str]()

    class Noting(list[int]):
        def __init__(self, name: str) -> None:
            super().__init__()
            self._name = name

        def append(self, value: int) -> None:
            order.append(self._name)
            super().append(value)

    with Held(engine):
        engine.calls["unet"], engine.calls["vae_decoder"] = Noting("step"), Noting("decode")
        ears = [submit(batcher, request(images=7)), submit(batcher, request(num_inference_steps=40))]
    for ear in ears:
        ear.done()
    assert "decode,decode" not in ",".join(order)
