"""ONNX Runtime for CUDA on a GPU that computes nothing: sessions know the shapes of their outputs alone."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import onnx
import torch

__version__ = "0"
ELEMENTS = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT64: torch.int64,
}


class Binding:
    def __init__(self, session: "InferenceSession") -> None:
        self._session, self.inputs, self.outputs = session, {}, {}

    def bind_input(self, name: str, device: str, index: int, element: str, shape: Any, address: int) -> None:
        known = self._session.inputs[name]
        if len(known) != len(shape) or any(
            isinstance(a, int) and a != b for a, b in zip(known, shape, strict=True)
        ):
            raise ValueError(f"{name}: {shape}, but the graph takes {known}")
        self.inputs[name] = shape

    def bind_output(self, name: str, device: str, index: int, *buffer: Any) -> None:
        if buffer and tuple(buffer[1]) != self._session.shape(name, self.inputs):
            raise ValueError(f"{name}: {buffer[1]}, but it is {self._session.shape(name, self.inputs)}")
        self.outputs[name] = buffer

    def get_outputs(self) -> list[torch.Tensor]:
        session = self._session
        return [
            torch.zeros(session.shape(name, self.inputs), dtype=session.elements[name], device="cuda")
            for name in self.outputs
        ]


class InferenceSession:
    def __init__(self, path: str, options: Any, providers: Any, enable_fallback: int) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self._providers = [name for name, _ in providers]
        self.inputs = {one.name: _dimensions(one) for one in graph.input}
        self._results = {one.name: _dimensions(one) for one in graph.output}
        self.elements = {one.name: ELEMENTS[one.type.tensor_type.elem_type] for one in graph.output}

    def get_providers(self) -> list[str]:
        return self._providers

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self._results]

    def io_binding(self) -> Binding:
        return Binding(self)

    def shape(self, output: str, given: Mapping[str, Any]) -> tuple[int, ...]:
        free = {
            name: size
            for key, shape in given.items()
            for name, size in zip(self.inputs[key], shape, strict=True)
            if isinstance(name, str)
        }
        return tuple(free[size] if isinstance(size, str) else size for size in self._results[output])

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        if binding.inputs.keys() != self.inputs.keys():
            raise ValueError(f"inputs {sorted(binding.inputs)}, but the graph takes {sorted(self.inputs)}")


class Options:
    """SessionOptions, RunOptions."""

    def add_run_config_entry(self, key: str, value: str) -> None:
        """Known to nobody here."""

    add_session_config_entry = add_run_config_entry


SessionOptions = RunOptions = Options


class GraphOptimizationLevel:
    ORT_ENABLE_ALL, ORT_ENABLE_EXTENDED = 1, 2


def get_available_providers() -> list[str]:
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _dimensions(value: Any) -> list[int | str]:
    return [one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim]
