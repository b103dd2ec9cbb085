"""What ONNX Runtime is asked for on each provider. A stand-in takes its place where there is no GPU."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock, Timeout
from torch import nn

from sdfast.backends import onnx as backend
from sdfast.backends.onnx import MAX_GRAPHS, OnnxGpuModule, OnnxModule, OnnxRuntime
from sdfast.errors import BackendError, EngineError
from sdfast.export.onnx import export_module
from sdfast.export.onnx_cuda import CUDA
from sdfast.export.onnx_tensorrt import TENSORRT
from sdfast.proc import bytes_of
from tests.export.test_onnx import unet_inputs, unet_modules
from tests.export.test_onnx_cuda import WIDE

PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
GPU, PROCESSOR = torch.device("cuda", 1), torch.device("cpu")


class Stream:
    """A CUDA stream; `log` holds which stream waited for which."""

    log: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, address: int) -> None:
        self.cuda_stream = address

    def wait_stream(self, other: "Stream") -> None:
        self.log.append((self.cuda_stream, other.cuda_stream))


class Binding:
    def __init__(self) -> None:
        self.inputs, self.outputs = {}, {}

    def bind_input(self, name, *buffer):
        self.inputs[name] = buffer

    def bind_output(self, name, *buffer):
        self.outputs[name] = buffer

    def get_outputs(self):
        return [OUTPUT]


OUTPUT = torch.ones(2)


class Options:
    """SessionOptions, RunOptions."""

    def __init__(self) -> None:
        self.entries = {}

    def add_run_config_entry(self, key, value):
        self.entries[key] = value

    add_session_config_entry = add_run_config_entry


class Session:
    """Records what it was made of, and of every run the options; `locked`: whether TensorRT's cache was."""

    made: ClassVar[list["Session"]] = []
    starts: str | None = None  # a provider that it starts whatever was asked for

    def __init__(self, path, options, providers, enable_fallback):
        self.options, self.providers, self.fallback = options, dict(providers), enable_fallback
        self.order = [name for name, _ in providers]
        self.runs, self.locked = [], [self._locked()]
        self.made.append(self)

    def _locked(self):
        cache = self.providers.get("TensorrtExecutionProvider", {}).get("trt_engine_cache_path")
        if cache is None:
            return False
        try:
            FileLock(Path(cache) / "lock").acquire(timeout=0)
        except Timeout:
            return True
        return False

    def get_providers(self):
        return [self.starts] if self.starts else [*self.order, "CPUExecutionProvider"]

    def get_outputs(self):
        return [SimpleNamespace(name="y")]

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options=None):
        self.runs.append(options.entries if options else None)
        self.locked.append(self._locked())


@pytest.fixture
def runtime(monkeypatch):
    """The stand-in module. Tensors stay in the processor's memory."""
    levels = SimpleNamespace(ORT_ENABLE_ALL=1, ORT_ENABLE_EXTENDED=2)
    module = SimpleNamespace(
        __version__="9.9.9",
        InferenceSession=Session,
        SessionOptions=Options,
        RunOptions=Options,
        GraphOptimizationLevel=levels,
        get_available_providers=lambda: PROVIDERS,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(backend, "_stream", lambda device: Stream(4711))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(0))
    monkeypatch.setattr(Session, "made", [])
    monkeypatch.setattr(Stream, "log", [])
    return module


class Layer(nn.Linear):
    def forward(self, x):
        return super().forward(x)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    for name, dtype in (("unet", torch.float16), ("vae", torch.float32)):
        layer = Layer(64, 64).to(dtype)
        export_module(layer, {"x": torch.ones(1, 64, dtype=dtype)}, {}, ["y"], folder / f"{name}.onnx")
    return folder


@pytest.fixture
def graphs(exported, tmp_path):
    """unet.onnx in float16 and vae.onnx in float32, in a folder that stands for an engine."""
    return Path(shutil.copytree(exported, tmp_path / "engine"))


def tensors(count=1):
    return [({"x": torch.ones(1, 64)}, {"y": torch.ones(1, 64)}) for _ in range(count)]


