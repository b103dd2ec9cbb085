"""Trains the autoencoder: 128×128 pictures to 16×16 latents of 12 channels and back.

The encoder is computed (`encoder.py`), so the U-Net and the decoder can be trained independently. The
decoder learns by absolute and squared error of pixels, and absolute error of their differences for edges.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from sdfast.landscapes.encoder import set_encoder

ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 12,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 128,
    "scaling_factor": 1.0,
}

BATCH = 4
STEPS = 12000
LEARNING_RATE = 2e-3
NOISE = 0.15  # largest deviation of the noise on the latents, whose own is 1; the U-Net errs too
FITTED = 1000  # pictures that the encoder is fitted to
GRADIENT_WEIGHT = 0.5


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures [N, 128, 128, 3] uint8 as a tensor [N, 3, 128, 128] float32 in −1 … 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


@dataclass(frozen=True)
class Budget:
    """How long a training runs: a number of steps, or as many as fit into a time, whichever ends first."""

    steps: int
    seconds: float = float("inf")

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the training that is done, 0 … 1."""
        return min(1.0, max(step / self.steps, elapsed / self.seconds))


def learning_rate(step: int, progress: float, warm_up: int) -> float:
    """The share of the peak rate: a linear warm-up over some steps times half a cosine down to zero."""
    return float(min(1.0, (step + 1) / warm_up) * 0.5 * (1 + np.cos(np.pi * progress)))


def start(decoder: nn.Module) -> None:
    """Weights from which a thin network learns at once.

    Convolutions keep their input's variance and every residual branch starts at zero (Zhang et al. 2019,
    arXiv:1901.09321).
    """
    for name, layer in decoder.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if name.endswith("conv2"):
                nn.init.zeros_(layer.weight)


def difference_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of neighbouring-pixel differences, for pictures [N, 3, H, W]."""
    horizontal = (a.diff(dim=3) - b.diff(dim=3)).abs().mean()
    vertical = (a.diff(dim=2) - b.diff(dim=2)).abs().mean()
    return horizontal + vertical


def loss_of(model: AutoencoderKL, latents: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss and mean absolute pixel error: latents [N, 12, 16, 16], pictures [N, 3, 128, 128]."""
    noisy = latents + NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.decoder(model.post_quant_conv(noisy)).float()
    error = (output - pictures).abs().mean()
    squares = (output - pictures).square().mean()
    return error + squares + GRADIENT_WEIGHT * difference_error(output, pictures), error


def train_autoencoder(pictures: NDArray[np.uint8], folder: Path, log: TextIO, budget: Budget) -> None:
    """Compute the encoder from pictures [N, 128, 128, 3], train the decoder on them, and save both."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    model = AutoencoderKL(**ARCHITECTURE)
    maps = set_encoder(model, pictures[:FITTED])
    start(model.decoder)
    nn.init.dirac_(model.post_quant_conv.weight)
    model = model.to(memory_format=torch.channels_last)
    parameters = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    step, progress, started = 0, 0.0, time.perf_counter()
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(step, progress, 30)
        chosen = pictures[rng.integers(0, len(pictures), BATCH)]
        pixels = to_tensor(chosen).contiguous(memory_format=torch.channels_last)
        loss, error = loss_of(model, maps.latents(chosen), pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 25 == 0:
            record = {"step": step, "loss": loss.item(), "error": error.item(), "progress": progress}
            print(json.dumps(record), file=log, flush=True)
        if step % 200 == 199:
            model.save_pretrained(folder.with_name(folder.name + "_unfinished"))
        step += 1
        progress = budget.progress(step, time.perf_counter() - started)
    model.save_pretrained(folder)


@torch.inference_mode()
def reconstruct(model: AutoencoderKL, pictures: NDArray[np.uint8], batch: int = 50) -> NDArray[np.uint8]:
    """Pictures [N, 128, 128, 3] uint8 encoded and decoded again, in the model's own precision."""
    decoded = []
    for first in range(0, len(pictures), batch):
        pixels = to_tensor(pictures[first : first + batch]).to(model.dtype)
        output = model.decode(model.encode(pixels).latent_dist.mean).sample.float()
        decoded.append(((output.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8))
    answer: NDArray[np.uint8] = torch.cat(decoded).numpy()
    return answer
