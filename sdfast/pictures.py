"""Pictures on disk: from a job of the command line to PNG files that tell how they were made."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from PIL import Image

from sdfast.backends import check_device, parse_device
from sdfast.call import Given, asked_over
from sdfast.control import asked_scale, check_control, controlnets_of
from sdfast.engine import DTYPES, Engine
from sdfast.ensemble import Ensemble
from sdfast.errors import BackendError, RequestError
from sdfast.experts import SWITCH_AT
from sdfast.first_latents import Over, check_fit
from sdfast.images import open_image, read_controls, read_images, read_masks
from sdfast.infotext import Infotext, infotext_of, png, told_of_refiner, told_of_vae, unet_digest
from sdfast.ip_adapter import asked_scale as asked_image_scale
from sdfast.ip_adapter import check_images
from sdfast.ip_adapter import read_images as read_seen
from sdfast.loras import check_loras
from sdfast.manifest import Model
from sdfast.masked_area import MaskedArea
from sdfast.pag import check_pag
from sdfast.pipeline import Pipeline
from sdfast.preparation import check_cached, check_channels, check_instructed, check_refined
from sdfast.request import Hires, Request
from sdfast.schedulers import schedule

if TYPE_CHECKING:
    from sdfast.backends.attention import Attention
    from sdfast.export.checkpoint import Checkpoint

T = TypeVar("T")


class Written(NamedTuple):
    """A picture's file and its seeds."""

    path: Path
    seed: int
    variation_seed: int | None


_OFF = "none"  # in place of a control image
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
_OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
_NUMBERED = re.compile(r"(\d{5})-\d+\.png")


