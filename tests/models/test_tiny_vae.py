"""Our tiny VAE makes what diffusers' AutoencoderTiny makes, on the same weights."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from sdfast.errors import CheckpointError
from sdfast.models.tiny_vae import TinyVAEConfig
from sdfast.models.vae import TINY, load_vae, vae_config
from tests.models.conftest import randomise
from tests.models.test_unet import relative

CONFIGS: dict[str, dict[str, Any]] = {
    "TAESD": {},
    "wide latents": {"latent_channels": 16, "scaling_factor": 2.0},
    "two levels": {
        "encoder_block_out_channels": (16, 16),
        "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (1, 2),
        "num_decoder_blocks": (2, 1),
    },
}


def reference(name: str) -> AutoencoderTiny:
    made: AutoencoderTiny = randomise(AutoencoderTiny(**CONFIGS[name]))
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_both_halves_equal_diffusers(name: str) -> None:
    theirs = reference(name)
    config = vae_config(TINY, dict(theirs.config))
    decoder, encoder = load_vae(config, theirs.state_dict())
    assert encoder is not None
    latents = 2 * torch.randn(2, config.latent_channels, 6, 10)
    raw = theirs.decode(latents / theirs.config.scaling_factor).sample
    expected, got = (raw / 2 + 0.5).clamp(0, 1), decoder(latents)
    assert got.shape == (2, 3, 6 * config.scale, 10 * config.scale)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.1
    assert relative(got, expected) < 2e-6
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    truth = theirs.encode(image).latents * theirs.config.scaling_factor
    assert relative(encoder(image), truth) < 2e-6


def test_latents_far_out_are_squeezed() -> None:
    """Beyond three, as the network was trained."""
    theirs = reference("two levels")
    decoder, _ = load_vae(vae_config(TINY, dict(theirs.config)), theirs.state_dict())
    far = 40 * torch.randn(1, 4, 8, 8).sign()
    assert relative(decoder(far), (theirs.decode(far).sample / 2 + 0.5).clamp(0, 1)) < 2e-6
    near = decoder(3 * far.sign())
    assert relative(decoder(far), near) > 1e-3  # tanh(1) is not 1
    assert relative(decoder(far), decoder(100 * far)) < 1e-5


def test_what_is_not_finite_is_seen() -> None:
    theirs = reference("two levels")
    with torch.no_grad():
        theirs.decoder.layers[0].weight[0] = torch.inf
    decoder, _ = load_vae(vae_config(TINY, dict(theirs.config)), theirs.state_dict())
    assert torch.isnan(decoder(torch.randn(1, 4, 8, 8))).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "silu"),
        ("upsampling_scaling_factor", 4),
        ("upsample_fn", "bilinear"),
        ("decoder_block_out_channels", (64, 64, 64, 32)),
        ("num_decoder_blocks", (3, 1)),
        ("temporal_layers", 2),
    ],
)
def test_unknown_architectures_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field):
        TinyVAEConfig.from_diffusers({field: value})


def test_missing_weights_are_named() -> None:
    theirs = reference("two levels")
    weights = theirs.state_dict()
    del weights["decoder.layers.0.bias"]
    with pytest.raises(CheckpointError, match=r"missing: decoder\.layers\.0\.bias"):
        load_vae(vae_config(TINY, dict(theirs.config)), weights)
    only = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("decoder.")}
    assert load_vae(vae_config(TINY, dict(theirs.config)), only)[1] is None
