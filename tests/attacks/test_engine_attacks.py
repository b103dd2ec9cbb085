"""Engines made to reach out of their directory. Each is sealed, as an attacker would seal it."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sdfast.backends.onnx import check_external_data
from sdfast.engine import Engine
from sdfast.errors import EngineError
from tests.sealing import Document, reseal

COUNT = 16


def tensor(location: str) -> TensorProto:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[COUNT])
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(4 * COUNT))):
        made.external_data.add(key=key, value=value)
    return made


def as_initializer(location: str) -> onnx.GraphProto:
    return _graph([helper.make_node("Identity", ["w"], ["y"])], [tensor(location)])


def as_constant(location: str) -> onnx.GraphProto:
    return _graph([helper.make_node("Constant", [], ["y"], value=tensor(location))], [])


def as_branch(location: str) -> onnx.GraphProto:
    """In a graph inside the graph."""
    output = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [COUNT])]
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "branch", [], output, [tensor(location)]
    )
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return _graph([node], [condition])


def _graph(nodes: list[onnx.NodeProto], initializers: list[TensorProto]) -> onnx.GraphProto:
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [COUNT])]
    return helper.make_graph(nodes, "g", [], output, initializers)


def write(graph: onnx.GraphProto, path: Path) -> Path:
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )
    return path


@pytest.fixture
def engine(sd_engine: Path, tmp_path: Path) -> Path:
    """An engine directory with a secret beside it."""
    (tmp_path / "secret.bin").write_bytes(np.arange(COUNT, dtype=np.float32).tobytes())
    return Path(shutil.copytree(sd_engine, tmp_path / "engine"))


LOCATIONS = [
    "../secret.bin",
    "tokenizer/../../secret.bin",
    "./../secret.bin",
    "{absolute}",
    "link.bin",
    "folder_link/secret.bin",
    "tokenizer/tokenizer.json",
    "*/_ORT_MEM_ADDR_/*",
    "nothing.bin",
    ".",
    "..",
    "",
    "a\0b",
]


@pytest.mark.parametrize("place", [as_initializer, as_constant, as_branch])
@pytest.mark.parametrize("location", LOCATIONS)
def test_onnx_weights_outside_the_engine_are_refused_before_loading(
    engine: Path, location: str, place: object
) -> None:
    (engine / "link.bin").symlink_to(engine.parent / "secret.bin")
    (engine / "folder_link").symlink_to(engine.parent)
    (engine / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (engine / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(bytes(4 * COUNT))
    location = location.format(absolute=engine.parent / "secret.bin")
    path = write(place(location), engine / "evil.onnx")  # type: ignore[operator]
    with pytest.raises(EngineError, match="not a file beside it in the engine; do not use this engine"):
        check_external_data(path)


@pytest.mark.parametrize("place", [as_initializer, as_constant, as_branch])
def test_onnx_weights_beside_the_graph_are_accepted(engine: Path, place: object) -> None:
    (engine / "evil.onnx.data").write_bytes(bytes(4 * COUNT))
    check_external_data(write(place("evil.onnx.data"), engine / "evil.onnx"))  # type: ignore[operator]


def test_a_sealed_engine_with_such_a_module_never_loads_it(engine: Path) -> None:
    write(as_initializer("../secret.bin"), engine / "unet.safetensors")
    reseal(engine, lambda document: document.update(backend="onnx"))
    with pytest.raises(EngineError, match=r"'\.\./secret\.bin'"):
        Engine.open(engine).load()


def test_what_is_no_onnx_file_is_refused(engine: Path) -> None:
    reseal(engine, lambda document: document.update(backend="onnx"))
    with pytest.raises(EngineError, match="not an ONNX file"):
        Engine.open(engine).load()


@pytest.mark.parametrize("path", ["../secret.bin", "tokenizer/../../secret.bin", "/etc/passwd"])
def test_a_manifest_that_names_files_outside_is_refused(engine: Path, path: str) -> None:
    def add(document: Document) -> None:
        document["files"].append({"path": path, "size": 4 * COUNT, "sha256": "0" * 64})

    reseal(engine, add)
    with pytest.raises(EngineError, match="not a path inside the engine"):
        Engine.open(engine)


def test_a_link_out_is_refused_even_when_sealed(engine: Path) -> None:
    (engine / "secret").symlink_to(engine.parent / "secret.bin")
    reseal(
        engine,
        lambda document: document["files"].append({"path": "secret", "size": 0, "sha256": "0" * 64}),
    )
    with pytest.raises(EngineError, match="leads out of the engine"):
        Engine.open(engine)


def test_a_folder_link_out_is_refused(engine: Path) -> None:
    shutil.copytree(engine / "tokenizer", engine.parent / "outside")
    shutil.rmtree(engine / "tokenizer")
    (engine / "tokenizer").symlink_to(engine.parent / "outside")
    with pytest.raises(EngineError, match="leads out of the engine"):
        Engine.open(engine)
