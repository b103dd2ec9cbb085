"""A checkpoint's tokenizer, rewritten as the two files that `sdfast.tokenizer` runs on."""

import json
from pathlib import Path

from sdfast.errors import CheckpointError, DependencyError
from sdfast.export.files import reason
from sdfast.tokenizer import SETTINGS_FILE, VOCABULARY_FILE

_LONGEST = 1024
"""No CLIP text encoder reads more; a tokenizer whose config states no length claims 10^30."""


def save_runtime_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of a diffusers checkpoint (`source`, its `tokenizer/` folder) into `target`.

    transformers reads the checkpoint's files, whatever their age and form, so that what runs later is what
    stock diffusers runs. Raises CheckpointError when they cannot be read or are not CLIP's.
    """
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise DependencyError(
            'transformers is needed to export a tokenizer: pip install "sdfast[export]"'
        ) from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        vocabulary = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # transformers and tokenizers raise bare Exception for files they cannot parse
        raise CheckpointError(
            f"{source} is not a CLIP tokenizer ({reason(error)}); download it again"
        ) from error
    settings = {
        "model_max_length": tokenizer.model_max_length,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    if not 2 < settings["model_max_length"] <= _LONGEST:
        raise CheckpointError(
            f"{source / 'tokenizer_config.json'} must state a model_max_length up to {_LONGEST}; "
            "for Stable Diffusion add 77"
        )
    target.mkdir(parents=True, exist_ok=True)
    (target / VOCABULARY_FILE).write_text(vocabulary, "utf-8")
    (target / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
