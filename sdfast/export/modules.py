"""The modules of an engine: what each one computes, from which weights, on which inputs, in which sizes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdfast.engine import DTYPES
from sdfast.errors import CheckpointError, ExportError
from sdfast.export.ip_adapter import IPAdapterSource
from sdfast.export.loading import UNetParts, VAEHalves, load_image_model, load_text_encoder
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.manifest import (
    CHUNK,
    CONTROL,
    IMAGE_ENCODER,
    ONE_CHUNK,
    SHALLOW,
    HalfRange,
    Model,
    Span,
    Variant,
)
from sdfast.models.config import adapter_names, controlnet_names
from sdfast.models.controlnet import (
    ControlEmbedding,
    ControlEmbeddings,
    load_embedding,
)
from sdfast.models.ip_adapter import ImageContext, ImageEncoder, load_image_context
from sdfast.models.text import TextEncoder
from sdfast.models.vae import TINY, has_encoder
from sdfast.request import MAX_STEPS

ONE = Span.exactly(1)


@dataclass(frozen=True)
class Form:
    """One form to compile a module in: its batch, the picture's height and width in pixels, and the tokens of
    the prompts that it is told of."""

    batch: Span
    height: Span | None = None
    width: Span | None = None
    tokens: Span = ONE_CHUNK


@dataclass(frozen=True)
class ModuleSpec:
    """One module to be compiled.

    load: builds the network on its weights; called when its turn comes, so that one is in memory at a time.
    inputs: example inputs for (batch, height, width in pixels, tokens).
    free: the axes of each input that follow the batch, height, width or tokens.
    components: the checkpoint's components that it is made of; its ControlNets are named as some, too.
    fp8: names of its layers that are in FP8. fp8_convolutions: of its 3×3 convolutions that a compiler puts
    into FP8 too, where it measures that they are faster so. int8: names of its layers that are in INT8.
    half_range: how a half of the VAE fits float16; known once it was loaded, None of all else.
    """

    name: str
    load: Callable[[], nn.Module]
    inputs: Callable[[int, int, int, int], dict[str, Tensor]]
    free: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    components: tuple[str, ...]
    forms: tuple[Form, ...]
    fp8: tuple[str, ...] = ()
    fp8_convolutions: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    half_range: Callable[[], HalfRange | None] = lambda: None


class Compiled(NamedTuple):
    """What a module was compiled to. fp8: names of its layers that are in FP8."""

    variants: list[Variant]
    fp8: tuple[str, ...] = ()


def module_specs(networks: Networks, recipe: Recipe) -> list[ModuleSpec]:
    """Every module of an engine of `recipe`, in the order in which they are built: the largest first."""
    model, dtype = networks.model(), DTYPES[recipe.dtype]
    sizes = recipe.size_spans(networks.default_side)
    _check_sizes(sizes, networks.factor)
    int8 = networks.int8() if recipe.int8 else ()
    load = UNetParts(networks, dtype, *_in_fp8(networks, recipe), int8)
    batches = recipe.unet_batches((3,) if model.instructed else (2, 3) if model.pag else (2,))
    steps = model, load, dtype, batches, sizes, recipe.prompt_lengths()
    vae = VAEHalves(networks, half=dtype == torch.float16 and recipe.vae_dtype == "auto")
    return [
        _unet(*steps),
        *_shallow(recipe.backend, *steps),
        _context(networks, model, load, dtype),
        _time_shift(networks, model, load, dtype),
        *_control_embedding(networks, dtype, sizes),
        *_image_contexts(networks, dtype),
        *_image_encoder(networks, dtype),
        _vae_decoder(vae, model, sizes),
        *_vae_encoder(vae, networks, sizes),
        *(_text_encoder(networks, name, dtype) for name in networks.text),
    ]


def _in_fp8(networks: Networks, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers of the U-Net that are in FP8, and the convolutions that are where they are faster so. Eager
    engines measure nothing: theirs are."""
    if not recipe.fp8:
        return (), ()
    linear, convolutions = networks.fp8(), networks.fp8_convolutions()
    return ((*linear, *convolutions), ()) if recipe.backend == "eager" else (linear, convolutions)


