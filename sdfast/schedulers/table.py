"""`Schedule`: a scheduler's run as a table of numbers."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfast.errors import RequestError
from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.run import Run

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Brownian:
    """Which stretches of one Brownian motion over the noise levels a schedule's rows draw their noise from.

    A row's unit noise is the motion's increment over the levels that the row crosses, over the root of their
    distance, so rows that cross the same levels have noise in common.

    Attributes:
        span: the lowest and the highest level of the whole run, where the motion starts and ends.
        crossed: [K, 2] float64, the levels σ and σ_next of the step that a row is part of.
        half: [K] bool, whether the row goes only half way, in log σ.
        seed: the motion's own, if the config has one.
    """

    span: tuple[float, float]
    crossed: Floats
    half: NDArray[np.bool_]
    seed: int | None


@dataclass(frozen=True, eq=False)
class Schedule:
    """K rows; each is one evaluation of the network and one small matrix. All arrays are read-only.

    The loop that runs any schedule, with R registers that start as `[latents, 0, ...]`:

        m = network(registers[0] * input_scale[k], timesteps[k])      # after guidance
        z = randn() if draws_noise[k] else 0                          # or `brownian`'s
        registers = matrix[k] @ [*registers, m, z]

    After row K - 1, register 0 holds the finished latents.

    Attributes:
        timesteps: [K] float64, what the network is told; the numbers of diffusers' `scheduler.timesteps`.
        input_scale: [K] float64, diffusers' `scale_model_input`.
        matrix: [K, R, R + 2] float64. Columns: the R registers, the guided model output m, unit noise z.
        draws_noise: [K] bool, whether diffusers draws noise from the generator in this row. A row that
            draws but weighs its noise with zero still has to draw, so that later rows see the same numbers.
        init_noise_sigma: the latents start as unit noise times this.
        noising: [K + 1, 2] float64, (a, b) before each row: a · x0 + b · noise are a picture's latents x0 at
            its noise level, as diffusers' `add_noise` makes them. A run with `strength` starts from the
            first; the last is x0 itself. None for a scheduler object that has no `add_noise`.
        scheduler: diffusers class name, "DPMSolverMultistepScheduler".
        sampler: AUTOMATIC1111's name for it, "DPM++ 2M".
        schedule_type: AUTOMATIC1111's name for its noise levels, "Karras".
        brownian: where the noise comes from; None: each draw is independent of the others.
    """

    timesteps: Floats
    input_scale: Floats
    matrix: Floats
    draws_noise: NDArray[np.bool_]
    init_noise_sigma: float
    noising: Floats | None
    scheduler: str
    sampler: str
    schedule_type: str
    brownian: Brownian | None = None

    @classmethod
    def from_diffusers(cls, scheduler: Any, eta: float = 0.0) -> "Schedule":
        """The table of a scheduler object of any class: `sdfast.schedulers.extract.from_diffusers`.

        >>> scheduler.set_timesteps(20)
        >>> table = Schedule.from_diffusers(scheduler)
        """
        from sdfast.schedulers.extract import from_diffusers  # it needs torch, which tables do not

        return from_diffusers(scheduler, eta)

    def __post_init__(self) -> None:
        finite = np.isfinite(self.matrix).all(axis=(1, 2))
        if not finite.all():
            k = int(np.argmin(finite))
            raise RequestError(
                f"{self.scheduler} has no finite coefficients for step {k + 1} of {len(self)}, timestep"
                f" {self.timesteps[k]:g}. An epsilon model cannot start from zero terminal SNR: check"
                " prediction_type, rescale_betas_zero_snr and the betas in the scheduler config"
            )
        for name in ("timesteps", "input_scale", "matrix", "draws_noise", "noising"):
            if getattr(self, name) is None:
                continue
            array = np.ascontiguousarray(getattr(self, name))  # a reversed view is one that torch refuses
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        """K: how often the network is evaluated."""
        return len(self.timesteps)

    def first(self, rows: int) -> "Schedule":
        """The run broken off after so many rows: what it leaves is noisy still.

        As with diffusers' `denoising_end`, to which the last row is a run's end in one thing: what is kept of
        an image that is drawn over has no noise there.
        """
        brownian = self.brownian and replace(
            self.brownian, crossed=self.brownian.crossed[:rows], half=self.brownian.half[:rows]
        )
        return replace(
            self,
            timesteps=self.timesteps[:rows],
            input_scale=self.input_scale[:rows],
            matrix=self.matrix[:rows],
            draws_noise=self.draws_noise[:rows],
            noising=None if self.noising is None else np.vstack([self.noising[:rows], self.noising[-1:]]),
            brownian=brownian,
        )

    @property
    def registers(self) -> int:
        """R: the latents and the history that the scheduler keeps."""
        return int(self.matrix.shape[1])


def table(
    config: SchedulerConfig,
    run: Run,
    t: Floats,
    levels: Floats,
    rows: list[Floats],
    draws_noise: NDArray[np.bool_] | bool = False,
    *,
    exploding: bool = False,
    start: int | None = None,
    noised: Floats | None = None,
) -> Schedule:
    """The schedule whose registers become `rows`, [K, R + 2] each, from its first step on.

    t: [K] timesteps. levels: the noise level σ/α of the latents before each of the K steps; more are ignored.
    exploding: the latents are x0 + σ ε, and the network's input is scaled; else α x0 + σ ε with α² + σ² = 1.
    start: the first row that is run, where that is not `run.start`. noised: the levels that diffusers adds
        noise for, where those are not `levels`.
    """
    start = run.start if start is None else start
    levels = levels[: len(t)]
    scale = 1 / np.sqrt(levels**2 + 1)
    return Schedule(
        timesteps=t[start:],
        input_scale=(scale if exploding else np.ones(len(t)))[start:],
        matrix=np.stack(rows, axis=1)[start:],
        draws_noise=np.broadcast_to(draws_noise, len(t))[start:],
        init_noise_sigma=_init_noise_sigma(config, levels) if exploding else 1.0,
        noising=_noising(levels if noised is None else noised, exploding)[start:],
        scheduler=config.scheduler,
        sampler=config.sampler,
        schedule_type=config.schedule_type,
    )


def _noising(levels: Floats, exploding: bool) -> Floats:
    """[K + 1, 2]: what a picture and noise weigh at levels [K], and at the end."""
    alpha = np.ones(len(levels)) if exploding else 1 / np.sqrt(levels**2 + 1)
    sigma = levels if exploding else np.sqrt(1 - alpha**2)  # from α: the level itself may be infinite
    return np.vstack([np.stack([alpha, sigma], axis=1), [1.0, 0.0]])


def interleaved(first: Floats, second: Floats) -> Floats:
    """[2K - 1, ...]: the first evaluations of K steps, and between them the second ones of all but the last.

    A step to σ = 0 is one evaluation: there is nothing to evaluate at σ = 0.
    """
    rows = np.empty((2 * len(first) - 1, *first.shape[1:]))
    rows[::2], rows[1::2] = first, second
    return rows


def _init_noise_sigma(config: SchedulerConfig, sigmas: Floats) -> float:
    """σ_max; "leading" starts below the top, and diffusers adds the data's unit variance there."""
    top = float(sigmas.max())
    return (top**2 + 1) ** 0.5 if config.timestep_spacing == "leading" else top
