"""Embeddings: vectors that a token in a prompt stands for, added to the text encoders at export.

Textual inversion (Gal et al., "An Image is Worth One Word", 2022, section 3) learns the vectors that a text
encoder looks up for a new token. Here they become further rows of its table, as with diffusers, behind those
of the tokenizer's own ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import Checkpoint, Component, Progress, silent
from sdfast.export.files import load_tensors
from sdfast.export.one_file import Found, Wanted, find
from sdfast.export.recipe import EmbeddingSetting
from sdfast.export.tokenizer import names_of_vectors, read_tokenizer
from sdfast.manifest import AddedEmbedding

WANTED = Wanted("an", "embedding", "learned_embeds.safetensors", "embeddings")
FOR_ALL_PROMPTS = "emb_params"  # how AUTOMATIC1111 names the vectors in a file, whose own name is the token
TWO_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""How files for SDXL name the vectors for each of its text encoders."""

_TABLE = "token_embedding.weight"  # how the name of a text encoder's table ends
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x"}
_OF_PROMPTS = "()[]|:\\"  # what prompts with emphasis have another use for


@dataclass(frozen=True)
class Embedding(Found):
    """An embedding that fits a checkpoint, each of its vectors looked at.

    token: what stands for it in prompts. vectors: how many it is of. first: the id of the first one, by text
    encoder; tensors: the name of the tensor in the file, likewise.
    """

    token: str
    vectors: int
    first: Mapping[str, int]
    tensors: Mapping[str, str]

    def record(self) -> AddedEmbedding:
        """What an engine's manifest tells of it."""
        return AddedEmbedding(
            source=self.source,
            file=self.file,
            revision=self.revision,
            digest=self.digest,
            token=self.token,
            vectors=self.vectors,
        )

    def rows(self, component: str) -> Tensor:
        """The vectors [vectors, D] for one text encoder, float32."""
        return _rows(load_tensors(self.path, self.name)[self.tensors[component]])

    def add_to(self, component: str, tensors: dict[str, Tensor]) -> None:
        """Put the vectors behind the rows that a component's table has so far, in float32."""
        if component not in self.first:
            return
        for name, table in tensors.items():
            if name.endswith(_TABLE):
                tensors[name] = torch.cat([table[: self.first[component]].float(), self.rows(component)])


