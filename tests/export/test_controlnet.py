"""ControlNets beside a checkpoint: found, refused where they do not fit, and recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from sdfast.errors import CheckpointError, EngineError, ExportError
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.controlnet import with_controlnets
from sdfast.export.files import sha256
from sdfast.export.networks import Networks
from sdfast.export.recipe import ControlNetSetting, Recipe
from sdfast.manifest import read_manifest
from sdfast.validation.reference import reference_pipeline
from tests import checkpoints
from tests.original_layout import controlnet_to_original
from tests.sealing import reseal

WEIGHTS = "diffusion_pytorch_model.safetensors"


def beside(checkpoint: Path, source: object, **setting: str) -> Networks:
    given = ControlNetSetting.model_validate({"source": source, **setting})
    return Networks.of(with_controlnets(resolve(checkpoint), [given]))


@pytest.fixture
def controlnet(tiny_controlnet: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return shutil.copytree(tiny_controlnet, tmp_path / "controlnet")


def config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")

    return change


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "so not a ControlNet's folder; give the file itself: diff",
    ),
    "a union": (config(_class_name="ControlNetUnionModel"), "is a ControlNetUnionModel, not a ControlNet"),
    "a pickle": (to_pickle, r"a pickle only \(diffusion_pytorch_model.bin\)"),
    "half a file": (cut, "is truncated, or not safetensors"),
    "pooled or not": (config(global_pool_conditions="yes"), "global_pool_conditions='yes' is not supported"),
    "for SD 2": (config(cross_attention_dim=48), "cross_attention_dim: 48, but 32 is needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(tiny_sd: Path, controlnet: Path, case: str) -> None:
    change, message = BAD[case]
    change(controlnet)
    with pytest.raises(CheckpointError, match=message) as caught:
        beside(tiny_sd, controlnet)
    assert str(controlnet) in str(caught.value)


def test_what_is_no_folder_or_has_other_settings_is_refused(tiny_sd: Path, controlnet: Path) -> None:
    with pytest.raises(CheckpointError, match="file, for which variant has no meaning; leave it out"):
        beside(tiny_sd, controlnet / WEIGHTS, variant="fp16")
    with pytest.raises(CheckpointError, match="revision has no meaning; leave it out"):
        beside(tiny_sd, controlnet, revision="main")
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'fp16'; .* ask for no variant"):
        beside(tiny_sd, controlnet, variant="fp16")
    with pytest.raises(
        CheckpointError, match=r"a ControlNet is a diffusers folder, a \.safetensors file or a"
    ):
        beside(tiny_sd, "nowhere")
    with pytest.raises(ExportError, match="controlnet: unknown field 'scale'; there are: source, revision"):
        Recipe.make(controlnet={"source": "org/canny", "scale": 1})


def as_file(folder: Path, file: Path, layout: str) -> Path:
    """A ControlNet's folder as a single file."""
    state = load_file(folder / WEIGHTS)
    if layout != "diffusers":
        state = controlnet_to_original(state, layers_per_block=1)
    if layout == "prefixed":
        state = {f"control_model.{name}": tensor for name, tensor in state.items()}
    save_file(state, file)
    return file


@pytest.mark.parametrize(
    ("layout", "linear"), [("diffusers", True), ("original", True), ("prefixed", False)]
)  # as those of SD 2 are, or of SD 1
def test_a_single_file_is_read_as_diffusers_reads_it(
    tiny_sd: Path, tmp_path: Path, layout: str, linear: bool
) -> None:
    """And gets the config of the folder it was made of."""
    folder = checkpoints.build_controlnet(tmp_path / "folder", tiny_sd, use_linear_projection=linear)
    file = as_file(folder, tmp_path / "canny.safetensors", layout)
    theirs = ControlNetModel.from_single_file(str(file), config=str(folder)).state_dict()
    networks = beside(tiny_sd, file)
    [added] = networks.checkpoint.controlnets
    read = added.state_dict()
    assert read.keys() == theirs.keys()
    assert all(torch.equal(read[name], theirs[name]) for name in theirs)
    assert networks.controlnets == beside(tiny_sd, folder).controlnets
    reference = reference_pipeline(networks.checkpoint).controlnet.state_dict()
    assert all(torch.equal(reference[name], theirs[name]) for name in theirs)
    assert added.record().weights == {"canny.safetensors": sha256(file, "")}


