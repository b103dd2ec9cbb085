"""Perturbed-attention guidance: rows for which chosen self-attention layers are the identity.

Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", 2024. What a network makes
of a prompt is guided away from what it makes of the same prompt where each token of these layers attends to
itself alone: out = to_out(v) (section 4).

Which rows of a batch are perturbed is data, so that they share it, and one compiled module, with others: the
network is told in the last column of the time shifts, behind the scales of LoRAs, 1 for a row that is and 0
for one that is not. Such a layer computes both, and takes of each row the one or the other.
"""

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.lora import Choosing


class Switch:
    """Which rows of a batch are perturbed: told to a network when it runs, read by its layers.

    layers: the names of those, of the whole U-Net's.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self._perturbed: Tensor | None = None

    def tell(self, perturbed: Tensor) -> None:
        """perturbed [B, 1], 1 or 0, in the dtype of the network."""
        self._perturbed = perturbed

    def taken(self, attended: Tensor, values: Tensor) -> Tensor:
        """Both [B, N, C]: of each row what attention gave, or the values if it is perturbed."""
        if self._perturbed is None:
            raise RuntimeError("a network with perturbed layers ran before it was told which rows are")
        kept = ops.scale_channels(attended, 1 - self._perturbed)
        return ops.add(kept, ops.scale_channels(values, self._perturbed))


class Perturbable(nn.Module):
    """A self-attention layer. switch: where it reads which rows are perturbed; None where none ever is."""

    switch: Switch | None = None


class Perturbing(Choosing):
    """A network some of whose layers may be perturbed. switch: where it tells them of which rows; None of one
    without."""

    switch: Switch | None = None

    def told_last(self, time_shift: Tensor) -> Tensor:
        """The time shifts of a step, without what is in their last columns: the scales of LoRAs, and behind
        them which rows are perturbed."""
        if self.switch is not None:
            self.switch.tell(time_shift[:, -1:])
            time_shift = time_shift[:, :-1]
        return super().told_last(time_shift)


def perturb(network: Perturbing, layers: Sequence[str]) -> None:
    """Have the layers of `network` with these names perturbed in the rows that it is told; none are where no
    names are given. Those that it does not have, as a shallow step's do not, it leaves out."""
    if not layers:
        return
    network.switch = Switch(layers)
    for name, layer in _perturbable(network):
        if name in layers:
            layer.switch = network.switch


def matching(network: nn.Module, pattern: str) -> list[str]:
    """The names of the self-attention layers in which a pattern is found, as in diffusers: "mid", "down.*1",
    or "up_blocks.0.attentions.1". Raises `ValueError` for a pattern that is no regular expression."""
    try:
        found = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.60} is no regular expression ({error})") from None
    return [name for name, _ in _perturbable(network) if found.search(name)]


def _perturbable(network: nn.Module) -> Iterator[tuple[str, Perturbable]]:
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, Perturbable))
