"""Engines with FP8: what is asked for is made, told and kept; where it cannot run, it is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from sdfast.backends.target import check_fp8
from sdfast.cli import main
from sdfast.engine import Engine
from sdfast.errors import BackendError, ExportError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.manifest import read_manifest
from sdfast.models import ops
from sdfast.pipeline import Pipeline
from tests import checkpoints
from tests.export.test_build import MODULES, Log

PLAIN = Recipe.make(backend="eager", dtype="fp16")
FP8 = Recipe.make(backend="eager", dtype="fp16", fp8=True)


@pytest.fixture(scope="module")
def plain(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_sd, tmp_path_factory.mktemp("fp8") / "plain", PLAIN)


@pytest.fixture(scope="module")
def engine(tiny_sd: Path, plain: Path) -> Path:
    return export(tiny_sd, plain.with_name("fp8"), FP8)


def latents(folder: Path, **call: Any) -> Tensor:
    pipe = Pipeline.from_engine(folder)
    pipe.set_progress_bar_config(disable=True)
    run = {"num_inference_steps": 2, "output_type": "latent", "seed": 3, **call}
    drawn: Tensor = pipe("the sea", **run).images
    return drawn


def test_the_weights_are_half_as_large_and_have_scales(engine: Path, plain: Path) -> None:
    weights, before = load_file(engine / "unet.safetensors"), load_file(plain / "unet.safetensors")
    layers = read_manifest(engine).fp8
    assert {name for name, w in weights.items() if w.dtype == ops.FP8} == {f"{n}.weight" for n in layers}
    for name in layers:
        weight, scale, old = weights[f"{name}.weight"], weights[f"{name}.scale"], before[f"{name}.weight"]
        assert 2 * weight.nbytes == old.nbytes
        assert scale.dtype == torch.float32 and scale.shape == weight.shape[:1]
        rows = old.permute(0, 2, 3, 1) if old.dim() == 4 else old  # taps, then channels
        error = (weight.flatten(1).float() * scale[:, None] - rows.flatten(1).float()).abs()
        assert (error <= scale[:, None] * 16.01).all() and error.max() > 0
    rest = {name for name in weights if name.rpartition(".")[0] not in layers}
    assert all(torch.equal(weights[name], before[name]) for name in rest)
    assert {name for name in before if name.rpartition(".")[0] not in layers} == rest


def test_the_manifest_and_info_say_which_layers(engine: Path, plain: Path) -> None:
    manifest = read_manifest(engine)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj" in manifest.fp8
    assert "up_blocks.0.upsamplers.0.conv" in manifest.fp8
    assert not manifest.modules["context"].fp8 and not read_manifest(plain).fp8
    told = CliRunner().invoke(main, ["info", str(engine)]).output
    line = next(line for line in told.splitlines() if line.startswith("in FP8"))
    counts = [int(count) for count in re.findall(r"(\d+) [a-z]+[\w.]*(?:,|$)", line)]
    assert f"{len(manifest.fp8)} layers of the U-Net" in line and "ff.net.0.proj" in line
    assert re.search(r"\d+ conv1, \d+ conv2", line) and " upsamplers.0.conv" in line
    assert sum(counts) == len(manifest.fp8)
    assert "in FP8" not in CliRunner().invoke(main, ["info", str(plain)]).output


def test_the_picture_is_near_and_does_not_depend_on_those_beside_it(engine: Path, plain: Path) -> None:
    ours, exact = latents(engine), latents(plain)
    error = torch.linalg.norm(ours - exact) / torch.linalg.norm(exact)
    assert 1e-3 < error < 0.2
    assert torch.equal(latents(engine, num_images_per_prompt=2)[:1], ours)


def test_only_the_unet_is_built_for_it_and_nothing_twice(tiny_sd: Path, plain: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(plain, tmp_path / "engine"))
    for recipe, built in ((FP8, {"unet"}), (FP8, set()), (PLAIN, {"unet"})):
        log = Log()
        export(tiny_sd, target, recipe, progress=log)
        assert log.built == built
        assert log.kept == (MODULES - built if built else set())
    assert latents(target).equal(latents(plain))


def test_another_checkpoint_has_its_own_scales_and_a_rebuild_keeps_fp8(engine: Path, tmp_path: Path) -> None:
    other = checkpoints.build_sd(tmp_path / "other", seed=1)
    swapped = export(other, tmp_path / "swapped", FP8)
    assert not latents(swapped).equal(latents(engine))
    (swapped / "unet.safetensors").write_bytes(b"")
    done = CliRunner().invoke(main, ["rebuild", str(swapped)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert read_manifest(swapped).fp8 == read_manifest(engine).fp8
    Engine.open(swapped)


def test_the_command_line_asks_for_it_by_name(tiny_sd: Path, engine: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    command = ["export", str(tiny_sd), "-o", str(target), "--backend", "eager", "--dtype", "fp16", "--fp8"]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (target / "unet.safetensors").samefile(engine / "unet.safetensors") or (
        target / "unet.safetensors"
    ).read_bytes() == (engine / "unet.safetensors").read_bytes()


def test_a_network_that_has_no_such_layer_is_refused(tmp_path: Path) -> None:
    narrow = checkpoints.build_sd(tmp_path / "sd", block_out_channels=(24, 40), norm_num_groups=8)
    with pytest.raises(ExportError, match=r"no linear layer of this U-Net has widths .* multiples of 16"):
        export(narrow, tmp_path / "engine", FP8)


@pytest.mark.parametrize(("capability", "runs"), [((8, 6), False), ((8, 9), True), ((12, 0), True)])
def test_a_gpu_without_fp8_is_refused_with_both_values(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GeForce")
    device = torch.device("cuda", 0)
    check_fp8(torch.device("cpu"), "")
    if runs:
        check_fp8(device, "")
        return
    message = r"FP8 needs .* capability 8\.9 or above, and GeForce has 8\.6"
    with pytest.raises(BackendError, match=message + ".*sdfast export"):
        Engine(engine, read_manifest(engine), device)
    with pytest.raises(BackendError, match=message + ".*leave fp8 out"):
        export("landscapes", engine.with_name("no"), Recipe.make(backend="inductor", dtype="fp16", fp8=True))
