"""What `/openapi.json` says of these routes beyond the types of their fields."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from sdfast.request import (
    DEFAULT_IMAGE_GUIDANCE,
    MAX_CONTROL,
    MAX_GUIDANCE,
    MAX_IMAGE_SCALE,
    MAX_PROMPT,
    MAX_SIDE,
    MAX_STEPS,
    SEED_LIMIT,
)
from sdfast.server.openai.fields import (
    CONTROL_IMAGE,
    CONTROL_SCALE,
    GUIDANCE,
    IMAGE_SCALE,
    IP_ADAPTER_IMAGE,
    MASKED_STRENGTH,
    NEUTRAL,
    SCHEDULER,
    STEPS,
    STRENGTH,
    Edit,
    Generation,
)

_EVENTS = (
    "Server-sent events, when stream is true: {kind}.progress (when progress is true: position, the jobs "
    "before this one while it waits; step, of steps), {kind}.partial_image, {kind}.completed for each "
    "picture, then [DONE]; error when the job fails. Comment lines keep a stream alive that waits."
)

_EACH = "With several ControlNets also a list of one for each, in the order of /v1/models."


def _each(low: float, high: float) -> dict[str, Any]:
    """A number for all ControlNets, or one for each."""
    number = {"type": "number", "minimum": low, "maximum": high}
    return {"anyOf": [number, {"type": "array", "items": number, "minItems": 1}, {"type": "null"}]}


_SAID: Mapping[str, dict[str, Any]] = {
    "prompt": {"description": "What to draw.", "maxLength": MAX_PROMPT},
    "negative_prompt": {"description": "What not to draw.", "maxLength": MAX_PROMPT},
    "model": {"description": "The engine, one of /v1/models; needed where there are several."},
    "n": {"description": "How many pictures; picture i has the seed `seed` + i.", "default": 1},
    "size": {"pattern": "^(auto|[0-9]{1,5}x[0-9]{1,5})$"},
    "output_compression": {"description": "The quality of webp and jpeg, 100 the best.", "default": 100},
    "output_format": {"default": "png"},
    "stream": {"description": "Answer with server-sent events."},
    "partial_images": {"description": "Of a stream: pictures of the estimate on the way."},
    "progress": {"description": "Of a stream: tell the place in the queue and the steps."},
    "seed": {
        "description": "Picked at random when left out, and told.",
        "minimum": 0,
        "maximum": SEED_LIMIT - 1,
    },
    "variation_seed": {
        "description": "With a variation_strength: the seed of the noise that picture i is varied towards, + "
        "i; picked at random when left out, and told.",
        "minimum": 0,
        "maximum": SEED_LIMIT - 1,
    },
    "variation_strength": {
        "description": "How far the first noise is turned from the seed's to the variation seed's. All n "
        "pictures then have the same seed.",
        "default": 0,
        "minimum": 0,
        "maximum": 1,
    },
    "seed_resize_from": {
        "description": "WIDTHxHEIGHT in pixels of a picture of the seed that this one is to be like.",
        "pattern": "^[0-9]{1,5}x[0-9]{1,5}$",
    },
    "num_inference_steps": {"default": STEPS, "minimum": 1, "maximum": MAX_STEPS},
    "guidance_scale": {"default": GUIDANCE, "minimum": 0, "maximum": MAX_GUIDANCE},
    "guidance_rescale": {"minimum": 0, "maximum": 1},
    "guidance_start": {
        "description": "The share of the steps before guidance begins.",
        "minimum": 0,
        "maximum": 1,
    },
    "guidance_end": {
        "description": "The share at which it ends; steps without cost half.",
        "minimum": 0,
        "maximum": 1,
    },
    "cache_interval": {
        "description": "One evaluation of the U-Net in so many is a whole one, the others are shallow, on "
        "engines that were exported with a cache branch.",
        "default": 1,
        "minimum": 1,
        "maximum": MAX_STEPS,
    },
    "pag_scale": {
        "description": "Perturbed-attention guidance, such as 3, on engines that were exported with layers "
        "for it (pag in /v1/models): one evaluation more a step.",
        "default": 0,
        "minimum": 0,
        "maximum": MAX_GUIDANCE,
    },
    "pag_adaptive_scale": {
        "description": "How much less of it there is for each timestep below 1000.",
        "default": 0,
        "minimum": 0,
        "maximum": MAX_GUIDANCE,
    },
    "eta": {"minimum": 0, "maximum": 1},
    "clip_skip": {"minimum": 0, "maximum": 64},
    "long_prompts": {
        "description": "Of prompts longer than 75 tokens: read that much alone, or all of it in chunks.",
        "default": "truncate",
    },
    "emphasis": {
        "description": "(words) and (words:1.3) count more and [words] less, as AUTOMATIC1111's option of "
        "that name says; brackets are text when left out."
    },
    "prompt_editing": {
        "description": "[from:to:when] and [this|that] change the prompt between steps, as with "
        "AUTOMATIC1111; brackets are not read so when left out."
    },
    "control_image": {
        "description": "Of an engine with a ControlNet, which needs one: a PNG, JPEG or WebP file as "
        "base64, or a data: URL; resampled to the picture's size. With several ControlNets a list of one for "
        "each, in the order of /v1/models, and null for one that is to add nothing."
    },
    "controlnet_conditioning_scale": {
        "description": f"How much the ControlNet adds; {CONTROL_SCALE:g} when left out. {_EACH}",
        **_each(0, MAX_CONTROL),
    },
    "control_guidance_start": {
        "description": f"The share of the steps before the ControlNet adds something. {_EACH}",
        **_each(0, 1),
    },
    "control_guidance_end": {"description": f"The share at which it ends. {_EACH}", **_each(0, 1)},
    "control_mode": {
        "description": "balanced; prompt, which adds less in the outer layers; control, which does too, and "
        "nothing for the negative prompt; or guess, diffusers' guess_mode. When left out as diffusers does "
        f"it. {_EACH}"
    },
    "loras": {
        "description": "Of the LoRAs that the engine has for requests (loras in /v1/models) how much is "
        'added, by their names: {"oil": 0.8}; or two numbers, how much in the text encoders and how much in '
        "the U-Net. In a form, as JSON."
    },
    "ip_adapter_image": {
        "description": "Of an engine with an IP-Adapter: a PNG, JPEG or WebP file as base64, or a data: URL, "
        "that the picture is to be like. With several IP-Adapters a list of one for each, in the order of "
        "/v1/models, and null for one that is to add nothing."
    },
    "ip_adapter_scale": {
        "description": f"How much it counts, from 0 to {MAX_IMAGE_SCALE:g}; {IMAGE_SCALE:g} when left out. A "
        "number, or numbers by layers as diffusers has them, or with several IP-Adapters a list of one for "
        "each."
    },
    "scheduler": {"description": "As `sdfast schedulers` lists them.", "default": SCHEDULER},
    "strength": {
        "description": "How much of the image is drawn over, 1 all of it; "
        f"{STRENGTH} when left out, {MASKED_STRENGTH} with a mask."
    },
    "image_guidance_scale": {
        "description": "Of an engine that edits images as the prompt says (InstructPix2Pix), in the place of "
        f"strength: how much the image guides; {DEFAULT_IMAGE_GUIDANCE:g} when left out.",
        "minimum": 1,
        "maximum": MAX_GUIDANCE,
    },
    "padding_mask_crop": {
        "description": "Of an image with a mask: only what is drawn anew, and so many pixels around it, is "
        "drawn, at `size`, and pasted into the image; the pictures have the image's size.",
        "minimum": 0,
        "maximum": MAX_SIDE,
    },
    "user": {"description": "Checked and forgotten."},
    "safety_identifier": {"description": "Checked and forgotten."},
}
_SIZE = {
    Generation: "WIDTHxHEIGHT in pixels; the engine's own when left out.",
    Edit: "WIDTHxHEIGHT in pixels, to which the image is resampled; its own size when left out. With "
    "padding_mask_crop that at which the part is drawn; the engine's own when left out.",
}
_FILES = {
    "image": "One PNG, JPEG or WebP; image[] is taken too. Transparency is white here; it is no mask.",
    "mask": "A picture of the image's size: what is transparent there is drawn anew, the rest stays.",
    IP_ADAPTER_IMAGE: "Of an engine with an IP-Adapter: a PNG, JPEG or WebP that the picture is to be like; "
    "with several IP-Adapters sent once for each, in the order of /v1/models, and empty for one that is "
    "to add nothing.",
    CONTROL_IMAGE: "Of an engine with a ControlNet, which needs one: a PNG, JPEG or WebP; resampled to the "
    "picture's size. With several ControlNets it is sent once for each, in the order of /v1/models; an empty "
    "file is for one that is to add nothing.",
}


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Picture(_Shape):
    """b64_json: the file, as base64. seed: makes this picture again, of a variation with variation_seed."""

    b64_json: str
    seed: int
    variation_seed: int | None = None
    warnings: list[str]


class TokenDetails(_Shape):
    image_tokens: int
    text_tokens: int


class Usage(_Shape):
    """Tokens of the prompts that were read, the negative one's too. Pictures are not made of tokens: 0."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class Pictures(_Shape):
    """created: seconds since 1970."""

    created: int
    data: list[Picture]
    background: str
    output_format: str
    quality: str
    size: str
    usage: Usage


