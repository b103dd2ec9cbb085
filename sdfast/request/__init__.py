"""One generation request: the only place where what a caller asks for is checked.

`fields.py` what its fields may be, `request.py` the fields, `consistency.py` what they must be beside each
other, `checked.py` how all of this is checked, and how what is wrong is told.
"""

from sdfast.request.checked import MAX_PROMPT, check_text, shown, unknown, wrong_field
from sdfast.request.fields import (
    DEFAULT_IMAGE_GUIDANCE,
    MAX_CONTROL,
    MAX_GUIDANCE,
    MAX_IMAGE_SCALE,
    MAX_IMAGES,
    MAX_IP_ADAPTERS,
    MAX_LORA,
    MAX_SIDE,
    MAX_STEPS,
    SCORES,
    SEED_LIMIT,
    TOLD_SIZES,
    UPSCALERS,
    AdapterScale,
    ControlMode,
    ControlScale,
    MaskedContent,
    Upscaler,
    each,
)
from sdfast.request.request import Crop, Hires, Request

__all__ = [
    "DEFAULT_IMAGE_GUIDANCE",
    "MAX_CONTROL",
    "MAX_GUIDANCE",
    "MAX_IMAGES",
    "MAX_IMAGE_SCALE",
    "MAX_IP_ADAPTERS",
    "MAX_LORA",
    "MAX_PROMPT",
    "MAX_SIDE",
    "MAX_STEPS",
    "SCORES",
    "SEED_LIMIT",
    "TOLD_SIZES",
    "UPSCALERS",
    "AdapterScale",
    "ControlMode",
    "ControlScale",
    "Crop",
    "Hires",
    "MaskedContent",
    "Request",
    "Upscaler",
    "check_text",
    "each",
    "shown",
    "unknown",
    "wrong_field",
]
