"""`FakeEngine`: the seam of the tests. A real `Engine` whose modules are small exact functions.

Each row's result depends on that row alone, bit for bit, so whatever the loop, the pipeline or the server mix
up shows as a difference. Failpoints make a module slow, raise, lack memory, give NaN,
hang, or end the process.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sdfast.emphasis import Piece
from sdfast.engine import Engine
from sdfast.errors import BackendError
from sdfast.manifest import (
    CONTROL,
    SHALLOW,
    Builder,
    Manifest,
    Model,
    Module,
    Source,
    Span,
    StepCache,
    Variant,
)
from sdfast.tokenizer import Chunks

TEXT_WIDTH = 4  # D
CONTEXT_WIDTH = 6  # KV
SHIFT_WIDTH = 2  # T
CONTROL_CHANNELS = 4  # C_0
STEP_CACHE = StepCache(branch=0, channels=5, scale=2)
LENGTH = 8  # tokens of a chunk
LAYERS = 3
FACTOR = 8  # pixels a latent
NO_DIGEST = "0" * 64

SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


@dataclass
class Failpoint:
    """What goes wrong in a module: "slow", "raise", "memory", "nan", "hang", "grip" or "exit", from call
    `after` on.

    calls: how many calls it hits (default: all that follow). over: it spares calls of so many rows. rows: the
    rows that "nan" hits (default: all). seconds: how slow. A hang ends when `released` is set; a grip is one
    that holds Python's lock, and does not end.
    """

    kind: str
    after: int = 0
    calls: int | None = None
    over: int = 0
    rows: Sequence[int] | None = None
    seconds: float = 0.05
    released: threading.Event = field(default_factory=threading.Event)

    def hits(self, call: int, batch: int) -> bool:
        """Whether the call is one of those, and counts it."""
        hit = call > self.after and batch > self.over and self.calls != 0
        if hit and self.calls is not None:
            self.calls -= 1
        return hit

    def before(self) -> None:
        """What happens in place of the call, or before it."""
        if self.kind == "slow":
            time.sleep(self.seconds)
        elif self.kind == "raise":
            raise BackendError("a failpoint raised")
        elif self.kind == "memory":
            raise torch.OutOfMemoryError("a failpoint has no memory")
        elif self.kind == "hang":
            self.released.wait()
        elif self.kind == "grip":
            ctypes.PyDLL(None).pause()
        elif self.kind == "exit":
            os._exit(9)

    def spoil(self, output: torch.Tensor) -> None:
        if self.kind == "nan":
            rows = range(len(output)) if self.rows is None else self.rows
            output[list(rows)] = torch.nan


class FakeModule:
    """A compiled module that is a function of tensors; `calls` holds the batch of every call."""

    def __init__(self, name: str, engine: "FakeEngine") -> None:
        self._name, self._engine = name, engine
        self._function = _FUNCTIONS[name]
        if name == "unet" and engine.step_cache is not None:
            self._function = _unet_and_deep

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls = self._engine.calls[self._name]
        calls.append(len(next(iter(inputs.values()))))
        point = self._engine.failpoints.get(self._name)
        active = point is not None and point.hits(len(calls), calls[-1])
        if active:
            point.before()
        outputs = self._function(**inputs)
        if active:
            for output in outputs.values():
                point.spoil(output)
        return outputs

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        def run() -> None:
            for name, value in self(inputs).items():
                outputs[name].copy_(value)

        return run


class FakeTokenizer:
    """A token a character, without start and end; no letter counts more than another."""

    max_length = LENGTH

    def cut(self, pieces: Sequence[Piece]) -> Chunks:
        text = "".join(piece.text for piece in pieces)
        return self._chunks([text[:LENGTH]], text[LENGTH:])

    def chunks(self, parts: Sequence[Sequence[Piece]], least: int = 1) -> Chunks:
        texts = ["".join(piece.text for piece in part) for part in parts]
        return self._chunks(
            [text[i : i + LENGTH] for text in texts for i in range(0, max(len(text), 1), LENGTH)]
        )

    def _chunks(self, texts: Sequence[str], truncated: str = "") -> Chunks:
        ids = np.zeros((len(texts), LENGTH), dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = [1 + ord(letter) % 50 for letter in text]
        return Chunks(ids, np.ones(ids.shape, np.float32), sum(map(len, texts)), truncated)


class FakeEngine(Engine):
    """An engine without files.

    batches: the batch forms of the U-Net. sizes: its (height, width) forms in pixels. failpoints: by module
    name; may be changed at any time. calls: the batch of every call, by module name. edits: whether it takes
    images. controlnets: how many it has. cached: whether it has shallow steps. loras: names of those that
    requests choose, which the U-Net alone is told. pag: which layers they may have perturbed; rows that are
    have a LoRA more.
    """

    def __init__(
        self,
        batches: Sequence[Span] = (Span(low=1, high=8),),
        sizes: Sequence[tuple[Span, Span]] = ((Span.exactly(16), Span.exactly(16)),),
        failpoints: Mapping[str, Failpoint] | None = None,
        guidance_embedding: int | None = None,
        dtype: torch.dtype = torch.float32,
        edits: bool = True,
        controlnets: int = 0,
        cached: bool = False,
        loras: tuple[str, ...] = (),
        pag: tuple[str, ...] = (),
    ) -> None:
        self.folder = Path("fake")
        self.manifest = _manifest(batches, sizes, guidance_embedding, controlnets, cached, loras, pag)
        if not edits:
            del self.manifest.modules["vae_encoder"]
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.failpoints = dict(failpoints or {})
        self.calls: dict[str, list[int]] = {name: [] for name in _FUNCTIONS}
        self._load = lambda path: FakeModule(path.name, self)
        self._loaded = {}
        self.tokenizers = (FakeTokenizer(),)  # type: ignore[assignment]
        self.scheduler_config = dict(SCHEDULER_CONFIG)


def _manifest(
    batches: Sequence[Span],
    sizes: Sequence[tuple[Span, Span]],
    guidance_embedding: int | None,
    controlnets: int,
    cached: bool,
    loras: tuple[str, ...],
    pag: tuple[str, ...],
) -> Manifest:
    forms: dict[str, list[Variant]] = {
        name: [Variant(file=name, batch=Span.exactly(1))] for name in _FUNCTIONS
    }
    forms["time_shift"] = [Variant(file="time_shift", batch=Span(low=1, high=1000))]
    lengths = Span(low=LENGTH, high=12 * LENGTH)
    for name in ("unet", SHALLOW):
        forms[name] = [
            Variant(file=name, batch=b, height=h, width=w, tokens=lengths) for h, w in sizes for b in batches
        ]
    for name in ("vae_decoder", "vae_encoder", CONTROL):
        forms[name] = [Variant(file=name, batch=Span.exactly(1), height=h, width=w) for h, w in sizes]
    modules = {
        name: Module(
            inputs=(),
            outputs=("mean", "std") if name == "vae_encoder" else (),
            variants=tuple(variants),
            files=(name,),
            fingerprint=NO_DIGEST,
        )
        for name, variants in forms.items()
    }
    model = Model(
        family="sd",
        in_channels=4,
        latent_channels=4,
        vae_scale_factor=FACTOR,
        default_height=sizes[0][0].low,
        default_width=sizes[0][1].low,
        text_width=TEXT_WIDTH,
        context_width=CONTEXT_WIDTH,
        time_shift_width=SHIFT_WIDTH,
        guidance_embedding=guidance_embedding,
        control_channels=CONTROL_CHANNELS * controlnets or None,
        controlnets=controlnets,
        control_layers=min(controlnets, 1),
        step_cache=STEP_CACHE if cached else None,
        loras=loras,
        pag=pag,
    )
    return Manifest.model_construct(
        name="fake",
        created="2025-01-01T00:00:00+00:00",
        backend="eager",
        dtype="fp32",
        checkpoint=Source(source="fake", weights={"unet/weights": NO_DIGEST}),
        recipe={},
        model=model,
        max_images=max(batch.high for batch in batches),
        modules=modules,
        tokenizers=("tokenizer",),
        scheduler_config="scheduler_config.json",
        files=(),
        builder=Builder(sdfast="0", python="3", packages={}),
    )


def _text_encoder(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = torch.arange(1, LAYERS + 2).view(1, -1, 1, 1) * torch.arange(1, TEXT_WIDTH + 1)
    hidden = (input_ids[:, None, :, None] % 50 * scale).float() / 50  # [B, layers + 1, L, D]
    return {"hidden_states": hidden, "text_embeds": hidden[:, -1, 0]}


def _context(hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(0.1, 1.0, hidden_states.shape[1])[:, None]
    told = (hidden_states * weights).sum(dim=(1, 2))  # [B]: all of the prompt in one number
    return {"context": told[:, None, None].expand(-1, hidden_states.shape[1], CONTEXT_WIDTH).clone()}


def _time_shift(
    timesteps: torch.Tensor, timestep_cond: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    extra = torch.zeros_like(timesteps) if timestep_cond is None else timestep_cond[:, 0]
    return {"time_shift": torch.stack([timesteps / 1000, extra], dim=1)}


def _unet(
    sample: torch.Tensor,
    time_shift: torch.Tensor,
    context: torch.Tensor,
    control: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    told = context[:, 0, 0] / 100 + time_shift[:, 0] + time_shift[:, 1]
    output = sample * 0.5 + told.view(-1, 1, 1, 1)
    if control is None:
        for place, scale in enumerate(time_shift[:, 2:].T, 1):
            output = output + scale.view(-1, 1, 1, 1) * place
    else:
        count = control.shape[1] // CONTROL_CHANNELS
        for scale, one in zip(time_shift[:, 2:].T, control.chunk(count, dim=1), strict=True):
            output = output + scale.view(-1, 1, 1, 1) * one
    return {"output": output}


def _unet_and_deep(
    sample: torch.Tensor, time_shift: torch.Tensor, context: torch.Tensor
) -> dict[str, torch.Tensor]:
    told = context[:, 0, 0] / 100 + time_shift[:, 0]
    kept = (sample.mean(dim=(1, 2, 3)) - told).view(-1, 1, 1, 1)
    shape = STEP_CACHE.shape(*sample.shape[2:])
    return {**_unet(sample, time_shift, context), "deep": kept.expand(-1, *shape)}


def _unet_shallow(
    sample: torch.Tensor, time_shift: torch.Tensor, context: torch.Tensor, deep: torch.Tensor
) -> dict[str, torch.Tensor]:
    told = context[:, 0, 0] / 100 + time_shift[:, 0] + deep.mean(dim=(1, 2, 3))
    return {"output": sample * 0.25 + told.view(-1, 1, 1, 1)}


def _vae_decoder(latents: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = latents[:, :3].repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
    return {"image": torch.sigmoid(wide / 16)}  # few latents are so large that they make plain black or white


def _vae_encoder(image: torch.Tensor) -> dict[str, torch.Tensor]:
    small = torch.nn.functional.avg_pool2d(image, FACTOR)
    mean = torch.cat([small, small.sum(1, keepdim=True)], dim=1)
    return {"mean": mean, "std": 0.1 + 0.05 * mean.abs()}


def _control_embedding(image: torch.Tensor) -> dict[str, torch.Tensor]:
    small = torch.nn.functional.avg_pool2d(image, FACTOR).split(3, dim=1)
    each = [torch.cat([one, one.sum(1, keepdim=True)], dim=1) for one in small]
    return {"control": torch.cat(each, dim=1)}


_FUNCTIONS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "text_encoder": _text_encoder,
    "context": _context,
    "time_shift": _time_shift,
    "unet": _unet,
    SHALLOW: _unet_shallow,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
    CONTROL: _control_embedding,
}
