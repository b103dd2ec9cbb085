"""Which noise levels a run visits: the timesteps or sigmas asked for, or a layout of its own.

`exploding_levels` is for schedulers that hold x = x0 + σ ε (Euler and its kin), `preserving_levels` for the
solvers that hold x = α x0 + σ ε (DPM-Solver and its kin). Levels are σ/α in both.
"""

from typing import Literal

import numpy as np

from sdfast.errors import RequestError
from sdfast.schedulers.config import SchedulerConfig, SigmaConfig
from sdfast.schedulers.noise import (
    Float32s,
    as_float32,
    beta,
    exponential,
    karras,
    sigma_alphas,
    sigma_to_t,
    sigmas_of,
    spaced,
    spaced_open,
)
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Floats

Final = Literal["zero", "model", "run"]


def whole_timesteps(config: SchedulerConfig, run: Run) -> Floats:
    """The timesteps of DDPM, DDIM and PNDM, falling and whole: [K] float64."""
    if run.timesteps is not None:
        return np.array(run.timesteps)
    return spaced(config.timestep_spacing, run.steps, config.num_train_timesteps, config.steps_offset).round()


def exploding_levels(
    config: SchedulerConfig, run: Run, final: float = 0.0, *, log_linear: bool = False, rounded: bool = True
) -> tuple[Floats, Floats]:
    """Timesteps [K] and noise levels [K + 1], the last one `final`: float32 numbers in float64.

    log_linear: K + 2 levels, of which the first K + 1 are even in log σ over all that the model knows.
    rounded: whether the timesteps are float32 numbers; DPM++ SDE's are not.
    """
    sigmas = sigmas_of(sigma_alphas(config))
    if run.sigmas is not None:
        given = np.array(run.sigmas, np.float32)
        return as_float32(sigma_to_t(given[:-1], np.log(sigmas))), given.astype(np.float64)
    if run.timesteps is not None:
        t = as_float32(np.array(run.timesteps))
    else:
        t = spaced(config.timestep_spacing, run.steps, config.num_train_timesteps, config.steps_offset)
        t = as_float32(t) if rounded else t
    if log_linear:
        levels = exponential(float(sigmas[0]), float(sigmas[-1]), run.steps + 1)
    else:
        levels = np.interp(t, np.arange(len(sigmas)), sigmas)
    if isinstance(config, SigmaConfig) and config.respacing:
        levels = respaced(config, levels[-1], levels[0], run.steps)
        t = sigma_to_t(levels, np.log(sigmas))
        t = as_float32(t) if rounded else t
    return t, as_float32(np.append(levels, final))


def preserving_levels(
    config: SigmaConfig, run: Run, final: Final, *, rounded: bool, clipped: float = -np.inf
) -> tuple[Floats, Floats]:
    """Timesteps [K], whole unless levels are given, and noise levels σ/α [K + 1], both float64.

    final: where the last step goes: to no noise, to the lowest level of the model, or to the lowest of the
        run, which is the model's unless the config lays the levels out anew.
    rounded: whether diffusers rounds the timesteps that it finds for such levels, before it cuts them.
    clipped: the run starts at the first timestep with -log σ/α of this or more.
    """
    sigmas = sigmas_of(sigma_alphas(config))
    if run.sigmas is not None:
        given = as_float32(np.array(run.sigmas))
        return sigma_to_t(given[:-1], np.log(sigmas)), given
    if config.respacing:
        levels = respaced(config, sigmas[0], sigmas[-1], run.steps)
        t = sigma_to_t(levels, np.log(sigmas))
        t = np.trunc(t.round() if rounded else t)
    else:
        t = _open_timesteps(config, run, sigmas, clipped)
        levels = np.interp(t, np.arange(len(sigmas)), sigmas)
    lowest = levels[-1] if final == "run" and config.respacing else float(sigmas[0])
    levels = as_float32(np.append(levels, 0.0 if final == "zero" else lowest))
    rises = levels[-1] > levels[-2] * (1 + 1e-6)  # the last two may be one level, but for rounding
    if not (np.diff(levels[:-1]) < 0).all() or rises:
        raise RequestError(
            f"{config.scheduler}: {len(t)} steps do not fit the noise levels of this model with"
            f" timestep_spacing={config.timestep_spacing!r}: two of them fall together. Take fewer steps"
        )
    return t, levels


def _open_timesteps(config: SchedulerConfig, run: Run, sigmas: Float32s, clipped: float) -> Floats:
    if run.timesteps is not None:
        return np.array(run.timesteps)
    T = config.num_train_timesteps
    last = T - int(np.searchsorted(-np.log(sigmas[::-1]), clipped))
    if last < 1:
        raise RequestError(f"lambda_min_clipped={clipped:g} leaves no timestep; lower it")
    return spaced_open(config.timestep_spacing, run.steps, T, last, config.steps_offset)


def respaced(config: SigmaConfig, lowest: float, highest: float, steps: int) -> Floats:
    """Levels laid out anew between these, where the config does not say between which: [K] float64.

    Lu's layout, even in log SNR (Lu et al. 2022, arXiv:2206.00927), heeds no `sigma_min` and `sigma_max`.
    """
    if config.respacing == "Lu":
        bottom, top = np.log(np.array([lowest, highest], np.float32)).tolist()
        even: Floats = np.exp(np.linspace(top, bottom, steps))
        return even
    sigma_min, sigma_max = config.bounds
    sigma_min = float(lowest) if sigma_min is None else sigma_min
    sigma_max = float(highest) if sigma_max is None else sigma_max
    layout = {"Karras": karras, "Exponential": exponential, "Beta": beta}[str(config.respacing)]
    return layout(sigma_min, sigma_max, steps)


def final_level(final_sigmas_type: str, sigmas: Float32s) -> float:
    """Where the last step goes: to no noise, or to the model's lowest level."""
    return 0.0 if final_sigmas_type == "zero" else float(sigmas[0])