def with_embeddings(
    checkpoint: Checkpoint, settings: Sequence[EmbeddingSetting], progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint with embeddings in its text encoders.

    Raises `CheckpointError` for one that cannot be found or read, or that does not fit the checkpoint.
    """
    if not settings:
        return checkpoint
    encoders = [_Encoder.of(checkpoint, name) for name in sorted(checkpoint.tokenizers)]
    found: list[Embedding] = []
    for setting in settings:
        reading = _Reading(find(setting, WANTED, progress or silent), setting, checkpoint, encoders)
        found.append(reading.embedding(found))
    more = sum(embedding.vectors for embedding in found)
    longer = {one.component.name: one.with_vectors(more) for one in encoders}
    return replace(checkpoint, embeddings=tuple(found), components={**checkpoint.components, **longer})


@dataclass(frozen=True)
class _Encoder:
    """A text encoder, and the tokenizer (transformers') of which it reads the ids."""

    component: Component
    tokenizer: Any

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: str) -> "_Encoder":
        component = checkpoint.components[tokenizer.replace("tokenizer", "text_encoder")]
        found = cls(component, read_tokenizer(checkpoint.tokenizers[tokenizer]))
        if len(found.tokenizer) > component.config["vocab_size"]:
            raise CheckpointError(
                f"{checkpoint.source}: its {tokenizer} has {len(found.tokenizer)} tokens, and its "
                f"{component.name} knows {component.config['vocab_size']}; embeddings need both to be of one "
                "checkpoint: download it again"
            )
        return found

    @property
    def width(self) -> int:
        return int(self.component.config["hidden_size"])

    @property
    def room(self) -> int:
        """The most vectors that a prompt has room for, between start and end."""
        return int(self.tokenizer.model_max_length) - 2

    def normal(self, token: str) -> str:
        """A token as prompts are read: in small letters, and in Unicode's composed form."""
        return str(self.tokenizer.backend_tokenizer.normalizer.normalize_str(token))

    def knows(self, token: str) -> bool:
        """Whether it is one token already."""
        return (
            token in self.tokenizer.get_vocab()
            or len(self.tokenizer(token, add_special_tokens=False).input_ids) == 1
        )

    def with_vectors(self, count: int) -> Component:
        """The component, whose table has so many rows behind those of the tokenizer's ids."""
        config = {**self.component.config, "vocab_size": len(self.tokenizer) + count}
        return replace(self.component, config=config)


@dataclass(frozen=True)
class _Reading:
    """One file, read for one checkpoint. Every error names the file, what in it is wrong, and what to do."""

    found: Found
    setting: EmbeddingSetting
    checkpoint: Checkpoint
    encoders: Sequence[_Encoder]

    def embedding(self, others: Sequence[Embedding]) -> Embedding:
        """The embedding, after `others` in the tables."""
        tensors = load_tensors(self.found.path, self.found.name)
        names = self._names(tensors)
        counts = [self._count(one, names[one.component.name], tensors) for one in self.encoders]
        if len(set(counts)) > 1:
            raise self._error(f"has {' and '.join(map(str, counts))} vectors for the two text encoders")
        token = self.setting.token or self._own_token(names)
        self._check_token(token)
        self._check_apart(token, counts[0], others)
        before = sum(other.vectors for other in others)
        first = {one.component.name: len(one.tokenizer) + before for one in self.encoders}
        return Embedding(**vars(self.found), token=token, vectors=counts[0], first=first, tensors=names)

    def _names(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The name of the tensor for each text encoder."""
        two, family = set(TWO_ENCODERS.values()), self.checkpoint.family
        if two & tensors.keys():
            if family != "sdxl":
                raise self._error("is for SDXL, and the checkpoint is not; give one that is made for it")
            if tensors.keys() != two:
                raise self._error(f"holds {_listed(tensors)}, and one for SDXL holds clip_g and clip_l alone")
            return {name: TWO_ENCODERS[name] for name in self.checkpoint.text_encoders}
        if len(tensors) != 1:
            raise self._error(
                f"holds {_listed(tensors)}; an embedding is one tensor, or for SDXL clip_g and clip_l"
            )
        if family == "sdxl":
            raise self._error(
                "has vectors for one text encoder, and those for SDXL are for two; give one that is made for "
                "SDXL"
            )
        return {"text_encoder": next(iter(tensors))}

    def _count(self, encoder: _Encoder, name: str, tensors: Mapping[str, Tensor]) -> int:
        """How many vectors there are for a text encoder, all of which fit it."""
        tensor = tensors[name]
        shape = list(tensor.shape)
        if tensor.dim() not in (1, 2) or not tensor.numel():
            raise self._error(f"{name} has shape {shape}; vectors have [number, width]")
        count, width = _rows(tensor).shape
        if width != encoder.width:
            made_for = f"it looks like one for {_FAMILIES[width]}; " if width in _FAMILIES else ""
            raise self._error(
                f"{name} has vectors of width {width}, and the {encoder.component.name} of "
                f"{self.checkpoint.source} takes {encoder.width}; {made_for}give one made for this checkpoint"
            )
        if count > encoder.room:
            raise self._error(f"{name} has {count} vectors, and a prompt has room for {encoder.room}")
        if not tensor.is_floating_point():
            raise self._error(f"{name} is {tensor.dtype}; floating point is needed")
        if not torch.isfinite(tensor.float()).all():
            raise self._error(
                f"{name} holds numbers that are not finite: its training failed, or the file is damaged"
            )
        return count

    def _own_token(self, names: Mapping[str, str]) -> str:
        """What the file names as its token: with diffusers, by the tensor; else by its own name."""
        name = next(iter(names.values()))
        if name == FOR_ALL_PROMPTS or len(names) > 1:
            return Path(self.found.file or self.found.path).stem
        return name

    def _check_token(self, token: str) -> None:
        if not token.isprintable() or " " in token:
            raise self._token_error(token, "holds a space, or what cannot be shown")
        if held := [character for character in _OF_PROMPTS if character in token]:
            raise self._token_error(token, f"holds {held[0]}, of which prompts have another use")
        if any(one.knows(token) for one in self.encoders):
            raise self._token_error(token, f"is one of {self.checkpoint.source}'s own")

    def _check_apart(self, token: str, count: int, others: Iterable[Embedding]) -> None:
        """That no name of its vectors is one of another's; the first two of each are taken in any case."""
        normal = self.encoders[0].normal
        own = {normal(name) for name in names_of_vectors(token, max(count, 2))}
        for other in others:
            if own & {normal(name) for name in names_of_vectors(other.token, max(other.vectors, 2))}:
                raise self._token_error(token, f"cannot be told from {other.token}, that of {other.name}")

    def _token_error(self, token: str, what: str) -> CheckpointError:
        return self._error(
            f"its token {token!r:.60} {what}; give it another: --embedding SOURCE=TOKEN, or token in a recipe"
        )

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"embedding {self.found.name}: {message}")


def _rows(tensor: Tensor) -> Tensor:
    """[D] or [n, D] of any floating dtype -> [n, D] float32."""
    return tensor.float().reshape(-1, tensor.shape[-1])


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return f"{', '.join(found[:3])}{' and more' * (len(found) > 3)}" if found else "no tensors"
