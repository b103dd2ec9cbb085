"""The linear multistep method on the probability flow."""

import numpy as np

from sdfast.schedulers.config import SigmaConfig
from sdfast.schedulers.levels import exploding_levels
from sdfast.schedulers.prediction import slope
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Floats, Schedule, table

ORDER = 4


class LMSConfig(SigmaConfig):
    scheduler = "LMSDiscreteScheduler"
    sampler_name = "LMS"
    accepts = frozenset({"sigmas"})
    lacks = frozenset({"rescale_betas_zero_snr"})

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Karras levels of this class keep to the run's own bounds, in diffusers; other layouts do not."""
        return (None, None) if self.use_karras_sigmas else super().bounds


def lms(config: LMSConfig, run: Run) -> Schedule:
    """The last four slopes, as a polynomial in σ, integrated over the step (k-diffusion, `sample_lms`).

    The order is that of the step in the whole run, also where `strength` cuts the run and the slopes before
    the cut are none: diffusers' rule. Registers: the latents, and the three slopes before.
    """
    t, sigmas = exploding_levels(config, run)
    weight = _weights(sigmas)  # [K, 4]
    x, *past, m, _ = np.eye(6)
    slopes = [slope(config, x, m, sigmas[:-1, None]), *(np.tile(d, (len(t), 1)) for d in past)]
    x_next = x + sum(weight[:, j, None] * d for j, d in enumerate(slopes))
    return table(config, run, t, sigmas, [x_next, *slopes[:-1]], exploding=True)


def _weights(sigmas: Floats) -> Floats:
    """The integrals over each step of the Lagrange polynomials through its last levels: [K, 4].

    Gauss and Legendre's rule of two nodes is exact for cubic polynomials.
    """
    middle, half = (sigmas[1:] + sigmas[:-1]) / 2, np.diff(sigmas) / 2
    nodes = middle[:, None] + half[:, None] * np.array([-1, 1]) / np.sqrt(3)  # [K, 2]
    visited = np.arange(len(half))[:, None] - np.arange(ORDER)
    known = visited >= 0
    level = sigmas[np.maximum(visited, 0)]  # [K, 4], the own one first
    factor = known[:, None, :] & ~np.eye(ORDER, dtype=np.bool_)  # of polynomial j, whether level i is one
    apart = np.where(factor, level[:, :, None] - level[:, None, :], 1.0)
    distance = nodes[:, None, :, None] - level[:, None, None, :]  # [K, 1, 2, 4]
    polynomials = np.where(factor[:, :, None], distance / apart[:, :, None], 1.0).prod(axis=3)  # [K, 4, 2]
    weights: Floats = np.where(known, half[:, None] * polynomials.sum(axis=2), 0.0)
    return weights
