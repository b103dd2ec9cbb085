"""Images of IP-Adapters in the interfaces of the server, which an engine of a `FakeStudio` has."""

from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from sdfast.image_processor import prepared
from sdfast.manifest import ImageProcessor
from tests.server.conftest import problem
from tests.server.studio import FakeStudio, engine
from tests.server.test_automatic1111 import Client, units
from tests.server.test_edits import png
from tests.server.test_openai import NOISE, coded

pytestmark = pytest.mark.anyio

PROCESSOR = ImageProcessor(resize=12, crop=10)
STYLE, FACE = "style [01234567]", "face-plus [89abcdef]"
BLUE = Image.new("RGB", (40, 30), "blue")


def ready(image: Image.Image) -> bytes:
    return prepared(image, PROCESSOR).tobytes()


BLACK = bytes(10 * 10 * 3)


@pytest.fixture
def adapted(studio: FakeStudio) -> FakeStudio:
    """Its engine has two IP-Adapters."""
    studio.engines["tiny"] = replace(engine(), ip_adapters=(STYLE, FACE), image_processor=PROCESSOR)
    return studio


async def test_images_reach_the_engine_made_ready(
    post: Any, http: httpx.AsyncClient, adapted: FakeStudio
) -> None:
    both = {"prompt": "a", "ip_adapter_image": [coded(NOISE), f"data:image/png;base64,{coded(BLUE)}"]}
    scale = {"up": {"block_0": [0, 1.0]}, "mid": 0.5}
    for more in ({}, {"ip_adapter_scale": [0.5, scale]}, {"ip_adapter_image": [None, coded(BLUE)]}):
        assert (await post({**both, **more})).status_code == 200
    assert (await post({"prompt": "a"})).status_code == 200
    first, second, third, last = adapted.jobs
    assert first.ip_adapter == second.ip_adapter == ready(NOISE) + ready(BLUE)
    assert third.ip_adapter == BLACK + ready(BLUE)
    scales = [job.request.ip_adapter_scale for job in adapted.jobs]
    assert scales == [1.0, (0.5, {"up": {"block_0": (0.0, 1.0)}, "mid": 0.5}), (0.0, 1.0), None]
    assert last.ip_adapter is None
    [told] = (await http.get("/v1/models")).json()["data"]
    assert told["ip_adapters"] == [STYLE, FACE]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"ip_adapter_image": coded(NOISE)}, "ip_adapter_image", "1 were sent, but tiny has 2 IP-Adapters"),
        ({"ip_adapter_image": [None, None]}, "ip_adapter_image", "0 were sent"),
        ({"ip_adapter_image": [None, "R0lGODlh"]}, "ip_adapter_image", "no PNG, JPEG or WebP"),
        (
            {"ip_adapter_image": [None, "file:///etc/passwd"]},
            "ip_adapter_image",
            "the server fetches nothing",
        ),
        (
            {"ip_adapter_image": [None, coded(Image.new("RGB", (2, 3000)))]},
            "ip_adapter_image",
            "2x3000 is too long for its width",
        ),
        (
            {"ip_adapter_image": [coded(NOISE)] * 2, "ip_adapter_scale": -1},
            "ip_adapter_scale",
            "greater than or equal to 0",
        ),
        (
            {"ip_adapter_image": [coded(NOISE)] * 2, "ip_adapter_scale": {"across": 1}},
            "ip_adapter_scale",
            "must be 'down', 'mid' or 'up'",
        ),
    ],
)
async def test_a_wrong_image_is_named(
    post: Any, adapted: FakeStudio, fields: dict[str, Any], param: str, told: str
) -> None:
    assert told in problem(await post({"prompt": "a", **fields}), 422, param)["message"]
    assert adapted.jobs == []


async def test_engines_with_an_adapter_are_named(post: Any, adapted: FakeStudio) -> None:
    adapted.engines["plain"] = engine("plain")
    answer = await post({"prompt": "a", "model": "plain", "ip_adapter_image": "x"})
    message = problem(answer, 422, "ip_adapter_image")["message"]
    assert "plain has no IP-Adapter" in message and "here have: tiny" in message


