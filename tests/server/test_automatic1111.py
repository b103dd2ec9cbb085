"""AUTOMATIC1111's API: what it takes, what it refuses by name, what it answers."""

import asyncio
import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdfast import infotext
from sdfast.request import Hires
from sdfast.schedulers import SAMPLERS, resolve
from sdfast.server.automatic1111 import calls
from sdfast.server.automatic1111.blur import blurred
from sdfast.server.automatic1111.fields import ImageToImage, TextToImage
from sdfast.server.automatic1111.pictures import canvas_of
from sdfast.server.automatic1111.samplers import list_samplers, list_schedulers, sampler_of
from sdfast.server.jobs import Failed
from tests.server.studio import FakeStudio, engine

pytestmark = pytest.mark.anyio
API = "/sdapi/v1"


class Client:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def get(self, path: str) -> Any:
        answer = await self.http.get(f"{API}/{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, **body: Any) -> Any:
        answer = await self.http.post(f"{API}/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, path: str, status: int, **body: Any) -> str:
        """The reason, in AUTOMATIC1111's shape."""
        return reason(await self.http.post(f"{API}/{path}", json=body), status)["errors"]


def reason(answer: httpx.Response, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    told: dict[str, str] = answer.json()
    assert told.keys() == {"error", "detail", "body", "errors"}
    assert told["error"] and told["detail"] and told["errors"]
    return told


@pytest.fixture
def api(http: httpx.AsyncClient) -> Client:
    return Client(http)


def coded(image: Image.Image, **told: Any) -> str:
    file = BytesIO()
    image.save(file, "PNG", **told)
    return base64.b64encode(file.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text)))


RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
LEFT = Image.new("L", (64, 64))
LEFT.paste(255, (0, 0, 32, 64))
INPAINTING = {"inpainting_fill": 1, "inpaint_full_res": False, "mask_blur": 0}


async def test_pictures_with_what_made_them(api: Client) -> None:
    told = await api.post(
        "txt2img", prompt="a boat", negative_prompt="fog", seed=7, batch_size=2, n_iter=2, steps=9, width=96
    )
    assert told.keys() == {"images", "parameters", "info"}
    assert [opened(image).getpixel((0, 0)) for image in told["images"]] == [(7 + i, 0, 99) for i in range(4)]
    assert opened(told["images"][0]).size == (96, 64)
    assert (told["parameters"]["prompt"], told["parameters"]["tiling"]) == ("a boat", None)
    info = json.loads(told["info"])
    assert (info["seed"], info["all_seeds"]) == (7, [7, 8, 9, 10])
    assert info["all_prompts"] == ["a boat"] * 4 and info["all_negative_prompts"] == ["fog"] * 4
    assert (info["width"], info["height"], info["steps"], info["batch_size"]) == (96, 64, 9, 2)
    assert (info["sampler_name"], info["cfg_scale"], info["clip_skip"]) == ("Euler", 7.0, 1)
    assert info["sd_model_name"] == "tiny" and info["sd_model_hash"] == engine().unet_digest[:10]
    assert [infotext.parse(text).seed for text in info["infotexts"]] == [7, 8, 9, 10]
    assert opened(told["images"][3]).info["parameters"] == info["infotexts"][3]
    assert info["denoising_strength"] is None and info["index_of_first_image"] == 0


async def test_what_is_not_said_is_as_automatic1111_has_it(api: Client, studio: FakeStudio) -> None:
    await api.post("txt2img")
    request = studio.jobs[0].request
    assert (request.num_inference_steps, request.guidance_scale, request.prompts) == (50, 7.0, ("",))
    assert resolve(str(request.scheduler)).name == "Euler"
    assert (request.width, request.height) == (64, 64)  # the engine's own size
    assert studio.jobs[0].deadline is not None and studio.jobs[0].image is None


async def test_null_is_nothing(api: Client, studio: FakeStudio) -> None:
    await api.post("txt2img", **dict.fromkeys(TextToImage.model_fields))
    nothing = dict.fromkeys(ImageToImage.model_fields)
    await api.post("img2img", **nothing | {"init_images": [coded(RED)]})
    assert len(studio.jobs) == 2


async def test_a_random_seed_is_told(api: Client, studio: FakeStudio) -> None:
    told = await api.post("txt2img", seed=-1)
    assert json.loads(told["info"])["seed"] == studio.jobs[0].request.seed >= 0


async def test_variations_have_one_seed_and_their_own_subseeds(api: Client, studio: FakeStudio) -> None:
    call = {"seed": 7, "batch_size": 2, "n_iter": 2}
    size = {"seed_resize_from_h": 48, "seed_resize_from_w": 96}
    told = await api.post("txt2img", **call, subseed=40, subseed_strength=0.3, **size)
    request, info = studio.jobs[0].request, json.loads(told["info"])
    assert (request.variation_seed, request.variation_strength, request.seed_resize_from) == (
        40,
        0.3,
        (48, 96),
    )
    assert (info["seed"], info["all_seeds"]) == (7, [7] * 4)
    assert (info["subseed"], info["all_subseeds"]) == (40, [40, 41, 42, 43])
    assert info["subseed_strength"] == 0.3
    assert (info["seed_resize_from_h"], info["seed_resize_from_w"]) == (48, 96)


async def test_a_random_subseed_is_told_and_one_without_strength_means_nothing(
    api: Client, studio: FakeStudio
) -> None:
    told = await api.post("txt2img", subseed=-1, subseed_strength=0.5)
    assert json.loads(told["info"])["subseed"] == studio.jobs[0].request.variation_seed
    nothing = {"seed_resize_from_h": -1, "seed_resize_from_w": 0, "subseed_strength": 0}
    told = await api.post("txt2img", subseed=40, seed=7, batch_size=2, **nothing)
    request, info = studio.jobs[1].request, json.loads(told["info"])
    assert request.variation_seed is None and not request.varied
    assert (info["all_seeds"], info["subseed_strength"]) == ([7, 8], 0)
    assert (info["seed_resize_from_h"], info["seed_resize_from_w"]) == (-1, -1)


async def test_subseeds_that_run_out_are_named_as_the_api_names_them(api: Client) -> None:
    message = await api.refused("txt2img", 422, batch_size=2, subseed=2**64 - 1, subseed_strength=0.5)
    assert message.startswith("subseed: variation_seed: 18446744073709551615 leaves no seeds")


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("alwayson_scripts", {"ControlNet": {"args": [{}]}}, "ControlNet"),
        ("script_name", "x/y/z plot", "no scripts"),
        ("subseed_strength", 1.5, "less than or equal to 1"),
        ("subseed", -2, "-1"),
        ("seed_resize_from_w", 64, "give seed_resize_from_h beside it"),
        ("seed_resize_from_h", 60, "multiple of 8"),
        ("restore_faces", True, "faces"),
        ("tiling", True, "tile"),
        ("s_churn", 0.5, "ancestral"),
        ("styles", ["oil"], "into the prompt"),
        ("save_images", True, "saves nothing"),
        ("prompt", "a <lora:oil:0.8> boat", "<lora:oil> is not one of tiny's LoRAs; there are: none"),
        ("prompt", "a <lora:oil:much> boat", "'much' is not a scale"),
        ("prompt", "a <lora:oil:nan> boat", "'nan' is not a scale"),
        ("prompt", "a <lora:oil:1:1:8> boat", "<lora:oil:1:1:8> is not understood"),
        ("prompt", "a <hypernet:oil:1> boat", "<hypernet:oil:1> is not supported"),
        ("denoizing", 1, "unknown"),
        ("steps", 0, "greater than or equal to 1"),
        ("n_iter", 200, "128"),
        ("seed", -2, "-1"),
        ("cfg_scale", "high", "number"),
        ("width", 100, "multiple of 8"),
        ("eta", 0.5, "Euler"),
        ("override_settings", {"sd_vae": "other.pt"}, "has its VAE inside"),
        ("override_settings", {"lora_dir": "/"}, "lora_dir"),
        ("override_settings", {"CLIP_stop_at_last_layers": 13}, "1 to 12"),
        ("override_settings", {"emphasis": "Strong"}, "must be one of Original, No norm, Ignore, None"),
        ("override_settings", {"comma_padding_backtrack": 0}, "parted at commas"),
        ("scheduler", "bogus", "bogus"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    api: Client, studio: FakeStudio, field: str, value: Any, advice: str
) -> None:
    message = await api.refused("txt2img", 422, **{field: value})
    assert message.startswith(field) and advice in message
    assert studio.jobs == []


async def test_too_many_pictures_are_refused(api: Client, studio: FakeStudio) -> None:
    message = await api.refused("txt2img", 422, batch_size=64, n_iter=3)
    assert message.startswith("n_iter: times batch_size") and studio.jobs == []


async def test_a_size_that_no_engine_has_is_refused(api: Client) -> None:
    assert "64x64, 96x64" in await api.refused("txt2img", 422, width=128)


async def test_an_unknown_sampler_is_not_found(api: Client, http: httpx.AsyncClient) -> None:
    told = reason(await http.post(f"{API}/txt2img", json={"sampler_name": "Eulr"}), 404)
    assert told["detail"] == "Sampler not found" and "did you mean 'Euler'" in told["errors"]


@pytest.mark.parametrize(
    ("given", "scheduler"),
    [
        ({"sampler_name": "DPM++ 2M"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "automatic"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "uniform"}, "DPM++ 2M"),
        ({"sampler_name": "DPM++ 2M SDE", "scheduler": "Automatic"}, "DPM++ 2M SDE Exponential"),
        ({"sampler_name": "DPM++ 2M Karras", "scheduler": "automatic"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M Karras", "scheduler": "exponential"}, "DPM++ 2M Exponential"),
        ({"sampler_name": "Euler", "scheduler": "sgm_uniform"}, "Euler SGM Uniform"),
        ({"sampler_index": "k_euler_a"}, "Euler a"),
        ({"sampler_index": "Heun", "sampler_name": "DDIM"}, "DDIM"),
    ],
)
async def test_samplers_have_automatic1111s_names(
    api: Client, studio: FakeStudio, given: Any, scheduler: str
) -> None:
    told = await api.post("txt2img", **given)
    assert resolve(str(studio.jobs[0].request.scheduler)).name == scheduler
    info = json.loads(told["info"])
    sampler = resolve(scheduler)
    assert info["sampler_name"] == sampler.sampler
    assert info["extra_generation_params"] == {"Schedule type": sampler.schedule_type}


async def test_every_listed_sampler_can_be_asked_for(api: Client) -> None:
    listed = await api.get("samplers")
    assert listed == list_samplers() and {"Euler a", "DPM++ 2M", "DDIM"} < {item["name"] for item in listed}
    for item in listed:
        for name in (item["name"], *item["aliases"]):
            assert sampler_of(name, "automatic")[1].sampler == item["name"]
    assert {sampler.sampler for sampler in SAMPLERS} - {item["name"] for item in listed} == {"DDIM Inverse"}
    types = await api.get("schedulers")
    assert types == list_schedulers() and types[0]["name"] == "automatic"
    for item in types:
        assert sampler_of("Euler", item["name"]) and sampler_of("Euler", item["label"])


async def test_eta_is_ddims(api: Client, studio: FakeStudio) -> None:
    await api.post("txt2img", sampler_name="DDIM", eta=0.5)
    await api.post("txt2img", sampler_name="Euler a", eta=1.0)  # its own, and what clients send
    await api.post("txt2img", sampler_name="Euler", eta=0.0)
    assert [job.request.eta for job in studio.jobs] == [0.5, 0.0, 0.0]
    assert "eta: Euler a" in await api.refused("txt2img", 422, sampler_name="Euler a", eta=0.0)


async def test_layers_are_counted_from_one(api: Client, studio: FakeStudio) -> None:
    for layers in (1, 2):
        told = await api.post("txt2img", override_settings={"CLIP_stop_at_last_layers": layers})
        assert json.loads(told["info"])["clip_skip"] == layers
    studio.engines["tiny"] = replace(engine(), family="sdxl")
    await api.post("txt2img", override_settings={"CLIP_stop_at_last_layers": 2})
    assert [job.request.clip_skip for job in studio.jobs] == [None, 1, None]
    message = await api.refused("txt2img", 422, override_settings={"CLIP_stop_at_last_layers": 3})
    assert "1 to 2" in message


async def test_prompts_are_read_whole_and_with_emphasis(api: Client, studio: FakeStudio) -> None:
    for name in ("Original", "No norm", "Ignore", "None"):
        told = await api.post("txt2img", prompt="a (boat:1.3)", override_settings={"emphasis": name})
    assert infotext.parse(json.loads(told["info"])["infotexts"][0]).prompt == "a (boat:1.3)"
    await api.post("txt2img", prompt="a (boat:1.3)")
    readings = [(job.request.emphasis, job.request.long_prompts) for job in studio.jobs]
    assert readings == [
        (emphasis, "chunk") for emphasis in ("original", "no_norm", "ignore", None, "original")
    ]
    assert all(job.request.prompt_editing for job in studio.jobs)
    assert (await api.get("options"))["emphasis"] == "Original"
    await api.post("options", emphasis="Original")
    assert "override_settings" in await api.refused("options", 422, emphasis="None")


async def test_a_request_may_name_its_checkpoint(api: Client, studio: FakeStudio) -> None:
    studio.engines["other"] = engine("other")
    listed = await api.get("sd-models")
    assert [item["model_name"] for item in listed] == ["tiny", "other"]
    for key in ("title", "model_name", "hash", "sha256"):
        await api.post("txt2img", override_settings={"sd_model_checkpoint": listed[1][key]})
    await api.post("txt2img", override_settings={"sd_model_checkpoint": None, "samples_format": "png"})
    assert [job.engine for job in studio.jobs] == ["other"] * 4 + ["tiny"]
    message = await api.refused("txt2img", 404, override_settings={"sd_model_checkpoint": "v1-5"})
    assert "there are: tiny [" in message
    settings = {"sd_model_checkpoint": "other"}
    message = await api.refused(
        "txt2img", 422, override_settings=settings, override_settings_restore_afterwards=False
    )
    assert "for one request" in message


async def test_the_checkpoint_can_be_set_for_all(api: Client, studio: FakeStudio) -> None:
    studio.engines["other"] = engine("other")
    options = await api.get("options")
    assert options["sd_model_checkpoint"].startswith("tiny [") and options["samples_format"] == "png"
    assert options["CLIP_stop_at_last_layers"] == 1
    title = (await api.get("sd-models"))[1]["title"]
    await api.post("options", sd_model_checkpoint=title)
    assert (await api.get("options"))["sd_model_checkpoint"] == title
    await api.post("txt2img")
    assert studio.jobs[0].engine == "other"
    assert "not here" in await api.refused("options", 404, sd_model_checkpoint="v1-5")
    message = await api.refused("options", 422, sd_model_checkpoint="tiny", samples_format="webp")
    assert message.startswith("samples_format: 'webp' is not supported")
    assert (await api.get("options"))["sd_model_checkpoint"] == title
    assert "override_settings" in await api.refused("options", 422, CLIP_stop_at_last_layers=2)
    assert "is not supported" in await api.refused("options", 422, tiling=0)


async def test_other_methods_are_told_which_there_are(http: httpx.AsyncClient) -> None:
    answer = await http.put(f"{API}/options")
    reason(answer, 405)
    assert answer.headers["allow"] == "GET, POST"


async def test_what_is_told_can_be_set(api: Client) -> None:
    assert await api.post("options", **(await api.get("options"))) is None
    assert "told, not set" in await api.refused("options", 422, sd_checkpoint_hash="0" * 64)


async def test_an_image_is_drawn_over(api: Client, studio: FakeStudio) -> None:
    told = await api.post("img2img", init_images=[f"data:image/png;base64,{coded(RED)}"], seed=3, steps=8)
    [job] = studio.jobs
    assert job.image == RED.tobytes() and job.mask is None and job.request.strength == 0.75
    assert opened(told["images"][0]).size == (64, 64)
    assert json.loads(told["info"])["denoising_strength"] == 0.75
    assert told["parameters"]["init_images"] is None
    told = await api.post("img2img", init_images=[coded(RED)], include_init_images=True, send_images=False)
    assert told["parameters"]["init_images"] == [coded(RED)] and told["images"] == []


async def test_an_image_is_edited_by_an_engine_for_that(api: Client, studio: FakeStudio) -> None:
    studio.engines = {"tiny": engine(instructed=True)}
    for given in ({}, {"image_cfg_scale": 2, "denoising_strength": 0.3}):
        await api.post("img2img", init_images=[coded(RED)], seed=3, **given)
    asked = [(job.request.image_guidance_scale, job.request.strength) for job in studio.jobs]
    assert asked == [(1.5, None), (2.0, None)]
    refusal = await api.refused("img2img", 422, init_images=[coded(RED)], image_cfg_scale=0.5)
    assert refusal.startswith("image_cfg_scale: ")
    studio.engines = {"tiny": engine()}
    await api.post("img2img", init_images=[coded(RED)], image_cfg_scale=0.5)  # clients send it always
    assert studio.jobs[-1].request.image_guidance_scale is None


async def test_an_image_of_another_size_is_resized_or_cropped(api: Client, studio: FakeStudio) -> None:
    wide = Image.new("RGB", (256, 64), "red")
    wide.paste("blue", (96, 0, 160, 64))
    for mode in (0, 1):
        await api.post("img2img", init_images=[coded(wide)], resize_mode=mode)
    whole, middle = (Image.frombytes("RGB", (64, 64), job.image or b"") for job in studio.jobs)
    assert whole.getpixel((2, 32)) == (255, 0, 0) and whole.getpixel((32, 32)) == (0, 0, 255)
    assert middle.tobytes() == BLUE.tobytes()
    assert "just resize" in await api.refused("img2img", 422, init_images=[coded(wide)], resize_mode=3)


@pytest.mark.parametrize("invert", [0, 1])
async def test_outside_the_mask_the_image_stays(api: Client, studio: FakeStudio, invert: int) -> None:
    told = await api.post(
        "img2img",
        init_images=[coded(RED)],
        mask=coded(LEFT),
        inpainting_mask_invert=invert,
        seed=1,
        **INPAINTING,
    )
    mask = Image.frombytes("L", (64, 64), studio.jobs[0].mask or b"")
    drawn, kept = ((10, 10), (50, 10)) if not invert else ((50, 10), (10, 10))
    assert (mask.getpixel(drawn), mask.getpixel(kept)) == (255, 0)
    picture = opened(told["images"][0])
    assert (picture.getpixel(drawn), picture.getpixel(kept)) == ((1, 0, 99), (255, 0, 0))
    assert infotext.parse(picture.info["parameters"]).seed == 1


def test_a_blurred_mask_blends() -> None:
    asked = ImageToImage(init_images=[coded(RED)], mask=coded(LEFT), **INPAINTING | {"mask_blur": 8})
    canvas = canvas_of(asked, 64, 64)
    picture = opened(base64.b64encode(canvas.over(base64.b64decode(coded(BLUE)))).decode())
    reds = [picture.getpixel((x, 32))[0] for x in range(64)]
    assert reds[0] == 0 and reds[63] == 255 and reds == sorted(reds)
    assert 0 < reds[40] < 255 and reds[30] == 0  # where it is half white nothing is left of the image
    assert set(canvas.job_mask or b"") == {0, 255}


LARGE = Image.new("RGB", (200, 100), "red")
LARGE.paste("lime", (40, 20, 160, 80))
HOLE = Image.new("L", (200, 100))
HOLE.paste(255, (80, 30, 110, 50))
PART = {"inpainting_fill": 1, "mask_blur": 0, "init_images": [coded(LARGE)], "mask": coded(HOLE)}


async def test_the_masked_part_alone_is_drawn_and_pasted(api: Client, studio: FakeStudio) -> None:
    """As it is where nothing is said, and without padding then, as there."""
    told = await api.post("img2img", **PART, inpaint_full_res_padding=4, seed=1)
    await api.post("img2img", **PART, inpaint_full_res=True, seed=1)
    first, second = studio.jobs
    box = (76, 21, 114, 59)  # 4 pixels around, and as high as it is wide
    assert first.image == LARGE.crop(box).resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    hole = HOLE.crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    assert first.mask == hole.point(lambda value: 255 * (value >= 128)).tobytes()
    assert (first.request.padding_mask_crop, second.request.padding_mask_crop) == (4, 0)
    assert second.image == LARGE.crop((80, 25, 110, 55)).resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    picture = opened(told["images"][0])
    assert picture.size == (200, 100)
    kept = np.asarray(HOLE) == 0
    assert np.array_equal(np.asarray(picture)[kept], np.asarray(LARGE)[kept])
    assert picture.getpixel((95, 40)) == (1, 0, 99)
    assert infotext.parse(picture.info["parameters"]).seed == 1
    info = json.loads(told["info"])
    assert (info["width"], info["height"]) == (64, 64)
    assert info["extra_generation_params"]["Masked area padding"] == "4"
    assert info["extra_generation_params"]["Inpaint area"] == "Only masked"


async def test_with_false_the_whole_image_is_drawn(api: Client, studio: FakeStudio) -> None:
    for value in (False, 0):
        told = await api.post("img2img", **PART, inpaint_full_res=value)
        assert opened(told["images"][0]).size == (64, 64)
        assert "Inpaint area" not in json.loads(told["info"])["extra_generation_params"]
    resized = LARGE.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    assert [(job.image, job.request.padding_mask_crop) for job in studio.jobs] == [(resized, None)] * 2
    await api.post("img2img", init_images=[coded(RED)], inpaint_full_res=True, inpaint_full_res_padding=32)
    assert studio.jobs[-1].image == RED.tobytes()  # without a mask it says nothing


def test_a_part_is_blended_by_the_mask_as_it_is() -> None:
    """Unlike over the whole image, where AUTOMATIC1111 doubles the mask first."""
    asked = ImageToImage(**PART | {"mask_blur": 4, "inpaint_full_res_padding": 8})
    canvas = canvas_of(asked, 64, 64)
    picture = opened(base64.b64encode(canvas.over(base64.b64decode(coded(BLUE)))).decode())
    assert canvas.area is not None
    for x in range(200):
        shade = canvas.area.mask.getpixel((x, 40))
        assert abs(picture.getpixel((x, 40))[2] - shade) <= 2
    blurred = canvas.area.mask.getbbox()
    assert blurred[0] < 80 and blurred[2] > 110  # and the part is around that
    assert canvas.area.box[::2] == (blurred[0] - 8, blurred[2] + 8)


@pytest.mark.parametrize("blur", [1, 3, 4, 12])
def test_a_mask_is_blurred_by_a_gaussian_that_ends(blur: int) -> None:
    """As OpenCV's, of the size that AUTOMATIC1111 gives it."""
    reach = int(2.5 * blur + 0.5)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / blur) ** 2)
    mask = np.random.default_rng(blur).integers(0, 256, (40, 33), np.uint8)
    for across, down in ((blur, 0), (0, blur), (blur, blur)):
        expected = mask.astype(float)
        if across:
            rows = np.pad(expected, ((0, 0), (reach, reach)), "reflect")
            expected = np.rint([np.convolve(row, taps / taps.sum(), "valid") for row in rows])
        if down:
            columns = np.pad(expected.T, ((0, 0), (reach, reach)), "reflect")
            expected = np.rint([np.convolve(column, taps / taps.sum(), "valid") for column in columns]).T
        found = np.asarray(blurred(Image.fromarray(mask), across, down), float)
        assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 0.01


def test_a_blur_of_opencv() -> None:
    """cv2.GaussianBlur(edge, (21, 1), 4), by OpenCV 5.0."""
    edge = np.repeat(np.array([[0, 255]], np.uint8), 16, 1)
    rising = [1, 3, 7, 12, 21, 32, 48, 67, 90, 115, 140, 165, 188, 207, 223, 234, 243, 248, 252, 254]
    expected = [*[0] * 6, *rising, *[255] * 6]
    assert np.asarray(blurred(Image.fromarray(edge), 4, 0)).tolist() == [expected]
    assert np.asarray(blurred(Image.fromarray(edge.T), 0, 4)).T.tolist() == [expected]


async def test_an_inverted_mask_has_the_rest_for_its_part(api: Client, studio: FakeStudio) -> None:
    told = await api.post("img2img", **PART, inpainting_mask_invert=1, seed=1)
    picture = opened(told["images"][0])
    assert (picture.getpixel((95, 40)), picture.getpixel((3, 3))) == ((0, 255, 0), (1, 0, 99))


async def test_a_mask_may_be_transparency(api: Client, studio: FakeStudio) -> None:
    seen = RED.copy()
    seen.putalpha(LEFT)
    await api.post("img2img", init_images=[coded(RED)], mask=coded(seen), **INPAINTING)
    assert studio.jobs[0].mask == LEFT.tobytes()


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"init_images": None}, "init_images"),
        ({"init_images": []}, "init_images: holds 0 images"),
        ({"init_images": [coded(RED)] * 2}, "send one"),
        ({"init_images": ["https://example.com/a.png"]}, "fetches nothing"),
        ({"init_images": ["AAAA"]}, "init_images"),
        ({"mask": "AAAA"}, "mask"),
        ({"inpainting_fill": 4}, "inpainting_fill: must be 0, 1, 2 or 3"),
        ({"inpaint_full_res": True, "inpaint_full_res_padding": -1}, "inpaint_full_res_padding: must be"),
        (
            {"inpaint_full_res": True, "mask": coded(Image.new("L", (64, 64)))},
            "so that there is no part to inpaint",
        ),
        (
            {"inpaint_full_res": None, "mask": coded(LEFT.resize((32, 64)))},
            "make them alike, or send inpaint_full_res: false",
        ),
        (
            {
                **{"inpaint_full_res": True, "init_images": [coded(RED.resize((200, 2)))]},
                **{"mask": coded(Image.new("L", (200, 2), 255))},
            },
            "mask: the part around it is 200x2, too long for its width",
        ),
        ({"inpainting_mask_invert": 2}, "inpainting_mask_invert"),
        ({"denoising_strength": 0}, "denoising_strength: leaves none of 50 steps"),
        ({"steps": 1}, "denoising_strength: leaves none of 1 steps"),
        ({"width": 8192, "height": 8192}, "8192x8192 is not one of this engine's"),
        ({"width": 128, "init_images": ["R0lGODlh"]}, "128x64 is not one of this engine's"),  # none is opened
        ({"initial_noise_multiplier": 0.5}, "initial_noise_multiplier"),
    ],
)
async def test_an_image_that_cannot_be_drawn_over_is_refused(
    api: Client, studio: FakeStudio, change: Any, advice: str
) -> None:
    asked = {"init_images": [coded(RED)], "mask": coded(LEFT), **INPAINTING} | change
    assert advice in await api.refused("img2img", 422, **asked)
    assert studio.jobs == []


