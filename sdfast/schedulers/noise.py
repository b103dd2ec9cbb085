"""Noise levels: betas, spacings, Karras sigmas.

The noise levels of a checkpoint are data, and diffusers holds that data in float32: a table of cumulative
alphas ᾱ, from which it reads everything else. 1 - ᾱ is small at the clean end, so that the rounding of ᾱ is
visible in the picture (3.5e-5 of σ_min for Stable Diffusion). This module therefore makes the same float32
numbers as diffusers; what is computed *from* them, elsewhere, is float64.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sdfast.errors import RequestError
from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.table import Floats

Float32s = NDArray[np.float32]

ZERO_SNR_ALPHA = np.float32(2**-24)  # diffusers' stand-in for ᾱ_T = 0, so that σ_T is finite


@lru_cache(maxsize=64)
def alphas_cumprod(
    T: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    trained_betas: tuple[float, ...] | None,
    zero_snr: bool,
) -> Float32s:
    """ᾱ_t = ∏ (1 - β_s), s ≤ t (Ho et al. 2020, eq. 4), bit for bit diffusers' table: [T] float32."""
    if trained_betas is not None:
        betas = np.array(trained_betas, np.float32)
    elif beta_schedule == "linear":
        betas = _linspace32(beta_start, beta_end, T)
    elif beta_schedule == "scaled_linear":
        betas = _linspace32(beta_start**0.5, beta_end**0.5, T) ** 2
    elif beta_schedule == "exp":
        betas = _betas_of([math.exp(-12 * t / T) for t in range(T + 1)])
    else:
        betas = _betas_of([math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)])
    if zero_snr:
        betas = _zero_terminal_snr(betas)
    table = _cumprod32(1 - betas)
    table.setflags(write=False)
    return table


def sigmas_of(alpha_bar: Float32s) -> Float32s:
    """σ_t = √((1 - ᾱ_t) / ᾱ_t), the noise level in variance-exploding units: [T] float32, rising with t."""
    sigmas: Float32s = np.sqrt((1 - alpha_bar) / alpha_bar)
    return sigmas


def alpha_bar_at(config: SchedulerConfig, t: Floats) -> Floats:
    """ᾱ at whole timesteps: [K] float64. Raises RequestError for a timestep that was never trained."""
    table = _alphas_cumprod(config)
    outside = t[(t < 0) | (t >= len(table))]
    if len(outside):
        raise RequestError(
            f"{config.scheduler}: {len(t)} steps with timestep_spacing={config.timestep_spacing!r} and"
            f" steps_offset={config.steps_offset} would need timestep {outside[0]:g}; the model knows 0 to"
            f" {len(table) - 1}. Take another number of steps or another timestep_spacing"
        )
    return table[t.astype(np.intp)].astype(np.float64)


def _alphas_cumprod(config: SchedulerConfig) -> Float32s:
    return alphas_cumprod(
        config.num_train_timesteps,
        config.beta_start,
        config.beta_end,
        config.beta_schedule,
        config.trained_betas,
        config.rescale_betas_zero_snr,
    )


def sigma_alphas(config: SchedulerConfig) -> Float32s:
    """ᾱ as the schedulers that divide by it use it: never quite zero."""
    table = _alphas_cumprod(config)
    return np.append(table[:-1], ZERO_SNR_ALPHA) if config.rescale_betas_zero_snr else table


def as_float32(values: Floats) -> Floats:
    """Round to float32 where diffusers stores float32."""
    return values.astype(np.float32).astype(np.float64)


def _linspace32(start: float, stop: float, n: int) -> Float32s:
    """torch.linspace in float32: from both ends to the middle, the step rounded, each value rounded."""
    if n == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(n - 1))
    up = np.float64(first) + step * np.arange(n // 2)
    down = np.float64(last) - step * np.arange(n - n // 2 - 1, -1, -1)
    return np.concatenate([up, down]).astype(np.float32)


def _betas_of(f: Sequence[float], max_beta: float = 0.999) -> Float32s:
    """β_t = 1 - f_{t+1} / f_t, at most 0.999, where ᾱ follows f (Nichol & Dhariwal 2021, eq. 17)."""
    return np.array([min(1 - after / before, max_beta) for before, after in pairwise(f)], np.float32)


def _zero_terminal_snr(betas: Float32s) -> Float32s:
    """Shift and scale √ᾱ so that √ᾱ_T = 0 and √ᾱ_1 stays (Lin et al. 2023, algorithm 1), in float32."""
    root = np.sqrt(_cumprod32(1 - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    alphas: Float32s = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def _cumprod32(alphas: Float32s) -> Float32s:
    """torch.cumprod of float32 on a CPU: the product is kept in float64, each value rounded once."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def spaced(spacing: str, steps: int, T: int, offset: int) -> Floats:
    """Timesteps of DDPM, DDIM and Euler, falling (Lin et al. 2023, table 2): [K] float64.

    Linspace timesteps are fractions; DDPM and DDIM round them. Everything else is whole.
    """
    if spacing == "linspace":
        return np.linspace(0, T - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps - 1, -1, -1, dtype=np.float64) * (T // steps) + offset
    return np.arange(T, 0, -T / steps).round() - 1


def spaced_open(spacing: str, steps: int, T: int, last: int, offset: int) -> Floats:
    """Timesteps of DPM-Solver, falling and whole: [K] float64.

    One more point than steps is laid out and the lowest left out: the solver's last step goes from there to
    the end. `last` < T cuts off the noisiest timesteps (`lambda_min_clipped`).
    """
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[:0:-1]
    if spacing == "leading":
        return np.arange(steps, 0, -1, dtype=np.float64) * (last // (steps + 1)) + offset
    return np.arange(last, 0, -T / steps).round() - 1


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Floats:
    """σ_i^(1/ρ) falls evenly from σ_max^(1/ρ) to σ_min^(1/ρ) (Karras et al. 2022, eq. 5): [K] float64."""
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels: Floats = (top + np.linspace(0, 1, steps) * (bottom - top)) ** rho
    return levels


def exponential(sigma_min: float, sigma_max: float, steps: int) -> Floats:
    """log σ falls evenly from σ_max to σ_min: [K] float64."""
    levels: Floats = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
    return levels


def beta(sigma_min: float, sigma_max: float, steps: int, a: float = 0.6, b: float = 0.6) -> Floats:
    """σ at even quantiles of a Beta(a, b) distribution between σ_min and σ_max (arXiv:2407.12173)."""
    from scipy.special import betaincinv  # 30 ms that only this layout needs

    quantiles = betaincinv(a, b, 1 - np.linspace(0, 1, steps))
    levels: Floats = sigma_min + quantiles * (sigma_max - sigma_min)
    return levels


def sigma_to_t(sigmas: NDArray[np.floating], log_sigmas: Float32s) -> Floats:
    """The (fractional) timestep of each noise level, by linear interpolation in log σ: [K] float64."""
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_sigmas, log_sigma, side="right") - 1, 0, len(log_sigmas) - 2)
    w = np.clip((log_sigmas[low] - log_sigma) / (log_sigmas[low] - log_sigmas[low + 1]), 0, 1)
    timesteps: Floats = ((1 - w) * low + w * (low + 1)).astype(np.float64)
    return timesteps
