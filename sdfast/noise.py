"""Where noise comes from: torch generators, drawn in the order in which diffusers draws.

All noise is float32 and drawn on the generator's device, so that the same generator gives the same picture
as the stock pipeline. The steps of some schedules draw from a Brownian motion instead: see `BrownianNoise`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from sdfast.arithmetic import Noise
from sdfast.errors import DependencyError
from sdfast.schedulers import Brownian


def generator(seed: int) -> torch.Generator:
    """A CPU generator for one picture. `seed` in [0, 2**64)."""
    return torch.Generator("cpu").manual_seed(seed)


def _draw(shape: Sequence[int], source: torch.Generator) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=source, device=source.device, dtype=torch.float32)


AHEAD = 2**18
"""So many numbers are drawn at once, at most."""

WHOLE = 16
"""torch makes normal numbers in blocks of so many: two draws of whole blocks are one draw of both."""


class OwnNoise:
    """A generator for each picture: what a picture gets does not depend on the others.

    diffusers draws [1, C, h, w] from each generator of a list, in turn.
    """

    apart = True

    def __init__(self, generators: Sequence[torch.Generator], shape: Sequence[int], ahead: int = 0) -> None:
        """shape: (C, h, w). ahead: how many draws will follow the first latents'; if that is known, several
        are made at once, with the same numbers, and a run that is broken off leaves generators that are ahead
        of diffusers'."""
        self._generators = list(generators)
        self._shape = tuple(shape)
        self._ahead = ahead

    def initial(self, count: int | None = None) -> torch.Tensor:
        """Unit noise before the first step, for the first `count` pictures (default: all), [n, C, h, w]."""
        return torch.stack([_draw(self._shape, g) for g in self._generators[:count]])

    def seeds(self) -> list[int]:
        """What each picture's generator was seeded with."""
        return [g.initial_seed() for g in self._generators]

    def of_row(self, row: int) -> Noise:
        """The noise of one picture, a step at a time."""
        source, waiting, left = self._generators[row], list[torch.Tensor](), self._ahead
        numbers = math.prod(self._shape)
        several = AHEAD // numbers if source.device.type == "cpu" and numbers % WHOLE == 0 else 1

        def noise(_step: int) -> torch.Tensor:
            nonlocal left
            if not waiting:
                count = max(1, min(several, left))
                waiting.extend(reversed(_draw((count, *self._shape), source).unbind()))
                left -= count
            return waiting.pop()

        return noise


class SharedNoise:
    """One generator for several pictures: every draw is for all of them at once, as diffusers does it."""

    apart = False

    def __init__(self, source: torch.Generator, rows: int, shape: Sequence[int]) -> None:
        self._source = source
        self._shape = (rows, *shape)  # (n, C, h, w)
        self._step = -1
        self._drawn = torch.empty(0)

    def initial(self, count: int | None = None) -> torch.Tensor:
        """Unit noise before the first step, for `count` pictures (default: all), [n, C, h, w]."""
        rows, *shape = self._shape
        return _draw((rows if count is None else count, *shape), self._source)

    def seeds(self) -> list[int]:
        """What the generator was seeded with: one seed for all pictures."""
        return [self._source.initial_seed()]

    def of_row(self, row: int) -> Noise:
        """The noise of one picture; the first row to reach a step draws for all."""

        def noise(step: int) -> torch.Tensor:
            if step != self._step:
                self._step, self._drawn = step, _draw(self._shape, self._source)
            return self._drawn[row]

        return noise


class VariedNoise:
    """A generator for each picture, whose draws before the first step are mixed with those of others.

    As in AUTOMATIC1111 (modules/rng.py) it is the first noise alone that varies: the steps draw from the
    pictures' own generators, which are as far then as if nothing had been mixed. Where several draws come
    before the first step, as those for the latents of an image, each of them varies.
    """

    def __init__(
        self,
        own: OwnNoise | SharedNoise,
        placed: OwnNoise | None = None,
        others: OwnNoise | None = None,
        strength: float = 0.0,
    ) -> None:
        """own: the pictures' noise. placed: that of their seeds at another size, [C, h', w'], which is put in
        the middle of it. others: of each picture what it, or else what is placed, is turned to by `strength`.
        """
        self._own, self._placed, self._others, self._strength = own, placed, others, strength

    @property
    def apart(self) -> bool:
        """Whether each picture has a generator of its own."""
        return self._own.apart

    def initial(self, count: int | None = None) -> torch.Tensor:
        """Unit noise before the first step, for the first `count` pictures (default: all), [n, C, h, w]."""
        own = self._own.initial(count)
        noise = own if self._placed is None else self._placed.initial(count)
        if self._others is not None:
            pairs = zip(noise, self._others.initial(count), strict=True)
            noise = torch.stack([turned(one, other, self._strength) for one, other in pairs])
        return noise if self._placed is None else in_the_middle(noise, own)

    def seeds(self) -> list[int]:
        """What each picture's generator was seeded with."""
        return self._own.seeds()

    def of_row(self, row: int) -> Noise:
        """The noise of one picture, a step at a time."""
        return self._own.of_row(row)


PARALLEL = 1e-3
"""Of the sine of an angle: below, what lies between two directions is as good as on a line."""


