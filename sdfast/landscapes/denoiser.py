"""Trains the U-Net: latents, noise levels and caption features in, velocities out.

Ho et al. 2020 (arXiv:2006.11239) with the velocity target of Salimans and Ho 2022 (arXiv:2202.00512,
appendix D): v = √ᾱ·ε − √(1−ᾱ)·x. A tenth of the captions are empty, for classifier-free guidance (Ho and
Salimans 2022, arXiv:2207.12598).

Not compiled: with torch 2.13's Inductor on the CPU everything below a downsampler got no gradient. Attention
is spelled out as matrix products: the backward pass of the CPU's fused attention takes a quarter of a step.
"""

import json
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from sdfast.landscapes.autoencoder import Budget, learning_rate
from sdfast.landscapes.captions import caption
from sdfast.landscapes.pictures import scene_of
from sdfast.landscapes.tokenizer import Tokenizer

ARCHITECTURE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 12,
    "out_channels": 12,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 96, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

BATCH = 32
STEPS = 30000
LEARNING_RATE = 1.2e-3
WARM_UP = 100
EMPTY = 0.1
WORDINGS = 3  # captions of each picture
AVERAGE = 0.999


def start(model: UNet2DConditionModel) -> None:
    """Weights from which a thin network learns at once: residual branches and the output start at zero."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
        if name.endswith(("conv2", "proj_out", "conv_out")):
            torch.nn.init.zeros_(layer.weight)


def velocity_loss(
    model: UNet2DConditionModel, noisy: Tensor, t: Tensor, context: Tensor, target: Tensor
) -> Tensor:
    """Mean squared error of the velocity: noisy, target [B, 12, 16, 16], t [B], context [B, 77, 128]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(noisy, t, context, return_dict=False)[0]
    return F.mse_loss(velocity.float(), target)


class Examples:
    """Draws training batches: latents under fresh noise at spread levels, and one of their captions."""

    def __init__(self, latents: Tensor, text_encoder: CLIPTextModel, tokenizer: Tokenizer, seed: int) -> None:
        self.latents = latents
        self.rng = np.random.default_rng(seed)
        self.signal = DDIMScheduler(**SCHEDULE).alphas_cumprod
        scenes = [scene_of(i) for i in range(len(latents))]
        texts = [caption(scene, self.rng) for scene in scenes for _ in range(WORDINGS)]
        self.features = encode(texts, text_encoder, tokenizer)
        self.empty = encode([""], text_encoder, tokenizer)[0]

    @torch.no_grad()
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, context and velocities of one batch; timesteps are stratified."""
        rng = self.rng
        chosen = torch.from_numpy(rng.integers(0, len(self.latents), BATCH))
        context = self.features[WORDINGS * chosen + torch.from_numpy(rng.integers(0, WORDINGS, BATCH))]
        context[torch.from_numpy(rng.random(BATCH) < EMPTY)] = self.empty
        t = torch.from_numpy(((np.arange(BATCH) + rng.random(BATCH)) * 1000 / BATCH).astype(np.int64))
        clean = self.latents[chosen]
        noise = torch.randn_like(clean)
        a = self.signal[t].sqrt()[:, None, None, None]
        b = (1 - self.signal[t]).sqrt()[:, None, None, None]
        noisy = (a * clean + b * noise).contiguous(memory_format=torch.channels_last)
        return noisy, t, context, a * noise - b * clean


@torch.no_grad()
def encode(texts: list[str], text_encoder: CLIPTextModel, tokenizer: Tokenizer) -> Tensor:
    """Caption features [N, 77, 128] bfloat16."""
    features = torch.empty(len(texts), 77, ARCHITECTURE["cross_attention_dim"], dtype=torch.bfloat16)
    for first in range(0, len(texts), 250):
        ids = torch.tensor([tokenizer.encode(text) for text in texts[first : first + 250]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features[first : first + 250] = text_encoder(input_ids=ids).last_hidden_state
    return features


def train_denoiser(examples: Examples, folder: Path, log: TextIO, budget: Budget) -> None:
    """Train on latents of unit deviation; saves the moving average of the weights, also every few minutes."""
    torch.manual_seed(3)
    model = UNet2DConditionModel(**ARCHITECTURE)
    start(model)
    model.set_attn_processor(AttnProcessor())
    model = model.to(memory_format=torch.channels_last)
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step, progress, losses, started = 0, 0.0, [], time.perf_counter()
    saved = started
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(step, progress, WARM_UP)
        loss = velocity_loss(model, *examples.batch())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = max(1 - AVERAGE, 1 / (1 + step / 10))
        torch._foreach_lerp_(average, list(model.parameters()), share)
        losses.append(loss.item())
        step += 1
        now = time.perf_counter()
        progress = budget.progress(step, now - started)
        if step % 50 == 0:
            record = {"step": step, "loss": float(np.mean(losses[-50:])), "seconds": round(now - started, 1)}
            print(json.dumps(record), file=log, flush=True)
        if now - saved > 180:
            save_average(model, average, folder.with_name(folder.name + "_unfinished"))
            saved = now
    save_average(model, average, folder)


def save_average(model: UNet2DConditionModel, average: list[Tensor], folder: Path) -> None:
    """Save a model with the averaged weights."""
    averaged = UNet2DConditionModel.from_config(model.config)
    with torch.no_grad():
        for own, value in zip(averaged.parameters(), average, strict=True):
            own.copy_(value)
    averaged.save_pretrained(folder)
