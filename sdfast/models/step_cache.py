"""Step caching: the middle of the U-Net in some evaluations only, its outer part in all of them.

Ma et al., "DeepCache: Accelerating Diffusion Models for Free", 2023. What lies deep in the U-Net changes
little from one evaluation to the next. So after a whole one, of which the deep feature is kept, some are
shallow: the way down as far as skip `branch`, and the way up from the ResNet block that consumes that skip,
with the kept feature where the rest would enter it. Skips are counted as the way down leaves them: 0 is what
the first convolution gives. Where a level has two ResNet blocks on its way down, as in SD 1.x, 2.x and SDXL,
that is the `cache_branch_id` of the authors' library.

An approximation: the picture is another one.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sdfast.models.layers import Layer
from sdfast.models.pag import Perturbable
from sdfast.models.unet import (
    BothWays,
    DownBlock,
    UNet,
    UNetConfig,
    UpBlock,
    context_parts,
    shift_parts,
    told_layers,
)


class ShallowUNet(BothWays):
    """What a shallow evaluation runs of a U-Net; its parts have the same names there.

    It is told what the whole U-Net is told, and takes its own of it.
    """

    def __init__(self, config: UNetConfig, branch: int, image_tokens: Sequence[int] = ()) -> None:
        super().__init__(config)
        shifts, kv = shift_parts(self), context_parts(self)
        self._cut_down(branch)
        self._cut_up(branch)
        own_shifts, own_kv = set(shift_parts(self)), set(context_parts(self))
        self.branch, self.image_tokens = branch, list(image_tokens)
        self.own_shifts = [i for i, part in enumerate(shifts) if part in own_shifts]
        self.own_layers = [i // 2 for i, part in enumerate(kv) if part in own_kv][::2]

    @classmethod
    def of(cls, unet: UNet, branch: int) -> "ShallowUNet":
        """That of `unet`, on the same weights."""
        with torch.device("meta"):
            shallow = cls(unet.config, branch, unet.image_tokens)
        for name, layer in list(shallow.named_modules()):
            if isinstance(layer, Layer):
                layer.branch = cast(Layer, unet.get_submodule(name)).branch
            if isinstance(layer, Perturbable):
                layer.switch = cast(Perturbable, unet.get_submodule(name)).switch
        shallow.loras, shallow.switch = unet.loras, unet.switch
        own, weights = shallow.state_dict().keys(), unet.state_dict()
        shallow.load_state_dict({name: weights[name] for name in own}, assign=True)
        return shallow.eval().requires_grad_(False)

    def forward(
        self,
        sample: Tensor,
        time_shift: Tensor,
        context: Tensor,
        deep: Tensor,
        image_context: Tensor | None = None,
    ) -> Tensor:
        """As `UNet.forward`; deep: the second result of an earlier one."""
        time_shift = self.told_last(time_shift)
        shifts = time_shift.split_with_sizes(self.shift_widths, dim=-1)
        kv = told_layers(self.context_widths, context, image_context, self.image_tokens)
        own = iter([shifts[i] for i in self.own_shifts]), iter([kv[i] for i in self.own_layers])
        skips, _ = self.descend(self.conv_in(sample), *own)
        return self.finish(self.climb(deep, skips, *own))

    def _cut_down(self, branch: int) -> None:
        """Leave out what comes after skip `branch`."""
        self.mid_block, kept, left = None, nn.ModuleList(), branch
        for block in self.down_blocks:
            if isinstance(block, DownBlock) and left > 0:
                resnets, rest = block.resnets[:left], max(left - len(block.resnets), 0)
                block.resnets, block.attentions = resnets, block.attentions[:left]
                block.downsamplers = block.downsamplers[:rest]
                kept.append(block)
                left -= len(block.resnets) + len(block.downsamplers)
        self.down_blocks = kept

    def _cut_up(self, branch: int) -> None:
        """Leave out what comes before the ResNet block that consumes skip `branch`; the places stay."""
        first = self.rungs[branch]
        for level in range(first.level):
            self.up_blocks[level] = nn.Identity()
        block: UpBlock = self.up_blocks[first.level]  # type: ignore[assignment]
        for parts in (block.resnets, block.attentions):
            for place in range(min(first.place, len(parts))):
                parts[place] = nn.Identity()