def test_the_processor_is_asked_for_as_ever(runtime, graphs):
    module = OnnxRuntime(PROCESSOR, 1).load(graphs / "unet.onnx")
    (session,) = Session.made
    assert session.providers == {"CPUExecutionProvider": {}}
    assert session.fallback == 0
    module.bind(*tensors()[0])()
    assert type(module) is OnnxModule
    assert session.runs == [None]
    assert "session.disable_cpu_ep_fallback" not in session.options.entries


def values_of_four_shapes(path: Path, size: int) -> None:
    """A network of values of some `size` bytes, one after the other, in four shapes that come twice."""
    nodes, told = [], "x"
    for number in range(8):
        shape = np.array([8, size // 32 + 16 * (number % 4)], np.int64)
        nodes += [
            onnx.helper.make_node(
                "Constant", [], [f"shape{number}"], value=onnx.numpy_helper.from_array(shape)
            ),
            onnx.helper.make_node("Expand", [told, f"shape{number}"], [f"large{number}"]),
            onnx.helper.make_node("ReduceMax", [f"large{number}"], [f"y{number}"], keepdims=0),
        ]
        told = f"y{number}"
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [])] for name in ("x", told)
    )
    graph = onnx.helper.make_graph(nodes, "values", inputs, outputs)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path
    )


@pytest.mark.skipif(bytes_of("/proc/self/status", "RssAnon") is None, reason="Linux tells of memory")
def test_on_a_processor_memory_is_given_back_within_a_call_and_not_taken_twice(tmp_path):
    size = 2**25
    values_of_four_shapes(tmp_path / "values.onnx", size)
    module = OnnxRuntime(PROCESSOR, 1).load(tmp_path / "values.onnx")
    before = bytes_of("/proc/self/status", "RssAnon")
    for _ in range(3):
        (result,) = module({"x": torch.tensor(3.0)}).values()
        assert result.item() == 3
    assert bytes_of("/proc/self/status", "RssAnon") - before < 2.5 * size


def test_cuda_works_on_a_stream_of_its_own_and_captures_the_loops_file(runtime, graphs):
    loads = OnnxRuntime(GPU, 1, "cuda", frozenset({"unet.onnx"})).load
    assert isinstance(loads(graphs / "unet.onnx"), OnnxGpuModule)
    loads(graphs / "vae.onnx")
    options = {
        "device_id": "1",
        "user_compute_stream": "4711",
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": "1",
    }
    unet, vae = (session.providers for session in Session.made)
    assert unet == {"CUDAExecutionProvider": options}
    assert vae == {"CUDAExecutionProvider": options | {"enable_cuda_graph": "0"}}


def test_calls_are_in_stream_order_and_the_host_does_not_wait(runtime, graphs):
    module = OnnxRuntime(GPU, 1, "cuda").load(graphs / "vae.onnx")
    module.bind(*tensors()[0])()
    assert Stream.log == [(4711, 0), (0, 4711)]
    assert Session.made[0].runs == [{"disable_synchronize_execution_providers": "1"}]
    assert module({"x": torch.ones(1, 64)})["y"].data_ptr() == OUTPUT.data_ptr()


def test_a_set_of_tensors_is_a_cuda_graph(runtime, graphs):
    module = OnnxRuntime(GPU, 1, "cuda", frozenset({"unet.onnx"})).load(graphs / "unet.onnx")
    sets = tensors(MAX_GRAPHS + 1)
    for inputs, outputs in (*sets, sets[1]):
        module.bind(inputs, outputs)()
    graphs_run = [entries["gpu_graph_id"] for entries in Session.made[0].runs]
    assert graphs_run == [*(str(i + 1) for i in range(MAX_GRAPHS)), "-1", "2"]


def test_an_unbound_call_is_no_graph_and_its_outputs_are_its_own(runtime, graphs):
    module = OnnxRuntime(GPU, 1, "cuda", frozenset({"unet.onnx"})).load(graphs / "unet.onnx")
    y = module({"x": torch.ones(1, 64)})["y"]
    assert Session.made[0].runs[0]["gpu_graph_id"] == "-1"
    assert torch.equal(y, OUTPUT)
    assert y.data_ptr() != OUTPUT.data_ptr()


