"""Opening an engine: every file is verified before it is used. Running it: only in the sizes there are."""

import shutil
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from sdfast.backends import loader
from sdfast.engine import Engine, cover, verify
from sdfast.errors import BackendError, EngineError, RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.manifest import Span, read_manifest
from tests.fakes import FakeEngine
from tests.sealing import reseal


@pytest.fixture
def engine(sd_engine: Path, tmp_path: Path) -> Path:
    """An engine to be spoilt."""
    return Path(shutil.copytree(sd_engine, tmp_path / "engine"))


def refusal(engine: Path) -> str:
    with pytest.raises(EngineError) as caught:
        Engine.open(engine)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert len(manifest.files) >= 8
    for file in manifest.files:
        path = engine / file.path
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        message = refusal(engine)
        assert str(path) in message
        assert "export the engine again" in message
        path.write_bytes(whole)
    Engine.open(engine)


def test_a_module_is_loaded_once_its_own_files_are_checked_and_no_other_is(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(Engine, "_module", lambda _self, variant: loaded.append(variant.file))
    Engine.open(engine, load=True)
    variants = [v.file for module in read_manifest(engine).modules.values() for v in module.variants]
    assert sorted(loaded) == sorted(variants)
    assert loaded[-1] == "unet.safetensors"  # the largest is verified meanwhile
    loaded.clear()
    whole = bytearray((engine / "unet.safetensors").read_bytes())
    whole[len(whole) // 2] ^= 1
    (engine / "unet.safetensors").write_bytes(whole)
    with pytest.raises(EngineError, match=r"unet\.safetensors: digest"):
        Engine.open(engine, load=True)
    assert "unet.safetensors" not in loaded


@pytest.mark.parametrize("name", ["unet.safetensors", "tokenizer/tokenizer.json", "scheduler_config.json"])
def test_a_truncated_longer_or_missing_file_is_named(engine: Path, name: str) -> None:
    path = engine / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{path}: {len(whole) - 1} bytes, but {len(whole)} were exported" in refusal(engine)
    path.write_bytes(whole + b"x")
    assert f"{path}: {len(whole) + 1} bytes" in refusal(engine)
    path.write_bytes(b"")
    assert f"{path}: 0 bytes" in refusal(engine)
    path.unlink()
    assert f"{path}: missing" in refusal(engine)
    path.mkdir()
    assert f"{path}: is not a file" in refusal(engine)


def test_a_link_out_of_the_engine_is_refused_even_with_the_right_content(
    engine: Path, tmp_path: Path
) -> None:
    path = engine / "unet.safetensors"
    outside = path.rename(tmp_path / "elsewhere")
    path.symlink_to(outside)
    assert f"{path}: leads out of the engine" in refusal(engine)
    path.unlink()
    path.symlink_to(path)
    assert f"{path}: cannot be read" in refusal(engine)


def test_a_manifest_for_another_folder_cannot_be_used(sd_engine: Path, tmp_path: Path) -> None:
    manifest = read_manifest(sd_engine)
    with pytest.raises(EngineError, match="missing"):
        verify(tmp_path, manifest.files)


def test_a_backend_that_is_not_here_is_named() -> None:
    with pytest.raises(
        BackendError, match="no 'tensorflow' backend; it runs engines of: onnx, inductor, eager"
    ):
        loader("tensorflow", torch.device("cpu"), None)


def test_compiled_code_says_for_which_machine(engine: Path) -> None:
    reseal(engine, lambda document: document.update(backend="inductor"))
    with pytest.raises(EngineError, match="native code, but no target"):
        Engine.open(engine)


def test_a_module_of_another_kind_is_refused(engine: Path) -> None:
    (engine / "unet.safetensors").write_bytes(b"not safetensors")
    reseal(engine, lambda document: None)
    opened = Engine.open(engine)
    with pytest.raises(EngineError, match=r"unet\.safetensors: not a safetensors file"):
        opened.load()


def test_weights_that_do_not_fit_the_network_are_refused(engine: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = engine / "vae_decoder.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    state = load_file(path)
    state.popitem()
    save_file(state, path, metadata=header)
    reseal(engine, lambda document: None)
    with pytest.raises(BackendError, match=r"vae_decoder\.safetensors: its weights do not fit"):
        Engine.open(engine).load()


def test_a_size_outside_the_engine_lists_the_sizes() -> None:
    sizes = [(Span.exactly(16), Span.exactly(24)), (Span(low=32, high=64), Span.exactly(32))]
    engine = FakeEngine(sizes=sizes)
    engine.check_size(16, 24)
    engine.check_size(48, 32)
    for height, width in [(24, 16), (16, 16), (72, 32), (16, 32)]:
        with pytest.raises(RequestError, match=rf"size {width}x{height} .*24x16, 32x32\.\.64"):
            engine.check_size(height, width)


def test_a_size_that_the_vae_cannot_make_is_refused() -> None:
    span = Span(low=16, high=64)
    with pytest.raises(RequestError, match="multiples of 8"):
        FakeEngine(sizes=[(span, span)]).check_size(20, 16)


def test_cover_takes_as_few_padded_rows_as_there_can_be_and_then_as_few_calls() -> None:
    exact = [Span.exactly(size) for size in (1, 4)]
    assert cover(6, exact) == [4, 1, 1]
    assert cover(4, exact) == [4]
    assert cover(3, [Span.exactly(4)]) == [4]
    assert cover(7, [Span.exactly(size) for size in (3, 4, 6, 8)]) == [4, 3]
    assert cover(11, [Span(low=1, high=4)]) == [4, 4, 3]
    assert cover(0, exact) == []


def test_what_cover_gives_is_covered_by_the_same_calls() -> None:
    """`rows` says how long the tensors are, `bind` cuts them up: the two must agree."""
    for forms in combinations(range(1, 9), 3):
        for batch, extra in product(range(1, 20), (0, 2)):
            spans = [Span(low=size, high=size + extra) for size in forms]
            sizes = cover(batch, spans)
            assert sum(sizes) >= batch
            assert sorted(cover(sum(sizes), spans), reverse=True) == sorted(sizes, reverse=True)
            assert all(any(size in span for span in spans) for size in sizes)


def test_a_call_is_split_and_padded_over_the_forms(sd_engine: Path) -> None:
    engine = FakeEngine([Span.exactly(3)])
    inputs = {
        "sample": torch.randn(7, 4, 2, 2),
        "time_shift": torch.randn(7, 2),
        "context": torch.randn(7, 8, 6),
    }
    together = engine.call("unet", inputs, 16, 16)["output"]
    assert engine.calls["unet"] == [3, 3, 3]
    alone = FakeEngine().call("unet", inputs, 16, 16)["output"]
    assert torch.equal(together, alone)


def test_the_outputs_of_a_call_may_be_changed(sd_engine: Path) -> None:
    """They are no inference tensors: a caller's autograd and in-place operations work on them."""
    opened = Engine.open(sd_engine)
    context = opened.call("context", {"hidden_states": torch.randn(2, 77, 32)})["context"]
    assert not context.is_inference()
    context.mul_(2.0)


def for_provider(engine: Path, provider: str) -> Path:
    reseal(engine, lambda document: document.update(backend="onnx", recipe={"provider": provider}))
    return engine


@pytest.mark.parametrize(
    ("provider", "device", "says"),
    [
        ("cuda", "cpu", "provider 'cuda', which runs on 'cuda', but device 'cpu' was asked for"),
        ("tensorrt", "cpu", "provider 'tensorrt', which runs on 'cuda', but device 'cpu' was asked for"),
        ("cpu", "cuda:1", "provider 'cpu', which runs on 'cpu', but device 'cuda:1' was asked for"),
    ],
)
def test_an_engine_for_another_provider_is_refused(
    engine: Path, provider: str, device: str, says: str
) -> None:
    with pytest.raises(BackendError) as caught:
        Engine.open(for_provider(engine, provider), device)
    assert says in str(caught.value)
    source = read_manifest(engine).checkpoint.source
    wanted = torch.device(device).type
    assert f"`sdfast export {source} --provider {wanted} -o DIR`" in str(caught.value)


def test_an_unknown_provider_is_refused(engine: Path) -> None:
    with pytest.raises(BackendError, match=r"provider 'rocm'; there are \['cpu', 'cuda', 'tensorrt'\]"):
        Engine.open(for_provider(engine, "rocm"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_engine_for_a_gpu_is_opened_on_one(engine: Path, provider: str) -> None:
    with pytest.raises(BackendError, match="sees no CUDA device"):
        Engine.open(for_provider(engine, provider))


def test_an_engine_from_before_there_were_providers_is_for_the_processor(engine: Path) -> None:
    reseal(engine, lambda document: document.update(backend="onnx", recipe={}))
    assert Engine.open(engine).device.type == "cpu"


def test_a_backends_cache_is_no_part_of_the_engine(engine: Path, tiny_sd: Path) -> None:
    """It does not break the verification, nor hinder a new export, which leaves it behind."""
    (engine / ".tensorrt" / "onnxruntime-1").mkdir(parents=True)
    (engine / ".tensorrt" / "onnxruntime-1" / "graph.engine").write_bytes(b"compiled")
    Engine.open(engine)
    export(tiny_sd, engine, Recipe(backend="eager", dtype="fp16"))
    assert Engine.open(engine).manifest.dtype == "fp16"
    assert not (engine / ".tensorrt").exists()
