"""IP-Adapters' files: where they are found, which are taken, and what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdfast.errors import CheckpointError, ExportError
from sdfast.export.build import export
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.ip_adapter import with_ip_adapters
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.manifest import ImageProcessor
from sdfast.models.ip_adapter import load_image_context, transformers
from tests import checkpoints


@pytest.fixture(scope="module")
def adapter(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain one, beside its image encoder."""
    return checkpoints.build_ip_adapter(tmp_path_factory.mktemp("ip") / "plain.safetensors", tiny_sd)


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(adapter.parent, tmp_path / "copied")) / adapter.name


def given(folder: Path, *found: Any, encoder: str | None = None) -> Checkpoint:
    recipe = Recipe.make(ip_adapters=found, image_encoder=encoder)
    return with_ip_adapters(resolve(folder), recipe.ip_adapters, recipe.image_encoder)


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


DIFFUSERS_NAMES = (
    ("0.norm1.", "ln0."),
    ("0.norm2.", "ln1."),
    ("0.to_", "attn.to_"),
    ("1.0.", "ff.0."),
    ("1.1.", "ff.1.net.0.proj."),
    ("1.3.", "ff.1.net.2."),
)


def named_as_diffusers_names_them(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers." in name]:
        layer = ".".join(name.split(".")[:3])
        for ours, theirs in DIFFUSERS_NAMES:
            if name.startswith(f"{layer}.{ours}"):
                tensors[name.replace(f"{layer}.{ours}", f"{layer}.{theirs}")] = tensors.pop(name)


def test_both_names_of_a_resampler_are_one(tiny_sd: Path, tmp_path: Path) -> None:
    """And stock diffusers loads both to the same."""
    from diffusers import UNet2DConditionModel

    plus = checkpoints.build_ip_adapter(tmp_path / "plus.safetensors", tiny_sd, "plus")
    other = changed(Path(shutil.copy(plus, tmp_path / "other.safetensors")), named_as_diffusers_names_them)
    assert "image_proj.layers.2.attn.to_kv.weight" in load_file(other)
    checkpoint = given(tiny_sd, plus, other)
    one, another = checkpoint.ip_adapters
    assert one.config == another.config and one.config.depth == 4
    seen = torch.randn(1, 10, one.config.inputs)
    unet, stock = Networks.of(checkpoint).unet, UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    with torch.no_grad():
        tokens = [load_image_context(x.config, unet, x.state_dict()).image_proj(seen) for x in (one, another)]
        assert torch.equal(*tokens)
        for path in (plus, other):
            projection = {
                name.removeprefix("image_proj."): tensor
                for name, tensor in load_file(path).items()
                if name.startswith("image_proj.")
            }
            truth = stock._convert_ip_adapter_image_proj_to_diffusers(projection)(seen)
            torch.testing.assert_close(tokens[0], truth, rtol=1e-5, atol=1e-5)


def test_transformers_have_the_names_of_diffusers_scales(tiny_sdxl: Path) -> None:
    found = transformers(Networks.of(resolve(tiny_sdxl)).unet)
    assert [tuple(one) for one in found] == [
        ("down.block_1.0", 64, 2),
        ("mid", 64, 2),
        ("up.block_0.0", 64, 2),
        ("up.block_0.1", 64, 2),
    ]


def test_an_adapter_is_found_where_it_is_said(tiny_sd: Path, adapter: Path, tmp_path: Path) -> None:
    """As diffusers is told of it; and its image encoder beside it, in the checkpoint, or elsewhere."""
    repository = tmp_path / "repository"
    shutil.copytree(adapter.parent, repository / "models")
    told = {"source": repository, "subfolder": "models", "weight_name": adapter.name}
    for one in (told, {"source": repository, "weight_name": f"models/{adapter.name}"}):
        [found] = given(tiny_sd, one).ip_adapters
        assert (found.file, found.path) == (f"models/{adapter.name}", repository / "models" / adapter.name)
    assert given(tiny_sd, adapter).ip_adapters[0].file is None
    alone = shutil.copy(adapter, tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"no image encoder: .* no such folder; give the one"):
        given(tiny_sd, alone)
    encoder = str(repository / "models" / "image_encoder")
    assert given(tiny_sd, alone, encoder=encoder).image_encoder.source == encoder
    whole = Path(shutil.copytree(tiny_sd, tmp_path / "whole"))
    shutil.copytree(encoder, whole / "image_encoder")
    assert given(whole, alone).image_encoder.source == f"{whole}/image_encoder"


def test_a_subfolder_needs_a_name() -> None:
    with pytest.raises(ExportError, match="ip_adapters: subfolder: give weight_name too"):
        Recipe.make(ip_adapters=[{"source": "org/name", "subfolder": "models"}])
    with pytest.raises(ExportError, match="'scale'; there are: source, weight_name, revision, subfolder"):
        Recipe.make(ip_adapters=[{"source": "org/name", "scale": 1}])


def test_an_encoder_alone_is_refused(tiny_sd: Path) -> None:
    with pytest.raises(CheckpointError, match="image_encoder: is for IP-Adapters, and there are none"):
        given(tiny_sd, encoder="somewhere")


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def face(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["image_proj.proj.weight"]
    tensors["image_proj.proj.0.weight"] = torch.zeros(2, 2)


KINDS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another thing": (
        renamed("image_proj.norm.bias", "unet.bias"),
        r"holds unet.bias, so it is no IP-Adapter",
    ),
    "no projection": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("image_proj")],
        "has no image_proj and ip_adapter tensors, so it is no IP-Adapter; supported: the plain, the plus",
    ),
    "a FaceID": (face, "is an IP-Adapter FaceID, .* by insightface, which sdfast does not have"),
    "a FaceID plus": (
        renamed("image_proj.proj.weight", "image_proj.perceiver_resampler.proj_in.weight"),
        "is an IP-Adapter FaceID",
    ),
    "with a LoRA": (
        lambda tensors: tensors.update({"ip_adapter.1.to_k_lora.down.weight": torch.zeros(2, 2)}),
        "is an IP-Adapter FaceID",
    ),
    "too few axes": (
        lambda tensors: tensors.update({"image_proj.proj.weight": torch.zeros(4)}),
        "a tensor of the image projection is missing or has too few axes",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_adapter_is_refused(tiny_sd: Path, copied: Path, kind: str) -> None:
    change, message = KINDS[kind]
    changed(copied, change)
    with pytest.raises(CheckpointError, match=message):
        given(tiny_sd, copied)


def test_a_pickle_is_refused(tiny_sd: Path, copied: Path) -> None:
    pickle = copied.with_name("ip-adapter_sd15.bin")
    pickle.write_bytes(b"\x80\x04.")
    for one in (pickle, {"source": copied.parent, "weight_name": pickle.name}):
        with pytest.raises(CheckpointError, match=r"is a pickle. sdfast reads safetensors only"):
            given(tiny_sd, one)


def first_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["ip_adapter.1.to_v_ip.weight"] = tensors["ip_adapter.1.to_v_ip.weight"][:4].clone()


UNFIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "too few layers": (
        lambda tensors: [tensors.pop(f"ip_adapter.5.to_{one}_ip.weight") for one in "kv"],
        "it has weights for 3 cross-attention layers, and this checkpoint's U-Net has 4; give one that was",
    ),
    "another layer": (first_layer, r"ip_adapter.1.to_v_ip.weight has shape \[4, 32\]; \[64, 32\] is needed"),
    "other numbers of layers": (
        renamed("ip_adapter.1.to_k_ip.weight", "ip_adapter.0.to_k_ip.weight"),
        "a tensor of the image projection is missing|ip_adapter.1.to_k_ip.weight is not there",
    ),
    "another width of image": (
        lambda tensors: tensors.update({"image_proj.proj.weight": torch.zeros(4 * 32, 25)}),
        "it reads 25 numbers of the image encoder, and .*image_encoder gives 24; give the image encoder that",
    ),
    "a tensor too many": (
        lambda tensors: tensors.update({"image_proj.extra": torch.zeros(2)}),
        "1 unexpected: image_proj.extra",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused(tiny_sd: Path, copied: Path, tmp_path: Path, case: str) -> None:
    change, message = UNFIT[case]
    changed(copied, change)
    with pytest.raises(CheckpointError, match=message):
        export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", ip_adapters=[copied]))


def test_one_for_another_kind_of_checkpoint_is_refused(
    tiny_sd: Path, tiny_sdxl: Path, copied: Path, tmp_path: Path
) -> None:
    sdxl = checkpoints.build_ip_adapter(
        tmp_path / "sdxl.safetensors", tiny_sdxl, encoder=copied.parent / "image_encoder"
    )
    shutil.copytree(copied.parent / "image_encoder", tmp_path / "image_encoder")
    for folder, path, widths in ((tiny_sd, sdxl, "80.*32"), (tiny_sdxl, copied, "32.*80")):
        with pytest.raises(
            CheckpointError, match=f"does not fit: its tokens are for .*{widths}.*give one that"
        ):
            Networks.of(given(folder, path))


ENCODERS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "siglip_vision_model"}, "is a siglip_vision_model"),
    "another class": (
        {"architectures": ["CLIPModel"]},
        r"\['CLIPModel'\]\); the image encoder of an IP-Adapter",
    ),
    "code of its own": ({"auto_map": {"AutoModel": "a.B"}}, "the image encoder of an IP-Adapter is a CLIPV"),
    "no size": ({"image_size": None}, "gives image_size as None"),
    "another width": ({"projection_dim": 25}, "it reads 24 numbers of the image encoder, and"),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_another_image_encoder_is_refused(tiny_sd: Path, copied: Path, case: str) -> None:
    fields, message = ENCODERS[case]
    path = copied.parent / "image_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        given(tiny_sd, copied)