def _unet(
    model: Model,
    load: UNetParts,
    dtype: torch.dtype,
    batches: list[Span],
    sizes: list[tuple[Span, Span]],
    lengths: list[Span],
) -> ModuleSpec:
    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        factor = model.vae_scale_factor
        size = (height // factor, width // factor)
        given = {
            "sample": torch.randn(batch, model.in_channels, *size, dtype=dtype),
            "time_shift": torch.randn(batch, model.time_shift_width, dtype=dtype),
            "context": torch.randn(batch, tokens, model.context_width, dtype=dtype),
        }
        if model.control_channels is not None:
            given["control"] = torch.randn(batch, model.control_channels, *size, dtype=dtype)
        if model.ip_adapters:
            given["image_context"] = torch.randn(batch, *model.image_context, dtype=dtype)
        return given

    free = {"sample": _IMAGE, "time_shift": {0: "batch"}, "context": {0: "batch", 1: "tokens"}}
    if model.controlled:
        free["control"] = _IMAGE
    if model.ip_adapters:
        free["image_context"] = {0: "batch"}
    forms = tuple(
        Form(batch, height, width, tokens)
        for height, width in sizes
        for batch in batches
        for tokens in lengths
    )
    outputs = ("output", "deep") if model.step_cache else ("output",)
    return ModuleSpec(
        "unet",
        load.unet,
        inputs,
        free,
        outputs,
        load.components,
        forms,
        load.fp8,
        load.fp8_convolutions,
        load.int8,
    )


_IMAGE: Mapping[int, str] = {0: "batch", 2: "height", 3: "width"}


def _shallow(
    backend: str,
    model: Model,
    load: UNetParts,
    dtype: torch.dtype,
    batches: list[Span],
    sizes: list[tuple[Span, Span]],
    lengths: list[Span],
) -> Iterator[ModuleSpec]:
    """The shallow steps, in the forms of the whole ones; none without a cache branch."""
    whole, cache = _unet(model, load, dtype, batches, sizes, lengths), model.step_cache
    if cache is None:
        return
    if cache.scale > 1 and backend != "eager" and not all(side.fixed for size in sizes for side in size):
        raise ExportError(
            f"cache_branch: {cache.branch} keeps a feature that is smaller than the latents, which cannot be "
            "compiled for a range of sizes; give the sizes as a list, or take a lower branch"
        )

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        given = whole.inputs(batch, height, width, tokens)
        deep = cache.shape(*given["sample"].shape[2:])
        return {**given, "deep": torch.randn(batch, *deep, dtype=dtype)}

    free = {**whole.free, "deep": _IMAGE if cache.scale == 1 else {0: "batch"}}
    yield replace(
        whole,
        name=SHALLOW,
        load=lambda: load.shallow(cache.branch),
        inputs=inputs,
        free=free,
        outputs=("output",),
        fp8=load.of_shallow(cache.branch, load.fp8),
        fp8_convolutions=load.of_shallow(cache.branch, load.fp8_convolutions),
        int8=load.of_shallow(cache.branch, load.int8),
    )


def _context(networks: Networks, model: Model, load: UNetParts, dtype: torch.dtype) -> ModuleSpec:
    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        hidden = torch.randn(batch, CHUNK, model.text_width, dtype=dtype)
        return {"hidden_states": hidden, **_lora_scales(networks, "context", batch)}

    return ModuleSpec("context", load.context, inputs, {}, ("context",), load.components, (Form(ONE),))


def _lora_scales(networks: Networks, module: str, batch: int) -> dict[str, Tensor]:
    """The input that tells a module how much of each LoRA is added; none where they change nothing in it."""
    if not networks.takes_loras(module):
        return {}
    return {"loras": torch.rand(batch, len(networks.checkpoint.chosen))}


def _time_shift(networks: Networks, model: Model, load: UNetParts, dtype: torch.dtype) -> ModuleSpec:
    widths = {
        "text_embeds": (model.pooled_width, dtype),
        "time_ids": (model.time_ids if model.pooled_width else None, torch.float32),
        "timestep_cond": (networks.unet.time_cond_proj_dim, dtype),
    }
    conditions = {name: (width, kind) for name, (width, kind) in widths.items() if width}

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        given = {"timesteps": torch.linspace(0, 999, batch)}
        for name, (size, kind) in conditions.items():
            given[name] = torch.rand(batch, size).to(kind)
        return {**given, **_lora_scales(networks, "time_shift", batch)}

    free = {name: {0: "batch"} for name in inputs(1, 0, 0, 0)}
    form = Form(Span(low=1, high=MAX_STEPS))
    return ModuleSpec("time_shift", load.time_shift, inputs, free, ("time_shift",), load.components, (form,))


def _control_embedding(
    networks: Networks, dtype: torch.dtype, sizes: list[tuple[Span, Span]]
) -> Iterator[ModuleSpec]:
    """One for all ControlNets, or none where there are none."""
    configs, added = networks.controlnets, networks.checkpoint.controlnets
    if not configs:
        return

    def load() -> ControlEmbedding | ControlEmbeddings:
        return load_embedding(configs, [one.state_dict() for one in added], dtype)

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"image": torch.rand(batch, 3 * len(configs), height, width, dtype=dtype)}

    free = {"image": {2: "height", 3: "width"}}
    forms = tuple(Form(ONE, height, width) for height, width in sizes)
    names = tuple(controlnet_names(len(configs)))
    yield ModuleSpec(CONTROL, load, inputs, free, ("control",), names, forms)