async def test_an_engine_without_an_encoder_takes_no_images(api: Client, studio: FakeStudio) -> None:
    studio.engines["tiny"] = replace(engine(), edits=False)
    assert "takes no images" in await api.refused("img2img", 422, init_images=[coded(RED)])


def second(studio: FakeStudio) -> Hires:
    hires = studio.jobs[-1].request.hires
    assert hires is not None
    return hires


@pytest.mark.parametrize(
    ("given", "first", "target"),  # width, height
    [
        ({"hr_scale": 1.5}, (64, 64), (96, 96)),
        ({}, (64, 64), (128, 128)),  # by two, if nothing is said
        ({"width": 96, "hr_scale": 1.3}, (96, 64), (120, 80)),  # 124.8 x 83.2, of whole latents
        ({"width": 96, "hr_resize_x": 200}, (96, 64), (200, 128)),  # 133 1/3 high
        ({"width": 96, "hr_resize_y": 128, "hr_resize_x": 0}, (96, 64), (192, 128)),
        ({"hr_resize_x": 96, "hr_resize_y": 128, "hr_scale": 3.0}, (64, 64), (96, 128)),
        ({"firstphase_width": 32, "firstphase_height": 48}, (32, 48), (64, 96)),
    ],
)
async def test_the_second_pass_has_the_size_that_automatic1111_gives_it(
    given: Any, first: Any, target: Any
) -> None:
    request, _ = TextToImage(enable_hr=True, **given).request(engine())
    assert (request.width, request.height) == first
    assert request.hires is not None
    assert (request.hires.width, request.hires.height) == target


