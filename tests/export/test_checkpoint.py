"""Checkpoints from folders and single files: what is taken, and what is refused with which words."""

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdfast.errors import CheckpointError
from sdfast.export import single_file
from sdfast.export.checkpoint import resolve
from sdfast.export.networks import Networks
from tests.checkpoints import build_refiner, build_sd, build_sdxl
from tests.original_layout import save_original, to_original

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    """A tiny SD 1.x checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "checkpoint"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(source: str | Path, **arguments: Any) -> str:
    """The message with which a source is refused: one line that names the source."""
    with pytest.raises(CheckpointError) as caught:
        resolve(source, **arguments)
    message = str(caught.value)
    assert "\n" not in message and str(source) in message
    return message.replace(str(source), "SOURCE")


# What is taken


def test_sd(tiny_sd: Path) -> None:
    found = resolve(tiny_sd)
    assert (found.family, found.revision, found.folder) == ("sd", None, tiny_sd.resolve())
    assert list(found.components) == ["text_encoder", "unet", "vae"]
    assert found.components["unet"].class_name == "UNet2DConditionModel"
    assert found.components["unet"].config["cross_attention_dim"] == 32
    assert found.scheduler_config["_class_name"] == "PNDMScheduler"
    assert found.tokenizers == {"tokenizer": tiny_sd.resolve() / "tokenizer"}
    assert found.index["requires_safety_checker"] is False


def test_the_built_in_one(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "landscapes").mkdir()  # a folder of that name here does not take its place
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdfast.landscapes.checkpoint_folder", lambda: tiny_sd, raising=False)
    assert resolve("landscapes").folder == tiny_sd.resolve()
    with pytest.raises(CheckpointError, match="a built-in checkpoint, for which revision and variant"):
        resolve("landscapes", revision="main", variant="fp16")


def test_sdxl(tiny_sdxl: Path) -> None:
    found = resolve(str(tiny_sdxl))
    assert found.family == "sdxl"
    assert list(found.components) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert list(found.tokenizers) == ["tokenizer", "tokenizer_2"]


@pytest.mark.parametrize("pipeline", ["StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"])
def test_relatives_of_sd(folder: Path, pipeline: str) -> None:
    edit(folder / "model_index.json", _class_name=pipeline)
    assert resolve(folder).family == "sd"


def test_the_tensors_are_the_files(tiny_sdxl: Path) -> None:
    found = resolve(tiny_sdxl)
    for name, component in found.components.items():
        expected = {key: value for path in component.weights for key, value in load_file(path).items()}
        state = found.state_dict(name)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert all(state[key].dtype == expected[key].dtype for key in expected)


def test_tensors_are_mapped_not_copied(folder: Path) -> None:
    tensor = torch.zeros(2**24)  # 64 MiB
    save_file({"a": tensor}, folder / UNET)
    before = _anonymous_memory()
    state = resolve(folder).state_dict("unet")
    assert float(state["a"].sum()) == 0.0
    assert _anonymous_memory() - before < 2**24
    state["a"].fill_(1.0)  # private to this process: the file stays as it is
    assert float(load_file(folder / UNET)["a"].sum()) == 0.0


def _anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_digests(tiny_sd: Path) -> None:
    import hashlib

    found = resolve(tiny_sd)
    assert sorted(found.digests()) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    for name, digest in found.digests().items():
        assert digest == hashlib.sha256((tiny_sd / name).read_bytes()).hexdigest()


def test_digests_are_taken_once(folder: Path) -> None:
    found = resolve(folder)
    first = found.digests()
    (folder / UNET).unlink()
    assert found.digests() == first


def test_a_variant_comes_from_its_own_files_only(folder: Path) -> None:
    assert "ask for no variant" in refused(folder, variant="fp16")
    for name in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        state = {key: value.half() for key, value in load_file(folder / f"{name}.safetensors").items()}
        save_file(state, folder / f"{name}.fp16.safetensors")
    half = resolve(folder, variant="fp16")
    assert {tensor.dtype for tensor in half.state_dict("unet").values()} == {torch.float16}
    assert {tensor.dtype for tensor in resolve(folder).state_dict("unet").values()} == {torch.float32}
    for file in folder.glob("*/*.safetensors"):
        if "fp16" not in file.name:
            file.unlink()
    assert "ask for variant='fp16'" in refused(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path: Path, tiny_sd: Path, variant: str | None) -> None:
    found = resolve(build_sd(tmp_path / "sd", variant=variant, max_shard_size="200KB"), variant=variant)
    assert len(found.components["unet"].weights) > 2
    whole = resolve(tiny_sd).state_dict("unet")
    state = found.state_dict("unet")
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_a_tilde_and_a_linked_folder(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "linked").symlink_to(tiny_sd)
    assert resolve("~/linked").folder == tiny_sd.resolve()


def test_a_snapshot_in_the_hubs_cache_links_to_its_blobs(tiny_sd: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_sd, snapshot)
    blobs = tmp_path / "models--org--tiny" / "blobs"
    blobs.mkdir()
    (snapshot / UNET).rename(blobs / "abc")
    (snapshot / UNET).symlink_to("../../../blobs/abc")
    assert len(resolve(snapshot).state_dict("unet")) > 10


# What is refused


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no-such-folder", "no such folder or file, and not a Hub id"),
        ("a/b/c", "no such folder or file, and not a Hub id"),
        ("", "a checkpoint is 'landscapes', a diffusers folder"),
        ("https://example.com/model.safetensors", "fetches no URLs"),
        ("file:///etc/passwd", "fetches no URLs"),
        ("models/v1-5.safetensors", "no such file; check the path"),
        ("models/v1-5.ckpt", "no such file; check the path"),
        ("nul\0byte", "no such folder or file"),
        ("~no-such-user/x", "give a folder, a file or a Hub id"),
        ("x" * 5000, "give a folder, a file or a Hub id"),
    ],
)
def test_sources_that_are_none(source: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        resolve(source)


def test_a_path_is_never_a_hub_id_nor_the_built_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("org/model"), Path("landscapes")):
        with pytest.raises(CheckpointError, match="no such folder or file"):
            resolve(path)


@pytest.mark.parametrize("argument", ["revision", "config"])
def test_arguments_without_a_meaning(tiny_sd: Path, argument: str) -> None:
    assert f"a folder checkpoint, for which {argument} has no meaning" in refused(tiny_sd, **{argument: "x"})


@pytest.mark.parametrize("variant", ["", "../fp16", "fp16/..", "*", "a.b"])
def test_what_cannot_be_a_variant(tiny_sd: Path, variant: str) -> None:
    assert "is not a variant" in refused(tiny_sd, variant=variant)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model_index.json", "no model_index.json, so not a diffusers folder"),
        ("unet/config.json", "unet/config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json is missing"),
        ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json is missing"),
        ("tokenizer/vocab.json", "tokenizer/vocab.json is missing"),
        ("tokenizer/merges.txt", "tokenizer/merges.txt is missing"),
        (UNET, "the weights of unet are missing"),
        ("text_encoder/model.safetensors", "expected text_encoder/model.safetensors"),
        ("text_encoder", "text_encoder/config.json is missing"),
    ],
)
def test_missing_parts(folder: Path, name: str, words: str) -> None:
    gone = folder / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert words in refused(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "not a diffusers folder" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"\xed\xa0\x80": 1}',
    ],
)
def test_configs_that_do_not_parse(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert name in message and "download it again" in message


def header(description: str, data: bytes = b"") -> bytes:
    return len(description).to_bytes(8, "little") + description.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"12345",
        b"\x80\x04\x95" + b"\0" * 100,
        (2**62).to_bytes(8, "little") + b"{}",
        header("hello"),
        header("{}"),
        header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', b"\0" * 15),
        header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', b"\0" * 17),
        header('{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}', b"\0" * 16),
        header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}', b"\0" * 16),
        header('{"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}', b"\0" * 16),
        header('{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}', b"\0" * 16),
        header(
            '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 16]}}', b"\0" * 16
        ),
    ],
)
def test_weights_that_are_not_whole(folder: Path, content: bytes) -> None:
    (folder / UNET).write_bytes(content)
    message = refused(folder)
    assert "unet/diffusion_pytorch_model.safetensors" in message and "download it again" in message


def test_every_truncation_of_real_weights_is_noticed(folder: Path) -> None:
    whole = (folder / UNET).read_bytes()
    for length in (0, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        (folder / UNET).write_bytes(whole[:length])
        assert "truncated" in refused(folder)


def test_weights_that_vanish_or_shrink_after_resolving(folder: Path) -> None:
    found = resolve(folder)
    (folder / UNET).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="truncated"):
        found.state_dict("unet")
    (folder / UNET).unlink()
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model"):
        found.state_dict("unet")
    with pytest.raises(CheckpointError, match="cannot be read"):
        found.digests()
    with pytest.raises(
        CheckpointError, match="no component 'controlnet'; there are: text_encoder, unet, vae"
    ):
        found.state_dict("controlnet")


@pytest.mark.parametrize("name", [UNET, "model_index.json", "unet/config.json", "tokenizer/vocab.json"])
def test_a_folder_where_a_file_should_be(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name.partition("/")[0] in refused(folder)


def test_a_stale_index_beside_whole_weights(folder: Path) -> None:
    (folder / f"{UNET}.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert "remove the one that is stale" in refused(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    folder = build_sd(tmp_path / "sd", max_shard_size="200KB")
    edit(folder / f"{UNET}.index.json", weight_map=weight_map)
    assert "has no weight_map" in refused(folder)


def test_a_shard_that_is_missing_or_lacks_a_tensor(tmp_path: Path) -> None:
    folder = build_sd(tmp_path / "sd", max_shard_size="200KB")
    index = folder / f"{UNET}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**weight_map, "no.such.tensor": weight_map["conv_in.weight"]})
    assert "has no tensor 'no.such.tensor', which its index puts there" in refused(folder)
    edit(index, weight_map=weight_map)
    (folder / "unet" / weight_map["conv_in.weight"]).unlink()
    assert f"{weight_map['conv_in.weight']} is missing" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline is not supported; sdfast runs the U-Net family"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline is not supported"),
        ({"_class_name": None}, "names a custom pipeline (None)"),
        ({"unet": None}, "names no unet"),
        ({"text_encoder": [None, None]}, "names no text_encoder"),
        ({"unet": ["diffusers", "SD3Transformer2DModel"]}, "supported: UNet2DConditionModel"),
        ({"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "supported: AutoencoderKL, AutoencoderTiny"),
        ({"tokenizer": ["transformers", "T5Tokenizer"]}, "supported: CLIPTokenizer"),
        ({"unet": "UNet2DConditionModel"}, "not [library, class]"),
        ({"unet": ["diffusers"]}, "not [library, class]"),
        ({"unet": ["diffusers", 1]}, "not [library, class]"),
    ],
)
def test_pipelines_that_are_not_supported(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder / "model_index.json", **changes)
    assert words in refused(folder)


def test_what_is_half_a_refiner(tiny_sdxl: Path, tmp_path: Path) -> None:
    """A score without the pipeline for it, or with the first text encoder; and a refiner without a score."""
    whole = Path(shutil.copytree(tiny_sdxl, tmp_path / "whole"))
    edit(whole / "model_index.json", requires_aesthetics_score=True)
    assert "StableDiffusionXLPipeline tells its U-Net no score" in refused(whole)
    edit(whole / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    assert "requires_aesthetics_score, and a text_encoder" in refused(whole)
    edit(whole / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(CheckpointError, match="check requires_aesthetics_score"):
        Networks.of(resolve(whole))
    edit(whole / "model_index.json", requires_aesthetics_score=False)
    assert "names no text_encoder" in refused(whole)


def test_a_mixed_up_folder(folder: Path) -> None:
    edit(folder / "unet" / "config.json", _class_name="AutoencoderKL")
    assert "is of a AutoencoderKL, model_index.json says UNet2DConditionModel" in refused(folder)


@pytest.fixture
def unprivileged() -> Iterator[Callable[[Path, str], Path]]:
    """Copies a folder, closes one part of it, and becomes nobody, because root may read everything."""

    def close(source: Path, name: str) -> Path:
        folder = Path(shutil.copytree(source, Path(parent) / "folder"))
        for path in folder.rglob("*"):
            path.chmod(0o755)
        (folder / name).chmod(0)
        os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())
        return folder

    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        yield close
        os.seteuid(os.getuid())
        for path in (Path(parent) / "folder", Path(parent) / "folder" / "unet"):
            path.chmod(0o755)


@pytest.mark.parametrize("name", [UNET, "model_index.json", "unet/config.json", "unet", "."])
def test_permission_denied(tiny_sd: Path, unprivileged: Callable[[Path, str], Path], name: str) -> None:
    assert "ermission denied" in refused(unprivileged(tiny_sd, name))


# Single files in the original layout


@pytest.fixture(scope="module")
def single_sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tiny_sd, tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.mark.parametrize("build", [build_sd, build_sdxl, build_refiner])
def test_a_single_file_is_the_folder_it_was_made_of(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    folder = build(tmp_path / "folder")
    file = save_original(folder, tmp_path / "model.safetensors")
    found = resolve(file, config=folder, cache_dir=tmp_path / "cache")
    expected = resolve(folder)
    assert found.source == str(file) and found.family == expected.family
    for name in expected.components:
        state, original = found.state_dict(name), expected.state_dict(name)
        assert state.keys() == original.keys()
        assert all(torch.equal(state[key], original[key]) for key in original)
    from sdfast.export.tokenizer import save_runtime_tokenizer

    for name in expected.tokenizers:
        texts = []
        for checkpoint, out in ((found, "a"), (expected, "b")):
            save_runtime_tokenizer(checkpoint.tokenizers[name], tmp_path / out / name)
            texts.append((tmp_path / out / name / "tokenizer.json").read_text())
        assert texts[0] == texts[1]


def test_a_single_file_of_sd_2(tmp_path: Path, tiny_sd: Path) -> None:
    file = save_original(tiny_sd, tmp_path / "model.safetensors", sd2=True)
    found = resolve(file, config=tiny_sd, cache_dir=tmp_path / "cache")
    for name in ("text_encoder", "unet"):
        state, original = found.state_dict(name), resolve(tiny_sd).state_dict(name)
        assert state.keys() == original.keys()
        assert all(torch.equal(state[key], original[key]) for key in original)


def test_two_conversions_of_one_file_at_once(
    single_sd: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = single_file._convert

    def meanwhile(path: Path, configs: Path, pipeline: str, dtype: str, target: Path) -> None:
        convert(path, configs, pipeline, dtype, target)
        monkeypatch.undo()
        resolve(path, config=tiny_sd, cache_dir=tmp_path)  # the other one is done first

    monkeypatch.setattr(single_file, "_convert", meanwhile)
    assert len(resolve(single_sd, config=tiny_sd, cache_dir=tmp_path).state_dict("unet")) > 10
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_conversion_left_is_removed_after_a_day(
    single_sd: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    for name, age in ((".converting-old", 90_000), (".converting-new", 10)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    resolve(single_sd, config=tiny_sd, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.glob(".converting-*")] == [".converting-new"]


def test_no_room_for_a_conversion(single_sd: Path, tiny_sd: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond
    try:
        message = refused(single_sd, config=tiny_sd, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot be converted into {tmp_path / 'cache'}" in message and "make room there" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(single_sd: Path, tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(single_sd, config=tiny_sd, cache_dir=tmp_path / "file" / "cache")


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert single_file._cache_root(None) == tmp_path / "sdfast" / "checkpoints"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert single_file._cache_root(None) == tmp_path / ".cache" / "sdfast" / "checkpoints"


@pytest.mark.slow
def test_a_single_file_of_full_size_needs_no_config(tmp_path: Path) -> None:
    """SD 1.5 in half precision, 2.1 GB: the shipped configs and vocabulary, and no network."""
    import diffusers
    import transformers

    configs = single_file.stock_configs(shapes(), "x")
    with torch.device("meta"):
        models = {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet/config.json"]),
            "vae": diffusers.AutoencoderKL.from_config(configs["vae/config.json"]),
            "text_encoder": transformers.CLIPTextModel(
                transformers.CLIPTextConfig(**configs["text_encoder/config.json"])
            ),
        }
    states = {
        name: {key: torch.rand(t.shape, dtype=torch.float16) for key, t in model.state_dict().items()}
        for name, model in models.items()
    }
    save_file(to_original(states, layers_per_block=2), tmp_path / "v1-5.safetensors")
    found = resolve(tmp_path / "v1-5.safetensors", cache_dir=tmp_path / "cache")
    for name in ("unet", "vae", "text_encoder"):
        state = found.state_dict(name)
        assert all(torch.equal(state[key], states[name][key]) for key in state)
    assert len(found.state_dict("unet")) == len(states["unet"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(found.tokenizers["tokenizer"])
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_conversion_is_kept(single_sd: Path, tiny_sd: Path, tmp_path: Path) -> None:
    first = resolve(single_sd, config=tiny_sd, cache_dir=tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    moved = Path(shutil.copy(single_sd, tmp_path / "renamed.safetensors"))
    messages: list[str] = []
    again = resolve(moved, config=tiny_sd, cache_dir=tmp_path, progress=messages.append)
    assert again.folder == first.folder and stamps == {
        p: p.stat().st_mtime_ns for p in first.folder.rglob("*")
    }
    assert not any("converting" in message for message in messages)
    assert list(tmp_path.glob(".converting-*")) == []


def test_a_single_file_in_the_home_folder(
    single_sd: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(single_sd, tmp_path / "model.safetensors")
    assert resolve("~/model.safetensors", config=tiny_sd, cache_dir=tmp_path / "cache").family == "sd"


def test_another_file_or_another_config_is_another_conversion(
    single_sd: Path, folder: Path, tmp_path: Path
) -> None:
    first = resolve(single_sd, config=folder, cache_dir=tmp_path / "cache")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    second = resolve(single_sd, config=folder, cache_dir=tmp_path / "cache")
    assert second.folder != first.folder
    assert second.scheduler_config["prediction_type"] == "v_prediction"
    state = load_file(single_sd)
    state["model.diffusion_model.out.2.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    third = resolve(tmp_path / "other.safetensors", config=folder, cache_dir=tmp_path / "cache")
    assert third.folder not in (first.folder, second.folder)


def test_half_precision_stays(single_sd: Path, tiny_sd: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(single_sd).items()}, half)
    found = resolve(half, config=tiny_sd, cache_dir=tmp_path / "cache")
    for name in found.components:
        assert {t.dtype for t in found.state_dict(name).values() if t.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.out.2.bias",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
        "cond_stage_model",
        "first_stage_model",
    ],
)
def test_a_single_file_that_lacks_tensors(single_sd: Path, tiny_sd: Path, tmp_path: Path, lost: str) -> None:
    state = {name: tensor for name, tensor in load_file(single_sd).items() if not name.startswith(lost)}
    save_file(state, tmp_path / "lacking.safetensors")
    message = refused(tmp_path / "lacking.safetensors", config=tiny_sd, cache_dir=tmp_path / "cache")
    assert "cannot be converted" in message
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.CKPT"])
def test_a_pickle_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert "safetensors only, because a pickle can run code" in refused(tmp_path / name)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert "is not a checkpoint" in refused(tmp_path / "a.txt")
    (tmp_path / "b.safetensors").write_bytes(b"hello")
    assert "truncated, or not safetensors" in refused(tmp_path / "b.safetensors")
    save_file({"lora_down.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    assert "a LoRA (for --lora), a VAE or another kind of model" in refused(tmp_path / "lora.safetensors")


def shapes(**changes: tuple[int, ...]) -> single_file.Header:
    """The header of an SD 1.x file, as far as it is looked at."""
    first = "model.diffusion_model.input_blocks.0.0.weight"
    cross = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    known = {"first": first, "cross": cross, "sdxl": single_file._SDXL, "refiner": single_file._REFINER}
    base = {first: (320, 4, 3, 3), cross: (320, 768)}
    return single_file.Header({**base, **{known.get(k, k): v for k, v in changes.items()}}, "F16", {})


# The parameter counts of the released models, in the order U-Net, VAE, text encoders.
RELEASED = {
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "sdxl_refiner": (2_259_526_660, 83_653_863, 694_659_840),
}


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (shapes(), "sd15"),
        (shapes(cross=(320, 1024)), "sd21"),
        (shapes(sdxl=(1280,)), "sdxl"),
        (shapes(refiner=(1280,)), "sdxl_refiner"),
    ],
)
def test_stock_configs_are_the_released_models(header: single_file.Header, name: str) -> None:
    import diffusers
    import transformers

    configs = single_file.stock_configs(header, "x")
    sizes = []
    with torch.device("meta"):
        for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
            config = configs.get(f"{component}/config.json")
            if config is None:
                continue
            library, class_name = configs["model_index.json"][component]
            model_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
            if library == "diffusers":
                model = model_class.from_config(config)
            else:
                model = model_class(transformers.CLIPTextConfig(**config))
            sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert tuple(sizes) == RELEASED[name]


def test_stock_configs_follow_what_the_file_says() -> None:
    inpainting = single_file.stock_configs(shapes(first=(320, 9, 3, 3)), "x")
    assert inpainting["model_index.json"]["_class_name"] == "StableDiffusionInpaintPipeline"
    assert inpainting["unet/config.json"]["in_channels"] == 9
    edits = single_file.stock_configs(shapes(first=(320, 8, 3, 3)), "x")
    assert edits["model_index.json"]["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    assert edits["unet/config.json"]["in_channels"] == 8
    assert (
        single_file.stock_configs(shapes(), "x")["scheduler/scheduler_config.json"]["prediction_type"]
        == "epsilon"
    )
    v2 = single_file.stock_configs(shapes(cross=(320, 1024)), "x")
    assert v2["scheduler/scheduler_config.json"]["prediction_type"] == "v_prediction"
    marked = single_file.stock_configs(shapes(sdxl=(1280,), v_pred=(), ztsnr=()), "x")[
        "scheduler/scheduler_config.json"
    ]
    assert (marked["prediction_type"], marked["rescale_betas_zero_snr"]) == ("v_prediction", True)
    base = shapes(cross=(320, 1024))
    stated = single_file.Header(base.shapes, base.dtype, {"modelspec.predict_key": "epsilon"})
    scheduler = single_file.stock_configs(stated, "x")["scheduler/scheduler_config.json"]
    assert scheduler["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (shapes(first=(320, 7, 3, 3)), "7 input channels"),
        (shapes(first=(320, 8, 3, 3), sdxl=(1280,)), "says is_cosxl_edit or not"),
        (shapes(cross=(320, 512)), "none of SD 1.x, SD 2.x, SDXL"),
        (single_file.Header(shapes().shapes, "F16", {"modelspec.predict_key": "x0"}), "prediction type 'x0'"),
    ],
)
def test_single_files_that_are_not_supported(header: single_file.Header, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        single_file.stock_configs(header, "x")
