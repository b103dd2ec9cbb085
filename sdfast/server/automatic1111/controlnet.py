"""ControlNets and IP-Adapters as sd-webui-controlnet, an extension of AUTOMATIC1111, has them: its units, and
its routes.

A call has a unit for each ControlNet of the engine at most, and at least one where there are some: a
ControlNet without a unit adds nothing. A unit whose `model` names an IP-Adapter has its image and its weight;
there may be none. Where this differs from the extension:

- There are no detectors: what a unit sends is the control image itself, and `module` is "none". So what is
  said to detectors means nothing, and the control image is not given back among the pictures.
- An IP-Adapter's image counts in all steps. `module` is "none", or the extension's name for what sees it.
- A unit that does not say whether it is enabled is enabled, as it was in the extension before 2024.
- Where only the masked part of an image is drawn, that part is cut out of control images (unless
  `inpaint_crop_input_image` is false), but not out of an IP-Adapter's image, which is no map of the picture.
- "Resize and Fill" is taken for images of the picture's proportions, which leave nothing to fill.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from sdfast.request import ControlMode, ControlScale, check_text, shown
from sdfast.server.body import Neutral, check_neutral, checked
from sdfast.server.jobs import EngineInfo, Studio
from sdfast.server.problems import Problem

SCRIPT = "controlnet"  # whatever its case
API_VERSION = 3  # the extension's
_FIELD = "alwayson_scripts"
_NONE = (None, "", "None")
_ALIASES = {
    "input_image": "image",
    "mask_image": "mask",
    "lowvram": "low_vram",
    "guidance": "guidance_end",
    "guessmode": "guess_mode",
}
"""Older names of fields, or Forge's."""

_JUST_RESIZE, _CROP, FILL = 0, 1, 2
_RESIZE_MODES: Mapping[int | str, int] = {
    _JUST_RESIZE: _JUST_RESIZE,
    _CROP: _CROP,
    FILL: FILL,
    "Just Resize": _JUST_RESIZE,
    "Crop and Resize": _CROP,
    "Inner Fit (Scale to Fit)": _CROP,
    "Scale to Fit (Inner Fit)": _CROP,
    "Resize and Fill": FILL,
    "Outer Fit (Shrink to Fit)": FILL,
    "Envelope (Outer Fit)": FILL,
}
_MODES: Mapping[int | str, ControlMode] = {
    0: "balanced",
    1: "prompt",
    2: "control",
    "Balanced": "balanced",
    "My prompt is more important": "prompt",
    "ControlNet is more important": "control",
}
_NO_MASKS = "a control image counts as a whole; leave it out"
_ONE_IMAGE = "a unit has one control image; give image"
_CHANGED = "an image is taken as it is; change it before it is sent"
_NEUTRAL: Mapping[str, Neutral] = {
    "module": (
        ("none", "None", ""),
        "there are no detectors here; send the map that it would make, as image",
    ),
    "mask": (("",), _NO_MASKS),
    "effective_region_mask": (("",), _NO_MASKS),
    "ipadapter_input": ((), "an IP-Adapter's image is image; leave it out"),
    "union_control_type": (("Unknown",), "ControlNet unions are not supported; leave it out"),
    "input_mode": (("simple",), _ONE_IMAGE),
    "batch_images": (("", []), _ONE_IMAGE),
    "animatediff_batch": ((False,), _ONE_IMAGE),
    "loopback": ((False,), "pictures do not come back as control images; leave it out"),
    "use_preview_as_input": ((False,), _ONE_IMAGE),
    "generated_image": (("",), _ONE_IMAGE),
    "invert_image": ((False,), _CHANGED),
    "scribble_mode": ((False,), _CHANGED),
    "rgbbgr_mode": ((False,), "channels are in the order that the ControlNet reads; leave it out"),
}
"""Fields that mean nothing here."""


_SEES = ("", "none", "ip-adapter-auto", "CLIP-ViT-H (IPAdapter)", "CLIP-ViT-bigG (IPAdapter)")
_SEES_CLIP = "ip-adapter_clip_"
"""What the extension calls the image encoders of IP-Adapters; here each engine has its own."""


