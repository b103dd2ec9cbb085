"""One function a scheduler: from a config and a request to a table.

A symbol here is not a tensor but a *row of coefficients*: `x, m, z = np.eye(3)` makes the latents, the model
output and the noise the three basis directions, and every formula of a paper, written with them as it
stands, yields the coefficients of its result: `x + (sigma_next - sigma) * d` is a row of the matrix. Levels
are [K, 1] columns, so that one line does all K steps at once.

Two sets of units are in use. DDPM, DDIM and DPM-Solver hold variance-preserving latents x = α x0 + σ ε with
α² + σ² = 1; Euler holds variance-exploding ones x = x0 + σ ε, and scales the network's input.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfast.errors import RequestError
from sdfast.schedulers.config import (
    DDIMConfig,
    DDPMConfig,
    DPMSolverConfig,
    EulerAncestralConfig,
    EulerConfig,
    PNDMConfig,
    Run,
    SchedulerConfig,
)
from sdfast.schedulers.noise import alpha_bar_at, ddpm_timesteps, dpm_levels, euler_levels
from sdfast.schedulers.table import Floats, Schedule


def ddpm(config: DDPMConfig, run: Run) -> Schedule:
    """Ancestral sampling of the chain, or of some of its timesteps (Ho et al. 2020, eq. 6, 7 and 15)."""
    t = ddpm_timesteps(config, run)
    alpha_bar = alpha_bar_at(config, t)
    alpha_bar_prev = np.append(alpha_bar[1:], 1.0)[:, None]
    alpha_bar = alpha_bar[:, None]
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha

    x, m, z = np.eye(3)
    x0 = _predicted_x0(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    mean = (
        np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * x0
        + np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * x
    )
    posterior = np.maximum((1 - alpha_bar_prev) / (1 - alpha_bar) * beta, 1e-20)
    variance = beta if config.variance_type == "fixed_large" else posterior
    draws_noise = t > 0
    return _table(config, t, [mean + draws_noise[:, None] * np.sqrt(variance) * z], draws_noise)


def ddim(config: DDIMConfig, run: Run) -> Schedule:
    """DDIM (Song et al. 2021, eq. 12 and 16); η = 0 is deterministic, η = 1 has DDPM's noise.

    The previous timestep is t - T // K, whatever the spacing, as in diffusers.
    """
    t = ddpm_timesteps(config, run)
    t_prev = t - config.num_train_timesteps // run.steps
    alpha_bar_prev = alpha_bar_at(config, np.maximum(t_prev, 0))[:, None]
    if config.set_alpha_to_one:
        alpha_bar_prev = np.where(t_prev[:, None] >= 0, alpha_bar_prev, 1.0)
    alpha_bar = alpha_bar_at(config, t)[:, None]

    x, m, z = np.eye(3)
    x0 = _predicted_x0(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    eps = _predicted_noise(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = run.eta * np.sqrt(variance)
    direction = _direction(1 - alpha_bar_prev - sigma**2, run.eta)
    x_prev = np.sqrt(alpha_bar_prev) * x0 + direction * eps + sigma * z
    return _table(config, t, [x_prev], np.full(len(t), run.eta > 0))


def plms(config: PNDMConfig, run: Run) -> Schedule:
    """PLMS: DDIM with the noise of the last four evaluations combined (Liu et al. 2022, eq. 9, 12 and 13).

    The second step is evaluated twice, as improved Euler, so that K steps take K + 1 evaluations. Registers:
    the latents, the three evaluations before, and the latents that the second evaluation starts from again.
    """
    if not config.skip_prk_steps:
        raise RequestError(
            "PNDMScheduler: skip_prk_steps=False (Runge-Kutta warm-up) is not supported; set it to true, as "
            "Stable Diffusion's configs do, or ask for 'PLMS'"
        )
    t = ddpm_timesteps(config, run)
    stride = config.num_train_timesteps // run.steps
    t = np.concatenate([t[:2], t[1:]])  # the second timestep twice
    t_from, t_to = t.copy(), t - stride
    t_from[1:2], t_to[1:2] = t[1:2] + stride, t[1:2]
    alpha_bar = alpha_bar_at(config, t_from)[:, None]
    alpha_bar_prev = alpha_bar_at(config, np.maximum(t_to, 0))[:, None]
    if config.set_alpha_to_one:
        alpha_bar_prev = np.where(t_to[:, None] >= 0, alpha_bar_prev, 1.0)

    x, e_1, e_2, e_3, start, m, _ = np.eye(7)
    e = np.tile((55 * m - 59 * e_1 + 37 * e_2 - 9 * e_3) / 24, (len(t), 1))
    first = np.stack([m, (m + e_1) / 2, (3 * m - e_1) / 2, (23 * m - 16 * e_1 + 5 * e_2) / 12])
    e[:4] = first[: len(t)]
    x_s = np.tile(x, (len(t), 1))
    x_s[1:2] = start
    eps = _predicted_noise(config, x_s, e, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    scale = alpha_bar * np.sqrt(1 - alpha_bar_prev) + np.sqrt(alpha_bar * (1 - alpha_bar) * alpha_bar_prev)
    x_t = np.sqrt(alpha_bar_prev / alpha_bar) * x_s - (alpha_bar_prev - alpha_bar) / scale * eps

    kept = np.stack([np.tile(row, (len(t), 1)) for row in (m, e_1, e_2, x)])  # [4, K, 7]
    kept[:, 1:2] = np.stack([e_1, e_2, e_3, start])[:, None]  # the second evaluation is not remembered
    return _table(config, t, [x_t, *kept], np.zeros(len(t), np.bool_))


def euler(config: EulerConfig, run: Run) -> Schedule:
    """Euler's method on dx/dσ = (x - x0) / σ (Karras et al. 2022, algorithm 2, first order, no churn)."""
    t, sigmas = euler_levels(config, run)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    scale = 1 / np.sqrt(sigma**2 + 1)

    x, m, _ = np.eye(3)
    x0 = _predicted_x0(config, scale * x, m, scale, scale * sigma)
    d = (x - x0) / sigma
    x_next = x + (sigma_next - sigma) * d
    return _table(config, t, [x_next], np.zeros(len(t), np.bool_), sigmas)