async def test_what_a_second_pass_is_told(api: Client, studio: FakeStudio) -> None:
    told = await api.post("txt2img", enable_hr=True, hr_scale=1.0, sampler_name="Euler", seed=7)
    assert second(studio) == Hires(height=64, width=64)
    info = json.loads(told["info"])
    assert info["denoising_strength"] == 0.75
    extra = {"Schedule type": "Automatic", "Hires upscale": "1", "Hires upscaler": "Latent"}
    assert info["extra_generation_params"] == extra
    all_of_it: dict[str, Any] = {
        "hr_upscaler": "Latent (nearest-exact)",
        "hr_second_pass_steps": 9,
        "hr_sampler_name": "DPM++ 2M",
        "hr_scheduler": "karras",
        "hr_prompt": "a (ship:1.2)",
        "hr_negative_prompt": "fog",
        "denoising_strength": 0.5,
    }
    size = {"hr_resize_x": 96, "hr_resize_y": 64}
    told = await api.post("txt2img", enable_hr=True, prompt="a boat", **size, **all_of_it)
    hires = second(studio)
    assert (hires.width, hires.height, hires.upscaler) == (96, 64, "latent_nearest_exact")
    assert (hires.strength, hires.num_inference_steps) == (0.5, 9)
    assert resolve(str(hires.scheduler)).name == "DPM++ 2M Karras"
    assert (hires.prompts, hires.negative_prompts) == (("a (ship:1.2)",), ("fog",))
    extra = json.loads(told["info"])["extra_generation_params"]
    assert extra["Hires resize"] == "96x64" and extra["Hires sampler"] == "DPM++ 2M"
    assert extra["Hires steps"] == "9" and extra["Hires prompt"] == "a (ship:1.2)"


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"hr_sampler_name": None}, True),
        ({"hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler"}, True),
        ({"hr_sampler_name": "Euler a", "hr_scheduler": "automatic"}, True),
        ({"hr_scheduler": "karras"}, False),
        ({"hr_sampler_name": "DDIM"}, False),
    ],
)
async def test_a_second_pass_has_the_firsts_sampler_unless_another_is_named(given: Any, same: bool) -> None:
    request, _ = TextToImage(enable_hr=True, sampler_name="Euler a", **given).request(engine())
    assert request.hires is not None
    assert (request.hires.scheduler is None) == same


