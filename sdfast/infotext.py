"""The text inside a picture that says how it was made, in the form that AUTOMATIC1111 made common.

    a cabin in misty mountains
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x512

The prompts stand as they are, over as many lines as they have; the last line holds the settings. A value with
a comma, a colon or a line break in it is quoted as JSON quotes it. One thing the form cannot say: a prompt
with a line that starts with "Negative prompt:" reads back as if its negative prompt began there.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sdfast import __version__
from sdfast.editing import changes
from sdfast.errors import RequestError
from sdfast.manifest import UsedVAE
from sdfast.request import TOLD_SIZES, UPSCALERS, AdapterScale, Hires, Request, each
from sdfast.schedulers import Schedule, resolve

PNG_KEY = "parameters"
COMPRESS_LEVEL = 4
"""zlib's: half the time of its usual 6, for files of some per cent more."""

_NEGATIVE = "Negative prompt:"
_KEY = r"\w[\w \-/]+"
_SETTING = re.compile(rf'\s*({_KEY}):\s*("(?:\\.|[^\\"])*"|[^,]*)\s*(?:,|$)')
_USUAL = {
    "denoising_start": None,
    "denoising_end": None,
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "pag_scale": 0.0,
    "pag_adaptive_scale": 0.0,
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
}
"""Fields of requests that are told where they are not as usual."""
_FEWEST_SETTINGS = 3
"""So many there must be before a line that does not start with Steps is taken for settings, not prompt."""

_NAMES = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "schedule_type",
    "CFG scale": "cfg_scale",
    "Seed": "seed",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
    "Model hash": "model_hash",
    "Model": "model",
    "Version": "version",
}
_NUMBERS = {
    "steps": int,
    "seed": int,
    "cfg_scale": float,
    "variation_seed": int,
    "variation_strength": float,
}


@dataclass(frozen=True)
class Infotext:
    """How a picture was made; None where it is not known. `str()` is the text, `parse` its inverse.

    `extra` holds any other settings by their printed name, in order, such as "Denoising strength".
    """

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None
    sampler: str | None = None
    schedule_type: str | None = None
    cfg_scale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None
    model_hash: str | None = None
    version: str | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The text. Raises RequestError for a name in `extra` that could not be read back."""
        lines = [self.prompt] if self.prompt else []
        if self.negative_prompt:
            lines.append(f"{_NEGATIVE} {self.negative_prompt}")
        settings = ", ".join(f"{name}: {_quote(value)}" for name, value in self._settings().items())
        return "\n".join([*lines, settings] if settings else lines)

    def _settings(self) -> dict[str, str]:
        """The settings that are known, by printed name, in the customary order."""
        wrong = [name for name in self.extra if not re.fullmatch(_KEY, name) or name in {*_NAMES, "Size"}]
        if wrong:
            raise RequestError(
                f"extra: {wrong[0]!r} cannot name a setting; use letters, digits, spaces, - and /, at least "
                "two, and none of the names that have a field"
            )
        strength = self.variation_strength
        size = f"{self.width}x{self.height}" if self.width is not None and self.height is not None else None
        known = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "Schedule type": self.schedule_type,
            "CFG scale": None if self.cfg_scale is None else _number(self.cfg_scale),
            "Seed": self.seed,
            "Size": size,
            "Model hash": self.model_hash,
            "Model": self.model,
            "Variation seed": self.variation_seed,
            "Variation seed strength": None if strength is None else _number(strength),
            **self.extra,
            "Version": self.version,
        }
        return {name: str(value) for name, value in known.items() if value is not None}


def infotext_of(
    request: Request, plan: Schedule, picture: int, *, model: str, weights: Mapping[str, str]
) -> Infotext:
    """How a picture of `request`, counted from 0, is made.

    plan: the request's schedule. model: the checkpoint's or the engine's name. weights: by file name in the
    checkpoint, their SHA-256 in hex; the U-Net's is told.
    """
    digest = unet_digest(weights)
    prompt = picture // request.num_images_per_prompt
    return Infotext(
        prompt=told_prompt(request, prompt),
        negative_prompt=request.negative_prompts[prompt] or "",
        steps=request.num_inference_steps or len(plan),
        sampler=plan.sampler,
        schedule_type=plan.schedule_type,
        cfg_scale=request.guidance_scale,
        seed=request.seeds[picture],
        width=request.width,
        height=request.height,
        model=model,
        model_hash=digest[:10] if digest else None,
        version=f"sdfast {__version__}",
        variation_seed=request.variation_seeds[picture] if request.variation_seeds else None,
        variation_strength=request.variation_strength or None,
        extra=_extra(request, prompt),
    )


def told_of_refiner(name: str, digest: str | None, switch_at: float) -> dict[str, str]:
    """The settings that tell of a second engine, as AUTOMATIC1111 names them. digest: its U-Net's."""
    hashed = "" if digest is None else f" [{digest[:10]}]"
    return {"Refiner": f"{name}{hashed}", "Refiner switch at": _number(switch_at)}


