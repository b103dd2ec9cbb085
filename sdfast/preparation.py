"""What happens before the loop: a request becomes rows, each with its schedule, prompts and first latents."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from sdfast.arithmetic import Weight
from sdfast.call import Given
from sdfast.control import check_control, embedded, scales, with_scales
from sdfast.editing import Editing
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.first_latents import (
    Start,
    check_edits,
    check_noising,
    check_strength,
    edited_latents,
    start_over,
)
from sdfast.ip_adapter import ImagePrompts, check_images
from sdfast.loras import LoraScales, check_loras
from sdfast.manifest import Model
from sdfast.noise import BrownianNoise, NoiseSource, OwnNoise, SharedNoise, VariedNoise, generator
from sdfast.pag import away_from, check_pag, scale_of, told_of
from sdfast.prompts import (
    Edited,
    Prompts,
    PromptState,
    Reading,
    check_tensor,
    edited,
    joined,
    told_in_turn,
    told_sizes,
)
from sdfast.request import Hires, Request
from sdfast.row import Conditioning, Guide, Row
from sdfast.schedulers import SOLVERS, Schedule, own_config, resolve, schedule
from sdfast.schedulers.run import left_out

T = TypeVar("T")


@dataclass(frozen=True)
class Scheduler:
    """The scheduler a pipeline will use: a diffusers class name and its config.

    source: an object of a class that sdfast has no formulas for; its tables are taken from itself.
    """

    name: str
    config: Mapping[str, Any]
    source: Any = None

    def schedule(self, family: str = "sd", **run: Any) -> Schedule:
        """The table of a run; `family` and `run` are what `sdfast.schedulers.schedule` takes."""
        if self.source is None:
            return schedule(self.name, self.config, family=family, **run)
        from sdfast.schedulers.extract import run_of

        return run_of(self.source, **run)


@dataclass(frozen=True)
class Prepared:
    """A request that has everything which its loop needs: a row for each picture, in the request's order.

    truncated: the text that was cut from each prompt, "" for none. editing: how steps are counted for prompts
    that change between them.
    """

    rows: Sequence[Row]
    schedule: Schedule
    truncated: tuple[str, ...]
    editing: Editing | None = None


class Preparation:
    """The way of a request to its rows, on one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prompts, self.images = Prompts(engine), ImagePrompts(engine)
        name = str(engine.scheduler_config.get("_class_name", "DDIMScheduler"))
        self._scheduler = Scheduler(name, engine.scheduler_config)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of calls that name none. Set it to a name or to a diffusers scheduler object."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        if isinstance(value, str):
            chosen = Scheduler(value, self.engine.scheduler_config)
        elif isinstance(value, Scheduler):
            chosen = value
        elif hasattr(value, "config"):
            name = type(value).__name__
            chosen = Scheduler(name, own_config(value), None if name in SOLVERS else copy.deepcopy(value))
        else:
            raise RequestError(f"{value!r} is not a scheduler: give a name or a diffusers scheduler object")
        # What is not supported is named here rather than in the middle of a call.
        chosen.schedule(num_inference_steps=4)
        self._scheduler = chosen

    @torch.no_grad()
    def prepare(self, request: Request, given: Given | None = None, first: Request | None = None) -> Prepared:
        """Everything before the loop: the schedule, the prompts' states, the first noise.

        first: the request of which this one is the second pass.
        """
        given = given or Given()
        masked = given.over is not None and given.over.mask is not None
        check_strength(request, over=given.over is not None, masked=masked)
        check_refined(self.engine.manifest.model, over=given.over is not None)
        check_channels(self.engine.manifest.model, masked)
        check_instructed(self.engine.manifest.model, request, over=given.over is not None, masked=masked)
        self.prompts.check_fields(request)  # what is too long is refused when it is encoded
        check_control(self.engine.manifest.model, request, given.control)
        check_loras(self.engine.manifest.model, request)
        check_images(self.engine.manifest.model, request, given.ip_adapter_images)
        check_cached(self.engine.manifest.model, request)
        check_pag(self.engine.manifest.model, request)
        if request.hires is not None:
            self.check_hires(request, request.hires)
        plan = self.schedule_of(request)
        editing = self.editing_of(request, plan, first)
        positive, negative, truncated = self._encode(request, given, editing)
        return Prepared(self._rows(request, given, plan, positive, negative), plan, truncated, editing)

    def check_hires(self, request: Request, hires: Hires) -> None:
        """Raises `RequestError` for a second pass that the engine or its scheduler cannot do."""
        second = request.passes[-1]
        check_loras(self.engine.manifest.model, second)
        plan = self.schedule_of(second)
        check_noising(plan)
        self.prompts.check(second, self.editing_of(second, plan, request))
        if not hires.latent:
            check_edits(self.engine)

    def told_sizes(self, request: Request, *, over: bool) -> tuple[list[float], list[float]]:
        """What SDXL is told of the sizes of a picture, and of what it is guided away from."""
        return told_sizes(request, over=over, scored=self.engine.manifest.model.scored)

    def schedule_of(self, request: Request) -> Schedule:
        """The table of a request's run. Raises `RequestError` for a run that its scheduler cannot do."""
        name = request.scheduler
        chosen = Scheduler(name, self.engine.scheduler_config) if name else self._scheduler
        return chosen.schedule(
            num_inference_steps=request.num_inference_steps,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
            eta=request.eta,
            strength=1.0 if request.strength is None else request.strength,
            denoising_start=request.denoising_start,
            denoising_end=request.denoising_end,
            family=self.engine.manifest.model.family,
        )

    def editing_of(self, request: Request, plan: Schedule, first: Request | None = None) -> Editing | None:
        """How the steps of a request's run are counted for prompts that change between them; None where none
        does. plan: its schedule. first: the request of which this one is the second pass."""
        if not request.prompt_editing:
            return None
        every = request.steps or len(plan)
        done = every - left_out(every, 1.0 if request.strength is None else request.strength)
        evaluations = resolve(plan.scheduler).evaluations if plan.scheduler in SOLVERS else 1  # of a step
        if first is None:
            skipped = 0
            if request.denoising_start is not None:
                whole = request.model_copy(update={"denoising_start": None})
                skipped = len(self.schedule_of(whole)) - len(plan)
            return Editing(every * evaluations, len(plan), skipped=skipped)
        before = self.editing_of(first, self.schedule_of(first))
        return Editing(done * evaluations, len(plan), before.steps if before else 0)

    def _encode(
        self, request: Request, given: Given, editing: Editing | None
    ) -> tuple[list[Edited[PromptState]], list[Edited[PromptState]], tuple[str, ...]]:
        """The states of each prompt, those that are added up one after the other, and those of the negative
        prompts when guidance is on, else none."""
        prompts, reading = self.prompts, Reading.of(request)
        loras = LoraScales.of(self.engine.manifest.model, request)
        if given.prompt_embeds is not None:
            positive = self._given("prompt_embeds", given.prompt_embeds, given.pooled_prompt_embeds, request)
            truncated: tuple[str, ...] = ("",) * len(request.prompts)
        else:
            texts = [edited(pair, editing) for pair in request.composed_pairs]
            states, cut = prompts.encode(
                [text for one in texts for _, text in one], request.clip_skip, reading, loras
            )
            positive = _each(texts, states)
            cut_of_each = iter(next(filter(None, dict(one).values()), "") for one in _each(texts, cut))
            truncated = tuple(
                next(filter(None, [next(cut_of_each) for _ in parts]), "") for parts in request.composed
            )
        negative: list[Edited[PromptState]] = []
        if prompts.guided(request):
            embeds, pooled = given.negative_prompt_embeds, given.negative_pooled_prompt_embeds
            if embeds is not None:
                negative = self._given("negative_prompt_embeds", embeds, pooled, request)
            else:
                texts = [edited(pair, editing) for pair in request.negative_pairs]
                states = prompts.encode_negative([text for one in texts for _, text in one], reading, loras)
                negative = _each(texts, states)
        both = [*positive, *negative]
        alike = _each(both, prompts.alike([state for one in both for _, state in one]))
        return alike[: len(positive)], alike[len(positive) :], truncated

    def _given(
        self, name: str, embeds: torch.Tensor, pooled: torch.Tensor | None, request: Request
    ) -> list[Edited[PromptState]]:
        loras = LoraScales.of(self.engine.manifest.model, request)
        state = self.prompts.from_embeds(name, embeds, pooled, len(request.prompts), loras)
        return [[(0, line)] for line in state.lines]

    def _told(
        self,
        prompts: Sequence[Edited[PromptState]],
        plan: Schedule,
        request: Request,
        sizes: Sequence[float],
    ) -> list[Conditioning]:
        """What the U-Net is told of each prompt."""
        states = joined([state for one in prompts for _, state in one])
        told = _each(prompts, self.prompts.conditionings(states, plan, request, sizes))
        return [told_in_turn(one) for one in told]

    def _rows(
        self,
        request: Request,
        given: Given,
        plan: Schedule,
        positive: Sequence[Edited[PromptState]],
        negative: Sequence[Edited[PromptState]],
    ) -> list[Row]:
        model = self.engine.manifest.model
        noise = self._noise(request, given, plan)
        start = self._start(request, given, plan, noise)
        sizes, away = self.told_sizes(request, over=given.over is not None)
        told = self._told(positive, plan, request, sizes)
        told_negative = self._told(negative, plan, request, away) if negative else []
        if model.ip_adapters:
            told, told_negative = self.images.tell(request, given.ip_adapter_images, told, told_negative)
        control = None if given.control is None else embedded(self.engine, given.control)
        if control is not None:
            # diffusers takes the shares of all steps, those after denoising_end among them
            whole = self.schedule_of(request.model_copy(update={"denoising_end": None}))
            told = with_scales(told, scales(request, len(whole), model)[: len(plan)])
            away_scales = scales(request, len(whole), model, away=True)[: len(plan)]
            told_negative = with_scales(told_negative, away_scales)
        if model.loras:  # behind those of ControlNets
            by_step = [LoraScales.of(model, request).unet] * len(plan)
            told, told_negative = with_scales(told, by_step), with_scales(told_negative, by_step)
        perturbed: list[Conditioning] = []
        if model.pag:  # behind those of LoRAs
            if request.pag_scale:
                perturbed = told_of(told, len(plan), perturbed=True)
            told = told_of(told, len(plan), perturbed=False)
            told_negative = told_of(told_negative, len(plan), perturbed=False)
        guides = _guides(request, told, told_negative, perturbed, scale_of(request, plan))
        # without negative prompts, there is still something to be guided away from
        away_from_each, rows = told_negative or perturbed, []
        for i in range(request.images):
            prompt = i // request.num_images_per_prompt
            beside = away_beside = None if start.beside is None else start.beside[i]
            if beside is not None and request.image_guidance_scale is not None:
                away_beside = torch.zeros_like(beside)  # away from no image, too
            first, *further = (replace(one, told=replace(one.told, beside=beside)) for one in guides[prompt])
            rows.append(
                Row(
                    schedule=plan,
                    latents=start.latents[i],
                    positive=first.told,
                    negative=replace(away_from_each[prompt], beside=away_beside) if away_from_each else None,
                    guidance=first.weight,
                    noise=noise.of_row(i),
                    guidance_rescale=request.guidance_rescale if told_negative else 0.0,
                    guided=request.guided(len(plan)),
                    cache_interval=request.cache_interval,
                    keep=start.keeps[i],
                    control=None if control is None else control[i % len(control)],
                    further=further,
                )
            )
        return rows

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        model = self.engine.manifest.model
        factor = model.vae_scale_factor
        return model.latent_channels, request.height // factor, request.width // factor

    def _noise(self, request: Request, given: Given, plan: Schedule) -> NoiseSource:
        own, shape = self._first_noise(request, given, plan), self._latent_shape(request)
        first: OwnNoise | SharedNoise | VariedNoise = own
        if request.varied:
            check_seeded(request, given)
            first = varied(own, request, shape, self.engine.manifest.model)
        if plan.brownian is None:
            return first
        return BrownianNoise(first, plan.brownian, shape, request.images, self.device)

    def _first_noise(self, request: Request, given: Given, plan: Schedule) -> OwnNoise | SharedNoise:
        shape, source = self._latent_shape(request), given.generators
        if source is None:
            draws = int(plan.draws_noise.sum()) if plan.brownian is None else 0
            return OwnNoise([generator(seed) for seed in request.seeds], shape, ahead=draws)
        if isinstance(source, torch.Generator):
            return SharedNoise(source, request.images, shape)
        if not isinstance(source, Sequence) or not all(isinstance(one, torch.Generator) for one in source):
            raise RequestError(f"generator: {source!r:.60} is not a torch.Generator, nor a list of them")
        if len(source) != request.images:
            raise RequestError(f"{len(source)} generators for {request.images} pictures; give one for each")
        return OwnNoise(source, shape) if len(source) > 1 else SharedNoise(source[0], 1, shape)

    def _start(self, request: Request, given: Given, plan: Schedule, noise: NoiseSource) -> Start:
        if given.over is not None and not self.engine.manifest.model.instructed:
            seeded = given.seeded or given.generators is None
            return start_over(self.engine, request, plan, noise, given.over, seeded=seeded)
        if given.latents is not None:
            check_tensor("latents", given.latents, (request.images, *self._latent_shape(request)))
        unit = noise.initial() if given.latents is None else given.latents
        unit = unit.to(self.device, torch.float32)
        beside = edited_latents(self.engine, request, given.over) if given.over is not None else None
        return Start(unit * plan.init_noise_sigma, [None] * request.images, beside)


