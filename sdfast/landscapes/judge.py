"""Says what a picture shows: a small convolutional network with one classifier an attribute.

It is trained on the renderer's pictures alone, some of them passed through the autoencoder or blurred, so
that it judges what is drawn and not how sharply. It knows nothing of the U-Net.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdfast.landscapes.autoencoder import learning_rate, reconstruct, to_tensor
from sdfast.landscapes.scenes import ATTRIBUTES

WEIGHTS = Path(__file__).with_name("judge.safetensors")
BATCH = 64
STEPS = 1600
LEARNING_RATE = 2e-3
RECONSTRUCTED = 600
REPEATED = 12  # a quarter of what it sees went through the autoencoder


class Judge(nn.Module):
    """Pictures [N, 3, 128, 128] in −1 … 1 to one row of logits an attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96)
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(a, b, 3, stride=2 if i < 3 else 1, padding=1)
                for i, (a, b) in enumerate(pairwise(widths))
            ]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(4, width) for width in widths[1:]])
        self.heads = nn.ModuleList([nn.Linear(2 * widths[-1], len(values)) for values in ATTRIBUTES.values()])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Logits [N, values] for each attribute."""
        x = F.avg_pool2d(pictures, 2)  # [N, 3, 64, 64]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        features = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)  # [N, 192]
        return [head(features) for head in self.heads]


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The trained judge."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


@torch.inference_mode()
def verdicts(judge: Judge, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """What each picture [N, 128, 128, 3] uint8 shows: attribute indices [N, 5]."""
    rows = []
    for first in range(0, len(pictures), 100):
        logits = judge(to_tensor(pictures[first : first + 100]))
        rows.append(torch.stack([row.argmax(dim=1) for row in logits], dim=1))
    answer: NDArray[np.int64] = torch.cat(rows).numpy()
    return answer


def vary(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """A batch [N, 3, 128, 128] shifted, blurred, and changed a little in contrast, brightness and grain."""
    dy, dx = (int(i) for i in rng.integers(-3, 4, 2))
    pictures = torch.roll(pictures, (dy, dx), dims=(2, 3))
    half = len(pictures) // 2
    blurred = F.avg_pool2d(F.pad(pictures[:half], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.cat([blurred, pictures[half:]])
    scale = torch.from_numpy(rng.uniform(0.9, 1.1, (len(pictures), 1, 1, 1))).float()
    shift = torch.from_numpy(rng.uniform(-0.06, 0.06, (len(pictures), 3, 1, 1))).float()
    return pictures * scale + shift + 0.03 * torch.randn_like(pictures)


def train_judge(
    pictures: NDArray[np.uint8],
    labels: NDArray[np.int64],
    model: AutoencoderKL,
    path: Path,
    log: TextIO,
    steps: int = STEPS,
) -> None:
    """Train on pictures [N, 128, 128, 3] with indices [N, 5] and on reconstructions; save the weights."""
    decoded = reconstruct(model, pictures[:RECONSTRUCTED])
    pictures = np.concatenate([pictures, *[decoded] * REPEATED])
    labels = np.concatenate([labels, *[labels[:RECONSTRUCTED]] * REPEATED])
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(step, step / steps, 50)
        chosen = rng.integers(0, len(pictures), BATCH)
        targets = torch.from_numpy(labels[chosen])
        logits = judge(vary(to_tensor(pictures[chosen]), rng))
        losses = [F.cross_entropy(row, targets[:, i], label_smoothing=0.02) for i, row in enumerate(logits)]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 100 == 0:
            right = [float((row.argmax(1) == targets[:, i]).float().mean()) for i, row in enumerate(logits)]
            print(json.dumps({"step": step, "right": right}), file=log, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), path)
