"""LoRAs: low-rank changes of a checkpoint's weights, merged into them when an engine is exported, or put
beside them, for requests to choose.

A LoRA adds to a layer's weight W the product of two thin matrices: W + scale · (alpha / rank) · up · down
(Hu et al., "LoRA", 2021, section 4.1). The sum is taken in float32. With a magnitude for each output (DoRA,
Liu et al., 2024, equation 5) the sum's rows are then given these lengths. How one that is not merged runs,
`sdfast.models.lora` tells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import Checkpoint, Progress, name_of, silent
from sdfast.export.files import load_tensors, tensor_shapes
from sdfast.export.lora_file import Part, Reading, networks_of
from sdfast.export.lora_keys import Layers
from sdfast.export.one_file import Found, Wanted, find
from sdfast.export.recipe import LoraSetting
from sdfast.manifest import ChosenLora, LoraName, MergedLora
from sdfast.models.lora import LowRank

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


@dataclass(frozen=True)
class LoraBeside(Found):
    """A LoRA that requests choose, likewise. called: what they call it. ranks: of each part's layer, by
    component."""

    called: str
    parts: Mapping[str, tuple[Part, ...]]
    ranks: Mapping[str, Mapping[str, int]]

    def record(self) -> ChosenLora:
        """What an engine's manifest tells of it."""
        return ChosenLora(
            source=self.source, file=self.file, revision=self.revision, digest=self.digest, called=self.called
        )

    def low_rank(self, component: str, place: int) -> dict[str, LowRank]:
        """What it adds to a component's layers, in float32. place: its own among those of the engine."""
        tensors = load_tensors(self.path, self.name)
        return {
            part.layer: LowRank(place, tensors[part.down].float(), tensors[part.up].float() * part.factor)
            for part in self.parts.get(component, ())
        }


def with_loras(
    checkpoint: Checkpoint, settings: Sequence[LoraSetting], progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint with LoRAs merged into its weights, which adds them up where they change the same layer,
    and with those beside them that requests choose.

    Raises `CheckpointError` for one that cannot be found or read, or that does not fit the checkpoint, and
    for two of one name.
    """
    if not settings:
        return checkpoint
    networks, tell = networks_of(checkpoint), progress or silent
    merged = tuple(_merged(s, checkpoint, networks, tell) for s in settings if not s.on_request)
    chosen = tuple(_beside(s, checkpoint, networks, tell) for s in settings if s.on_request)
    for place, lora in enumerate(chosen):
        _check_alone(lora, chosen[:place])
    return replace(checkpoint, loras=merged, chosen=chosen)


def _merged(
    setting: LoraSetting, checkpoint: Checkpoint, networks: Mapping[str, Layers], progress: Progress
) -> Lora:
    found = find(setting, WANTED, progress)
    parts = Reading(found.path, found.name, setting.scale, checkpoint, networks).parts()
    return Lora(**vars(found), scale=setting.scale, parts=parts)


def _beside(
    setting: LoraSetting, checkpoint: Checkpoint, networks: Mapping[str, Layers], progress: Progress
) -> LoraBeside:
    found = find(setting, WANTED, progress)
    parts = Reading(found.path, found.name, 1.0, checkpoint, networks).parts()
    if any(part.magnitude for several in parts.values() for part in several):
        raise CheckpointError(
            f"LoRA {found.name}: is a DoRA, which is no sum of what a layer makes and what it adds, so that "
            "requests cannot choose it; merge it: leave on_request out, or take --lora"
        )
    shapes, _ = tensor_shapes(found.path, found.name)
    ranks = {name: {part.layer: shapes[part.down][0] for part in several} for name, several in parts.items()}
    return LoraBeside(**vars(found), called=_called(setting, found), parts=parts, ranks=ranks)


def _called(setting: LoraSetting, found: Found) -> str:
    """What requests call a LoRA of which the setting does not say it."""
    if setting.name is not None:
        return setting.name
    file = found.file if found.file not in (None, WANTED.customary_name) else found.source
    name = name_of(str(file).rstrip("/"))
    try:
        return str(TypeAdapter(LoraName).validate_python(name))
    except ValidationError:
        raise CheckpointError(
            f'LoRA {found.name}: {name!r} cannot be its name in requests, which has none of <>:=," and at '
            "most 100 characters; give another name, with --lora-on-request SOURCE=NAME or in the recipe"
        ) from None


def _check_alone(lora: LoraBeside, earlier: Sequence[LoraBeside]) -> None:
    for other in earlier:
        if other.called == lora.called:
            raise CheckpointError(
                f"LoRAs {other.name} and {lora.name}: requests would call both {lora.called!r}; give one of "
                "them another name, with --lora-on-request SOURCE=NAME or in the recipe"
            )
