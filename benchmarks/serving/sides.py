"""The sides as processes."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

STARTING = 120.0  # seconds


@contextmanager
def served(side: str, folder: Path, checkpoint: str, rows: int | None, log: Path) -> Iterator[str]:
    """The URL of a side that is ready. rows: the most that it draws together; None: its own number. log:
    where it writes one."""
    port = _free_port()
    given = [side, str(folder), checkpoint, str(port), *([] if rows is None else [str(rows)])]
    command = [sys.executable, "-m", "benchmarks.serving.server", *given]
    with log.open("w") as told, subprocess.Popen(command, stderr=told, stdout=told) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, process, log)
            yield url
        finally:
            process.terminate()


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + STARTING
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:  # it does not listen yet
            pass
        time.sleep(0.1)
    raise RuntimeError(f"a side did not become ready; its log: {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
