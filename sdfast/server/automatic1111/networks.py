"""`<lora:name:0.8>` in prompts, as AUTOMATIC1111 reads it.

It takes them out of positive prompts, where they stand for nothing else; in negative prompts they are text
like any other. `<lora:name>` is a scale of 1, `<lora:name:0.8>` one for all networks, `<lora:name:1:0.8>` one
for the text encoders and one for the U-Net, which may be named too: `<lora:name:te=1:unet=0.8>`.
"""

import math
import re
from collections.abc import Mapping

from sdfast.request import MAX_LORA
from sdfast.server.jobs import EngineInfo
from sdfast.server.problems import Problem

_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^>]+)>", re.IGNORECASE)
_PARTS = ("te", "unet")
Scales = tuple[float, float]
"""Of the text encoders, and of the U-Net."""


def parse(prompt: str) -> tuple[str, dict[str, Scales]]:
    """A prompt without its networks, and the scales of each by its name; of one that is there twice the sums.

    Raises `ValueError` for what is none that can be understood.
    """
    found: dict[str, Scales] = {}
    for match in _NETWORK.finditer(prompt):
        name, scales = _scales(match)
        before = found.get(name, (0.0, 0.0))
        found[name] = (before[0] + scales[0], before[1] + scales[1])
    return _NETWORK.sub("", prompt), found


def check_known(found: Mapping[str, Scales], engine: EngineInfo, field: str) -> None:
    """Raises `Problem` for a LoRA that the engine does not have for requests."""
    for name in found:
        if name not in engine.loras:
            there = ", ".join(engine.loras) or "none, for they are exported with `--lora-on-request`"
            told = f"{field}: <lora:{name:.60}> is not one of {engine.name}'s LoRAs; there are: {there}"
            raise Problem(422, told, param=field)


def _scales(match: re.Match[str]) -> tuple[str, Scales]:
    kind, (name, *given) = match[1].lower(), match[2].split(":")
    if kind == "hypernet":
        raise ValueError(f"{match[0]:.60} is not supported: there are no hypernetworks here; leave it out")
    numbers: dict[str, float] = {}
    for place, item in enumerate(given):
        part, separator, number = item.partition("=")
        where, text = (part, number) if separator else (_PARTS[place] if place < len(_PARTS) else "", item)
        if where not in _PARTS:
            raise ValueError(f"{match[0]:.60} is not understood: it has a name and up to two scales")
        numbers[where] = _number(text, match[0])
    text_encoder = numbers.get("te", 1.0)
    return name, (text_encoder, numbers.get("unet", text_encoder))


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= MAX_LORA:
        raise ValueError(
            f"{whole:.60}: {text!r:.20} is not a scale, a number from -{MAX_LORA:g} to {MAX_LORA:g}"
        )
    return number
