"""Where noise comes from: torch generators, drawn in the order in which diffusers draws.

All noise is float32 and drawn on the generator's device, so that the same generator gives the same picture
as the stock pipeline.
"""

from collections.abc import Sequence

import torch

from sdfast.loop import Noise


def generator(seed: int) -> torch.Generator:
    """A CPU generator for one picture. `seed` in [0, 2**64)."""
    return torch.Generator("cpu").manual_seed(seed)


def _draw(shape: Sequence[int], source: torch.Generator) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=source, device=source.device, dtype=torch.float32)


class OwnNoise:
    """A generator for each picture: what a picture gets does not depend on the others.

    diffusers draws [1, C, h, w] from each generator of a list, in turn.
    """

    def __init__(self, generators: Sequence[torch.Generator], shape: Sequence[int]) -> None:
        self._generators = list(generators)
        self._shape = tuple(shape)  # (C, h, w)

    def initial(self) -> torch.Tensor:
        """Unit noise for the first latents, [n, C, h, w]."""
        return torch.stack([_draw(self._shape, g) for g in self._generators])

    def of_row(self, row: int) -> Noise:
        """The noise of one picture, a step at a time."""
        return lambda _step: _draw(self._shape, self._generators[row])


class SharedNoise:
    """One generator for several pictures: every draw is for all of them at once, as diffusers does it."""

    def __init__(self, source: torch.Generator, rows: int, shape: Sequence[int]) -> None:
        self._source = source
        self._shape = (rows, *shape)  # (n, C, h, w)
        self._step = -1
        self._drawn = torch.empty(0)

    def initial(self) -> torch.Tensor:
        """Unit noise for the first latents, [n, C, h, w]."""
        return _draw(self._shape, self._source)

    def of_row(self, row: int) -> Noise:
        """The noise of one picture; the first row to reach a step draws for all."""

        def noise(step: int) -> torch.Tensor:
            if step != self._step:
                self._step, self._drawn = step, _draw(self._shape, self._source)
            return self._drawn[row]

        return noise
