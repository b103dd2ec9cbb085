"""Pictures on disk: from a job of the command line to PNG files that tell how they were made."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdfast import __version__
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.infotext import Infotext, png_info
from sdfast.manifest import Manifest
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.schedulers import Schedule, schedule

_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
_OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
_NUMBERED = re.compile(r"(\d{5})-\d+\.png")


@dataclass(frozen=True)
class Job:
    """What `sdfast generate` was asked to draw."""

    prompt: str
    engine: Path
    negative: str | None = None
    steps: int = 20
    guidance: float = 7.0
    scheduler: str = "dpmpp_2m_karras"
    seed: int | None = None
    size: str | None = None
    count: int = 1
    clip_skip: int | None = None
    device: str | None = None
    backend: str = "engine"

    def request(self, manifest: Manifest) -> Request:
        """The checked request. Raises `RequestError`."""
        model = manifest.model
        match = _SIZE.fullmatch(self.size) if self.size else None
        if self.size and match is None:
            raise RequestError(f"size: {self.size!r} is not WIDTHxHEIGHT in pixels, such as 512x512")
        width, height = map(int, match.groups()) if match else (model.default_width, model.default_height)
        seed = {} if self.seed is None else {"seed": self.seed}
        return Request.make(
            prompts=(self.prompt,),
            negative_prompts=(self.negative,),
            height=height,
            width=width,
            num_inference_steps=self.steps,
            scheduler=self.scheduler,
            guidance_scale=self.guidance,
            num_images_per_prompt=self.count,
            clip_skip=self.clip_skip,
            **seed,
        )


def draw(job: Job, output: Path | None, overwrite: bool) -> list[tuple[Path, int]]:
    """Draw the pictures and write them; their paths and seeds. What could not be written is refused first.

    output: a `.png` file (numbered when there are several pictures) or a directory; default `outputs/`.
    """
    engine = Engine.open(job.engine, job.device)
    request = job.request(engine.manifest)
    engine.check_size(request.height, request.width)
    plan = schedule(job.scheduler, engine.scheduler_config, num_inference_steps=request.num_inference_steps)
    paths = _paths(output or Path("outputs"), request, overwrite)
    images = _stock_images(engine, request) if job.backend == "diffusers" else _images(engine, request)
    for path, seed, image in zip(paths, request.seeds, images, strict=True):
        _save(image, path, _infotext(request, plan, engine.manifest, seed), overwrite)
    return list(zip(paths, request.seeds, strict=True))


def _images(engine: Engine, request: Request) -> list[Image.Image]:
    output = Pipeline(engine).generate(request)
    if cut := output.truncated[0]:
        print(f"sdfast: the text encoder reads no more than 77 tokens; left out: {cut!r}", file=sys.stderr)
    images: list[Image.Image] = output.images
    return images


def _stock_images(engine: Engine, request: Request) -> list[Image.Image]:
    """The same request on the stock pipeline of the checkpoint that the engine was made from."""
    from sdfast.export.checkpoint import resolve
    from sdfast.validation.reference import generate, reference_pipeline

    made_of = engine.manifest.checkpoint
    variant = engine.manifest.recipe.get("variant")
    checkpoint = resolve(made_of.source, revision=made_of.revision, variant=variant)
    pipe = reference_pipeline(checkpoint, dtype=engine.dtype, device=engine.device)
    pipe.set_progress_bar_config(disable=None)
    images: list[Image.Image] = generate(pipe, request)
    return images


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


def _infotext(request: Request, plan: Schedule, manifest: Manifest, seed: int) -> Infotext:
    weights = manifest.checkpoint.weights
    digest = next((value for name, value in sorted(weights.items()) if name.startswith("unet/")), None)
    return Infotext(
        prompt=request.prompts[0],
        negative_prompt=request.negative_prompts[0] or "",
        steps=request.num_inference_steps or len(plan),
        sampler=plan.sampler,
        schedule_type=plan.schedule_type,
        cfg_scale=request.guidance_scale,
        seed=seed,
        width=request.width,
        height=request.height,
        model=manifest.name,
        model_hash=digest[:10] if digest else None,
        version=f"sdfast {__version__}",
        extra={} if request.clip_skip is None else {"Clip skip": str(request.clip_skip + 1)},
    )


def _save(image: Image.Image, path: Path, infotext: Infotext, overwrite: bool) -> None:
    """Write the PNG whole or not at all; a file that appeared meanwhile is not replaced unasked."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format="PNG", pnginfo=png_info(infotext))
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
