"""LoRAs: low-rank changes of a checkpoint's weights, merged into them when an engine is exported.

A LoRA adds to a layer's weight W the product of two thin matrices: W + scale · (alpha / rank) · up · down
(Hu et al., "LoRA", 2021, section 4.1). The sum is taken in float32. With a magnitude for each output (DoRA,
Liu et al., 2024, equation 5) the sum's rows are then given these lengths.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export import layout
from sdfast.export.checkpoint import Checkpoint, Progress
from sdfast.export.files import Files, load_tensors, sha256
from sdfast.export.lora_file import Part, Reading, networks_of
from sdfast.export.lora_keys import Layers
from sdfast.export.recipe import LoraSetting
from sdfast.export.sources import kind_of
from sdfast.manifest import MergedLora, Source

CUSTOMARY_NAME = "pytorch_lora_weights.safetensors"  # that diffusers gives to what it saves
SHOWN = 3
_CONVERT = (
    "sdfast reads safetensors only, because a pickle can run code when it is read: where you trust the file, "
    "load its tensors and save them with safetensors.torch.save_file"
)
_WANTED = "a LoRA is a .safetensors file, a folder that holds one, or a Hub id"


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a checkpoint, each of its tensors looked at.

    source: what the user gave. file: the one in it that is meant, or None where the source is that itself.
    revision: the commit on the Hub. digest: the SHA-256 of the file. parts: by component of the checkpoint.
    """

    source: str
    file: str | None
    revision: str | None
    path: Path
    digest: str
    scale: float
    parts: Mapping[str, tuple[Part, ...]]

    @property
    def name(self) -> str:
        return _name(self.source, self.file)

    def record(self) -> MergedLora:
        """What an engine's manifest tells of it."""
        return MergedLora(
            source=self.source, file=self.file, revision=self.revision, digest=self.digest, scale=self.scale
        )

    def merge_into(self, component: str, tensors: dict[str, Tensor]) -> None:
        """Replace what this changes among a component's tensors by the merged ones, in float32.

        Raises `CheckpointError` where a sum is beyond float32.
        """
        parts = self.parts.get(component)
        if not parts:
            return
        own = load_tensors(self.path, self.name)
        for part in parts:
            name = f"{part.layer}.weight"
            merged = part.merged(tensors[name], own)
            if not torch.isfinite(merged).all():
                raise CheckpointError(
                    f"LoRA {self.name}: merged with scale {self.scale:g} into {component}'s {name}, it gives "
                    "numbers that are not finite; give a smaller scale, or check the checkpoint's weights"
                )
            tensors[name] = merged


def with_loras(
    checkpoint: Checkpoint, settings: Sequence[LoraSetting], progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint with LoRAs merged into its weights, which adds them up where they change the same layer.

    Raises `CheckpointError` for one that cannot be found or read, or that does not fit the checkpoint.
    """
    if not settings:
        return checkpoint
    networks, tell = networks_of(checkpoint), progress or _silent
    return replace(checkpoint, loras=tuple(_resolve(s, checkpoint, networks, tell) for s in settings))


def _silent(message: str) -> None:
    """The progress of a caller who asked for none."""


def settings_of(source: Source) -> list[LoraSetting]:
    """The LoRAs that an engine was made with, to be found again."""
    return [
        LoraSetting(source=lora.source, weight_name=lora.file, revision=lora.revision, scale=lora.scale)
        for lora in source.loras
    ]


def _resolve(
    setting: LoraSetting, checkpoint: Checkpoint, networks: Mapping[str, Layers], progress: Progress
) -> Lora:
    path, file, revision = _find(setting, progress)
    name = _name(setting.source, file)
    return Lora(
        source=setting.source,
        file=file,
        revision=revision,
        path=path,
        digest=sha256(path, name),
        scale=setting.scale,
        parts=Reading(path, name, setting.scale, checkpoint, networks).parts(),
    )


def _name(source: str, file: str | None) -> str:
    return source if file is None else f"{source.rstrip('/')}/{file}"


# ---------------------------------------------------------------- where it lies


def _find(setting: LoraSetting, progress: Progress) -> tuple[Path, str | None, str | None]:
    """The file, its name in the folder or repository that the source is, and the commit on the Hub."""
    source = setting.source
    kind = kind_of(source, _WANTED)
    _refuse_unused(setting, kind)
    if kind == "file":
        path = Path(source).expanduser().resolve()
        _check_suffix(source)
        return path, None, None
    if kind == "folder":
        files = Files(Path(source).expanduser().resolve(), source)
        file = _choose(files.names, setting.weight_name, source)
        return files.path(file), file, None
    from sdfast.export import hub

    def choose(names: Collection[str]) -> str:
        return _choose(names, setting.weight_name, source)

    return hub.download_file(source, choose, revision=setting.revision, progress=progress)


def _refuse_unused(setting: LoraSetting, kind: str) -> None:
    unused = {"file": ("weight_name", "revision"), "folder": ("revision",), "hub": ()}[kind]
    given = [field for field in unused if getattr(setting, field) is not None]
    if given:
        raise CheckpointError(
            f"{setting.source}: is a LoRA's {kind}, for which {' and '.join(given)} has no meaning; "
            "leave it out"
        )


def _check_suffix(name: str) -> None:
    if name.lower().endswith(layout.PICKLE_SUFFIXES):
        raise CheckpointError(f"{name}: is a pickle. {_CONVERT}")
    if not name.lower().endswith(".safetensors"):
        raise CheckpointError(f"{name}: is not a LoRA; give a .safetensors file")


def _choose(names: Collection[str], wanted: str | None, source: str) -> str:
    """Of the files in a folder or repository, the one that was asked for, or the only one it can be."""
    if wanted is not None:
        _check_suffix(_name(source, wanted))
        if wanted not in names:
            raise CheckpointError(f"{source}: holds no {wanted}; it holds {_listed(_weights(names))}")
        return wanted
    weights = _weights(names)
    if CUSTOMARY_NAME in weights:
        return CUSTOMARY_NAME
    if len(weights) > 1:
        raise CheckpointError(
            f"{source}: holds {_listed(weights)}; say which with weight_name, in a recipe's [[loras]]"
        )
    if not weights:
        pickles = sorted(name for name in names if name.endswith(layout.PICKLE_SUFFIXES))
        why = f"but a pickle ({pickles[0]}). {_CONVERT}" if pickles else f"and is no LoRA; {_WANTED}"
        raise CheckpointError(f"{source}: holds no .safetensors file, {why}")
    return weights[0]


def _weights(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return (
        f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
    ) or "no .safetensors file"
