"""Small checkpoints with the structure of the real ones: diffusers' modules on random weights."""

from typing import Any

import pytest
import torch

from sdfast.models.tiny_vae import TinyDecoder, TinyEncoder, TinyVAEConfig

SD15: dict[str, Any] = {
    "block_out_channels": [32, 64, 96, 96],
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "sample_size": 16,
}
SD21 = SD15 | {"attention_head_dim": [2, 4, 6, 6], "use_linear_projection": True, "upcast_attention": True}
SDXL: dict[str, Any] = {
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [2, 4, 6],
    "use_linear_projection": True,
    "cross_attention_dim": 56,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 40 + 6 * 16,
}
REFINER = SDXL | {
    "block_out_channels": [32, 64, 96, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 2,
    "attention_head_dim": [2, 4, 6, 6],
    "projection_class_embeddings_input_dim": 40 + 5 * 16 + 16,
}
TINY = {
    "block_out_channels": [16, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": [1, 2],
    "cross_attention_dim": 20,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
# Of the same operations as TINY and SDXL, with as few of each, for what takes its time over every one.
SHALLOW = TINY | {"layers_per_block": 1}
SHALLOW_XL = SDXL | {
    "block_out_channels": [32, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 6],
}
# One transformer between ResNet blocks, for what is asked of attention alone.
UPCAST = SHALLOW | {
    "block_out_channels": [24],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
    "upcast_attention": True,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "sd21": SD21,
    "sdxl": SDXL,
    "refiner": REFINER,
    "inpainting": SD15 | {"in_channels": 9},
    "lcm": SD15 | {"time_cond_proj_dim": 24},
    "tiny": TINY,
    "no_mid": SD15 | {"mid_block_type": None},
    "plain_mid": SD15 | {"mid_block_type": "UNetMidBlock2D"},
    "nested_depths": SDXL
    | {
        "transformer_layers_per_block": [1, [1, 2], [2, 1]],
        "reverse_transformer_layers_per_block": [[2, 1, 1], [1, 2, 1], 1],
    },
}
VAES: dict[str, dict[str, Any]] = {
    "sd": {
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_num_groups": 8,
    },
    "shifted": {
        "block_out_channels": [16, 24],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 8,
        "latent_channels": 6,
        "scaling_factor": 0.36,
        "shift_factor": 0.11,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}
# All three levels of it, with as few blocks in each.
SHALLOW_VAE = VAES["sd"] | {"layers_per_block": 1}


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Norms and biases included: at their initial ones and zeros, mixing them up would go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
    return module.eval()


def unet_inputs(config: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """What diffusers' U-Net takes for two rows at different timesteps."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": noise(2, config.get("in_channels", 4), height, width),
        "timestep": torch.tensor([981.0, 17.25]),
        "encoder_hidden_states": noise(2, 77, config["cross_attention_dim"]),
    }
    if "addition_embed_type" in config:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        sizes = torch.tensor([[1024.0, 768, 0, 32, 1024, 1024], [512, 512, 0, 0, 512, 640]])
        inputs["added_cond_kwargs"] = {"text_embeds": noise(2, pooled), "time_ids": sizes}
    if "time_cond_proj_dim" in config:
        inputs["timestep_cond"] = noise(2, config["time_cond_proj_dim"])
    return inputs


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tiny_vae_halves() -> tuple[TinyDecoder, TinyEncoder]:
    """Of two levels, 16 channels wide."""
    config = TinyVAEConfig.from_diffusers(
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        }
    )
    halves = randomise(TinyDecoder(config)), randomise(TinyEncoder(config))
    for half in halves:
        half.eval().requires_grad_(False)
    return halves
