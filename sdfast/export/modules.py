"""The modules of an engine: what each one computes, from which weights, on which inputs, in which sizes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdfast.engine import DTYPES
from sdfast.errors import CheckpointError, ExportError
from sdfast.export.checkpoint import Checkpoint
from sdfast.export.controlnet import ControlNetSource
from sdfast.export.layout import CONTROLNET
from sdfast.export.magnitudes import DoesNotFit, extents, scales_for
from sdfast.export.recipe import Recipe
from sdfast.manifest import CHUNK, CONTROL, ONE_CHUNK, SHALLOW, HalfRange, Model, Span, StepCache
from sdfast.models.controlnet import (
    ControlEmbedding,
    Controlled,
    ControlledContext,
    ControlledTimeShift,
    ControlledUNet,
    ControlNet,
    ControlNetConfig,
    load_controlled,
    load_embedding,
)
from sdfast.models.fp8 import MULTIPLE, convert, fp8_layers
from sdfast.models.half_range import VAE, rescale
from sdfast.models.step_cache import ShallowUNet
from sdfast.models.text import TextEncoder
from sdfast.models.unet import Context, TimeShift, UNet, UNetConfig, load_unet, rungs, skip_levels
from sdfast.models.vae import VAEConfig, VAEDecoder, VAEEncoder, has_encoder, load_vae
from sdfast.request import MAX_STEPS

ONE = Span.exactly(1)
V = TypeVar("V", VAEDecoder, VAEEncoder)


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
    components: the checkpoint's components that it is made of; its ControlNet is named as one, too.
    fp8: names of its layers that are in FP8.
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
    half_range: Callable[[], HalfRange | None] = lambda: None


@dataclass(frozen=True)
class Networks:
    """The configs of a checkpoint's networks."""

    checkpoint: Checkpoint
    unet: UNetConfig
    vae: VAEConfig
    text: tuple[str, ...]  # names of the text encoders
    controlnet: ControlNetConfig | None = None
    step_cache: StepCache | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, cache_branch: int | None = None) -> "Networks":
        """cache_branch: as a recipe's. Raises `ExportError` for one that the U-Net does not have."""
        checkpoint.check_weights()
        parts = checkpoint.components
        unet = UNetConfig.from_diffusers(parts["unet"].config)
        networks = cls(
            checkpoint,
            unet,
            VAEConfig.from_diffusers(parts["vae"].config),
            checkpoint.text_encoders,
            step_cache=None if cache_branch is None else _step_cache(unet, cache_branch),
        )
        return networks if checkpoint.controlnet is None else networks._with(checkpoint.controlnet)

    def _with(self, added: ControlNetSource) -> "Networks":
        """These and a ControlNet's. Raises `CheckpointError` for one that does not fit."""
        try:
            config = ControlNetConfig.from_diffusers(added.component.config)
            config.check_fits(self.unet, self.vae.latent_channels, self.factor)
        except CheckpointError as error:
            raise CheckpointError(f"{added.source}: {error}") from error
        return replace(self, controlnet=config)

    @property
    def factor(self) -> int:
        """Pixels a latent, in each direction."""
        return self.vae.scale

    @property
    def default_side(self) -> int:
        """The side in pixels of the pictures that the checkpoint was trained on."""
        return self.checkpoint.sample_size * self.factor

    def fp8(self) -> tuple[str, ...]:
        """The layers of the U-Net that FP8 is for. Raises `ExportError` when there are none."""
        layers = fp8_layers(self.step())
        if not layers:
            raise ExportError(
                f"fp8: {self.checkpoint.source}: no linear layer of this U-Net has widths that are multiples "
                f"of {MULTIPLE}; leave fp8 out"
            )
        return layers

    def step(self) -> UNet | ControlledUNet:
        """The network of a step, without weights."""
        with torch.device("meta"):
            unet = UNet(self.unet, self.step_cache.branch if self.step_cache else None)
            return (
                unet
                if self.controlnet is None
                else ControlledUNet(unet, ControlNet(self.controlnet.way_down))
            )

    def model(self) -> Model:
        """What the manifest says of the networks."""
        step = self.step()
        widths = [int(self.checkpoint.components[name].config["hidden_size"]) for name in self.text]
        return Model(
            family=self.checkpoint.family,
            in_channels=self.unet.in_channels,
            latent_channels=self.vae.latent_channels,
            vae_scale_factor=self.factor,
            default_height=self.default_side,
            default_width=self.default_side,
            text_width=sum(widths),
            context_width=sum(step.context_widths),
            time_shift_width=sum(step.shift_widths),
            control_channels=self.controlnet.channels if self.controlnet else None,
            pooled_width=self.unet.pooled_dim,
            guidance_embedding=self.unet.time_cond_proj_dim,
            zero_empty_negative=self.checkpoint.zero_empty_negative,
            step_cache=self.step_cache,
        )


