"""The kernels' numbers, by Triton's interpreter on the processor.

Whether a kernel is interpreted is decided when Triton is imported, for all of a process. So the tests are in
files of their own under `interpreted/`, run here in one process that interprets. To run one by hand:
TRITON_INTERPRET=1 pytest tests/kernels/interpreted/group_norm.py (the slow ones: -m slow)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86_64")

NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": ""}
FOLDER = Path(__file__).with_name("interpreted")


def test_in_the_interpreter() -> None:
    files = sorted(map(str, FOLDER.glob("[a-z]*.py")))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", **NO_PLUGINS},
        cwd=FOLDER.parents[2],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(files) == 4 and "skipped" not in result.stdout
