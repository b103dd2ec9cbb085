"""Which 3×3 convolutions of a U-Net an engine has in FP8: those that were measured to be faster so.

A weight is stored in one form, which all sizes and batches of an engine share. So this is decided before
anything is traced: the network is run once at each of the engine's sizes, in its largest batch, and a
convolution is converted where it is faster at every one of them. What is compared is what the compiler makes
of both: in FP8 that includes rounding the input, as a pass of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.backends.clock import Clock
from sdfast.backends.fp8 import gathering
from sdfast.backends.measured import Memory
from sdfast.export import kernels
from sdfast.export.kernels import COMPILER, Contest, dtype_name
from sdfast.models import ops
from sdfast.models.fp8 import Conv3x3FP8
from sdfast.models.layers import Conv3x3, Upsample, enlarged_size

OWN = "triton FP8"
# As those of `kernels.TOLERANCE`: the accumulators of Hopper's tensor cores drop what is below some 2^-13 of
# the largest number in a sum.
TOLERANCE = 2e-2

Meet = Callable[[str, Tensor, list[int] | None], None]
"""Told of a convolution's name, of what it is given, and of the size to which that is enlarged before."""


class FP8Convolutions(Contest):
    """Decides for each shape of a 3×3 convolution whether it is faster in FP8.

    kernel: that of `sdfast.kernels.convolution_fp8`.
    """

    def __init__(
        self, kernel: Callable[..., Tensor], clock: Clock, memory: Memory, say: Callable[[str], None]
    ) -> None:
        super().__init__(clock, memory, say, TOLERANCE)
        self._convolution = gathering(kernel)

    @torch.no_grad()
    def faster(self, network: nn.Module, names: Iterable[str], inputs: Mapping[str, Tensor]) -> set[str]:
        """Of the convolutions with these names those that are faster in FP8, at the size of `inputs`."""
        found = set[str]()

        def meet(name: str, x: Tensor, size: list[int] | None) -> None:
            if self._is_faster(network.get_submodule(name), x, size):
                found.add(name)

        with _meeting(network, names, meet):
            network(**inputs)
        return found

    def _is_faster(self, layer: nn.Module, x: Tensor, size: list[int] | None) -> bool:
        if not isinstance(layer, Conv3x3):
            raise TypeError(f"a {type(layer).__name__} is no 3×3 convolution")
        what = convolution_words(x, len(layer.weight), layer.stride, size)
        if what not in self._met:
            rounded, settings = Conv3x3FP8(layer), (layer.stride, layer.padding, size)
            given = x.contiguous(memory_format=torch.channels_last)
            rest = (rounded.weight, rounded.scale, rounded.bias, *settings)
            compiled = kernels.compiled_alone(self._convolution)
            rival = kernels.compiled_alone(enlarging_conv3x3)
            timed = {
                OWN: lambda: compiled(given, *rest),
                COMPILER: lambda: rival(given, layer.weight, layer.bias, *settings),
            }
            self._decide(what, ops.conv3x3_fp8, {OWN: self._convolution}, (given,), rest, timed)
        return self._met[what].kind != COMPILER


def enlarging_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    size: list[int] | None,
) -> Tensor:
    """What `ops.conv3x3_fp8` stands for, without rounding: `conv3x3` of x, or of x enlarged to `size`."""
    if size is not None:
        x = F.interpolate(x, size=size, mode="nearest")
    return ops.conv3x3(x, weight, bias, stride, padding)


def convolution_words(x: Tensor, outputs: int, stride: int, size: list[int] | None) -> str:
    """What the choice depends on. Not the batch."""
    _, inputs, height, width = x.shape
    strided = f", stride {stride}" * (stride != 1)
    enlarged = "" if size is None else f" enlarged to {size[1]}x{size[0]}"
    return (
        f"3x3 convolution of {inputs} to {outputs} channels, {width}x{height}{enlarged}{strided}, "
        f"{dtype_name(x)} or FP8"
    )


@contextmanager
def _meeting(network: nn.Module, names: Iterable[str], meet: Meet) -> Iterator[None]:
    """While open, `meet` is told of each of these convolutions when the network comes to it."""

    def convolves(name: str, _layer: nn.Module, given: tuple[Any, ...]) -> None:
        meet(name, given[0], None)

    def enlarges(name: str, _block: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        meet(name, given[0], enlarged_size(given[0], more.get("like")))

    with ExitStack() as hooks:
        for name in names:
            owner = network.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Upsample):
                hook = owner.register_forward_pre_hook(partial(enlarges, name), with_kwargs=True)
            else:
                hook = network.get_submodule(name).register_forward_pre_hook(partial(convolves, name))
            hooks.callback(hook.remove)
        yield
