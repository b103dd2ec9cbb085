"""validate(): an engine beside the stock diffusers pipeline of its checkpoint, from prompt to picture."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sdfast
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.export.checkpoint import Checkpoint, silent
from sdfast.first_latents import Over, check_edits
from sdfast.pipeline import Pipeline
from sdfast.preparation import check_cached, check_channels
from sdfast.request import DEFAULT_IMAGE_GUIDANCE, Request
from sdfast.schedulers import Schedule, resolve, schedule
from sdfast.validation import rule
from sdfast.validation.control import control_images, control_settings, measure_control
from sdfast.validation.counterpart import counterpart
from sdfast.validation.inpainting import Scene, measure_edited, measure_told
from sdfast.validation.ip_adapter import adapter_images, image_settings, measure_images
from sdfast.validation.metrics import psnr, ssim
from sdfast.validation.modules import Stock, measure, scheduler_error, token_ids
from sdfast.validation.pictures import Picture, Repetition, compare_picture, draw, repeat
from sdfast.validation.proof import publish_proof
from sdfast.validation.reference import pipeline_class, reference_pipeline, stock
from sdfast.validation.report import Check, ModuleFigures, PictureFigures, Price, Report, Setting
from sdfast.validation.step_cache import cached_in, measure_step_cache, price_of_caching
from sdfast.versions import installed

PROMPTS = (
    "a cabin in misty mountains, watercolor style",
    "a lighthouse by the sea at sunset, flat style",
)
STOCHASTIC = "Euler a"  # draws noise at every step: its pictures prove the order of the draws
KNOWN = "DPM++ 2M Karras"  # in place of a checkpoint's own scheduler, where sdfast does not have that
STRENGTH = 0.6  # of the picture that is drawn over another
PAG_SCALE = 3.0  # of the picture with perturbed-attention guidance: diffusers' usual
OBSERVED_STEPS = 5  # of each picture, at which the U-Net is compared: the first, the last, and between
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "scikit-image",
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Trial:
    """The pictures of one scheduler."""

    name: str
    plan: Schedule
    pictures: list[Picture]


def validate(
    engine: Engine | str | Path,
    *,
    checkpoint: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    steps: int = 20,
    guidance_scale: float = 7.5,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    cache_interval: int = 1,
    scheduler: str | Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run the stock diffusers pipeline beside `engine`, and judge the engine by the rule of `rule.py`.

    checkpoint: what to compare with; default: the one the engine was exported from, which must not have
        changed since. guidance_start, guidance_end: where not all steps, the report also prices guidance in
        these alone (see `Request`); what is judged has guidance in all. cache_interval: where above 1, the
        report also prices step caching; what is judged has none. scheduler: names to run; default: the
        checkpoint's own, and one that draws noise.
    device: of both sides; default: the engine's.

    What an engine whose U-Net is for inpainting draws, it draws over the masked part of an image (`Scene`),
    and SDXL's refiner over the whole of it; what one with ControlNets draws, under the guidance of
    `control_images`; what one with IP-Adapters draws, like `adapter_images`. LoRAs that requests choose are
    all added, each with a scale of 1, and once none of them. An engine with layers to be perturbed draws one
    picture more, with perturbed-attention guidance.

    Writes `validation/report.json` and `validation/report.html` into the engine, and the figures into its
    manifest. An engine that differs makes a report whose `passed` is False, not an error.

    Raises `EngineError` when the engine cannot be opened or its checkpoint is not what it was exported from,
    `CheckpointError` for what is wrong with `checkpoint`, `DependencyError` without diffusers, transformers
    or scikit-image, `RequestError` for a bad argument.
    """
    start, tell = time.perf_counter(), progress or silent
    stock()
    engine = _opened(engine, device)
    model = engine.manifest.model
    check_channels(model, masked=True)
    if model.draws_over:
        check_edits(engine)
    tell("checkpoint")
    reference, notes = counterpart(engine, checkpoint)
    tell("stock pipelines")
    sides = Stock(
        reference_pipeline(reference, device=engine.device, pag=model.pag),
        reference_pipeline(reference, dtype=engine.dtype, device=engine.device, pag=model.pag)
        if engine.dtype != torch.float32
        else None,
    )
    requests, more = _requests(engine, reference, prompts, steps, guidance_scale, scheduler, seed)
    first = requests[0][0]
    _guided_in(first, guidance_start, guidance_end)  # or else it would be refused at the end of a long run
    check_cached(model, cached_in(first, cache_interval))
    scene = Scene.make(first.height, first.width, masked=model.inpaints) if model.draws_over else None
    count = model.controlnets
    control = control_images(count, first.height, first.width) if count else None
    seen = adapter_images(model)
    trials = [_trial(engine, sides, own, scene, control, seen, tell) for own in requests]
    over = []
    if engine.manifest.edits and not model.instructed:  # all that such a one draws is of one kind
        over = _over_trial(engine, sides, trials[0], scene, tell)
    if model.loras:
        over += _first_again(engine, sides, trials[0], "without LoRAs", {"loras": {}}, tell)
    if model.pag:
        scaled = {"pag_scale": PAG_SCALE}
        over += _first_again(engine, sides, trials[0], f"PAG {PAG_SCALE:g}", scaled, tell)
    price = _price(engine, trials, guidance_start, guidance_end, tell)
    caching, cache = None, engine.step_cache
    if cache is not None and cache_interval > 1:
        tell(f"the price of one whole step in {cache_interval}")
        drawn = [picture for trial in trials for picture in trial.pictures]
        caching = price_of_caching(engine, cache, drawn, cache_interval)
    tell("modules")
    judged, figures, checks = _judge(engine, reference, sides, trials, over, scene)
    report = Report(
        setting=_setting(engine, reference, first, start),
        modules=tuple(judged),
        pictures=tuple(figures),
        checks=tuple(checks),
        failures=tuple(rule.failures(judged, figures, checks)),
        notes=(*notes, *more),
        guidance=price,
        step_cache=caching,
    )
    tell("report")
    publish_proof(engine, report, [picture for trial in [*trials, *over] for picture in trial.pictures])
    return report


