"""LoRAs that requests choose: which an engine has, and how much of each its networks are told to add.

The U-Net is told in the last columns of the time shifts, what runs outside of the loop by an input: see
`sdfast.models.lora`.
"""

from dataclasses import dataclass

from sdfast.errors import RequestError
from sdfast.manifest import Model
from sdfast.request import Request


@dataclass(frozen=True)
class LoraScales:
    """How much of each of an engine's LoRAs is added, in their order: in the text encoders, and in the
    U-Net."""

    text_encoder: tuple[float, ...] = ()
    unet: tuple[float, ...] = ()

    @classmethod
    def none(cls, model: Model) -> "LoraScales":
        """Nothing of any."""
        nothing = (0.0,) * len(model.loras)
        return cls(nothing, nothing)

    @classmethod
    def of(cls, model: Model, request: Request) -> "LoraScales":
        """What a request asks for. Raises `RequestError` for a LoRA that the engine does not have."""
        check_loras(model, request)
        asked = [request.lora_scales(name) for name in model.loras]
        return cls(tuple(text for text, _ in asked), tuple(unet for _, unet in asked))


def check_loras(model: Model, request: Request) -> None:
    """Raises `RequestError` for a LoRA that the engine does not have."""
    for name in request.loras:
        if name not in model.loras:
            there = ", ".join(model.loras)
            advice = (
                f"it has: {there}"
                if there
                else "it has none; export one with `sdfast export SOURCE -o DIR --lora-on-request LORA`"
            )
            raise RequestError(
                f"loras: this engine has no LoRA {name!r:.100} for requests to choose; {advice}"
            )
