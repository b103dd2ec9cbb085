"""How options that say two things are read: SOURCE[=SCALE] and the like."""

import re
from pathlib import Path
from typing import Any

import click

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def lora(text: str) -> dict[str, Any]:
    """The source and the scale in SOURCE[=SCALE]."""
    source, separator, scale = text.rpartition("=")
    if not separator or not _NUMBER.fullmatch(scale):
        return {"source": text}
    if Path(text).exists():
        raise click.UsageError(f"--lora {text}: is there under this name; say {text}=1, or another scale")
    return {"source": source, "scale": float(scale)}


def scaled(text: str) -> tuple[str, float]:
    """The name and the scale in NAME[=SCALE]."""
    name, separator, scale = text.partition("=")
    if not separator:
        return name, 1.0
    if not _NUMBER.fullmatch(scale):
        raise click.UsageError(f"--lora {text}: {scale!r} is not a number; say {name}=0.8, or another scale")
    return name, float(scale)


def lora_on_request(text: str) -> dict[str, Any]:
    """The source and the name in SOURCE[=NAME]."""
    return {**_named(text, "--lora-on-request", "name"), "on_request": True}


def embedding(text: str) -> dict[str, Any]:
    """The source and the token in SOURCE[=TOKEN]."""
    return _named(text, "--embedding", "token")


def _named(text: str, option: str, field: str) -> dict[str, Any]:
    """The source, and in `field` what follows the last "="."""
    source, separator, name = text.rpartition("=")
    if not separator:
        return {"source": text}
    if Path(text).exists():
        raise click.UsageError(f"{option} {text}: is there under this name; say {text}={field.upper()}")
    return {"source": source, field: name}


def ip_adapter(text: str) -> dict[str, Any]:
    """The source and the file in SOURCE[=FILE]."""
    source, separator, file = text.rpartition("=")
    return (
        {"source": source, "weight_name": file} if separator and not Path(text).exists() else {"source": text}
    )