def _opened(engine: Engine | str | Path, device: str | torch.device | None) -> Engine:
    if isinstance(engine, (str, Path)):
        return Engine.open(engine, device)
    if device is not None and torch.device(device) != engine.device:
        raise RequestError(
            f"device: {device}, but this engine is open on {engine.device}; open it on {device}"
        )
    return engine


def _requests(
    engine: Engine,
    reference: Checkpoint,
    prompts: Sequence[str] | None,
    steps: int,
    guidance_scale: float,
    scheduler: str | Sequence[str] | None,
    seed: int,
) -> tuple[list[list[Request]], list[str]]:
    """One request for each scheduler and prompt, and what will not be looked at."""
    names, notes = _schedulers(reference, scheduler)
    height, width, others = _size(engine)
    if others:
        notes.append(f"compared at {width}x{height} only; the engine also has {', '.join(others)}")
    tokens = [embedding.token for embedding in reference.embeddings]
    prompts = _with_tokens(tokens) if prompts is None else tuple(prompts)
    if not prompts:
        raise RequestError("prompts: none given; give at least one")
    model = engine.manifest.model
    strength = 1.0 if model.inpaints or model.scored else None
    images = control_settings(model.controlnets) if model.controlnets else {}
    images |= image_settings(len(model.ip_adapters))
    requests = [
        [
            Request.make(
                prompts=(prompt,),
                negative_prompts=(None,),
                height=height,
                width=width,
                num_inference_steps=steps,
                scheduler=name,
                guidance_scale=float(guidance_scale),
                strength=strength,
                image_guidance_scale=DEFAULT_IMAGE_GUIDANCE if model.instructed else None,
                seed=seed + i,
                loras=dict.fromkeys(model.loras, 1.0),
                **images,
            )
            for i, prompt in enumerate(prompts)
        ]
        for name in names
    ]
    return requests, notes


