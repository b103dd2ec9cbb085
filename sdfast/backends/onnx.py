"""ONNX Runtime: sessions on an explicit execution provider, fed from torch tensors without a copy.

Streams. On a GPU every session of an engine works on one stream of the engine's own. It begins when what
torch has in its current stream is done, and torch's current stream goes on when it is done, all of that on
the device: the host waits for nothing. (The current stream itself will not do: torch's default one has the
address 0, by which ONNX Runtime understands that it was given none.)

CUDA graphs. The bound calls of the files that a loop repeats (the U-Net's, in forms of one picture size) are
captured: the first call on a set of tensors runs the network a few times and captures it, every later call is
one launch. What ONNX Runtime asks for, and what it cannot do:
- The addresses, shapes and dtypes of all inputs and outputs stay as they were at the capture. They are what a
  graph is known by here (`gpu_graph_id`), so other tensors get a graph of their own, and tensors that come to
  lie where others lay use theirs.
- A graph is released with its session, not before, and keeps memory until then. So a session captures at
  most `MAX_GRAPHS`; calls on further sets of tensors run without.
- All nodes but shape arithmetic must run on the CUDA provider, without control flow, or the session is
  refused.
- Nothing else may be captured at the same time, and while the first call lasts no other thread may allocate
  memory of the device: the capture would fail, and the call raises.
- A session cannot be part of a graph that torch captures: its calls are graphs beside those, in stream order.
- An unbound call of a captured session runs without a graph, and its outputs are copied: ONNX Runtime would
  lend memory that a graph writes to.

TensorRT compiles when a session opens, or, for axes that are free, at the first call with sizes out of the
range so far: minutes. What it compiles is kept in `.tensorrt` in the engine's directory. The engine's seal
does not cover that folder, a new export drops it, and one process at a time fills it. Nodes that TensorRT
does not take run on the CUDA provider; a node that neither takes is an error. An engine exported with exact
`sizes` and `batch` numbers compiles once for each.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
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
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_NEEDS = {
    "cpu": "install onnxruntime",
    "cuda": "install onnxruntime-gpu in place of onnxruntime",
    "tensorrt": "install onnxruntime-gpu in place of onnxruntime, and TensorRT",
}
MAX_GRAPHS = 16  # CUDA graphs of one session
CACHE = ".tensorrt"
_LARGE = 2**30  # bytes of weights: U-Nets, not VAEs
_INSTALL = 'pip install "sdfast[cpu]" (or "sdfast[cuda]" for NVIDIA GPUs)'


class OnnxRuntime:
    """Loads modules into ONNX Runtime on one device. Never falls back to another provider.

    provider: "cpu", "cuda" or "tensorrt". looped: names of the files whose bound calls become CUDA graphs.
    """

    def __init__(
        self,
        device: torch.device,
        threads: int | None = None,
        provider: str = "cpu",
        looped: frozenset[str] = frozenset(),
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DependencyError(f"an ONNX engine needs ONNX Runtime: {_INSTALL}") from error
        self._ort = onnxruntime
        self._device = device
        self._threads = threads or torch.get_num_threads()  # now: `Engine.running` lowers torch's later
        self._tensorrt = provider == "tensorrt"
        self._provider = self._available_provider(provider)
        self._looped = frozenset() if self._tensorrt else looped
        self._stream = _stream(device) if device.type == "cuda" else None

    def load(self, path: Path) -> "OnnxModule":
        """A session over the ONNX file at `path`, its external data beside it."""
        weights = check_external_data(path)
        captured = self._stream is not None and path.name in self._looped
        providers, building = self._providers(path, captured), self._building(path.parent)
        try:
            with building:
                session = self._ort.InferenceSession(
                    str(path), self._options(weights), providers=providers, enable_fallback=0
                )
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise BackendError(f"{path.name}: ONNX Runtime cannot load it: {first_line(error)}") from error
        if session.get_providers()[0] != self._provider:
            raise BackendError(
                f"{path.name}: asked for {self._provider}, but ONNX Runtime started "
                f"{session.get_providers()[0]}; `sdfast doctor` says what is missing"
            )
        if self._stream is None:
            return OnnxModule(session, self._device)
        return OnnxGpuModule(session, self._device, self._ort.RunOptions, self._stream, building, captured)

    def _available_provider(self, name: str) -> str:
        provider, available = _PROVIDERS[name], self._ort.get_available_providers()
        if provider not in available:
            raise BackendError(
                f"device {str(self._device)!r} needs ONNX Runtime's {provider}, "
                f"and this build has {', '.join(available)}; {_NEEDS[name]}"
            )
        return provider

    def _options(self, weights: int) -> Any:
        """Options for a module of so many bytes of weights.

        The last level lays the weights of convolutions out anew in memory: a tenth of a small network's time,
        some hundredths of a VAE's, nothing of a large U-Net's, for which it takes seconds and a copy of the
        weights.

        Every session has threads of its own, which by default spin for some 100 ms after its last call and so
        keep the processor from the next session's: a third of the time of a small picture. They are told to
        stop when a call ends.

        On a processor each value takes its memory from the session's arena when it is made, and gives it back
        after its last use. By default ONNX Runtime plans ahead: a buffer is kept for a later value of its
        very shape, and what a call took is taken once more in one piece by the next. That is up to four times
        the memory (SD 1.5's VAE encoder at 512 x 512: 4.6 GiB in place of 1.2), and no faster.
        """
        options = self._ort.SessionOptions()
        level = self._ort.GraphOptimizationLevel
        large = weights > _LARGE
        options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if large else level.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._stream is None:
            options.enable_mem_pattern = False
            options.enable_mem_reuse = False
        if self._tensorrt:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return options

    def _providers(self, path: Path, captured: bool) -> list[tuple[str, dict[str, str]]]:
        """The providers of a session with their options, in the order in which nodes are offered to them."""
        if self._stream is None:
            return [(self._provider, {})]
        place = {
            "device_id": str(self._device.index or 0),
            "user_compute_stream": str(self._stream.cuda_stream),
        }
        cuda = {**place, "do_copy_in_default_stream": "1", "enable_cuda_graph": str(int(captured))}
        if not self._tensorrt:
            return [(self._provider, cuda)]
        cache = str(self._cache(path.parent))
        tensorrt = {
            **place,
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": cache,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": cache,
            "trt_fp16_enable": str(int(_is_half(path))),
        }
        return [(self._provider, tensorrt), (_PROVIDERS["cuda"], cuda)]

    def _cache(self, folder: Path) -> Path:
        """Where TensorRT keeps what it compiled for the engine in `folder` with this ONNX Runtime."""
        cache = folder / CACHE / f"onnxruntime-{self._ort.__version__}"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError(
                f"{cache}: TensorRT cannot keep what it compiles ({error.strerror}); "
                "make the engine's directory writable"
            ) from error
        if not cache.resolve().is_relative_to(folder.resolve()):
            raise EngineError(f"{cache}: leads out of the engine; do not use this engine")
        return cache

    def _building(self, folder: Path) -> AbstractContextManager[Any]:
        """To be held while TensorRT may compile: processes with the same cache would write the same files."""
        if not self._tensorrt:
            return nullcontext()
        from filelock import FileLock

        return FileLock(self._cache(folder) / "lock")


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
        self._run(binding, inputs, self._options())
        values = (from_dlpack(value) for value in binding.get_outputs())
        return dict(zip(self._outputs, values, strict=True))

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        binding, options = self._binding(inputs), self._options({**inputs, **outputs})
        for name, tensor in outputs.items():
            binding.bind_output(name, *_buffer(name, tensor))
        held = (*inputs.values(), *outputs.values())  # the binding knows only their addresses

        def run(_held: tuple[torch.Tensor, ...] = held) -> None:
            self._run(binding, inputs, options)

        return run

    def _binding(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *_buffer(name, tensor))
        return binding

    def _options(self, bound: Mapping[str, torch.Tensor] | None = None) -> Any:
        """ONNX Runtime's options of a call, on tensors that stay if they are `bound`."""
        return None

    def _run(self, binding: Any, inputs: Mapping[str, torch.Tensor], options: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error


class OnnxGpuModule(OnnxModule):
    """One session on a GPU, in stream order with torch.

    make_options: ONNX Runtime's `RunOptions`. building: held while sizes are new to the session. captured:
    whether bound calls become CUDA graphs.
    """

    def __init__(
        self,
        session: Any,
        device: torch.device,
        make_options: Callable[[], Any],
        stream: torch.cuda.Stream,
        building: AbstractContextManager[Any],
        captured: bool,
    ) -> None:
        super().__init__(session, device)
        self._make_options = make_options
        self._stream = stream
        self._building = building
        self._captured = captured
        self._graphs: dict[tuple[Any, ...], int] = {}
        self._built: set[tuple[Any, ...]] = set()

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = super().__call__(inputs)
        return {name: tensor.clone() for name, tensor in outputs.items()} if self._captured else outputs

    def _options(self, bound: Mapping[str, torch.Tensor] | None = None) -> Any:
        options = self._make_options()
        # Without it the host would wait for the device at the end of every call.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._captured:
            options.add_run_config_entry("gpu_graph_id", str(self._graph(bound) if bound else -1))
        return options

    def _graph(self, bound: Mapping[str, torch.Tensor]) -> int:
        """The number of the CUDA graph for these tensors; -1, which is none, when there are too many."""
        key = tuple((name, *_buffer(name, tensor)) for name, tensor in bound.items())
        if key not in self._graphs and len(self._graphs) == MAX_GRAPHS:
            return -1
        return self._graphs.setdefault(key, len(self._graphs) + 1)

    def _run(self, binding: Any, inputs: Mapping[str, torch.Tensor], options: Any) -> None:
        current = torch.cuda.current_stream(self._device)
        sizes = tuple(tuple(tensor.shape) for tensor in inputs.values())
        self._stream.wait_stream(current)
        with nullcontext() if sizes in self._built else self._building:
            super()._run(binding, inputs, options)
        self._built.add(sizes)
        current.wait_stream(self._stream)


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


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
    tensors = external_tensors(model, onnx.TensorProto)
    locations = {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}
    for location in locations:
        inside = Path(location).name == location and "\0" not in location
        if not inside or not (folder / location).is_file() or (folder / location).resolve().parent != folder:
            raise EngineError(
                f"{path.name}: its weights are said to lie at {location!r}, which is not a file beside it in "
                "the engine; do not use this engine"
            )
    return sum((folder / location).stat().st_size for location in locations)


def _is_half(path: Path) -> bool:
    """Whether the graph's weights are float16. What is float32 in it (an SDXL VAE) overflows in float16."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)


def external_tensors(message: Any, tensor_type: Any) -> Iterator[Any]:
    """The tensors of a message that lie elsewhere: also those in attributes, subgraphs and functions."""
    if isinstance(message, tensor_type):
        if message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from external_tensors(child, tensor_type)


def _buffer(name: str, tensor: torch.Tensor) -> tuple[str, int, str, tuple[int, ...], int]:
    """What ONNX Runtime needs to know of a tensor: device, index, element type, shape, address."""
    if not tensor.is_contiguous():
        raise BackendError(f"tensor {name!r} is not contiguous")
    if tensor.dtype not in _NUMPY_TYPES:
        raise BackendError(f"tensor {name!r} is {tensor.dtype}, which ONNX Runtime does not take")
    index = tensor.device.index or 0
    return tensor.device.type, index, _NUMPY_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
