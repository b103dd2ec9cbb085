"""Engines with INT8: what is asked for is made, told and kept; where it cannot run, it is refused."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from sdfast.backends.target import check_int8
from sdfast.cli import main
from sdfast.engine import Engine
from sdfast.errors import BackendError, ExportError
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.modules import module_specs
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.manifest import SHALLOW, read_manifest
from sdfast.models.int8 import LinearInt8
from tests.conftest import FLAT_SIZES
from tests.export.test_build import MODULES, Log
from tests.export.test_fp8 import latents
from tests.export.test_onnx import kinds
from tests.export.test_onnx_int8 import summed_in_32_bits

INT8 = Recipe.make(backend="eager", int8=True)


@pytest.fixture(scope="module", autouse=True)
def narrow_layers_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdfast.models.int8.PAYS_FROM", 0)
        yield


@pytest.fixture(scope="module")
def engine(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_sd, tmp_path_factory.mktemp("int8") / "engine", INT8)


def test_weights_are_a_quarter_and_the_manifest_says_which(engine: Path, tmp_path: Path) -> None:
    weights, manifest = load_file(engine / "unet.safetensors"), read_manifest(engine)
    assert {name for name, w in weights.items() if w.dtype == torch.int8} == {
        f"{name}.weight" for name in manifest.int8
    }
    assert "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj" in manifest.int8
    assert not manifest.fp8 and not manifest.modules["context"].int8 and manifest.rounding == "INT8"
    told = CliRunner().invoke(main, ["info", str(engine)]).output
    line = next(line for line in told.splitlines() if line.startswith("in INT8"))
    assert f"{len(manifest.int8)} layers of the U-Net" in line and "ff.net.0.proj" in line


def test_only_the_unet_is_built_for_it_and_the_command_line_asks_by_name(
    tiny_sd: Path, engine: Path, tmp_path: Path
) -> None:
    target = tmp_path / "engine"
    export(tiny_sd, target, Recipe.make(backend="eager"))
    log = Log()
    export(tiny_sd, target, INT8, progress=log)
    assert log.built == {"unet"} and log.kept == MODULES - {"unet"}
    command = ["export", str(tiny_sd), "-o", str(target), "--backend", "eager", "--int8"]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0 and "nothing to do" in done.output
    assert read_manifest(target).int8 == read_manifest(engine).int8
    assert torch.equal(latents(target), latents(engine))


def test_layers_are_so_in_shallow_steps(tiny_sdxl: Path) -> None:
    recipe = Recipe.make(int8=True, sizes=["64x64"], cache_branch=2)
    whole, shallow, *_ = module_specs(Networks.of(resolve(str(tiny_sdxl)), 2), recipe)
    assert (whole.name, shallow.name) == ("unet", SHALLOW)
    assert shallow.int8 and set(shallow.int8) < set(whole.int8)
    found = {name for name, layer in shallow.load().named_modules() if isinstance(layer, LinearInt8)}
    assert found == set(shallow.int8)


@summed_in_32_bits
def test_onnx_draws_what_the_definition_draws(flat_sd: Path, flat_onnx: Path, tmp_path: Path) -> None:
    ours = Path(shutil.copytree(flat_onnx, tmp_path / "onnx"))  # all but the U-Net is kept
    definition = tmp_path / "eager"
    for kind, folder in (("onnx", ours), ("eager", definition)):
        recipe = Recipe.make(backend=kind, int8=True, sizes=FLAT_SIZES, batch=2)
        export(flat_sd, folder, recipe)
    assert kinds(ours / "unet.onnx").count("MatMulIntegerToFloat") >= len(read_manifest(ours).int8)
    drawn, due, exact = latents(ours), latents(definition), latents(flat_onnx)
    assert torch.linalg.norm(drawn - due) < torch.linalg.norm(due - exact) / 3
    assert torch.linalg.norm(due - exact) < 0.05 * torch.linalg.norm(exact)
    assert torch.equal(latents(ours, num_images_per_prompt=2)[:1], drawn)


def test_a_network_that_has_no_such_layer_is_refused(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdfast.models.int8.PAYS_FROM", 100)
    with pytest.raises(ExportError, match=r"no linear layer of this U-Net is wide enough .* leave int8 out"):
        export(tiny_sd, tmp_path / "engine", INT8)


@pytest.mark.parametrize(
    ("machine", "has", "runs"),
    [
        ("x86_64", {"avx2"}, False),
        ("AMD64", {"avx2", "avx512_f"}, False),
        ("x86_64", {"avx2", "avx_vnni"}, True),
        ("x86_64", {"avx2", "avx512_f", "avx512_vnni"}, True),
        ("aarch64", {"asimd"}, True),
    ],
)
def test_a_processor_on_which_sums_overflow_is_refused(
    engine: Path,
    says_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    has: set[str],
    runs: bool,
) -> None:
    found = {"cpu_name": "Core i7", **{name: name in has for name in ("avx2", "avx512_f", "avx_vnni")}}
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found | dict.fromkeys(has, True))
    if runs:
        check_int8("")
        return
    best = "avx512_f" if "avx512_f" in has else "avx2"
    message = rf"INT8 needs an x86 processor with avx512_vnni or .*, and Core i7 has {best}: sums"
    manifest = read_manifest(says_onnx)
    unet = manifest.modules["unet"].model_copy(update={"int8": ("mid_block",)})
    rounded = manifest.model_copy(update={"modules": {**manifest.modules, "unet": unet}})
    with pytest.raises(BackendError, match=message + ".*sdfast export"):
        Engine(says_onnx, rounded, torch.device("cpu"))
    Engine(says_onnx, manifest, torch.device("cpu"))
    Engine(engine, read_manifest(engine), torch.device("cpu"))  # an eager one computes by the definition
    with pytest.raises(BackendError, match=message + ".*leave int8 out"):
        export("landscapes", tmp_path / "no", Recipe.make(int8=True))
