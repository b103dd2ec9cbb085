"""ControlNets that are put beside a checkpoint's U-Net when an engine is exported: where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdfast.errors import CheckpointError
from sdfast.export import controlnet_file, layout
from sdfast.export.added import Added, digests_of, refuse_unused
from sdfast.export.checkpoint import Checkpoint, Component, Progress, component_of, silent
from sdfast.export.files import Files
from sdfast.export.recipe import ControlNetSetting, Recipe
from sdfast.export.sources import kind_of
from sdfast.manifest import AddedControlNet, Manifest
from sdfast.models.controlnet import CLASS

_WANTED = "a ControlNet is a diffusers folder, a .safetensors file or a Hub id"


@dataclass(frozen=True)
class ControlNetSource(Added):
    """A ControlNet on this disk, verified as far as its headers go."""

    def record(self) -> AddedControlNet:
        """What an engine's manifest tells of it."""
        return AddedControlNet(source=self.source, revision=self.revision, weights=dict(self.digests))


def with_controlnets(
    checkpoint: Checkpoint, settings: Sequence[ControlNetSetting], progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint with ControlNets beside its U-Net.

    Raises `CheckpointError` for one that cannot be found or read. Whether it fits is seen when the networks'
    configs are read.
    """
    found = (_resolve(setting, checkpoint, progress or silent) for setting in settings)
    return replace(checkpoint, controlnets=tuple(found))


def settings_of(manifest: Manifest) -> list[ControlNetSetting]:
    """The ControlNets that an engine was made with, to be found again."""
    made_with = manifest.checkpoint.controlnets
    if not made_with:
        return []
    asked = Recipe.recorded(manifest.recipe).controlnet
    return [
        ControlNetSetting(source=one.source, revision=one.revision, variant=setting.variant)
        for one, setting in zip(made_with, asked, strict=True)
    ]


def _resolve(setting: ControlNetSetting, checkpoint: Checkpoint, progress: Progress) -> ControlNetSource:
    source, revision = setting.source, setting.revision
    kind = kind_of(source, _WANTED)
    refuse_unused(source, kind, "ControlNet", revision=revision, variant=setting.variant)
    if kind == "file":
        return _of_file(source, checkpoint)
    if kind == "folder":
        folder = Path(source).expanduser().resolve()
    else:
        from sdfast.export import hub

        folder, revision = hub.download_controlnet(
            source, revision=revision, variant=setting.variant, progress=progress
        )
    component = _read(Files(folder, source), setting.variant)
    return ControlNetSource(source, revision, component, digests_of(component, source))


def _of_file(source: str, checkpoint: Checkpoint) -> ControlNetSource:
    path = Path(source).expanduser().resolve()
    config, names = controlnet_file.read(path, source, checkpoint.component("unet").config)
    component = Component(layout.CONTROLNET, CLASS, config, (path,))
    return ControlNetSource(source, None, component, digests_of(component, source), names)


def _read(files: Files, variant: str | None) -> Component:
    """Scripts that lie beside the weights are none of sdfast's business: nothing of them is run."""
    layout.check_controlnet(files.names, files.source)
    config = files.json("config.json")
    stated = config.get("_class_name")
    if stated != CLASS:
        raise CheckpointError(f"{files.source}: is a {stated}, not a ControlNet; supported: {CLASS}")
    return component_of(files, layout.CONTROLNET, CLASS, config, variant)
