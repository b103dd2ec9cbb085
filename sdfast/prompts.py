"""Prompts: text → tokens → hidden states → packed context, remembered for the next time."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.loop import Conditioning
from sdfast.request import Request
from sdfast.schedulers import Schedule

CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class PromptState:
    """What the networks know of n prompts.

    context: packed keys and values [n, L, KV]; pooled: SDXL's pooled embedding [n, P], else None.
    """

    context: torch.Tensor
    pooled: torch.Tensor | None

    def repeat(self, count: int) -> "PromptState":
        """Every line `count` times in a row, as diffusers orders the pictures of one prompt."""
        if count == 1:
            return self
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(count, 0)
        return PromptState(self.context.repeat_interleave(count, 0), pooled)

    @property
    def nbytes(self) -> int:
        return self.context.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class PromptCache:
    """States of single prompts, the least recently used dropped first, bounded in bytes."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._bytes = 0
        self._lock = Lock()
        self._states: OrderedDict[object, tuple[PromptState, str]] = OrderedDict()

    def get(self, key: object) -> tuple[PromptState, str] | None:
        with self._lock:
            if key in self._states:
                self._states.move_to_end(key)
            return self._states.get(key)

    def put(self, key: object, state: PromptState, truncated: str) -> None:
        with self._lock:
            if key in self._states:  # two threads encoded it at once
                return
            self._states[key] = (state, truncated)
            self._bytes += state.nbytes
            while self._bytes > self._limit:
                _, (dropped, _) = self._states.popitem(last=False)
                self._bytes -= dropped.nbytes


