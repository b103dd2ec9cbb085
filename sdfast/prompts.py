"""Prompts: text → tokens → hidden states → packed context, remembered for the next time."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self, TypeVar

import torch

from sdfast.editing import Editing
from sdfast.emphasis import Emphasis, Piece, parse
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.loras import LoraScales
from sdfast.request import SCORES, TOLD_SIZES, Request
from sdfast.row import Conditioning
from sdfast.schedulers import Schedule
from sdfast.tokenizer import Chunks

T = TypeVar("T")

CACHE_BYTES = 256 * 2**20
Text = tuple[str | None, str | None]
"""A prompt, and what a second text encoder reads in its place."""
_SDXL = ("prompts_2", "negative_prompts_2", *TOLD_SIZES)
"""Fields of requests that are for its text encoders and time embedding."""
_NOT_REFINED = ("prompts_2", "negative_prompts_2", "target_size", "negative_target_size")
"""Those of which its refiner is told nothing."""


@dataclass(frozen=True)
class Reading:
    """How the text of prompts is read; see `Request`."""

    emphasis: Emphasis | None = None
    chunked: bool = False
    edited: bool = False

    @classmethod
    def of(cls, request: Request) -> Self:
        return cls(request.emphasis, request.long_prompts == "chunk", request.prompt_editing)

    def parts(self, prompt: str) -> list[list[Piece]]:
        """A prompt's text as what counts differently. Raises `RequestError` for what cannot be read so."""
        parts = [[Piece(prompt)]] if self.emphasis is None else parse(prompt, edited=self.edited)
        if len(parts) > 1 and not self.chunked:
            raise RequestError(
                f"prompt: BREAK begins part 2 of {len(parts)}, and long_prompts is 'truncate'; "
                "ask for 'chunk', or leave BREAK out"
            )
        return parts


@dataclass(frozen=True)
class PromptState:
    """What the networks know of n prompts.

    context: packed keys and values [n, L, KV]; pooled: SDXL's pooled embedding [n, P], else None.
    """

    context: torch.Tensor
    pooled: torch.Tensor | None

    @property
    def lines(self) -> list["PromptState"]:
        """The state of each prompt alone."""
        rows = range(len(self.context))
        pooled = self.pooled
        return [
            PromptState(self.context[i : i + 1], None if pooled is None else pooled[i : i + 1]) for i in rows
        ]

    def repeated_to(self, length: int) -> "PromptState":
        """The context again and again, until it has this length, a multiple of its own."""
        times = length // self.context.shape[1]
        return self if times == 1 else PromptState(self.context.repeat(1, times, 1), self.pooled)

    @property
    def nbytes(self) -> int:
        return self.context.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


