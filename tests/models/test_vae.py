"""Our VAE makes what diffusers' makes, on the same weights."""

import pytest
import torch

from sdfast.errors import CheckpointError
from sdfast.models.vae import OLD_NAMES, VAEConfig, load_vae
from tests.models.conftest import VAES, randomise
from tests.models.test_unet import relative


def reference(config):
    from diffusers import AutoencoderKL

    return randomise(AutoencoderKL(**config))


@pytest.mark.parametrize("name", VAES)
def test_decoder_equals_diffusers(name):
    config = VAES[name]
    theirs = reference(config)
    decoder, _ = load_vae(VAEConfig.from_diffusers(dict(theirs.config)), theirs.state_dict())
    latents = torch.randn(2, config.get("latent_channels", 4), 10, 14)
    shift = config.get("shift_factor", 0.0)
    raw = theirs.decode(latents / theirs.config.scaling_factor + shift).sample
    expected, got = (raw / 2 + 0.5).clamp(0, 1), decoder(latents)
    assert got.shape == (2, 3, 10 * decoder.config.scale, 14 * decoder.config.scale)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0
    assert relative(got, expected) < 2e-6


@pytest.mark.parametrize("name", VAES)
def test_encoder_equals_diffusers(name):
    theirs = reference(VAES[name])
    _, encoder = load_vae(VAEConfig.from_diffusers(VAES[name]), theirs.state_dict())
    image = torch.rand(2, 3, 40, 56) * 2 - 1
    moments = theirs.encode(image).latent_dist
    mean, std = encoder(image)
    assert mean.shape == std.shape == (2, encoder.config.latent_channels, *moments.mean.shape[2:])
    scale, shift = theirs.config.scaling_factor, VAES[name].get("shift_factor", 0.0)
    assert relative(mean, (moments.mean - shift) * scale) < 2e-6
    assert relative(std, moments.std * scale) < 2e-6


def test_weights_without_an_encoder_make_a_decoder_alone():
    theirs = reference(VAES["sd"]).state_dict()
    decoding = {n: t for n, t in theirs.items() if n.startswith(("decoder.", "post_quant_conv."))}
    config = VAEConfig.from_diffusers(VAES["sd"])
    decoder, encoder = load_vae(config, decoding)
    assert encoder is None
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(decoder(latents), load_vae(config, theirs)[0](latents))
    del theirs["encoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"missing: encoder\.conv_in\.bias"):
        load_vae(config, theirs)


def test_names_from_before_diffusers_0_15_are_understood():
    theirs = reference(VAES["sd"])
    back = {new: old for old, new in OLD_NAMES.items()}
    old = dict(theirs.state_dict())
    for now, then in back.items():
        old = {n.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): t for n, t in old.items()}
    assert any("proj_attn" in name for name in old)
    decoder, _ = load_vae(VAEConfig.from_diffusers(VAES["sd"]), old)
    latents = torch.randn(1, 4, 8, 8)
    expected = load_vae(VAEConfig.from_diffusers(VAES["sd"]), theirs.state_dict())[0](latents)
    assert torch.equal(decoder(latents), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "relu"),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 3),
        ("up_block_types", ["UpDecoderBlock2D"] * 2),
        ("latents_mean", [0.1, 0.2, 0.3, 0.4]),
        ("force_upcast", "yes"),
        ("temporal_layers", 2),
    ],
)
def test_unknown_architectures_are_refused_by_name(field, value):
    with pytest.raises(CheckpointError, match=field):
        VAEConfig.from_diffusers(VAES["sd"] | {field: value})


def test_missing_weights_are_named():
    weights = reference(VAES["sd"]).state_dict()
    del weights["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"missing: decoder\.conv_in\.bias"):
        load_vae(VAEConfig.from_diffusers(VAES["sd"]), weights)