async def test_without_enable_hr_the_rest_means_nothing(api: Client, studio: FakeStudio) -> None:
    await api.post(
        "txt2img",
        enable_hr=False,
        hr_scale=2.0,
        hr_upscaler="R-ESRGAN 4x+",
        hr_checkpoint_name="other",
        hr_prompt="<lora:oil:1>",
        firstphase_width=8,
        denoising_strength=0,
    )
    assert studio.jobs[0].request.hires is None and studio.jobs[0].request.width == 64


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "128x128 is not one of this engine's (64x64, 96x64)"),
        ({"hr_scale": 1.0, "width": 128}, "128x64 is not one of this engine's (64x64, 96x64)"),
        (
            {"hr_upscaler": "R-ESRGAN 4x+"},
            "hr_upscaler: is not here; there are: Latent, Latent (antialiased)",
        ),
        ({"hr_checkpoint_name": "other"}, "hr_checkpoint_name: is not supported"),
        ({"hr_prompt": "a <lora:oil:0.8> boat"}, "hr_prompt: <lora:oil> is not one of tiny's LoRAs"),
        ({"hr_prompt": "a <lora:oil:> boat"}, "hr_prompt: <lora:oil:>: '' is not a scale"),
        ({"hr_sampler_name": "Eulr"}, "hr_sampler_name: "),
        ({"hr_resize_x": 100}, "hr_resize_x: width: must be a multiple of 8"),
        ({"hr_scale": 0.05}, "hr_scale: height: must be greater than or equal to 8"),
        ({"hr_scale": 0.5}, "enable_hr: hires: 32x32 is smaller than the first pass, 64x64"),
        ({"denoising_strength": 0}, "denoising_strength: strength: must be greater than 0"),
        ({"denoising_strength": 0.01}, "enable_hr: hires: 50 steps at a strength of 0.01"),
        ({"hr_second_pass_steps": -1}, "hr_second_pass_steps: must be greater than or equal to 0"),
        ({"firstphase_width": 64}, "firstphase_width: give firstphase_height"),
        ({"hr_scale": 200.0}, "hr_scale: height: must be less than or equal to 8192"),
        ({"width": 4096, "height": 4096}, "4096x4096 is not one of this engine's"),
    ],
)
async def test_a_second_pass_that_cannot_be_drawn_is_refused_by_name(
    api: Client, http: httpx.AsyncClient, studio: FakeStudio, given: Any, told: str
) -> None:
    answer = await http.post(f"{API}/txt2img", json={"enable_hr": True, **given})
    assert answer.status_code in (404, 422)
    assert told in reason(answer, answer.status_code)["errors"]
    assert studio.jobs == []