@dataclass(frozen=True)
class Job:
    """What `sdfast generate` was asked to draw.

    engine: its directory; or, in its place, checkpoint: what `sdfast export` takes, for the stock pipeline in
        dtype ("fp32" or "fp16").
    backend: "engine" for whatever the engine is, "onnx", "inductor" or "eager" for one that must be that, or
        "diffusers" for the stock pipeline of its checkpoint.
    image, mask: files of what is drawn over, and of what of it is drawn anew (white); mask_padding: that only
        this and so many pixels around are drawn, at `size`, and pasted into the image.
    control: files of the ControlNets' control images, in their order, "none" for one that is to add nothing;
        the other controls are the request's: one number, or one for each.
    ip_adapter_image: files of the IP-Adapters' images, likewise; ip_adapter_scale: of each, or of all, as
        JSON, a number or numbers by layers.
    refiner: the directory of the engine that goes on from the share refiner_switch_at of the denoising.
    loras: how much is added of LoRAs that the engine has for requests, by their names.
    seed_resize_from: the size of a picture of the seed that this one is to be like, "WIDTHxHEIGHT".
    hires: the size of a second pass, likewise; what it is told besides is `sdfast.request.Hires`'s.
    """

    prompt: str
    engine: Path | None = None
    checkpoint: str | None = None
    dtype: str | None = None
    negative: str | None = None
    steps: int = 20
    guidance: float = 7.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    cache_interval: int = 1
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    scheduler: str = "dpmpp_2m_karras"
    seed: int | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    seed_resize_from: str | None = None
    size: str | None = None
    count: int = 1
    clip_skip: int | None = None
    long_prompts: str = "truncate"
    emphasis: str | None = None
    prompt_editing: bool = False
    device: str | None = None
    backend: str = "engine"
    compile: bool = False
    attention: str | None = None
    image: Path | None = None
    mask: Path | None = None
    mask_padding: int | None = None
    strength: float | None = None
    image_guidance: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    refiner: Path | None = None
    refiner_switch_at: float | None = None
    control: tuple[Path, ...] = ()
    control_scale: tuple[float, ...] = ()
    control_start: tuple[float, ...] = ()
    control_end: tuple[float, ...] = ()
    control_mode: tuple[str, ...] = ()
    loras: Mapping[str, float] = field(default_factory=dict)
    ip_adapter_image: tuple[Path, ...] = ()
    ip_adapter_scale: tuple[str, ...] = ()
    hires: str | None = None
    hires_upscaler: str = "latent"
    hires_strength: float = 0.75
    hires_steps: int | None = None

    def given(self, model: Model) -> Given:
        """What it is drawn over, and the control image. Raises `RequestError` for what is no image."""
        numbers = (self.control_scale, self.control_start, self.control_end)
        if not self.control and any((*numbers, self.control_mode)):
            raise RequestError(
                "control-scale, control-start, control-end and control-mode are for a control image; give "
                "--control too"
            )
        area = self._area(model)
        images = [path and open_image(path) for path in self._controls]
        images = images if area is None else area.cut_controls(images)
        control = read_controls(_one_or_each(images), controlnets_of(model)) if images else None
        seen = self._adapter_images
        if not seen and self.ip_adapter_scale:
            raise RequestError("ip-adapter-scale is for an IP-Adapter's image; give --ip-adapter-image too")
        opened = [path and open_image(path) for path in seen]
        told = read_seen(model, opened) if opened else None
        return Given(over=self._over(model, area), control=control, ip_adapter_images=told)

    @property
    def _controls(self) -> list[Path | None]:
        """Of each ControlNet the file of its control image."""
        return [None if str(path) == _OFF else path for path in self.control]

    @property
    def _adapter_images(self) -> list[Path | None]:
        """Of each IP-Adapter the file of its image."""
        return [None if str(path) == _OFF else path for path in self.ip_adapter_image]

    def _area(self, model: Model) -> MaskedArea | None:
        """The part of the image that is drawn, at the model's own size where none is asked for; None for all
        of it. Raises `RequestError`."""
        if self.mask_padding is None:
            return None
        if self.image is None or self.mask is None:
            raise RequestError("mask-padding is for an image and its mask; give --image and --mask too")
        width, height = parse_size("size", self.size) or (model.default_width, model.default_height)
        image, mask = open_image(self.image).convert("RGB"), open_image(self.mask).convert("L")
        return MaskedArea.make(image, mask, padding_mask_crop=self.mask_padding, height=height, width=width)

    def _over(self, model: Model, area: MaskedArea | None) -> Over | None:
        """What is drawn over. Raises `RequestError` for files that are no images."""
        if area is not None:
            cut = area.cut(area.image), area.cut(area.mask)
            return Over(read_images(cut[0], model.latent_channels), read_masks(cut[1]), area)
        if self.image is None:
            told = (self.mask, self.strength, self.denoising_start, self.image_guidance)
            if any(value is not None for value in told):
                raise RequestError(
                    "mask, strength, denoising-start and image-guidance are for an image to draw over; give "
                    "--image too"
                )
            return None
        mask = None if self.mask is None else read_masks(open_image(self.mask))
        return Over(read_images(open_image(self.image), model.latent_channels), mask)

    def request(self, model: Model, given: Given) -> Request:
        """The checked request, of the size of what it is drawn over or under. Raises `RequestError`."""
        size = parse_size("size", self.size)
        width, height = model.default_width, model.default_height
        over, scale = given.over, _one_or_each(self.control_scale)
        if given.control is not None:
            height, width = given.control.shape[2:]
            scale = asked_scale(model, _one_or_each(self._controls), scale)
        if over is not None:
            height, width = over.image.shape[2:]
        width, height = size or (width, height)
        counts = None
        if given.ip_adapter_images is not None:
            counts = _one_or_each([_counted(text) for text in self.ip_adapter_scale])
            counts = asked_image_scale(model, self._adapter_images, counts)
        seed = {} if self.seed is None else {"seed": self.seed}
        resized = parse_size("seed-resize-from", self.seed_resize_from)
        return Request.make(
            prompts=(self.prompt,),
            negative_prompts=(self.negative,),
            height=height,
            width=width,
            num_inference_steps=self.steps,
            scheduler=self.scheduler,
            guidance_scale=self.guidance,
            guidance_start=self.guidance_start,
            guidance_end=self.guidance_end,
            cache_interval=self.cache_interval,
            pag_scale=self.pag_scale,
            pag_adaptive_scale=self.pag_adaptive_scale,
            num_images_per_prompt=self.count,
            clip_skip=self.clip_skip,
            long_prompts=self.long_prompts,
            emphasis=self.emphasis,
            prompt_editing=self.prompt_editing,
            **asked_over(model, over, self.strength, self.denoising_start, self.image_guidance),
            padding_mask_crop=self.mask_padding,
            denoising_start=self.denoising_start,
            denoising_end=self.denoising_end,
            controlnet_conditioning_scale=scale,
            control_guidance_start=_one_or_each(self.control_start) or 0.0,
            control_guidance_end=1.0 if not self.control_end else _one_or_each(self.control_end),
            control_mode=_one_or_each(self.control_mode),
            loras=dict(self.loras),
            ip_adapter_scale=counts,
            hires=self._second_pass(),
            variation_seed=self.variation_seed,
            variation_strength=self.variation_strength,
            seed_resize_from=None if resized is None else resized[::-1],
            **seed,
        )

    def _second_pass(self) -> Hires | None:
        size = parse_size("hires", self.hires)
        if size is None:
            if (self.hires_upscaler, self.hires_strength, self.hires_steps) != ("latent", 0.75, None):
                raise RequestError(
                    "hires-upscaler, hires-strength and hires-steps are for a second pass; give --hires too"
                )
            return None
        return Hires.make(
            width=size[0],
            height=size[1],
            upscaler=self.hires_upscaler,
            strength=self.hires_strength,
            num_inference_steps=self.hires_steps,
        )


