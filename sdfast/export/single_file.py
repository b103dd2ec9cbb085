"""A single `.safetensors` file in the original layout, turned once into a diffusers folder and kept.

diffusers does the conversion of names; this room finds out what the file is, gives diffusers the configs the
file does not carry (`stock/`), and keeps the result under the file's digest, so that it is done once and
without a network.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers.pre_tokenizers import ByteLevel

from sdfast.errors import CheckpointError, DependencyError
from sdfast.export import layout
from sdfast.export.files import Files, reason, sha256, unreadable

_VERSION = 1
"""Part of the cache key: raise it when the same file would be converted differently."""

_SCRATCH = ".converting-"
_ABANDONED_SECONDS = 86_400.0

_UNET = "model.diffusion_model."
_FIRST_CONV = _UNET + "input_blocks.0.0.weight"
_TASKS = {8: "InstructPix2Pix", 9: "Inpaint"}
"""What U-Nets of more channels than the latents' are for, as diffusers' pipelines are named."""
_CROSS_ATTENTION = _UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_SDXL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_REFINER = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
_PREDICTION = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class Header:
    """What a safetensors header says: tensor shapes, the U-Net's dtype, and the file's own metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    metadata: Mapping[str, str]


def convert(
    path: Path,
    *,
    config: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str], None],
) -> Path:
    """The diffusers folder for a single file, made now or found in the cache. Raises CheckpointError.

    `config` is a diffusers folder whose configs (weights are not needed) describe the file; without it
    those of SD 1.5, SD 2.1, SDXL or its refiner are taken, after the shapes in the file. SD 2.x is taken for
    a v-prediction model unless its metadata say otherwise, as diffusers takes it.
    """
    _check_suffix(path)
    header = read_header(path)
    configs = _configs_of(Path(config)) if config is not None else stock_configs(header, str(path))
    progress(f"hashing {path.name}")
    target = _cache_root(cache_dir) / _key(sha256(path, str(path)), configs)
    if not target.exists():
        progress(f"converting {path.name} to a diffusers folder, once; it is kept in {target}")
        _publish(path, configs, header.dtype, target)
    return target


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() in layout.PICKLE_SUFFIXES:
        raise CheckpointError(f"{path} is a pickle. {layout.CONVERT}")
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{path} is not a checkpoint; give a .safetensors file or a diffusers folder")


def read_header(path: Path) -> Header:
    """The header of a file that holds a U-Net in the original layout; anything else is refused."""
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            dtype = file.get_slice(_FIRST_CONV).get_dtype() if _FIRST_CONV in shapes else ""
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, str(path), error) from error
    if not dtype:
        raise CheckpointError(
            f"{path} holds no U-Net in the original layout ({_FIRST_CONV} is missing): a LoRA (for --lora), "
            "a VAE or another kind of model; give a whole SD 1.x, 2.x or SDXL checkpoint, or a diffusers "
            "folder"
        )
    return Header(shapes, dtype, metadata)


def stock_configs(header: Header, source: str) -> dict[str, Any]:
    """The configs of the released model that has this file's shapes: relative file name -> JSON object."""
    name = _stock_name(header.shapes, source)
    text = (resources.files("sdfast.export") / "stock" / f"{name}.json").read_text("utf-8")
    configs: dict[str, Any] = json.loads(text)
    channels = header.shapes[_FIRST_CONV][1]
    if channels == 8 and name.startswith("sdxl"):
        raise CheckpointError(
            f"{source}: an SDXL U-Net that edits images, of which the file does not say what it is told of "
            "them; give a diffusers folder, whose model_index.json says is_cosxl_edit or not"
        )
    if channels in _TASKS:
        pipeline = configs["model_index.json"]["_class_name"].replace(
            "Pipeline", f"{_TASKS[channels]}Pipeline"
        )
        configs["model_index.json"]["_class_name"] = pipeline
        configs["unet/config.json"]["in_channels"] = channels
    scheduler = configs["scheduler/scheduler_config.json"]
    scheduler.update(_noise(header, scheduler["prediction_type"], source))
    return configs


def _stock_name(shapes: Mapping[str, tuple[int, ...]], source: str) -> str:
    if shapes[_FIRST_CONV][1] not in (4, *_TASKS):
        raise CheckpointError(
            f"{source}: a U-Net of {shapes[_FIRST_CONV][1]} input channels is not supported; 4, 8 or 9 are"
        )
    if _REFINER in shapes:
        return "sdxl_refiner"
    if _SDXL in shapes:
        return "sdxl"
    width = shapes.get(_CROSS_ATTENTION, (0, 0))[-1]
    if width not in (768, 1024):
        raise CheckpointError(
            f"{source} has the shapes of none of SD 1.x, SD 2.x, SDXL (cross attention {width}); "
            "give config=FOLDER, a diffusers folder whose configs describe it"
        )
    return "sd15" if width == 768 else "sd21"