async def test_the_upscalers_are_listed(api: Client) -> None:
    modes = [item["name"] for item in await api.get("latent-upscale-modes")]
    others = await api.get("upscalers")
    assert [item["name"] for item in others] == ["Lanczos", "Nearest", "None"]
    assert others[0].keys() == {"name", "model_name", "model_path", "model_url", "scale"}
    known = [
        TextToImage(enable_hr=True, hr_upscaler=name).request(engine())[0].hires
        for name in (*modes, *(item["name"] for item in others))
    ]
    assert len({hires.upscaler for hires in known if hires}) == 8  # without any, Lanczos resizes
    assert modes[0] == "Latent" and len(modes) == 6


CANNY = "control_canny [01234567]"


@pytest.fixture
def controlled(studio: FakeStudio) -> FakeStudio:
    """Its engine has a ControlNet."""
    studio.engines["tiny"] = engine(controlnets=(CANNY,))
    return studio


def units(*units: Any, name: str = "ControlNet") -> dict[str, Any]:
    return {"alwayson_scripts": {name: {"args": list(units)}}}


STRIPES = Image.new("RGB", (256, 64), "red")
STRIPES.paste("blue", (96, 0, 160, 64))
OF_DETECTORS = {"processor_res": 512, "threshold_a": 64, "threshold_b": 0.5, "pixel_perfect": True}
ASKS_FOR_NOTHING = {
    **OF_DETECTORS,
    **{"enabled": True, "module": "none", "control_mode": "Balanced", "low_vram": True, "hr_option": "Both"},
    **{"mask": None, "effective_region_mask": None, "advanced_weighting": None, "input_mode": "simple"},
    **{"save_detected_map": True, "inpaint_crop_input_image": True, "use_preview_as_input": False},
    **{"batch_images": "", "loopback": False, "output_dir": "", "is_ui": False, "pulid_mode": "Fidelity"},
}


async def test_a_unit_is_the_control_image_and_its_scale(api: Client, controlled: FakeStudio) -> None:
    unit = {"image": coded(RED), "model": CANNY, "weight": 0.5, "guidance_start": 0.25, "guidance_end": 0.75}
    told = await api.post("txt2img", **units(ASKS_FOR_NOTHING | unit), steps=8)
    assert len(told["images"]) == 1
    older = {"input_image": f"data:image/png;base64,{coded(BLUE)}", "guidance": 0.5, "lowvram": False}
    await api.post("txt2img", **units({"enabled": False, "module": "canny"}, None, older, name="controlnet"))
    both = {"image": {"image": coded(BLUE), "mask": None}, "model": "control_canny", "weight": 0}
    await api.post("txt2img", **units(both))
    assert [job.control for job in controlled.jobs] == [RED.tobytes(), BLUE.tobytes(), BLUE.tobytes()]
    asked = [
        (r.controlnet_conditioning_scale, r.control_guidance_start, r.control_guidance_end)
        for r in (job.request for job in controlled.jobs)
    ]
    assert asked == [(0.5, 0.25, 0.75), (1.0, 0.0, 0.5), (0.0, 0.0, 1.0)]
    assert all(job.image is None for job in controlled.jobs)


@pytest.mark.parametrize(
    ("unit", "mode"),
    [
        ({}, "balanced"),
        ({"control_mode": 0}, "balanced"),
        ({"control_mode": 1}, "prompt"),
        ({"control_mode": "My prompt is more important"}, "prompt"),
        ({"control_mode": 2, "guess_mode": False}, "control"),
        ({"control_mode": "ControlNet is more important"}, "control"),
        ({"guessmode": True}, "control"),
    ],
)
async def test_a_unit_has_a_mode(
    api: Client, controlled: FakeStudio, unit: dict[str, Any], mode: str
) -> None:
    await api.post("txt2img", **units({"image": coded(RED), "weight": 0.5, **unit}))
    [job] = controlled.jobs
    assert (job.request.control_mode, job.request.controlnet_conditioning_scale) == (mode, 0.5)
    assert job.request.control_layer_scales is None


async def test_weights_by_layer_are_in_place_of_the_weight(api: Client, controlled: FakeStudio) -> None:
    unit = {"image": coded(RED), "weight": 0.5, "advanced_weighting": [0.25, 1.5], "control_mode": 2}
    await api.post("txt2img", **units(unit))
    [job] = controlled.jobs
    assert job.request.control_layer_scales == ((0.25, 1.5),)
    assert (job.request.control_mode, job.request.controlnet_conditioning_scale) == ("control", 1.0)


@pytest.mark.parametrize(
    ("mode", "cropped"),
    [(0, False), ("Just Resize", False), (1, True), ("Crop and Resize", True), (None, True)],
)
async def test_a_control_image_is_resized_or_cropped(
    api: Client, controlled: FakeStudio, mode: Any, cropped: bool
) -> None:
    await api.post("txt2img", **units({"image": coded(STRIPES), "resize_mode": mode}))
    control = Image.frombytes("RGB", (64, 64), controlled.jobs[0].control or b"")
    assert control.getpixel((2, 32)) == ((0, 0, 255) if cropped else (255, 0, 0))
    assert control.getpixel((32, 32)) == (0, 0, 255)