class Model(_Shape):
    id: str
    object: str
    created: int
    owned_by: str
    sizes: list[str]
    default_size: str
    edits: bool
    controlled: bool
    controlnets: list[str]
    loras: list[str]
    ip_adapters: list[str]
    step_cache: bool
    pag: bool
    refines: bool
    instructed: bool


class Models(_Shape):
    object: str
    data: list[Model]


def body(model: type[Generation]) -> dict[str, Any]:
    """The `requestBody` of a route that takes `model`: JSON, or of edits a form."""
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        field.update(_said(name, model))
    if model is Generation:
        return {"content": {"application/json": {"schema": schema}}, "required": True}
    for field in schema["properties"].values():
        _take_null_out(field)
    for name, told in _FILES.items():
        schema["properties"][name] = {"type": "string", "format": "binary", "description": told}
    schema["required"] = ["image", *schema["required"]]
    return {"content": {"multipart/form-data": {"schema": schema}}, "required": True}


def answers(kind: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route whose events are `kind`'s."""
    event = {
        "type": "object",
        "description": _EVENTS.format(kind=kind),
        "properties": {
            "event": {"type": "string", "description": "The event's type; none with [DONE]."},
            "data": {"type": "string", "description": "JSON, or [DONE]."},
        },
        "required": ["data"],
        "additionalProperties": False,
    }
    stream = {"text/event-stream": {"schema": event}}
    return {200: {"model": Pictures, "content": stream, "description": "The pictures."}}


def _said(name: str, model: type[Generation]) -> dict[str, Any]:
    said = dict(_SAID.get(name, {}))
    if name == "size":
        said["description"] = _SIZE[model]
    if name in NEUTRAL:
        allowed, advice = NEUTRAL[name]
        said |= {"enum": [*allowed, None], "description": f"Asks for nothing here: {advice}."}
    return said


def _in_form(kind: dict[str, Any]) -> dict[str, Any]:
    """A field's type in a form, which has texts alone: a list and an object are written as in JSON."""
    written = {"array": r"^\[.*\]$", "object": r"^\{.*\}$"}.get(kind.get("type", ""))
    return kind if written is None else {"type": "string", "pattern": written}


def _take_null_out(field: dict[str, Any]) -> None:
    """A form has no null."""
    kinds = [_in_form(kind) for kind in field.pop("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) > 1:
        field["anyOf"] = kinds
    elif kinds:
        field.update(kinds[0])
    if field.get("default", "") is None:
        del field["default"]
    if "enum" in field:
        field["enum"] = [value for value in field["enum"] if value is not None]