def _noise(header: Header, default: str, source: str) -> dict[str, Any]:
    """What the file itself says of its prediction type and noise schedule, in the two customary ways.

    These are the `modelspec.predict_key` metadata, and the marker tensors `v_pred` and `ztsnr`.
    """
    stated = header.metadata.get("modelspec.predict_key") or header.metadata.get("modelspec.prediction_type")
    if "v_pred" in header.shapes:
        stated = "v"
    if stated is not None and stated not in _PREDICTION:
        raise CheckpointError(
            f"{source}: its metadata state the prediction type {stated!r}; known: {', '.join(_PREDICTION)}"
        )
    noise: dict[str, Any] = {"prediction_type": _PREDICTION[stated] if stated else default}
    if "ztsnr" in header.shapes:
        noise.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return noise


def _configs_of(folder: Path) -> dict[str, Any]:
    """The configs in a diffusers folder that the user gave, with its tokenizers' files as text."""
    files = Files(folder.expanduser().resolve(), str(folder))
    index = files.json("model_index.json")
    layout.check_index(index, str(folder))
    names = [
        "scheduler/scheduler_config.json",
        *(f"{name}/config.json" for name in layout.components(index)),
    ]
    configs: dict[str, Any] = {"model_index.json": index, **{name: files.json(name) for name in names}}
    for name in sorted(files.names):
        if name.startswith("tokenizer") and name.endswith((".json", ".txt")):
            configs[name] = files.path(name).read_text("utf-8")
    return configs


def _key(digest: str, configs: Mapping[str, Any]) -> str:
    """The name under which a conversion is kept: the file, the configs, and how they are converted."""
    described = json.dumps([_VERSION, digest, configs], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _cache_root(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sdfast" / "checkpoints"


def _publish(path: Path, configs: Mapping[str, Any], dtype: str, target: Path) -> None:
    """Convert into a temporary folder beside the target, then rename: no half conversion is ever found."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=target.parent))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {target.parent} cannot be written ({reason(error)}); "
            "set XDG_CACHE_HOME to where there is room"
        ) from error
    try:
        _write_configs(configs, scratch / "configs")
        _convert(
            path, scratch / "configs", configs["model_index.json"]["_class_name"], dtype, scratch / "out"
        )
        (scratch / "out").rename(target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        if target.exists():  # someone else converted the same file meanwhile
            return
        raise CheckpointError(
            f"{path} cannot be converted into {target.parent} ({reason(error)}); "
            "make room there, or set XDG_CACHE_HOME to where there is"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what conversions that were killed left behind; none that still runs is a day old."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        if time.time() - scratch.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_configs(configs: Mapping[str, Any], folder: Path) -> None:
    """Write configs as a diffusers folder without weights; a tokenizer without a vocabulary gets CLIP's."""
    for name, content in configs.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    for tokenizer in folder.glob("tokenizer*"):
        if not any((tokenizer / name).exists() for name in ("vocab.json", "tokenizer.json")):
            write_clip_vocabulary(tokenizer)


def write_clip_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary, from its merges: bytes, bytes ending a word, one token a merge, start, end."""
    merges = (resources.files("sdfast.export") / "stock" / "clip_merges.txt").read_text("utf-8")
    letters = sorted(ByteLevel.alphabet())
    merged = [line.replace(" ", "") for line in merges.splitlines()[1:]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text(merges, "utf-8")


def _convert(path: Path, configs: Path, pipeline: str, dtype: str, target: Path) -> None:
    """Let diffusers read the file by the configs and save it as a folder, in the dtype the file has."""
    try:
        import diffusers
        import torch
        from diffusers.loaders.single_file_utils import SingleFileComponentError
    except ImportError as error:
        raise DependencyError(
            f'diffusers is needed to convert {path.name}: pip install "sdfast[export]"'
        ) from error

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    if dtype not in dtypes:
        raise CheckpointError(f"{path} stores its U-Net as {dtype}; supported: {', '.join(dtypes)}")
    try:
        loaded = getattr(diffusers, pipeline).from_single_file(
            str(path), config=str(configs), torch_dtype=dtypes[dtype], local_files_only=True
        )
        loaded.save_pretrained(target, safe_serialization=True)
    except (SingleFileComponentError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} cannot be converted ({reason(error)}): tensors are missing, or are not those of the "
            "model its shapes suggest; give config=FOLDER, a diffusers folder whose configs describe it"
        ) from error
