"""Every module of an engine beside its counterpart in the stock pipeline, on the same inputs.

The inputs are real prompts' tokens and what the float32 stock pipeline itself computed on its way to the
pictures, so that the error of one module is not the drift of another.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sdfast.control import embedded
from sdfast.engine import Engine
from sdfast.errors import EngineError
from sdfast.ip_adapter import by_transformer, scaled
from sdfast.manifest import CONTROL
from sdfast.noise import BrownianNoise, NoiseSource, OwnNoise, generator
from sdfast.schedulers import Schedule
from sdfast.validation.metrics import Error, compare
from sdfast.validation.observe import Images, Run, StepInputs, StepOutputs, observed_step
from sdfast.validation.reading import written_out
from sdfast.validation.reference import as_reference, set_loras, tokenizers_of

TIMESTEP_ROUNDING = 1e-3  # float32 of a fractional timestep up to 1000, and the logarithms behind it
Pairs = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stock:
    """The stock pipeline in float32, and, beside an fp16 engine, the stock pipeline in float16."""

    exact: Any
    same: Any | None


@dataclass(frozen=True)
class Measured:
    """The error of one module, and that of the stock pipeline in the same reduced precision.

    `stock` is None where there is none to compare with: in float32, and for what is float32 in any engine.
    stock_dtype: of the stock module, where that is not the engine's own.
    """

    name: str
    what: str
    error: Error
    stock: Error | None = None
    stock_dtype: str | None = None


def measure(
    engine: Engine, stock: Stock, prompts: Sequence[str], runs: Sequence[Run], steps: Sequence[StepInputs]
) -> list[Measured]:
    """The networks of `engine`, each alone, and a U-Net step as a whole.

    runs: of `stock.exact`; their last latents are the VAE decoder's inputs, and their pictures the encoder's.
    steps: the U-Net's, all with the same LoRAs.
    """
    size = runs[0].image.shape[1:]
    for pipe in (stock.exact, stock.same):
        if pipe is not None:
            set_loras(pipe, steps[0].loras)
    return [
        *_text_encoders(engine, stock, prompts, steps[0].loras),
        *_unet(engine, stock, steps, size[0], size[1]),
        _vae_decoder(engine, stock, runs),
        *([_vae_encoder(engine, stock, runs)] if engine.manifest.edits else []),
    ]


# ---------------------------------------------------------------- text


def token_ids(pipe: Any, index: int, prompts: Sequence[str]) -> Tensor:
    """The ids [n, 77] of `prompts` by the pipeline's own tokenizer, the first or the second that it has."""
    tokenizer = tokenizers_of(pipe)[index]
    given = tokenizer(
        [written_out(pipe, tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = given.input_ids
    return ids


Loras = Mapping[str, tuple[float, float]]
"""As those of `StepInputs`."""


def lora_scales(engine: Engine, loras: Loras, module: str, rows: int) -> dict[str, Tensor]:
    """What tells a module outside of the loop of LoRAs; nothing where they change none of its layers."""
    if "loras" not in engine.manifest.modules[module].inputs:
        return {}
    part = 0 if module in engine.manifest.text_encoders else 1
    scales = [loras[name][part] for name in engine.manifest.model.loras]
    return {"loras": torch.tensor([scales] * rows, device=engine.device)}


def _text_encoders(engine: Engine, stock: Stock, prompts: Sequence[str], loras: Loras) -> Iterator[Measured]:
    for index, name in enumerate(engine.manifest.text_encoders):
        ids = token_ids(stock.exact, index, prompts)
        truth = _text_states(stock.exact, name, ids)
        same = None if stock.same is None else _text_states(stock.same, name, ids)
        told = lora_scales(engine, loras, name, len(ids))
        given = engine.call(name, {"input_ids": ids.to(engine.device), **told})
        if engine.manifest.checkpoint.graphs is not None:  # they may have the last layers alone
            layers = given["hidden_states"].shape[1]
            truth["hidden_states"] = truth["hidden_states"][:, -layers:]
        for output, what in _used_outputs(stock.exact, name):
            value = shaped(name, given[output], truth[output])
            error = compare(zip(value, truth[output], strict=True))
            own = None if same is None else compare(zip(same[output], truth[output], strict=True))
            yield Measured(f"{name}.{output}", what, error, own)


def _used_outputs(pipe: Any, name: str) -> list[tuple[str, str]]:
    """The outputs that the pipeline uses, with what they are: SDXL alone takes one encoder's pooled one."""
    used = [("hidden_states", "every layer")]
    if name == "text_encoder_2" and hasattr(pipe, "text_encoder_2"):
        used.append(("text_embeds", "the prompt as a whole"))
    return used


@as_reference()
def _text_states(pipe: Any, name: str, ids: Tensor) -> dict[str, Tensor]:
    """Every hidden state [n, layers + 1, 77, D], as the pipeline would use it, and the pooled one [n, P]."""
    model = getattr(pipe, name)
    output = model(ids.to(model.device), output_hidden_states=True)
    states = torch.stack(output.hidden_states, dim=1)
    if not hasattr(
        pipe, "text_encoder_2"
    ):  # SD finishes whichever layer it takes by the last norm; SDXL does not
        norm = next(part for path, part in model.named_modules() if path.endswith("final_layer_norm"))
        states = norm(states)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return {"hidden_states": states, "text_embeds": pooled}


# ---------------------------------------------------------------- U-Net


def _unet(
    engine: Engine, stock: Stock, steps: Sequence[StepInputs], height: int, width: int
) -> Iterator[Measured]:
    truths = [observed_step(stock.exact, step) for step in steps]
    same = None if stock.same is None else [observed_step(stock.same, step) for step in steps]

    def error_of(values: Sequence[Tensor], part: Callable[[StepOutputs], Tensor], name: str) -> Error:
        return compare(
            (shaped(name, value, part(truth)), part(truth))
            for value, truth in zip(values, truths, strict=True)
        )

    def measured(
        name: str, what: str, values: list[Tensor], part: Callable[[StepOutputs], Tensor]
    ) -> Measured:
        own = None if same is None else error_of([part(outputs) for outputs in same], part, name)
        return Measured(name, what, error_of(values, part, name), own)

    contexts = [_context(engine, step) for step in steps]
    shifts = [_time_shift(engine, step) for step in steps]
    controls = [_control(engine, step) for step in steps]
    images = [image_contexts(engine, step) for step in steps]
    told = [Told(*parts) for parts in zip(shifts, contexts, controls, images, strict=True)]
    whole = [_output(engine, step, one, height, width) for step, one in zip(steps, told, strict=True)]
    in_one = measured("step", "context + time_shift + unet", whole, lambda outputs: outputs.output)
    if engine.manifest.checkpoint.graphs is not None:  # their U-Net has the conditioning inside
        yield in_one
        return
    stocks = [Told(one.time_shift, one.context, one.control, one.image_contexts) for one in truths]
    alone = [_output(engine, step, one, height, width) for step, one in zip(steps, stocks, strict=True)]
    own_controls = [control for control in controls if control is not None]
    yield measured("context", "keys and values of the prompt", contexts, lambda outputs: outputs.context)
    yield measured("time_shift", "time projections", shifts, lambda outputs: outputs.time_shift)
    if own_controls:
        what = "the embedded control image"
        yield measured(CONTROL, what, own_controls, lambda outputs: cast(Tensor, outputs.control))
    for number, adapter in enumerate(engine.manifest.model.ip_adapters):
        yield measured(
            adapter.module,
            "keys and values of an image",
            [one[number] for one in images],
            lambda outputs, number=number: outputs.image_contexts[number],  # type: ignore[misc]
        )
    yield measured("unet", "on the reference's context and shifts", alone, lambda outputs: outputs.output)
    yield in_one


def _context(engine: Engine, step: StepInputs) -> Tensor:
    hidden = step.hidden_states.to(engine.device, engine.dtype)
    told = lora_scales(engine, step.loras, "context", len(hidden))
    return engine.call("context", {"hidden_states": hidden, **told})["context"]


def _time_shift(engine: Engine, step: StepInputs) -> Tensor:
    inputs = {"timesteps": torch.full((len(step.sample),), step.timestep, dtype=torch.float32)}
    for name, value in step.conditions.items():
        inputs[name] = value.to(dtype=torch.float32 if name == "time_ids" else engine.dtype)
    inputs |= lora_scales(engine, step.loras, "time_shift", len(step.sample))
    inputs = {name: value.to(engine.device) for name, value in inputs.items()}
    return engine.call("time_shift", inputs)["time_shift"]


def _control(engine: Engine, step: StepInputs) -> Tensor | None:
    return None if step.control is None else embedded(engine, step.control.image)


def image_contexts(engine: Engine, step: StepInputs) -> tuple[Tensor, ...]:
    """Of the image of each IP-Adapter, of what stock's own encoder saw in it."""
    if step.images is None:
        return ()
    named = zip(engine.manifest.model.ip_adapters, step.images.embeds, strict=True)
    return tuple(
        engine.call(adapter.module, as_inputs(engine, {"image": embeds.squeeze(1)}))["image_context"]
        for adapter, embeds in named
    )


class Told(NamedTuple):
    """What a U-Net is told of a step: see `StepOutputs`."""

    time_shift: Tensor
    context: Tensor
    control: Tensor | None
    images: Sequence[Tensor]


def _output(engine: Engine, step: StepInputs, told: Told, height: int, width: int) -> Tensor:
    shift = told.time_shift
    tensors = {"sample": step.sample, "time_shift": shift, "context": told.context}
    if step.control is not None and told.control is not None:
        scales = step.control.columns(len(shift)).to(shift)
        tensors |= {"time_shift": torch.cat([shift, scales], dim=1), "control": told.control}
    if step.images is not None:
        tensors["image_context"] = scaled_contexts(engine, step, told.images)
    tensors["time_shift"] = with_last_columns(engine, step, tensors["time_shift"])
    return engine.call("unet", as_inputs(engine, tensors), height, width)["output"]


def with_last_columns(engine: Engine, step: StepInputs, time_shift: Tensor) -> Tensor:
    """The time shifts, and behind them how much of each LoRA is added, and that no row is perturbed."""
    model = engine.manifest.model
    told = [*(step.loras[name][1] for name in model.loras), *([0.0] if model.pag else [])]
    scales = time_shift.new_tensor(told)
    return torch.cat([time_shift, scales.expand(len(time_shift), -1)], dim=1)


def scaled_contexts(engine: Engine, step: StepInputs, images: Sequence[Tensor]) -> Tensor:
    """[B, I, KV], as the U-Net is told them. step: with images."""
    model, scales = engine.manifest.model, cast(Images, step.images).scales
    each = zip(images, scales, strict=True)
    return torch.cat([scaled(one, model, by_transformer(model, scale)) for one, scale in each], dim=1)


def as_inputs(engine: Engine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the engine's dtype, on its device."""
    return {name: value.to(engine.device, engine.dtype) for name, value in tensors.items()}


# ---------------------------------------------------------------- VAE


def _vae_decoder(engine: Engine, stock: Stock, runs: Sequence[Run]) -> Measured:
    latents = [run.latents[-1] for run in runs]
    truths = [run.image for run in runs]
    height, width = truths[0].shape[1:]
    values = [
        engine.call("vae_decoder", {"latents": part.to(engine.device)}, height, width)["image"][0]
        for part in latents
    ]
    error = compare((shaped("vae_decoder", v, t), t) for v, t in zip(values, truths, strict=True))
    own, bfloat = stock_vae_like(engine, stock, "vae_decoder")
    return Measured(
        "vae_decoder",
        "the reference's last latents",
        error,
        None if own is None else compare(zip((_decoded(own, part) for part in latents), truths, strict=True)),
        bfloat,
    )


@as_reference()
def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    """latents [1, C, h, w] → picture [3, H, W] float32, with the stock VAE, upcast where SDXL does that."""
    with _stock_vae(pipe) as vae:
        scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
        image = vae.decode(scaled, return_dict=False)[0]
    picture: Tensor = pipe.image_processor.postprocess(image, output_type="pt")[0]
    return picture.float()


def _vae_encoder(engine: Engine, stock: Stock, runs: Sequence[Run]) -> Measured:
    images = [run.image for run in runs]
    truths = [stock_moments(stock.exact, image) for image in images]
    values = [_moments(engine, image) for image in images]
    error = compare((shaped("vae_encoder", v, t), t) for v, t in zip(values, truths, strict=True))
    own, bfloat = stock_vae_like(engine, stock, "vae_encoder")
    return Measured(
        "vae_encoder",
        "mean and spread of the reference's pictures",
        error,
        None
        if own is None
        else compare(zip((stock_moments(own, image) for image in images), truths, strict=True)),
        bfloat,
    )


def _moments(engine: Engine, image: Tensor) -> Tensor:
    """Picture [3, H, W] in [0, 1] → mean and deviation of its latents [2, 1, C, h, w], the engine's; or of a
    tiny VAE, which has no deviation, [1, 1, C, h, w]."""
    inputs = {"image": (2 * image[None] - 1).to(engine.device)}
    moments = engine.call("vae_encoder", inputs, *image.shape[1:])
    return torch.stack([moments[name] for name in ("mean", "std") if name in moments])


@as_reference()
def stock_moments(pipe: Any, image: Tensor) -> Tensor:
    """The same by the stock VAE of `pipe`, float32."""
    with _stock_vae(pipe) as vae:
        encoded = vae.encode((2 * image[None] - 1).to(vae.device, vae.dtype))
        spread = getattr(encoded, "latent_dist", None)
        parts = [encoded.latents] if spread is None else [spread.mean, spread.std]
        stacked = torch.stack(parts).float()
    return stacked * float(vae.config.scaling_factor)


@dataclass(frozen=True)
class _StockVAE:
    """A stock VAE, and how its pictures are made, in place of a whole pipeline."""

    vae: Any
    image_processor: Any


def stock_vae_like(engine: Engine, stock: Stock, name: str) -> tuple[Any | None, str | None]:
    """What has the stock VAE that half `name` of the engine's is held to, and its dtype if that is another.

    Where stock keeps the VAE in float32 and the engine does not, it is stock's in bfloat16: the half
    precision that stock's can run in. A copy of the float32 one, whose weights have all their digits.
    """
    if stock.same is None or not (_upcasts(stock.same) and _in_half(engine, name)):
        return stock.same, None
    exact = stock.exact
    return _StockVAE(copy.deepcopy(exact.vae).to(torch.bfloat16), exact.image_processor), "bfloat16"


def _in_half(engine: Engine, name: str) -> bool:
    half = engine.manifest.modules[name].half_range
    return half is not None and half.dtype == "fp16"


def _upcasts(pipe: Any) -> bool:
    """Whether the stock pipeline runs its float16 VAE in float32: SDXL's, where it says that it overflows."""
    vae = pipe.vae
    return bool(hasattr(pipe, "text_encoder_2") and vae.config.force_upcast and vae.dtype == torch.float16)


@contextmanager
def _stock_vae(pipe: Any) -> Iterator[Any]:
    """The stock VAE as the pipeline runs it."""
    vae, upcast = pipe.vae, _upcasts(pipe)
    if upcast:
        vae.to(dtype=torch.float32)
    yield vae
    if upcast:
        vae.to(dtype=torch.float16)


# ---------------------------------------------------------------- scheduler


def scheduler_error(name: str, plan: Schedule, runs: Sequence[Run]) -> Measured:
    """The engine's table run on the very model outputs that the stock scheduler was given, noise included.

    The error is without bound where the two do not even take the same timesteps.
    """
    what = f"{len(plan)} evaluations"
    for run in runs:
        if len(run.timesteps) != len(plan) or abs(plan.timesteps - run.timesteps).max() > TIMESTEP_ROUNDING:
            error = Error(len(runs), math.inf, math.inf, math.inf, math.nan)
            return Measured(
                name, f"{what} at other timesteps than the reference's {len(run.timesteps)}", error
            )
    return Measured(name, what, compare(pair for run in runs for pair in replay(plan, run)))


def replay(plan: Schedule, run: Run) -> Pairs:
    """(the table's, the stock scheduler's) latents after each step, and network inputs where known."""
    shape = run.latents[0].shape[1:]
    noise: NoiseSource = (first := OwnNoise([generator(run.seed)], shape))
    if plan.brownian is not None:
        noise = BrownianNoise(first, plan.brownian, shape, 1, torch.device("cpu"))
    registers = torch.zeros(plan.registers, shape.numel(), dtype=torch.float64)
    registers[0] = noise.initial().double().flatten() * plan.init_noise_sigma
    samples = {
        step.index: step.sample[-1, : shape[0]] for step in run.steps
    }  # the latents, of all it is told
    if run.over and run.drawn_around:
        noise.initial()  # of the masked image's latents; or the image's own came first, and then the noise
    if run.over and not run.masked:
        registers[0] = samples[0].double().flatten() / plan.input_scale[0]
    for k, (output, latents) in enumerate(zip(run.outputs, run.latents, strict=True)):
        if k in samples:
            yield registers[0] * plan.input_scale[k], samples[k]
        z = noise.of_row(0)(k).double() if plan.draws_noise[k] else torch.zeros(shape, dtype=torch.float64)
        state = torch.cat([registers, output.double().view(1, -1), z.view(1, -1)])
        registers = torch.from_numpy(plan.matrix[k].copy()) @ state
        yield registers[0], latents


def shaped(name: str, value: Tensor, truth: Tensor) -> Tensor:
    """The value, if it has the shape of the truth."""
    if value.shape != truth.shape:
        raise EngineError(
            f"module {name!r} gives {tuple(value.shape)} where the reference has {tuple(truth.shape)}: "
            "this is not an engine of this checkpoint; export it again"
        )
    return value
