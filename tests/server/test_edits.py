"""Drawing over images: OpenAI's own client against `/v1/images/edits`, and forms that are wrong."""

import asyncio
import base64
import gc
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from sdfast.server import form
from sdfast.server.app import create_app
from sdfast.server.jobs import Failed
from sdfast.server.settings import Settings
from tests.server.conftest import KEY, problem
from tests.server.studio import FakeStudio, engine

pytestmark = pytest.mark.anyio
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
WIDE = NOISE.resize((96, 64))


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def half_open(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A mask whose left half is transparent."""
    mask = Image.new("RGBA", size, "white")
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


def opened(b64: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(b64)))


CALL: dict[str, Any] = {"prompt": "a boat", "model": "tiny"}


@pytest.fixture
def send(http: httpx.AsyncClient) -> Callable[..., Any]:
    """Sends a form, with an image unless `files` says otherwise."""

    async def send(files: Any = None, **texts: str) -> httpx.Response:
        sent = {"image": ("a.png", png(NOISE))} if files is None else files
        return await http.post("/v1/images/edits", data={"prompt": "a", **texts}, files=sent)

    return send


async def test_the_pixels_reach_the_engine_and_come_back(
    sdk: openai.AsyncOpenAI, studio: FakeStudio, tmp_path: Path
) -> None:
    path = tmp_path / "noise.png"
    path.write_bytes(png(NOISE))
    answer = await sdk.images.edit(image=path, **CALL, n=2, extra_body={"seed": 7, "strength": 0.5})
    assert [picture.seed for picture in answer.data] == [7, 8]
    assert opened(answer.data[0].b64_json).tobytes() == NOISE.tobytes()
    [job] = studio.jobs
    assert (job.image, job.mask) == (NOISE.tobytes(), None)
    assert (job.request.strength, job.request.seed, job.request.images) == (0.5, 7, 2)
    assert job.deadline is not None


async def test_what_a_mask_leaves_open_is_drawn_anew(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    answer = await sdk.images.edit(
        image=png(NOISE), mask=png(half_open()), **CALL, extra_body={"seed": 7, "negative_prompt": ""}
    )
    picture = np.asarray(opened(answer.data[0].b64_json))
    assert (picture[:, :32] == (7, 0, 99)).all()
    assert (picture[:, 32:] == np.asarray(NOISE)[:, 32:]).all()
    assert studio.jobs[0].request.strength == 1.0
    assert studio.jobs[0].request.negative_prompts == ("",)


async def test_without_a_mask_some_of_the_image_stays(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    await sdk.images.edit(image=[png(NOISE)], **CALL)
    assert studio.jobs[0].request.strength == 0.8


async def test_plain_fields_reach_the_engine(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    extra = {
        "negative_prompt": "blurry",
        "seed": 2**40,
        "num_inference_steps": 9,
        "guidance_scale": 3.5,
        "guidance_rescale": 0.5,
        "scheduler": "Euler a",
        "eta": 0.25,
        "clip_skip": 1,
        "strength": 1,
    }
    await sdk.images.edit(
        image=png(NOISE), **CALL, n=2, user="someone", quality="auto", input_fidelity="low", extra_body=extra
    )
    request = studio.jobs[0].request
    assert (request.prompts, request.negative_prompts, request.images) == (("a boat",), ("blurry",), 2)
    told = {name: getattr(request, name) for name in extra if name != "negative_prompt"}
    assert told == {name: value for name, value in extra.items() if name != "negative_prompt"}


@pytest.mark.parametrize("format", ["webp", "jpeg"])
async def test_the_answer_has_the_format_that_was_asked_for(sdk: openai.AsyncOpenAI, format: Any) -> None:
    answer = await sdk.images.edit(image=png(NOISE), **CALL, output_format=format, output_compression=50)
    assert opened(answer.data[0].b64_json).format == format.upper()
    assert (answer.size, answer.output_format) == ("64x64", format)


async def test_the_size_is_the_images_own_or_the_one_asked_for(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    await sdk.images.edit(image=png(WIDE), **CALL)
    await sdk.images.edit(image=png(WIDE), mask=png(half_open((96, 64))), **CALL, size="64x64")
    own, asked = studio.jobs
    assert (own.request.width, own.request.height, own.image) == (96, 64, WIDE.tobytes())
    resampled = WIDE.resize((64, 64), Image.Resampling.LANCZOS)
    assert (asked.request.width, asked.image) == (64, resampled.tobytes())
    assert asked.mask == np.repeat([[255] * 32 + [0] * 32], 64, 0).astype(np.uint8).tobytes()


LARGE = NOISE.resize((200, 120))


def hole(alpha: int = 0) -> Image.Image:
    """A mask for it with a transparent part."""
    mask = Image.new("RGBA", LARGE.size, "white")
    mask.paste((0, 0, 0, alpha), (120, 30, 150, 80))
    return mask


async def test_a_part_alone_is_drawn_and_pasted_into_the_image(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    """At the engine's own size, or the one that is asked for; of the size of the image."""
    extra = {"seed": 7, "padding_mask_crop": 5}
    given = {"image": png(LARGE), "mask": png(hole())}
    answer = await sdk.images.edit(**given, **CALL, extra_body=extra)
    await sdk.images.edit(**given, **CALL, size="96x64", extra_body=extra)
    own, asked = studio.jobs
    box = (105, 25, 165, 85)
    assert own.image == LARGE.crop(box).resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    assert (own.request.padding_mask_crop, own.request.strength) == (5, 1.0)
    opening = hole().getchannel("A").point(lambda value: 255 - value)
    opening = opening.crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    assert own.mask == opening.point(lambda value: 255 * (value >= 128)).tobytes()
    assert (asked.request.width, asked.request.height, len(asked.image or b"")) == (96, 64, 96 * 64 * 3)
    assert answer.size == "200x120"
    picture, kept = np.asarray(opened(answer.data[0].b64_json)), np.asarray(hole())[..., 3] == 255
    assert picture.shape == (120, 200, 3)
    assert np.array_equal(picture[kept], np.asarray(LARGE)[kept])
    assert (picture[40:70, 130:140] == (7, 0, 99)).all()
    told = opened(answer.data[0].b64_json).info["parameters"]
    assert "Seed: 7" in told


async def test_partial_pictures_of_a_part_are_whole_too(sdk: openai.AsyncOpenAI) -> None:
    given = {"image": png(LARGE), "mask": png(hole()), **CALL, "extra_body": {"padding_mask_crop": 0}}
    stream = await sdk.images.edit(**given, stream=True, partial_images=1, output_format="webp")
    events = [event async for event in stream]
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert [opened(event.b64_json).size for event in events] == [(200, 120)] * 2
    assert {event.size for event in events} == {"200x120"}


async def test_a_part_is_cut_out_of_control_images(send: Any, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]", "pose [89abcdef]"))
    files = [("image", ("a.png", png(LARGE))), ("mask", ("m.png", png(hole())))]
    files += [("control_image", ("c.png", png(NOISE))), ("control_image", ("none", b""))]
    assert (await send(files, padding_mask_crop="5")).status_code == 200
    large = NOISE.resize(LARGE.size, Image.Resampling.LANCZOS)
    cut = large.crop((105, 25, 165, 85)).resize((64, 64), Image.Resampling.LANCZOS)
    assert studio.jobs[0].control == cut.tobytes() + bytes(64 * 64 * 3)


@pytest.mark.parametrize(
    ("mask", "texts", "param", "told"),
    [
        (None, {"padding_mask_crop": "4"}, "padding_mask_crop", "send a mask"),
        (hole(), {"padding_mask_crop": "-1"}, "padding_mask_crop", "greater than or equal to 0"),
        (hole(), {"padding_mask_crop": "1.5"}, "padding_mask_crop", "valid integer"),
        (hole(), {"padding_mask_crop": "9000"}, "padding_mask_crop", "less than or equal to 8192"),
        (hole(255), {"padding_mask_crop": "4"}, "mask", "nothing of it is transparent"),
        (hole(200), {"padding_mask_crop": "4"}, "mask", "nothing of it is transparent"),
        (hole(), {"padding_mask_crop": "4", "size": "60x64"}, "size", "multiple of 8"),
        (hole(), {"padding_mask_crop": "4", "size": "512x512"}, "size", "is not one of"),
    ],
)
async def test_a_part_that_cannot_be_drawn_is_named(
    send: Any, studio: FakeStudio, mask: Image.Image | None, texts: dict[str, str], param: str, told: str
) -> None:
    files = {"image": ("a.png", png(LARGE)), **({"mask": ("m.png", png(mask))} if mask else {})}
    assert told in problem(await send(files, **texts), 422, param)["message"]
    assert studio.jobs == []


async def test_a_part_that_is_too_long_is_named(send: Any) -> None:
    files = {
        "image": ("a.png", png(NOISE.resize((200, 2)))),
        "mask": ("m.png", png(Image.new("RGBA", (200, 2)))),
    }
    answer = await send(files, padding_mask_crop="0")
    assert "the part around it is 200x2" in problem(answer, 422, "mask")["message"]


async def test_an_engine_that_edits_as_told_draws_no_parts(send: Any, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(instructed=True)
    files = {"image": ("a.png", png(LARGE)), "mask": ("m.png", png(hole()))}
    answer = await send(files, padding_mask_crop="4")
    assert "an image is edited as a whole" in problem(answer, 422, "padding_mask_crop")["message"]


@pytest.mark.parametrize(
    ("width", "told"), [(128, "64x64, 96x64"), (100, "multiple of 8"), (1, "equal to 8")]
)
async def test_an_image_of_another_size_is_not_resampled_unasked(send: Any, width: int, told: str) -> None:
    image = {"image": ("a.png", png(NOISE.resize((width, width))))}
    error = problem(await send(image), 422, "size")
    assert told in error["message"] and "give a size" in error["message"]
    assert "give a size" not in problem(await send(image, size="128x128"), 422, "size")["message"]
    assert (await send(image, size="64x64")).status_code == 200


async def test_a_stream_has_the_events_of_edits(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.images.edit(
        image=png(NOISE), **CALL, stream=True, partial_images=1, extra_body={"progress": True}
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "image_edit.progress",
        "image_edit.progress",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    assert opened(events[-1].b64_json).tobytes() == NOISE.tobytes()
    assert events[-1].usage.output_tokens == 0


async def test_what_goes_wrong_is_told_to_the_client(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await sdk.images.edit(image=b"GIF89a", **CALL)
    assert (caught.value.code, caught.value.param) == ("invalid_image", "image")
    studio.failure = Failed("numerical", "not a number")
    with pytest.raises(openai.InternalServerError) as failed:
        await sdk.images.edit(image=png(NOISE), **CALL)
    assert failed.value.code == "numerical_error"
    with pytest.raises(openai.APIError, match="not a number"):
        _ = [e async for e in await sdk.images.edit(image=png(NOISE), **CALL, stream=True)]


async def test_an_engine_without_an_image_encoder_is_named(
    sdk: openai.AsyncOpenAI, studio: FakeStudio
) -> None:
    studio.engines["plain"] = engine("plain", edits=False)
    with pytest.raises(openai.UnprocessableEntityError, match=r"plain cannot draw over.*here can: tiny") as e:
        await sdk.images.edit(image=png(NOISE), prompt="a", model="plain")
    assert (e.value.code, e.value.param) == ("unsupported_model", "model")
    assert studio.jobs == []


async def test_a_refiner_draws_over_images_alone(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.engines = {"refiner": engine("refiner", refines=True), "base": engine("base")}
    with pytest.raises(openai.UnprocessableEntityError, match=r"SDXL's refiner.*edits.*here are: base") as e:
        await sdk.images.generate(prompt="a", model="refiner")
    assert (e.value.code, e.value.param) == ("unsupported_model", "model")
    assert studio.jobs == []
    await sdk.images.edit(image=png(NOISE), prompt="a", model="refiner")
    assert [job.engine for job in studio.jobs] == ["refiner"]
    models = (await sdk.models.list()).data
    assert [model.to_dict()["refines"] for model in models] == [True, False]


async def test_an_engine_that_edits_as_told(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.engines = {"edits": engine("edits", instructed=True), "base": engine("base")}
    with pytest.raises(openai.UnprocessableEntityError, match=r"edits images as told.*here are: base"):
        await sdk.images.generate(prompt="a", model="edits")
    for extra in ({}, {"image_guidance_scale": 2.5}):
        await sdk.images.edit(image=png(NOISE), prompt="a", model="edits", extra_body=extra)
    asked = [(job.request.image_guidance_scale, job.request.strength) for job in studio.jobs]
    assert asked == [(1.5, None), (2.5, None)]
    with pytest.raises(openai.UnprocessableEntityError, match="image_guidance_scale"):
        await sdk.images.edit(
            image=png(NOISE), prompt="a", model="edits", extra_body={"image_guidance_scale": 0.5}
        )
    assert [model.to_dict()["instructed"] for model in (await sdk.models.list()).data] == [True, False]


async def test_a_client_that_leaves_ends_its_job(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    studio.hang = True
    call = asyncio.create_task(sdk.images.edit(image=png(NOISE), **CALL))
    while not studio.live:
        await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert studio.cancelled == [studio.jobs[0].id]


async def test_not_ready_is_503_before_the_form_is_read(send: Any, studio: FakeStudio) -> None:
    studio.ready = False
    assert problem(await send({"image": ("a.png", b"no picture")}), 503)["code"] == "not_ready"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("n", "1.0"),
        ("n", ""),
        ("strength", ""),
        ("stream", ""),
        ("n", "11"),
        ("n", " 1"),
        ("n", "٣"),
        ("n", "1_0"),
        ("n", "9" * 5_000),
        ("seed", "-1"),
        ("seed", "18446744073709551616"),
        ("seed", "0x10"),
        ("num_inference_steps", "1e9"),
        ("num_inference_steps", "1000000000"),
        ("guidance_scale", "nan"),
        ("guidance_scale", "Infinity"),
        ("guidance_scale", "1e999"),
        ("guidance_scale", "7,5"),
        ("strength", "0"),
        ("strength", "1.01"),
        ("strength", "-0.5"),
        ("strength", "much"),
        ("stream", "yes"),
        ("stream", "True"),
        ("progress", "true"),
        ("size", "0x0"),
        ("size", "8192x8192"),
        ("output_format", "gif"),
        ("input_fidelity", "high"),
        ("quality", "hd"),
        ("prompt", "a\0b"),
        ("negative_prompt", "a" * 32_769),
        ("scheduler", "Euler z"),
        ("svg", "a"),
        ("svg[model]", "a"),
        ("steps", "20"),
        ("image[]", "https://example.org/a.png"),
        ("mask", "http://169.254.169.254/"),
        ("image_url", "file:///etc/passwd"),
    ],
)
async def test_a_wrong_field_is_named(send: Any, studio: FakeStudio, field: str, text: str) -> None:
    assert field in problem(await send(**{field: text}), 422, field)["message"]
    assert studio.jobs == []


async def test_none_is_nothing_asked(sdk: openai.AsyncOpenAI, studio: FakeStudio) -> None:
    nothing = {"seed": None, "num_inference_steps": None, "strength": None, "negative_prompt": None}
    await sdk.images.edit(
        image=png(NOISE), **CALL, n=None, size=None, quality=None, stream=None, extra_body=nothing
    )
    request = studio.jobs[0].request
    assert (request.num_inference_steps, request.strength) == (20, 0.8)
    assert request.negative_prompts == (None,)


async def test_loras_are_an_object_as_json(send: Any, studio: FakeStudio) -> None:
    files = {"image": ("a.png", png(WIDE))}
    assert (await send(files, loras='{"oil": 0.8, "ink": [1, -0.5]}')).status_code == 200
    assert studio.jobs[0].request.loras == {"oil": 0.8, "ink": (1.0, -0.5)}
    assert (await send(files, **{"loras[oil]": "-0.5", "loras[v1.2 ink]": "1"})).status_code == 200
    assert studio.jobs[1].request.loras == {"oil": -0.5, "v1.2 ink": 1.0}
    problem(await send(files, **{"loras[oil]": "x"}), 422, "loras")
    for text in ("oil", "[1]", '{"oil": 1', '{"oil": "1"}'):
        assert problem(await send(files, loras=text), 422, "loras")["message"]


async def test_a_control_image_goes_beside_the_image_and_its_mask(send: Any, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]",))
    files = {"image": ("a.png", png(WIDE)), "control_image": ("c.png", png(NOISE))}
    scales = {"controlnet_conditioning_scale": "0.5", "control_guidance_end": "0.75"}
    assert (await send(files, **scales)).status_code == 200
    mask = {"mask": ("m.png", png(half_open((96, 64))))}
    assert (await send(files | mask, size="64x64")).status_code == 200
    own, asked = studio.jobs
    assert (own.image, own.mask) == (WIDE.tobytes(), None)
    assert own.control == NOISE.resize((96, 64), Image.Resampling.LANCZOS).tobytes()
    request = own.request
    assert (request.controlnet_conditioning_scale, request.control_guidance_end) == (0.5, 0.75)
    assert asked.mask is not None and asked.control == NOISE.tobytes()
    assert (asked.request.controlnet_conditioning_scale, asked.request.strength) == (1.0, 1.0)


async def test_control_images_of_several_controlnets_are_sent_in_their_order(
    send: Any, studio: FakeStudio
) -> None:
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]", "pose [89abcdef]"))
    flat = Image.new("RGB", (64, 64), "blue")
    image, noise, blue = (("a.png", png(one)) for one in (NOISE, NOISE, flat))
    files = [("image", image), ("control_image", noise), ("control_image", blue)]
    texts = {"controlnet_conditioning_scale": "[0.5, 2]", "control_guidance_end": "[0.5,1.0]"}
    texts["control_mode"] = '["prompt", "balanced"]'
    assert (await send(files, **texts)).status_code == 200
    off = [("image", image), ("control_image[]", noise), ("control_image[]", ("none", b""))]
    assert (await send(off)).status_code == 200
    own, asked = studio.jobs
    assert own.control == NOISE.tobytes() + flat.tobytes()
    assert own.request.controlnet_conditioning_scale == (0.5, 2.0)
    assert own.request.control_guidance_end == (0.5, 1.0)
    assert own.request.control_mode == ("prompt", "balanced")
    assert asked.control == NOISE.tobytes() + bytes(len(flat.tobytes()))
    assert asked.request.controlnet_conditioning_scale == (1.0, 0.0)
    one = problem(await send(files[:2]), 422, "control_image")["message"]
    assert "1 were sent, but tiny has 2 ControlNets" in one
    for text in ("[0.5", "[0.5,]", "[]", "[[1]]", "[nan]"):
        answer = await send(files, controlnet_conditioning_scale=text)
        assert "must be a valid number" in problem(answer, 422, "controlnet_conditioning_scale")["message"]
    for text in ("prompt,balanced", '["prompt", "balanced"', "[prompt]", "strong"):
        answer = await send(files, control_mode=text)
        assert "must be 'balanced', 'prompt'" in problem(answer, 422, "control_mode")["message"]
    assert len(studio.jobs) == 2


CONTROLLED = {"image": ("a.png", png(NOISE)), "control_image": ("c.png", png(NOISE))}


@pytest.mark.parametrize(
    ("files", "texts", "controlnet", "told"),
    [
        (None, {}, "canny", "is missing; tiny has a ControlNet"),
        (CONTROLLED, {}, None, "tiny has no ControlNet"),
        (None, {"control_image": "http://169.254.169.254/"}, "canny", "fetches nothing"),
        ([*CONTROLLED.items(), ("control_image", ("d.png", b""))], {}, "canny", "2 were sent"),
        ({**CONTROLLED, "control_image": ("c.png", b"GIF89a")}, {}, "canny", "no PNG, JPEG or WebP"),
    ],
)
async def test_a_wrong_control_image_is_named(
    send: Any, studio: FakeStudio, files: Any, texts: dict[str, str], controlnet: str | None, told: str
) -> None:
    studio.engines["tiny"] = engine(controlnets=(controlnet,) if controlnet else ())
    assert told in problem(await send(files, **texts), 422, "control_image")["message"]
    assert studio.jobs == []


@pytest.mark.parametrize(
    ("files", "param", "told"),
    [
        ({"n": (None, "1")}, "image", "missing"),
        ([("image[]", ("a.png", png(NOISE)))] * 2, "image", "2 were sent"),
        ([("image", ("a.png", png(NOISE))), ("image[]", ("a.png", png(NOISE)))], "image", "2 were sent"),
        ([("image", ("a.png", png(NOISE)))] + [("mask", ("m", png(half_open())))] * 2, "mask", "2 were"),
        ({"image": ("a.png", png(NOISE)), "markup": ("b.png", png(NOISE))}, "markup", "image, mask"),
        ({"image": ("a.png", png(NOISE)), "n": ("n", b"1")}, "n", "image, mask"),
        ({"image": ("a.png", png(NOISE)), "mask": ("m", png(half_open((96, 64))))}, "mask", "96x64, but"),
        ({"image": ("a.png", png(NOISE)), "mask": ("m", png(NOISE))}, "mask", "is transparent"),
        ({"image": ("a.png", png(NOISE)), "mask": ("m", b"GIF89a")}, "mask", "no PNG, JPEG or WebP"),
        ({"image": ("a.png", b"")}, "image", "no PNG, JPEG or WebP"),
        ({"image": ("a.png", png(NOISE)[:500])}, "image", "damaged or cut short"),
        ({"image": (None, "http://169.254.169.254/")}, "image", "fetches nothing"),
    ],
)
async def test_wrong_files_are_named(
    send: Any, studio: FakeStudio, files: Any, param: str, told: str
) -> None:
    assert told in problem(await send(files), 422, param)["message"]
    assert studio.jobs == []


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "", "x" * 300, "CON", "http://a/b.png"])
async def test_names_of_files_mean_nothing(
    http: httpx.AsyncClient, studio: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    content = form_of(
        (b'name="prompt"', b"a"),
        (b'name="image"; filename="' + name.encode() + b'"\r\nContent-Type: text/html', png(NOISE)),
    )
    answer = await http.post("/v1/images/edits", content=content, headers=TYPE)
    assert answer.status_code == 200
    assert studio.jobs[0].image == NOISE.tobytes()
    assert list(tmp_path.iterdir()) == []


SHOWN = {"authorization": f"Bearer {KEY}"}
TYPE = {"content-type": "multipart/form-data; boundary=B"}


def form_of(*parts: tuple[bytes, bytes]) -> bytes:
    written = [b"--B\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + data for head, data in parts]
    return b"\r\n".join([*written, b"--B--\r\n"])


WHOLE = form_of((b'name="prompt"', b"a"), (b'name="image"; filename="a"', png(NOISE)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cut short"),
        (b"no form", "Invalid multipart"),
        (WHOLE[:-4], "cut short"),
        (WHOLE[:500], "cut short"),
        (form_of((b'filename="a"', b"a")), "name"),
        (form_of((b'name="image"; filename="' + b"x" * 5_000 + b'"', b"a")), "Invalid multipart"),
        (form_of((b'name="prompt"', b"\xff\xfe")), "prompt is not UTF-8"),
        (form_of((b'name="image"', png(NOISE))), "image is not UTF-8; a file needs a filename"),
        (form_of((b'name="prompt"', b"a" * 140_000)), "maximum size"),
        (form_of(*[(b'name="prompt"', b"a")] * 65), "Too many fields"),
        (form_of(*[(b'name="image"; filename="a"', b"")] * 33), "Too many files"),
    ],
)
async def test_a_form_that_cannot_be_read(studio: FakeStudio, content: bytes, told: str) -> None:
    settings = Settings.make(api_key=KEY, max_body=200_000)
    transport = httpx.ASGITransport(create_app(studio, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=SHOWN) as http:
        error = problem(await http.post("/v1/images/edits", content=content, headers=TYPE), 400)
    assert error["code"] == "invalid_form" and told in error["message"]


async def test_a_text_that_comes_twice_is_refused(http: httpx.AsyncClient) -> None:
    content = form_of((b'name="prompt"', b"a"), (b'name="prompt"', b"b"))
    answer = await http.post("/v1/images/edits", content=content, headers=TYPE)
    assert "twice" in problem(answer, 422, "prompt")["message"]


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=B",
        "",
        "multipart/form-data; boundary=B; charset=utf-16",
        "multipart/form-data; boundary=B; charset=idna",
    ],
)
async def test_another_type_is_refused(http: httpx.AsyncClient, kind: str) -> None:
    answer = await http.post("/v1/images/edits", content=WHOLE, headers={"content-type": kind})
    assert "content-type" in problem(answer, 415)["message"]


async def test_images_given_as_addresses_in_json_are_not_fetched(http: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "images": [{"image_url": "http://169.254.169.254/"}]}
    answer = await http.post("/v1/images/edits", json=body)
    assert "the server fetches nothing" in problem(answer, 415)["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://test"}, 200),
        ({"sec-fetch-site": "same-origin", "origin": "https://in-front-of-a-proxy.example"}, 200),
        ({"sec-fetch-site": "none"}, 200),
    ],
)
async def test_a_form_of_another_web_site_is_refused(
    http: httpx.AsyncClient, studio: FakeStudio, headers: dict[str, str], status: int
) -> None:
    answer = await http.post("/v1/images/edits", content=WHOLE, headers={**TYPE, **headers})
    assert answer.status_code == status
    assert len(studio.jobs) == int(status == 200)


async def test_a_form_over_the_limit_is_not_read(send: Any, studio: FakeStudio) -> None:
    problem(await send({"image": ("a.png", b"x" * 200_000)}), 413)
    assert studio.jobs == []


async def test_every_file_is_closed(send: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Watched(form._Parser):
        async def parse(self) -> Any:
            sent = await super().parse()
            made.extend(value for _, value in sent.multi_items() if not isinstance(value, str))
            return sent

    monkeypatch.setattr(form, "_Parser", Watched)
    await send({"image": ("a.png", png(NOISE)), "mask": ("m.png", png(half_open()))})
    await send({"image": ("a.png", png(NOISE)), "other": ("m.png", b"a")})
    assert len(made) == 4 and all(file.file.closed for file in made)


async def test_nothing_of_one_client_is_in_anothers_picture(send: Any) -> None:
    """Thirty at once, among them files that are wrong: each gets its own image back."""

    async def own(i: int) -> None:
        colour = (i, 255 - i, 7 * i)
        answer = await send({"image": ("a.png", png(Image.new("RGB", (64, 64), colour)))})
        assert opened(answer.json()["data"][0]["b64_json"]).getcolors() == [(64 * 64, colour)]

    async def wrong(i: int) -> None:
        problem(await send({"image": ("a.png", png(NOISE)[: 40 * i])}), 422, "image")

    await asyncio.gather(*(own(i) if i % 3 else wrong(i) for i in range(30)))


async def test_memory_is_flat_after_many_mixed_requests(send: Any, studio: FakeStudio) -> None:
    async def mixed(times: int) -> int:
        for _ in range(times):
            await send()
            await send({"image": ("a.png", png(NOISE)), "mask": ("m.png", png(half_open()))}, stream="true")
            problem(await send({"image": ("a.png", png(NOISE)[:2_000])}), 422, "image")
            problem(await send({"image": ("a.png", b"x" * 200_000)}), 413)
        studio.jobs.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = await mixed(10)
        assert await mixed(40) - before < 150_000  # one upload that stays each time would be 500,000
    finally:
        tracemalloc.stop()