def _each(like: Sequence[Edited[Any]], values: Sequence[T]) -> list[Edited[T]]:
    """The values in place of those that there are, at the same steps."""
    several = iter(values)
    return [[(start, next(several)) for start, _ in one] for one in like]


def _guides(
    request: Request,
    told: Sequence[Conditioning],
    negative: Sequence[Conditioning],
    perturbed: Sequence[Conditioning],
    scale: Weight,
) -> list[list[Guide]]:
    """What each prompt's pictures are guided to: what is told of it, or of those that are added up in it.

    Where an image is edited, also what is told of that alone. With t for the image and a prompt, and i for
    the image, the output is negative + guidance · Σ weight · (t − i) + image guidance · (i − negative).
    perturbed: what is told of each prompt, to guide away from by `scale`, see `sdfast.pag`; without negative
    prompts these are in their place.
    """
    several, guides = iter(told), []
    for prompt, parts in enumerate(request.composed):
        if perturbed:
            weight = parts[0][1] * request.guidance_scale if negative else 1.0
            both = away_from(perturbed[prompt], next(several), weight, scale)
            guides.append(both if negative else both[:1])
            continue
        weights = [weight * request.guidance_scale for _, weight in parts]
        own = [Guide(next(several), weight) for weight in weights]
        if request.image_guidance_scale is not None and negative:
            own.append(Guide(negative[prompt], request.image_guidance_scale - sum(weights)))
        guides.append(own)
    return guides