class Prompts:
    """The text side of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._model = engine.manifest.model
        self._cache = PromptCache()

    def encode(self, prompts: Sequence[str], clip_skip: int | None) -> tuple[PromptState, tuple[str, ...]]:
        """The states of `prompts`, and the text cut from each. `clip_skip`: last text layers left out."""
        found = [self._cached(prompt, clip_skip) for prompt in prompts]
        return _joined([state for state, _ in found]), tuple(cut for _, cut in found)

    def encode_negative(self, prompts: Sequence[str | None]) -> PromptState:
        """The states of negative prompts. diffusers applies `clip_skip` to positive prompts only."""
        return _joined(
            [
                self._zeros()
                if prompt is None and self._model.zero_empty_negative
                else self._cached(prompt or "", None)[0]
                for prompt in prompts
            ]
        )

    def from_embeds(self, name: str, embeds: Any, pooled: Any, count: int) -> PromptState:
        """The state of hidden states [count, L, D], and pooled embeddings [count, P], that the caller made.

        `name`: "prompt_embeds" or "negative_prompt_embeds". Raises `RequestError` for what does not fit.
        """
        engine, model = self._engine, self._model
        check_tensor(name, embeds, (count, engine.tokenizers[0].max_length, model.text_width))
        name_pooled = name.replace("prompt", "pooled_prompt")
        if model.pooled_width is None and pooled is not None:
            raise RequestError(f"{name_pooled}: only engines of SDXL take one; leave it out")
        if model.pooled_width is not None:
            if pooled is None:
                raise RequestError(f"{name} of an SDXL engine need {name_pooled} beside them")
            check_tensor(name_pooled, pooled, (count, model.pooled_width))
            pooled = pooled.to(engine.device, engine.dtype)
        return PromptState(self._context(embeds.to(engine.device, engine.dtype)), pooled)

    def conditionings(self, state: PromptState, plan: Schedule, request: Request) -> list[Conditioning]:
        """What the U-Net is told of each picture, at every step of `plan`."""
        # through a list: a schedule's array may be a reversed view, which torch does not take
        timesteps = torch.tensor(plan.timesteps.tolist(), dtype=torch.float32, device=self._engine.device)
        inputs = {"timesteps": timesteps}
        if self._model.guidance_embedding is not None:
            scale = torch.tensor([request.guidance_scale - 1.0])
            embedding = guidance_embedding(scale, self._model.guidance_embedding)
            embedding = embedding.to(self._engine.device, self._engine.dtype)
            inputs["timestep_cond"] = embedding.expand(len(plan), -1)
        if state.pooled is None:
            shift = self._engine.call("time_shift", inputs)["time_shift"]
            return [Conditioning(context, shift) for context in state.context]
        sizes = [request.height, request.width, 0, 0, request.height, request.width]
        inputs["time_ids"] = torch.tensor(
            [sizes] * len(plan), dtype=torch.float32, device=self._engine.device
        )
        told = []
        for context, pooled in zip(state.context, state.pooled, strict=True):
            inputs["text_embeds"] = pooled.expand(len(plan), -1)
            told.append(Conditioning(context, self._engine.call("time_shift", inputs)["time_shift"]))
        return told

    def _cached(self, prompt: str, clip_skip: int | None) -> tuple[PromptState, str]:
        key = (prompt, clip_skip)
        found = self._cache.get(key)
        if found is None:
            found = self._encode_one(prompt, clip_skip)
            self._cache.put(key, *found)
        return found

    def _encode_one(self, prompt: str, clip_skip: int | None) -> tuple[PromptState, str]:
        hidden, pooled, truncated = [], None, ""
        for name, tokenizer in zip(self._text_encoders(), self._engine.tokenizers, strict=True):
            tokens = tokenizer([prompt])
            truncated = truncated or tokens.truncated[0]
            ids = torch.from_numpy(tokens.input_ids).to(self._engine.device)
            outputs = self._engine.call(name, {"input_ids": ids})
            hidden.append(self._layer(outputs["hidden_states"], clip_skip))
            pooled = outputs.get("text_embeds", pooled)
        if self._model.pooled_width is None:
            pooled = None
        return PromptState(self._context(torch.cat(hidden, dim=-1)), pooled), truncated

    def _text_encoders(self) -> list[str]:
        return sorted(name for name in self._engine.manifest.modules if name.startswith("text_encoder"))

    def _layer(self, hidden_states: torch.Tensor, clip_skip: int | None) -> torch.Tensor:
        """The text layer [B, L, D] that is used, of all of them [B, layers + 1, L, D].

        SD takes the last one and SDXL the last but one; `clip_skip` counts from there.
        """
        back = (clip_skip or 0) + (2 if self._model.family == "sdxl" else 1)
        layers = hidden_states.shape[1]
        if back > layers:
            raise RequestError(
                f"clip_skip: {clip_skip}, but this text encoder has {layers - 1} layers; "
                f"at most {layers - 1 - (back - (clip_skip or 0) - 1)}"
            )
        return hidden_states[:, -back]

    def _context(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._engine.call("context", {"hidden_states": hidden})["context"]

    def _zeros(self) -> PromptState:
        """SDXL's state of a missing negative prompt: hidden states and pooled embedding of zeros."""
        found = self._cache.get(None)
        if found is None:
            engine, model = self._engine, self._model
            length = engine.tokenizers[0].max_length
            hidden = torch.zeros(1, length, model.text_width, device=engine.device, dtype=engine.dtype)
            pooled = torch.zeros(1, model.pooled_width or 0, device=engine.device, dtype=engine.dtype)
            found = PromptState(self._context(hidden), pooled), ""
            self._cache.put(None, *found)
        return found[0]


def guidance_embedding(scale: torch.Tensor, width: int) -> torch.Tensor:
    """The sinusoidal embedding [n, width] of guidance scales minus one, [n].

    Luo et al., "Latent Consistency Models", section 4.1, with the constants of the released models.
    """
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    angles = scale[:, None] * 1000.0 * torch.exp(torch.arange(half) * -step)[None]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width - 2 * half))


def check_tensor(name: str, given: Any, shape: tuple[int, ...]) -> None:
    """Raises `RequestError` unless `given` is a tensor of `shape` that holds finite numbers."""
    if not isinstance(given, torch.Tensor) or tuple(given.shape) != shape:
        what = f"shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise RequestError(f"{name}: {what}, but a tensor of shape {shape} is needed")
    if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
        raise RequestError(f"{name}: must hold finite floating point numbers")


def _joined(states: Sequence[PromptState]) -> PromptState:
    pooled = [state.pooled for state in states if state.pooled is not None]
    context = torch.cat([state.context for state in states])
    return PromptState(context, torch.cat(pooled) if pooled else None)
