"""Our U-Net makes what diffusers' makes, on the same weights."""

import pytest
import torch

from sdfast.errors import CheckpointError
from sdfast.models.unet import UNetConfig, load_unet
from tests.models.conftest import SD15, SDXL, UNETS, randomise, unet_inputs


def reference(config):
    from diffusers import UNet2DConditionModel

    return randomise(UNet2DConditionModel(**config))


def ours(config, state_dict, inputs, dtype=None):
    unet, time_shift, context = load_unet(UNetConfig.from_diffusers(config), state_dict, dtype)
    added = inputs.get("added_cond_kwargs", {})
    condition = {"timestep_cond": inputs["timestep_cond"]} if "timestep_cond" in inputs else {}
    shift = time_shift(inputs["timestep"], **added, **condition)
    return unet(inputs["sample"], shift, context(inputs["encoder_hidden_states"]))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("name", UNETS)
def test_equals_diffusers(name):
    config = UNETS[name]
    theirs, inputs = reference(config), unet_inputs(config, 16, 24)
    expected = theirs(**inputs).sample
    got = ours(dict(theirs.config), theirs.state_dict(), inputs)
    assert got.shape == expected.shape
    assert relative(got, expected) < 2e-6


@pytest.mark.parametrize("size", [(13, 19), (8, 20), (9, 8)])
def test_equals_diffusers_at_sizes_that_do_not_halve_evenly(size):
    theirs, inputs = reference(SD15), unet_inputs(SD15, *size)
    assert relative(ours(SD15, theirs.state_dict(), inputs), theirs(**inputs).sample) < 2e-6


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_float32_error_is_that_of_diffusers(name):
    """Against diffusers in float64, neither float32 implementation is the better one."""
    config = UNETS[name]
    theirs, inputs = reference(config), unet_inputs(config, 16, 16)
    weights = theirs.state_dict()
    single = ours(config, weights, inputs), theirs(**inputs).sample
    # diffusers makes its sinusoids in float32 even then, so the truth shares that rounding with both.
    double = {
        k: v.double() if torch.is_tensor(v) else {n: t.double() for n, t in v.items()}
        for k, v in inputs.items()
    }
    truth = theirs.double()(**double).sample
    assert relative(single[0], truth) < 1.5 * relative(single[1], truth)


def test_weights_are_used_where_they_lie():
    weights = reference(SD15).state_dict()
    unet, _, _ = load_unet(UNetConfig.from_diffusers(SD15), weights)
    assert unet.conv_in.weight.data_ptr() == weights["conv_in.weight"].data_ptr()
    proj = "down_blocks.0.attentions.0.proj_in.weight"  # a 1×1 convolution in the checkpoint, a matrix here
    assert unet.get_parameter(proj).data_ptr() == weights[proj].data_ptr()
    assert not any(p.is_meta or p.requires_grad for p in unet.parameters())


def test_dtype_casts_every_weight():
    modules = load_unet(UNetConfig.from_diffusers(SDXL), reference(SDXL).state_dict(), torch.float16)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_embed_type", "timestep"),
        ("dual_cross_attention", True),
        ("only_cross_attention", [True, False, False, False]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("act_fn", "gelu"),
        ("addition_embed_type", "image"),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D"] * 4),
        ("conv_in_kernel", 5),
        ("center_input_sample", True),
        ("encoder_hid_dim", 1024),
        ("block_out_channels", [32, 64]),
        ("in_channels", "4"),
        ("block_out_channels", [32, "64", 96, 96]),
        ("attention_head_dim", None),
        ("norm_eps", "small"),
        ("something_new", 3),
    ],
)
def test_unknown_architectures_are_refused_by_name(field, value):
    with pytest.raises(CheckpointError, match=field):
        UNetConfig.from_diffusers(SD15 | {field: value})


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(CheckpointError, match="32 channels do not divide"):
        UNetConfig.from_diffusers(SD15 | {"norm_num_groups": 5})


def test_levels_with_contexts_of_different_widths_are_refused():
    with pytest.raises(CheckpointError, match="cross_attention_dim"):
        UNetConfig.from_diffusers(SD15 | {"cross_attention_dim": [48, 48, 48, 56]})


def test_weights_that_do_not_fit_are_named():
    weights, config = reference(SD15).state_dict(), UNetConfig.from_diffusers(SD15)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(CheckpointError, match=r"1 missing: conv_in\.weight"):
        load_unet(config, {n: t for n, t in weights.items() if n != "conv_in.weight"})
    with pytest.raises(CheckpointError, match=r"1 unexpected: lora\.weight"):
        load_unet(config, weights | {"lora.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[48, 48\].* \[32, 48\]"):
        load_unet(config, weights | {name: torch.zeros(48, 48)})
    with pytest.raises(CheckpointError, match="floating point"):
        load_unet(config, weights | {"conv_in.bias": torch.zeros(32, dtype=torch.int8)})


def test_conditions_must_be_those_of_the_checkpoint():
    _, time_shift, _ = load_unet(UNetConfig.from_diffusers(SDXL), reference(SDXL).state_dict())
    assert time_shift.conditions() == ["text_embeds", "time_ids"]
    with pytest.raises(TypeError, match="text_embeds"):
        time_shift(torch.zeros(1))


@pytest.mark.slow
def test_equals_diffusers_at_full_size():
    """SD 1.5 as it is published: 860 million weights, some 7 GB while it runs."""
    config = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
    theirs, inputs = reference(config), unet_inputs(config, 32, 32)
    expected = theirs(**inputs).sample
    got = ours(dict(theirs.config), theirs.state_dict(), inputs)
    error = relative(got, expected)
    print(f"relative L2 {error:.2e}")
    assert error < 1e-5
