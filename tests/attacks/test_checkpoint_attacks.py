"""Checkpoints that try to run code, or to be read from or written to outside of their folder."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import resolve
from sdfast.export.tokenizer import save_runtime_tokenizer
from tests.checkpoints import build_sd
from tests.original_layout import save_original

UNET = "unet/diffusion_pytorch_model.safetensors"


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that shows that code of a checkpoint ran."""
    return tmp_path / "code-ran"


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "checkpoint"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(source: Path, mark: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(source, **arguments)
    assert not mark.exists(), "code of the checkpoint ran"
    return str(caught.value)


def torch_archive(payload: Exploit) -> bytes:
    """What torch.save writes: a zip with a pickle in it."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def test_the_exploit_works_where_pickles_are_read(mark: Path) -> None:
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.pt", "model.ckpt"])
def test_a_pickle_instead_of_weights(folder: Path, mark: Path, name: str) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Exploit(mark)))
    message = refused(folder, mark)
    assert f"a pickle only (unet/{name})" in message and "save_pretrained" in message


@pytest.mark.parametrize("form", [pickle.dumps, torch_archive])
@pytest.mark.parametrize("name", [UNET, "text_encoder/model.safetensors"])
def test_a_pickle_under_the_name_of_safetensors(folder: Path, mark: Path, form: Any, name: str) -> None:
    (folder / name).write_bytes(form(Exploit(mark)))
    assert "not safetensors" in refused(folder, mark)


@pytest.mark.parametrize("form", [pickle.dumps, torch_archive])
def test_a_pickle_as_a_single_file(tmp_path: Path, mark: Path, form: Any) -> None:
    for name in ("model.safetensors", "model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(form(Exploit(mark)))
        refused(tmp_path / name, mark, cache_dir=tmp_path / "cache")


def test_pickles_beside_weights_are_not_touched(folder: Path, mark: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.bin", "model.ckpt", "unet/training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Exploit(mark)))
    assert len(resolve(folder).state_dict("unet")) > 10
    assert not mark.exists()


def code(mark: Path) -> str:
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: pass\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": ["pipeline", "Evil"]}, "names a custom pipeline"),
        ({"custom_pipeline": "pipeline.py"}, "asks for custom code"),
        ({"auto_map": {"AutoModel": "pipeline.Evil"}}, "asks for custom code"),
        ({"unet": ["pipeline", "Evil"]}, "unet is pipeline.Evil, code outside of diffusers"),
        ({"unet": ["evil", "UNet2DConditionModel"]}, "code outside of diffusers"),
        ({"scheduler": ["scheduler_code", "PNDMScheduler"]}, "code outside of diffusers"),
        ({"tokenizer": ["transformers_modules.evil", "CLIPTokenizer"]}, "code outside of diffusers"),
        ({"_class_name": "os.system"}, "is not supported"),
    ],
)
def test_code_that_comes_with_the_checkpoint(
    folder: Path, mark: Path, changes: dict[str, Any], words: str
) -> None:
    for name in ("pipeline.py", "evil.py", "scheduler_code.py"):
        (folder / name).write_text(code(mark))
    edit(folder / "model_index.json", **changes)
    assert words in refused(folder, mark)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_code_beside_a_component(folder: Path, mark: Path, component: str) -> None:
    (folder / component / "modeling_evil.py").write_text(code(mark))
    assert f"{component} brings code of its own ({component}/modeling_evil.py)" in refused(folder, mark)
    (folder / component / "modeling_evil.py").unlink()
    edit(folder / component / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"})
    assert "auto_map in config.json" in refused(folder, mark)


def test_a_tokenizer_with_code_does_not_run_it(folder: Path, mark: Path, tmp_path: Path) -> None:
    (folder / "tokenizer" / "tokenization_evil.py").write_text(code(mark))
    edit(
        folder / "tokenizer" / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
        trust_remote_code=True,
    )
    try:
        save_runtime_tokenizer(resolve(folder).tokenizers["tokenizer"], tmp_path / "out")
    except CheckpointError as error:
        assert "tokenizer" in str(error)
    assert not mark.exists() and not any("evil" in name for name in sys.modules)


@pytest.mark.parametrize(
    "shard",
    [
        "../vae/diffusion_pytorch_model.safetensors",
        "../../secret.safetensors",
        "/etc/passwd",
        "/tmp/secret.safetensors",
        "sub/shard.safetensors",
        "..\\secret.safetensors",
        "C:\\secret.safetensors",
        "..",
        ".safetensors",
        "",
        "shard.bin",
        "shard.safetensors\0",
        "shard.safetensors\n",
        "~/secret.safetensors",
        ["shard.safetensors"],
        7,
        None,
    ],
)
def test_an_index_that_names_files_outside(tmp_path: Path, mark: Path, shard: Any) -> None:
    folder = build_sd(tmp_path / "sd", max_shard_size="200KB")
    index = folder / f"{UNET}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**weight_map, "conv_in.weight": shard})
    shutil.copy(folder / "unet" / weight_map["conv_in.bias"], tmp_path / "secret.safetensors")
    message = refused(folder, mark)
    assert "a shard must be a plain .safetensors file beside its index" in message


@pytest.mark.parametrize(
    "name",
    [UNET, "unet/config.json", "model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder(
    folder: Path, tmp_path: Path, mark: Path, name: str, relative: bool
) -> None:
    outside = (folder / name).rename(tmp_path / "outside")
    link = os.path.relpath(outside, (folder / name).parent) if relative else str(outside)
    (folder / name).symlink_to(link)
    assert f"{name} is a link out of the folder" in refused(folder, mark)


def test_a_linked_component(folder: Path, tmp_path: Path, mark: Path) -> None:
    (folder / "unet").rename(tmp_path / "outside")
    (folder / "unet").symlink_to(tmp_path / "outside")
    assert "a link out of the folder" in refused(folder, mark)


def test_a_link_inside_of_the_folder_is_fine(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "weights.safetensors")
    (folder / UNET).symlink_to("weights.safetensors")
    assert len(resolve(folder).state_dict("unet")) > 10


def test_links_that_lead_nowhere_or_in_a_circle(folder: Path, mark: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("diffusion_pytorch_model.safetensors")
    assert "diffusion_pytorch_model.safetensors" in refused(folder, mark)
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("gone")
    assert "diffusion_pytorch_model.safetensors" in refused(folder, mark)


def test_a_folder_that_poses_as_a_snapshot_reaches_no_further_than_its_cache(
    tiny_sd: Path, tmp_path: Path, mark: Path
) -> None:
    snapshot = tmp_path / "cache" / "models--a--b" / "snapshots" / "0"
    shutil.copytree(tiny_sd, snapshot)
    (snapshot / UNET).rename(tmp_path / "outside")
    (snapshot / UNET).symlink_to(tmp_path / "outside")
    assert "a link out of the folder" in refused(snapshot, mark)


def test_a_device_or_a_pipe_is_not_waited_on(folder: Path, mark: Path) -> None:
    (folder / UNET).unlink()
    os.mkfifo(folder / UNET)
    assert "is not a file" in refused(folder, mark)


def test_a_config_of_a_thousand_megabytes_is_not_read(folder: Path, mark: Path) -> None:
    with (folder / "unet" / "config.json").open("wb") as file:
        file.truncate(2**30)
    assert "not a config" in refused(folder, mark)


def test_a_header_of_a_thousand_megabytes_is_not_read(folder: Path, mark: Path) -> None:
    with (folder / UNET).open("wb") as file:
        file.write((2**30 - 8).to_bytes(8, "little"))
        file.truncate(2**30)
    assert "not safetensors" in refused(folder, mark)


def test_archives_are_not_unpacked(tmp_path: Path, mark: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("../code-ran", "x")
    with tarfile.open(tmp_path / "model.tar", "w"):
        pass
    for name in ("model.zip", "model.tar"):
        assert "is not a checkpoint" in refused(tmp_path / name, mark)


def test_configs_for_a_single_file_bring_no_code_either(
    tiny_sd: Path, folder: Path, tmp_path: Path, mark: Path
) -> None:
    file = save_original(tiny_sd, tmp_path / "model.safetensors")
    (folder / "pipeline.py").write_text(code(mark))
    edit(folder / "model_index.json", unet=["pipeline", "Evil"])
    assert "code outside of diffusers" in refused(file, mark, config=folder, cache_dir=tmp_path / "cache")
    shutil.copy(tiny_sd / "model_index.json", folder)
    for place in ("tokenizer", "feature_extractor"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "evil.py").write_text(code(mark))
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Evil"})
    resolve(file, config=folder, cache_dir=tmp_path / "cache")
    assert not mark.exists()


def test_a_config_folder_does_not_lead_out(tiny_sd: Path, folder: Path, tmp_path: Path, mark: Path) -> None:
    file = save_original(tiny_sd, tmp_path / "model.safetensors")
    secret = (folder / "tokenizer" / "vocab.json").rename(tmp_path / "secret")
    (folder / "tokenizer" / "vocab.json").symlink_to(secret)
    assert "a link out of the folder" in refused(file, mark, config=folder, cache_dir=tmp_path / "cache")
