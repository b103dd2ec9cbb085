"""What an engine has beside its checkpoint: another VAE, LoRAs, merged into its weights or chosen by
requests, embeddings, ControlNets, and IP-Adapters."""

from sdfast.export.checkpoint import Checkpoint, Progress
from sdfast.export.controlnet import settings_of, with_controlnets
from sdfast.export.embedding import with_embeddings
from sdfast.export.ip_adapter import with_ip_adapters
from sdfast.export.lora import with_loras
from sdfast.export.recipe import EmbeddingSetting, IPAdapterSetting, LoraSetting, Recipe, VAESetting
from sdfast.export.vae import with_vae
from sdfast.manifest import Manifest


def as_made(checkpoint: Checkpoint, engine: Manifest, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint with the VAE, LoRAs, embeddings, ControlNets and IP-Adapters that its engine was made
    with, found again.

    Raises `CheckpointError` for one that is not there any more, or does not fit the checkpoint.
    """
    made_from = engine.checkpoint
    checkpoint = with_vae(checkpoint, _vae(engine), progress)
    loras = [
        LoraSetting(source=lora.source, weight_name=lora.file, revision=lora.revision, scale=lora.scale)
        for lora in made_from.loras
    ]
    loras += [
        LoraSetting(
            source=lora.source,
            weight_name=lora.file,
            revision=lora.revision,
            on_request=True,
            name=lora.called,
        )
        for lora in made_from.chosen
    ]
    embeddings = [
        EmbeddingSetting(source=one.source, weight_name=one.file, revision=one.revision, token=one.token)
        for one in made_from.embeddings
    ]
    checkpoint = with_embeddings(with_loras(checkpoint, loras, progress), embeddings, progress)
    checkpoint = with_controlnets(checkpoint, settings_of(engine), progress)
    adapters = [
        IPAdapterSetting(source=one.source, weight_name=one.file, revision=one.revision)
        for one in made_from.ip_adapters
    ]
    return with_ip_adapters(checkpoint, adapters, engine.recipe.get("image_encoder"), progress)


def _vae(engine: Manifest) -> VAESetting | None:
    used, asked = engine.checkpoint.vae, Recipe.recorded(engine.recipe).vae
    if used is None or asked is None:
        return None
    return VAESetting(source=used.source, revision=used.revision, variant=asked.variant)
