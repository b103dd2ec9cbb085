"""LoRAs that each request chooses: branches beside a network's layers.

A LoRA adds to a layer the product of two thin matrices (Hu et al., 2021). One that requests choose is not
merged into the weight, but runs beside it, each row of the batch by its own scale s:

    y = layer(x) + up (s · down(x))

`down` holds the down matrices of all LoRAs that change the layer, one under the other, and `up` theirs beside
one another, so that a layer has one branch whatever the number of its LoRAs. s is a LoRA's scale as often as
its rank says. Rows of different LoRAs, and of none, so share a batch, and nothing is compiled for a scale.

How much of each LoRA a row gets, a network is told with its inputs: a step network in the last columns of the
time shifts, behind the scales of ControlNets if there are some; `TimeShift`, `Context` and the text encoders
by an input `loras`, where a LoRA changes any of their layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdfast.models import ops
from sdfast.models.layers import Conv1x1, Conv3x3, Linear, PackedLinear

Ranks = Mapping[str, Sequence[tuple[int, int]]]
"""Of each layer, by its name in the checkpoint, the LoRAs that change it: their places, and their ranks."""
Place = tuple[int, int]
"""A LoRA's place among those of an engine, and its rank in a layer."""
_LARGEST_BLOCK = 3  # parts of a packed layer whose up matrices are put into one, with zeros between them


@dataclass(frozen=True)
class LowRank:
    """What one LoRA adds to a layer: down [R, I] or [R, I, k, k], and up [O, R] or [O, R, 1, 1], which is
    multiplied by alpha / rank already. place: of the LoRA among those of the engine."""

    place: int
    down: Tensor
    up: Tensor

    @classmethod
    def empty(cls, place: int, rank: int, outputs: int, *inputs: int) -> "LowRank":
        """One without numbers, for a layer whose weight is [outputs, *inputs]."""
        up = torch.empty(outputs, rank, *(1 for _ in inputs[1:]))
        return cls(place, torch.empty(rank, *inputs), up)

    @property
    def rank(self) -> int:
        return len(self.down)


class RowScales:
    """How much of each LoRA the rows of a batch get: told to a network when it runs, read by its branches."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._scales: Tensor | None = None
        self._repeated: dict[tuple[Place, ...], Tensor] = {}

    def tell(self, scales: Tensor) -> None:
        """scales [B, n], or [1, n] for all rows, in the dtype of the network."""
        self._scales, self._repeated = scales, {}

    def repeated(self, places: tuple[Place, ...]) -> Tensor:
        """[B, R]: the scale of each LoRA, as often as its rank says."""
        if self._scales is None:
            raise RuntimeError("a network with LoRAs ran before it was told how much of them to add")
        if places not in self._repeated:
            columns = [self._scales[:, place : place + 1].expand(-1, rank) for place, rank in places]
            self._repeated[places] = torch.cat(columns, dim=1)
        return self._repeated[places]


class Branch(nn.Module):
    """What LoRAs add to a linear layer. down: [R, I]; up: [O, R]."""

    def __init__(self, scales: RowScales, found: Sequence[LowRank]) -> None:
        super().__init__()
        self.scales = scales
        self.places = tuple((one.place, one.rank) for one in found)
        self.down = _frozen(torch.cat([one.down for one in found]))
        self.up = _frozen(torch.cat([one.up for one in found], dim=1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: what the layer was given, y: what it made of that -> what it makes with its LoRAs."""
        reduced = ops.scale_channels(self._reduced(x), self.scales.repeated(self.places))
        return ops.add(y, self._raised(reduced))

    def _reduced(self, x: Tensor) -> Tensor:  # [..., I] -> [..., R]
        return ops.linear(x, self.down, None)

    def _raised(self, x: Tensor) -> Tensor:  # [..., R] -> [..., O]
        return ops.linear(x, self.up, None)


class BlockBranch(Branch):
    """The branch of a packed layer of few parts, as one product: up has zeros where a part's LoRA adds
    nothing to the others."""

    def __init__(self, scales: RowScales, layer: PackedLinear, parts: Sequence[Sequence[LowRank]]) -> None:
        found, row = [], 0
        for part, own in zip(layer.parts, parts, strict=True):
            for one in own:
                up = one.up.new_zeros(len(layer.weight), one.rank)
                up[row : row + part.rows] = one.up
                found.append(LowRank(one.place, one.down, up))
            row += part.rows
        super().__init__(scales, found)


class PartedBranch(nn.Module):
    """The branch of a packed layer of many parts, of which each has its own, or None."""

    def __init__(self, scales: RowScales, layer: PackedLinear, parts: Sequence[Sequence[LowRank]]) -> None:
        super().__init__()
        self.rows = [part.rows for part in layer.parts]
        self.parts = nn.ModuleDict({str(i): Branch(scales, own) for i, own in enumerate(parts) if own})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """As `Branch.forward`."""
        pieces = list(y.split_with_sizes(self.rows, dim=-1))
        for i, branch in self.parts.items():
            pieces[int(i)] = branch(x, pieces[int(i)])
        return torch.cat(pieces, dim=-1)


class Conv1x1Branch(Branch):
    """What LoRAs add to a 1×1 convolution. down: [R, I, 1, 1]; up: [O, R, 1, 1]."""

    def _reduced(self, x: Tensor) -> Tensor:  # [B, I, H, W] -> [B, R, H, W]
        return ops.conv1x1(x, self.down, None)

    def _raised(self, x: Tensor) -> Tensor:  # [B, R, H, W] -> [B, O, H, W]
        return ops.conv1x1(x, self.up, None)