class Unit(BaseModel):
    """What a call asks of the ControlNet. Null is the same as nothing.

    What means something beside another field only has the right type, no more: processor_res, threshold_a,
    threshold_b, pixel_perfect and save_detected_map with a detector, hr_option with enable_hr,
    inpaint_crop_input_image with inpaint_full_res, pulid_mode with an IP-Adapter; low_vram, is_ui and
    output_dir change no picture.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    enabled: bool | None = None
    module: Any = None
    model: str | None = None
    weight: float | None = Field(default=None, ge=0, le=2)
    image: str | None = None
    mask: Any = None
    resize_mode: int | str | None = None
    guidance_start: float | None = Field(default=None, ge=0, le=1)
    guidance_end: float | None = Field(default=None, ge=0, le=1, validate_default=True)
    control_mode: int | str | None = None
    guess_mode: bool | None = None
    low_vram: bool | None = None
    processor_res: int | None = None
    threshold_a: float | None = None
    threshold_b: float | None = None
    pixel_perfect: bool | None = None
    hr_option: str | None = None
    save_detected_map: bool | None = None
    inpaint_crop_input_image: bool | None = None
    pulid_mode: str | None = None
    is_ui: bool | None = None
    output_dir: str | None = None
    effective_region_mask: Any = None
    advanced_weighting: list[ControlScale] | None = None
    ipadapter_input: Any = None
    union_control_type: Any = None
    input_mode: Any = None
    batch_images: Any = None
    animatediff_batch: Any = None
    loopback: Any = None
    use_preview_as_input: Any = None
    generated_image: Any = None
    invert_image: Any = None
    scribble_mode: Any = None
    rgbbgr_mode: Any = None

    @field_validator(*_NEUTRAL)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        check_neutral(value, _NEUTRAL[str(info.field_name)], repr)
        return value

    @field_validator("model")
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        check_text(value or "")
        return value

    @field_validator("resize_mode")
    @classmethod
    def _resized(cls, mode: int | str | None) -> int | str | None:
        if mode is not None and mode not in _RESIZE_MODES:
            raise ValueError("must be 0 (just resize) or 1 (crop and resize)")
        return mode

    @field_validator("control_mode")
    @classmethod
    def _known_mode(cls, mode: int | str | None) -> int | str | None:
        if mode is not None and mode not in _MODES:
            raise ValueError("must be one of: " + ", ".join(one for one in _MODES if isinstance(one, str)))
        return mode

    @field_validator("guidance_end")
    @classmethod
    def _after_the_start(cls, end: float | None, info: ValidationInfo) -> float | None:
        start = info.data.get("guidance_start") or 0.0
        if start >= (1.0 if end is None else end):
            raise ValueError(f"must be above guidance_start, which is {start:g}")
        return end

    @property
    def mode(self) -> ControlMode:
        """By the unit's mode; the older guess_mode is the last of them."""
        usual: ControlMode = "control" if self.guess_mode else "balanced"
        return usual if self.control_mode is None else _MODES[self.control_mode]

    @property
    def by_layer(self) -> tuple[float, ...] | None:
        """The weights of layers, in whose place there is no other weight."""
        return tuple(self.advanced_weighting) if self.advanced_weighting else None

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The scale, and between which shares of the steps."""
        return (
            1.0 if self.weight is None or self.by_layer else self.weight,
            0.0 if self.guidance_start is None else self.guidance_start,
            1.0 if self.guidance_end is None else self.guidance_end,
        )

    @property
    def crop(self) -> bool:
        """Whether an image of other proportions loses its edges, as it does where nothing is said."""
        return self.resize_mode is None or _RESIZE_MODES[self.resize_mode] == _CROP

    @property
    def crops(self) -> bool:
        """Whether of an image the part is cut out that is drawn, where only the masked part is."""
        return self.inpaint_crop_input_image is not False

    @property
    def fill(self) -> bool:
        """Whether an image of other proportions is to get edges, which is not supported."""
        return self.resize_mode is not None and _RESIZE_MODES[self.resize_mode] == FILL


_FIELDS = (
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    "control_mode",
)


def fields_of(units: Sequence[Unit | None]) -> dict[str, Any]:
    """Those of a `sdfast.request.Request`, for units in the order of their ControlNets: None adds nothing."""
    if not units:
        return {}
    told = [(0.0, 0.0, 1.0, "balanced") if unit is None else (*unit.numbers, unit.mode) for unit in units]
    each = zip(_FIELDS, zip(*told, strict=True), strict=True)
    fields = {name: values if len(units) > 1 else values[0] for name, values in each}
    by_layer = tuple(unit and unit.by_layer for unit in units)
    return fields | ({"control_layer_scales": by_layer} if any(by_layer) else {})


def units_of(
    scripts: Mapping[str, Any] | None, engine: EngineInfo, *, over_image: bool
) -> tuple[Unit | None, ...]:
    """For each of the engine's ControlNets its unit in a call's `alwayson_scripts`; None for one without.

    over_image: whether the call has an image to draw over, which is a unit's that has none of its own. Raises
    `Problem` for units that are missing, and for those that the engine cannot take.
    """
    enabled = [unit for unit in _enabled(scripts) if not _adapts(unit, engine)]
    if not enabled:
        if engine.controlled:
            raise refused(
                f"{engine.name} has a ControlNet, which draws every picture under the guidance of a control "
                "image; send an enabled unit with an image"
            )
        return ()
    if not engine.controlled and engine.ip_adapters:
        named = shown(enabled[0].get("model"))
        raise refused(f"model: {engine.name} has {', '.join(engine.ip_adapters)}, and no other (got {named})")
    if not engine.controlled:
        raise refused(f"{engine.name} has no ControlNet; send no unit, or take a checkpoint that has one")
    if len(enabled) > len(engine.controlnets):
        there = len(engine.controlnets)
        raise refused(
            f"{len(enabled)} units are enabled; {engine.name} has {there} ControlNet{'s' * (there > 1)}"
        )
    found: list[Unit | None] = [None] * len(engine.controlnets)
    for given in enabled:
        unit = _checked(given, over_image=over_image)
        found[_place(unit.model, engine, [taken is not None for taken in found])] = unit
    return tuple(found)


def adapter_units_of(scripts: Mapping[str, Any] | None, engine: EngineInfo) -> tuple[Unit | None, ...]:
    """For each of the engine's IP-Adapters its unit likewise; none where no unit is for one.

    Raises `Problem`.
    """
    found: list[Unit | None] = [None] * len(engine.ip_adapters)
    for given in _enabled(scripts):
        if not _adapts(given, engine):
            continue
        module = given.get("module")
        if not (module in (None, "None", *_SEES) or str(module).startswith(_SEES_CLIP)):
            raise refused(f"module: an IP-Adapter sees the image itself; take none (got {shown(module)})")
        unit = _checked({**given, "module": None}, over_image=False)
        if unit.numbers[1:] != (0.0, 1.0):
            raise refused("guidance_start: an IP-Adapter's image counts in all steps; leave the two out")
        if unit.mode != "balanced" or unit.by_layer:
            raise refused("control_mode: an IP-Adapter has one weight for all layers; leave it out")
        place = next(i for i, name in enumerate(engine.ip_adapters) if unit.model in (name, _bare(name)))
        if found[place] is not None:
            raise refused(f"model: {shown(unit.model)} has several units; an IP-Adapter has one image")
        found[place] = unit
    return tuple(found) if any(found) else ()


def adapter_fields_of(units: Sequence[Unit | None]) -> dict[str, float | tuple[float, ...]]:
    """Those of a `sdfast.request.Request`, for units in the order of their IP-Adapters."""
    scales = tuple(0.0 if unit is None else unit.numbers[0] for unit in units)
    return {"ip_adapter_scale": scales if len(scales) > 1 else scales[0]} if scales else {}


def _enabled(scripts: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [unit for unit in _units(scripts or {}) if unit.get("enabled") is not False]


def _adapts(unit: Mapping[str, Any], engine: EngineInfo) -> bool:
    """Whether a unit's model is one of the engine's IP-Adapters."""
    return any(unit.get("model") in (name, _bare(name)) for name in engine.ip_adapters)


def _checked(given: Mapping[str, Any], *, over_image: bool) -> Unit:
    try:
        unit = checked(_renamed(given), Unit)
    except Problem as problem:
        raise refused(problem.message) from None
    if not unit.image and not over_image:
        raise refused("image: is missing; send the control image, as base64")
    return unit


def _place(model: str | None, engine: EngineInfo, taken: Sequence[bool]) -> int:
    """The first of the engine's ControlNets that a unit's `model` names and no other unit has."""
    names = engine.controlnets
    if model in _NONE and len(names) > 1:
        raise refused(f"model: is missing; {engine.name} has {', '.join(names)}")
    named = [i for i, name in enumerate(names) if model in (*_NONE, name, _bare(name))]
    if not named:
        raise refused(f"model: {engine.name} has {', '.join(names)}, and no other (got {shown(model)})")
    free = [i for i in named if not taken[i]]
    if not free:
        raise refused(f"model: {shown(model)} has several units; a ControlNet has one control image")
    return free[0]


def refused(message: str) -> Problem:
    """What is wrong with a unit."""
    return Problem(422, f"{_FIELD}: ControlNet: {message}", param=_FIELD)


def add(router: APIRouter, studio: Studio) -> None:
    """The extension's routes, and AUTOMATIC1111's list of scripts, where clients look whether it is there."""

    def there() -> list[str]:
        """Each ControlNet and IP-Adapter once, as `Unit.model` names it."""
        engines = studio.engines.values()
        every = [name for engine in engines for name in (*engine.controlnets, *engine.ip_adapters)]
        return list(dict.fromkeys(every))

    @router.get("/controlnet/version", include_in_schema=False)
    async def version() -> dict[str, Any]:
        return {"version": API_VERSION}

    @router.get("/controlnet/model_list")
    async def model_list(update: bool = True) -> dict[str, Any]:
        """The engines' ControlNets and IP-Adapters. `update` finds nothing new."""
        return {"model_list": there()}

    @router.get("/controlnet/module_list", include_in_schema=False)
    async def module_list(alias_names: bool = False) -> dict[str, Any]:
        return {"module_list": ["none"], "module_detail": {"none": {"model_free": False, "sliders": []}}}

    @router.get("/controlnet/settings", include_in_schema=False)
    async def unit_count() -> dict[str, Any]:
        engines = studio.engines.values()
        most = max((len(engine.controlnets) + len(engine.ip_adapters) for engine in engines), default=0)
        return {"control_net_unit_count": max(1, most)}

    @router.post("/controlnet/detect", include_in_schema=False)
    async def detect() -> None:
        raise Problem(501, f"detect is not supported: {_NEUTRAL['module'][1]}", code="not_supported")

    @router.get("/sdapi/v1/scripts", include_in_schema=False)
    async def scripts() -> dict[str, Any]:
        names = [SCRIPT] if there() else []
        return {"txt2img": names, "img2img": names}