WITHOUT_ATTENTION = {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("original", {}),
        ("original", {"transformer_layers_per_block": [1, 1]}),
        ("diffusers", WITHOUT_ATTENTION),
    ],
)
def test_a_single_file_for_sdxl(
    tiny_sdxl: Path, tmp_path: Path, layout: str, changes: dict[str, Any]
) -> None:
    folder = checkpoints.build_controlnet(tmp_path / "folder", tiny_sdxl, **changes)
    networks = beside(tiny_sdxl, as_file(folder, tmp_path / "canny.safetensors", layout))
    [added], read = networks.checkpoint.controlnets, load_file(folder / WEIGHTS)
    state, reference = added.state_dict(), reference_pipeline(networks.checkpoint).controlnet.state_dict()
    assert state.keys() == reference.keys() == read.keys()
    assert all(torch.equal(state[n], read[n]) and torch.equal(reference[n], read[n]) for n in read)
    assert networks.controlnets == beside(tiny_sdxl, folder).controlnets


NO_CONTROLNETS = {
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "a ControlLLLite",
    "lora_controlnet": "a Control-LoRA",
    "task_embedding": "a ControlNet union",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "difference": "a difference from a U-Net",
    "double_blocks.0.img_attn.qkv.weight": "what is for a model with a transformer",
    "up_blocks.0.resnets.0.conv1.weight": "a U-Net",
    "decoder.conv_in.weight": "neither controlnet_cond_embedding nor input_hint_block",
}


def test_a_file_that_is_called_shuffle_pools(tiny_sd: Path, controlnet: Path, tmp_path: Path) -> None:
    """Of which its tensors tell nothing."""
    for name, pools in (("canny", False), ("control_v11e_sd15_Shuffle", True)):
        networks = beside(tiny_sd, as_file(controlnet, tmp_path / f"{name}.safetensors", "original"))
        assert [found.pools for found in networks.controlnets] == [pools]
        reference = reference_pipeline(networks.checkpoint).controlnet
        assert reference.config.global_pool_conditions is pools


@pytest.mark.parametrize("name", NO_CONTROLNETS)
def test_a_file_that_is_no_controlnet_is_refused_by_name(tiny_sd: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "some.safetensors"
    union = {"controlnet_cond_embedding.conv_in.weight": torch.ones(1)} if name == "task_embedding" else {}
    save_file({name: torch.ones(1), **union}, file)
    with pytest.raises(CheckpointError, match=f"holds {NO_CONTROLNETS[name]}.*; supported: ControlNets for"):
        beside(tiny_sd, file)


def test_a_controlnet_file_that_does_not_fit_is_refused(
    tiny_sd: Path, tiny_sdxl: Path, controlnet: Path, tmp_path: Path
) -> None:
    file = as_file(controlnet, tmp_path / "canny.safetensors", "original")
    with pytest.raises(CheckpointError, match=r"does not fit the U-Net: .* another kind of Stable Diffusion"):
        beside(tiny_sdxl, file)
    (tmp_path / "canny.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"canny\.pth is a pickle"):
        beside(tiny_sd, tmp_path / "canny.pth")
    state = {name: t for name, t in load_file(controlnet / WEIGHTS).items() if "resnets.0.conv1" not in name}
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"conv1\.weight' is missing"):
        beside(tiny_sd, file)


NO_NAMES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "numbers that are none": (
        {"input_hint_block.x.weight": torch.ones(1), "zero_convs": torch.ones(1)},
        "levels",
    ),
    "a huge number": ({f"input_blocks.{'9' * 5000}.0.op.weight": torch.ones(1)}, "levels"),
    "many levels": ({"down_blocks.9999.resnets.0.norm1.weight": torch.ones(1)}, "10000 levels"),
    "too few axes": ({"a.attn2.to_k.weight": torch.ones(1)}, "a tensor has too few axes"),
    "no weights": ({f"input_blocks.{i}.0.in_layers.2.weight": torch.ones(1) for i in (1, 3)}, "is missing"),
}


