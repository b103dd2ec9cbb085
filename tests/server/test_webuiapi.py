"""`webuiapi`, unmodified, against a server on a real socket."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import webuiapi
from PIL import Image

from sdfast import infotext
from tests.server.conftest import KEY
from tests.server.studio import FakeStudio, engine
from tests.server.test_live import served, wait_until


@pytest.fixture
def api(studio: FakeStudio) -> Iterator[webuiapi.WebUIApi]:
    with served(studio) as port:
        client = webuiapi.WebUIApi(port=port, username="anyone", password=KEY)
        yield client
        client.session.close()


SIZE = {"width": 64, "height": 64}


def test_a_picture(api: webuiapi.WebUIApi, studio: FakeStudio) -> None:
    told = api.txt2img(prompt="a boat", negative_prompt="fog", seed=5, batch_size=2, cfg_scale=6, **SIZE)
    assert [image.getpixel((0, 0)) for image in told.images] == [(5, 0, 99), (6, 0, 99)]
    assert infotext.parse(told.image.info["parameters"]).seed == 5
    assert told.info["all_seeds"] == [5, 6] and told.info["sampler_name"] == "Euler a"
    assert told.parameters["cfg_scale"] == 6 and told.parameters["steps"] == 20
    assert studio.jobs[0].request.negative_prompts == ("fog",)


def test_an_image_drawn_over(api: webuiapi.WebUIApi, studio: FakeStudio) -> None:
    image, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    told = api.img2img(images=[image], prompt="a boat", seed=5, denoising_strength=0.5, **SIZE)
    assert told.image.size == (64, 64) and told.info["denoising_strength"] == 0.5
    told = api.img2img(
        images=[image],
        mask_image=mask,
        mask_blur=2,
        inpainting_fill=1,
        inpaint_full_res=False,
        seed=5,
        **SIZE,
    )
    assert (told.image.getpixel((4, 4)), told.image.getpixel((60, 4))) == ((5, 0, 99), (255, 0, 0))
    assert studio.jobs[1].mask is not None
    told = api.img2img(images=[image], mask_image=mask, mask_blur=2, inpainting_fill=1, seed=5, **SIZE)
    assert told.image.size == (32, 32)  # the client's own default is to draw the masked part alone
    assert (told.image.getpixel((4, 4)), told.image.getpixel((30, 4))) == ((5, 0, 99), (255, 0, 0))
    assert studio.jobs[2].request.padding_mask_crop == 0
    told = api.img2img(images=[image], mask_image=mask, seed=5, **SIZE)  # and to fill it before
    assert (told.image.getpixel((2, 4)), told.image.getpixel((31, 4))) == ((5, 0, 99), (255, 0, 0))
    assert studio.jobs[3].request.masked_content == "fill"
    assert told.info["extra_generation_params"]["Masked content"] == "fill"


def test_a_control_image(api: webuiapi.WebUIApi, studio: FakeStudio) -> None:
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]",))
    [model] = api.controlnet_model_list()
    assert (model, api.controlnet_module_list()) == ("canny [01234567]", ["none"])
    image = Image.new("RGB", (32, 32), "red")

    def call(**unit: Any) -> dict[str, Any]:
        """With scripts of its own, which the client would else keep for its next calls."""
        units = [webuiapi.ControlNetUnit(image=image, **unit)]
        return {"controlnet_units": units, "alwayson_scripts": {}, **SIZE}

    api.txt2img(**call(model=model, weight=0.5))
    api.img2img(images=[image], **call())
    assert [job.control for job in studio.jobs] == [Image.new("RGB", (64, 64), "red").tobytes()] * 2
    assert [job.request.controlnet_conditioning_scale for job in studio.jobs] == [0.5, 1.0]
    with pytest.raises(RuntimeError, match="there are no detectors here"):
        api.txt2img(**call(module="canny"))


def test_what_is_refused_is_raised(api: webuiapi.WebUIApi) -> None:
    with pytest.raises(RuntimeError, match="tiling: is not supported") as caught:
        api.txt2img(tiling=True, **SIZE)
    assert caught.value.args[0] == 422
    with pytest.raises(RuntimeError, match="Sampler not found") as caught:
        api.txt2img(sampler_name="Eulr", **SIZE)
    assert caught.value.args[0] == 404
    with pytest.raises(RuntimeError, match="64x64, 96x64"):
        api.txt2img()  # of 512x512, which the client sends where nothing is said
    api.session.auth = ("anyone", "wrong")
    with pytest.raises(RuntimeError, match="invalid_api_key"):
        api.txt2img(**SIZE)


def test_lists_and_options(api: webuiapi.WebUIApi, studio: FakeStudio) -> None:
    studio.engines["other"] = engine("other")
    assert {"Euler a", "DPM++ 2M"} < set(api.util_get_sampler_names())
    assert {"automatic", "karras"} < set(api.util_get_scheduler_names())
    assert [item["name"] for item in api.get_upscalers()] == ["Lanczos", "Nearest", "None"]
    for name in ("sd_vae", "loras", "hypernetworks", "face_restorers"):
        assert getattr(api, f"get_{name}")() == []
    for name in ("cmd_flags", "scripts", "embeddings", "memory"):
        assert isinstance(getattr(api, f"get_{name}")(), dict)
    for name in ("realesrgan_models", "prompt_styles"):
        assert getattr(api, f"get_{name}")() == []
    assert api.refresh_checkpoints() is None
    assert api.util_get_current_model().startswith("tiny [")
    api.util_set_model("other")
    assert api.util_get_current_model().startswith("other [")
    api.txt2img(**SIZE)
    assert studio.jobs[0].engine == "other"


def test_a_second_pass(api: webuiapi.WebUIApi, studio: FakeStudio) -> None:
    modes = [item["name"] for item in api.get_latent_upscale_modes()]
    assert set(modes) == {one.value for one in webuiapi.HiResUpscaler if one.value.startswith("Latent")}
    api.txt2img(enable_hr=True, hr_scale=1, hr_upscaler=webuiapi.HiResUpscaler.LatentBicubic, **SIZE)
    hires = studio.jobs[0].request.hires
    assert hires is not None and (hires.upscaler, hires.width) == ("latent_bicubic", 64)


def test_png_info(api: webuiapi.WebUIApi) -> None:
    picture = api.txt2img(prompt="a boat", seed=5, **SIZE).image
    assert infotext.parse(api.png_info(picture).info).prompt == "a boat"


def test_interrupt_from_beside(api: webuiapi.WebUIApi, studio: FakeStudio) -> None:
    studio.steps, studio.seconds = 500, 0.02
    told: list[webuiapi.WebUIApiResult] = []
    call = threading.Thread(target=lambda: told.append(api.txt2img(seed=5, **SIZE)))
    call.start()
    beside = webuiapi.WebUIApi(baseurl=api.baseurl, username="anyone", password=KEY)
    wait_until(lambda: beside.get_progress()["state"]["sampling_step"] > 0)
    wait_until(lambda: beside.get_progress()["current_image"])
    assert beside.interrupt() == {}
    call.join(5)
    assert told[0].image.getpixel((0, 0)) == (5, 0, 99)
    begun = time.monotonic()
    beside.util_wait_for_ready(check_interval=0.05)
    assert time.monotonic() - begun < 2
    assert beside.get_progress()["state"]["interrupted"] is True
    assert beside.skip() == {}  # there is nothing to skip, which is no error
    beside.session.close()


def test_a_full_queue_says_when_to_come_again(api: webuiapi.WebUIApi, studio: FakeStudio) -> None:
    studio.full = True
    answer = requests.post(f"{api.baseurl}/txt2img", json={}, auth=("anyone", KEY), timeout=5)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