Edited = Sequence[tuple[int, T]]
"""A prompt that changes between steps, or what is known of it: each from its step on, the first from 0."""


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

    def check(self, request: Request, editing: Editing | None = None) -> None:
        """Raises `RequestError` for what the engine cannot read, before anything of it is encoded: too long
        prompts, and what is SDXL's. editing: see `edited`."""
        self.check_fields(request)
        reading, length = Reading.of(request), self._engine.tokenizers[0].max_length
        pairs = [*request.composed_pairs, *(request.negative_pairs if self.guided(request) else ())]
        texts = [text for pair in pairs for _, text in edited(pair, editing)]
        check_lengths([length * len(self._read(text, reading)[0].input_ids) for text in texts], self._most)

    def check_fields(self, request: Request) -> None:
        """Raises `RequestError` for what is SDXL's, where the engine is not, and other kinds' fields."""
        if not self.guided(request) and any(len(parts) > 1 for parts in request.composed):
            raise RequestError(
                "prompt: AND adds up what prompts say beyond the negative one, which a checkpoint that is "
                "told the guidance (LCM) does not read; write it in small letters"
            )
        given = [
            name for name in (*_SDXL, *SCORES) if getattr(request, name) != Request.model_fields[name].default
        ]
        for name in given:
            if name in SCORES and not self._model.scored:
                raise RequestError(f"{name}: only engines of SDXL's refiner have a use for it; leave it out")
            if self._model.pooled_width is None:
                raise RequestError(f"{name}: only engines of SDXL have a use for it; leave it out")
            if name in _NOT_REFINED and self._model.scored:
                raise RequestError(
                    f"{name}: SDXL's refiner has one text encoder, and is told a score in place of a target "
                    "size; leave it out"
                )

    def guided(self, request: Request) -> bool:
        """Whether negative prompts are read. An LCM takes the guidance as an embedding instead."""
        return request.guidance_scale > 1 and self._model.guidance_embedding is None

    def count(self, request: Request, editing: Editing | None = None) -> int:
        """How many tokens of a request's prompts are read, without start and end; each text once."""
        pairs = (*request.composed_pairs, *request.negative_pairs)
        texts = [text for pair in pairs for text in {text for _, text in edited(pair, editing)}]
        return sum(self._read(text, Reading.of(request))[0].read for text in texts)

    def encode(
        self,
        prompts: Sequence[Text],
        clip_skip: int | None,
        reading: Reading,
        loras: LoraScales | None = None,
    ) -> tuple[list[PromptState], tuple[str, ...]]:
        """The state of each prompt, and the text cut from it. `clip_skip`: last text layers left out.
        `loras`: how much of each is added; default: nothing."""
        found = [self._cached(prompt, clip_skip, reading, loras) for prompt in prompts]
        return [state for state, _ in found], tuple(cut for _, cut in found)

    def encode_negative(
        self, prompts: Sequence[Text], reading: Reading, loras: LoraScales | None = None
    ) -> list[PromptState]:
        """The state of each negative prompt. diffusers applies `clip_skip` to positive prompts only."""
        return [
            self._zeros()
            if prompt[0] is None and self._model.zero_empty_negative
            else self._cached(prompt, None, reading, loras)[0]
            for prompt in prompts
        ]

    def alike(self, states: Sequence[PromptState]) -> list[PromptState]:
        """The states with contexts of one length: the shorter ones repeated.

        That changes nothing: attention weighs every key as often as every other. Raises `RequestError` where
        the length is more than the engine takes.
        """
        length = check_lengths([state.context.shape[1] for state in states], self._most)
        return [state.repeated_to(length) for state in states]

    def from_embeds(
        self, name: str, embeds: Any, pooled: Any, count: int, loras: LoraScales | None = None
    ) -> PromptState:
        """The state of hidden states [count, L, D], and pooled embeddings [count, P], that the caller made.

        L: that of the text encoder, or where the engine takes long prompts, any from there up to its most.

        `name`: "prompt_embeds" or "negative_prompt_embeds". Raises `RequestError` for what does not fit.
        """
        engine, model = self._engine, self._model
        length = engine.tokenizers[0].max_length
        if isinstance(embeds, torch.Tensor) and embeds.ndim == 3 and embeds.shape[1] > length:
            length = check_lengths([embeds.shape[1]], self._most)
        check_tensor(name, embeds, (count, length, model.text_width))
        name_pooled = name.replace("prompt", "pooled_prompt")
        if model.pooled_width is None and pooled is not None:
            raise RequestError(f"{name_pooled}: only engines of SDXL take one; leave it out")
        if model.pooled_width is not None:
            if pooled is None:
                raise RequestError(f"{name} of an SDXL engine need {name_pooled} beside them")
            check_tensor(name_pooled, pooled, (count, model.pooled_width))
            pooled = pooled.to(engine.device, engine.dtype)
        return PromptState(self._context(embeds.to(engine.device, engine.dtype), loras), pooled)

    def conditionings(
        self, state: PromptState, plan: Schedule, request: Request, sizes: Sequence[float]
    ) -> list[Conditioning]:
        """What the U-Net is told of each picture, at every step of `plan`. `sizes`: see `told_sizes`."""
        # through a list: a schedule's array may be a reversed view, which torch does not take
        timesteps = torch.tensor(plan.timesteps.tolist(), dtype=torch.float32, device=self._engine.device)
        inputs = {"timesteps": timesteps}
        if self._model.guidance_embedding is not None:
            scale = torch.tensor([request.guidance_scale - 1.0])
            embedding = guidance_embedding(scale, self._model.guidance_embedding)
            embedding = embedding.to(self._engine.device, self._engine.dtype)
            inputs["timestep_cond"] = embedding.expand(len(plan), -1)
        inputs |= self._scales("time_shift", LoraScales.of(self._model, request), len(plan))
        if state.pooled is None:
            shift = self._engine.call("time_shift", inputs)["time_shift"]
            return [Conditioning(context, shift) for context in state.context]
        inputs["time_ids"] = torch.tensor(
            [list(sizes)] * len(plan), dtype=torch.float32, device=self._engine.device
        )
        told = []
        for context, pooled in zip(state.context, state.pooled, strict=True):
            inputs["text_embeds"] = pooled.expand(len(plan), -1)
            told.append(Conditioning(context, self._engine.call("time_shift", inputs)["time_shift"]))
        return told

    @property
    def _most(self) -> int:
        return self._engine.manifest.max_tokens

    def _read(self, prompt: Text, reading: Reading) -> list[Chunks]:
        """A prompt as each text encoder takes it, in as many chunks as the other."""
        tokenizers, (first, second) = self._engine.tokenizers, prompt
        texts = [first or "", first or "" if second is None else second][: len(tokenizers)]
        parts = [reading.parts(text) for text in texts]
        if not reading.chunked:
            return [one.cut(text[0]) for one, text in zip(tokenizers, parts, strict=True)]
        read = [one.chunks(text) for one, text in zip(tokenizers, parts, strict=True)]
        most = max(len(chunks.input_ids) for chunks in read)
        return [
            chunks if len(chunks.input_ids) == most else one.chunks(text, least=most)
            for chunks, one, text in zip(read, tokenizers, parts, strict=True)
        ]

    def _cached(
        self, prompt: Text, clip_skip: int | None, reading: Reading, loras: LoraScales | None
    ) -> tuple[PromptState, str]:
        loras = self._read_with(loras)
        key = (prompt, clip_skip, reading, loras)
        found = self._cache.get(key)
        if found is None:
            found = self._encode_one(prompt, clip_skip, reading, loras)
            self._cache.put(key, *found)
        return found

    def _read_with(self, loras: LoraScales | None) -> LoraScales:
        """Of what is added of LoRAs, what a prompt's state depends on."""
        modules, none = self._engine.manifest.modules, LoraScales.none(self._model)
        in_text = any("loras" in modules[name].inputs for name in self._engine.manifest.text_encoders)
        told = loras or none
        return LoraScales(
            told.text_encoder if in_text else none.text_encoder,
            told.unet if "loras" in modules["context"].inputs else none.unet,
        )

    def _scales(self, module: str, loras: LoraScales | None, rows: int) -> dict[str, torch.Tensor]:
        """The input that tells a module of LoRAs [rows, n], or none where they change nothing in it."""
        if "loras" not in self._engine.manifest.modules[module].inputs:
            return {}
        told = loras or LoraScales.none(self._model)
        scales = told.text_encoder if module in self._engine.manifest.text_encoders else told.unet
        return {"loras": torch.tensor([scales] * rows, dtype=torch.float32, device=self._engine.device)}

    def _encode_one(
        self, prompt: Text, clip_skip: int | None, reading: Reading, loras: LoraScales
    ) -> tuple[PromptState, str]:
        hidden, pooled, read = [], None, self._read(prompt, reading)
        check_lengths([read[0].input_ids.size], self._most)
        for name, chunks in zip(self._engine.manifest.text_encoders, read, strict=True):
            ids = torch.from_numpy(chunks.input_ids).to(self._engine.device)
            outputs = self._engine.call(name, {"input_ids": ids, **self._scales(name, loras, len(ids))})
            states = self._layer(outputs["hidden_states"], clip_skip)
            if reading.emphasis is not None:
                states = weighted(states, torch.from_numpy(chunks.weights), reading.emphasis)
            hidden.append(states)
            pooled = outputs.get("text_embeds", pooled)
        if pooled is not None:
            # The first chunk's, as AUTOMATIC1111 takes it; where the U-Net takes none, it is left out.
            pooled = None if self._model.pooled_width is None else pooled[:1]
        context = self._context(torch.cat(hidden, dim=-1).flatten(0, 1)[None], loras)
        return PromptState(context, pooled), next((one.truncated for one in read if one.truncated), "")

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

    def _context(self, hidden: torch.Tensor, loras: LoraScales | None) -> torch.Tensor:
        """[n, L, D] -> [n, L, KV]. Each token has its own, and the module takes one chunk at a time."""
        count, length, width = hidden.shape
        room = self._engine.tokenizers[0].max_length
        tokens = torch.nn.functional.pad(hidden.flatten(0, 1), (0, 0, 0, -count * length % room))
        tokens = tokens.reshape(-1, room, width)
        inputs = {"hidden_states": tokens, **self._scales("context", loras, len(tokens))}
        context = self._engine.call("context", inputs)["context"]
        return context.flatten(0, 1)[: count * length].reshape(count, length, -1)

    def _zeros(self) -> PromptState:
        """SDXL's state of a missing negative prompt: hidden states and pooled embedding of zeros."""
        found = self._cache.get(None)
        if found is None:
            engine, model = self._engine, self._model
            length = engine.tokenizers[0].max_length
            hidden = torch.zeros(1, length, model.text_width, device=engine.device, dtype=engine.dtype)
            pooled = torch.zeros(1, model.pooled_width or 0, device=engine.device, dtype=engine.dtype)
            found = PromptState(self._context(hidden, None), pooled), ""  # whatever of LoRAs: 0 stays 0
            self._cache.put(None, *found)
        return found[0]


