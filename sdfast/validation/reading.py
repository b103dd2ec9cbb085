"""Long prompts and emphasis for the stock pipeline, which has neither: as embeddings, by its own networks.

Tokens come from transformers' tokenizers and hidden states from the pipeline's text encoders; how the text is
cut into chunks is written here a second time, for the comparison with `sdfast.tokenizer` to mean something.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from sdfast.emphasis import Piece
from sdfast.prompts import Reading
from sdfast.request import Request

_COMMA, _NEAR = ",</w>", 20
Told = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states [1, L, D], and for SDXL the pooled embedding [1, P]."""


def is_plain(request: Request) -> bool:
    """Whether the stock pipeline reads the request's prompts by itself."""
    return Reading.of(request) == Reading()


def embeddings(pipe: Any, request: Request, index: int) -> dict[str, Any]:
    """What the stock pipeline is to be called with in place of prompt `index` and its negative prompt."""
    reading, sdxl = Reading.of(request), hasattr(pipe, "text_encoder_2")
    negative = request.negative_prompts[index]
    positive_told = _read(pipe, request.prompts[index], reading, request.clip_skip)
    # diffusers leaves layers out of the prompt alone
    negative_told = _read(pipe, negative or "", reading, None)
    if sdxl and negative is None and pipe.config.force_zeros_for_empty_prompt:
        hidden, pooled = positive_told
        negative_told = torch.zeros_like(hidden), pooled if pooled is None else torch.zeros_like(pooled)
    told: dict[str, Any] = {}
    length = math.lcm(positive_told[0].shape[1], negative_told[0].shape[1])
    for name, (hidden, pooled) in (("", positive_told), ("negative_", negative_told)):
        told[f"{name}prompt_embeds"] = hidden.repeat(1, length // hidden.shape[1], 1)
        if sdxl:
            told[f"{name}pooled_prompt_embeds"] = pooled
    return told


def _read(pipe: Any, prompt: str, reading: Reading, clip_skip: int | None) -> Told:
    parts = reading.parts(prompt)
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    if hasattr(pipe, "text_encoder_2"):
        encoders.append((pipe.tokenizer_2, pipe.text_encoder_2))
    hidden, pooled = [], None
    for tokenizer, encoder in encoders:
        states = []
        for number, chunk in enumerate(_chunks(tokenizer, parts, reading.chunked)):
            state, whole = _encode(tokenizer, encoder, [id for id, _ in chunk], clip_skip, len(encoders) == 2)
            states.append(_emphasised(state, chunk, reading))
            pooled = whole if number == 0 else pooled
        hidden.append(torch.cat(states, dim=1))
    return torch.cat(hidden, dim=-1), pooled if len(encoders) == 2 else None


def _chunks(tokenizer: Any, parts: list[list[Piece]], chunked: bool) -> list[list[tuple[int, float]]]:
    """(id, weight) of the tokens of each chunk, without start and end."""
    room, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(_COMMA)
    chunks: list[list[tuple[int, float]]] = [[]]
    for number, part in enumerate(parts):
        if number:
            chunks.append([])
        for token in _tokens(tokenizer, part):
            last = chunks[-1]
            if len(last) == room and not chunked:
                return chunks
            if len(last) == room:
                ids = [id for id, _ in last]
                near = room - ids[::-1].index(comma) if comma in ids[-_NEAR:] and token[0] != comma else room
                chunks[-1:] = [last[:near], last[near:]]
            chunks[-1].append(token)
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1] else chunks


def _tokens(tokenizer: Any, part: list[Piece]) -> Iterator[tuple[int, float]]:
    for piece in part:
        for id in tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids:
            yield id, piece.weight


def _encode(
    tokenizer: Any, encoder: Any, ids: list[int], clip_skip: int | None, sdxl: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    length = tokenizer.model_max_length
    padded = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    padded += [tokenizer.pad_token_id] * (length - len(padded))
    output = encoder(torch.tensor([padded], device=encoder.device), output_hidden_states=True)
    if sdxl:
        return output.hidden_states[-2 - (clip_skip or 0)], output[0]
    if not clip_skip:
        return output[0], output[0]
    return encoder.text_model.final_layer_norm(output.hidden_states[-1 - clip_skip]), output[0]


def _emphasised(state: torch.Tensor, chunk: list[tuple[int, float]], reading: Reading) -> torch.Tensor:
    """state [1, L, D], its token i multiplied by the weight of the chunk's token i - 1."""
    weights = [weight for _, weight in chunk]
    if reading.emphasis in (None, "ignore") or all(weight == 1 for weight in weights):
        return state
    told = state.double()
    told[:, 1 : len(chunk) + 1] *= torch.tensor(weights, device=state.device)[:, None]
    if reading.emphasis == "original":
        told = told * (state.double().mean() / told.mean())
    return told.to(state.dtype)
