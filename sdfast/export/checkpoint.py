"""Checkpoints: what goes in. A Hub id, a diffusers folder, a single `.safetensors` file, or `landscapes`.

Whatever the source, what comes out of `resolve` is a diffusers folder on this disk whose every file has been
looked at: a supported pipeline, configs that parse, weights in safetensors that are complete. No code from a
checkpoint is ever run and no pickle is ever read.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdfast.errors import CheckpointError
from sdfast.export import layout
from sdfast.export.files import Files, load_tensors, sha256, tensor_names
from sdfast.export.sources import kind_of
from sdfast.models.config import adapter_names, controlnet_names

if TYPE_CHECKING:
    import torch

    from sdfast.export.added import Added
    from sdfast.export.controlnet import ControlNetSource
    from sdfast.export.embedding import Embedding
    from sdfast.export.ip_adapter import ImageEncoderSource, IPAdapterSource
    from sdfast.export.lora import Lora, LoraBeside
    from sdfast.export.vae import VAESource
    from sdfast.models.lora import LowRank, Ranks

Progress = Callable[[str], None]
"""Told, in one line, what is about to take a while."""

BUILT_IN = "landscapes"


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its class, its config, and the safetensors files that hold its weights."""

    name: str
    class_name: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]

    def tensors(self, source: str) -> "dict[str, torch.Tensor]":
        """All of its weights files hold, as `load_tensors` has them. source: what errors call it."""
        tensors: dict[str, torch.Tensor] = {}
        for path in self.weights:
            tensors.update(load_tensors(path, source))
        return tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk, in diffusers layout, verified as far as its headers go.

    `source` is what the user gave; `revision` the commit it stands for on the Hub, None elsewhere. `loras`:
    what is merged into its weights, in this order, and `chosen`: what requests add to what its layers make
    (see `lora.with_loras`). `embeddings`: the vectors behind its text encoders' own, in this order, which
    their configs count (see `embedding.with_embeddings`). `controlnets`: what is put beside its U-Net (see
    `controlnet.with_controlnets`). `ip_adapters`: by what images are told to it, and `image_encoder`, what
    they read (see `ip_adapter.with_ip_adapters`). `vae`: what is in the place of its own, among the
    components too (see `vae.with_vae`). `graphs`: whether its networks are graphs that optimum
    exported, with no weights by name (see `optimum.read_graphs`).
    """

    source: str
    revision: str | None
    folder: Path
    family: layout.Family
    index: Mapping[str, Any]
    components: Mapping[str, Component]
    scheduler_config: Mapping[str, Any]
    tokenizers: Mapping[str, Path]
    loras: "tuple[Lora, ...]" = ()
    chosen: "tuple[LoraBeside, ...]" = ()
    controlnets: "tuple[ControlNetSource, ...]" = ()
    embeddings: "tuple[Embedding, ...]" = ()
    ip_adapters: "tuple[IPAdapterSource, ...]" = ()
    image_encoder: "ImageEncoderSource | None" = None
    vae: "VAESource | None" = None
    graphs: bool = False

    def state_dict(self, component: str) -> "dict[str, torch.Tensor]":
        """The tensors of a component, in the dtype they are stored in, on the CPU.

        They are views of the mapped files: nothing is copied, and a page is read when it is first touched.
        Those that a LoRA or an embedding changes are copies, in float32: what is merged is rounded once, by
        who stores it.
        """
        tensors = self._tensors(component)
        for lora in self.loras:
            lora.merge_into(component, tensors)
        for embedding in self.embeddings:
            embedding.add_to(component, tensors)
        return tensors

    def _tensors(self, component: str) -> "dict[str, torch.Tensor]":
        beside = self._beside.get(component)
        return self.component(component).tensors(self.source) if beside is None else beside.state_dict()

    def low_rank(self, component: str) -> "dict[str, list[LowRank]]":
        """What the LoRAs that requests choose add to a component, by layer, as `bare` names it."""
        from sdfast.models.lora import bare

        found: dict[str, list[LowRank]] = {}
        for place, lora in enumerate(self.chosen):
            for layer, change in lora.low_rank(component, place).items():
                found.setdefault(bare(layer), []).append(change)
        return found

    def ranks(self, component: str) -> "Ranks":
        """Their ranks in a component's layers."""
        from sdfast.models.lora import bare

        found: dict[str, list[tuple[int, int]]] = {}
        for place, lora in enumerate(self.chosen):
            for layer, rank in lora.ranks.get(component, {}).items():
                found.setdefault(bare(layer), []).append((place, rank))
        return found

    def check_weights(self) -> None:
        """Raises `CheckpointError` where there are graphs alone, for what needs the networks' weights."""
        if self.graphs:
            raise CheckpointError(
                f"{self.source}: holds graphs that optimum exported, which `sdfast export` alone takes; give "
                "the checkpoint that they were exported from"
            )

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Their names, in the order in which prompts are told to the U-Net."""
        return tuple(sorted(name for name in self.components if name.startswith("text_encoder")))

    @property
    def sample_size(self) -> int:
        """The side in latents of the pictures that its U-Net was trained on."""
        size = self.components["unet"].config.get("sample_size") or 64
        return int(size if isinstance(size, int) else size[0])

    @property
    def scored(self) -> bool:
        """See `manifest.Model`."""
        return layout.is_refiner(self.index)

    @property
    def zero_empty_negative(self) -> bool:
        """See `manifest.Model`."""
        sdxl = self.family == "sdxl"  # where diffusers' pipeline has that on by default
        return bool(self.index.get("force_zeros_for_empty_prompt", sdxl))

    def component(self, name: str) -> Component:
        """A network of it, or one that was put beside. Raises `CheckpointError` for one that is not there."""
        if name in (beside := self._beside):
            return beside[name].component
        if name not in self.components:
            raise CheckpointError(
                f"{self.source}: no component {name!r}; there are: {', '.join(self.components)}"
            )
        return self.components[name]

    def digests(self) -> dict[str, str]:
        """The SHA-256 of every weights file of its own, by its name relative to the folder. Hashed once."""
        return dict(self._digests)

    def digest_of(self, path: Path) -> str:
        """The SHA-256 of one of its weights files, or of what was put beside."""
        for added in self._beside.values():
            if path in added.component.weights:
                return added.digests[path.name]
        return self._digests[path.relative_to(self.folder).as_posix()]

    @property
    def nbytes(self) -> int:
        """Of all weights files."""
        parts = {**self.components, **{name: added.component for name, added in self._beside.items()}}
        return sum(path.stat().st_size for part in parts.values() for path in part.weights)

    @property
    def _beside(self) -> "dict[str, Added | IPAdapterSource]":
        """What was put beside its networks or in the place of one, by the names that those have as
        components."""
        encoder = {} if self.image_encoder is None else {layout.IMAGE_ENCODER: self.image_encoder}
        vae = {} if self.vae is None else {"vae": self.vae}
        return {
            **vae,
            **dict(zip(controlnet_names(len(self.controlnets)), self.controlnets, strict=True)),
            **dict(zip(adapter_names(len(self.ip_adapters)), self.ip_adapters, strict=True)),
            **encoder,
        }

    @cached_property
    def _digests(self) -> dict[str, str]:
        own = [part for name, part in self.components.items() if name not in self._beside]
        paths = sorted({path for component in own for path in component.weights})
        with ThreadPoolExecutor(2) as pool:
            digests = pool.map(lambda path: sha256(path, self.source), paths)
            return {
                path.relative_to(self.folder).as_posix(): digest
                for path, digest in zip(paths, digests, strict=True)
            }


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Find a checkpoint, fetch or convert what has to be, and verify it.

    `source` is `landscapes`, a diffusers folder, a `.safetensors` file in the original layout, or a Hub id;
    what exists on this disk wins over the Hub. `revision` (branch, tag or commit), `token` and
    `local_files_only` concern the Hub; `variant` ("fp16") the file names in a folder or on the Hub; `config`
    a single file: the diffusers folder whose configs describe it, where the stock ones do not.
    `cache_dir` is where downloads (the Hub's own cache otherwise) or conversions are kept.

    Raises CheckpointError, and nothing else, for whatever is wrong with the source.
    """
    tell = progress or silent
    name = os.fspath(source)
    kind = _kind(source)
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise CheckpointError(f"{name}: {variant!r} is not a variant; a variant is a word such as fp16")
    _refuse_unused(name, kind, revision=revision, variant=variant, config=config)
    if kind == "built-in":
        from sdfast.landscapes import checkpoint_folder

        return read_folder(checkpoint_folder(), source=name)
    if kind == "folder":
        return read_folder(name, variant=variant)
    if kind == "file":
        from sdfast.export import single_file

        folder = single_file.convert(
            Path(name).expanduser(), config=config, cache_dir=cache_dir, progress=tell
        )
        return read_folder(folder, source=name)
    from sdfast.export import hub

    snapshot, commit = hub.download(
        name,
        revision=revision,
        variant=variant,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        progress=tell,
    )
    return read_folder(snapshot, source=name, revision=commit, variant=variant)


