"""What an engine has beside its checkpoint's own weights: LoRAs, merged into them, and embeddings."""

from sdfast.export.checkpoint import Checkpoint, Progress
from sdfast.export.embedding import with_embeddings
from sdfast.export.lora import with_loras
from sdfast.export.recipe import EmbeddingSetting, LoraSetting
from sdfast.manifest import Source


def as_made(checkpoint: Checkpoint, made_from: Source, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint with the LoRAs and embeddings that an engine of it was made with, found again.

    Raises `CheckpointError` for one that is not there any more, or does not fit the checkpoint.
    """
    loras = [
        LoraSetting(source=lora.source, weight_name=lora.file, revision=lora.revision, scale=lora.scale)
        for lora in made_from.loras
    ]
    embeddings = [
        EmbeddingSetting(source=one.source, weight_name=one.file, revision=one.revision, token=one.token)
        for one in made_from.embeddings
    ]
    return with_embeddings(with_loras(checkpoint, loras, progress), embeddings, progress)
