"""SDXL's VAE in an fp16 engine: float16 where its numbers can be made to fit, float32 where they cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdfast.cli import main
from sdfast.engine import Engine
from sdfast.errors import NumericalError
from sdfast.export.build import Silent, export
from sdfast.export.checkpoint import resolve
from sdfast.export.forms import compile_onnx, lowerings
from sdfast.export.modules import module_specs
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.first_latents import encoded
from sdfast.manifest import HalfRange, read_manifest
from sdfast.models.vae import VAEConfig, load_vae
from sdfast.pipeline import Pipeline
from sdfast.summary import summary
from tests.export.test_onnx_cuda import run
from tests.sealing import reseal

HALF = {"backend": "eager", "dtype": "fp16", "batch": 1}
VAE_WEIGHTS = Path("vae", "diffusion_pytorch_model.safetensors")


def changed(checkpoint: Path, folder: Path, gains: dict[str, float]) -> Path:
    """A copy of a checkpoint, tensors of its VAE by parts of their names times something."""
    shutil.copytree(checkpoint, folder)
    state = load_file(folder / VAE_WEIGHTS)
    for name, tensor in state.items():
        for part, gain in gains.items():
            state[name] = tensor * gain if part in name else state[name]
    save_file(state, folder / VAE_WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def loud(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose VAE overflows float16, as SDXL's does."""
    folder = tmp_path_factory.mktemp("loud") / "sdxl"
    return changed(tiny_sdxl, folder, {".conv1.weight": 3e5, ".conv2.weight": 3e5})


@pytest.fixture(scope="module")
def engine(loud: Path) -> Path:
    return export(loud, loud.with_name("engine"), Recipe.make(**HALF))