def _one_or_each(said: Sequence[T]) -> T | tuple[T, ...] | None:
    """What was said of ControlNets: once, or for each."""
    return tuple(said) if len(said) > 1 else next(iter(said), None)


def _counted(text: str) -> Any:
    """How much an IP-Adapter's image counts. Raises `RequestError` for what is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        raise RequestError(
            f"ip-adapter-scale: {text!r:.60} is not a number, nor numbers by layers such as "
            '{"up": {"block_1": [0.0, 1.0, 0.0]}}'
        ) from None


def parse_size(name: str, text: str | None) -> tuple[int, int] | None:
    """Width and height. Raises `RequestError` for a text that says neither."""
    if not text:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise RequestError(f"{name}: {text!r} is not WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Painter:
    """What draws a job's pictures, and what their request and their parameters have to know of it."""

    name: str
    model: Model
    scheduler_config: Mapping[str, Any]
    weights: Mapping[str, str]  # file name in the checkpoint → sha256
    check_size: Callable[[int, int], None]  # height, width
    paint: Callable[[Request, Given], list[Image.Image]]
    told: Mapping[str, str] = field(default_factory=dict)  # what pictures' parameters tell besides


def draw(job: Job, output: Path | None, overwrite: bool) -> list[Written]:
    """Draw the pictures and write them. What could not be written is refused first.

    output: a `.png` file (numbered when there are several pictures) or a directory; default `outputs/`.
    """
    painter = _painter(job)
    given = job.given(painter.model)
    masked = given.over is not None and given.over.mask is not None
    check_channels(painter.model, masked)
    check_refined(painter.model, over=given.over is not None)
    request = job.request(painter.model, given)
    check_instructed(painter.model, request, over=given.over is not None, masked=masked)
    for one in request.passes:
        painter.check_size(one.height, one.width)
    if given.over is not None:
        check_fit(request, given.over, painter.model)
    check_control(painter.model, request, given.control)
    check_images(painter.model, request, given.ip_adapter_images)
    check_cached(painter.model, request)
    check_pag(painter.model, request)
    check_loras(painter.model, request)
    plan = schedule(
        job.scheduler,
        painter.scheduler_config,
        num_inference_steps=request.num_inference_steps,
        strength=1.0 if request.strength is None else request.strength,
        denoising_start=request.denoising_start,
        denoising_end=request.denoising_end,
    )
    paths = _paths(output or Path("outputs"), request, overwrite)
    _tell_unread(request, painter.model)
    images = painter.paint(request, given)
    for i, (path, image) in enumerate(zip(paths, images, strict=True)):
        text = infotext_of(request, plan, i, model=painter.name, weights=painter.weights)
        text = replace(text, extra={**text.extra, **painter.told})
        _save(image, path, text, overwrite)
    varied = request.variation_seeds or (None,) * request.images
    return list(map(Written, paths, request.seeds, varied))


def _painter(job: Job) -> Painter:
    if job.compile and job.backend == "diffusers":
        raise BackendError(
            "compile is for eager engines, not for the stock pipeline; leave it out, or make an engine with "
            "`sdfast export SOURCE --backend eager`"
        )
    if job.refiner is None and job.refiner_switch_at is not None:
        raise RequestError("refiner-switch-at is for a second engine; give --refiner too")
    if job.refiner is not None and job.backend == "diffusers":
        raise RequestError("refiner: goes on with what an engine began; leave --backend diffusers out")
    if job.checkpoint is not None:
        return _checkpoint_painter(job, job.checkpoint)
    if job.engine is None:
        raise RequestError("nothing to draw with: give an engine or a checkpoint")
    return (_stock_painter if job.backend == "diffusers" else _engine_painter)(job, job.engine)