async def test_edits_take_the_images_as_files(http: httpx.AsyncClient, adapted: FakeStudio) -> None:
    given = [("image", png(NOISE)), ("ip_adapter_image", png(NOISE)), ("ip_adapter_image", png(BLUE))]
    files = [(name, ("a.png", data)) for name, data in given]
    texts = {"prompt": "a", "ip_adapter_scale": '[0.25, {"down": [1.0, 0.5]}]'}
    assert (await http.post("/v1/images/edits", data=texts, files=files)).status_code == 200
    off = [*files[:2], ("ip_adapter_image", ("none", b""))]
    assert (await http.post("/v1/images/edits", data={"prompt": "a"}, files=off)).status_code == 200
    both, one = adapted.jobs
    assert (both.ip_adapter, one.ip_adapter) == (ready(NOISE) + ready(BLUE), ready(NOISE) + BLACK)
    assert both.request.ip_adapter_scale == (0.25, {"down": (1.0, 0.5)})
    assert one.request.ip_adapter_scale == (1.0, 0.0)
    told = problem(await http.post("/v1/images/edits", data=texts, files=files[:2]), 422, "ip_adapter_image")
    assert "1 were sent, but tiny has 2 IP-Adapters" in told["message"]
    text = {"prompt": "a", "ip_adapter_image": "http://169.254.169.254/"}
    told = problem(await http.post("/v1/images/edits", data=text, files=files[:1]), 422, "ip_adapter_image")
    assert "must be a file, with a filename" in told["message"]


UNIT = {"image": coded(BLUE), "model": FACE, "weight": 0.5}


async def test_units_that_name_an_adapter_have_its_image(
    http: httpx.AsyncClient, adapted: FakeStudio
) -> None:
    api = Client(http)
    await api.post("txt2img", **units(UNIT))
    style = {"model": "style", "module": "ip-adapter_clip_sd15", "image": coded(NOISE), "resize_mode": 2}
    await api.post("img2img", init_images=[coded(NOISE)], **units(UNIT | {"enabled": False}, style))
    await api.post("txt2img", **units(UNIT, style | {"module": "ip-adapter-auto", "guidance_end": 1}))
    await api.post("txt2img")
    images = [job.ip_adapter for job in adapted.jobs]
    assert images == [BLACK + ready(BLUE), ready(NOISE) + BLACK, ready(NOISE) + ready(BLUE), None]
    scales = [job.request.ip_adapter_scale for job in adapted.jobs]
    assert scales == [(0.0, 0.5), (1.0, 0.0), (1.0, 0.5), None]
    assert all(job.control is None for job in adapted.jobs)
    assert (await http.get("/controlnet/model_list")).json() == {"model_list": [STYLE, FACE]}
    assert (await http.get("/controlnet/settings")).json() == {"control_net_unit_count": 2}


async def test_units_of_both_kinds_go_together(http: httpx.AsyncClient, adapted: FakeStudio) -> None:
    canny = "canny [aaaaaaaa]"
    adapted.engines["tiny"] = replace(adapted.engines["tiny"], controlnets=(canny,))
    await Client(http).post("txt2img", **units(UNIT, {"image": coded(NOISE), "model": canny}))
    [job] = adapted.jobs
    assert (job.ip_adapter, job.control) == (BLACK + ready(BLUE), NOISE.tobytes())
    assert job.request.controlnet_conditioning_scale == 1.0
    assert "draws every picture under" in await Client(http).refused("txt2img", 422, **units(UNIT))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([UNIT, UNIT], "has several units; an IP-Adapter has one image"),
        ([UNIT | {"image": None}], "image: is missing"),
        ([UNIT | {"module": "ip-adapter_face_id"}], "an IP-Adapter sees the image itself; take none"),
        ([UNIT | {"guidance_start": 0.2}], "an IP-Adapter's image counts in all steps"),
        ([UNIT | {"control_mode": 1}], "control_mode: an IP-Adapter has one weight for all layers"),
        ([UNIT | {"advanced_weighting": [1.0]}], "control_mode: an IP-Adapter has one weight for all layers"),
        ([UNIT | {"image": "R0lGODlh"}], "no PNG, JPEG or WebP"),
        ([UNIT | {"weight": 3}], "weight: must be less than or equal to 2"),
        ([UNIT | {"model": "canny"}], f"model: tiny has {STYLE}, {FACE}, and no other (got 'canny')"),
    ],
)
async def test_a_wrong_unit_is_named(
    http: httpx.AsyncClient, adapted: FakeStudio, given: list[dict[str, Any]], told: str
) -> None:
    assert told in await Client(http).refused("txt2img", 422, **units(*given))
    assert adapted.jobs == []