def _with_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """The usual prompts, each with the token of an embedding, as far as they go: one alone, for diffusers
    takes a token apart of which another one is a part."""
    return tuple(f"{prompt}, {tokens[i]}" if i < len(tokens) else prompt for i, prompt in enumerate(PROMPTS))


def _schedulers(
    reference: Checkpoint, given: str | Sequence[str] | None
) -> tuple[list[str | None], list[str]]:
    """Names of schedulers to run, None for the checkpoint's own, and what is to be said of the choice."""
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        for name in names:
            resolve(name)
        return list(names), []
    own = str(reference.scheduler_config.get("_class_name"))
    try:
        schedule(own, reference.scheduler_config, num_inference_steps=1)
    except RequestError as error:
        return [KNOWN, STOCHASTIC], [
            f"the checkpoint's own scheduler was not run, but {KNOWN} in its place: "
            f"{str(error).partition(';')[0]}"
        ]
    return [None, STOCHASTIC], []


def _size(engine: Engine) -> tuple[int, int, list[str]]:
    """Height and width to compare at, in pixels: the engine's default or its first; and its other sizes."""
    model, variants = engine.manifest.model, engine.manifest.modules["unet"].variants
    height, width = model.default_height, model.default_width
    first = variants[0]
    if not any(v.fits(height, width) for v in variants) and first.height and first.width:
        height, width = first.height.low, first.width.low
    sizes = {f"{v.width}x{v.height}" for v in variants if v.width and v.height}
    return height, width, sorted(sizes - {f"{width}x{height}"})


def _trial(
    engine: Engine,
    sides: Stock,
    requests: Sequence[Request],
    scene: Scene | None,
    control: Tensor | None,
    seen: Tensor | None,
    tell: Progress,
) -> _Trial:
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    first = requests[0]
    name = resolve(first.scheduler).name if first.scheduler else type(sides.exact.scheduler).__name__
    plan = schedule(
        first.scheduler or pipe.scheduler.name,
        engine.scheduler_config,
        num_inference_steps=first.num_inference_steps,
    )
    over, wanted = scene.over if scene else None, _observed(len(plan))
    pictures = []
    for i, request in enumerate(requests):
        tell(f"{name}: picture {i + 1} of {len(requests)}")
        pictures.append(compare_picture(pipe, sides.exact, sides.same, request, wanted, over, control, seen))
    return _Trial(name, plan, pictures)


def _over_trial(
    engine: Engine, sides: Stock, trial: _Trial, scene: Scene | None, tell: Progress
) -> list[_Trial]:
    """The first prompt over the picture of the last one, or over the scene: it begins with latents of that.

    None where that would leave no step to do.
    """
    steps = trial.pictures[0].request.num_inference_steps
    if steps is None or int(steps * STRENGTH) < 1:
        return []
    name = f"{trial.name}, strength {STRENGTH:g}" if scene else f"{trial.name}, over a picture"
    tell(name)
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    request = trial.pictures[0].request.model_copy(update={"strength": STRENGTH})
    drawn_over = scene.over if scene else Over(trial.pictures[-1].truth.image[None])
    _, control, seen = trial.pictures[0].told
    picture = compare_picture(pipe, sides.exact, sides.same, request, (), drawn_over, control, seen)
    return [_Trial(name, trial.plan, [picture])]


def _first_again(
    engine: Engine, sides: Stock, trial: _Trial, called: str, update: Mapping[str, Any], tell: Progress
) -> list[_Trial]:
    """The first picture of a trial once more, of a request with these other fields."""
    name, first = f"{trial.name}, {called}", trial.pictures[0]
    tell(name)
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    request = first.request.model_copy(update=update)
    picture = compare_picture(pipe, sides.exact, sides.same, request, (), *first.told)
    return [_Trial(name, trial.plan, [picture])]


