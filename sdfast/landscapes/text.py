"""Trains the text encoder: a two-layer CLIP text model that learns to say what a caption names.

It is trained before the U-Net and frozen after, so the U-Net sees features in which the attributes are
already apart. Every position from the end token on must name all five attributes, or say that the caption
leaves one open.
"""

import json
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sdfast.landscapes.autoencoder import learning_rate
from sdfast.landscapes.captions import caption, parse
from sdfast.landscapes.pictures import scene_of
from sdfast.landscapes.scenes import ATTRIBUTES
from sdfast.landscapes.tokenizer import END, START, Tokenizer

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 128,
    "hidden_act": "quick_gelu",
}

BATCH = 64
STEPS = 1000
CAPTIONS = 30000
LEARNING_RATE = 1.5e-3


def targets_of(text: str) -> list[int]:
    """For each attribute the index of the named value, or one past the last for "left open"."""
    named = parse(text)
    indices = []
    for attribute, values in ATTRIBUTES.items():
        value = named[attribute]
        indices.append(len(values) if value is None else values.index(value))
    return indices


class Heads(torch.nn.Module):
    """One linear classifier an attribute, on the features of a position; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList([torch.nn.Linear(width, len(v) + 1) for v in ATTRIBUTES.values()])

    def forward(self, features: Tensor) -> list[Tensor]:
        """Features [N, D] to one [N, values + 1] a attribute."""
        return [head(features) for head in self.heads]


def train_text_encoder(tokenizer_folder: Path, folder: Path, log: TextIO, steps: int = STEPS) -> float:
    """Train and save the text encoder; returns the share of attributes it reads rightly in new captions."""
    torch.manual_seed(2)
    tokenizer = Tokenizer(tokenizer_folder)
    end = tokenizer.vocabulary[END]
    tokens = {"bos_token_id": tokenizer.vocabulary[START], "eos_token_id": end, "pad_token_id": end}
    model = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer.vocabulary), **ARCHITECTURE, **tokens)
    ).train()
    heads = Heads(ARCHITECTURE["hidden_size"])
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    texts = [caption(scene_of(i), np.random.default_rng([3, i])) for i in range(CAPTIONS)]
    rng = np.random.default_rng(2)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(step, step / steps, 50)
        batch = [texts[int(i)] for i in rng.integers(0, len(texts), BATCH)]
        loss, right = score(model, heads, tokenizer, batch, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            record = {
                "step": step,
                "loss": loss.item(),
                "right": right,
                "seconds": time.perf_counter() - started,
            }
            print(json.dumps(record), file=log, flush=True)
    model.eval().save_pretrained(folder)
    fresh = [caption(scene_of(i), np.random.default_rng([4, i])) for i in range(500)]
    with torch.inference_mode():
        return score(model, heads, tokenizer, fresh, rng)[1]


def score(
    model: CLIPTextModel, heads: Heads, tokenizer: Tokenizer, texts: list[str], rng: np.random.Generator
) -> tuple[Tensor, float]:
    """Classification loss and share right, at the end token and at a random one of its repetitions."""
    ids = torch.tensor([tokenizer.encode(text) for text in texts])
    targets = torch.tensor([targets_of(text) for text in texts])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(input_ids=ids).last_hidden_state.float()
    first_end = (ids == tokenizer.vocabulary[END]).int().argmax(dim=1)
    rows = torch.arange(len(texts))
    later = torch.tensor([int(rng.integers(int(at), ids.shape[1])) for at in first_end])
    losses, right = [], []
    for at in (first_end, later):
        for i, logits in enumerate(heads(features[rows, at])):
            losses.append(F.cross_entropy(logits, targets[:, i]))
            right.append((logits.argmax(dim=1) == targets[:, i]).float().mean())
    return torch.stack(losses).mean(), float(torch.stack(right).mean())