def networks(checkpoint: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    config = json.loads((checkpoint / "vae" / "config.json").read_text("utf-8"))
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    return load_vae(VAEConfig.from_diffusers(fields), load_file(checkpoint / VAE_WEIGHTS), dtype)


def dtypes(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def test_its_pictures_and_latents_are_right(engine: Path, loud: Path) -> None:
    decoder, encoder = networks(loud, torch.float64)
    plain = networks(loud, torch.float16)
    assert encoder is not None and plain[1] is not None
    assert all(torch.isfinite(t).all() for half in plain for t in half.parameters())  # it is the activations
    latents, image = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64)
    assert torch.isnan(plain[0](latents)).any()
    assert torch.isnan(plain[1](image)[0]).any()
    opened = Engine.open(engine)
    assert dtypes(engine / "vae_decoder.safetensors") == dtypes(engine / "vae_encoder.safetensors") == {"F16"}
    picture = opened.call("vae_decoder", {"latents": latents}, 64, 64)["image"]
    assert picture.std() > 0.01
    assert relative(picture, decoder(latents.double())) < 5e-3
    mean, std = encoded(opened, image)
    truth = encoder(image.double() * 2 - 1)
    assert relative(mean, truth[0]) < 5e-3
    assert relative(std, truth[1]) < 5e-3


def test_the_manifest_and_info_say_what_was_found(engine: Path) -> None:
    manifest = read_manifest(engine)
    for name in ("vae_decoder", "vae_encoder"):
        half = manifest.modules[name].half_range
        assert half is not None
        assert (half.dtype, half.reason) == ("fp16", None)
        assert half.largest > 65504
        assert 0 < half.scale < 1
        assert np.log2(half.scale) % 1 == 0
        told = CliRunner().invoke(main, ["info", str(engine)]).output
        line = next(line for line in told.splitlines() if line.startswith(name))
        assert f"fp16; the largest number on probes is {half.largest:.3g}, held as 1/" in line
    assert all(manifest.modules[name].half_range is None for name in ("unet", "context", "text_encoder"))


def test_the_export_says_so_and_keeps_what_it_found(loud: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    class Heard(Silent):
        def say(self, message: str) -> None:
            lines.append(message)

    folder = tmp_path / "engine"
    export(loud, folder, Recipe.make(**HALF), progress=Heard())
    first = read_manifest(folder)
    assert f"vae_decoder: {first.modules['vae_decoder'].half_range}" in lines
    lines.clear()
    (folder / "unet.safetensors").write_bytes(b"")  # so that there is something to do
    export(loud, folder, Recipe.make(**HALF), progress=Heard())
    assert read_manifest(folder).modules == first.modules
    assert not any(line.startswith("vae_decoder: fp16") for line in lines)


def test_fp32_for_those_who_want_it(loud: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    command = ["export", str(loud), "-o", str(folder), "--backend", "eager", "--dtype", "fp16"]
    result = CliRunner().invoke(main, [*command, "--vae-dtype", "fp32"])
    assert result.exit_code == 0, result.output
    assert dtypes(folder / "vae_decoder.safetensors") == {"F32"}
    assert dtypes(folder / "unet.safetensors") == {"F16"}
    manifest = read_manifest(folder)
    assert manifest.modules["vae_decoder"].half_range is None
    assert "VAE          fp32, as the recipe asks" in summary(manifest)
    export(loud, folder, Recipe.make(**HALF))  # another recipe: the VAE is built again
    assert dtypes(folder / "vae_decoder.safetensors") == {"F16"}


def test_a_vae_that_fits_has_the_checkpoints_numbers(tiny_sd: Path, tmp_path: Path) -> None:
    folder = export(tiny_sd, tmp_path / "engine", Recipe.make(**HALF))
    half = read_manifest(folder).modules["vae_decoder"].half_range
    assert half is not None
    assert (half.dtype, half.scale) == ("fp16", 1.0)
    assert "held as" not in summary(read_manifest(folder))
    state, own = (
        load_file(folder / "vae_decoder.safetensors"),
        networks(tiny_sd, torch.float16)[0].state_dict(),
    )
    assert all(torch.equal(state[name], own[name]) for name in own)
    with safe_open(folder / "vae_decoder.safetensors", framework="pt") as file:
        assert "eps" not in json.loads(file.metadata()["sdfast"])


def test_the_demos_vae_fits(tmp_path: Path) -> None:
    folder = export("landscapes", tmp_path / "engine", Recipe.make(**HALF))
    halves = [read_manifest(folder).modules[name].half_range for name in ("vae_decoder", "vae_encoder")]
    assert [(half.dtype, half.scale) for half in halves if half] == [("fp16", 1.0)] * 2


def test_an_fp32_engine_is_not_looked_at(sdxl_engine: Path) -> None:
    manifest = read_manifest(sdxl_engine)
    assert all(module.half_range is None for module in manifest.modules.values())
    assert "vae" not in summary(manifest).lower().replace("vae_scale", "")


def test_a_vae_beyond_help_stays_float32_and_says_why(tiny_sdxl: Path, tmp_path: Path) -> None:
    checkpoint = changed(tiny_sdxl, tmp_path / "sdxl", {"decoder.mid_block.attentions.0.to_v": 1e6})
    folder = export(checkpoint, tmp_path / "engine", Recipe.make(**HALF))
    manifest = read_manifest(folder)
    half = manifest.modules["vae_decoder"].half_range
    assert half is not None and half.reason is not None
    assert half.dtype == "fp32"
    assert "where no scale helps" in half.reason
    assert f"vae_decoder  fp32: {half.reason}" in summary(manifest)
    assert dtypes(folder / "vae_decoder.safetensors") == {"F32"}
    assert dtypes(folder / "vae_encoder.safetensors") == {"F16"}
    assert manifest.remedy("vae_decoder").startswith("the VAE is float32 already")


def test_engines_from_before_open(engine: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(engine, tmp_path / "old")

    def forget(document: dict[str, Any]) -> None:
        for module in document["modules"].values():
            del module["half_range"]
        del document["recipe"]["vae_dtype"]

    reseal(folder, forget)
    manifest = read_manifest(folder)
    assert manifest.modules["vae_decoder"].half_range is None
    assert "vae_decoder" not in summary(manifest)
    assert manifest.remedy("vae_decoder").endswith("--vae-dtype fp32")


@pytest.mark.parametrize(
    ("field", "value"), [("scale", 0.0), ("scale", 2.0), ("dtype", "fp8"), ("largest", -1.0)]
)
def test_a_finding_that_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        HalfRange.model_validate({"dtype": "fp16", "largest": 1.0, field: value})


@torch.no_grad()
def test_the_cuda_graph_is_float16_and_right(loud: Path, tmp_path: Path) -> None:
    """Its fused norms have the scaled eps; run in numpy, number by number, each rounded to float16."""
    recipe = Recipe.make(dtype="fp16", batch=1)
    specs = {spec.name: spec for spec in module_specs(Networks.of(resolve(loud)), recipe)}
    decoder, encoder = networks(loud, torch.float64)
    assert encoder is not None
    latents, image = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64) * 2 - 1
    for name, inputs, truths in (
        ("vae_decoder", {"latents": latents}, (decoder(latents.double()),)),
        ("vae_encoder", {"image": image}, encoder(image.double())),
    ):
        compile_onnx(specs[name], tmp_path, lowerings(recipe))
        path = tmp_path / f"{name}.onnx"
        graph = onnx.load(path, load_external_data=False).graph
        filters = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
        assert filters == {onnx.TensorProto.FLOAT16}
        norms = [node for node in graph.node if "GroupNorm" in node.op_type]
        eps = [a.f for node in norms for a in node.attribute if a.name == "epsilon"]
        assert norms and max(eps) < 1e-7
        for got, truth in zip(run(path, inputs), truths, strict=True):
            assert relative(torch.from_numpy(got), truth) < 5e-3


@pytest.mark.parametrize("vae", ["auto", "fp32"])
def test_a_picture_that_is_not_finite_names_the_way_out(loud: Path, tmp_path: Path, vae: str) -> None:
    """A decoder that overflows in spite of all, at its end, where infinity would be a white pixel."""
    folder = export(loud, tmp_path / "engine", Recipe.make(**HALF, vae_dtype=vae))
    path = folder / "vae_decoder.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    state = load_file(path)
    state["decoder.conv_out.bias"] = torch.full_like(state["decoder.conv_out.bias"], torch.inf)
    save_file(state, path, metadata=header)
    reseal(folder, lambda document: None)
    pipe = Pipeline(Engine.open(folder))
    pipe.set_progress_bar_config(disable=True)
    way = "--vae-dtype fp32" if vae == "auto" else "the VAE is float32 already"
    with pytest.raises(NumericalError, match=f"picture is not finite; .*{way}"):
        pipe("a", num_inference_steps=1)
