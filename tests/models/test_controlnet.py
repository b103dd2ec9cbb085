"""A U-Net with a ControlNet makes what diffusers' two models make together, on the same weights."""

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from sdfast.errors import CheckpointError
from sdfast.models.config import UNetConfig
from sdfast.models.controlnet import ControlNetConfig, load_controlled, load_embedding
from tests.models.conftest import SD15, SDXL, UNETS, randomise, unet_inputs

EMBEDDING = {"conditioning_embedding_out_channels": [4, 8, 12, 16]}
UP = {"up_block_types", "sample_size", "time_cond_proj_dim", "reverse_transformer_layers_per_block"}


def config_for(unet: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """Of a ControlNet for that U-Net."""
    return {name: value for name, value in unet.items() if name not in UP} | EMBEDDING | overrides


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd15": (SD15, {}),
    "sdxl": (SDXL, {}),
    "shallower": (SDXL, {"transformer_layers_per_block": [0, 1, 1], "down_block_types": ["DownBlock2D"] * 3}),
    "bgr": (SD15, {"controlnet_conditioning_channel_order": "bgr"}),
    "lcm": (UNETS["lcm"], {}),
    "inpainting": (UNETS["inpainting"], {"in_channels": 4}),
    "pooling": (SD15, {"global_pool_conditions": True}),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(kind: str) -> None:
    """Two rows, each with a scale of its own for each layer, and a control image of its own."""
    config, overrides = KINDS[kind]
    unet = randomise(UNet2DConditionModel(**config))
    controlnet = randomise(ControlNetModel(**config_for(config, **overrides)), seed=1)
    inputs, image = unet_inputs(config, 8, 12), torch.rand(2, 3, 64, 96, generator=torch.manual_seed(2))
    shared = {name: value for name, value in inputs.items() if name != "timestep_cond"}
    shared["sample"] = shared["sample"][:, :4]
    down, mid = controlnet(**shared, controlnet_cond=image, return_dict=False)
    scales = torch.rand(2, len(down) + 1, generator=torch.manual_seed(3)) + 0.5
    each = [scale.view(-1, 1, 1, 1) for scale in scales.T]
    down, mid = [part * scale for part, scale in zip(down, each[:-1], strict=True)], mid * each[-1]
    expected = unet(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample

    own = ControlNetConfig.from_diffusers(dict(controlnet.config))
    own.check_fits(UNetConfig.from_diffusers(config), 4, 8)
    weights = controlnet.state_dict()
    network, time_shift, context = load_controlled(
        UNetConfig.from_diffusers(config), unet.state_dict(), [own], [weights]
    )
    conditions = inputs.get("added_cond_kwargs", {})
    if "timestep_cond" in inputs:
        conditions = {"timestep_cond": inputs["timestep_cond"]}
    shift = torch.cat([time_shift(inputs["timestep"], **conditions), scales], dim=1)
    control = load_embedding([own], [weights])(image)
    got = network(inputs["sample"], shift, context(inputs["encoder_hidden_states"]), control)
    assert relative(got, expected) < 2e-6
    assert relative(unet(**inputs).sample, expected) > 0.05  # that something was to be seen


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_pool_conditions", "yes"),
        ("conditioning_channels", 4),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 7),
        ("controlnet_conditioning_channel_order", "gbr"),
        ("conditioning_embedding_out_channels", []),
        ("conditioning_embedding_out_channels", [16, "32"]),
        ("mid_block_type", None),
        ("down_block_types", "DownBlock2D"),
        ("encoder_hid_dim", 12),
        ("num_control_type", 6),
        ("cross_attention_dim", [48, 48, 48, 56]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"controlnet/config\.json: {field}"):
        ControlNetConfig.from_diffusers(config_for(SD15, **{field: value}))


def test_a_union_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="is of a ControlNetUnionModel; supported: ControlNetModel"):
        ControlNetConfig.from_diffusers(config_for(SD15, _class_name="ControlNetUnionModel"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"cross_attention_dim": 56}, "cross_attention_dim: 56, but 48 is needed"),
        ({"block_out_channels": [32, 64, 96, 112]}, r"levels: .*\(112, 2\)\], but .*\(96, 2\)\] is needed"),
        ({"layers_per_block": 1}, "channels and ResNet blocks of the levels"),
        ({"in_channels": 9}, "in_channels: 9, but 4 is needed"),
        ({"conditioning_embedding_out_channels": [4, 8]}, "pixels that are one of its embedding: 2, but 8"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 16,
                "projection_class_embeddings_input_dim": 136,
            },
            "width of the pooled prompt: 40, but None is needed",
        ),
    ],
)
def test_one_for_another_u_net_is_refused(overrides: dict[str, Any], named: str) -> None:
    made = ControlNetConfig.from_diffusers(config_for(SD15, **overrides))
    with pytest.raises(CheckpointError, match=f"does not fit the U-Net: .*{named}"):
        made.check_fits(UNetConfig.from_diffusers(SD15), 4, 8)


def test_weights_that_do_not_fit_are_named() -> None:
    unet = randomise(UNet2DConditionModel(**SD15)).state_dict()
    weights = randomise(ControlNetModel(**config_for(SD15))).state_dict()
    networks = UNetConfig.from_diffusers(SD15), ControlNetConfig.from_diffusers(config_for(SD15))
    lost, embedding = "controlnet_down_blocks.3.weight", "controlnet_cond_embedding.blocks.1.bias"
    with pytest.raises(CheckpointError, match=rf"the controlnet weights .* 1 missing: {lost}"):
        load_controlled(networks[0], unet, [networks[1]], [{n: t for n, t in weights.items() if n != lost}])
    with pytest.raises(CheckpointError, match=rf"the controlnet weights .* 1 missing: {embedding}"):
        load_embedding([networks[1]], [{n: t for n, t in weights.items() if n != embedding}])
