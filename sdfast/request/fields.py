"""The limits of a request's fields, and the types of those that are more than a number or a text."""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import Field

MAX_STEPS = 1_000
MAX_IMAGES = 128  # of one request
MAX_SIDE = 8_192  # pixels
MAX_TOLD = 65_536  # pixels of a size that is only told
MAX_GUIDANCE = 100.0
DEFAULT_IMAGE_GUIDANCE = 1.5  # as in diffusers
MAX_CONTROL = 10.0
MAX_IP_ADAPTERS = 8
MAX_IMAGE_SCALE = 10.0
MAX_SCORE = 100.0
MAX_LORA = 100.0
SEED_LIMIT = 2**64
T = TypeVar("T")

TOLD_SIZES = (
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
)
"""Fields of what SDXL is told of a picture's size."""
SCORES = ("aesthetic_score", "negative_aesthetic_score")
"""Fields of what its refiner is told in place of the target sizes."""
SeedSize = tuple[
    Annotated[int, Field(ge=8, le=MAX_SIDE, multiple_of=8)],
    Annotated[int, Field(ge=8, le=MAX_SIDE, multiple_of=8)],
]
"""Height and width in pixels of another picture of the same seed."""
ToldSize = tuple[Annotated[int, Field(ge=0, le=MAX_TOLD)], Annotated[int, Field(ge=0, le=MAX_TOLD)]]

LoraScale = Annotated[float, Field(ge=-MAX_LORA, le=MAX_LORA)]
Loras = dict[str, LoraScale | tuple[LoraScale, LoraScale]]
"""By their names, how much of LoRAs is added; or how much in the text encoders, and how much in the U-Net."""
ControlScale = Annotated[float, Field(ge=0.0, le=MAX_CONTROL)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
ControlScales = ControlScale | Annotated[tuple[ControlScale, ...], Field(min_length=1)]
"""Of all ControlNets, or of each."""
Shares = Share | Annotated[tuple[Share, ...], Field(min_length=1)]
"""The same of the steps."""
ControlMode = Literal["balanced", "prompt", "control", "guess"]
"""How what a ControlNet adds is dealt out to its layers, and to the prompt and the negative prompt."""
ControlModes = ControlMode | Annotated[tuple[ControlMode, ...], Field(min_length=1)]
LayerScales = Annotated[tuple[ControlScale, ...], Field(min_length=1)]
"""Of what a ControlNet adds to each skip in turn, and in the middle."""

ImageScale = Annotated[float, Field(ge=0.0, le=MAX_IMAGE_SCALE)]
ImageScales = ImageScale | Annotated[tuple[ImageScale, ...], Field(min_length=1)]
AdapterScale = ImageScale | dict[Literal["down", "mid", "up"], ImageScales | dict[str, ImageScales]]
"""How much of an IP-Adapter's image each cross-attention layer of the U-Net is told: a number for all, or
numbers by their places, as diffusers' `set_ip_adapter_scale` has them."""

MaskedContent = Literal["original", "fill", "latent_noise", "latent_nothing"]
"""What a run begins with where a mask leaves an image open."""

Upscaler = Literal[
    "latent",
    "latent_antialiased",
    "latent_bicubic",
    "latent_bicubic_antialiased",
    "latent_nearest",
    "latent_nearest_exact",
    "lanczos",
    "nearest",
]
"""What enlarges the latents of a picture, or the picture itself."""
UPSCALERS: Mapping[str, Upscaler] = {
    "Latent": "latent",
    "Latent (antialiased)": "latent_antialiased",
    "Latent (bicubic)": "latent_bicubic",
    "Latent (bicubic antialiased)": "latent_bicubic_antialiased",
    "Latent (nearest)": "latent_nearest",
    "Latent (nearest-exact)": "latent_nearest_exact",
    "Lanczos": "lanczos",
    "Nearest": "nearest",
}
"""The same by AUTOMATIC1111's names."""


def each(given: T | tuple[T, ...], count: int = 1) -> tuple[T, ...]:
    """What is given for several: one, which is no tuple, stands for all of `count`."""
    several = given if isinstance(given, tuple) else (given,)
    return several * count if len(several) == 1 else several
