"""A VAE that takes the place of a checkpoint's own when an engine is exported: where it lies, and whether it
fits."""

from dataclasses import dataclass, replace
from pathlib import Path

from sdfast.errors import CheckpointError
from sdfast.export import layout, vae_file
from sdfast.export.added import Added, digests_of, refuse_unused
from sdfast.export.checkpoint import Checkpoint, Component, Progress, component_of, silent
from sdfast.export.files import Files
from sdfast.export.recipe import VAESetting
from sdfast.export.sources import kind_of
from sdfast.manifest import UsedVAE
from sdfast.models.tiny_vae import TinyVAEConfig
from sdfast.models.vae import TINY, AnyVAEConfig, vae_config

VAE = "vae"
_WANTED = "a VAE is a diffusers folder, a .safetensors file or a Hub id"


@dataclass(frozen=True)
class VAESource(Added):
    """A VAE on this disk, verified as far as its headers go."""

    def record(self) -> UsedVAE:
        """What an engine's manifest tells of it."""
        return UsedVAE(source=self.source, revision=self.revision, weights=dict(self.digests))


def with_vae(
    checkpoint: Checkpoint, setting: VAESetting | None, progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint with another VAE in the place of its own; as it is without a setting.

    Raises `CheckpointError` for one that cannot be found or read, or encodes to other latents.
    """
    if setting is None:
        return checkpoint
    checkpoint.check_weights()
    own = checkpoint.components[VAE]
    found = _resolve(setting, own, progress or silent)
    _check_fits(found, own, checkpoint.source)
    return replace(checkpoint, components={**checkpoint.components, VAE: found.component}, vae=found)


def _resolve(setting: VAESetting, own: Component, progress: Progress) -> VAESource:
    """own: the checkpoint's, whose config is that of a file in the original layout."""
    source, revision = setting.source, setting.revision
    kind = kind_of(source, _WANTED)
    refuse_unused(source, kind, "VAE", revision=revision, variant=setting.variant)
    if kind == "file":
        return _of_file(source, own)
    folder = Path(source).expanduser().resolve()
    if kind == "hub":
        from sdfast.export import hub

        folder, revision = hub.download_vae(
            source, revision=revision, variant=setting.variant, progress=progress
        )
    files = Files(folder, source)
    part = layout.vae_folder(files.names, source)
    component = _read(Files(folder / part, source, folder), setting.variant)
    return VAESource(source, revision, component, digests_of(component, source))


def _of_file(source: str, own: Component) -> VAESource:
    path = Path(source).expanduser().resolve()
    class_name, names = vae_file.read(path, source)
    if class_name not in (TINY, own.class_name):
        raise CheckpointError(
            f"{source}: a file tells no config, and that of the checkpoint's own VAE is of a "
            f"{own.class_name}; give a diffusers folder"
        )
    config = {} if class_name == TINY else own.config
    component = Component(VAE, class_name, config, (path,))
    return VAESource(source, None, component, digests_of(component, source), names)


def _read(files: Files, variant: str | None) -> Component:
    config = files.json("config.json")
    stated = config.get("_class_name")
    if stated not in layout.CLASSES[VAE]:
        raise CheckpointError(
            f"{files.source}: is a {stated}, not a VAE that can be exported; supported: "
            f"{', '.join(layout.CLASSES[VAE])}"
        )
    return replace(component_of(files, layout.VAE_ALONE, stated, config, variant), name=VAE)


def _check_fits(found: VAESource, own: Component, checkpoint: str) -> None:
    """Raises `CheckpointError` for latents that are not those that the U-Net makes."""
    theirs, ours = _config(found.component, found.source), _config(own, checkpoint)
    for what, one, other in (
        ("latent channels", theirs.latent_channels, ours.latent_channels),
        ("pixels a latent", theirs.scale, ours.scale),
    ):
        if one != other:
            raise CheckpointError(
                f"{found.source}: a VAE of {one} {what}, and this checkpoint's has {other}; take one that "
                "was made for this kind of Stable Diffusion"
            )
    of_one_kind = isinstance(theirs, TinyVAEConfig) == isinstance(ours, TinyVAEConfig)
    if of_one_kind and theirs.scaling_factor != ours.scaling_factor:
        raise CheckpointError(
            f"{found.source}: its latents are scaled by {theirs.scaling_factor}, and those of this "
            f"checkpoint's VAE by {ours.scaling_factor}: they are other latents; take a VAE that was made "
            "for this kind of Stable Diffusion"
        )


def _config(component: Component, source: str) -> AnyVAEConfig:
    try:
        return vae_config(component.class_name, component.config)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