async def test_nothing_is_filled_around_a_control_image(api: Client, controlled: FakeStudio) -> None:
    for mode in (2, "Resize and Fill"):
        unit = {"image": coded(STRIPES), "resize_mode": mode}
        message = await api.refused("txt2img", 422, **units(unit))
        assert "resize_mode: an image of 256x64 leaves something to fill in a picture of 64x64" in message
        await api.post("txt2img", **units(unit | {"image": coded(RED.resize((32, 32)))}))
    assert [job.control for job in controlled.jobs] == [RED.tobytes()] * 2


async def test_over_an_image_a_unit_without_one_has_that(api: Client, controlled: FakeStudio) -> None:
    call = {"init_images": [coded(STRIPES)], "resize_mode": 1}
    await api.post("img2img", **call, **units({"weight": 0.5, "resize_mode": 0}))
    await api.post("img2img", **call, **units({"image": coded(RED)}))
    assert [job.image for job in controlled.jobs] == [BLUE.tobytes()] * 2
    assert [job.control for job in controlled.jobs] == [BLUE.tobytes(), RED.tobytes()]


async def test_where_a_part_is_drawn_it_is_cut_out_of_control_images(
    api: Client, controlled: FakeStudio
) -> None:
    """Once they have the image's size, as the unit says; unless the unit wants none of it."""
    call, lanczos = {**PART, "inpaint_full_res_padding": 4}, Image.Resampling.LANCZOS
    square = RED.copy()
    square.paste("blue", (16, 0, 48, 64))
    large, box = square.resize((200, 100), lanczos), (76, 21, 114, 59)
    for unit in (
        {"image": coded(square), "resize_mode": 0},
        {"image": coded(square), "resize_mode": 0, "inpaint_crop_input_image": True},
        {"image": coded(square), "resize_mode": 0, "inpaint_crop_input_image": False},
        {"image": coded(square.resize((400, 200))), "resize_mode": 2},
        {"weight": 0.5},
        {"weight": 0.5, "inpaint_crop_input_image": False},
    ):
        await api.post("img2img", **call, **units(unit))
    cut, asked, whole, filled, own, own_whole = (job.control for job in controlled.jobs)
    assert cut == asked == large.crop(box).resize((64, 64), lanczos).tobytes()
    assert whole == square.tobytes()
    assert filled is not None and len(filled) == 64 * 64 * 3
    assert own == controlled.jobs[4].image
    assert own_whole == LARGE.resize((64, 64), lanczos).tobytes()
    fill = units({"image": coded(square), "resize_mode": 2})
    told = "an image of 64x64 leaves something to fill in a picture of 200x100"
    assert told in await api.refused("img2img", 422, **call, **fill)


@pytest.mark.parametrize(
    ("unit", "told"),
    [
        ({"module": "canny"}, "module: is not supported: there are no detectors here"),
        ({"control_mode": 3}, "control_mode: must be one of: Balanced, My prompt is more important"),
        ({"control_mode": "control"}, "control_mode: must be one of: Balanced, My prompt is more important"),
        ({"guessmode": 1}, "guess_mode: must be a valid boolean"),
        ({"model": "depth [89abcdef]"}, f"model: tiny has {CANNY}, and no other"),
        ({"mask": coded(LEFT)}, "mask: is not supported"),
        ({"image": {"image": coded(RED), "mask": coded(LEFT)}}, "mask: is not supported"),
        ({"image": {"image": coded(RED), "weight": 2}}, "image: must be base64, or have an image and a mask"),
        ({"effective_region_mask": coded(LEFT)}, "effective_region_mask: is not supported"),
        ({"advanced_weighting": [1.0, -1.0]}, "advanced_weighting.1: must be greater than or equal to 0"),
        ({"batch_images": [coded(RED)]}, "batch_images: is not supported"),
        ({"use_preview_as_input": True}, "use_preview_as_input: is not supported"),
        ({"ipadapter_input": ["x"]}, "ipadapter_input: is not supported"),
        ({"resize_mode": 3}, "resize_mode: must be 0 (just resize) or 1"),
        ({"resize_mode": "Larger"}, "resize_mode: must be 0 (just resize) or 1"),
        ({"weight": 2.5}, "weight: must be less than or equal to 2"),
        ({"weight": "1"}, "weight: must be a valid number"),
        ({"guidance_start": 1.0}, "guidance_end: must be above guidance_start, which is 1"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_end: must be above guidance_start"),
        ({"guidance": 0.5, "guidance_end": 0.6}, "is guidance_end by another name"),
        ({"enable": True}, "enable: unknown; did you mean enabled"),
        ({"image": ""}, "image: is missing"),
        ({"image": "https://example.org/a.png"}, "image: the server fetches nothing"),
        ({"image": "R0lGODlh"}, "image: this is no PNG, JPEG or WebP"),
    ],
)
async def test_a_unit_that_is_not_supported_is_refused_by_name(
    api: Client, controlled: FakeStudio, unit: dict[str, Any], told: str
) -> None:
    message = await api.refused("txt2img", 422, **units({"image": coded(RED), **unit}))
    assert message.startswith("alwayson_scripts: ControlNet: ") and told in message
    assert controlled.jobs == []


@pytest.mark.parametrize(
    ("scripts", "told"),
    [
        ({}, "tiny has a ControlNet"),
        (units(), "send an enabled unit"),
        (units({"enabled": False, "image": coded(RED)}), "send an enabled unit"),
        (units({"image": coded(RED)}, {"image": coded(RED)}), "2 units are enabled"),
        (units("canny"), "must have args, a list of units"),
        ({"alwayson_scripts": {"ControlNet": [{}]}}, "must have args, a list of units"),
        ({"alwayson_scripts": {"ControlNet": {"args": {}}}}, "send an enabled unit"),
        (units({"image": coded(RED)}) | {"width": 128}, "128x64 is not one of this engine's"),
    ],
)
async def test_an_engine_with_a_controlnet_needs_one_unit(
    api: Client, controlled: FakeStudio, scripts: dict[str, Any], told: str
) -> None:
    assert told in await api.refused("txt2img", 422, **scripts)
    assert controlled.jobs == []


POSE = "openpose [fedcba98]"


async def test_units_are_for_the_controlnets_that_they_name(api: Client, studio: FakeStudio) -> None:
    """Whatever their order; one without a unit adds nothing."""
    studio.engines["tiny"] = engine(controlnets=(CANNY, POSE))
    pose = {"image": coded(BLUE), "model": "openpose", "weight": 0.5, "guidance_end": 0.75}
    canny = {"image": coded(RED), "model": CANNY, "guidance_start": 0.25}
    await api.post("txt2img", **units(pose, {"enabled": False}, canny))
    await api.post("img2img", init_images=[coded(BLUE)], **units({"model": POSE}))
    black = bytes(len(RED.tobytes()))
    assert [job.control for job in studio.jobs] == [RED.tobytes() + BLUE.tobytes(), black + BLUE.tobytes()]
    asked = [
        (r.controlnet_conditioning_scale, r.control_guidance_start, r.control_guidance_end)
        for r in (job.request for job in studio.jobs)
    ]
    assert asked == [
        ((1.0, 0.5), (0.25, 0.0), (1.0, 0.75)),
        ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0)),
    ]
    studio.engines["tiny"] = engine(controlnets=(CANNY, CANNY))
    await api.post("txt2img", **units(canny, canny | {"image": coded(BLUE)}))
    assert studio.jobs[2].control == RED.tobytes() + BLUE.tobytes()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([{"model": "None"}], f"model: is missing; tiny has {CANNY}, {POSE}"),
        ([{"model": "depth"}], f"model: tiny has {CANNY}, {POSE}, and no other (got 'depth')"),
        ([{"model": POSE}, {"model": "openpose"}], "model: 'openpose' has several units"),
        ([{"model": POSE}] * 3, "3 units are enabled; tiny has 2 ControlNets"),
        ([{"model": POSE}, {"model": CANNY, "image": "R0lGODlh"}], "image: this is no PNG"),
        ([], "tiny has a ControlNet"),
    ],
)
async def test_units_that_name_no_controlnet_are_refused(
    api: Client, studio: FakeStudio, given: list[dict[str, Any]], told: str
) -> None:
    studio.engines["tiny"] = engine(controlnets=(CANNY, POSE))
    message = await api.refused("txt2img", 422, **units(*({"image": coded(RED), **one} for one in given)))
    assert told in message and studio.jobs == []


