"""Trains the autoencoder: 128×128 pictures to 16×16 latents of 8 channels and back.

Rombach et al. 2022 (arXiv:2112.10752), section 3.1, without the perceptual and adversarial terms: the
pictures are drawings, so an absolute error on pixels and on their differences keeps edges sharp enough.
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
from torch import Tensor

ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 128,
}

BATCH = 4
LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-4
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


BUDGET = Budget(2000)


def learning_rate(step: int, progress: float, warm_up: int) -> float:
    """The share of the peak rate: a linear warm-up over some steps times half a cosine down to zero."""
    return float(min(1.0, (step + 1) / warm_up) * 0.5 * (1 + np.cos(np.pi * progress)))


def start(model: AutoencoderKL) -> None:
    """Weights from which a thin network learns at once.

    Convolutions keep their input's variance, every residual branch starts at zero (Zhang et al. 2019,
    arXiv:1901.09321), and the latents start with little noise, or the decoder would learn to ignore them.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
            if name.endswith("conv2"):
                torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        model.quant_conv.bias[model.config.latent_channels :] -= 6.0


def difference_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of neighbouring-pixel differences, for pictures [N, 3, H, W]."""
    horizontal = (a.diff(dim=3) - b.diff(dim=3)).abs().mean()
    vertical = (a.diff(dim=2) - b.diff(dim=2)).abs().mean()
    return horizontal + vertical


def loss_of(model: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss and mean absolute pixel error of a batch [N, 3, 128, 128]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = model.quant_conv(model.encoder(pictures)).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20.0, 10.0)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        output = model.decoder(model.post_quant_conv(latents)).float()
    error = (output - pictures).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    loss = (
        error
        + (output - pictures).square().mean()
        + GRADIENT_WEIGHT * difference_error(output, pictures)
        + KL_WEIGHT * divergence
    )
    return loss, error


def train_autoencoder(pictures: NDArray[np.uint8], folder: Path, log: TextIO, budget: Budget) -> None:
    """Train on pictures [N, 128, 128, 3] and save the model, its latents scaled to unit deviation."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    model = AutoencoderKL(**ARCHITECTURE).to(memory_format=torch.channels_last)
    start(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    step, progress, started = 0, 0.0, time.perf_counter()
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(step, progress, 30)
        batch = to_tensor(pictures[rng.integers(0, len(pictures), BATCH)])
        loss, error = loss_of(model, batch.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            record = {"step": step, "loss": loss.item(), "error": error.item(), "progress": progress}
            print(json.dumps(record), file=log, flush=True)
        if step % 200 == 199:
            model.save_pretrained(folder.with_name(folder.name + "_unfinished"))
        step += 1
        progress = budget.progress(step, time.perf_counter() - started)
    latents = encode(model, pictures[:2000])
    model.register_to_config(scaling_factor=1.0 / float(latents.std()))
    model.save_pretrained(folder)


@torch.inference_mode()
def encode(model: AutoencoderKL, pictures: NDArray[np.uint8], batch: int = 50) -> Tensor:
    """Unscaled mean latents [N, 8, 16, 16] float32 of pictures [N, 128, 128, 3]."""
    means = []
    for start in range(0, len(pictures), batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pixels = to_tensor(pictures[start : start + batch]).contiguous(memory_format=torch.channels_last)
            means.append(model.encode(pixels).latent_dist.mean.float())
    return torch.cat(means)


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
