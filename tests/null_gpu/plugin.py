"""For pytest on a GPU that computes nothing: numbers are neither compared nor looked at.

Tests marked `numbers` run too; that their assertions fail is expected ("xfailed"), any other error is not.
"""

import sys
from typing import Any

import pytest
import torch


def _nothing(*_arguments: Any, **_options: Any) -> None:
    """In place of a comparison."""


def _equal(a: torch.Tensor, b: torch.Tensor, _equal: Any = torch.equal) -> bool:
    return bool(_equal(a.cpu(), b.cpu()))  # what was copied is there


def _text(tensor: torch.Tensor, *, tensor_contents: Any = None, _text: Any = torch.Tensor.__repr__) -> str:
    # a tensor of another class, as those that are traced, would be seen to be asked for its device
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return f"<cuda {list(tensor.shape)}>" if plain and tensor.is_cuda else str(_text(tensor))


def pytest_configure() -> None:
    import sdfast.loop
    import sdfast.pipeline
    from tests.null_gpu import onnx_runtime

    sys.modules["onnxruntime"] = onnx_runtime
    torch.backends.cudnn.enabled = False  # it would look for the GPU
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.equal = _equal
    torch.Tensor.__repr__ = _text  # type: ignore[method-assign,assignment]
    torch.testing.assert_close = _nothing
    torch.isfinite = lambda _tensor: torch.tensor(True)  # type: ignore[assignment]
    sdfast.loop.check_finite = _nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    numbers = pytest.mark.xfail(raises=AssertionError, reason="this GPU computes nothing")
    for item in items:
        if item.get_closest_marker("numbers"):
            item.add_marker(numbers)
    for name in [name for name in sys.modules if name.startswith("tests.")]:
        if hasattr(sys.modules[name], "assert_same"):
            sys.modules[name].assert_same = _nothing  # type: ignore[attr-defined]