def told_of_vae(vae: UsedVAE | None) -> dict[str, str]:
    """The settings that tell of a VAE in the place of the checkpoint's own, as AUTOMATIC1111 names them."""
    return {} if vae is None else {"VAE hash": vae.digest[:10], "VAE": vae.name}


def unet_digest(weights: Mapping[str, str]) -> str | None:
    """The SHA-256 of the U-Net's file, by which a model is known, of those of all files by their names."""
    return next((value for name, value in sorted(weights.items()) if name.startswith("unet/")), None)


def _extra(request: Request, prompt: int) -> dict[str, str]:
    """What is told only of requests that ask for it, of the picture of prompt `prompt`."""
    texts = (request.prompts[prompt], request.negative_prompts[prompt] or "")
    strength, image_guidance = request.strength, request.image_guidance_scale
    clip_skip, emphasis = request.clip_skip, request.emphasis
    second = (request.pairs[prompt][1], request.negative_pairs[prompt][1])
    resized = request.seed_resize_from
    return {
        **({} if resized is None else {"Seed resize from": f"{resized[1]}x{resized[0]}"}),
        **({} if strength is None else {"Denoising strength": _number(strength)}),
        **of_mask(request),
        **({} if image_guidance is None else {"Image CFG scale": _number(image_guidance)}),
        **({} if request.hires is None else of_hires(request, request.hires, prompt)),
        **{
            _label(name): _number(share)
            for name, usual in _USUAL.items()
            if (share := getattr(request, name)) != usual
        },
        **({} if request.cache_interval == 1 else {"Cache interval": str(request.cache_interval)}),
        **_of_controlnets(request),
        **_of_ip_adapters(request),
        **({} if clip_skip is None else {"Clip skip": str(clip_skip + 1)}),
        **({} if emphasis is None else {"Emphasis": _label(emphasis)}),
        **({"Prompt editing": "True"} if request.prompt_editing and any(map(changes, texts)) else {}),
        **({} if request.long_prompts == "truncate" else {"Long prompts": request.long_prompts}),
        **{
            name: text
            for name, text in zip(("Prompt 2", "Negative prompt 2"), second, strict=True)
            if text is not None
        },
        **{
            _label(name): f"{size[1]}x{size[0]}"
            for name in TOLD_SIZES
            if (size := getattr(request, name)) not in (None, (0, 0))
        },
    }


def of_mask(request: Request) -> dict[str, str]:
    """That only a part of an image is drawn, and what with, as AUTOMATIC1111 tells it: of the image itself
    nothing."""
    padding, content = request.padding_mask_crop, request.masked_content
    return {
        **({} if padding is None else {"Inpaint area": "Only masked", "Masked area padding": str(padding)}),
        **({} if content in (None, "original") else {"Masked content": content.replace("_", " ")}),
    }


def _of_controlnets(request: Request) -> dict[str, str]:
    """How much ControlNets add, and in which steps; of several in their order, with slashes between."""
    if request.controlnet_conditioning_scale is None:
        return {}
    told = {"ControlNet scale": "/".join(map(_number, each(request.controlnet_conditioning_scale)))}
    spans = [f"{_number(start)}-{_number(end)}" for start, end in request.control_spans]
    if set(spans) != {"0-1"}:
        told["ControlNet steps"] = "/".join(spans)
    if request.control_mode is not None:
        told["ControlNet mode"] = "/".join(map(_label, each(request.control_mode)))
    if request.control_layer_scales is not None:
        layers = (",".join(map(_number, of_one or ())) for of_one in request.control_layer_scales)
        told["ControlNet layers"] = "/".join(layers)
    return told


def _of_ip_adapters(request: Request) -> dict[str, str]:
    """How much the images of IP-Adapters count; of several in their order, with slashes between."""
    scale = request.ip_adapter_scale
    if scale is None:
        return {}
    several = scale if isinstance(scale, tuple) else (scale,)
    return {"IP-Adapter scale": "/".join(map(_counted, several))}


def _counted(scale: AdapterScale) -> str:
    return json.dumps(scale) if isinstance(scale, dict) else _number(scale)


def told_prompt(request: Request, prompt: int) -> str:
    """A prompt, and the request's LoRAs behind it."""
    return request.prompts[prompt] + _networks(request.loras)


def _networks(loras: Mapping[str, float | tuple[float, float]]) -> str:
    """LoRAs as AUTOMATIC1111 has them in prompts."""
    told = {
        name: ":".join(map(_number, dict.fromkeys(scale if isinstance(scale, tuple) else (scale,))))
        for name, scale in loras.items()
        if scale not in (0, (0, 0))
    }
    return "".join(f" <lora:{name}:{scale}>" for name, scale in told.items())


