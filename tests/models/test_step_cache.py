"""A shallow step makes what diffusers' own blocks make with the same feature kept, on the same weights."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdfast.models.step_cache import ShallowUNet
from sdfast.models.unet import UNetConfig, load_unet, skip_levels
from tests.models.conftest import UNETS, randomise, unet_inputs

SIZE = (13, 20)  # which does not halve evenly
BRANCHES = [
    *(("sd15", branch) for branch in (0, 3, 11)),
    *(("sdxl", branch) for branch in (0, 8)),
    *(("tiny", branch) for branch in (1, 4)),
    ("nested_depths", 4),
    ("no_mid", 10),
]


@cache
def reference(name: str) -> Any:
    return randomise(UNet2DConditionModel(**UNETS[name]))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
def test_equals_diffusers(name: str, branch: int) -> None:
    """What enters the ResNet block that consumes the skip is the same in two calls of diffusers' network."""
    theirs = reference(name)
    config = UNetConfig.from_diffusers(dict(theirs.config))
    unet, time_shift, context = load_unet(config, theirs.state_dict(), branch=branch)
    channels, scale = unet.rungs[branch].channels, 2 ** skip_levels(config)[branch]
    first, second = (unet_inputs(UNETS[name], *SIZE) for _ in range(2))
    second |= {"sample": 0.7 * first["sample"].flip(0), "timestep": first["timestep"].flip(0)}
    kept: list[torch.Tensor] = []

    def enter(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not kept:
            kept.append(args[0][:, :channels])
            return None
        return torch.cat([kept[0], args[0][:, channels:]], dim=1), *args[1:]

    consumers = [resnet for block in theirs.up_blocks for resnet in block.resnets][::-1]
    with consumers[branch].register_forward_pre_hook(enter):
        whole, shallow = theirs(**first).sample, theirs(**second).sample

    def told(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        conditions = inputs.get("added_cond_kwargs", {})
        if "timestep_cond" in inputs:
            conditions = {"timestep_cond": inputs["timestep_cond"]}
        shift = time_shift(inputs["timestep"], **conditions)
        return inputs["sample"], shift, context(inputs["encoder_hidden_states"])

    output, deep = unet(*told(first))
    assert relative(output, whole) < 2e-6
    assert deep.shape == (2, channels, -(-SIZE[0] // scale), -(-SIZE[1] // scale))
    assert relative(deep, kept[0]) < 2e-6
    assert relative(ShallowUNet.of(unet, branch)(*told(second), deep), shallow) < 2e-6
    assert relative(theirs(**second).sample, shallow) > 0.03  # that something was to be seen


def test_a_shallow_step_has_its_own_parts_alone_on_the_same_weights() -> None:
    config = UNetConfig.from_diffusers(UNETS["sd15"])
    unet = load_unet(config, reference("sd15").state_dict(), branch=1)[0]
    shallow = ShallowUNet.of(unet, 1)
    parts = {name.split(".")[0]: name for name, _ in shallow.named_parameters()}
    assert parts.keys() == {"conv_in", "down_blocks", "up_blocks", "conv_norm_out", "conv_out"}
    resnets = {name.partition(".norm1")[0] for name, _ in shallow.named_parameters() if "resnets" in name}
    resnets = {name for name in resnets if name.count(".") == 3}
    assert resnets == {"down_blocks.0.resnets.0", "up_blocks.3.resnets.1", "up_blocks.3.resnets.2"}
    for name, tensor in shallow.named_parameters():
        assert tensor.data_ptr() == unet.get_parameter(name).data_ptr()
