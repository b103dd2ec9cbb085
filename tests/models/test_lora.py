"""Branches beside layers: each row is what a network with the LoRAs merged by its own scales makes."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdfast.models.controlnet import Controlled, ControlNetConfig
from sdfast.models.fp8 import LinearFP8, convert, fp8_convolutions, fp8_layers
from sdfast.models.layers import Conv1x1, Conv3x3, Downsample, Linear, Upsample
from sdfast.models.lora import Branch, Choosing, LowRank, RowScales, attach, attach_to_step, empty_of
from sdfast.models.step_cache import ShallowUNet
from sdfast.models.unet import Context, TimeShift, UNet, UNetConfig, load_unet
from tests.models.conftest import TINY, UNETS, randomise, unet_inputs

Networks = tuple[UNet, TimeShift, Context]
Changes = dict[str, list[LowRank]]
SCALES = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-0.5, 0.8]])
ROWS = len(SCALES)


@cache
def weights_of(name: str) -> dict[str, Tensor]:
    return dict(randomise(UNet2DConditionModel(**UNETS[name])).state_dict())


def changes_of(weights: Mapping[str, Tensor]) -> Changes:
    """Two LoRAs: one of every layer, and one of every other, of another rank."""
    generator = torch.Generator().manual_seed(3)

    def change(place: int, rank: int, weight: Tensor) -> LowRank:
        empty = LowRank.empty(place, rank, *weight.shape)
        down, up = (torch.randn(t.shape, generator=generator) for t in (empty.down, empty.up))
        return LowRank(place, down / down[0].numel() ** 0.5, up * 0.2)

    layers = {n.removesuffix(".weight"): w for n, w in weights.items() if w.dim() > 1}
    return {
        name: [change(0, 3, weight), *([change(1, 2, weight)] if i % 2 else [])]
        for i, (name, weight) in enumerate(layers.items())
    }


def merged(weights: Mapping[str, Tensor], changes: Changes, scales: Tensor) -> dict[str, Tensor]:
    made = dict(weights)
    for layer, several in changes.items():
        for one in several:
            product = one.up.flatten(1) @ one.down.flatten(1) * scales[one.place]
            made[f"{layer}.weight"] = made[f"{layer}.weight"] + product.view(weights[f"{layer}.weight"].shape)
    return made


def branched(name: str, branch: int | None = None) -> Networks:
    weights = weights_of(name)
    networks = load_unet(UNetConfig.from_diffusers(UNETS[name]), weights, branch=branch)
    changes = changes_of(weights)
    attach_to_step(networks[0], 2, changes)
    assert all(attach(network, 2, changes) for network in networks[1:])
    return networks


def conditions_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    given = dict(inputs.get("added_cond_kwargs", {}))
    return given | ({"timestep_cond": inputs["timestep_cond"]} if "timestep_cond" in inputs else {})


def rows_of(inputs: Mapping[str, Any], rows: int = ROWS) -> dict[str, Any]:
    """The inputs of one row, for each."""

    def repeat(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: repeat(part) for name, part in value.items()}
        return value[:1].expand(rows, *value.shape[1:]) if value.dim() else value

    return {name: repeat(value) for name, value in inputs.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", ["tiny", "sdxl"])
def test_rows_are_those_of_merged_weights(name: str) -> None:
    """Through all three modules, in every layer: linear, packed, convolutions with and without a stride."""
    unet, time_shift, context = branched(name)
    inputs = rows_of(unet_inputs(UNETS[name], 8, 12))
    shift = time_shift(inputs["timestep"], **conditions_of(inputs), loras=SCALES)
    kv = context(inputs["encoder_hidden_states"], SCALES)
    got = unet(inputs["sample"], torch.cat([shift, SCALES], dim=1), kv)
    truths = []
    for scales in SCALES:
        weights = merged(weights_of(name), changes_of(weights_of(name)), scales)
        own = load_unet(UNetConfig.from_diffusers(UNETS[name]), weights)
        one = rows_of(inputs, 1)
        truths.append((own[1](one["timestep"], **conditions_of(one)), own[2](one["encoder_hidden_states"])))
        expected = own[0](one["sample"], *truths[-1])
        assert relative(got[len(truths) - 1], expected[0]) < 2e-5
    for made, expected in ((shift, [t for t, _ in truths]), (kv, [c for _, c in truths])):
        assert relative(made, torch.cat(expected)) < 2e-6
        assert relative(made[:1], expected[1]) > 0.01


def test_a_shallow_step_has_the_branches_of_its_layers() -> None:
    unet, time_shift, context = branched("tiny", branch=1)
    inputs = rows_of(unet_inputs(TINY, 8, 12))
    shift, kv = time_shift(inputs["timestep"], loras=SCALES), context(inputs["encoder_hidden_states"], SCALES)
    told = inputs["sample"], torch.cat([shift, SCALES], dim=1), kv
    output, deep = unet(*told)
    shallow = ShallowUNet.of(unet, 1)
    assert torch.equal(shallow(*told, deep), output)
    assert sum(isinstance(m, Branch) for m in shallow.modules()) < sum(
        isinstance(m, Branch) for m in unet.modules()
    )


def test_the_scales_come_behind_those_of_controlnets() -> None:
    """Which LoRAs do not change."""
    config = ControlNetConfig.from_diffusers(
        {name: value for name, value in TINY.items() if name != "up_block_types"}
        | {"conditioning_embedding_out_channels": (4, 16)}
    )
    unet, time_shift, context = branched("tiny")
    both = Controlled.of(unet, time_shift, context, [config])
    for part in both:
        for controlnet in part.controlnets:
            randomise(controlnet)
    inputs = rows_of(unet_inputs(TINY, 8, 12))
    control = torch.randn(ROWS, config.channels, 8, 12)
    shift = both.time_shift(inputs["timestep"], loras=SCALES)
    kv = both.context(inputs["encoder_hidden_states"], SCALES)

    def run(of_control: float) -> Tensor:
        columns = torch.cat([shift, torch.full((ROWS, both.unet.layers), of_control), SCALES], dim=1)
        made: Tensor = both.unet(inputs["sample"], columns, kv, control)
        return made

    widths = sum(unet.shift_widths), sum(unet.context_widths)
    alone = unet(inputs["sample"], torch.cat([shift[:, : widths[0]], SCALES], dim=1), kv[..., : widths[1]])
    assert torch.equal(run(0.0), alone)
    assert relative(run(1.0), alone) > 0.01


def test_layers_in_fp8_keep_their_branches_in_their_own_dtype() -> None:
    """But no convolution is put there that has one, since it reads small images; nor is a branch."""
    layer, scales = randomise(Linear(32, 16)), RowScales(1)
    x = torch.randn(2, 5, 32)
    rounded = LinearFP8(layer)(x)
    layer.branch = Branch(scales, [LowRank(0, torch.randn(16, 32), torch.randn(16, 16))])
    plain = layer.branch
    scales.tell(torch.tensor([[0.5], [0.0]]))
    network = nn.Sequential(layer)
    assert fp8_layers(network) == ("0",)
    got = convert(network, ["0"])(x)
    assert torch.equal(got[1], rounded[1])
    expected = (rounded + 0.5 * x @ plain.down.T @ plain.up.T)[0]
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)
    down, up = Downsample(16), Upsample(16)
    up.conv.branch = plain
    assert fp8_convolutions(nn.Sequential(down, up)) == ("0.conv",)


def test_a_1x1_convolution_in_fp8_too() -> None:
    layer = randomise(Conv1x1(16, 16))
    found = [LowRank(0, torch.randn(4, 16, 1, 1), torch.randn(16, 4, 1, 1))]
    network = Holder(layer)
    x = torch.randn(2, 16, 3, 5)
    rounded = convert(Holder(layer), ["layer"])(x)
    assert attach(network, 1, {"layer": found})
    assert network.loras is not None
    network.loras.tell(torch.tensor([[0.0], [2.0]]))
    got = convert(network, ["layer"])(x)
    assert torch.equal(got[0], rounded[0])
    product = torch.einsum("or,ri,ihw->ohw", found[0].up[..., 0, 0], found[0].down[..., 0, 0], x[1])
    torch.testing.assert_close(got[1], rounded[1] + 2 * product, rtol=1e-4, atol=1e-3)


class Holder(Choosing):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_what_is_not_touched_stays_as_it_was() -> None:
    layer = Conv3x3(4, 4)
    network = Holder(layer)
    assert not attach(network, 1, {"other": [LowRank.empty(0, 2, 4, 4, 3, 3)]})
    assert (layer.branch, network.loras) == (None, None)
    attach_to_step(network, 1, {})
    assert network.loras is not None and torch.equal(network.told_last(torch.ones(2, 3)), torch.ones(2, 2))


def test_empty_ones_have_the_shapes_of_full_ones() -> None:
    """By which an engine's networks are built before their weights are read."""
    weights = weights_of("tiny")
    full, changes = branched("tiny"), changes_of(weights)
    ranks = {name: [(one.place, one.rank) for one in several] for name, several in changes.items()}
    plain = load_unet(UNetConfig.from_diffusers(UNETS["tiny"]), weights)
    for network, truth in zip(plain, full, strict=True):
        attach_to_step(network, 2, empty_of(network, ranks))
        assert shapes(network) == shapes(truth)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_a_network_has_to_be_told() -> None:
    _, time_shift, context = branched("tiny")
    hidden = torch.zeros(1, 77, int(TINY["cross_attention_dim"]))
    with pytest.raises(TypeError, match="Context needs loras"):
        context(hidden)
    with pytest.raises(TypeError, match="TimeShift needs loras"):
        time_shift(torch.zeros(1))
    plain = load_unet(UNetConfig.from_diffusers(UNETS["tiny"]), weights_of("tiny"))
    with pytest.raises(TypeError, match="Context has no LoRAs"):
        plain[2](hidden, torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="before it was told"):
        RowScales(1).repeated(((0, 4),))