def of_hires(request: Request, hires: Hires, prompt: int) -> dict[str, str]:
    """The settings of a second pass, as AUTOMATIC1111 names them."""
    scale, steps = hires.width / request.width, hires.num_inference_steps
    told = {"Denoising strength": _number(hires.strength)}
    if hires.height == scale * request.height:
        told["Hires upscale"] = _number(scale)
    else:
        told["Hires resize"] = f"{hires.width}x{hires.height}"
    told["Hires upscaler"] = next(name for name, known in UPSCALERS.items() if known == hires.upscaler)
    if steps is not None:
        told["Hires steps"] = str(steps)
    if hires.scheduler is not None:
        sampler = resolve(hires.scheduler)
        told |= {"Hires sampler": sampler.sampler, "Hires schedule type": sampler.schedule_type}
    if hires.prompts is not None or hires.loras is not None:
        loras = request.loras if hires.loras is None else hires.loras
        told["Hires prompt"] = (hires.prompts or request.prompts)[prompt] + _networks(loras)
    if hires.negative_prompts is not None:
        told["Hires negative prompt"] = hires.negative_prompts[prompt] or ""
    return told


def _label(name: str) -> str:
    """The name of a field, or of a choice, for people."""
    return name.capitalize().replace("_", " ").replace("Pag ", "PAG ")


def png(image: Image.Image, infotext: Infotext) -> bytes:
    """The picture as a PNG file with its infotext inside."""
    file = BytesIO()
    image.save(file, format="PNG", pnginfo=png_info(infotext), compress_level=COMPRESS_LEVEL)
    return file.getvalue()


def parse(text: str) -> Infotext:
    """Read an infotext, this program's or another's. Text without a line of settings is a prompt alone.

    A known setting whose value is not of its type is kept in `extra` as it stands.
    """
    prompts = text.rstrip().rpartition("\n")[0]
    settings = settings_in(text)
    lines = (prompts if settings else text).split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).removeprefix(" ")
    fields: dict[str, str | int | float] = {}
    extra = {name: value for name, value in settings.items() if not _assign(fields, name, value)}
    return Infotext("\n".join(lines[:start]), negative, extra=extra, **fields)  # type: ignore[arg-type]


def settings_in(text: str) -> dict[str, str]:
    """The settings of an infotext by printed name, as they stand; none in text without a line of them."""
    return _parse_settings(text.rstrip().rpartition("\n")[2])


def png_info(infotext: Infotext) -> PngImagePlugin.PngInfo:
    """The text as PNG metadata, for `Image.save(pnginfo=...)`: tEXt, or iTXt where Latin-1 is not enough."""
    text = str(infotext)
    info = PngImagePlugin.PngInfo()
    try:
        info.add_text(PNG_KEY, text)
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt {infotext.prompt!r:.80} is not valid Unicode text; remove its lone surrogates"
        ) from error
    return info


def read(path: str | Path) -> Infotext:
    """The infotext in a PNG file. Raises RequestError when there is no such file, PNG or text."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(PNG_KEY)
    except UnidentifiedImageError as error:
        raise RequestError(f"{path} is not a PNG picture; infotexts are read from PNG only") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} cannot be read ({error})") from error
    if not isinstance(text, str):
        raise RequestError(f"{path} holds no infotext (no PNG text {PNG_KEY!r}); it was saved without")
    return parse(text)


def _number(value: float) -> str:
    """A number without a trailing .0."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def _quote(value: str) -> str:
    """A value that would not read back as it stands, as a JSON string."""
    plain = value == value.strip() and not re.search(r'[,:\n]|^"', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    """The value that was quoted; one that only looks quoted stays as it is."""
    value = value.strip()
    if value.startswith('"') and value.endswith('"') and len(value) > 1:
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


def _parse_settings(line: str) -> dict[str, str]:
    """The settings in a line, by name; none when the line is not made of settings from end to end."""
    settings: dict[str, str] = {}
    position = 0
    while position < len(line):
        match = _SETTING.match(line, position)
        if not match:
            return {}
        settings[match.group(1)] = _unquote(match.group(2))
        position = match.end()
    enough = len(settings) >= _FEWEST_SETTINGS or line.startswith("Steps:")
    return settings if enough else {}


def _assign(fields: dict[str, str | int | float], name: str, value: str) -> bool:
    """Put a setting into its field; False when it has none, or is not of the field's type."""
    if name == "Size":
        size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value)
        if size:
            fields["width"], fields["height"] = int(size[1]), int(size[2])
        return size is not None
    target = _NAMES.get(name)
    if target is None:
        return False
    try:
        fields[target] = _NUMBERS[target](value) if target in _NUMBERS else value
    except ValueError:
        return False
    return True
