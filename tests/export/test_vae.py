"""Another VAE in the place of a checkpoint's own: found, refused where it does not fit, and recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdfast.cli import main
from sdfast.engine import Engine
from sdfast.errors import CheckpointError, EngineError, ExportError
from sdfast.export.build import Silent, export
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.files import sha256
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.export.vae import with_vae
from sdfast.manifest import read_manifest
from sdfast.models.vae import TINY, load_vae, vae_config
from sdfast.validation.reference import reference_pipeline
from tests import checkpoints
from tests.export.test_controlnet import WEIGHTS, config, cut, to_pickle
from tests.original_layout import to_original
from tests.sealing import reseal


def with_other(checkpoint: Path, source: object, **setting: str) -> Checkpoint:
    asked = Recipe.make(vae={"source": source, **setting})
    return with_vae(resolve(checkpoint), asked.vae)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE for `tiny_sd`: copy it before changing it."""
    return checkpoints.build_vae(tmp_path_factory.mktemp("vae") / "other")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE for `tiny_sd`: copy it before changing it."""
    return checkpoints.build_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "no config.json, so not a VAE's folder; give the file itself: diff",
    ),
    "of another class": (
        config(_class_name="ConsistencyDecoderVAE"),
        "is a ConsistencyDecoderVAE, not a VAE that can be exported; supported: AutoencoderKL, AutoencoderTi",
    ),
    "a pickle": (to_pickle, r"a pickle only \(diffusion_pytorch_model.bin\)"),
    "half a file": (cut, "is truncated, or not safetensors"),
    "of other latents": (config(scaling_factor=0.13025), r"scaled by 0.13025, and those of .* by 0.18215"),
    "of more channels": (config(latent_channels=16), "a VAE of 16 latent channels, and this .* has 4; take"),
    "of another kind": (config(temporal_layers=2), "temporal_layers=2 is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(tiny_sd: Path, other: Path, tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    folder = shutil.copytree(other, tmp_path / "changed")
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        with_other(tiny_sd, folder)
    assert str(folder) in str(caught.value)


def test_a_tiny_one_of_other_levels_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = checkpoints.build_tiny_vae(tmp_path / "tiny", levels=2)
    with pytest.raises(CheckpointError, match="a VAE of 2 pixels a latent, and this checkpoint's has 8"):
        with_other(tiny_sd, folder)


def test_what_is_no_folder_or_has_other_settings_is_refused(tiny_sd: Path, other: Path) -> None:
    with pytest.raises(CheckpointError, match="is a VAE's file, for which variant has no meaning; leave it"):
        with_other(tiny_sd, other / WEIGHTS, variant="fp16")
    with pytest.raises(CheckpointError, match="folder, for which revision has no meaning; leave it out"):
        with_other(tiny_sd, other, revision="main")
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'fp16'; .* ask for no variant"):
        with_other(tiny_sd, other, variant="fp16")
    with pytest.raises(CheckpointError, match=r"a VAE is a diffusers folder, a \.safetensors file or a Hub"):
        with_other(tiny_sd, "nowhere")
    with pytest.raises(ExportError, match="vae: unknown field 'scale'; there are: source, revision, variant"):
        Recipe.make(vae={"source": "org/vae", "scale": 1})
    with pytest.raises(ExportError, match="vae: is the source of another VAE; the precision is vae_dtype = "):
        Recipe.make(dtype="fp16", vae="fp32")
    with pytest.raises(ExportError, match="must be a folder, a file or a Hub id, or a table"):
        Recipe.make(vae=AutoencoderTiny())


# ---------------------------------------------------------------- single files


def as_file(folder: Path, file: Path, layout: str) -> Path:
    """A VAE's folder as a single file."""
    state = load_file(folder / WEIGHTS)
    if layout != "diffusers":
        original = to_original({"unet": {}, "vae": state, "text_encoder": {}}, layers_per_block=1)
        state = {name.removeprefix("first_stage_model."): tensor for name, tensor in original.items()}
        state["loss.logvar"] = torch.zeros(1)  # which some trainers leave in
    if layout == "prefixed":
        state = {f"first_stage_model.{name}": tensor for name, tensor in state.items() if "loss" not in name}
        state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1)  # a whole checkpoint's
    save_file(state, file)
    return file


@pytest.mark.parametrize("layout", ["diffusers", "original", "prefixed"])
def test_a_single_file_is_read_as_diffusers_reads_it(
    tiny_sd: Path, other: Path, tmp_path: Path, layout: str
) -> None:
    file = as_file(other, tmp_path / "vae.safetensors", layout)
    checkpoint = with_other(tiny_sd, file)
    ours = checkpoint.state_dict("vae")
    theirs = AutoencoderKL.from_single_file(str(file), config=str(other)).state_dict()
    assert ours.keys() == theirs.keys() == load_file(other / WEIGHTS).keys()
    assert all(torch.equal(ours[name].reshape(theirs[name].shape), theirs[name]) for name in theirs)
    decoder, encoder = load_vae(Networks.of(checkpoint).vae, ours)
    plain = AutoencoderKL.from_pretrained(other)
    latents = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        truth = (plain.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decoder(latents), truth, rtol=1e-5, atol=1e-5)
        reference = reference_pipeline(checkpoint).vae.decode(latents / 0.18215).sample
        torch.testing.assert_close((reference / 2 + 0.5).clamp(0, 1), truth, rtol=1e-6, atol=1e-6)
    assert encoder is not None


