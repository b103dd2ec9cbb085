"""`sdfast serve` from the engine's directory to the picture: the whole way, in a process of its own."""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from sdfast.errors import EngineError, NumericalError
from sdfast.manifest import Span
from sdfast.pipeline import Pipeline
from sdfast.server.settings import Settings
from sdfast.server.studio import WorkerStudio
from sdfast.server.worker import opening
from sdfast.server.worker.opening import warm_up
from tests.fakes import Failpoint, FakeEngine
from tests.sealing import reseal
from tests.server.house import alive, children_of, until

CALL: dict[str, Any] = {"num_inference_steps": 3, "scheduler": "Euler a", "guidance_scale": 7.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(*arguments: object, log: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process, and its address. What still runs at the end is killed."""
    port = free_port()
    code = "from sdfast.cli import main; main()"
    with started("-c", code, "serve", *arguments, "--port", port, log=log) as process:
        yield process, f"http://127.0.0.1:{port}"


@contextmanager
def serving_by(engine: Path, worker: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server whose workers are a line of Python, and its address."""
    port = free_port()
    with started("-m", "tests.server.serving_worker", engine, port, sys.executable, "-c", worker) as process:
        yield process, f"http://127.0.0.1:{port}"


@contextmanager
def started(*arguments: object, log: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """Python in a session of its own. log: where its stderr goes; a pipe that is not read holds 64 KiB."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(url: str, status: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    with httpx.Client() as client:  # one for all: each reads the certificates of all authorities
        while time.monotonic() < until:
            try:
                if client.get(url).status_code == status:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
    raise AssertionError(f"{url} did not answer {status} in {seconds} s")


@pytest.fixture
def onnx(flat_onnx: Path, tmp_path: Path) -> Path:
    """A tiny ONNX engine of a test's own: its workers start in a third of the time of an eager one's, which
    import transformers."""
    return named("sd", flat_onnx, tmp_path)


def named(name: str, engine: Path, place: Path) -> Path:
    """A copy of an engine, of that name."""
    copy = Path(shutil.copytree(engine, place / name))
    reseal(copy, lambda document: document.update(name=name))
    return copy


def test_a_picture_served_is_the_pipelines_and_a_signal_ends_it(onnx: Path) -> None:
    with serving(onnx) as (process, url):
        wait_for(f"{url}/health/live", 200)
        wait_for(f"{url}/health/ready", 200)
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
        extra = {**CALL, "seed": 11}
        answer = client.images.generate(prompt="the sea", n=2, size="16x16", extra_body=extra)
        pictures = [Image.open(BytesIO(base64.b64decode(one.b64_json or ""))) for one in answer.data or ()]
        expected = Pipeline.from_engine(onnx)(
            "the sea", seed=11, num_images_per_prompt=2, height=16, width=16, **CALL
        ).images
        for picture, due in zip(pictures, expected, strict=True):
            assert np.abs(np.asarray(picture, int) - np.asarray(due, int)).max() <= 1
        assert "Seed: 12" in pictures[1].info["parameters"]
        for stream in (False, True):  # an LCM is distilled for so many steps: the worker knows
            with pytest.raises(openai.UnprocessableEntityError, match="original_inference_steps") as caught:
                client.images.generate(
                    prompt="the sea",
                    stream=stream,
                    extra_body={"scheduler": "lcm", "num_inference_steps": 60},
                )
            assert caught.value.code == "invalid_value"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("damage", [pytest.param("verified", marks=pytest.mark.slow), "drawn"])
def test_an_engine_that_cannot_draw_ends_the_server_with_the_reason(onnx: Path, damage: str) -> None:
    weights = onnx / "unet.onnx.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    if damage == "drawn":
        weights.write_bytes(b"nothing")
        reseal(onnx, lambda document: None)
    with serving(onnx) as (process, _):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert {"verified": f"Error: {weights}: digest", "drawn": "Error: unet.onnx: ONNX Runtime"}[
        damage
    ] in stderr


def test_no_engine_is_refused_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "none") as (process, _):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith(f"Error: {tmp_path / 'none'}: no such engine")


def test_two_engines_are_served_at_once_survive_a_fault_and_finish_what_runs(
    onnx: Path, tmp_path: Path
) -> None:
    other = named("other", onnx, tmp_path)
    with serving(onnx, other) as (process, url), ThreadPoolExecutor() as pool:
        wait_for(f"{url}/health/ready", 200)

        def draw(model: str, steps: int) -> httpx.Response:
            body = {"prompt": "a", "model": model, "size": "16x16", **CALL, "num_inference_steps": steps}
            return httpx.post(f"{url}/v1/images/generations", json=body, timeout=30)

        failing, untouched = pool.submit(draw, "sd", 900), pool.submit(draw, "other", 600)
        until(lambda: running_rows(url) == {"sd": 1, "other": 1})
        killed = time.monotonic()
        os.kill(worker_of(process.pid, onnx), signal.SIGKILL)
        failed = failing.result()
        assert time.monotonic() - killed < 1
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_error")
        assert "signal 9" in failed.json()["error"]["message"]
        refused = draw("sd", 3)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert untouched.result().status_code == 200
        wait_for(f"{url}/health/ready", 200)
        numbers = httpx.get(f"{url}/metrics").text
        assert 'sdfast_worker_restarts_total{engine="sd"} 1.0' in numbers
        assert 'sdfast_worker_restarts_total{engine="other"} 0.0' in numbers

        running = [pool.submit(draw, name, 600) for name in ("sd", "other")]
        until(lambda: running_rows(url) == {"sd": 1, "other": 1})
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        wait_for(f"{url}/health/ready", 503)
        assert [one.result().status_code for one in running] == [200, 200]
        assert process.wait(30) == 0


def worker_of(server: int, engine: Path) -> int:
    [pid] = [
        pid
        for pid in children_of(server)
        if str(engine) in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    ]
    return pid


def running_rows(url: str) -> dict[str, float]:
    metrics = httpx.get(f"{url}/metrics", verify=False).text
    found = re.findall(r'^sdfast_running_rows{engine="(.*)"} (.*)$', metrics, re.M)
    return {name: float(rows) for name, rows in found}


def test_a_server_whose_workers_only_fail_says_why_and_ends(sd_engine: Path) -> None:
    with serving_by(sd_engine, "import os; os._exit(9)") as (process, url):
        wait_for(f"{url}/health/live", 200)
        assert httpx.get(f"{url}/health/ready").status_code == 503
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Error: engine 'sd' was given up: 3 of its processes" in stderr
    assert "exit status 9" in stderr


def test_a_worker_that_hangs_goes_with_its_server(sd_engine: Path, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    worker = (
        "import ctypes, pathlib; from sdfast.server.worker import leash; leash.put_on(); "
        f"pathlib.Path({str(hangs)!r}).touch(); ctypes.PyDLL(None).pause()"  # which holds Python's lock
    )
    with serving_by(sd_engine, worker) as (process, _):
        until(hangs.exists)
        [pid] = children_of(process.pid)
        process.kill()
        until(lambda: not alive(pid), 1)


def test_two_engines_of_one_name_are_refused(sd_engine: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sd_engine, tmp_path / "elsewhere"))
    with pytest.raises(EngineError, match=r"has the name 'sd' too; rename one"):
        WorkerStudio.of([sd_engine, other], Settings.make())


def test_warming_up_draws_every_size_and_tells_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(Span.exactly(16), Span.exactly(16)), (Span.exactly(24), Span.exactly(16))]
    engine = FakeEngine(sizes=sizes)
    warm_up(engine)
    assert len(engine.calls["vae_decoder"]) == 2
    engine.failpoints["unet"] = Failpoint("nan")
    with pytest.raises(NumericalError, match="engine 'fake' cannot draw: the latents are not finite"):
        warm_up(engine)
    assert opening.WARM_UP_STEPS >= 2  # on CUDA the second step is the first of a graph
