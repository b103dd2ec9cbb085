"""The CUDA driver is asked for its version, in its own words."""

import subprocess
from pathlib import Path

import pytest

from sdfast.backends.target import driver_version
from sdfast.errors import BackendError


def library(place: Path, source: str) -> str:
    """A shared library of some C."""
    path = place / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", path]
    subprocess.run(command, input=source, text=True, check=True)
    return str(path)


def test_the_driver_tells_its_version(tmp_path: Path) -> None:
    answers = library(tmp_path, "int cuDriverGetVersion(int *version) { *version = 13010; return 0; }")
    assert driver_version(answers) == 13010


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int cuDriverGetVersion(int *version) { return 999; }", r"error 999.*nvidia-smi"),
        ("int cuInit(unsigned flags) { return 0; }", "cannot be asked for its version: .*cuDriverGetVersion"),
    ],
)
def test_a_driver_that_fails_is_told(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        driver_version(library(tmp_path, source))


def test_no_driver_is_told() -> None:
    with pytest.raises(BackendError, match=r"cannot be asked for its version: .*no-such\.so"):
        driver_version("no-such.so")
