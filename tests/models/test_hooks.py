"""Group norms and gated products are computed by what a network is given, in every place where they are."""

import pytest
import torch
import torch.nn.functional as F

from sdfast.models import ops
from sdfast.models.fp8 import LinearFP8, convert, fp8_layers
from sdfast.models.layers import GroupNorm, use_group_norm
from sdfast.models.unet import GEGLU, UNetConfig, load_unet
from sdfast.models.vae import VAEConfig, load_vae
from tests.models.conftest import SD15, UNETS, VAES, randomise
from tests.models.test_unet import relative


class Counting:
    """Computes what the definitions say, in other words, and counts."""

    def __init__(self):
        self.norms, self.gated = [], 0

    def group_norm(self, x, shift, weight, bias, groups, eps, silu):
        self.norms.append((shift is not None, silu))
        if shift is not None:
            x = x + shift[:, :, None, None]
        grouped = x.unflatten(1, (groups, -1)).flatten(2)
        centred = grouped - grouped.mean(-1, keepdim=True)
        y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
        y = y * weight[:, None, None] + bias[:, None, None]
        return y * y.sigmoid() if silu else y

    def linear_geglu(self, x, weight, bias):
        self.gated += 1
        value, gate = (x @ weight.T + bias).chunk(2, dim=-1)
        return value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))


def unet(name):
    from diffusers import UNet2DConditionModel

    theirs = randomise(UNet2DConditionModel(**UNETS[name]))
    network = load_unet(UNetConfig.from_diffusers(UNETS[name]), theirs.state_dict())[0]
    sample = torch.randn(2, network.config.in_channels, 8, 8)
    return network, (
        sample,
        torch.randn(2, sum(network.shift_widths)),
        torch.randn(2, 5, sum(network.context_widths)),
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.no_grad()
def test_a_unet_computes_all_of_its_own_by_what_it_is_given(name):
    network, inputs = unet(name)
    expected = network(*inputs)
    counting = Counting()
    use_group_norm(network, counting.group_norm)
    network.use_geglu(counting.linear_geglu)
    assert relative(network(*inputs), expected) < 1e-5
    modules = list(network.modules())
    assert len(counting.norms) == sum(isinstance(module, GroupNorm) for module in modules)
    assert set(counting.norms) == {(False, False), (False, True), (True, True)}
    assert counting.gated == sum(isinstance(module, GEGLU) for module in modules) > 0
    use_group_norm(network, ops.normalised)
    network.use_geglu(ops.linear_geglu)
    assert torch.equal(network(*inputs), expected)


@torch.no_grad()
def test_both_halves_of_a_vae_do():
    from diffusers import AutoencoderKL

    theirs = randomise(AutoencoderKL(**VAES["sd"]))
    halves = load_vae(VAEConfig.from_diffusers(VAES["sd"]), theirs.state_dict())
    for half, given in zip(halves, (torch.randn(1, 4, 6, 6), torch.rand(1, 3, 24, 24)), strict=True):
        expected = half(given)
        counting = Counting()
        use_group_norm(half, counting.group_norm)
        got = half(given)
        pairs = [(got, expected)] if torch.is_tensor(got) else list(zip(got, expected, strict=True))
        assert all(relative(ours, truth) < 1e-5 for ours, truth in pairs)
        assert len(counting.norms) == sum(isinstance(module, GroupNorm) for module in half.modules())


@torch.no_grad()
def test_a_product_in_fp8_stays_what_it_is():
    network, _ = unet("sd15")
    convert(network, fp8_layers(network))
    [block, *_] = [module for module in network.modules() if isinstance(module, GEGLU)]
    assert isinstance(block.proj, LinearFP8)
    counting = Counting()
    network.use_geglu(counting.linear_geglu)
    x = torch.randn(1, 3, SD15["block_out_channels"][0])
    value, gate = block.proj(x).chunk(2, dim=-1)
    assert torch.equal(block(x), value * F.gelu(gate))
    assert counting.gated == 0
