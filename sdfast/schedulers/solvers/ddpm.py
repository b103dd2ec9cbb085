"""The chain itself: DDPM, and DDIM, which leaves timesteps out; and DDIM backwards, from picture to noise."""

from typing import Literal

import numpy as np

from sdfast.errors import RequestError
from sdfast.schedulers.config import Clipping, SchedulerConfig, Thresholding
from sdfast.schedulers.levels import whole_timesteps
from sdfast.schedulers.noise import alpha_bar_at
from sdfast.schedulers.prediction import predicted_noise, predicted_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Floats, Schedule, table


class DDPMConfig(Clipping, Thresholding, SchedulerConfig):
    scheduler = "DDPMScheduler"
    sampler_name = "DDPM"
    accepts = frozenset({"timesteps"})

    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small"
    clip_sample: bool = True
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"


class DDIMConfig(Clipping, Thresholding, SchedulerConfig):
    scheduler = "DDIMScheduler"
    sampler_name = "DDIM"
    accepts = frozenset({"eta"})

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"


class DDIMInverseConfig(Clipping, SchedulerConfig):
    scheduler = "DDIMInverseScheduler"
    sampler_name = "DDIM Inverse"

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    timestep_spacing: Literal["leading", "trailing"] = "leading"


def ddpm(config: DDPMConfig, run: Run) -> Schedule:
    """Ancestral sampling of the chain, or of some of its timesteps (Ho et al. 2020, eq. 6, 7 and 15)."""
    t = whole_timesteps(config, run)
    alpha_bar = alpha_bar_at(config, t)
    alpha_bar_prev = np.append(alpha_bar[1:], 1.0)[:, None]
    alpha_bar = alpha_bar[:, None]
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha

    x, m, z = np.eye(3)
    x0 = predicted_x0(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    mean = (
        np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * x0
        + np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * x
    )
    posterior = np.maximum((1 - alpha_bar_prev) / (1 - alpha_bar) * beta, 1e-20)
    variance = beta if config.variance_type == "fixed_large" else posterior
    draws_noise = t > 0
    x_prev = mean + draws_noise[:, None] * np.sqrt(variance) * z
    return table(config, run, t, np.sqrt(1 / alpha_bar - 1)[:, 0], [x_prev], draws_noise)


def ddim(config: DDIMConfig, run: Run) -> Schedule:
    """DDIM (Song et al. 2021, eq. 12 and 16); η = 0 is deterministic, η = 1 has DDPM's noise.

    The previous timestep is t - T // K, whatever the spacing, as in diffusers.
    """
    t = whole_timesteps(config, run)
    t_prev = t - config.num_train_timesteps // run.steps
    alpha_bar_prev = alpha_bar_at(config, np.maximum(t_prev, 0))[:, None]
    if config.set_alpha_to_one:
        alpha_bar_prev = np.where(t_prev[:, None] >= 0, alpha_bar_prev, 1.0)
    alpha_bar = alpha_bar_at(config, t)[:, None]

    x, m, z = np.eye(3)
    x0 = predicted_x0(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    eps = predicted_noise(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = run.eta * np.sqrt(variance)
    direction = _direction(1 - alpha_bar_prev - sigma**2, run.eta)
    x_prev = np.sqrt(alpha_bar_prev) * x0 + direction * eps + sigma * z
    return table(config, run, t, np.sqrt(1 / alpha_bar - 1)[:, 0], [x_prev], run.eta > 0)


def ddim_inverse(config: DDIMInverseConfig, run: Run) -> Schedule:
    """DDIM's ODE run the other way, from a picture to its noise (Song et al. 2021, section 4.3).

    Timesteps rise: a step goes up to t, and the network is told the level that is reached, as in diffusers.
    `strength` leaves out the noisy end, which is the last here.
    """
    t = whole_timesteps(config, run)[run.start :][::-1]
    t_from = t - config.num_train_timesteps // run.steps
    alpha_bar_from = alpha_bar_at(config, np.maximum(t_from, 0))[:, None]
    if config.set_alpha_to_one:
        alpha_bar_from = np.where(t_from[:, None] >= 0, alpha_bar_from, 1.0)
    alpha_bar = alpha_bar_at(config, t)[:, None]

    x, m, _ = np.eye(3)
    x0 = predicted_x0(config, x, m, np.sqrt(alpha_bar_from), np.sqrt(1 - alpha_bar_from))
    eps = predicted_noise(config, x, m, np.sqrt(alpha_bar_from), np.sqrt(1 - alpha_bar_from))
    x_t = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * eps
    return table(config, run, t, np.sqrt(1 / alpha_bar_from - 1)[:, 0], [x_t], start=0)


def _direction(remaining: Floats, eta: float) -> Floats:
    """√(1 - ᾱ_prev - σ²), the weight of ε in DDIM: what the fresh noise leaves of the variance."""
    if (remaining < -1e-12).any():
        raise RequestError(f"eta={eta:g} adds more noise than a DDIM step removes; take eta between 0 and 1")
    return np.sqrt(np.maximum(remaining, 0))
