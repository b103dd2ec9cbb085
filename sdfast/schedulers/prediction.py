"""What the network's output says of the clean picture and of the noise.

Both are rows of coefficients of x, m and whatever else, [..., columns]; `alpha` and `sigma` are columns of
levels with x = α x0 + σ ε. v: Salimans and Ho 2022 (arXiv:2202.00512), appendix D.
"""

import numpy as np

from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.table import Floats


def predicted_x0(config: SchedulerConfig, x: Floats, m: Floats, alpha: Floats, sigma: Floats) -> Floats:
    """x0 from x = α x0 + σ ε and the model output m (v: Salimans & Ho 2022, appendix D)."""
    if config.prediction_type == "epsilon":
        return (x - sigma * m) / alpha
    if config.prediction_type == "v_prediction":
        return alpha * x - sigma * m
    return np.broadcast_to(m, (len(alpha), len(m)))


def exploding_x0(config: SchedulerConfig, x: Floats, m: Floats, sigma: Floats) -> Floats:
    """x0 from x = x0 + σ ε and the model output m, which saw x / √(σ² + 1)."""
    scale = 1 / np.sqrt(sigma**2 + 1)
    return predicted_x0(config, scale * x, m, scale, scale * sigma)


def slope(config: SchedulerConfig, x: Floats, m: Floats, sigma: Floats) -> Floats:
    """dx/dσ = (x - x0) / σ on the probability flow (Karras et al. 2022, eq. 3 and 4)."""
    return (x - exploding_x0(config, x, m, sigma)) / sigma


def predicted_noise(config: SchedulerConfig, x: Floats, m: Floats, alpha: Floats, sigma: Floats) -> Floats:
    """ε from x = α x0 + σ ε and the model output m."""
    if config.prediction_type == "epsilon":
        return np.broadcast_to(m, (len(alpha), m.shape[-1]))
    if config.prediction_type == "v_prediction":
        return alpha * m + sigma * x
    return (x - alpha * m) / sigma