def _image_contexts(networks: Networks, dtype: torch.dtype) -> Iterator[ModuleSpec]:
    """One for each IP-Adapter."""
    encoder, adapters = networks.checkpoint.image_encoder, networks.checkpoint.ip_adapters
    if encoder is not None:
        for name, adapter in zip(adapter_names(len(adapters)), adapters, strict=True):
            yield _image_context(networks, name, adapter, encoder.parts, dtype)


def _image_context(
    networks: Networks, name: str, adapter: IPAdapterSource, parts: int, dtype: torch.dtype
) -> ModuleSpec:
    """parts: that the image encoder sees in an image."""
    config = adapter.config

    def load() -> ImageContext:
        return load_image_context(config, networks.unet, adapter.state_dict(), dtype)

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        seen = (parts,) if config.reads == "hidden_states" else ()
        return {"image": torch.randn(batch, *seen, config.inputs, dtype=dtype)}

    return ModuleSpec(name, load, inputs, {}, ("image_context",), (name, "unet"), (Form(ONE),))


def _image_encoder(networks: Networks, dtype: torch.dtype) -> Iterator[ModuleSpec]:
    """One, or none where there are no IP-Adapters."""
    encoder = networks.checkpoint.image_encoder
    if encoder is None:
        return
    side = encoder.processor.crop

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch, 3, side, side, dtype=dtype)}

    def load() -> ImageEncoder:
        return ImageEncoder(load_image_model(encoder, dtype))

    outputs = ("image_embeds", "hidden_states")
    yield ModuleSpec(IMAGE_ENCODER, load, inputs, {}, outputs, (IMAGE_ENCODER,), (Form(ONE),))


def _vae_decoder(vae: VAEHalves, model: Model, sizes: list[tuple[Span, Span]]) -> ModuleSpec:
    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        factor = model.vae_scale_factor
        shape = (batch, model.latent_channels, height // factor, width // factor)
        return {"latents": torch.randn(shape)}

    free = {"latents": {2: "height", 3: "width"}}
    # One picture at a time: a batch of them takes more memory and no less time.
    forms = tuple(Form(ONE, height, width) for height, width in sizes)
    return ModuleSpec(
        "vae_decoder",
        vae.decoder,
        inputs,
        free,
        ("image",),
        ("vae",),
        forms,
        half_range=lambda: vae.decoder_range,
    )


def _vae_encoder(vae: VAEHalves, networks: Networks, sizes: list[tuple[Span, Span]]) -> Iterator[ModuleSpec]:
    """One, or none where the checkpoint's VAE is stored without its encoder."""
    if not has_encoder(networks.checkpoint.state_dict("vae")):
        return

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"image": torch.rand(batch, networks.vae.in_channels, height, width) * 2 - 1}

    free = {"image": {2: "height", 3: "width"}}
    forms = tuple(Form(ONE, height, width) for height, width in sizes)
    tiny = networks.checkpoint.component("vae").class_name == TINY
    yield ModuleSpec(
        "vae_encoder",
        vae.encoder,
        inputs,
        free,
        ("mean",) if tiny else ("mean", "std"),
        ("vae",),
        forms,
        half_range=lambda: vae.encoder_range,
    )


def _text_encoder(networks: Networks, name: str, dtype: torch.dtype) -> ModuleSpec:
    vocabulary = int(networks.checkpoint.components[name].config["vocab_size"])

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (batch, CHUNK))
        return {"input_ids": ids, **_lora_scales(networks, name, batch)}

    def load() -> TextEncoder:
        return load_text_encoder(networks.checkpoint, name, dtype)

    return ModuleSpec(name, load, inputs, {}, ("hidden_states", "text_embeds"), (name,), (Form(ONE),))


def _check_sizes(sizes: list[tuple[Span, Span]], factor: int) -> None:
    for side in (side for pair in sizes for span in pair for side in (span.low, span.high)):
        if side % factor:
            raise CheckpointError(
                f"side {side} is not a multiple of {factor}, which this checkpoint's VAE needs"
            )
