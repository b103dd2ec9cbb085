"""`sdfast serve` from the engine's directory to the picture: the whole way, in a process of its own."""

import base64
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from sdfast.errors import BackendError, EngineError, NumericalError, RequestError
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server import studio as studio_module
from sdfast.server.jobs import Done, Job
from sdfast.server.studio import LocalStudio, warm_up
from tests.fakes import Failpoint, FakeEngine

CALL: dict[str, Any] = {"num_inference_steps": 3, "scheduler": "Euler a", "guidance_scale": 7.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process, and its address. What still runs at the end is killed."""
    port = free_port()
    code = "from sdfast.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", *map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def wait_for(url: str, status: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if httpx.get(url).status_code == status:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} did not answer {status} in {seconds} s")


def test_a_picture_served_is_the_pipelines_and_a_signal_ends_it(sd_engine: Path) -> None:
    with serving(sd_engine) as (process, url):
        wait_for(f"{url}/health/live", 200)
        wait_for(f"{url}/health/ready", 200)
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
        extra = {**CALL, "seed": 11}
        answer = client.images.generate(prompt="the sea", n=2, size="64x64", extra_body=extra)
        pictures = [Image.open(BytesIO(base64.b64decode(one.b64_json or ""))) for one in answer.data or ()]
        expected = Pipeline.from_engine(sd_engine)(
            "the sea", seed=11, num_images_per_prompt=2, height=64, width=64, **CALL
        ).images
        for picture, due in zip(pictures, expected, strict=True):
            assert np.abs(np.asarray(picture, int) - np.asarray(due, int)).max() <= 1
        assert "Seed: 12" in pictures[1].info["parameters"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("damage", ["verified", "drawn"])
def test_an_engine_that_cannot_draw_ends_the_server_with_the_reason(
    sd_engine: Path, tmp_path: Path, damage: str
) -> None:
    engine = Path(shutil.copytree(sd_engine, tmp_path / "engine"))
    weights = engine / "unet.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    if damage == "drawn":
        from tests.sealing import reseal

        weights.write_bytes(b"nothing")
        reseal(engine, lambda document: None)
    with serving(engine) as (process, _):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert {"verified": f"Error: {weights}: digest", "drawn": "Error: unet.safetensors"}[damage] in stderr


def test_no_engine_is_refused_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "none") as (process, _):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith(f"Error: {tmp_path / 'none'}: no such engine")


def job(engine: str, **fields: Any) -> Job:
    asked: dict[str, Any] = {"prompts": ("the sea",), "negative_prompts": (None,), "height": 64, "width": 64}
    return Job("1", engine, Request.make(**{**asked, **CALL, "seed": 3, **fields}))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_studio_runs_several_engines(sd_engine: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sd_engine, tmp_path / "other"))
    from tests.sealing import reseal

    reseal(other, lambda document: document.update(name="other"))
    studio = LocalStudio([sd_engine, other], max_rows=2, max_queue=2)
    assert not studio.ready
    with pytest.raises(BackendError, match="'other' is not ready yet"):
        studio.submit(job("other"))
    studio.open()
    try:
        assert studio.ready and set(studio.engines) == {"sd", "other"}
        assert studio.engines["sd"].sizes == ("64..128x64..128",)
        for name in studio.engines:
            events = [event async for event in studio.submit(job(name))]
            assert isinstance(events[-1], Done) and len(events[-1].pngs) == 1
        with pytest.raises(RequestError, match="'third' is not here; there are: sd, other"):
            studio.submit(job("third"))
        with pytest.raises(RequestError, match="is not one of this engine's"):
            studio.submit(job("sd", height=256, width=256))
        assert not studio.cancel("of another time")
        assert (studio.waiting(), studio.running()) == (0, 0)
    finally:
        studio.close()
    assert not studio.ready


def test_two_engines_of_one_name_are_refused(sd_engine: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sd_engine, tmp_path / "elsewhere"))
    with pytest.raises(EngineError, match=r"has the name 'sd' too; rename one"):
        LocalStudio([sd_engine, other])


def test_warming_up_draws_every_size_and_tells_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdfast.manifest import Span

    sizes = [(Span.exactly(16), Span.exactly(16)), (Span.exactly(24), Span.exactly(16))]
    engine = FakeEngine(sizes=sizes)
    warm_up(engine)
    assert len(engine.calls["vae_decoder"]) == 2
    engine.failpoints["unet"] = Failpoint("nan")
    with pytest.raises(NumericalError, match="engine 'fake' cannot draw: the latents are not finite"):
        warm_up(engine)
    assert studio_module.WARM_UP_STEPS >= 2  # on CUDA the second step is the first of a graph