def test_how_images_are_made_ready_is_read_beside_the_encoder(tiny_sd: Path, copied: Path) -> None:
    def processor(**fields: Any) -> ImageProcessor:
        path = copied.parent / "image_encoder" / "preprocessor_config.json"
        path.write_text(json.dumps(fields), "utf-8")
        return given(tiny_sd, copied).image_encoder.processor

    assert given(tiny_sd, copied).image_encoder.processor == ImageProcessor(resize=30, crop=30)
    told = {"size": {"shortest_edge": 40}, "crop_size": {"height": 30, "width": 30}, "image_mean": [0.5] * 3}
    assert processor(**told, do_resize=True, resample=3, image_std=[0.5, 0.25, 1]) == ImageProcessor(
        resize=40, crop=30, mean=(0.5,) * 3, std=(0.5, 0.25, 1.0)
    )
    assert processor(size=32, crop_size=30).resize == 32
    for fields in (
        {"crop_size": 224},
        {"size": 20},
        {"size": {"height": 30, "width": 30}},
        {"do_center_crop": False},
        {"resample": 2},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
    ):
        [name] = fields
        with pytest.raises(CheckpointError, match=f"preprocessor_config.json has {name}="):
            processor(**fields)


def test_graphs_take_no_adapter(tmp_path: Path) -> None:
    from sdfast.export.graphs import recipe_for_graphs

    with pytest.raises(ExportError, match="ip_adapters: a holds graphs that optimum exported: IP-Adapters"):
        recipe_for_graphs(Recipe.make(ip_adapters=["org/name"]), "a")