@dataclass(frozen=True)
class Stock:
    """How the stock pipeline is run. What is not here is refused when it is made."""

    device: torch.device
    attention: "Attention | None"

    @classmethod
    def of(cls, job: Job) -> "Stock":
        from sdfast.backends.attention import Attention

        device = parse_device(job.device or "cpu")
        check_device(device)
        return cls(device, Attention(job.attention, device) if job.attention else None)

    def paint(
        self,
        checkpoint: "Checkpoint",
        dtype: str,
        request: Request,
        given: Given,
        cache_branch: int | None = None,
        pag: Sequence[str] = (),
    ) -> list[Image.Image]:
        from sdfast.validation.drawing import generate
        from sdfast.validation.reading import written_out
        from sdfast.validation.reference import reference_pipeline, tokenizers_of

        pipe = reference_pipeline(
            checkpoint, dtype=DTYPES[dtype], device=self.device, attention=self.attention, pag=pag
        )
        pipe.set_progress_bar_config(disable=None)
        images: list[Image.Image] = generate(
            pipe,
            request,
            over=given.over,
            control=given.control,
            cache_branch=cache_branch,
            ip_adapter_images=given.ip_adapter_images,
        )
        if request.long_prompts == "truncate":
            tokenizer = tokenizers_of(pipe)[0]
            _tell_cut(_cut(tokenizer, written_out(pipe, tokenizer, request.prompts[0])))
        _tell_measured(self.attention)
        return images


def _engine_painter(job: Job, folder: Path) -> Painter:
    engine = _opened(job, folder)
    if job.refiner is None:
        return _painter_of(engine, lambda request, given: _images(engine, request, given))
    return _painter_of_two(job, engine, _opened(job, job.refiner))


def _opened(job: Job, folder: Path) -> Engine:
    engine = Engine.open(folder, job.device, compile=job.compile, attention=job.attention)
    if job.backend not in ("engine", engine.manifest.backend):
        raise BackendError(
            f"{folder}: --backend {job.backend}, but the engine is {engine.manifest.backend}; leave "
            f"--backend out, or make another with `sdfast export SOURCE --backend {job.backend}`"
        )
    return engine


def _painter_of_two(job: Job, base: Engine, refiner: Engine) -> Painter:
    """A base and its refiner. What pictures tell of the refiner is named as AUTOMATIC1111 names it."""
    switch_at = SWITCH_AT if job.refiner_switch_at is None else job.refiner_switch_at
    both = Ensemble(Pipeline(base), Pipeline(refiner), switch_at)

    def paint(request: Request, given: Given) -> list[Image.Image]:
        output = both.generate(request, given.over, given.control, ip_adapter_images=given.ip_adapter_images)
        _tell_cut(output.truncated[0])
        images: list[Image.Image] = output.images
        return images

    def check_size(height: int, width: int) -> None:
        for engine in (base, refiner):
            engine.check_size(height, width)

    digest = unet_digest(refiner.manifest.checkpoint.weights)
    told = told_of_refiner(refiner.manifest.name, digest, switch_at)
    told |= told_of_vae(refiner.manifest.checkpoint.vae)  # which makes the pictures
    return replace(_painter_of(base, paint), check_size=check_size, told=told)


def _stock_painter(job: Job, folder: Path) -> Painter:
    """The stock pipeline of the checkpoint that an engine was made from, in the engine's dtype."""
    from sdfast.export.additions import as_made
    from sdfast.export.checkpoint import resolve

    stock, engine = Stock.of(job), Engine.open(folder, job.device)
    made_of, dtype = engine.manifest.checkpoint, engine.manifest.dtype
    variant, cache = engine.manifest.recipe.get("variant"), engine.step_cache

    def paint(request: Request, given: Given) -> list[Image.Image]:
        checkpoint = resolve(made_of.source, revision=made_of.revision, variant=variant, progress=_say)
        made = as_made(checkpoint, engine.manifest, _say)
        branch = cache.branch if cache else None
        return stock.paint(made, dtype, request, given, branch, engine.manifest.model.pag)

    return _painter_of(engine, paint)