def _step_cache(unet: UNetConfig, branch: int) -> StepCache:
    skips = rungs(unet)
    if branch >= len(skips):
        raise ExportError(
            f"cache_branch: {branch}, but this U-Net has branches 0 to {len(skips) - 1}; 0 is the usual one"
        )
    return StepCache(branch=branch, channels=skips[branch].channels, scale=2 ** skip_levels(unet)[branch])


def module_specs(networks: Networks, recipe: Recipe) -> list[ModuleSpec]:
    """Every module of an engine of `recipe`, in the order in which they are built: the largest first."""
    model, dtype = networks.model(), DTYPES[recipe.dtype]
    sizes = recipe.size_spans(networks.default_side)
    _check_sizes(sizes, networks.factor)
    load = _UNetParts(networks, dtype, networks.fp8() if recipe.fp8 else ())
    steps = model, load, dtype, recipe.unet_batches(), sizes, recipe.prompt_lengths()
    vae = _VAEHalves(networks, half=dtype == torch.float16 and recipe.vae == "auto")
    return [
        _unet(*steps),
        *_shallow(recipe.backend, *steps),
        _context(model, load, dtype),
        _time_shift(networks.unet, model, load, dtype),
        *_control_embedding(networks, dtype, sizes),
        _vae_decoder(vae, model, sizes),
        *_vae_encoder(vae, networks, sizes),
        *(_text_encoder(networks, name, dtype) for name in networks.text),
    ]


class _UNetParts:
    """The modules that the weights of a U-Net, and of its ControlNet, are dealt out to, loaded one at a time.

    components: which of the two there are.
    """

    def __init__(self, networks: Networks, dtype: torch.dtype, fp8: tuple[str, ...]) -> None:
        self._networks = networks
        self._dtype = dtype
        self.fp8 = fp8
        self.components = ("unet", CONTROLNET) if networks.controlnet else ("unet",)

    def _load(self) -> tuple[UNet, TimeShift, Context] | Controlled:
        unet, added = self._networks.unet, self._networks.checkpoint.controlnet
        weights = self._networks.checkpoint.state_dict("unet")
        if self._networks.controlnet is None or added is None:
            cache = self._networks.step_cache
            return load_unet(unet, weights, self._dtype, cache.branch if cache else None)
        return load_controlled(unet, weights, self._networks.controlnet, added.state_dict(), self._dtype)

    def unet(self) -> UNet | ControlledUNet:
        return convert(self._load()[0], self.fp8)

    def shallow(self, branch: int) -> ShallowUNet:
        weights = self._networks.checkpoint.state_dict("unet")
        unet = load_unet(self._networks.unet, weights, self._dtype)[0]
        return convert(ShallowUNet.of(unet, branch), self.shallow_fp8(branch))

    def shallow_fp8(self, branch: int) -> tuple[str, ...]:
        """Of the layers in FP8 those that shallow steps have."""
        with torch.device("meta"):
            own = {name for name, _ in ShallowUNet(self._networks.unet, branch).named_modules()}
        return tuple(name for name in self.fp8 if name in own)

    def time_shift(self) -> TimeShift | ControlledTimeShift:
        return self._load()[1]

    def context(self) -> Context | ControlledContext:
        return self._load()[2]


def _unet(
    model: Model,
    load: _UNetParts,
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
        return given

    free = {"sample": _IMAGE, "time_shift": {0: "batch"}, "context": {0: "batch", 1: "tokens"}}
    if model.controlled:
        free["control"] = _IMAGE
    forms = tuple(
        Form(batch, height, width, tokens)
        for height, width in sizes
        for batch in batches
        for tokens in lengths
    )
    outputs = ("output", "deep") if model.step_cache else ("output",)
    return ModuleSpec("unet", load.unet, inputs, free, outputs, load.components, forms, load.fp8)


_IMAGE: Mapping[int, str] = {0: "batch", 2: "height", 3: "width"}


def _shallow(
    backend: str,
    model: Model,
    load: _UNetParts,
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
        fp8=load.shallow_fp8(cache.branch),
    )


def _context(model: Model, load: _UNetParts, dtype: torch.dtype) -> ModuleSpec:
    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"hidden_states": torch.randn(batch, CHUNK, model.text_width, dtype=dtype)}

    return ModuleSpec("context", load.context, inputs, {}, ("context",), load.components, (Form(ONE),))


def _time_shift(config: UNetConfig, model: Model, load: _UNetParts, dtype: torch.dtype) -> ModuleSpec:
    widths = {
        "text_embeds": (model.pooled_width, dtype),
        "time_ids": (6 if model.pooled_width else None, torch.float32),
        "timestep_cond": (config.time_cond_proj_dim, dtype),
    }
    conditions = {name: (width, kind) for name, (width, kind) in widths.items() if width}

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        given = {"timesteps": torch.linspace(0, 999, batch)}
        for name, (size, kind) in conditions.items():
            given[name] = torch.rand(batch, size).to(kind)
        return given

    free = {name: {0: "batch"} for name in ("timesteps", *conditions)}
    form = Form(Span(low=1, high=MAX_STEPS))
    return ModuleSpec("time_shift", load.time_shift, inputs, free, ("time_shift",), load.components, (form,))