def test_tensorrt_keeps_its_cache_in_the_engine(runtime, graphs):
    loads = OnnxRuntime(GPU, 1, "tensorrt", frozenset({"unet.onnx"})).load
    loads(graphs / "unet.onnx")
    loads(graphs / "vae.onnx")
    cache = graphs / ".tensorrt" / "onnxruntime-9.9.9"
    unet, vae = Session.made
    assert unet.order == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    place = {"device_id": "1", "user_compute_stream": "4711"}
    assert unet.providers["TensorrtExecutionProvider"] == {
        **place,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_fp16_enable": "1",
    }
    assert unet.providers["CUDAExecutionProvider"]["enable_cuda_graph"] == "0"
    assert vae.providers["TensorrtExecutionProvider"]["trt_fp16_enable"] == "0"
    assert unet.options.entries["session.disable_cpu_ep_fallback"] == "1"
    assert cache.is_dir()


def test_one_process_at_a_time_compiles_for_tensorrt(runtime, graphs):
    """When the session opens, and at the first call with new sizes; not after that."""
    module = OnnxRuntime(GPU, 1, "tensorrt").load(graphs / "unet.onnx")
    for rows in (1, 1, 2, 2, 1):
        module.bind({"x": torch.ones(rows, 64)}, {"y": torch.ones(rows, 64)})()
    assert Session.made[0].locked == [True, True, False, True, False, False]


def test_a_cache_that_cannot_be_made_is_named(runtime, graphs):
    (graphs / ".tensorrt").write_text("")
    with pytest.raises(BackendError, match=r"\.tensorrt.*make the engine's directory writable"):
        OnnxRuntime(GPU, 1, "tensorrt").load(graphs / "unet.onnx")


def test_a_cache_outside_the_engine_is_refused(runtime, graphs, tmp_path_factory):
    (graphs / ".tensorrt").symlink_to(tmp_path_factory.mktemp("outside"))
    with pytest.raises(EngineError, match="leads out of the engine"):
        OnnxRuntime(GPU, 1, "tensorrt").load(graphs / "unet.onnx")


@pytest.mark.parametrize(
    ("provider", "device", "advice"),
    [
        ("cuda", GPU, "CUDAExecutionProvider, .*install onnxruntime-gpu in place of onnxruntime$"),
        ("tensorrt", GPU, "TensorrtExecutionProvider, .*and TensorRT$"),
    ],
)
def test_a_provider_that_is_not_built_in_is_named(runtime, provider, device, advice):
    runtime.get_available_providers = lambda: ["CPUExecutionProvider"]
    with pytest.raises(BackendError, match=advice):
        OnnxRuntime(device, 1, provider)


@pytest.mark.parametrize("started", ["CPUExecutionProvider", "CUDAExecutionProvider"])
def test_another_provider_than_asked_for_is_an_error(runtime, graphs, monkeypatch, started):
    monkeypatch.setattr(Session, "starts", started)
    with pytest.raises(BackendError, match=f"asked for TensorrtExecutionProvider, .*started {started}"):
        OnnxRuntime(GPU, 1, "tensorrt").load(graphs / "unet.onnx")


def real(provider):
    """The installed ONNX Runtime on a GPU, or the reason why not."""
    import onnxruntime

    name = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime is built without {name}")
    return OnnxRuntime(torch.device("cuda"), 1, provider, frozenset({"unet.onnx"}))


@pytest.mark.cuda
@pytest.mark.parametrize(("provider", "table"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_a_unet_on_a_gpu(tmp_path, provider, table):
    """Bound calls, which CUDA captures at the first, follow what is written into their inputs."""
    runtime, path = real(provider), tmp_path / "unet.onnx"
    network, _, _ = unet_modules(WIDE, torch.float16)
    inputs = {n: t.cuda() for n, t in unet_inputs(network, 2, 16, 16, torch.float16).items()}
    export_module(network, unet_inputs(network, 2, 16, 16, torch.float16), {}, ["output"], path, table)
    module, output = runtime.load(path), torch.empty_like(inputs["sample"])
    network = network.float().cuda()
    step = module.bind(inputs, {"output": output})
    for _ in range(4):
        for tensor in inputs.values():
            tensor.copy_(torch.randn_like(tensor))
        step()
        with torch.no_grad():
            expected = network(**{name: tensor.float() for name, tensor in inputs.items()})
        for got in (output, module(inputs)["output"]):
            assert (got.float() - expected).norm() / expected.norm() < 5e-3
