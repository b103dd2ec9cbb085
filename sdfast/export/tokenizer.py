"""A checkpoint's tokenizer, rewritten as the two files that `sdfast.tokenizer` runs on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdfast.errors import CheckpointError, DependencyError
from sdfast.export.files import reason
from sdfast.tokenizer import EMBEDDINGS, SETTINGS_FILE, VOCABULARY_FILE

_LONGEST = 1024
"""No CLIP text encoder reads more; a tokenizer whose config states no length claims 10^30."""


def read_tokenizer(source: Path) -> Any:
    """transformers' own tokenizer of a diffusers checkpoint (`source`, its `tokenizer/` folder).

    Raises CheckpointError when its files cannot be read, are not CLIP's, or state no length.
    """
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise DependencyError(
            'transformers is needed to export a tokenizer: pip install "sdfast[export]"'
        ) from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # transformers and tokenizers raise bare Exception for files they cannot parse
        raise CheckpointError(
            f"{source} is not a CLIP tokenizer ({reason(error)}); download it again"
        ) from error
    if not 2 < tokenizer.model_max_length <= _LONGEST:
        raise CheckpointError(
            f"{source / 'tokenizer_config.json'} must state a model_max_length up to {_LONGEST}; "
            "for Stable Diffusion add 77"
        )
    return tokenizer


def names_of_vectors(token: str, count: int) -> list[str]:
    """What diffusers calls the vectors of an embedding in a tokenizer: by its token, and that numbered."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def save_runtime_tokenizer(source: Path, target: Path, embeddings: Mapping[str, int] | None = None) -> None:
    """Write the tokenizer of a diffusers checkpoint (`source`, its `tokenizer/` folder) into `target`.

    transformers reads the checkpoint's files, whatever their age and form, so that what runs later is what
    stock diffusers runs. embeddings: by their tokens, how many vectors they are of; in this order these have
    the ids behind the tokenizer's own.

    Raises CheckpointError when the files cannot be read or are not CLIP's.
    """
    tokenizer, embeddings = read_tokenizer(source), dict(embeddings or {})
    settings = {
        "model_max_length": tokenizer.model_max_length,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    if embeddings:
        settings[EMBEDDINGS] = embeddings
    for token, count in embeddings.items():
        tokenizer.add_tokens(names_of_vectors(token, count))
    target.mkdir(parents=True, exist_ok=True)
    (target / VOCABULARY_FILE).write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    (target / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
