"""ONNX Runtime: sessions on an explicit execution provider, fed from torch tensors without a copy."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from sdfast.errors import BackendError, DependencyError, EngineError, first_line

_NUMPY_TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_LARGE = 250 * 2**20  # bytes of weights
_INSTALL = 'pip install "sdfast[cpu]" (or "sdfast[cuda]" for NVIDIA GPUs)'


class OnnxRuntime:
    """Loads modules into ONNX Runtime on one device. Never falls back to another provider."""

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DependencyError(f"an ONNX engine needs ONNX Runtime: {_INSTALL}") from error
        self._ort = onnxruntime
        self._device = device
        self._threads = threads or torch.get_num_threads()  # now: `Engine.running` lowers torch's later
        self._provider = self._available_provider()

    def load(self, path: Path) -> "OnnxModule":
        """A session over the ONNX file at `path`, its external data beside it."""
        weights = check_external_data(path)
        try:
            session = self._ort.InferenceSession(
                str(path), self._options(weights), providers=[(self._provider, self._provider_options())]
            )
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise BackendError(f"{path.name}: ONNX Runtime cannot load it: {first_line(error)}") from error
        if session.get_providers()[0] != self._provider:
            raise BackendError(
                f"{path.name}: asked for {self._provider}, but ONNX Runtime started "
                f"{session.get_providers()[0]}; `sdfast doctor` says what is missing"
            )
        return OnnxModule(session, self._device)

    def _available_provider(self) -> str:
        provider = _PROVIDERS.get(self._device.type)
        available = self._ort.get_available_providers()
        if provider is None or provider not in available:
            raise BackendError(
                f"device {str(self._device)!r} needs ONNX Runtime's {provider or 'provider for it'}, "
                f"and this build has {', '.join(available)}; install onnxruntime-gpu for CUDA"
            )
        return provider

    def _options(self, weights: int) -> Any:
        """Options for a module of so many bytes of weights.

        The last level lays the weights of convolutions out anew in memory: a tenth of a small network's time,
        nothing of a large one's, for which it takes seconds and a copy of the weights.

        Every session has threads of its own, which by default spin for some 100 ms after its last call and so
        keep the processor from the next session's: a third of the time of a small picture. They are told to
        stop when a call ends.
        """
        options = self._ort.SessionOptions()
        level = self._ort.GraphOptimizationLevel
        large = weights > _LARGE
        options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if large else level.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _provider_options(self) -> dict[str, str]:
        if self._device.type == "cpu":
            return {}
        # The caller's stream, so that what torch wrote before the call is there without a synchronisation.
        stream = torch.cuda.current_stream(self._device).cuda_stream
        index = self._device.index or 0
        return {"device_id": str(index), "user_compute_stream": str(stream), "do_copy_in_default_stream": "1"}


class OnnxModule:
    """One ONNX Runtime session."""

    def __init__(self, session: Any, device: torch.device) -> None:
        self._session = session
        self._device = device
        self._outputs = [output.name for output in session.get_outputs()]

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        binding = self._binding(inputs)
        for name in self._outputs:
            binding.bind_output(name, self._device.type, self._device.index or 0)
        self._run(binding)
        values = (from_dlpack(value) for value in binding.get_outputs())
        return dict(zip(self._outputs, values, strict=True))

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        binding = self._binding(inputs)
        for name, tensor in outputs.items():
            binding.bind_output(name, *_buffer(name, tensor))
        held = (*inputs.values(), *outputs.values())  # the binding knows only their addresses

        def run(_held: tuple[torch.Tensor, ...] = held) -> None:
            self._run(binding)

        return run

    def _binding(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *_buffer(name, tensor))
        return binding

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error


def check_external_data(path: Path) -> int:
    """Refuses an ONNX file whose weights do not lie in a file beside it, before anything loads it.

    Returns the size of those files in bytes.

    A plain name leaves no way out of the directory, nor to the names that ONNX Runtime reads as addresses.
    """
    try:
        import onnx
    except ImportError as error:
        raise DependencyError(f"an ONNX engine needs the onnx package: {_INSTALL}") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decoder raises its own types
        raise EngineError(f"{path.name}: not an ONNX file ({first_line(error)}); export again") from error
    folder = path.parent.resolve()
    locations = set(_external_locations(model, onnx.TensorProto))
    for location in locations:
        inside = Path(location).name == location and "\0" not in location
        if not inside or not (folder / location).is_file() or (folder / location).resolve().parent != folder:
            raise EngineError(
                f"{path.name}: its weights are said to lie at {location!r}, which is not a file beside it in "
                "the engine; do not use this engine"
            )
    return sum((folder / location).stat().st_size for location in locations)


def _external_locations(message: Any, tensor_type: Any) -> Iterator[str]:
    """Where the tensors in a protobuf message lie: also those in attributes, subgraphs and functions."""
    if isinstance(message, tensor_type):
        yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _external_locations(child, tensor_type)


def _buffer(name: str, tensor: torch.Tensor) -> tuple[str, int, str, tuple[int, ...], int]:
    """What ONNX Runtime needs to know of a tensor: device, index, element type, shape, address."""
    if not tensor.is_contiguous():
        raise BackendError(f"tensor {name!r} is not contiguous")
    if tensor.dtype not in _NUMPY_TYPES:
        raise BackendError(f"tensor {name!r} is {tensor.dtype}, which ONNX Runtime does not take")
    index = tensor.device.index or 0
    return tensor.device.type, index, _NUMPY_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