def test_a_tiny_ones_file_needs_no_config(tiny_sd: Path, tmp_path: Path) -> None:
    """It is TAESD's, the only one that there is."""
    made = AutoencoderTiny()
    file = tmp_path / "taesd.safetensors"
    save_file(made.state_dict(), file)
    checkpoint = with_other(tiny_sd, file)
    assert checkpoint.component("vae").class_name == TINY
    latents = torch.randn(1, 4, 8, 8)
    decoder, _ = load_vae(Networks.of(checkpoint).vae, checkpoint.state_dict("vae"))
    with torch.no_grad():
        truth = (made.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decoder(latents), truth, rtol=1e-5, atol=1e-5)
        assert torch.equal(
            reference_pipeline(checkpoint).vae.decode(latents).sample, made.decode(latents).sample
        )


NO_VAES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "half of a TAESD": (
        {"1.weight": torch.zeros(1), "3.conv.0.weight": torch.zeros(1)},
        "one half of a tiny VAE in the layout of its author; give diffusers' file or folder",
    ),
    "a LoRA": ({"unet.down.lora_A.weight": torch.zeros(1)}, "no VAE's decoder, but unet.down.lora_A.weight"),
    "another VAE": (
        {"decoder.blocks.0.weight": torch.zeros(1)},
        r"a decoder of another kind \(decoder.blocks",
    ),
}


@pytest.mark.parametrize("case", NO_VAES)
def test_a_file_without_a_vae_is_refused_by_what_it_holds(tiny_sd: Path, tmp_path: Path, case: str) -> None:
    tensors, message = NO_VAES[case]
    save_file(tensors, tmp_path / "some.safetensors")
    with pytest.raises(CheckpointError, match=message):
        with_other(tiny_sd, tmp_path / "some.safetensors")
    pickle = tmp_path / "vae.pt"
    pickle.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"vae\.pt is a pickle"):
        with_other(tiny_sd, pickle)


def test_a_file_whose_shapes_are_others_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    """A file tells no config, so that the checkpoint's own is taken."""
    wide = checkpoints.build_vae(tmp_path / "wide", block_out_channels=(16, 16, 32, 64))
    file = as_file(wide, tmp_path / "wide.safetensors", "diffusers")
    with pytest.raises(
        CheckpointError, match=r"wide.safetensors: the vae weights do not fit its config.json"
    ):
        export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", vae=file))
    assert not (tmp_path / "engine").exists()


def test_where_the_checkpoint_has_a_tiny_one_a_file_has_no_config(
    tiny: Path, other: Path, tmp_path: Path
) -> None:
    checkpoint = with_tiny(checkpoints.build_sd(tmp_path / "sd"), tiny)
    with pytest.raises(
        CheckpointError, match="that of the checkpoint's own VAE is of a AutoencoderTiny; give"
    ):
        with_other(checkpoint, other / WEIGHTS)
    assert with_other(checkpoint, other).component("vae").class_name == "AutoencoderKL"


def with_tiny(checkpoint: Path, tiny: Path) -> Path:
    """A checkpoint whose own VAE is a tiny one."""
    shutil.rmtree(checkpoint / "vae")
    shutil.copytree(tiny, checkpoint / "vae")
    path = checkpoint / "model_index.json"
    index = {**json.loads(path.read_text("utf-8")), "vae": ["diffusers", TINY]}
    path.write_text(json.dumps(index), "utf-8")
    return checkpoint


# ---------------------------------------------------------------- engines


class Log(Silent):
    def __init__(self) -> None:
        self.built: set[str] = set()

    def end(self, stage: Any) -> None:
        if stage.note != "unchanged, kept":
            self.built.add(stage.name)