def varied(
    own: OwnNoise | SharedNoise, request: Request, shape: tuple[int, int, int], model: Model
) -> VariedNoise:
    """The noise of a request's pictures, (C, h, w) each, as its variations have it."""
    placed, others = None, None
    if request.seed_resize_from is not None:
        height, width = (side // model.vae_scale_factor for side in request.seed_resize_from)
        if (height, width) != shape[1:]:
            shape = (shape[0], height, width)
            placed = OwnNoise([generator(seed) for seed in request.seeds], shape)
    if request.variation_strength:
        others = OwnNoise([generator(seed) for seed in request.variation_seeds], shape)
    return VariedNoise(own, placed, others, request.variation_strength)


def check_seeded(request: Request, given: Given) -> None:
    """Raises `RequestError` for a variation of noise that is not the request's seeds'."""
    name = "variation_strength" if request.variation_strength else "seed_resize_from"
    if given.latents is not None:
        raise RequestError(f"{name}: is for noise by seeds, and the first latents are given; leave one out")
    source = given.generators
    if source is None:
        return
    several = [source] if isinstance(source, torch.Generator) else list(source)
    if [one.initial_seed() for one in several] != list(request.seeds):
        raise RequestError(f"{name}: is for noise by seeds; give seed in place of generator")


def check_channels(model: Model, masked: bool) -> None:
    """Raises `RequestError` for a U-Net that needs more than there is: noise, a prompt, perhaps a mask."""
    if model.in_channels == model.latent_channels or model.instructed or (masked and model.inpaints):
        return
    if model.inpaints:
        raise RequestError(
            f"this U-Net takes {model.in_channels} channels (inpainting): give it an image and a mask; "
            "without, take one that takes the latents alone"
        )
    raise RequestError(
        f"this U-Net takes {model.in_channels} channels, {model.latent_channels} of latents and others that "
        "sdfast does not know; take a checkpoint for text to image, for inpainting, or of InstructPix2Pix "
        "(and if this is one, export it again)"
    )


def check_instructed(model: Model, request: Request, *, over: bool, masked: bool) -> None:
    """Raises `RequestError` for an InstructPix2Pix U-Net without an image or with a mask, and for its
    guidance where there is none."""
    if model.instructed and not over:
        raise RequestError(
            "image: is missing; this engine's U-Net (InstructPix2Pix) edits an image as the prompt says: "
            "give it one"
        )
    if model.instructed and masked:
        raise RequestError(
            "mask_image: this engine's U-Net (InstructPix2Pix) edits whole images; leave it out"
        )
    if model.instructed != (request.image_guidance_scale is not None):
        raise RequestError(
            "strength: this engine's U-Net (InstructPix2Pix) draws from noise, and is told the image; give "
            "image_guidance_scale in its place"
            if model.instructed
            else "image_guidance_scale: only engines of InstructPix2Pix have a use for it; leave it out"
        )


def check_refined(model: Model, *, over: bool) -> None:
    """Raises `RequestError` for an SDXL refiner without anything to refine."""
    if model.scored and not over:
        raise RequestError(
            "image: is missing; this engine is SDXL's refiner, which goes on with a picture: give it one, or "
            "the latents that the base left with denoising_end and output_type='latent'"
        )


def check_cached(model: Model, request: Request) -> None:
    """Raises `RequestError` for step caching where the engine has no shallow steps."""
    if request.cache_interval > 1 and model.step_cache is None:
        raise RequestError(
            f"cache_interval: {request.cache_interval}, but this engine was exported without shallow steps; "
            "leave it out, or export one with `sdfast export SOURCE -o DIR --cache-branch 0`"
        )