def name_of(source: str) -> str:
    """What a checkpoint is called for short: the last part of a path, or of a Hub id."""
    path = Path(source).resolve() if Path(source).exists() else Path(source)  # "." has no name of its own
    return path.stem if source.endswith(".safetensors") else path.name


def silent(message: str) -> None:
    """The progress of a caller who asked for none."""


def _kind(source: str | Path) -> Literal["built-in", "folder", "file", "hub"]:
    """What a source is; a Path never means the built-in one."""
    wanted = f"a checkpoint is '{BUILT_IN}', a diffusers folder, a .safetensors file, or a Hub id"
    return "built-in" if source == BUILT_IN else kind_of(source, wanted)


def _refuse_unused(name: str, kind: str, **given: object) -> None:
    """Refuse an argument that would have no effect on this kind of source."""
    used = {"built-in": (), "folder": ("variant",), "file": ("config",), "hub": ("revision", "variant")}[kind]
    unused = [argument for argument, value in given.items() if value is not None and argument not in used]
    if unused:
        raise CheckpointError(
            f"{name} is a {kind} checkpoint, for which {' and '.join(unused)} has no meaning; leave it out"
        )


def read_folder(
    folder: str | Path, *, source: str | None = None, revision: str | None = None, variant: str | None = None
) -> Checkpoint:
    """The checkpoint in a diffusers folder, each of its files verified. Errors speak of `source`."""
    source = source or os.fspath(folder)
    files = Files(Path(folder).expanduser().resolve(), source)
    if "model_index.json" not in files.names:
        raise CheckpointError(f"{source}: {layout.why_no_index(files.names)}")
    from sdfast.export import optimum

    if optimum.holds_graphs(files.names):
        return optimum.read_graphs(files, variant)
    index = files.json("model_index.json")
    family = layout.check_index(index, source)
    return Checkpoint(
        source=source,
        revision=revision,
        folder=files.folder,
        family=family,
        index=index,
        components={
            name: _component(files, name, index[name][1], variant) for name in layout.components(index)
        },
        scheduler_config=files.json("scheduler/scheduler_config.json"),
        tokenizers={name: tokenizer_folder(files, name) for name in layout.tokenizers(index)},
    )