@pytest.mark.parametrize("case", NO_NAMES)
def test_a_file_of_other_names_is_refused(tiny_sd: Path, tmp_path: Path, case: str) -> None:
    tensors, message = NO_NAMES[case]
    file = tmp_path / "some.safetensors"
    save_file(
        {"input_hint_block.0.weight": torch.ones(1), "input_blocks.2.0.op.weight": torch.ones(1), **tensors},
        file,
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        beside(tiny_sd, file)
    assert str(file) in str(caught.value)


def test_an_engine_records_it_and_is_made_again_when_it_changes(
    tiny_sd: Path, controlnet: Path, controlled_engine: Path, tmp_path: Path
) -> None:
    """And is not read without its module for the control image."""
    [recorded] = read_manifest(controlled_engine).checkpoint.controlnets
    assert recorded.weights == {WEIGHTS: sha256(controlnet / WEIGHTS, "")}
    assert read_manifest(controlled_engine).recipe["controlnet"][0]["source"] == recorded.source

    broken = shutil.copytree(controlled_engine, tmp_path / "broken")
    reseal(broken, lambda document: document["modules"].pop("control_embedding"))
    with pytest.raises(EngineError, match="no module 'control_embedding'"):
        read_manifest(broken)

    recipe, target = Recipe.make(backend="eager", controlnet=controlnet), tmp_path / "engine"
    export(tiny_sd, target, recipe)
    first = read_manifest(target)
    shutil.rmtree(controlnet)
    checkpoints.build_controlnet(controlnet, tiny_sd, seed=9)
    export(tiny_sd, target, recipe)
    second = read_manifest(target)
    changed = {name for name in first.modules if first.modules[name] != second.modules[name]}
    assert changed == {"unet", "time_shift", "context", "control_embedding"}


def test_an_engine_of_before_is_read_if_it_has_no_controlnet(
    sd_engine: Path, controlled_engine: Path, tmp_path: Path
) -> None:
    """Its one ControlNet has another name in the manifest, and one scale for all layers."""
    plain, old = (shutil.copytree(one, tmp_path / one.name) for one in (sd_engine, controlled_engine))

    def as_before(document: dict[str, Any]) -> None:
        made_of, model = document["checkpoint"], document["model"]
        made_of["controlnet"] = next(iter(made_of.pop("controlnets")), None)
        del model["controlnets"], model["control_layers"], model["pooling_controlnets"]

    for folder in (plain, old):
        reseal(folder, as_before)
    assert read_manifest(plain).model == read_manifest(sd_engine).model
    with pytest.raises(EngineError, match=r"model: its ControlNets have one scale for all layers, .*export"):
        read_manifest(old)


def test_a_recipe_has_a_table_or_several(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[controlnet]\nsource = "org/canny"\nvariant = "fp16"', "utf-8")
    canny = ControlNetSetting(source="org/canny", variant="fp16")
    assert Recipe.read(path).controlnet == (canny,)
    path.write_text(
        path.read_text("utf-8").replace("[controlnet]", "[[controlnet]]")
        + '\n[[controlnet]]\nsource = "pose"',
        "utf-8",
    )
    pose = ControlNetSetting(source="pose")
    assert Recipe.read(path).controlnet == (canny, pose)
    assert Recipe.make(controlnet=["pose", Path("depth")]).controlnet[1].source == "depth"
    assert Recipe.make().controlnet == Recipe.make(controlnet=None).controlnet == ()
    with pytest.raises(ExportError, match="controlnet: unknown field 'scale'; there are: source, revision"):
        Recipe.make(controlnet=["pose", {"source": "depth", "scale": 1}])


def test_of_several_the_one_that_does_not_fit_is_named(
    tiny_sd: Path, controlnet: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(controlnet, tmp_path / "other")
    config(cross_attention_dim=48)(other)
    with pytest.raises(CheckpointError, match=r"/other: the ControlNet does not fit the U-Net"):
        Networks.of(
            with_controlnets(resolve(tiny_sd), Recipe.make(controlnet=[controlnet, other]).controlnet)
        )
