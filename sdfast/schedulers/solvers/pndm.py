"""PNDM: DDIM on a linear multistep method's noise."""

from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from sdfast.errors import RequestError
from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.levels import whole_timesteps
from sdfast.schedulers.noise import alpha_bar_at
from sdfast.schedulers.prediction import predicted_noise
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Schedule, table


class PNDMConfig(SchedulerConfig):
    scheduler = "PNDMScheduler"
    sampler_name = "PLMS"

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"

    @field_validator("rescale_betas_zero_snr", mode="before")
    @classmethod
    def _not_an_option_here(cls, _: Any) -> bool:
        return False  # the diffusers class has none: what another class's config says of it is ignored


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
    t = whole_timesteps(config, run)
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
    eps = predicted_noise(config, x_s, e, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    scale = alpha_bar * np.sqrt(1 - alpha_bar_prev) + np.sqrt(alpha_bar * (1 - alpha_bar) * alpha_bar_prev)
    x_t = np.sqrt(alpha_bar_prev / alpha_bar) * x_s - (alpha_bar_prev - alpha_bar) / scale * eps

    kept = np.stack([np.tile(row, (len(t), 1)) for row in (m, e_1, e_2, x)])  # [4, K, 7]
    kept[:, 1:2] = np.stack([e_1, e_2, e_3, start])[:, None]  # the second evaluation is not remembered
    return table(config, run, t, np.sqrt(1 / alpha_bar - 1)[:, 0], [x_t, *kept])
