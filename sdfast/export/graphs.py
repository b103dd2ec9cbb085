"""optimum's graphs as modules of an engine: each given the interface that the loop has, by a few nodes.

The loop tells the U-Net of a prompt and of a step by two packed inputs. Here they are what the graph takes:
`context` the prompt's hidden states, and a row of `time_shift`

    [timestep, text_embeds (SDXL: P numbers), time_ids (SDXL: 6), timestep_cond (LCM: W)]

which the first nodes of the U-Net take apart. Each row of a batch has a timestep of its own, where optimum's
graphs take one for all: what they spread over the rows is replaced by the rows' own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import onnx_ir

from sdfast.errors import CheckpointError, ExportError, first_line
from sdfast.export.checkpoint import Checkpoint
from sdfast.export.graph_surgery import FLOAT, INT64, Opened, new_model, new_value
from sdfast.export.modules import ONE, Form
from sdfast.export.networks import Configs
from sdfast.export.onnx import save_model
from sdfast.export.optimum import MODEL, VAE_DECODER, VAE_ENCODER
from sdfast.export.recipe import Recipe
from sdfast.manifest import CHUNK, LONG_PROMPTS, ONE_CHUNK, TIME_IDS, HalfRange, Model, Span, Variant
from sdfast.models.config import UNetConfig
from sdfast.models.vae import LOG_VARIANCE, VAEConfig
from sdfast.request import MAX_SIDE, MAX_STEPS

LAST = "last_hidden_state"
_HIDDEN = "hidden_states."
_REFUSED = {
    "loras": "LoRAs are merged into weights",
    "embeddings": "embeddings are added to the weights of text encoders",
    "ip_adapters": "IP-Adapters are told to the U-Net's own cross-attention",
    "vae": "a VAE's weights take the place of other weights",
    "controlnet": "a ControlNet is put beside the weights of a U-Net",
    "fp8": "FP8 is for networks of sdfast's own",
    "int8": "INT8 is for networks of sdfast's own",
    "cache_branch": "shallow steps are made of the U-Net's weights",
    "pag": "perturbed layers are layers of sdfast's own",
}


@dataclass(frozen=True)
class GraphSpec:
    """One module that is made of a graph. As `ModuleSpec`, but for `make`, which gives the finished graph."""

    name: str
    make: Callable[[], onnx_ir.Model]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    components: tuple[str, ...]
    forms: tuple[Form, ...]
    fp8: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    half_range: Callable[[], HalfRange | None] = lambda: None

    def inputs(self, batch: int, height: int, width: int, tokens: int) -> Sequence[str]:
        """The names of the inputs, whatever their sizes."""
        return self.names


def recipe_for_graphs(recipe: Recipe, source: str) -> Recipe:
    """The recipe as far as it has a meaning for graphs. Raises `ExportError` for what it asks for beyond."""

    def refuse(name: str, why: str) -> ExportError:
        return ExportError(f"{name}: {source} holds graphs that optimum exported: {why}")

    if recipe.backend != "onnx":
        raise refuse("backend", f"they run on onnx, not on {recipe.backend}; export the checkpoint itself")
    for name, why in _REFUSED.items():
        asked = getattr(recipe, name)
        if asked is not None and asked is not False and asked != ():
            raise refuse(name, f"{why}; export the checkpoint itself, or leave it out")
    if recipe.dtype != "fp32":
        raise refuse("dtype", "they are taken as they are, in fp32; export the checkpoint itself for fp16")
    if recipe.provider == "tensorrt":
        raise refuse("provider", "they run on cpu or cuda; export the checkpoint itself for tensorrt")
    return recipe.model_copy(update={"winograd": None})  # of sdfast's own graphs


class Graphs(Configs):
    """The configs of a checkpoint's graphs."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        parts = checkpoint.components
        return cls(
            checkpoint,
            UNetConfig.from_diffusers(parts["unet"].config),
            VAEConfig.from_diffusers(parts[VAE_DECODER].config),
            checkpoint.text_encoders,
        )

    @property
    def told(self) -> dict[str, int]:
        """What a row of `time_shift` holds: the widths of its parts, in their order, by the graph's names."""
        pooled = self.unet.pooled_dim(TIME_IDS)
        widths = {
            "timestep": 1,
            "text_embeds": pooled,
            "time_ids": TIME_IDS if pooled else None,
            "timestep_cond": self.unet.time_cond_proj_dim,
        }
        return {name: width for name, width in widths.items() if width}

    def model(self) -> Model:
        """What the manifest says of the networks."""
        return self._model(
            text_width=self.unet.cross_attention_dim,
            context_width=self.unet.cross_attention_dim,
            time_shift_width=sum(self.told.values()),
            side_multiple=self.factor * self.unet.size_factor,
        )

    def specs(self, recipe: Recipe) -> list[GraphSpec]:
        """Every module of an engine of `recipe`. Raises what is wrong with the graphs, or does not fit."""
        sizes = self._sizes(recipe)
        return [
            self._unet(recipe, sizes),
            self._context(),
            self._time_shift(),
            self._vae_decoder(sizes),
            *self._vae_encoder(sizes),
            *(self._text_encoder(name) for name in self.text),
        ]

    def open(self, name: str) -> Opened:
        """The graph of a component, to be changed."""
        return Opened(name, self.checkpoint)

    def _sizes(self, recipe: Recipe) -> list[tuple[Span, Span]]:
        """The (height, width) spans in pixels: the recipe's, or else whatever the U-Net's graph takes."""
        multiple = self.factor * self.unet.size_factor
        spans = recipe.size_spans(self.default_side)
        axes = [self.open("unet").size("sample", axis) for axis in (2, 3)]
        own = [None if size is None else size * self.factor for size in axes]
        if recipe.sizes is None:
            free = Span(low=multiple, high=MAX_SIDE // multiple * multiple)
            height, width = (free if side is None else Span.exactly(side) for side in own)
            return [(height, width)]
        for pair in spans:
            for span, side in zip(pair, own, strict=True):
                if side is not None and span != Span.exactly(side):
                    raise ExportError(
                        f"sizes: {self.checkpoint.source}: its U-Net was exported for {own[1] or 'any'}x"
                        f"{own[0] or 'any'} alone, not for {pair[1]}x{pair[0]}; export it with free axes"
                    )
                if span.low % multiple or span.high % multiple:
                    raise ExportError(
                        f"sizes: {pair[1]}x{pair[0]}: this U-Net's graph takes sides that are multiples of "
                        f"{multiple}"
                    )
        return spans

    def _unet(self, recipe: Recipe, sizes: list[tuple[Span, Span]]) -> GraphSpec:
        opened, told = self.open("unet"), self.told
        opened.check_inputs("sample", "encoder_hidden_states", *told)
        batch, tokens = opened.size("sample", 0), opened.size("encoder_hidden_states", 1)
        lengths = LONG_PROMPTS if tokens is None else ONE_CHUNK
        if tokens not in (None, CHUNK):
            raise opened.refuse(f"takes prompts of {tokens} tokens; {CHUNK} are needed")
        batches = recipe.unet_batches() if batch is None else [Span.exactly(batch)]
        forms = tuple(Form(rows, *size, lengths) for size in sizes for rows in batches)

        def make() -> onnx_ir.Model:
            graph = self.open("unet")
            rows = graph.input("time_shift", FLOAT, ["batch", sum(told.values())])
            ends = np.cumsum([0, *told.values()]).tolist()
            for name, (start, end) in zip(told, pairwise(ends), strict=True):
                part = graph.tape.Slice(rows, *(graph.tape.ints(n) for n in (start, end, 1)))
                if name == "timestep":
                    graph.spread(name, graph.tape.Squeeze(part, graph.tape.ints(1)))
                else:
                    graph.replace(name, part)
            graph.prepend()
            graph.rename("encoder_hidden_states", "context")
            return graph.finished(("sample", "time_shift", "context"), {"output": graph.output("out_sample")})

        return GraphSpec("unet", make, ("sample", "time_shift", "context"), ("output",), ("unet",), forms)

    def _context(self) -> GraphSpec:
        width = self.unet.cross_attention_dim

        def make() -> onnx_ir.Model:
            hidden = new_value("hidden_states", FLOAT, ["batch", CHUNK, width])
            context = onnx_ir.node("Identity", [hidden])
            return new_model([hidden], {"context": context.outputs[0]}, [context])

        return GraphSpec("context", make, ("hidden_states",), ("context",), ("unet",), (Form(ONE),))

    def _time_shift(self) -> GraphSpec:
        widths = {"timesteps" if name == "timestep" else name: width for name, width in self.told.items()}
        forms = (Form(Span(low=1, high=MAX_STEPS)),)

        def make() -> onnx_ir.Model:
            times, *others = widths
            given = [new_value(times, FLOAT, ["steps"])]
            given += [new_value(name, FLOAT, ["steps", widths[name]]) for name in others]
            axes = onnx_ir.node("Constant", [], {"value_ints": [1]})
            first = onnx_ir.node("Unsqueeze", [given[0], axes.outputs[0]])
            packed = onnx_ir.node("Concat", [first.outputs[0], *given[1:]], {"axis": 1})
            return new_model(given, {"time_shift": packed.outputs[0]}, [axes, first, packed])

        return GraphSpec("time_shift", make, tuple(widths), ("time_shift",), ("unet",), forms)

    def _vae_decoder(self, sizes: list[tuple[Span, Span]]) -> GraphSpec:
        opened = self.open(VAE_DECODER)
        opened.check_inputs("latent_sample")
        self._check_picture(opened, "latent_sample", sizes, self.factor)
        forms = tuple(Form(ONE, *size) for size in sizes)

        def make() -> onnx_ir.Model:
            graph = self.open(VAE_DECODER)
            tape, number = graph.tape, graph.number
            latents = graph.input("latents", FLOAT, [1, self.vae.latent_channels, "height", "width"])
            scaled = tape.Div(latents, number(self.vae.scaling_factor))
            graph.replace("latent_sample", tape.Add(scaled, number(self.vae.shift_factor)))
            graph.prepend()
            tape = graph.append()
            picture = tape.Add(tape.Mul(graph.output("sample"), number(0.5)), number(0.5))
            # What is not finite is to be NaN: clamped, it would be a white or black pixel.
            clamped = tape.Clip(picture, number(0.0), number(1.0))
            image = tape.Add(clamped, tape.Sub(picture, picture))
            return graph.finished(("latents",), {"image": image})

        return GraphSpec("vae_decoder", make, ("latents",), ("image",), (VAE_DECODER,), forms)

    def _vae_encoder(self, sizes: list[tuple[Span, Span]]) -> Iterator[GraphSpec]:
        """One, or none where the folder has none."""
        if VAE_ENCODER not in self.checkpoint.components:
            return
        opened = self.open(VAE_ENCODER)
        opened.check_inputs("sample")
        if "latent_parameters" not in opened.outputs:
            raise opened.refuse(
                "gives latents that it draws by itself; export it again with a newer optimum, or remove it: "
                "the engine then takes no images"
            )
        self._check_picture(opened, "sample", sizes, 1)
        forms, channels = tuple(Form(ONE, *size) for size in sizes), self.vae.latent_channels

        def make() -> onnx_ir.Model:
            graph = self.open(VAE_ENCODER)
            graph.rename("sample", "image")
            tape, number = graph.append(), graph.number
            moments = graph.output("latent_parameters")
            bounds = [tape.ints(n) for n in (0, channels, 2 * channels, 1)]
            mean = tape.Slice(moments, bounds[0], bounds[1], bounds[3])
            log_variance = tape.Slice(moments, bounds[1], bounds[2], bounds[3])
            clamped = tape.Clip(log_variance, *map(number, LOG_VARIANCE))
            std = tape.Exp(tape.Mul(clamped, number(0.5)))
            scale, shift = number(self.vae.scaling_factor), number(self.vae.shift_factor)
            outputs = {"mean": tape.Mul(tape.Sub(mean, shift), scale), "std": tape.Mul(std, scale)}
            return graph.finished(("image",), outputs)

        yield GraphSpec("vae_encoder", make, ("image",), ("mean", "std"), (VAE_ENCODER,), forms)

    def _check_picture(self, opened: Opened, name: str, sizes: list[tuple[Span, Span]], pixels: int) -> None:
        """Refuse a half of the VAE that does not take single pictures of `sizes`, of `pixels` each."""
        batch, *sides = (opened.size(name, axis) for axis in (0, 2, 3))
        if batch not in (None, 1):
            raise opened.refuse(f"takes {batch} pictures at a time; export it with free axes")
        for pair in sizes:
            for span, side in zip(pair, sides, strict=True):
                if side is not None and span != Span.exactly(side * pixels):
                    raise opened.refuse(
                        f"takes sides of {side * pixels} pixels, not {span}; export it with free axes"
                    )

    def _text_encoder(self, name: str) -> GraphSpec:
        opened = self.open(name)
        opened.check_inputs("input_ids")
        batch, length = (opened.size("input_ids", axis) for axis in (0, 1))
        if batch not in (None, 1) or length not in (None, CHUNK):
            raise opened.refuse(f"takes {batch} prompts of {length} tokens; export it with free axes")
        states, pooled = self._states(opened), self._pooled(opened)
        outputs = ("hidden_states", *(("text_embeds",) if pooled else ()))

        def make() -> onnx_ir.Model:
            graph = self.open(name)
            ids = graph.input("input_ids", INT64, ["batch", CHUNK])
            kind = graph.inputs["input_ids"].dtype
            graph.replace("input_ids", graph.tape.Cast(ids, to=kind.value))
            graph.prepend()
            tape = graph.append()
            layers = [tape.Unsqueeze(graph.output(state), tape.ints(1)) for state in states]
            given = {"hidden_states": tape.Concat(*layers, axis=1)}
            if pooled:
                given["text_embeds"] = graph.output(pooled)
            return graph.finished(("input_ids",), given)

        return GraphSpec(name, make, ("input_ids",), outputs, (name,), (Form(ONE),))

    def _states(self, opened: Opened) -> list[str]:
        """The outputs that are hidden states as the family takes them, the last layer's last.

        Stable Diffusion 1.x and 2.x finish whichever layer they take by the last norm, which the graph does
        for the last layer alone. SDXL takes the last but one, raw, and the others likewise.
        """
        if self.checkpoint.family == "sd":
            opened.check_outputs(LAST)
            return [LAST]
        layers = int(self.checkpoint.components[opened.name].config["num_hidden_layers"])
        names = [f"{_HIDDEN}{layer}" for layer in range(layers)]
        raw_last = f"{_HIDDEN}{layers}"
        names.append(raw_last if raw_last in opened.outputs else LAST)
        opened.check_outputs(*names)
        return names

    def _pooled(self, opened: Opened) -> str | None:
        """The output that is the prompt as a whole, which SDXL takes of its second encoder."""
        if self.checkpoint.family == "sdxl" and opened.name == self.text[-1]:
            opened.check_outputs("text_embeds")
        return next((name for name in ("text_embeds", "pooler_output") if name in opened.outputs), None)


def compile_graph(spec: GraphSpec, place: Path) -> list[Variant]:
    """Write the module to one file in `place`, which serves every form."""
    path = place / f"{spec.name}.onnx"
    save_model(spec.make(), path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise CheckpointError(f"{spec.components[0]}/{MODEL} is not sound: {first_line(error)}") from error
    return [
        Variant(file=path.name, batch=form.batch, height=form.height, width=form.width, tokens=form.tokens)
        for form in spec.forms
    ]