def turned(low: torch.Tensor, high: torch.Tensor, share: float) -> torch.Tensor:
    """[C, h, w], each of its columns of h numbers turned by a share of the angle from `low`'s to `high`'s.

    Shoemake's slerp (1985), over the columns as AUTOMATIC1111 has it; at 1 it is `high` itself. Columns that
    point the same way, or opposite ways, are mixed on a straight line.
    """
    direction, target = (noise / noise.norm(dim=1, keepdim=True) for noise in (low, high))
    angle = (direction * target).sum(1, keepdim=True).clamp(-1.0, 1.0).acos()
    sine = angle.sin()
    between = ((1.0 - share) * angle).sin() / sine * low + (share * angle).sin() / sine * high
    return torch.where(sine > PARALLEL, between, (1.0 - share) * low + share * high)


def in_the_middle(noise: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
    """[n, C, h, w] like `around`, with the middle of `noise` [n, C, h', w'] in its middle."""
    (top, from_top, height), (left, from_left, width) = (
        _overlap(*sides) for sides in zip(noise.shape[2:], around.shape[2:], strict=True)
    )
    whole = around.clone()
    part = noise[:, :, from_top : from_top + height, from_left : from_left + width]
    whole[:, :, top : top + height, left : left + width] = part
    return whole


def _overlap(inner: int, outer: int) -> tuple[int, int, int]:
    """Where two centred sides meet: the place in the outer, that in the inner, and the length.

    As in AUTOMATIC1111 of a longer inner side, where the difference is odd, one less is taken than would fit.
    """
    offset = (outer - inner) // 2
    return (offset, 0, inner) if offset >= 0 else (0, -offset, inner + 2 * offset)


DIGITS = 6
"""To so many decimals diffusers' Brownian motion knows its levels."""


class BrownianNoise:
    """Noise along Brownian motions over the noise levels, for a schedule that has `brownian`.

    The motion is torchsde's, made and normalised as diffusers' DPMSolverSDEScheduler does it. With a
    `noise_sampler_seed` in the scheduler config, one motion for all pictures starts from that seed, and the
    pictures are the stock pipeline's (but for levels whose last bit differs from processor to processor: the
    noise there is off by 1e-3). Without, diffusers takes a seed from torch's global generator; here a
    picture's motion has the seed of its own generator (AUTOMATIC1111's way), so that it can be drawn again.
    """

    def __init__(
        self,
        first: OwnNoise | SharedNoise | VariedNoise,
        brownian: Brownian,
        shape: Sequence[int],
        rows: int,
        device: torch.device,
    ) -> None:
        """first: the noise of the first latents. shape: (C, h, w) of one of `rows` pictures. device: where
        the config's own motion is drawn, the latents' in diffusers; others are drawn on the CPU.

        Raises DependencyError when torchsde is not installed.
        """
        self._first = first
        self._brownian = brownian
        seeds = first.seeds() if brownian.seed is None else [brownian.seed]
        self._shared = len(seeds) == 1
        size = (rows, *shape) if self._shared else tuple(shape)
        where = torch.device("cpu") if brownian.seed is None else device
        self._motions = [_motion(seed, brownian.span, size, where) for seed in seeds]
        self._step = -1
        self._drawn = torch.empty(0)

    @property
    def apart(self) -> bool:
        """Whether each picture has a generator of its own."""
        return self._first.apart

    def initial(self, count: int | None = None) -> torch.Tensor:
        """Unit noise before the first step, [n, C, h, w]: the generators'."""
        return self._first.initial(count)

    def of_row(self, row: int) -> Noise:
        """The noise of one picture; the first row to reach a step draws for all."""

        def noise(step: int) -> torch.Tensor:
            if step != self._step:
                self._step, self._drawn = step, self._unit_noise(step)
            return self._drawn[row]

        return noise

    def _unit_noise(self, step: int) -> torch.Tensor:
        """[n, C, h, w] float32: the increments on the way down, over the root of the way."""
        high, low = _crossed(self._brownian, step)
        bottom, top = (round(level, DIGITS) for level in self._brownian.span)  # where the motion has its ends
        way = max(float(low), bottom), min(float(high), top)
        increments = [motion(*way) for motion in self._motions]
        together: torch.Tensor = increments[0] if self._shared else torch.stack(increments)
        return -together / (low - high).abs().sqrt().to(together.device)


NoiseSource = OwnNoise | SharedNoise | VariedNoise | BrownianNoise


def _motion(seed: int, span: tuple[float, float], size: Sequence[int], device: torch.device) -> Any:
    """A Brownian motion (low, high) -> its increment between these levels, a tensor of `size`."""
    try:
        from torchsde import BrownianInterval
    except ImportError:
        raise DependencyError(
            "DPM++ SDE draws its noise with torchsde, which is not installed: pip install 'sdfast[sde]'"
        ) from None
    return BrownianInterval(
        *span,
        size=tuple(size),
        dtype=torch.float32,
        device=device,
        entropy=seed,
        tol=10.0**-DIGITS,
        pool_size=24,
        halfway_tree=True,
    )


def _crossed(brownian: Brownian, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels that a row comes from and goes to, float32 scalars.

    They are found by way of their logarithms and in float32, as in diffusers, because a Brownian motion is
    rough: where a level is off by 1e-6, the noise is off by 1e-3.
    """
    t, t_next = (-torch.tensor(float(level), dtype=torch.float32).log() for level in brownian.crossed[step])
    if brownian.half[step]:
        t_next = t + (t_next - t) * 0.5
    return (-t).exp(), (-t_next).exp()
