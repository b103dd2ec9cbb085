"""The built-in checkpoint: a small Stable Diffusion of landscapes, and the code that drew and trained it."""

from pathlib import Path


def checkpoint_folder() -> Path:
    """The diffusers folder of the built-in checkpoint."""
    return Path(__file__).with_name("checkpoint")
