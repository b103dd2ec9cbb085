"""Layouts of noise levels that no diffusers config can ask for, as AUTOMATIC1111 names and makes them.

They reach a solver as `sigmas`, so every solver that takes sigmas has them all. Each is [K + 1] float64,
falling, from the model's highest level on.
"""

from collections.abc import Callable, Mapping

import numpy as np

from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.noise import beta, exponential, karras, sigma_alphas, sigmas_of
from sdfast.schedulers.table import Floats

ALIGN_YOUR_STEPS = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""By model family: Sabour et al. 2024, arXiv:2404.14507, optimised for eleven levels."""


def align_your_steps(known: tuple[float, ...], steps: int) -> Floats:
    """Those levels, or as many others between them, log σ taken linearly; then no noise."""
    even = np.linspace(0, 1, len(known))
    levels = np.exp(np.interp(np.linspace(0, 1, steps), even, np.log(known)))
    return np.append(levels, 0.0)


def kl_optimal(sigma_min: float, sigma_max: float, steps: int) -> Floats:
    """arctan σ falls evenly to σ_min, where the run ends (Sabour et al. 2024, eq. 11)."""
    levels: Floats = np.tan(np.linspace(np.arctan(sigma_max), np.arctan(sigma_min), steps + 1))
    return levels


def _to_no_noise(layout: Callable[[float, float, int], Floats]) -> Callable[[float, float, int], Floats]:
    return lambda sigma_min, sigma_max, steps: np.append(layout(sigma_min, sigma_max, steps), 0.0)


_BY_RANGE: Mapping[str, Callable[[float, float, int], Floats]] = {
    "Karras": _to_no_noise(karras),
    "Exponential": _to_no_noise(exponential),
    "Polyexponential": _to_no_noise(exponential),  # with ρ = 1, AUTOMATIC1111's default
    "Beta": _to_no_noise(beta),
    "KL Optimal": kl_optimal,
}

LAYOUTS = (*_BY_RANGE, "Align Your Steps")


def laid_out(layout: str, config: SchedulerConfig, steps: int, family: str) -> tuple[float, ...]:
    """The K + 1 levels of a layout of `LAYOUTS` over all levels that the model knows.

    A solver that cannot go to no noise ends at the level before. family: "sd" or "sdxl"; Align Your Steps has
    levels for each.
    """
    levels = _levels(layout, config, steps, family)
    if config.ends_noisy and levels[-1] == 0:
        levels = _levels(layout, config, steps + 1, family)[:-1]
    return tuple(levels.tolist())


def _levels(layout: str, config: SchedulerConfig, steps: int, family: str) -> Floats:
    if layout == "Align Your Steps":
        return align_your_steps(ALIGN_YOUR_STEPS[family], steps)
    sigmas = sigmas_of(sigma_alphas(config))
    return _BY_RANGE[layout](float(sigmas[0]), float(sigmas[-1]), steps)
