"""OpenAI's own client against the API."""

import asyncio
import base64
import json
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from sdfast import infotext
from sdfast.server.jobs import Failed
from sdfast.server.openai import answers
from tests.server.conftest import client_of, problem
from tests.server.studio import FakeStudio, engine

pytestmark = pytest.mark.anyio
CALL: dict[str, Any] = {"prompt": "a boat", "model": "tiny"}


def opened(b64: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(b64)))


async def test_a_picture_comes_with_its_seed_and_parameters(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    answer = await sdk.images.generate(**CALL, extra_body={"seed": 7})
    [picture] = answer.data
    image = opened(picture.b64_json)
    assert image.size == (64, 64) and image.getpixel((0, 0)) == (7, 0, 99)
    assert infotext.parse(image.info["parameters"]).seed == picture.seed == 7
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (2, 0, 2)
    assert answer.usage.input_tokens_details.text_tokens == 2 and answer.created > 0
    assert picture.warnings == []
    assert studio.cancelled == []


async def test_plain_fields_reach_the_engine(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    extra = {
        "negative_prompt": "blurry",
        "seed": 2**40,
        "num_inference_steps": 9,
        "guidance_scale": 3,
        "guidance_rescale": 0.5,
        "guidance_start": 0.25,
        "guidance_end": 0.75,
        "cache_interval": 1,
        "pag_scale": 0,
        "pag_adaptive_scale": 0,
        "scheduler": "Euler a",
        "eta": 0.25,
        "clip_skip": 1,
        "long_prompts": "chunk",
        "emphasis": "no_norm",
        "prompt_editing": True,
    }
    await sdk.images.generate(**CALL, size="96x64", n=2, user="someone", extra_body=extra)
    [job] = studio.jobs
    request = job.request
    assert (request.width, request.height, request.images) == (96, 64, 2)
    assert (request.prompts, request.negative_prompts) == (("a boat",), ("blurry",))
    told = {name: getattr(request, name) for name in extra if name != "negative_prompt"}
    assert told == {name: value for name, value in extra.items() if name != "negative_prompt"}


async def test_variations_have_one_seed_and_their_own_variation_seeds(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    extra = {"seed": 7, "variation_seed": 40, "variation_strength": 0.3, "seed_resize_from": "96x48"}
    answer = await sdk.images.generate(**CALL, n=2, extra_body=extra)
    assert [(picture.seed, picture.variation_seed) for picture in answer.data] == [(7, 40), (7, 41)]
    request = studio.jobs[0].request
    assert (request.variation_strength, request.seed_resize_from) == (0.3, (48, 96))
    plain = await sdk.images.generate(**CALL)
    assert "variation_seed" not in plain.data[0].model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("variation_seed", 3, "give that too"),
        ("variation_strength", 2, "less than or equal to 1"),
        ("seed_resize_from", "big", "WIDTHxHEIGHT"),
        ("seed_resize_from", "64x60", "multiple of 8"),
    ],
)
async def test_variations_that_make_no_sense_are_refused(
    post: Any, studio: FakeStudio, field: str, value: Any, advice: str
) -> None:
    assert advice in problem(await post({"prompt": "a", field: value}), 422, field)["message"]
    assert studio.jobs == []


async def test_perturbed_attention_guidance_is_asked_for(post: Any, studio: FakeStudio) -> None:
    answer = await post({"prompt": "a", "pag_scale": 3, "pag_adaptive_scale": 0.001})
    assert answer.status_code == 200
    request = studio.jobs[0].request
    assert (request.pag_scale, request.pag_adaptive_scale) == (3.0, 0.001)
    problem(await post({"prompt": "a", "pag_scale": -1}), 422, "pag_scale")
    alone = await post({"prompt": "a", "pag_adaptive_scale": 0.001})
    assert "give that too" in problem(alone, 422, "pag_adaptive_scale")["message"]


async def test_step_caching_is_asked_for_and_not_together_with_a_late_guidance(
    post: Any, studio: FakeStudio
) -> None:
    answer = await post({"prompt": "a", "cache_interval": 3})
    assert answer.status_code == 200
    assert studio.jobs[0].request.cache_interval == 3
    problem(await post({"prompt": "a", "cache_interval": 0}), 422, "cache_interval")
    both = await post({"prompt": "a", "cache_interval": 2, "guidance_start": 0.5})
    assert "leave one of the two out" in problem(both, 422, "cache_interval")["message"]


async def test_what_is_not_said_is_as_sdfast_generate_has_it(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    await sdk.images.generate(prompt="")
    request = studio.jobs[0].request
    assert (request.num_inference_steps, request.guidance_scale) == (20, 7.0)
    assert request.scheduler == "dpmpp_2m_karras"
    assert studio.jobs[0].deadline is not None


async def test_several_pictures_have_seeds_that_make_each_again(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.images.generate(**CALL, n=3)
    seeds = [picture.seed for picture in answer.data]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    again = await sdk.images.generate(**CALL, extra_body={"seed": seeds[2]})
    assert again.data[0].b64_json == answer.data[2].b64_json


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
async def test_other_formats_keep_the_parameters(sdk: openai.AsyncOpenAI, output_format: Any) -> None:
    answer = await sdk.images.generate(**CALL, output_format=output_format, output_compression=50)
    image = opened(answer.data[0].b64_json)
    assert image.format == output_format.upper()
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert infotext.parse(comment[8:].decode("utf-16-be")).prompt == "a boat"
    assert answer.data[0].warnings == []


async def test_parameters_that_a_jpeg_has_no_room_for_are_told(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.images.generate(prompt="é" * 32_760, output_format="jpeg")
    assert opened(answer.data[0].b64_json).format == "JPEG"
    assert "no room for the parameters" in answer.data[0].warnings[0]


async def test_a_truncated_prompt_is_told(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.truncated = "and a gull"
    answer = await sdk.images.generate(**CALL)
    assert "77 tokens; left out: 'and a gull'" in answer.data[0].warnings[0]


async def test_a_stream_is_partial_pictures_then_the_finished_ones(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.images.generate(**CALL, stream=True, partial_images=2, n=2, extra_body={"seed": 5})
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        *["image_generation.completed"] * 2,
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [event.seed for event in events[2:]] == [5, 6]
    for event in events:
        assert opened(event.b64_json).size == (64, 64)
        assert (event.size, event.output_format, event.quality) == ("64x64", "png", "auto")
        assert event.background == "opaque" and event.created_at > 0
    assert events[-1].usage.total_tokens == 2


async def test_a_stream_tells_its_progress_when_asked(sdk: openai.AsyncOpenAI, post: Any) -> None:
    asked = {"progress": True}
    stream = await sdk.images.generate(**CALL, stream=True, partial_images=2, extra_body=asked)
    told = [event for event in [event async for event in stream] if event.type.endswith("progress")]
    assert {event.type for event in told} == {"image_generation.progress"}
    assert [(event.position, event.step, event.steps) for event in told] == [
        (0, 0, 0),
        (None, 1, 2),
        (None, 2, 2),
    ]
    assert told[0].to_dict().keys() == {"type", "created_at", "position", "step", "steps"}
    assert "progress" not in (await post({"prompt": "a", "stream": True, "progress": False})).text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stream_that_waits_is_kept_alive(
    sdk: openai.AsyncOpenAI, post: Any, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_SECONDS", 0.02)
    studio.seconds = 0.1
    text = (await post({"prompt": "a", "stream": stream})).text
    assert (text.count(": waiting\n\n") >= 2) == stream
    if stream:
        events = [event.type async for event in await sdk.images.generate(**CALL, stream=True)]
        assert events == ["image_generation.completed"]


async def test_a_stream_is_server_sent_events_that_end_with_done(post: Any) -> None:
    answer = await post({"prompt": "a", "stream": True, "partial_images": 1})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    blocks = answer.text.split("\n\n")
    assert [block.partition("\n")[0] for block in blocks] == [
        "event: image_generation.partial_image",
        "event: image_generation.completed",
        "data: [DONE]",
        "",
    ]


async def test_a_stream_that_fails_raises_in_the_client(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.failure = Failed("numerical", "the latents are no numbers; try another seed")
    stream = await sdk.images.generate(**CALL, stream=True, partial_images=1)
    with pytest.raises(openai.APIError, match="no numbers") as caught:
        _ = [event async for event in stream]
    error = caught.value
    assert (error.code, error.type, error.param) == ("numerical_error", "server_error", None)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("request", 422, "invalid_value"),
        ("numerical", 500, "numerical_error"),
        ("memory", 503, "out_of_memory"),
        ("timeout", 504, "timeout"),
        ("engine", 503, "engine_error"),
        ("cancelled", 499, "cancelled"),
    ],
)
async def test_a_job_that_fails_has_a_status_of_its_kind(
    sdk: openai.AsyncOpenAI, studio: FakeStudio, kind: Any, status: int, code: str
) -> None:
    studio.failure = Failed(kind, "eta: is for other schedulers")
    with pytest.raises(openai.APIStatusError) as caught:
        await sdk.images.generate(**CALL)
    error = caught.value
    assert (error.status_code, error.code) == (status, code)
    assert error.type == ("server_error" if status >= 500 else "invalid_request_error")
    assert error.param == ("eta" if kind == "request" else None)
    metrics = (await sdk._client.get("/metrics")).text
    assert f'sdfast_failures_total{{kind="{kind}"}} 1.0' in metrics


@pytest.mark.parametrize(
    ("kind", "status", "code"), [("request", 422, "invalid_value"), ("engine", 503, "engine_error")]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_has_a_status_in_a_stream_too(
    sdk: openai.AsyncOpenAI, studio: FakeStudio, stream: bool, kind: Any, status: int, code: str
) -> None:
    studio.refusal = Failed(kind, "num_inference_steps: 60 are more than this scheduler has")
    with pytest.raises(openai.APIStatusError, match="60 are more") as caught:
        await sdk.images.generate(**CALL, stream=stream)
    error = caught.value
    assert (error.status_code, error.code) == (status, code)
    assert error.response.headers["content-type"] == "application/json"
    assert error.param == ("num_inference_steps" if kind == "request" else None)
    metrics = (await sdk._client.get("/metrics")).text
    assert f'sdfast_failures_total{{kind="{kind}"}} 1.0' in metrics


async def test_an_engine_that_ends_without_a_word_is_an_error(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    studio.silent = True
    with pytest.raises(openai.InternalServerError, match="without a result") as caught:
        await sdk.images.generate(**CALL)
    assert caught.value.code == "engine_error"
    stream = await sdk.images.generate(**CALL, stream=True)
    with pytest.raises(openai.APIError, match="without a result"):
        _ = [event async for event in stream]


async def test_a_bug_is_a_500_that_tells_only_its_id(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.bug = True
    with pytest.raises(openai.InternalServerError) as caught:
        await sdk.images.generate(**CALL, extra_headers={"x-request-id": "mine"})
    assert (caught.value.code, caught.value.request_id) == ("internal_error", "mine")
    assert "studio" not in caught.value.response.text
    assert len(studio.cancelled) == 1


async def test_a_bug_within_a_stream_is_its_last_event(post: Any, studio: FakeStudio) -> None:
    studio.bug = True
    answer = await post({"prompt": "a", "stream": True})
    name, _, data = answer.text.rstrip().partition("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert len(studio.cancelled) == 1


async def test_a_wrong_key_is_told_as_such(http: httpx.AsyncClient) -> None:
    http.headers.pop("authorization")
    with pytest.raises(openai.AuthenticationError) as caught:
        await client_of(http, "wrong").images.generate(**CALL)
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")


async def test_a_full_queue_says_when_to_come_again(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.full = True
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            await sdk.images.generate(**CALL, stream=stream)
        assert caught.value.response.headers["retry-after"] == "3"
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
    assert studio.jobs == []


async def test_an_engine_that_failed_for_good_is_unavailable(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    studio.down = True
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="takes no more jobs") as caught:
            await sdk.images.generate(**CALL, stream=stream)
        assert caught.value.status_code == 503
    assert studio.jobs == []


async def test_an_unknown_model_is_not_found(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there are: tiny") as caught:
        await sdk.images.generate(prompt="a", model="dall-e-3")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_with_several_engines_the_model_must_be_said(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    studio.engines["other"] = engine("other")
    with pytest.raises(openai.UnprocessableEntityError, match="there are: tiny, other"):
        await sdk.images.generate(prompt="a")
    await sdk.images.generate(prompt="a", model="other")
    assert studio.jobs[0].engine == "other"
    assert [model.id async for model in sdk.models.list()] == ["tiny", "other"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_job(
    sdk: openai.AsyncOpenAI, studio: FakeStudio, stream: bool
) -> None:
    studio.hang = True
    call = asyncio.create_task(sdk.images.generate(**CALL, stream=stream))
    while not studio.live:
        await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert studio.cancelled == [studio.jobs[0].id]
    assert studio.live == {}


async def test_the_loop_is_free_while_pictures_are_encoded(
    http: httpx.AsyncClient, sdk: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    def slow(png: bytes, format: str, quality: int) -> tuple[bytes, bool]:
        time.sleep(0.5)
        return png, True

    monkeypatch.setattr(answers, "encode", slow)
    call = asyncio.create_task(sdk.images.generate(**CALL))
    await asyncio.sleep(0.1)
    begun = time.perf_counter()
    assert (await http.get("/health/live")).status_code == 200
    assert time.perf_counter() - begun < 0.3
    assert not call.done()
    await call


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def controlled(studio: FakeStudio) -> FakeStudio:
    """Its engine has a ControlNet."""
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]",))
    return studio


def coded(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def test_a_control_image_reaches_the_engine(sdk: openai.AsyncOpenAI, controlled: FakeStudio) -> None:
    await sdk.images.generate(**CALL, extra_body={"control_image": coded(NOISE)})
    more = {
        "control_image": f"data:image/png;base64,{coded(NOISE)}",
        "controlnet_conditioning_scale": 0,
        "control_guidance_start": 0.25,
        "control_guidance_end": 0.5,
        "control_mode": "prompt",
    }
    await sdk.images.generate(**CALL, size="96x64", extra_body=more)
    plain, asked = controlled.jobs
    assert (plain.control, plain.image, plain.mask) == (NOISE.tobytes(), None, None)
    assert plain.request.controlnet_conditioning_scale == 1.0
    assert asked.control == NOISE.resize((96, 64), Image.Resampling.LANCZOS).tobytes()
    told = {name: getattr(asked.request, name) for name in more if name != "control_image"}
    assert told == {name: value for name, value in more.items() if name != "control_image"}
    models = (await sdk.models.list()).data
    [told_of] = [model.to_dict() for model in models]
    assert (told_of["controlled"], told_of["step_cache"], told_of["pag"]) == (True, False, False)
    assert told_of["controlnets"] == ["canny [01234567]"]


async def test_each_of_several_controlnets_has_an_image(
    sdk: openai.AsyncOpenAI, studio: FakeStudio, post: Any
) -> None:
    """Or null: then it adds nothing."""
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]", "pose [89abcdef]"))
    flat = Image.new("RGB", (64, 64), "blue")
    both = {"control_image": [coded(NOISE), coded(flat)], "control_guidance_end": [0.5, 1]}
    both["control_mode"] = ["control", "guess"]
    await sdk.images.generate(**CALL, extra_body=both)
    await sdk.images.generate(**CALL, extra_body=both | {"controlnet_conditioning_scale": [0.5, 2]})
    one = {"control_image": [None, coded(flat)], "controlnet_conditioning_scale": 0.75}
    await sdk.images.generate(**CALL, extra_body=one)
    first, second, third = studio.jobs
    assert first.control == second.control == NOISE.tobytes() + flat.tobytes()
    assert third.control == bytes(len(flat.tobytes())) + flat.tobytes()
    scales = [job.request.controlnet_conditioning_scale for job in studio.jobs]
    assert scales == [1.0, (0.5, 2.0), (0.0, 0.75)]
    assert first.request.control_guidance_end == (0.5, 1.0)
    assert (first.request.control_mode, third.request.control_mode) == (("control", "guess"), None)
    answer = await post({"prompt": "a", **both, "control_mode": ["control", "strong"]})
    assert "must be 'balanced', 'prompt'" in problem(answer, 422, "control_mode.1")["message"]
    for wrong, told in (
        (coded(NOISE), "1 were sent, but tiny has 2 ControlNets, and needs an image for each: canny"),
        ([coded(NOISE)] * 3, "3 were sent, but tiny has 2 ControlNets"),
        ([None, None], "is missing; tiny has a ControlNet"),
        ([coded(NOISE), "R0lGODlh"], "no PNG, JPEG or WebP"),
        ([], "is missing"),
    ):
        answer = await post({"prompt": "a", "control_image": wrong})
        assert told in problem(answer, 422, "control_image")["message"]
    scale = {"controlnet_conditioning_scale": [1, "1"]}
    answer = await post({"prompt": "a", "control_image": both["control_image"], **scale})
    message = problem(answer, 422, "controlnet_conditioning_scale.1")["message"]
    assert message == "controlnet_conditioning_scale.1: must be a valid number (got '1')"
    assert len(studio.jobs) == 3


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({}, "control_image", "is missing; tiny has a ControlNet"),
        ({"control_image": "https://example.org/a.png"}, "control_image", "the server fetches nothing"),
        ({"control_image": "file:///etc/passwd"}, "control_image", "the server fetches nothing"),
        ({"control_image": "R0lGODlh"}, "control_image", "no PNG, JPEG or WebP"),
        ({"control_image": coded(NOISE)[:999]}, "control_image", "must be a picture as base64"),
        ({"control_image": "\ud800"}, "control_image", "must be a picture as base64"),
        ({"control_image": 7}, "control_image", "must be a valid string"),
        ({"control_image": "R0lGODlh", "size": "8192x8192"}, "size", "8192x8192 is not one of this engine's"),
        (
            {"controlnet_conditioning_scale": -1},
            "controlnet_conditioning_scale",
            "greater than or equal to 0",
        ),
        ({"control_guidance_end": 0}, "control_guidance_start", "is not below control_guidance_end"),
    ],
)
async def test_a_wrong_control_image_is_named(
    post: Any, controlled: FakeStudio, fields: dict[str, Any], param: str, told: str
) -> None:
    given = {"control_image": coded(NOISE)} if fields and "control_image" not in fields else {}
    assert told in problem(await post({"prompt": "a", **given, **fields}), 422, param)["message"]
    assert controlled.jobs == []


async def test_engines_with_a_controlnet_are_named_to_a_control_image(
    post: Any, controlled: FakeStudio
) -> None:
    controlled.engines["plain"] = engine("plain")
    answer = await post({"prompt": "a", "model": "plain", "control_image": "x"})
    error = problem(answer, 422, "control_image")
    assert "plain has no ControlNet" in error["message"] and "here have: tiny" in error["message"]
    answer = await post({"prompt": "a", "model": "plain", "control_guidance_end": 0.5})
    assert "are for a control image" in problem(answer, 422, "control_guidance_start")["message"]


async def test_loras_reach_the_engine_and_are_listed(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(loras=("oil", "ink"))
    scales = {"oil": 0.8, "ink": [1, -0.5]}
    await sdk.images.generate(**CALL, extra_body={"loras": scales})
    assert studio.jobs[0].request.loras == {"oil": 0.8, "ink": (1.0, -0.5)}
    assert [model.to_dict()["loras"] for model in (await sdk.models.list()).data] == [["oil", "ink"]]
    for wrong in ({"oil": [1]}, {"oil": "1"}, {"oil": 200}, ["oil"]):
        with pytest.raises(openai.UnprocessableEntityError, match="loras"):
            await sdk.images.generate(**CALL, extra_body={"loras": wrong})