def _observed(steps: int) -> list[int]:
    return sorted({int(k) for k in np.linspace(0, steps - 1, min(steps, OBSERVED_STEPS)).round()})


def _price(
    engine: Engine, trials: Sequence[_Trial], start: float, end: float, tell: Progress
) -> Price | None:
    """What guidance in some of the steps saves and costs; None where it is to be in all."""
    if (start, end) == (0.0, 1.0):
        return None
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    rows, all_rows, drawn = 0, 0, []
    for trial in trials:
        for picture in trial.pictures:
            tell(f"{trial.name}: the price of guidance from {start:g} to {end:g}")
            fewer, steps = _guided_in(picture.request, start, end), len(trial.plan)
            guided = pipe.prompts.guided(fewer)
            rows, all_rows = rows + steps + guided * len(fewer.guided(steps)), all_rows + steps * (1 + guided)
            image = draw(pipe, fewer, *picture.told).images[0]
            drawn.append((image, picture.truth.image))
    return Price(
        guidance_start=start,
        guidance_end=end,
        rows=rows / all_rows,
        psnr_min=min(psnr(image, truth) for image, truth in drawn),
        ssim_min=min(ssim(image, truth) for image, truth in drawn),
    )


def _guided_in(request: Request, start: float, end: float) -> Request:
    return Request.make(**{**dict(request), "guidance_start": float(start), "guidance_end": float(end)})


def _judge(
    engine: Engine,
    reference: Checkpoint,
    sides: Stock,
    trials: Sequence[_Trial],
    over: Sequence[_Trial],
    scene: Scene | None,
) -> tuple[list[ModuleFigures], list[PictureFigures], list[Check]]:
    """Every figure with its verdict. over: trials over pictures, without LoRAs and with perturbed-attention
    guidance, of which only the pictures are judged."""
    rounding = engine.manifest.rounding
    prompts = [picture.request.prompts[0] for picture in trials[0].pictures]
    texts = ["", *prompts, *(embedding.token for embedding in reference.embeddings)]
    runs = [picture.truth for trial in trials for picture in trial.pictures]
    steps = [step for picture in trials[0].pictures for step in picture.truth.steps]
    measured = measure(engine, sides, texts, runs, steps)
    if scene is not None and engine.manifest.model.inpaints:
        measured += measure_told(engine, sides, scene, trials[0].pictures)
    if scene is not None and engine.manifest.model.instructed:
        measured.append(measure_edited(engine, sides, scene, trials[0].pictures))
    if engine.manifest.model.controlled:
        measured += measure_control(engine, sides, trials[0].pictures)
    measured += measure_images(engine, sides, trials[0].pictures)
    if engine.step_cache is not None:
        measured += measure_step_cache(engine, engine.step_cache, sides, trials[0].pictures)
    checks = [_same_tokens(engine, sides.exact, texts), _same_scheduler(engine, reference)]
    checks += _same_time_ids(engine, trials[0].pictures[0])
    pictures = [picture for trial in [*trials, *over] for picture in trial.pictures]
    whole = rule.measured_pictures(pictures, rounding=rounding)
    for trial in trials:
        truths = [picture.truth for picture in trial.pictures]
        measured.append(scheduler_error(f"scheduler {trial.name}", trial.plan, truths))
        checks += rule.judge_repetition(_repetition(engine, trial), whole, trial.name, rounding=rounding)
    figures = [
        rule.judge_picture(picture, trial.name, rounding=rounding)
        for trial in [*trials, *over]
        for picture in trial.pictures
    ]
    return [rule.judge_module(one, rounding=rounding) for one in (*measured, *whole)], figures, checks


def _repetition(engine: Engine, trial: _Trial) -> Repetition:
    pipe = Pipeline(engine)
    pipe.set_progress_bar_config(disable=True)
    return repeat(pipe, trial.pictures)