def euler_ancestral(config: EulerAncestralConfig, run: Run) -> Schedule:
    """An Euler step down to σ_down, then fresh noise up to σ_next (k-diffusion, `sample_euler_ancestral`).

    σ_up² + σ_down² = σ_next², with σ_down = σ_next² / σ: the split of DDPM's posterior.
    """
    t, sigmas = euler_levels(config, run)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    scale = 1 / np.sqrt(sigma**2 + 1)
    sigma_down = sigma_next**2 / sigma
    sigma_up = sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)

    x, m, z = np.eye(3)
    x0 = _predicted_x0(config, scale * x, m, scale, scale * sigma)
    d = (x - x0) / sigma
    x_next = x + (sigma_down - sigma) * d + sigma_up * z
    return _table(config, t, [x_next], np.ones(len(t), np.bool_), sigmas)


def dpmpp_2m(config: DPMSolverConfig, run: Run) -> Schedule:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), or its first order, which is DDIM in log-SNR time.

    From level s to level t, with λ = log(α / σ), h = λ_t - λ_s and h_0 the step before:
    x_t = σ_t / σ_s x - α_t (e^{-h} - 1) D, where D is x0 extrapolated along its last difference.
    `heun` weighs that difference by the exact integral of the exponential, `midpoint` by half a step's.
    """
    t, levels = dpm_levels(config, run)
    alphas = 1 / np.sqrt(levels**2 + 1)
    sigmas = levels * alphas
    h = -np.diff(np.log(levels))  # log σ/α = -λ; the last step may go to λ = ∞
    h_0 = np.append(np.inf, h[:-1])
    e = np.expm1(-h)
    slope = e + h if config.solver_type == "heun" else -e * h / 2
    slope = np.divide(slope, h_0, out=np.zeros_like(h), where=_second_order(config, len(t)))

    x, x0_prev, m, _ = np.eye(4)
    x0 = _predicted_x0(config, x, m, alphas[:-1, None], sigmas[:-1, None])
    x_t = (
        (sigmas[1:] / sigmas[:-1])[:, None] * x
        - (alphas[1:] * e)[:, None] * x0
        + (alphas[1:] * slope)[:, None] * (x0 - x0_prev)
    )
    return _table(config, t, [x_t, x0], np.zeros(len(t), np.bool_))


SAMPLING: dict[str, tuple[type[SchedulerConfig], Callable[[Any, Run], Schedule]]] = {
    DDPMConfig.scheduler: (DDPMConfig, ddpm),
    DDIMConfig.scheduler: (DDIMConfig, ddim),
    PNDMConfig.scheduler: (PNDMConfig, plms),
    EulerConfig.scheduler: (EulerConfig, euler),
    EulerAncestralConfig.scheduler: (EulerAncestralConfig, euler_ancestral),
    DPMSolverConfig.scheduler: (DPMSolverConfig, dpmpp_2m),
}


def _predicted_x0(config: SchedulerConfig, x: Floats, m: Floats, alpha: Floats, sigma: Floats) -> Floats:
    """x0 from x = α x0 + σ ε and the model output m (v: Salimans & Ho 2022, appendix D)."""
    if config.prediction_type == "epsilon":
        return (x - sigma * m) / alpha
    if config.prediction_type == "v_prediction":
        return alpha * x - sigma * m
    return np.broadcast_to(m, (len(alpha), len(m)))


def _predicted_noise(config: SchedulerConfig, x: Floats, m: Floats, alpha: Floats, sigma: Floats) -> Floats:
    """ε from x = α x0 + σ ε and the model output m."""
    if config.prediction_type == "epsilon":
        return np.broadcast_to(m, (len(alpha), m.shape[-1]))
    if config.prediction_type == "v_prediction":
        return alpha * m + sigma * x
    return (x - alpha * m) / sigma


def _direction(remaining: Floats, eta: float) -> Floats:
    """√(1 - ᾱ_prev - σ²), the weight of ε in DDIM: what the fresh noise leaves of the variance."""
    if (remaining < -1e-12).any():
        raise RequestError(f"eta={eta:g} adds more noise than a DDIM step removes; take eta between 0 and 1")
    return np.sqrt(np.maximum(remaining, 0))


def _second_order(config: DPMSolverConfig, steps: int) -> NDArray[np.bool_]:
    """[K], where the second-order update is used: there is a step before, and the last is not too steep."""
    second = np.full(steps, config.solver_order == 2)
    second[0] = False
    few = config.lower_order_final and steps < 15
    if config.euler_at_final or few or config.final_sigmas_type == "zero":
        second[-1] = False
    return second


def _table(
    config: SchedulerConfig,
    t: Floats,
    rows: list[Floats],
    draws_noise: NDArray[np.bool_],
    sigmas: Floats | None = None,
) -> Schedule:
    """The schedule whose registers become `rows`, [K, R + 2] each; `sigmas` if variance explodes."""
    return Schedule(
        timesteps=t,
        input_scale=np.ones(len(t)) if sigmas is None else 1 / np.sqrt(sigmas[:-1] ** 2 + 1),
        matrix=np.stack(rows, axis=1),
        draws_noise=draws_noise,
        init_noise_sigma=1.0 if sigmas is None else _init_noise_sigma(config, sigmas),
        scheduler=config.scheduler,
        sampler=_sampler_name(config),
        schedule_type=_schedule_type(config),
    )


def _init_noise_sigma(config: SchedulerConfig, sigmas: Floats) -> float:
    """σ_max; "leading" starts below the top, and diffusers adds the data's unit variance there."""
    top = float(sigmas.max())
    return (top**2 + 1) ** 0.5 if config.timestep_spacing == "leading" else top


def _sampler_name(config: SchedulerConfig) -> str:
    """AUTOMATIC1111's name, for the parameters written into a picture."""
    if isinstance(config, DPMSolverConfig):
        return f"DPM++ {config.solver_order}M" + (" Heun" if config.solver_type == "heun" else "")
    return _NAMES[config.scheduler]


def _schedule_type(config: SchedulerConfig) -> str:
    """AUTOMATIC1111's schedule type. "Automatic" means Karras for DPM++ 2M, so plain is "Uniform"."""
    if isinstance(config, EulerConfig | DPMSolverConfig) and config.use_karras_sigmas:
        return "Karras"
    return "Uniform" if isinstance(config, DPMSolverConfig) else "Automatic"


_NAMES = {
    DDPMConfig.scheduler: "DDPM",
    DDIMConfig.scheduler: "DDIM",
    PNDMConfig.scheduler: "PLMS",
    EulerConfig.scheduler: "Euler",
    EulerAncestralConfig.scheduler: "Euler a",
}