def edited(prompt: Text, editing: Editing | None) -> Edited[Text]:
    """What a prompt, and what a second text encoder reads in its place, are at each step.

    editing: how its steps are counted; None for a prompt that does not change between them.
    """
    if editing is None:
        return [(0, prompt)]
    parts = [dict(editing.texts(text)) if text is not None else {0: None} for text in prompt]
    found: list[tuple[int, Text]] = []
    now: list[str | None] = [None, None]
    for start in sorted({*parts[0], *parts[1]}):
        now = [part.get(start, before) for part, before in zip(parts, now, strict=True)]
        found.append((start, (now[0], now[1])))
    return found


def told_in_turn(several: Edited[Conditioning]) -> Conditioning:
    """What the U-Net is told of a prompt that changes between steps."""
    (_, first), *later = several
    shift = first.time_shift
    for start, one in later:
        if one.time_shift is not first.time_shift:  # in SDXL it depends on the prompt, too
            shift = torch.cat([shift[:start], one.time_shift[start:]])
    return Conditioning(first.context, shift, {start: one.context for start, one in later})


def weighted(hidden: torch.Tensor, weights: torch.Tensor, emphasis: Emphasis) -> torch.Tensor:
    """Hidden states [n, L, D] of n parts of a prompt, each token's times its weight [n, L] float32.

    Computed in float64, returned in the dtype of `hidden`. Parts without emphasis stay as they are.
    """
    if emphasis == "ignore" or bool((weights == 1).all()):
        return hidden
    exact = hidden.double()  # the mean is small beside the numbers
    told = exact * weights[..., None].to(hidden.device)
    if emphasis == "original":
        told = told * (exact.mean(dim=(1, 2), keepdim=True) / told.mean(dim=(1, 2), keepdim=True))
    plain = (weights == 1).all(dim=1)[:, None, None].to(hidden.device)
    return torch.where(plain, hidden, told.to(hidden.dtype))


