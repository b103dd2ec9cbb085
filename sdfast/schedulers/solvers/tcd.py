"""Trajectory consistency distillation: an evaluation may go to any level, and noise brings it back."""

import numpy as np

from sdfast.errors import RequestError
from sdfast.schedulers.noise import alpha_bar_at
from sdfast.schedulers.prediction import predicted_noise, predicted_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.lcm import DistilledConfig, distilled_timesteps
from sdfast.schedulers.table import Floats, Schedule, table


class TCDConfig(DistilledConfig):
    scheduler = "TCDScheduler"
    sampler_name = "TCD"
    accepts = frozenset({"timesteps", "eta"})


def tcd(config: TCDConfig, run: Run) -> Schedule:
    """Strategic stochastic sampling (Zheng et al. 2024, arXiv:2402.19159, algorithm 4); η is the paper's γ.

    From level t a DDIM step goes down to s = (1 - γ) t_prev, and noise brings the sample up to t_prev. γ = 0
    is DDIM on the distilled timesteps, γ = 1 goes to the clean end every time. The last step ends at 0.
    """
    if run.eta > 1:
        raise RequestError(f"eta={run.eta:g}: TCD's gamma lies between 0 (no noise) and 1")
    t = distilled_timesteps(config, run)
    t_prev = np.append(t[1:], 0.0)
    alpha_bar = alpha_bar_at(config, t)[:, None]
    alpha_bar_prev = alpha_bar_at(config, t_prev)[:, None]
    alpha_bar_s = alpha_bar_at(config, _share(1 - run.eta, t_prev))[:, None]

    x, m, z = np.eye(3)
    x0 = predicted_x0(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    eps = predicted_noise(config, x, m, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    x_s = np.sqrt(alpha_bar_s) * x0 + np.sqrt(1 - alpha_bar_s) * eps
    kept = alpha_bar_prev / alpha_bar_s  # 1 in the last step, which goes to 0 and stays there
    x_prev = np.sqrt(kept) * x_s + np.sqrt(1 - kept) * z
    draws_noise = (np.arange(len(t)) < len(t) - 1) & (run.eta > 0)
    return table(config, run, t, np.sqrt(1 / alpha_bar - 1)[:, 0], [x_prev], draws_noise)


def _share(share: float, t: Floats) -> Floats:
    """The whole timestep at that share of t: [K] float64. The product is float32, as diffusers' is."""
    whole: Floats = np.floor(np.float32(share) * t.astype(np.float32)).astype(np.float64)
    return whole
