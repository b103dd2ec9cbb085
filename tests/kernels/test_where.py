"""Where the kernels can run, and what importing them costs."""

import builtins
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from sdfast.kernels import why_none
from tests.test_imports import loaded_by

CUDA = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of compute capability 7.5 with Triton, as far as anybody asks; tests change it."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    return monkeypatch


def test_importing_the_package_and_the_arithmetic_loads_no_triton() -> None:
    assert "triton" not in loaded_by(
        "import sdfast.kernels, sdfast.arithmetic, sdfast.loop, sdfast.models.unet"
    )


def test_a_processor_is_no_nvidia_gpu() -> None:
    assert why_none(torch.device("cpu")) == "they run on NVIDIA GPUs, not on the device 'cpu'"


def test_an_old_gpu_is_named(device: pytest.MonkeyPatch) -> None:
    assert why_none(CUDA) == "Tesla T4 has compute capability 7.5, and they need 8.0"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_ones_will_do(device: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    device.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_none(CUDA) == ""


def test_an_amd_gpu_has_a_capability_that_means_something_else(device: pytest.MonkeyPatch) -> None:
    device.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    device.setattr(torch.version, "hip", "7.1")
    assert "ROCm 7.1" in why_none(CUDA)


def test_without_triton_it_says_how_to_install_it(device: pytest.MonkeyPatch) -> None:
    device.delitem(sys.modules, "triton")
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return imported(name, *args, **kwargs)

    device.setattr(builtins, "__import__", missing)
    why = why_none(CUDA)
    assert "No module named 'triton'" in why and "pip install triton" in why