def _component(files: Files, name: str, class_name: str, variant: str | None) -> Component:
    config = files.json(f"{name}/config.json")
    check_config(config, name, class_name, files)
    return component_of(files, name, class_name, config, variant)


def component_of(
    files: Files, name: str, class_name: str, config: Mapping[str, Any], variant: str | None
) -> Component:
    """A component with this config, its weights found and their headers looked at."""
    weights = layout.weights_file(files.names, name, variant, files.source)
    if not weights.endswith(".json"):
        return Component(name, class_name, config, (_check_tensors(files, weights),))
    shards = layout.shard_files(files.json(weights), weights, files.source)
    paths = tuple(_check_tensors(files, shard, tensors) for shard, tensors in sorted(shards.items()))
    return Component(name, class_name, config, paths)


def check_config(config: Mapping[str, Any], name: str, class_name: str, files: Files) -> None:
    """A config must be that of the class in model_index.json, and neither name nor bring code of its own."""
    code = sorted(file for file in files.names if file.startswith(f"{name}/") and file.endswith(".py"))
    if code or "auto_map" in config:
        what = code[0] if code else "auto_map in config.json"
        raise CheckpointError(
            f"{files.source}: {name} brings code of its own ({what}); "
            "sdfast runs no code from a checkpoint: remove it, or save the component again with a stock class"
        )
    stated = config.get("_class_name", class_name)
    if stated != class_name:
        raise CheckpointError(
            f"{files.source}: {name}/config.json is of a {stated}, model_index.json says {class_name}; "
            "the folder is mixed up: download it again"
        )


def tokenizer_folder(files: Files, name: str) -> Path:
    """The folder of a tokenizer: a vocabulary with its merges, or a tokenizer.json; and its config."""
    files.path(f"{name}/tokenizer_config.json")
    if f"{name}/tokenizer.json" in files.names:
        return files.path(f"{name}/tokenizer.json").parent
    files.path(f"{name}/vocab.json")
    return files.path(f"{name}/merges.txt").parent


def _check_tensors(files: Files, name: str, expected: Collection[str] = ()) -> Path:
    """A weights file whose header is whole and that holds the tensors expected of it."""
    path = files.path(name)
    there = set(tensor_names(path, files.source))
    missing = sorted(set(expected) - there)
    if missing or not there:
        what = f"has no tensor {missing[0]!r}, which its index puts there" if missing else "holds no tensors"
        raise CheckpointError(f"{files.source}: {name} {what}; download it again")
    return path