def _same_tokens(engine: Engine, pipe: Any, prompts: Sequence[str]) -> Check:
    """Whether the engine's tokenizers give the ids of the stock ones."""
    for index, tokenizer in enumerate(engine.tokenizers):
        for prompt in prompts:
            own, truth = tokenizer([prompt]).input_ids[0], token_ids(pipe, index, [prompt])[0].numpy()
            if not np.array_equal(own, truth):
                detail = f"tokenizer {index + 1} reads {prompt!r:.60} as other ids than the stock one"
                return Check(name="tokenizer", passed=False, detail=detail)
    return Check(name="tokenizer", passed=True, detail="the prompts become the same ids")


def _same_time_ids(engine: Engine, picture: Picture) -> list[Check]:
    """Whether SDXL's U-Net is told the numbers of a picture that the stock one is; none for other U-Nets."""
    truth = picture.truth.steps[0].conditions.get("time_ids")
    if truth is None:
        return []
    told, away = Pipeline(engine).told_sizes(picture.request, over=picture.over is not None)
    rows = [away, told] if len(truth) < 3 else [told, away, away]  # an edited image's prompt comes first
    own, due = rows[-len(truth) :], truth.float().tolist()  # the negative's first, where it is guided
    same, kind = own == due, "scores" if engine.manifest.model.scored else "target sizes"
    detail = f"sizes, crops and {kind} are told as stock tells them" if same else f"{own}, stock tells {due}"
    return [Check(name="time_ids", passed=same, detail=detail)]


def _same_scheduler(engine: Engine, reference: Checkpoint) -> Check:
    """Whether the engine's copy of the scheduler config is still the checkpoint's."""
    own, truth = engine.scheduler_config, reference.scheduler_config
    keys = sorted(k for k in {*own, *truth} - {"_diffusers_version"} if own.get(k, ...) != truth.get(k, ...))
    if keys:
        told = ", ".join(f"{k} {own.get(k, 'absent')} (checkpoint: {truth.get(k, 'absent')})" for k in keys)
        return Check(name="scheduler config", passed=False, detail=f"differs from the checkpoint's: {told}")
    return Check(name="scheduler config", passed=True, detail="is the checkpoint's")


def _setting(engine: Engine, reference: Checkpoint, request: Request, start: float) -> Setting:
    manifest, versions = engine.manifest, _versions()
    inpaints = manifest.model.inpaints
    controlled = manifest.model.controlled
    masked = True if inpaints else False if manifest.model.scored else None
    stock_name = pipeline_class(
        reference.family,
        controlnet=controlled,
        masked=masked,
        instructed=manifest.model.instructed,
        pag=bool(manifest.model.pag),
    )
    return Setting(
        engine=manifest.name,
        folder=str(engine.folder),
        backend=", ".join([manifest.backend, *engine.running_as]),
        dtype=manifest.dtype,
        fp8=len(manifest.fp8),
        int8=len(manifest.int8),
        inpaints=inpaints,
        refines=manifest.model.scored,
        instructed=manifest.model.instructed,
        controlnet=", ".join(str(added.record()) for added in reference.controlnets) or None,
        vae=str(reference.vae.record()) if reference.vae else None,
        ip_adapters=tuple(str(adapter.record()) for adapter in reference.ip_adapters),
        device=str(engine.device),
        checkpoint=reference.source
        if reference.revision is None
        else f"{reference.source}@{reference.revision}",
        loras=(
            *(str(lora.record()) for lora in reference.loras),
            *(str(lora.record()) for lora in reference.chosen),
        ),
        embeddings=tuple(str(embedding.record()) for embedding in reference.embeddings),
        reference=f"diffusers {versions['diffusers']} {stock_name} in float32",
        height=request.height,
        width=request.width,
        steps=request.num_inference_steps or 0,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
        machine=_machine(engine.device),
        versions=versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
    )


def _versions() -> dict[str, str]:
    return {"sdfast": sdfast.__version__, "python": platform.python_version(), **installed(PACKAGES)}


def _machine(device: torch.device) -> str:
    threads = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.platform()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{model[0] if model else platform.machine()}, {threads}, {platform.platform()}"