def _units(scripts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is in the script's args. Raises `Problem` for what is no unit."""
    units: list[dict[str, Any]] = []
    for name, script in scripts.items():
        if name.lower() != SCRIPT:
            continue
        args = script.get("args") or [] if isinstance(script, dict) else None
        if not isinstance(args, list) or not all(unit is None or isinstance(unit, dict) for unit in args):
            raise refused(f"must have args, a list of units, which are objects (got {shown(script)})")
        units += [unit for unit in args if unit is not None]
    return units


def _bare(name: str) -> str:
    """A ControlNet's name without its digest."""
    return name.rpartition(" [")[0]


def _renamed(unit: Mapping[str, Any]) -> dict[str, Any]:
    """With the names that fields have now, and the mask of an image that is an object of both beside it.

    Raises `Problem`.
    """
    named: dict[str, Any] = {}
    for name, value in unit.items():
        _put(named, _ALIASES.get(name, name), value, name)
    both = named.get("image")
    if isinstance(both, dict):
        if not both.keys() <= {"image", "mask"}:
            raise refused(f"image: must be base64, or have an image and a mask (got {shown(list(both))})")
        del named["image"]
        for name, value in both.items():
            _put(named, name, value, f"image.{name}")
    return named


def _put(named: dict[str, Any], name: str, value: Any, said: str) -> None:
    """The value of a field, once, by whatever name it is said."""
    if named.get(name) in (None, ""):
        named[name] = value
    elif value not in (None, "", named[name]):
        raise refused(f"{said}: is {name} by another name, which is given too; give one of them")