def _checkpoint_painter(job: Job, source: str) -> Painter:
    """The stock pipeline of a checkpoint of which there is no engine."""
    from sdfast.export.checkpoint import name_of, resolve
    from sdfast.export.networks import Networks

    stock, checkpoint = Stock.of(job), resolve(source, progress=_say)
    return Painter(
        name=name_of(source),
        model=Networks.of(checkpoint).model(),
        scheduler_config=checkpoint.scheduler_config,
        weights=checkpoint.digests(),
        check_size=lambda height, width: None,  # the stock pipeline takes every size that a request may have
        paint=lambda request, given: stock.paint(checkpoint, job.dtype or "fp32", request, given),
    )


def _painter_of(engine: Engine, paint: Callable[[Request, Given], list[Image.Image]]) -> Painter:
    manifest, config = engine.manifest, engine.scheduler_config
    made_of = manifest.checkpoint
    told = told_of_vae(made_of.vae)
    return Painter(manifest.name, manifest.model, config, made_of.weights, engine.check_size, paint, told)


def _images(engine: Engine, request: Request, given: Given) -> list[Image.Image]:
    output = Pipeline(engine).generate(request, given)
    _tell_cut(output.truncated[0])
    _tell_measured(engine.attention)
    images: list[Image.Image] = output.images
    return images


def _cut(tokenizer: Any, prompt: str) -> str:
    """What a stock tokenizer's pipeline does not read of a prompt, for which it has no place."""
    ids = tokenizer(prompt, verbose=False).input_ids
    text: str = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])
    return text


def _tell_cut(text: str) -> None:
    if text:
        _say(f"the text encoder reads no more than 77 tokens; left out: {text!r} (see --long-prompts)")


def _tell_unread(request: Request, model: Model) -> None:
    """A negative prompt that there is no guidance away from, as with diffusers."""
    if request.negative_prompts[0] and model.guidance_embedding is not None:
        _say("the negative prompt is not read: this U-Net is told the guidance, and has none")
    elif request.negative_prompts[0] and request.guidance_scale <= 1:
        _say(f"the negative prompt is not read: guidance {request.guidance_scale:g} is not above 1")


def _tell_measured(attention: "Attention | None") -> None:
    """What "auto" chose, where it had a choice."""
    for line in attention.report() if attention else ():
        _say(line)


def _say(message: str) -> None:
    print(f"sdfast: {message}", file=sys.stderr)


def _paths(output: Path, request: Request, overwrite: bool) -> list[Path]:
    """Where each picture goes. Raises `RequestError` for files that are there, unless `overwrite`."""
    if output.suffix.lower() in _OTHER_PICTURES:
        raise RequestError(f"{output}: pictures are written as PNG; give a .png file, or a directory")
    try:
        if output.suffix.lower() != ".png":
            _check_directory(output)
            first = _next_number(output)
            return [output / f"{first + i:05d}-{seed}.png" for i, seed in enumerate(request.seeds)]
        _check_directory(output.parent)
        paths = [output]
        if request.images > 1:
            paths = [output.with_stem(f"{output.stem}-{i + 1}") for i in range(request.images)]
        there = [str(path) for path in paths if path.is_dir() or (path.exists() and not overwrite)]
    except OSError as error:  # such as a name that is too long
        raise RequestError(f"{output}: {error.strerror}; give another -o") from error
    if there:
        raise RequestError(f"{', '.join(there)}: already there; give another -o, or --overwrite")
    return paths


def _check_directory(folder: Path) -> None:
    """Raises `RequestError` unless `folder` can be written to, or made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise RequestError(f"{nearest}: is not a directory; give another -o")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{nearest}: may not be written to; give another -o")


def _next_number(folder: Path) -> int:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return 1 + max((int(m[1]) for m in map(_NUMBERED.fullmatch, names) if m), default=0)


def _save(image: Image.Image, path: Path, infotext: Infotext, overwrite: bool) -> None:
    """Write the PNG whole or not at all; a file that appeared meanwhile is not replaced unasked."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(png(image, infotext))
        if not overwrite:
            path.open("x").close()  # nobody else writes there from here on
        part.replace(path)
    except FileExistsError:
        raise RequestError(f"{path}: already there; give another -o, or --overwrite") from None
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be written ({error.strerror or error}); give another -o"
        ) from error
    finally:
        part.unlink(missing_ok=True)