async def test_an_engine_without_a_controlnet_takes_no_unit(api: Client, studio: FakeStudio) -> None:
    message = await api.refused("txt2img", 422, **units({"image": coded(RED)}))
    assert "tiny has no ControlNet" in message and studio.jobs == []
    await api.post("txt2img", **units({"enabled": False, "image": coded(RED)}, None))
    await api.post("txt2img", **units())
    assert "Other is not supported" in await api.refused("txt2img", 422, **units({}, name="Other"))


async def test_the_controlnets_are_listed(api: Client, http: httpx.AsyncClient, studio: FakeStudio) -> None:
    assert (await http.get("/controlnet/model_list")).json() == {"model_list": []}
    studio.engines |= {name: engine(name, controlnets=(CANNY,)) for name in ("one", "two")}
    assert (await http.get("/controlnet/model_list?update=true")).json() == {"model_list": [CANNY]}
    modules = (await http.get("/controlnet/module_list?alias_names=true")).json()
    assert modules["module_list"] == ["none"] and modules["module_detail"]["none"]["sliders"] == []
    assert (await http.get("/controlnet/version")).json() == {"version": 3}
    assert (await http.get("/controlnet/settings")).json() == {"control_net_unit_count": 1}
    studio.engines["both"] = engine("both", controlnets=(POSE, CANNY))
    assert (await http.get("/controlnet/model_list")).json() == {"model_list": [CANNY, POSE]}
    assert (await http.get("/controlnet/settings")).json() == {"control_net_unit_count": 2}
    assert await api.get("scripts") == {"txt2img": ["controlnet"], "img2img": ["controlnet"]}
    told = reason(await http.post("/controlnet/detect", json={}), 501)
    assert "there are no detectors here" in told["errors"]
    reason(await http.get("/controlnet/nothing"), 404)


async def test_errors_have_automatic1111s_shape(http: httpx.AsyncClient, studio: FakeStudio) -> None:
    url = f"{API}/txt2img"
    assert "not JSON" in reason(await http.post(url, content=b"{", headers=JSON), 400)["detail"]
    assert "content-type" in reason(await http.post(url, content=b"{}"), 415)["detail"]
    assert "longer than" in reason(await http.post(url, content=b" " * 100_001, headers=JSON), 413)["detail"]
    assert "no such route" in reason(await http.get(f"{API}/nothing"), 404)["detail"]
    reason(await http.get(url), 405)
    studio.full = True
    answer = await http.post(url, json={})
    assert reason(answer, 429)["error"] == "queue_full" and answer.headers["retry-after"] == "3"
    studio.full, studio.failure = False, Failed("numerical", "the latents are no numbers")
    assert reason(await http.post(url, json={}), 500)["error"] == "numerical_error"
    studio.bug = True
    assert reason(await http.post(url, json={}), 500)["error"] == "internal_error"
    studio.bug, studio.ready = False, False
    assert reason(await http.post(url, json={}), 503)["error"] == "not_ready"
    wrong = await http.get(f"{API}/samplers", headers={"authorization": "Basic eDp5"})
    assert reason(wrong, 401)["error"] == "invalid_api_key" and "Basic" in wrong.headers["www-authenticate"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a boat", "a boat", {}),
        ("a <lora:oil> boat", "a  boat", {"oil": (1.0, 1.0)}),
        ("<lora:oil:0.8>a boat", "a boat", {"oil": (0.8, 0.8)}),
        ("a boat <lora:oil:0.5:-1>", "a boat ", {"oil": (0.5, -1.0)}),
        ("a <LoRA:oil:unet=0.3:te=2>", "a ", {"oil": (2.0, 0.3)}),
        ("a <lyco:oil:te=0.5>", "a ", {"oil": (0.5, 0.5)}),
        ("<lora:v1.2 ink:1><lora:oil:1> <lora:oil:0.5:0>", " ", {"v1.2 ink": (1, 1), "oil": (1.5, 1)}),
        ("a < lora:oil:1> (boat:1.2)", "a < lora:oil:1> (boat:1.2)", {}),
    ],
)
async def test_loras_are_taken_out_of_the_prompt(
    api: Client, studio: FakeStudio, prompt: str, text: str, loras: dict[str, tuple[float, float]]
) -> None:
    """Of the negative one they are text, as there."""
    studio.engines["tiny"] = engine(loras=("oil", "v1.2 ink"))
    await api.post("txt2img", prompt=prompt, negative_prompt="a <lora:oil:1>")
    request = studio.jobs[0].request
    assert (request.prompts, request.loras) == ((text,), loras)
    assert request.negative_prompts == ("a <lora:oil:1>",)


