"""Engines that `from_pretrained` builds on first use, kept for the next time."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdfast.errors import RequestError
from sdfast.export.build import Stage, export
from sdfast.export.cache import cache_folder
from sdfast.export.recipe import Recipe

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16"}


def cached_engine(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None,
    variant: str | None,
    backend: str,
    provider: str | None = None,
    sizes: tuple[str, ...] | None = None,
    loras: Sequence[Any] = (),
    controlnet: Any = None,
    embeddings: Sequence[Any] = (),
    ip_adapters: Sequence[Any] = (),
    image_encoder: str | Path | None = None,
    vae: Any = None,
    cache_branch: int | None = None,
    pag: Sequence[str] = (),
) -> Path:
    """The folder of the engine of a checkpoint, built when it is not there or the checkpoint has changed.

    The checkpoint's own size is compiled unless `sizes` ("512x768", width first) names others. `loras`,
    `controlnet`, `embeddings`, `ip_adapters`, `image_encoder`, `vae`, `cache_branch`, `pag`: as a recipe has
    them. What is built is said on stderr.
    """
    if dtype not in _DTYPES:
        raise RequestError(f"torch_dtype: {dtype} is not one of torch.float32, torch.float16")
    if backend == "onnx" and provider is None and not torch.cuda.is_available():
        provider = "cpu"  # the engine is for this machine
    recipe = Recipe.make(
        revision=revision,
        variant=variant,
        backend=backend,
        dtype=_DTYPES[dtype],
        provider=provider,
        sizes=sizes,
        loras=loras,
        controlnet=controlnet,
        embeddings=embeddings,
        ip_adapters=ip_adapters,
        image_encoder=image_encoder,
        vae=vae,
        cache_branch=cache_branch,
        pag=tuple(pag),
    )
    source = str(checkpoint)
    shown = source.replace(os.sep, "--").strip("-.") or "checkpoint"
    key = hashlib.sha256(
        f"{Path(source).resolve() if Path(source).exists() else source}\n{recipe!r}".encode()
    )
    target = cache_folder() / f"{shown[-60:]}-{recipe.dtype}-{key.hexdigest()[:12]}"
    return export(checkpoint, target, recipe, progress=_Announce(source, target))


class _Announce:
    """Says on stderr that an engine is being built; silent when it is there already."""

    def __init__(self, source: str, target: Path) -> None:
        self._source = source
        self._target = target
        self._said = False

    def begin(self, stage: str) -> None:
        if stage != "checkpoint" and not self._said:
            self._said = True
            self.say(f"exporting {self._source} to {self._target}, once")

    def end(self, stage: Stage) -> None:
        if stage.name != "checkpoint" and stage.seconds:
            self.say(f"  {stage.name} {stage.seconds:.1f} s")

    def say(self, message: str) -> None:
        if "up to date" not in message:
            print(f"sdfast: {message}", file=sys.stderr)