class Conv3x3Branch(Conv1x1Branch):
    """What LoRAs add to a 3×3 convolution. down: [R, I, 3, 3], with its stride and padding; up: as above."""

    def __init__(self, scales: RowScales, layer: Conv3x3, found: Sequence[LowRank]) -> None:
        super().__init__(scales, found)
        self.stride, self.padding = layer.stride, layer.padding

    def _reduced(self, x: Tensor) -> Tensor:  # [B, I, H, W] -> [B, R, H', W']
        return ops.conv3x3(x, self.down, None, self.stride, self.padding)


class BranchedLinear(nn.Module):
    """A linear layer of another library's, with a branch."""

    def __init__(self, linear: nn.Linear, branch: Branch) -> None:
        super().__init__()
        self.linear, self.branch = linear, branch

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        y: Tensor = self.branch(x, self.linear(x))
        return y


class Choosing(nn.Module):
    """A network whose layers may have branches.

    loras: where it tells these how much of each LoRA is added; None of one without.
    """

    loras: RowScales | None = None

    def told_last(self, time_shift: Tensor) -> Tensor:
        """The time shifts of a step, without the scales in their last columns, which it is told."""
        if self.loras is None:
            return time_shift
        self.loras.tell(time_shift[:, -self.loras.count :])
        return time_shift[:, : -self.loras.count]

    def _told(self, scales: Tensor | None, dtype: torch.dtype) -> None:
        """Be told the scales that came as an input. Raises `TypeError` for some where none are needed, and
        for none where some are."""
        if (scales is None) != (self.loras is None):
            raise TypeError(
                f"{type(self).__name__} {'has no LoRAs' if scales is not None else 'needs loras'}"
            )
        if self.loras is not None and scales is not None:
            self.loras.tell(scales.to(dtype))


def attach(
    network: Choosing,
    count: int,
    found: Mapping[str, Sequence[LowRank]],
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Give the layers of `network` their branches, in `dtype`. -> whether it has any of these layers.

    count: of the LoRAs of the engine. found: by the names of layers in the checkpoint; those that `network`
    does not have are others' business.
    """
    scales = RowScales(count)
    branches = list(_branches(network, scales, found))
    for layer, branch in branches:
        layer.branch = branch.to(dtype)
    if branches:
        network.loras = scales
    return bool(branches)


def attach_to_step(
    network: Choosing,
    count: int,
    found: Mapping[str, Sequence[LowRank]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """The same for what runs in each step: it is told of all LoRAs, whether they change its layers or not."""
    if count and not attach(network, count, found, dtype):
        network.loras = RowScales(count)


def _branches(
    network: nn.Module, scales: RowScales, found: Mapping[str, Sequence[LowRank]]
) -> Iterator[tuple[Linear | Conv1x1 | Conv3x3, nn.Module]]:
    for name, layer in network.named_modules():
        if isinstance(layer, PackedLinear):
            parts = [found.get(part, ()) for part in layer.names(name)]
            if any(parts):
                kind = BlockBranch if len(parts) <= _LARGEST_BLOCK else PartedBranch
                yield layer, kind(scales, layer, [[_flat(one) for one in part] for part in parts])
        elif name not in found:
            continue
        elif isinstance(layer, Linear):
            yield layer, Branch(scales, [_flat(one) for one in found[name]])
        elif isinstance(layer, Conv1x1):
            yield layer, Conv1x1Branch(scales, found[name])
        elif isinstance(layer, Conv3x3):
            yield layer, Conv3x3Branch(scales, layer, found[name])


def _flat(one: LowRank) -> LowRank:
    """For a linear layer, which some checkpoints store as a 1×1 convolution."""
    return LowRank(one.place, one.down.flatten(1), one.up.flatten(1))


def attach_to_text_model(
    model: nn.Module,
    count: int,
    found: Mapping[str, Sequence[LowRank]],
    dtype: torch.dtype = torch.float32,
) -> RowScales | None:
    """Give the linear layers of transformers' CLIP text model their branches: what these are told by, or None
    where none has any. found: by names without the level that `bare` takes out."""
    scales = RowScales(count)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    own = [(name, layer, found[bare(name)]) for name, layer in layers if bare(name) in found]
    for name, layer, changes in own:
        model.set_submodule(name, BranchedLinear(layer, Branch(scales, changes).to(dtype)))
    return scales if own else None


def bare(layer: str) -> str:
    """The name of a text encoder's layer without a level that transformers 5 took out of its CLIP text model:
    checkpoints have it, or not."""
    return layer.removeprefix("text_model.")


def empty_of(network: nn.Module, ranks: Ranks) -> dict[str, list[LowRank]]:
    """What `attach` takes for LoRAs of these ranks, without numbers, of the layers that `network` has."""
    return {
        name: [LowRank.empty(place, rank, *shape) for place, rank in ranks[name]]
        for name, shape in _shapes(network)
        if name in ranks
    }


def _shapes(network: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """Layers by their names in the checkpoint, with the shapes of their weights."""
    for name, layer in network.named_modules():
        if isinstance(layer, PackedLinear):
            for part, own in zip(layer.parts, layer.names(name), strict=True):
                yield own, (part.rows, layer.weight.shape[1])
        elif isinstance(layer, (Linear, Conv1x1, Conv3x3, nn.Linear)):
            yield bare(name), layer.weight.shape


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