def _control_embedding(
    networks: Networks, dtype: torch.dtype, sizes: list[tuple[Span, Span]]
) -> Iterator[ModuleSpec]:
    """One, or none where there is no ControlNet."""
    config, added = networks.controlnet, networks.checkpoint.controlnet
    if config is None or added is None:
        return

    def load() -> ControlEmbedding:
        return load_embedding(config, added.state_dict(), dtype)

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"image": torch.rand(batch, 3, height, width, dtype=dtype)}

    free = {"image": {2: "height", 3: "width"}}
    forms = tuple(Form(ONE, height, width) for height, width in sizes)
    yield ModuleSpec(CONTROL, load, inputs, free, ("control",), (CONTROLNET,), forms)


class _VAEHalves:
    """The two modules that a VAE's weights are dealt out to, loaded one at a time.

    half: in float16, where that can hold their numbers.
    """

    def __init__(self, networks: Networks, half: bool) -> None:
        self._networks = networks
        self._half = half
        self._found: dict[type[VAE], HalfRange] = {}

    def decoder(self) -> VAEDecoder:
        return self._fitted(self._load()[0])

    def encoder(self) -> VAEEncoder:
        encoder = self._load()[1]
        if encoder is None:
            source = self._networks.checkpoint.source
            raise CheckpointError(f"{source}: its VAE's encoder is not there any more")
        return self._fitted(encoder)

    def range_of(self, kind: type[VAE]) -> HalfRange | None:
        return self._found.get(kind)

    def _load(self) -> tuple[VAEDecoder, VAEEncoder | None]:
        return load_vae(self._networks.vae, self._networks.checkpoint.state_dict("vae"), torch.float32)

    def _fitted(self, vae: V) -> V:
        """The network in float16 if that holds it, else as it is."""
        if not self._half:
            return vae
        found = extents(vae)
        try:
            scales = scales_for(vae, found)
        except DoesNotFit as reason:
            self._found[type(vae)] = HalfRange(dtype="fp32", largest=found.largest, reason=str(reason))
            return vae
        rescale(vae, scales)
        self._found[type(vae)] = HalfRange(dtype="fp16", largest=found.largest, scale=scales.smallest)
        return vae.half()


def _vae_decoder(vae: _VAEHalves, model: Model, sizes: list[tuple[Span, Span]]) -> ModuleSpec:
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
        half_range=lambda: vae.range_of(VAEDecoder),
    )


def _vae_encoder(vae: _VAEHalves, networks: Networks, sizes: list[tuple[Span, Span]]) -> Iterator[ModuleSpec]:
    """One, or none where the checkpoint's VAE is stored without its encoder."""
    if not has_encoder(networks.checkpoint.state_dict("vae")):
        return

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"image": torch.rand(batch, networks.vae.in_channels, height, width) * 2 - 1}

    free = {"image": {2: "height", 3: "width"}}
    forms = tuple(Form(ONE, height, width) for height, width in sizes)
    yield ModuleSpec(
        "vae_encoder",
        vae.encoder,
        inputs,
        free,
        ("mean", "std"),
        ("vae",),
        forms,
        half_range=lambda: vae.range_of(VAEEncoder),
    )


def _text_encoder(networks: Networks, name: str, dtype: torch.dtype) -> ModuleSpec:
    vocabulary = int(networks.checkpoint.components[name].config["vocab_size"])

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, vocabulary, (batch, CHUNK))}

    def load() -> TextEncoder:
        model = load_text_model(networks.checkpoint, name, dtype)
        return TextEncoder(model, final_norm=networks.checkpoint.family == "sd")

    return ModuleSpec(name, load, inputs, {}, ("hidden_states", "text_embeds"), (name,), (Form(ONE),))


def load_text_model(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    """transformers' own CLIP text model on the checkpoint's weights."""
    import transformers

    component = checkpoint.components[name]
    cls = getattr(transformers, component.class_name, None)
    if component.class_name not in ("CLIPTextModel", "CLIPTextModelWithProjection") or cls is None:
        raise CheckpointError(
            f"{checkpoint.source}: {name} is a {component.class_name}; "
            "CLIPTextModel and CLIPTextModelWithProjection are supported"
        )
    config = transformers.CLIPTextConfig(**component.config)
    try:
        with _no_progress_bar():
            model = cls.from_pretrained(
                None,
                config=config,
                state_dict=checkpoint.state_dict(name),
                dtype=dtype,
                attn_implementation="eager",
            )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.source}: {name}: its weights do not fit its config: {error}"
        ) from error
    return model.eval()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows a bar for every loaded model; an export has a display of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_sizes(sizes: list[tuple[Span, Span]], factor: int) -> None:
    for side in (side for pair in sizes for span in pair for side in (span.low, span.high)):
        if side % factor:
            raise CheckpointError(
                f"side {side} is not a multiple of {factor}, which this checkpoint's VAE needs"
            )
