"""PNDM: DDIM on the noise of a linear multistep method, which a Runge-Kutta method may warm up."""

from typing import Literal

import numpy as np

from sdfast.errors import RequestError
from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.levels import whole_timesteps
from sdfast.schedulers.noise import alpha_bar_at
from sdfast.schedulers.prediction import predicted_noise
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Floats, Schedule, table


class PNDMConfig(SchedulerConfig):
    scheduler = "PNDMScheduler"
    sampler_name = "PLMS"
    lacks = frozenset({"rescale_betas_zero_snr"})

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"

    @property
    def sampler(self) -> str:
        return "PLMS" if self.skip_prk_steps else "PNDM PRK"


def pndm(config: PNDMConfig, run: Run) -> Schedule:
    """PNDM as its config asks for it: PLMS alone, or warmed up by Runge-Kutta steps."""
    return plms(config, run) if config.skip_prk_steps else runge_kutta_plms(config, run)


def plms(config: PNDMConfig, run: Run) -> Schedule:
    """PLMS: DDIM with the noise of the last four evaluations combined (Liu et al. 2022, eq. 9, 12 and 13).

    The second step is evaluated twice, as improved Euler, so that K steps take K + 1 evaluations. Registers:
    the latents, the three evaluations before, and the latents that the second evaluation starts from again.

    diffusers counts the rows that are run: a run with `strength` takes its second row for that evaluation, so
    that its latents lie a step behind the timesteps from there on. The table does the same.
    """
    t = whole_timesteps(config, run)
    stride = config.num_train_timesteps // run.steps
    t = np.concatenate([t[:2], t[1:]])[run.start :]  # the second timestep twice
    t_from, t_to = t.copy(), t - stride
    t_from[1:2], t_to[1:2] = t[1:2] + stride, t[1:2]

    x, e_1, e_2, e_3, start, m, _ = np.eye(7)
    e = np.tile(_adams_bashforth(m, e_1, e_2, e_3), (len(t), 1))
    first = np.stack([m, (m + e_1) / 2, (3 * m - e_1) / 2, (23 * m - 16 * e_1 + 5 * e_2) / 12])
    e[:4] = first[: len(t)]
    x_s = np.tile(x, (len(t), 1))
    x_s[1:2] = start
    x_t = _transferred(config, x_s, e, t_from, t_to)

    kept = np.stack([np.tile(row, (len(t), 1)) for row in (m, e_1, e_2, x)])  # [4, K, 7]
    kept[:, 1:2] = np.stack([e_1, e_2, e_3, start])[:, None]  # the second evaluation is not remembered
    return table(config, run, t, _level(config, t), [x_t, *kept], start=0)


def runge_kutta_plms(config: PNDMConfig, run: Run) -> Schedule:
    """PNDM (Liu et al. 2022, algorithm 2): three steps of a Runge-Kutta method, four rows each, then PLMS.

    A warm-up step from t goes half a step down, there twice, and a whole step; the noises of its rows count
    1/6, 1/3, 1/3 and 1/6, and the first of them is remembered. K steps take K + 9 evaluations. Registers: the
    latents, three evaluations, the latents that a warm-up step starts from, and the noise it has gathered.

    As in diffusers, a run with `strength` still takes its first rows for the warm-up from the noisiest level.
    """
    t = whole_timesteps(config, run)
    if len(t) < 4:
        raise RequestError(
            f"PNDMScheduler: the Runge-Kutta warm-up takes 4 steps or more (got {run.steps}); take more,"
            " or set skip_prk_steps to true, as Stable Diffusion's configs do"
        )
    stride = config.num_train_timesteps // run.steps
    middle, below = t[1:4] + stride // 2, t[1:4]
    warm_up = np.stack([t[:3], middle, middle, below], axis=1).ravel()  # [12]
    t = np.concatenate([warm_up, t[3:]])[run.start :]
    row = np.arange(len(t))
    warms, phase = row < 12, np.where(row < 12, row % 4, -1)
    t_from = np.where(warms, warm_up[np.minimum(row, 11) // 4 * 4], t)
    t_to = t - np.where(warms, np.where(row % 2, 0, stride // 2), stride)

    x, e_1, e_2, e_3, start, gathered, m, _ = np.eye(8)
    ends, begins = (phase == 3)[:, None], (phase == 0)[:, None]
    e = np.where(warms[:, None], m, _adams_bashforth(m, e_1, e_2, e_3))
    e = np.where(ends, gathered + m / 6, e)
    x_t = _transferred(config, np.where((phase > 0)[:, None], start, x), e, t_from, t_to)

    remembers = (phase <= 0)[:, None]
    history = [np.where(remembers, new, old) for new, old in ((m, e_1), (e_1, e_2), (e_2, e_3))]
    weight = np.array([1 / 6, 1 / 3, 1 / 3, 0, 0])[phase][:, None]
    gathers = (np.isin(phase, (1, 2)))[:, None] * gathered + weight * m
    return table(
        config, run, t, _level(config, t), [x_t, *history, np.where(begins, x, start), gathers], start=0
    )


def _adams_bashforth(m: Floats, e_1: Floats, e_2: Floats, e_3: Floats) -> Floats:
    """The noise of a step from this evaluation and three before (eq. 12), to fourth order."""
    combined: Floats = (55 * m - 59 * e_1 + 37 * e_2 - 9 * e_3) / 24
    return combined


def _transferred(config: PNDMConfig, x: Floats, e: Floats, t_from: Floats, t_to: Floats) -> Floats:
    """The transfer x_{t_from} → x_{t_to} by the noise (or v) e (eq. 9), all rows [K, columns]."""
    alpha_bar = alpha_bar_at(config, t_from)[:, None]
    alpha_bar_prev = alpha_bar_at(config, np.maximum(t_to, 0))[:, None]
    if config.set_alpha_to_one:
        alpha_bar_prev = np.where(t_to[:, None] >= 0, alpha_bar_prev, 1.0)
    eps = predicted_noise(config, x, e, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    scale = alpha_bar * np.sqrt(1 - alpha_bar_prev) + np.sqrt(alpha_bar * (1 - alpha_bar) * alpha_bar_prev)
    return np.sqrt(alpha_bar_prev / alpha_bar) * x - (alpha_bar_prev - alpha_bar) / scale * eps


def _level(config: PNDMConfig, t: Floats) -> Floats:
    """σ/α at timesteps: [K] float64."""
    return np.sqrt(1 / alpha_bar_at(config, t) - 1)