def test_an_engine_records_it_and_another_one_builds_the_vae_alone(
    tiny_sd: Path, other: Path, tiny: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    plain = export(tiny_sd, engine, Recipe.make(backend="eager"))
    weights = read_manifest(plain).checkpoint.weights
    for source, kind in ((other, "AutoencoderKL"), (tiny, TINY)):
        log = Log()
        export(tiny_sd, engine, Recipe.make(backend="eager", vae=source), progress=log)
        assert log.built == {"checkpoint", "vae_decoder", "vae_encoder", "digests"}
        manifest = read_manifest(engine)
        used = manifest.checkpoint.vae
        assert used is not None
        assert (used.source, used.weights) == (str(source), {WEIGHTS: sha256(source / WEIGHTS, "")})
        assert manifest.checkpoint.weights == {k: v for k, v in weights.items() if not k.startswith("vae/")}
        assert manifest.draws_latents == (kind != TINY)
        told = CliRunner().invoke(main, ["info", str(engine)]).output
        assert f"VAE of       {source}" in told
        truth = getattr(__import__("diffusers"), kind).from_pretrained(source)
        latents = torch.randn(1, 4, 8, 8)
        picture = Engine.open(engine).call("vae_decoder", {"latents": latents}, 64, 64)["image"]
        with torch.no_grad():
            expected = (truth.decode(latents / truth.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(picture, expected, rtol=1e-5, atol=1e-5)
    log = Log()
    export(tiny_sd, engine, Recipe.make(backend="eager", vae=tiny), progress=log)
    assert log.built == {"checkpoint"}


def test_of_a_whole_checkpoint_its_vae_is_taken(tiny_sd: Path, tmp_path: Path) -> None:
    whole = checkpoints.build_sd(tmp_path / "whole", seed=5)
    checkpoint = with_other(tiny_sd, whole)
    assert checkpoint.component("vae").weights == (whole / "vae" / WEIGHTS,)
    ours, theirs = checkpoint.state_dict("vae"), load_file(whole / "vae" / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(name.startswith("vae/") for name in checkpoint.digests())


def test_a_checkpoint_whose_own_is_tiny_is_exported(tiny: Path, tmp_path: Path) -> None:
    checkpoint = with_tiny(checkpoints.build_sd(tmp_path / "sd"), tiny)
    manifest = read_manifest(export(checkpoint, tmp_path / "engine", Recipe.make(backend="eager")))
    assert manifest.checkpoint.vae is None and "vae/" + WEIGHTS in manifest.checkpoint.weights
    assert manifest.modules["vae_encoder"].outputs == ("mean",)


def test_in_half_precision_a_tiny_one_is_float16_where_it_fits(
    tiny_sd: Path, tiny: Path, tmp_path: Path
) -> None:
    half = Recipe.make(backend="eager", dtype="fp16", vae=tiny)
    manifest = read_manifest(export(tiny_sd, tmp_path / "engine", half))
    found = manifest.modules["vae_decoder"].half_range
    assert found is not None and (found.dtype, found.scale, found.reason) == ("fp16", 1.0, None)
    assert 0.5 < found.largest < 4000
    assert manifest.remedy("vae_decoder").endswith("--vae-dtype fp32")
    loud = shutil.copytree(tiny, tmp_path / "loud")
    weights = load_file(loud / WEIGHTS)
    weights["decoder.layers.0.weight"] *= 1e5
    save_file(weights, loud / WEIGHTS)
    too_loud = Recipe.make(backend="eager", dtype="fp16", vae=loud)
    changed = export(tiny_sd, tmp_path / "loud-engine", too_loud)
    found = read_manifest(changed).modules["vae_decoder"].half_range
    assert found is not None and found.dtype == "fp32" and "no norm makes smaller" in str(found.reason)
    with safe_open(changed / "vae_decoder.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


def test_recipes_from_before_call_the_precision_vae(tiny_sd: Path, tmp_path: Path) -> None:
    recipe = Recipe.make(backend="eager", dtype="fp16", vae_dtype="fp32")
    engine = export(tiny_sd, tmp_path / "engine", recipe)

    def as_before(document: dict[str, Any]) -> None:
        document["recipe"]["vae"] = document["recipe"].pop("vae_dtype")

    reseal(engine, as_before)
    manifest = read_manifest(engine)
    assert Recipe.recorded(manifest.recipe) == recipe
    assert manifest.vae_dtype == "fp32"
    log = Log()
    export(tiny_sd, engine, recipe, progress=log)
    assert log.built == {"checkpoint"}


def test_one_that_changed_is_told_of_when_it_is_validated(tiny_sd: Path, tiny: Path, tmp_path: Path) -> None:
    from sdfast.validation import validate

    own = shutil.copytree(tiny, tmp_path / "tiny")
    engine = export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", vae=own))
    weights = load_file(own / WEIGHTS)
    weights["decoder.layers.0.bias"] += 0.01
    save_file(weights, own / WEIGHTS)
    with pytest.raises(EngineError, match=rf"VAE {WEIGHTS}: exported \w+, found \w+"):
        validate(engine, steps=2, prompts=["a cabin"])
    shutil.rmtree(own)
    with pytest.raises(EngineError, match="what it was exported from is not there any more"):
        validate(engine, steps=2, prompts=["a cabin"])


def test_the_command_line_takes_one(tiny_sd: Path, tiny: Path, tmp_path: Path) -> None:
    command = [
        "export",
        str(tiny_sd),
        "-o",
        str(tmp_path / "engine"),
        "--backend",
        "eager",
        "--vae",
        str(tiny),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    used = read_manifest(tmp_path / "engine").checkpoint.vae
    assert used is not None and used.source == str(tiny)


def test_the_config_of_each_class_is_read_by_it() -> None:
    assert type(vae_config(TINY, {})) is not type(vae_config("AutoencoderKL", {}))
