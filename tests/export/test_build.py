"""Exports: what is kept, what is built again, and that nothing half-made is ever seen."""

import errno
import gc
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdfast
from sdfast import versions
from sdfast.engine import Engine, sha256
from sdfast.errors import CheckpointError, DependencyError, ExportError
from sdfast.export import build, publish
from sdfast.export.build import Silent, Stage, export
from sdfast.export.recipe import Recipe
from sdfast.manifest import MANIFEST_NAME, AddedEmbedding, MergedLora, read_manifest
from sdfast.pipeline import Pipeline
from sdfast.summary import summary
from tests import checkpoints
from tests.conftest import FLAT_SIZES
from tests.export.embeddings import automatic1111
from tests.export.loras import ATTENTION, kohya, random_changes, write

EAGER = Recipe(backend="eager")
MODULES = {"unet", "context", "time_shift", "vae_decoder", "vae_encoder", "text_encoder"}


class Log(Silent):
    """Keeps what an export tells: modules that were kept, modules that were built, and messages."""

    def __init__(self, at: Callable[[str], None] = lambda moment: None) -> None:
        self.kept: set[str] = set()
        self.built: set[str] = set()
        self.said: list[str] = []
        self._at = at

    def begin(self, stage: str) -> None:
        self._at(f"begin {stage}")

    def end(self, stage: Stage) -> None:
        if stage.name in MODULES:
            (self.kept if "unchanged" in stage.note else self.built).add(stage.name)
        self._at(f"end {stage.name}")

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def checkpoint(tiny_sd: Path, tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "checkpoint"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "engine"


@pytest.fixture
def engine(checkpoint: Path, target: Path) -> Path:
    """The checkpoint's engine, with a marker of its inodes."""
    return export(checkpoint, target, EAGER)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def beside(target: Path) -> set[str]:
    """What lies beside the engine: the lock may stay."""
    return {path.name for path in target.parent.iterdir()} - {f".{target.name}.lock"}


def again(checkpoint: Path, target: Path, recipe: Recipe = EAGER) -> Log:
    log = Log()
    export(checkpoint, target, recipe, progress=log)
    Engine.open(target).load()
    assert beside(target) == {target.name}
    return log


def test_an_export_that_would_change_nothing_does_nothing(engine: Path, checkpoint: Path) -> None:
    def written() -> tuple[int, int]:
        status = (engine / MANIFEST_NAME).stat()
        return status.st_ino, status.st_mtime_ns

    before, manifest = inodes(engine), written()
    log = again(checkpoint, engine)
    assert inodes(engine) == before
    assert written() == manifest
    assert any("up to date; nothing to do" in message for message in log.said)
    assert not log.built


def test_another_size_builds_only_what_depends_on_it(engine: Path, checkpoint: Path) -> None:
    before = inodes(engine)
    log = again(checkpoint, engine, Recipe.make(backend="eager", sizes=["64x96"]))
    assert log.built == {"unet", "vae_decoder", "vae_encoder"}
    assert log.kept == MODULES - log.built
    after = inodes(engine)
    for name in ("context", "time_shift", "text_encoder"):
        assert after[f"{name}.safetensors"] == before[f"{name}.safetensors"]
    Engine.open(engine).check_size(96, 64)


def test_another_dtype_builds_all(engine: Path, checkpoint: Path) -> None:
    assert again(checkpoint, engine, Recipe(backend="eager", dtype="fp16")).built == MODULES


def test_other_code_of_the_export_builds_all(
    engine: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though its version is the same; code that only runs engines, or serves them, does not count."""
    code = tmp_path / "sdfast"
    shutil.copytree(versions.ROOT, code, ignore=shutil.ignore_patterns("__pycache__", "landscapes"))
    monkeypatch.setattr(versions, "ROOT", code)

    def after_a_change_of(name: str) -> Log:
        (code / name).write_text((code / name).read_text("utf-8") + "# other code", encoding="utf-8")
        versions.code_digest.cache_clear()
        return again(checkpoint, engine)

    assert not after_a_change_of("server/batcher.py").built
    assert after_a_change_of("models/unet.py").built == MODULES
    monkeypatch.undo()
    versions.code_digest.cache_clear()


def test_other_weights_of_one_network_build_that_alone(engine: Path, checkpoint: Path) -> None:
    other = checkpoints.build_sd(checkpoint.parent / "other", seed=7)
    shutil.copytree(other / "vae", checkpoint / "vae", dirs_exist_ok=True)
    assert again(checkpoint, engine).built == {"vae_decoder", "vae_encoder"}


def test_a_lora_builds_what_it_touches_and_is_told(
    engine: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves the plain engine beside it, with which it shares the rest on disk."""
    monkeypatch.setattr("sdfast.export.sharing.LARGE", 1)
    plain = Path(shutil.copytree(engine, engine.parent / "plain"))
    changes = random_changes(checkpoint, ATTENTION, components=["unet"])
    file = write(tmp_path / "style.safetensors", changes, kohya)

    def with_scale(scale: float) -> Recipe:
        return Recipe.make(backend="eager", loras=[{"source": file, "scale": scale}])

    def again_beside(recipe: Recipe) -> Log:
        log = Log()
        export(checkpoint, engine, recipe, progress=log)
        return log

    merged = {"unet", "context", "time_shift"}
    assert again_beside(with_scale(0.5)).built == merged
    manifest = read_manifest(engine)
    told = MergedLora(source=str(file), digest=sha256(file), scale=0.5)
    assert manifest.checkpoint.loras == (told,)
    assert f"LoRAs        {file}, scale 0.5" in summary(manifest).splitlines()
    assert (engine / "text_encoder.safetensors").samefile(plain / "text_encoder.safetensors")
    assert (engine / "unet.safetensors").read_bytes() != (plain / "unet.safetensors").read_bytes()
    assert not again_beside(with_scale(0.5)).built
    assert again_beside(with_scale(0.25)).built == merged
    write(file, random_changes(checkpoint, ATTENTION, components=["text_encoder"]), kohya)
    assert again_beside(with_scale(0.25)).built == {*merged, "text_encoder"}
    assert (engine / "unet.safetensors").samefile(plain / "unet.safetensors")
    assert again_beside(EAGER).built == {"text_encoder"}
    assert read_manifest(engine).checkpoint == read_manifest(plain).checkpoint
    assert (engine / "text_encoder.safetensors").samefile(plain / "text_encoder.safetensors")
    Engine.open(plain).load()


def test_an_embedding_builds_the_text_encoder_alone_and_is_told(
    engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    plain, file = read_manifest(engine), automatic1111(tmp_path / "zq.safetensors", 2)

    def named(token: str) -> Recipe:
        return Recipe.make(backend="eager", embeddings=[{"source": file, "token": token}])

    assert again(checkpoint, engine, named("EasyNegative")).built == {"text_encoder"}
    told = AddedEmbedding(source=str(file), digest=sha256(file), token="EasyNegative", vectors=2)
    assert read_manifest(engine).checkpoint.embeddings == (told,)
    tokenizer = Engine.open(engine).tokenizers[0]
    assert tokenizer(["easynegative"]).input_ids[0].tolist().index(tokenizer.eos) == 3
    assert not again(checkpoint, engine, named("EasyNegative")).built
    assert not again(checkpoint, engine, named("other")).built
    assert read_manifest(engine).checkpoint.embeddings[0].token == "other"
    automatic1111(file, 2, seed=1)
    assert again(checkpoint, engine, named("other")).built == {"text_encoder"}
    assert again(checkpoint, engine, EAGER).built == {"text_encoder"}
    assert read_manifest(engine).checkpoint == plain.checkpoint


def test_a_lora_that_does_not_fit_changes_nothing(engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = inodes(engine)
    save_file({"lora_unet_none.alpha": torch.ones(())}, tmp_path / "lora.safetensors")
    recipe = Recipe.make(backend="eager", loras=[tmp_path / "lora.safetensors"])
    with pytest.raises(
        CheckpointError, match=r"LoRA .*lora\.safetensors: lora_unet_none\.alpha meets no layer"
    ):
        export(checkpoint, engine, recipe)
    assert inodes(engine) == before


def test_a_vae_without_an_encoder_makes_an_engine_that_takes_no_images(
    engine: Path, checkpoint: Path
) -> None:
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({n: w for n, w in weights.items() if not n.startswith(("encoder.", "quant_conv."))}, path)
    assert Engine.open(engine).manifest.edits
    log = again(checkpoint, engine)
    assert log.built == {"vae_decoder"}
    assert any("no vae_encoder" in message for message in log.said)
    assert not Engine.open(engine).manifest.edits


def test_another_scheduler_config_is_taken_over(engine: Path, checkpoint: Path) -> None:
    path = checkpoint / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    log = again(checkpoint, engine)
    assert log.kept == MODULES
    assert Engine.open(engine).scheduler_config["prediction_type"] == "v_prediction"


def test_another_tokenizer_is_taken_over(engine: Path, checkpoint: Path) -> None:
    path = checkpoint / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token": "!"}))
    special = checkpoint / "tokenizer" / "special_tokens_map.json"
    special.write_text(json.dumps({**json.loads(special.read_text()), "pad_token": "!"}))
    assert again(checkpoint, engine).kept == MODULES
    assert Engine.open(engine).tokenizers[0].pad == 0


@pytest.mark.parametrize("name", ["unet.safetensors", "tokenizer/tokenizer.json"])
def test_a_damaged_engine_is_repaired(engine: Path, checkpoint: Path, name: str) -> None:
    path = engine / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    log = again(checkpoint, engine)
    assert log.built == ({"unet"} if "unet" in name else set())


@pytest.mark.parametrize("content", [b'{\n "schema_version": 1,\n "name"', b'{"schema_version": 99}'])
def test_an_engine_whose_manifest_is_damaged_or_old_is_built_anew(
    engine: Path, checkpoint: Path, content: bytes
) -> None:
    (engine / MANIFEST_NAME).write_bytes(content)
    assert again(checkpoint, engine).built == MODULES


def test_two_exports_of_one_checkpoint_give_the_same_files(
    engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = export(checkpoint, tmp_path / "other", EAGER)
    assert read_manifest(other).files == read_manifest(engine).files


def test_fp16_engines_hold_fp16_weights_and_draw(checkpoint: Path, target: Path) -> None:
    export(checkpoint, target, Recipe(backend="eager", dtype="fp16"))
    pipe = Pipeline.from_engine(target)
    assert pipe.engine.dtype == torch.float16
    assert pipe("a", num_inference_steps=2, scheduler="euler", seed=1).images


# What is in the way


def other_file(target: Path) -> None:
    target.parent.mkdir()
    target.write_text("mine")


def other_folder(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("mine")


def other_manifest(target: Path) -> None:
    """Browser extensions, web pages and others also have a manifest.json."""
    target.mkdir(parents=True)
    (target / MANIFEST_NAME).write_text('{"name": "my web page", "icons": []}')
    (target / "mine.txt").write_text("mine")


def link(target: Path) -> None:
    (target.parent / "elsewhere").mkdir(parents=True)
    target.symlink_to(target.parent / "elsewhere")


@pytest.mark.parametrize("make", [other_file, other_folder, other_manifest, link])
def test_what_is_not_an_engine_is_never_replaced(
    tiny_sd: Path, target: Path, make: Callable[[Path], None]
) -> None:
    make(target)
    before = beside(target)
    with pytest.raises(ExportError, match="is there and is not"):
        export(tiny_sd, target, EAGER)
    assert beside(target) == before
    if target.is_dir() and not target.is_symlink():
        assert (target / "mine.txt").read_text() == "mine"


def test_what_somebody_put_into_an_engine_is_not_thrown_away(engine: Path, checkpoint: Path) -> None:
    (engine / "pictures").mkdir()
    (engine / "pictures" / "mine.png").write_text("mine")
    (engine / "validation").mkdir()
    (engine / "validation" / "report.json").write_text("{}")
    with pytest.raises(ExportError, match=r"pictures/mine\.png: is not part of the engine"):
        export(checkpoint, engine, Recipe(backend="eager", dtype="fp16"))
    assert (engine / "pictures" / "mine.png").read_text() == "mine"
    Engine.open(engine)
    shutil.rmtree(engine / "pictures")
    export(checkpoint, engine, Recipe(backend="eager", dtype="fp16"))
    assert not (engine / "validation").exists()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_cannot_be_is_one_line(tiny_sd: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="choose another directory"):
        export(tiny_sd, tmp_path / name, EAGER)


def test_a_parent_that_is_a_file_is_one_line(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="another directory"):
        export(tiny_sd, tmp_path / "file" / "engine", EAGER)


def test_a_bad_checkpoint_leaves_nothing(tmp_path: Path, target: Path) -> None:
    with pytest.raises(CheckpointError):
        export(tmp_path / "nothing", target, EAGER)
    with pytest.raises(ExportError, match="no checkpoint"):
        export(None, target, EAGER)
    assert not target.parent.exists()


def test_a_missing_package_is_named_with_how_to_get_it(
    tiny_sd: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(DependencyError, match=r'exporting needs onnxscript: pip install "sdfast\[export\]"'):
        export(tiny_sd, target, Recipe())


# Accidents


@pytest.fixture
def child() -> Iterator[Callable[[Callable[[], object]], tuple[int, str]]]:
    """Runs a function in a process of its own; gives its wait status and the message of its error."""

    def run(function: Callable[[], object]) -> tuple[int, str]:
        gc.collect()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            message = ""
            try:
                torch.set_num_threads(1)  # the parent's thread pool is not there
                function()
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
            os.write(writing, message.encode()[:4000])
            os._exit(1 if message else 0)
        os.close(writing)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(reading) as file:
            return status, file.read()

    yield run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(moment: str) -> Log:
    return Log(lambda reached: die() if reached == moment else None)


MOMENTS = ["begin unet", "end unet", "end text_encoder", "begin digests", "end digests"]


@pytest.mark.parametrize("moment", [*MOMENTS, "publishing", "published"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_killed_export_leaves_the_old_engine_or_none(
    checkpoint: Path, target: Path, child: Any, moment: str, there: bool
) -> None:
    old, new = (64, 96), (64, 64)
    if there:
        export(checkpoint, target, Recipe.make(backend="eager", sizes=["64x96"]))

    def exporting() -> None:
        publishing = publish.publish

        def dying(place: Path, at: Path) -> None:
            if moment == "published":
                publishing(place, at)
            die()

        if moment.startswith("publish"):
            build.publish = dying  # type: ignore[attr-defined]
        export(checkpoint, target, EAGER, progress=dying_at(moment))

    status, _ = child(exporting)
    assert os.WTERMSIG(status) == signal.SIGKILL
    if moment == "published":
        assert size_of(target) == new
    elif there:
        assert size_of(target) == old
    else:
        assert not target.exists()
    again(checkpoint, target)


def size_of(engine: Path) -> tuple[int, int]:
    """Width and height of the pictures of an engine that draws no others."""
    [variant] = Engine.open(engine).manifest.modules["unet"].variants
    assert (variant.height.low, variant.width.low) == (variant.height.high, variant.width.high)
    return variant.width.low, variant.height.low


@pytest.mark.parametrize("limit", [1_000, 200_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    checkpoint: Path, target: Path, child: Any, limit: int
) -> None:
    """A limit on the size of files stands for the end of the disk: writes fail half-way all the same."""

    def exporting() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        export(checkpoint, target, EAGER)

    status, message = child(exporting)
    assert os.waitstatus_to_exitcode(status) == 1
    assert message.startswith("ExportError")
    assert len(message.splitlines()) == 1
    assert beside(target) == set()


def test_a_disk_that_fills_up_while_writing_small_files_is_named(
    checkpoint: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "save_runtime_tokenizer", full)
    with pytest.raises(ExportError, match=r"the disk is full; make room, .* Nothing was changed"):
        export(checkpoint, target, EAGER)
    assert beside(target) == set()


def test_two_exporters_at_once_both_succeed(checkpoint: Path, target: Path, child: Any) -> None:
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            export(checkpoint, target, EAGER)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert again(checkpoint, target).built == set()


def test_the_package_can_be_called_like_the_function() -> None:
    assert callable(sdfast.export)
    from sdfast import export as imported

    with pytest.raises(ExportError, match="no checkpoint"):
        imported(None, "engines/none", EAGER)


# ONNX


def assert_draws_like(engine: Path, eager: Path, width: int, height: int, count: int) -> None:
    size = {"width": width, "height": height, "num_images_per_prompt": count}
    call = {"num_inference_steps": 2, "scheduler": "euler", "seed": 1, "output_type": "pt"}
    ours, expected = (
        Pipeline.from_engine(f, threads=1)("a boat", **size, **call).images for f in (engine, eager)
    )
    assert ours.shape == (count, 3, height, width)
    assert (ours - expected).norm() / expected.norm() < 1e-4


def test_several_static_batches_share_their_weights(
    flat_sd: Path, flat_onnx: Path, flat_engine: Path, target: Path
) -> None:
    engine = Path(shutil.copytree(flat_onnx, target))
    assert again(flat_sd, engine, Recipe.make(sizes=FLAT_SIZES, batch=[1])).built == {"unet"}
    unets = list(engine.glob("unet*.data"))
    assert len(unets) == 2  # in batches of one and two rows
    assert len({path.stat().st_ino for path in unets}) == 1
    assert_draws_like(engine, flat_engine, 24, 16, 3)  # six rows, two at a time


@pytest.mark.slow
def test_several_static_sizes_and_batches_share_their_weights(
    flat_sd: Path, flat_onnx: Path, flat_engine: Path, target: Path
) -> None:
    engine = Path(shutil.copytree(flat_onnx, target))
    log = again(flat_sd, engine, Recipe.make(sizes=["16x16", "16x24"], batch=[1]))
    assert log.built == {"unet", "vae_decoder", "vae_encoder"}
    unets = list(engine.glob("unet*.data"))
    assert len(unets) == 4  # two sizes, in batches of one and two rows
    assert len({path.stat().st_ino for path in unets}) == 1
    assert len({path.stat().st_ino for path in engine.glob("vae_decoder*.data")}) == 1
    assert_draws_like(engine, flat_engine, 16, 16, 1)
    assert_draws_like(engine, flat_engine, 16, 24, 3)  # six rows, two at a time


def test_one_form_serves_all_sizes_between_two(flat_onnx: Path, flat_engine: Path) -> None:
    assert [path.name for path in flat_onnx.glob("unet*.onnx")] == ["unet.onnx"]
    assert_draws_like(flat_onnx, flat_engine, 16, 16, 1)
    assert_draws_like(flat_onnx, flat_engine, 32, 24, 3)
    assert_draws_like(flat_onnx, flat_engine, 24, 16, 2)
