"""A VAE on a stream of another scale: the same numbers, and float16 holds them."""

import pytest
import torch

from sdfast.export.magnitudes import LARGEST, SMALLEST, DoesNotFit, extents, scales_for
from sdfast.models import half_range
from sdfast.models.half_range import Scales, changed_eps, rescale, set_eps
from sdfast.models.layers import GroupNorm
from sdfast.models.vae import EPS, VAEConfig, load_vae
from tests.models.conftest import VAES, randomise
from tests.models.test_unet import relative

DECODER, ENCODER = 0, 1
HALVES = pytest.mark.parametrize("half", [DECODER, ENCODER], ids=["decoder", "encoder"])


def weights(name):
    from diffusers import AutoencoderKL

    return randomise(AutoencoderKL(**VAES[name])).state_dict()


def load(name, half, dtype, state=None):
    return load_vae(VAEConfig.from_diffusers(VAES[name]), state or weights(name), dtype)[half]


def loud(name, gain=3e4):
    """Weights whose stream is beyond float16, and conv1 results too, as SDXL's are."""
    state = weights(name)
    for tensor, value in state.items():
        if ".conv2." in tensor or ".conv1." in tensor or "to_out" in tensor:
            state[tensor] = value * gain
    return state


def inputs(vae, half, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if half == DECODER:
        return torch.randn(1, vae.config.latent_channels, 8, 12, generator=generator)
    return torch.rand(1, 3, 32, 48, generator=generator) * 2 - 1


def raw(vae, half, x):
    """Without the ends, which are float32 in any case."""
    return half_range.body(vae)(x)


@HALVES
@pytest.mark.parametrize("name", VAES)
def test_the_algebra_is_exact_in_float64(name, half):
    plain, scaled = (load(name, half, torch.float64) for _ in range(2))
    names = [resnet for resnet, _ in half_range.resnets(scaled)]
    rescale(scaled, Scales(2.0**-7, {resnet: 2.0 ** -(i % 5) for i, resnet in enumerate(names)}))
    x = inputs(plain, half).double()
    expected, got = raw(plain, half, x), raw(scaled, half, x)
    assert torch.equal(got, expected)
    conv_in = half_range.body(scaled).conv_in.weight
    assert torch.equal(conv_in * 2.0**7, half_range.body(plain).conv_in.weight)
    # What is not scaled where it should be, or the other way round, shows.
    half_range.readers(scaled)[0][1].eps = EPS
    assert not torch.equal(raw(scaled, half, x), expected)


@HALVES
def test_a_scale_that_is_no_power_of_two_differs_by_rounding_alone(half):
    plain, scaled = (load("sd", half, torch.float64) for _ in range(2))
    rescale(scaled, Scales(0.3, {resnet: 0.7 for resnet, _ in half_range.resnets(scaled)}))
    x = inputs(plain, half).double()
    error = relative(raw(scaled, half, x), raw(plain, half, x))
    assert 0 < error <= 1e-12


@HALVES
def test_every_layer_of_the_stream_is_scaled_or_left_on_purpose(half):
    """By name, so that a layer that nobody thought of shows."""
    vae = load("sd", half, torch.float32)
    before = {name: tensor.clone() for name, tensor in vae.named_parameters()}
    rescale(vae, Scales(0.25, {resnet: 0.5 for resnet, _ in half_range.resnets(vae)}))
    quarter = (
        "conv_in.weight",
        "conv_in.bias",
        "conv2.weight",
        "conv2.bias",
        "to_out.0.weight",
        "to_out.0.bias",
    )
    quarter += ("conv_shortcut.bias", "samplers.0.conv.bias")
    for name, tensor in vae.named_parameters():
        factor = 0.25 if name.endswith(quarter) else 0.5 if ".conv1." in name else 1.0
        assert torch.equal(tensor, before[name] * factor), name
    for name, norm in vae.named_modules():
        if isinstance(norm, GroupNorm):
            assert norm.eps == EPS * (0.25 if name.endswith("norm2") else 0.0625), name


@HALVES
@pytest.mark.parametrize("name", VAES)
def test_a_vae_that_overflows_float16_does_not_any_more(name, half):
    state = loud(name)
    truth, plain = load(name, half, torch.float64, state), load(name, half, torch.float16, state)
    assert all(torch.isfinite(tensor).all() for tensor in plain.parameters())  # it is the activations
    fitted = load(name, half, torch.float32, state)
    found = extents(fitted)
    assert found.largest > LARGEST
    scales = scales_for(fitted, found)
    assert scales.stream < 1
    assert min(scales.firsts.values()) < 1
    rescale(fitted, scales)
    fitted.half()
    quiet = load(name, half, torch.float16)  # the same network with weights that fit: what rounding costs
    quiet_truth = load(name, half, torch.float64)
    for seed in range(3):
        x = inputs(truth, half, seed)
        assert not torch.isfinite(raw(plain, half, x.half())).all()
        got = raw(fitted, half, x.half())
        assert torch.isfinite(got).all()
        error = relative(got.double(), raw(truth, half, x.half().double()))
        usual = relative(raw(quiet, half, x.half()).double(), raw(quiet_truth, half, x.half().double()))
        assert error < 3 * usual < 0.02
    assert max(t.abs().max() for t in fitted.parameters()) < LARGEST


@HALVES
def test_headroom_is_what_it_says(half):
    """After scaling, the largest number is between 1/32 and 1/16 of float16's largest."""
    vae = load("sd", half, torch.float32, loud("sd"))
    rescale(vae, scales_for(vae, extents(vae)))
    after = extents(vae)
    assert LARGEST / 32 < after.stream.largest <= LARGEST / 16
    assert all(extent.largest <= LARGEST / 16 for extent in after.firsts.values())
    assert scales_for(vae, after).neutral


@HALVES
@pytest.mark.parametrize("name", VAES)
def test_a_vae_that_fits_is_left_alone(name, half):
    state = weights(name)
    vae = load(name, half, torch.float32, state)
    scales = scales_for(vae, extents(vae))
    assert scales.neutral
    kept = {name: tensor.data_ptr() for name, tensor in vae.named_parameters()}
    rescale(vae, scales)
    assert {name: tensor.data_ptr() for name, tensor in vae.named_parameters()} == kept
    assert changed_eps(vae) == {}


def test_the_checkpoints_own_tensors_are_not_changed():
    state = loud("sd")
    before = {name: tensor.clone() for name, tensor in state.items()}
    vae = load("sd", DECODER, torch.float32, state)
    rescale(vae, scales_for(vae, extents(vae)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_queries_and_values_that_overflow_are_beyond_help():
    state = weights("sd")
    state["decoder.mid_block.attentions.0.to_v.weight"] *= 1e5
    vae = load("sd", DECODER, torch.float32, state)
    with pytest.raises(DoesNotFit, match=r"numbers up to .*e\+0\d where no scale helps"):
        scales_for(vae, extents(vae))
    half = load("sd", DECODER, torch.float16, state)
    assert not torch.isfinite(half(inputs(half, DECODER))).all()


def test_weights_that_overflow_are_beyond_help():
    vae = load("sd", ENCODER, torch.float32)
    shortcut = next(r.conv_shortcut for _, r in half_range.resnets(vae) if r.conv_shortcut is not None)
    shortcut.weight[0, 0] = 7e4
    with pytest.raises(DoesNotFit, match=r"its weights are up to 7e\+04"):
        scales_for(vae, extents(vae))


def test_a_network_that_would_lose_its_small_end_is_refused():
    """One layer adds so much that the scale it needs would leave another's weights among the subnormals."""
    state = weights("sd")
    state["decoder.mid_block.resnets.0.conv2.weight"] *= 1e5
    state["decoder.mid_block.resnets.1.conv2.weight"] *= 1e-3
    vae = load("sd", DECODER, torch.float32, state)
    with pytest.raises(
        DoesNotFit, match=r"weights of .*mid_block\.resnets\.1\.conv2, .* too small for float16"
    ):
        scales_for(vae, extents(vae))


def test_a_faint_group_of_channels_is_refused():
    state = loud("sd")
    state["decoder.conv_in.weight"][:4] *= 1e-6  # one group, before anything is added to it
    state["decoder.conv_in.bias"][:4] *= 1e-6
    vae = load("sd", DECODER, torch.float32, state)
    found = extents(vae)
    assert found.stream.faintest < SMALLEST
    with pytest.raises(DoesNotFit, match="a group of channels"):
        scales_for(vae, found)


def test_a_network_without_numbers_in_float32_is_named():
    from sdfast.errors import CheckpointError

    state = weights("sd")
    state["decoder.conv_in.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite in float32 either"):
        extents(load("sd", DECODER, torch.float32, state))


def test_looking_leaves_no_hooks_and_is_repeatable():
    vae = load("sd", DECODER, torch.float32)
    first, second = extents(vae), extents(vae)
    assert first.largest == second.largest
    assert first.stream.faintest == second.stream.faintest
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vae.modules())


def test_the_eps_of_norms_can_be_carried_over():
    vae = load("sd", DECODER, torch.float32, loud("sd"))
    rescale(vae, scales_for(vae, extents(vae)))
    other = load("sd", DECODER, torch.float32)
    other.load_state_dict(vae.state_dict())
    set_eps(other, changed_eps(vae))
    x = inputs(vae, DECODER)
    assert torch.equal(other(x), vae(x))
    with pytest.raises(KeyError):
        set_eps(other, {"decoder.conv_in": 1e-3})


def test_an_infinite_picture_is_no_white_one():
    """conv_out reads a normalised tensor, so that nothing after it would make NaN of its infinities."""
    state = weights("sd")
    state["decoder.conv_out.weight"] *= 1e5
    vae = load("sd", DECODER, torch.float16, state)
    picture = vae(inputs(vae, DECODER))
    assert torch.isnan(picture).any()
    assert not torch.isinf(picture).any()