async def test_a_second_pass_has_the_loras_of_its_prompt(api: Client, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(loras=("oil", "ink"))
    hires = {"enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 64}
    for prompt in ("", "b <lora:ink:1>", "b"):
        await api.post("txt2img", prompt="a <lora:oil:1>", hr_prompt=prompt, **hires)
    passes = [[one.loras for one in job.request.passes] for job in studio.jobs]
    oil, ink = {"oil": (1.0, 1.0)}, {"ink": (1.0, 1.0)}
    assert passes == [[oil, oil], [oil, ink], [oil, {}]]
    assert [job.request.passes[1].prompts for job in studio.jobs] == [("a ",), ("b ",), ("b",)]


async def test_loras_may_be_switched_off_and_are_listed(api: Client, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(loras=("oil",))
    await api.post("txt2img", prompt="a <lora:ink:1>", disable_extra_networks=True)
    assert (studio.jobs[0].request.prompts, studio.jobs[0].request.loras) == (("a ",), {})
    assert "prompt: <lora:ink> is not one of tiny's LoRAs; there are: oil" in await api.refused(
        "txt2img", 422, prompt="a <lora:ink:1>"
    )
    assert [(one["name"], one["alias"]) for one in await api.get("loras")] == [("oil", "oil")]


async def test_another_vae_is_listed_told_and_may_be_asked_for(api: Client, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(vae=("taesd", "ab" * 32))
    listed = await api.get("sd-vae")
    assert [one["model_name"] for one in listed] == ["taesd"]
    for name in ("taesd", "Automatic"):
        answer = await api.post("txt2img", prompt="a", override_settings={"sd_vae": name})
        info = json.loads(answer["info"])
        assert (info["sd_vae_name"], info["sd_vae_hash"]) == ("taesd", "ababababab")
    assert "sd_vae: 'other' is not supported: an engine has its VAE inside" in await api.refused(
        "txt2img", 422, prompt="a", override_settings={"sd_vae": "other"}
    )


@pytest.mark.parametrize("name", ["loras", "sd-vae", "hypernetworks", "face-restorers"])
async def test_what_is_not_here_is_an_empty_list(api: Client, name: str) -> None:
    assert await api.get(name) == []


async def test_what_else_is_asked(api: Client, http: httpx.AsyncClient) -> None:
    assert (await http.get("/internal/ping")).json() == {}
    assert await api.get("scripts") == {"txt2img": [], "img2img": []}
    assert await api.get("embeddings") == {"loaded": {}, "skipped": {}}
    assert (await api.get("cmd-flags"))["api"] is True
    assert (await api.get("memory")).keys() == {"ram", "cuda"}
    assert await api.post("refresh-checkpoints") is None
    assert "unload-checkpoint is not supported" in await api.refused("unload-checkpoint", 501)
    assert "with enable_hr only" in await api.refused("extra-single-image", 501)


async def test_the_embeddings_are_those_of_the_engine_that_is_drawn_with(
    api: Client, studio: FakeStudio
) -> None:
    other = replace(engine("other"), embeddings={"EasyNegative": 8, "<toy>": 1}, text_width=768)
    studio.engines["other"] = other
    assert (await api.get("embeddings"))["loaded"] == {}
    await api.post("options", sd_model_checkpoint="other")
    untold = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 768}
    loaded = {"EasyNegative": {**untold, "vectors": 8}, "<toy>": {**untold, "vectors": 1}}
    assert await api.get("embeddings") == {"loaded": loaded, "skipped": {}}


async def test_a_picture_tells_how_it_was_made(api: Client) -> None:
    text = (
        "a boat\nNegative prompt: fog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x96, Odd: 1"
    )
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    info.add_text("Software", "a painter")
    told = await api.post("png-info", image=coded(RED, pnginfo=info))
    assert told["info"] == text and told["items"] == {"Software": "a painter"}
    read = told["parameters"]
    assert (read["Prompt"], read["Negative prompt"], read["Seed"]) == ("a boat", "fog", "5")
    assert (read["Size-1"], read["Size-2"], read["Odd"]) == ("64", "96", "1")
    odd = PngImagePlugin.PngInfo()
    odd.add_text("parameters", "a boat\nSteps: many, Size: large, Seed: 5")
    read = (await api.post("png-info", image=coded(RED, pnginfo=odd)))["parameters"]
    assert (read["Prompt"], read["Steps"], read["Size"]) == ("a boat", "many", "large")
    assert await api.post("png-info", image=coded(RED)) == {"info": "", "items": {}, "parameters": {}}


async def test_a_jpeg_tells_too(api: Client, http: httpx.AsyncClient) -> None:
    body = {"prompt": "a boat", "seed": 5, "output_format": "jpeg"}
    [picture] = (await http.post("/v1/images/generations", json=body)).json()["data"]
    told = await api.post("png-info", image=picture["b64_json"])
    assert told["parameters"]["Prompt"] == "a boat" and told["parameters"]["Seed"] == "5"


async def begun(api: Client, studio: FakeStudio) -> dict[str, Any]:
    """The progress, once a step was done."""
    for _ in range(500):
        told: dict[str, Any] = await api.get("progress?skip_current_image=true")
        if told["state"]["sampling_step"]:
            return told
        await asyncio.sleep(0.005)
    raise AssertionError("no step was done")


async def test_progress_while_nothing_is_under_way(api: Client) -> None:
    told = await api.get("progress")
    assert told.keys() == {"progress", "eta_relative", "state", "current_image", "textinfo"}
    assert told["progress"] == 0 and told["state"]["job_count"] == 0
    await api.post("txt2img")
    again = await api.get("progress")
    assert again["progress"] == 0 and again["state"].keys() == told["state"].keys()
    assert (again["state"]["job_count"], again["state"]["job"]) == (0, "")


async def test_progress_of_a_call(api: Client, http: httpx.AsyncClient, studio: FakeStudio) -> None:
    studio.steps, studio.seconds = 20, 0.02
    call = asyncio.create_task(api.post("txt2img", steps=40, seed=9, force_task_id="mine"))
    told = await begun(api, studio)
    assert studio.asked == set() and told["current_image"] is None  # whoever does not look costs nothing
    state = told["state"]
    assert (state["job_count"], state["job"], state["sampling_steps"]) == (1, "scripts_txt2img", 40)
    assert 0 < told["progress"] < 1 and told["eta_relative"] > 0
    assert state["sampling_step"] == pytest.approx(40 * told["progress"])
    images = [(await api.get("progress"))["current_image"]]
    while images[-1] is None:
        await asyncio.sleep(0.01)
        images.append((await api.get("progress"))["current_image"])
    assert opened(images[-1]).getpixel((0, 0)) == (9, 0, 99)
    mine, other = [await _task(http, task) for task in ("mine", "theirs")]
    assert (mine["active"], mine["completed"]) == (True, False) and mine["live_preview"].startswith("data:")
    assert (other["active"], other["queued"], other["completed"]) == (False, False, False)
    await call
    assert (await _task(http, "mine"))["completed"] is True


async def _task(http: httpx.AsyncClient, task: str) -> dict[str, Any]:
    answer = await http.post("/internal/progress", json={"id_task": task, "live_preview": True})
    told: dict[str, Any] = answer.json()
    return told


async def test_an_interrupted_call_gives_what_it_has(api: Client, studio: FakeStudio) -> None:
    studio.steps, studio.seconds = 500, 0.02
    running = [asyncio.create_task(api.post("txt2img", seed=seed)) for seed in (1, 2)]
    await begun(api, studio)
    assert await api.post("interrupt") == {}
    told = await asyncio.wait_for(asyncio.gather(*running), 5)
    assert [opened(answer["images"][0]).getpixel((0, 0))[0] for answer in told] == [1, 2]
    assert json.loads(told[0]["info"])["infotexts"] == [""]
    assert sorted(studio.cancelled) == sorted(job.id for job in studio.jobs)
    idle = await api.get("progress")
    assert idle["state"]["interrupted"] is True and idle["state"]["job_count"] == 0
    assert idle["progress"] == 0


async def test_an_interrupted_call_that_waits_gives_nothing(api: Client, studio: FakeStudio) -> None:
    studio.hang = True
    call = asyncio.create_task(api.post("txt2img"))
    while not studio.live:
        await asyncio.sleep(0.005)
    assert (await api.get("progress"))["state"]["job_count"] == 1
    await api.post("interrupt")
    told = await asyncio.wait_for(call, 5)
    assert told["images"] == [] and json.loads(told["info"])["infotexts"] == []
    assert studio.live == {}


async def test_an_interrupted_call_does_not_wait_for_a_picture_forever(
    api: Client, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "PATIENCE", 0.05)
    monkeypatch.setattr(studio, "preview", lambda job_id: True)  # and never sends one
    studio.steps, studio.seconds = 500, 0.02
    call = asyncio.create_task(api.post("txt2img"))
    await begun(api, studio)
    await api.post("interrupt")
    assert (await asyncio.wait_for(call, 5))["images"] == []


async def test_to_skip_is_to_end_the_first_call(api: Client, studio: FakeStudio) -> None:
    studio.steps, studio.seconds = 30, 0.02
    first = asyncio.create_task(api.post("txt2img", seed=1))
    await begun(api, studio)
    second = asyncio.create_task(api.post("txt2img", seed=2))
    await api.post("skip")
    assert json.loads((await first)["info"])["infotexts"] == [""]
    assert json.loads((await second)["info"])["infotexts"] != [""]
    assert studio.cancelled == [studio.jobs[0].id]


async def test_a_client_that_leaves_ends_its_call(api: Client, studio: FakeStudio) -> None:
    studio.hang = True
    call = asyncio.create_task(api.post("txt2img"))
    while not studio.live:
        await asyncio.sleep(0.005)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert studio.live == {} and (await api.get("progress"))["state"]["job_count"] == 0


async def test_calls_of_other_interfaces_are_not_ended(
    api: Client, http: httpx.AsyncClient, studio: FakeStudio
) -> None:
    studio.steps, studio.seconds = 10, 0.02
    other = asyncio.create_task(http.post("/v1/images/generations", json={"prompt": "a"}))
    while not studio.live:
        await asyncio.sleep(0.005)
    assert (await api.get("progress"))["state"]["job_count"] == 0
    await api.post("interrupt")
    assert (await other).status_code == 200
