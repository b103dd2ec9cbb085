"""Computes the autoencoder's encoder instead of training it: a linear transform of 8×8 patches.

The transform keeps the 12 directions in which patches vary most (their principal components, each divided
by the fourth root of its deviation, so that detail is not lost in noise too early and still weighs less in
the denoiser's loss than the broad shapes). An
`AutoencoderKL` encoder can be exactly linear: residual branches are zero, strided convolutions gather
2×2 pixels into channels, and before the last normalization every coefficient x stands as the pair x, −x
beside large constants, so that the normalization hardly scales it and silu(x) − silu(−x) = x.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

CONSTANT = 100.0  # what the last normalization divides by; far above any coefficient
LOG_VARIANCE = -6.0
LEVELS = (12, 32, 12)  # channels kept after each halving

Matrix = NDArray[np.float64]


def gather(features: Matrix) -> Matrix:
    """Features [N, H, W, C] to [N, H/2, W/2, 4C]: rows, then columns, of each 2×2 square."""
    n, h, w, c = features.shape
    squares = features.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(n, h // 2, w // 2, 4 * c)


def principal(features: Matrix, count: int) -> tuple[Matrix, Matrix, Matrix]:
    """Mean [C], directions [C, count] and deviations [count] of features [..., C], the largest first."""
    flat = features.reshape(-1, features.shape[-1])
    mean = flat.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov((flat - mean).T))
    order = np.argsort(variances)[::-1][:count]
    return mean, directions[:, order], np.sqrt(variances[order])


@dataclass(frozen=True)
class PatchTransform:
    """The linear map of each of the three halvings [4C, count], and the offset [12] of the last one."""

    maps: tuple[Matrix, Matrix, Matrix]
    offset: Matrix

    def latents(self, pictures: NDArray[np.uint8]) -> Tensor:
        """What the encoder computes, as matrix products: [N, 12, 16, 16] of pictures [N, 128, 128, 3]."""
        features: Matrix = pictures.astype(np.float64) / 127.5 - 1
        for matrix in self.maps:
            features = gather(features) @ matrix
        return torch.from_numpy((features + self.offset).transpose(0, 3, 1, 2)).float()


def fit_transform(pictures: NDArray[np.uint8]) -> PatchTransform:
    """The transform that keeps most of the pictures.

    Fitted to pictures [N, 128, 128, 3]; the coefficients have unit deviation over all channels together.
    """
    features: Matrix = pictures.astype(np.float64) / 127.5 - 1
    features = gather(gather(features))
    middle = principal(features, LEVELS[1])[1]
    features = gather(features @ middle)
    mean, directions, deviations = principal(features, LEVELS[2])
    scale = deviations**-0.25
    scale /= np.sqrt(np.mean((deviations * scale) ** 2))
    last = directions * scale
    return PatchTransform((np.eye(LEVELS[0]), middle, last), -mean @ last)


def set_halving(convolution: nn.Conv2d, matrix: Matrix) -> None:
    """Make a strided 3×3 convolution apply the matrix [4C, count] to each 2×2 square."""
    nn.init.zeros_(convolution.weight)
    channels, count = matrix.shape[0] // 4, matrix.shape[1]
    taps = torch.from_numpy(matrix.reshape(2, 2, channels, count).transpose(3, 2, 0, 1)).float()
    with torch.no_grad():
        convolution.weight[:count, :channels, :2, :2] = taps


def set_shortcut(convolution: nn.Conv2d, channels: int) -> None:
    """Make a 1×1 convolution pass its first channels on and nothing else."""
    nn.init.zeros_(convolution.weight)
    with torch.no_grad():
        for i in range(channels):
            convolution.weight[i, i, 0, 0] = 1.0


def silence(encoder: nn.Module) -> None:
    """Set every convolution of the encoder to zero: residual branches then pass their input on."""
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def set_encoder(model: AutoencoderKL, pictures: NDArray[np.uint8]) -> PatchTransform:
    """Give the encoder the weights of the transform fitted to pictures [N, 128, 128, 3], and return it."""
    encoder, latent, groups = model.encoder, LEVELS[2], model.config.norm_num_groups
    silence(encoder)
    transform = fit_transform(pictures)
    offset = transform.offset
    with torch.no_grad():
        for i in range(3):
            encoder.conv_in.weight[i, i, 1, 1] = 1.0
    for block, matrix in zip(encoder.down_blocks[:3], transform.maps, strict=True):
        set_halving(block.downsamplers[0].conv, matrix)
    for block, channels in zip(encoder.down_blocks[1:3], LEVELS[:2], strict=True):
        set_shortcut(block.resnets[0].conv_shortcut, channels)
    width = encoder.conv_norm_out.num_channels // groups  # channels of one group: pairs, two constants, zeros
    share = latent // groups
    shortcut, norm = encoder.down_blocks[3].resnets[0].conv_shortcut, encoder.conv_norm_out
    out, quant = encoder.conv_out, model.quant_conv
    with torch.no_grad():
        norm.weight.fill_(CONSTANT * (2 / width) ** 0.5)
        norm.bias.zero_()
        for i in range(latent):
            first = (i // share) * width + 2 * (i % share)
            for sign, channel in ((1.0, first), (-1.0, first + 1)):
                shortcut.weight[channel, i, 0, 0] = sign
                shortcut.bias[channel] = sign * float(offset[i])
                out.weight[i, channel, 1, 1] = sign
        for group in range(groups):
            shortcut.bias[(group + 1) * width - 2] = CONSTANT
            shortcut.bias[(group + 1) * width - 1] = -CONSTANT
        quant.weight.copy_(torch.eye(2 * latent)[:, :, None, None])
        quant.bias.zero_()
        quant.bias[latent:] = LOG_VARIANCE
    return transform
