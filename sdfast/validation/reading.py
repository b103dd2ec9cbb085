"""Long prompts and emphasis for the stock pipeline, which has neither: as embeddings, by its own networks.

Tokens come from transformers' tokenizers and hidden states from the pipeline's text encoders; how the text is
cut into chunks is written here a second time, for the comparison with `sdfast.tokenizer` to mean something.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from sdfast.emphasis import Piece
from sdfast.prompts import Reading, Text
from sdfast.request import Request

_COMMA, _NEAR = ",</w>", 20
Told = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states [1, L, D], and for SDXL the pooled embedding [1, P]."""


def in_small_letters(tokenizer: Any, text: str) -> str:
    """A text as CLIP's tokenizers make it before they look for tokens."""
    return str(tokenizer.backend_tokenizer.normalizer.normalize_str(text))


def as_given(tokenizer: Any, text: str | None) -> str | None:
    """A prompt as the stock pipeline is to be given it: in small letters where there are embeddings.

    transformers 5 finds their tokens in small letters, whatever the prompt has; diffusers then looks for what
    was found in the prompt, and would read the first vector alone of a token with capitals.
    """
    if text is None or all(token.special for token in tokenizer.added_tokens_decoder.values()):
        return text
    return in_small_letters(tokenizer, text)


def written_out(pipe: Any, tokenizer: Any, text: str) -> str:
    """A prompt as the stock pipeline itself gives it to a tokenizer: with each vector of an embedding."""
    return str(pipe.maybe_convert_prompt(as_given(tokenizer, text), tokenizer))


def is_plain(request: Request) -> bool:
    """Whether the stock pipeline reads the request's prompts by itself."""
    return Reading.of(request) == Reading()


def embeddings(pipe: Any, request: Request, index: int) -> dict[str, Any]:
    """What the stock pipeline is to be called with in place of prompt `index` and its negative prompt."""
    reading, sdxl = Reading.of(request), hasattr(pipe, "text_encoder_2")
    negative = request.negative_prompts[index]
    positive_told = _read(pipe, request.pairs[index], reading, request.clip_skip)
    # diffusers leaves layers out of the prompt alone
    negative_told = _read(pipe, request.negative_pairs[index], reading, None)
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


def _read(pipe: Any, prompt: Text, reading: Reading, clip_skip: int | None) -> Told:
    first, second = prompt[0] or "", prompt[1]
    sdxl = hasattr(pipe, "text_encoder_2")
    encoders = [] if pipe.tokenizer is None else [(pipe.tokenizer, pipe.text_encoder, first)]
    if sdxl:
        encoders.append((pipe.tokenizer_2, pipe.text_encoder_2, first if second is None else second))
    read = [_chunks(tokenizer, reading.parts(text), reading.chunked) for tokenizer, _, text in encoders]
    most = max(map(len, read))
    hidden, pooled = [], None
    for (tokenizer, encoder, _), chunks in zip(encoders, read, strict=True):
        states = []
        for number, chunk in enumerate(chunks + [[]] * (most - len(chunks))):
            state, whole = _encode(tokenizer, encoder, [id for id, _ in chunk], clip_skip, sdxl)
            states.append(_emphasised(state, chunk, reading))
            pooled = whole if number == 0 else pooled
        hidden.append(torch.cat(states, dim=1))
    return torch.cat(hidden, dim=-1), pooled if sdxl else None


def _chunks(tokenizer: Any, parts: list[list[Piece]], chunked: bool) -> list[list[tuple[int, float]]]:
    """(id, weight) of the tokens of each chunk, without start and end."""
    room, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(_COMMA)
    if not chunked:
        return [[token for part in parts for word in _words(tokenizer, part) for token in word][:room]]
    chunks: list[list[tuple[int, float]]] = [[]]
    for number, part in enumerate(parts):
        if number:
            chunks.append([])
        for word in _words(tokenizer, part):
            last = chunks[-1]
            if len(last) == room:
                ids = [id for id, _ in last]
                near = (
                    room - ids[::-1].index(comma) if comma in ids[-_NEAR:] and word[0][0] != comma else room
                )
                chunks[-1:] = [last[:near], last[near:]]
            if len(chunks[-1]) + len(word) > room:
                chunks.append([])
            chunks[-1].extend(word)
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1] else chunks


def _words(tokenizer: Any, part: list[Piece]) -> Iterator[list[tuple[int, float]]]:
    """(id, weight) of what stays in one chunk: a token, or all vectors of an embedding."""
    for piece in part:
        for id in tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids:
            yield [(id, piece.weight) for id in _vectors(tokenizer, id)]


def _vectors(tokenizer: Any, id: int) -> list[int]:
    """The ids that a token stands for: with those by its name and a number, as diffusers names them."""
    name, known = tokenizer.convert_ids_to_tokens(id), tokenizer.added_tokens_encoder
    ids = [id]
    while (further := f"{name}_{len(ids)}") in known:
        ids.append(known[further])
    return ids


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
