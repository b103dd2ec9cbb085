"""In place of what looks at a GPU's numbers, or for a real one. Every Python process imports this first."""

import sys
from pathlib import Path
from typing import Any

import torch

import sdfast.loop
import sdfast.pipeline
from tests.null_gpu import onnx_runtime


def nothing(*_arguments: Any, **_options: Any) -> None:
    """In place of a comparison."""


def _equal(a: torch.Tensor, b: torch.Tensor, _equal: Any = torch.equal) -> bool:
    return bool(_equal(a.cpu(), b.cpu()))  # what was copied is there


def _text(tensor: torch.Tensor, *, tensor_contents: Any = None, _text: Any = torch.Tensor.__repr__) -> str:
    # a tensor of another class, as those that are traced, would be seen to be asked for its device
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return f"<cuda {list(tensor.shape)}>" if plain and tensor.is_cuda else str(_text(tensor))


def _first(tensor: torch.Tensor, *, as_tuple: bool = False, _nonzero: Any = torch.Tensor.nonzero) -> Any:
    if not tensor.is_cuda:
        return _nonzero(tensor, as_tuple=as_tuple)
    found = torch.zeros(1, tensor.dim(), dtype=torch.int64)  # what is looked for is the first
    return found.unbind(1) if as_tuple else found


class NoProfiler:
    """CUPTI needs a real driver."""

    def __init__(self, **_options: Any) -> None:
        self.start = self.stop = nothing

    def key_averages(self) -> list[Any]:
        return []

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_bytes(b"")


sys.modules["onnxruntime"] = onnx_runtime
torch.backends.cudnn.enabled = False  # it would look for the GPU
torch.backends.cuda.enable_cudnn_sdp(False)
torch.equal = _equal
torch.Tensor.__repr__ = _text  # type: ignore[method-assign,assignment]
torch.Tensor.nonzero = _first  # type: ignore[method-assign]
torch.profiler.profile = NoProfiler  # type: ignore[assignment,misc]
torch.isfinite = lambda _tensor: torch.tensor(True)  # type: ignore[assignment]
sdfast.loop.check_finite = nothing