def told_sizes(request: Request, *, over: bool, scored: bool) -> tuple[list[float], list[float]]:
    """The numbers that SDXL is told of a picture, and of what it is guided away from.

    As diffusers' pipelines tell them: without an image, the negative ones are the picture's own unless both
    sizes are given; over an image, each is for itself, and the crop is the picture's. scored: of the refiner,
    which is told a score in place of the target size, and a crop of its own for the negative.
    """
    own = (request.height, request.width)
    original, target = request.original_size or own, request.target_size or own
    away = request.negative_original_size, request.negative_target_size
    crop, crop_away = request.crops_coords_top_left, request.negative_crops_coords_top_left
    if scored:
        told: list[float] = [*original, *crop, request.aesthetic_score]
        return told, [*(away[0] or original), *crop_away, request.negative_aesthetic_score]
    told = [*original, *crop, *target]
    if over:
        return told, [*(away[0] or original), *crop, *(away[1] or target)]
    if None in away:
        return told, told
    return told, [*(away[0] or own), *crop_away, *(away[1] or own)]


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


def check_lengths(lengths: Sequence[int], most: int) -> int:
    """The length that contexts of these can be repeated to. Raises `RequestError` if it is over `most`."""
    longest, common = max(lengths), math.lcm(*lengths)
    if longest > most:
        raise RequestError(
            f"a prompt is {longest} tokens long, start and end of each chunk counted, and this engine takes "
            f"{most}; shorten it, or export the engine again (backend inductor: with --long-prompts)"
        )
    if common > most:
        told = " and ".join(map(str, sorted(set(lengths))))
        raise RequestError(
            f"prompts of {told} tokens, start and end of each chunk counted, have no common multiple up to "
            f"{most}, which this engine takes; make prompt and negative prompt more alike in length"
        )
    return common


def joined(states: Sequence[PromptState]) -> PromptState:
    """States of contexts of one length, one after the other."""
    pooled = [state.pooled for state in states if state.pooled is not None]
    context = torch.cat([state.context for state in states])
    return PromptState(context, torch.cat(pooled) if pooled else None)
