"""LoRAs: low-rank changes of a checkpoint's weights, merged into them when an engine is exported.

A LoRA adds to a layer's weight W the product of two thin matrices: W + scale · (alpha / rank) · up · down
(Hu et al., "LoRA", 2021, section 4.1). The sum is taken in float32. With a magnitude for each output (DoRA,
Liu et al., 2024, equation 5) the sum's rows are then given these lengths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import Checkpoint, Progress, silent
from sdfast.export.files import load_tensors
from sdfast.export.lora_file import Part, Reading, networks_of
from sdfast.export.lora_keys import Layers
from sdfast.export.one_file import Found, Wanted, find
from sdfast.export.recipe import LoraSetting
from sdfast.manifest import MergedLora

WANTED = Wanted("a", "LoRA", "pytorch_lora_weights.safetensors", "loras")


@dataclass(frozen=True)
class Lora(Found):
    """A LoRA that fits a checkpoint, each of its tensors looked at. parts: by component of the checkpoint."""

    scale: float
    parts: Mapping[str, tuple[Part, ...]]

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
    networks, tell = networks_of(checkpoint), progress or silent
    return replace(checkpoint, loras=tuple(_resolve(s, checkpoint, networks, tell) for s in settings))


def _resolve(
    setting: LoraSetting, checkpoint: Checkpoint, networks: Mapping[str, Layers], progress: Progress
) -> Lora:
    found = find(setting, WANTED, progress)
    parts = Reading(found.path, found.name, setting.scale, checkpoint, networks).parts()
    return Lora(**vars(found), scale=setting.scale, parts=parts)
