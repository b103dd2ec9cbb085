"""Graphs for ONNX Runtime's CUDA provider: what is fused, that all has CUDA kernels, that it is right."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdfast.engine import Engine
from sdfast.errors import BackendError
from sdfast.export.build import export
from sdfast.export.forms import lowerings
from sdfast.export.onnx import export_module, lower, trace
from sdfast.export.onnx_cpu import CPU, CPU_COMPACT
from sdfast.export.onnx_cuda import CUDA, by_head, group_norm_fits
from sdfast.export.onnx_tensorrt import TENSORRT
from sdfast.export.recipe import Recipe
from sdfast.manifest import read_manifest
from sdfast.models import layers, ops, unet, vae
from sdfast.models.pag import matching, perturb
from sdfast.models.text import TextEncoder
from sdfast.models.unet import UNet, UNetConfig, load_unet
from sdfast.models.vae import VAEConfig, load_vae
from sdfast.summary import summary
from tests.checkpoints import build_flat_sd
from tests.export.microsoft import OPERATORS
from tests.export.test_onnx import (
    BATCH,
    HEIGHT,
    WIDTH,
    Branched,
    overflowing_unet,
    rows_with_scales,
    session,
    unet_inputs,
    unet_modules,
)
from tests.models.conftest import SHALLOW, SHALLOW_VAE, SHALLOW_XL, UPCAST, VAES, randomise, tiny_vae_halves

HALF, SINGLE = torch.float16, torch.float32
# As wide as SD 1.5's first level, so that every fused operator has its size, and as shallow as can be.
WIDE = {
    "block_out_channels": [320, 320],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
WIDE_LEVEL = WIDE | {
    "block_out_channels": [320],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
}
LISTING = Path(__file__).with_name("cuda_kernels.txt")


def listed_kernels():
    """(domain, operator) -> [(first version, last version, element types)]."""
    kernels = {}
    for line in LISTING.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            domain, name, first, last, *types = line.split()
            span = (int(first), 10**9 if last == "-" else int(last), set(types))
            kernels.setdefault(("" if domain == "-" else domain, name), []).append(span)
    return kernels


KERNELS = listed_kernels()


def without_kernel(model, values):
    """The nodes that no kernel of the CUDA provider takes, with the reason. values: results by name."""
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    for node in model.graph.node:
        version = 1
        if node.domain == "":
            version = onnx.defs.get_schema(node.op_type, opsets[""]).since_version
        spans = KERNELS.get((node.domain, node.op_type), [])
        types = {values[name].dtype.name.replace("float32", "float") for name in node.input if name}
        if not any(first <= version <= last for first, last, _ in spans):
            yield f"{node.op_type} {version}: no kernel"
        elif not any(
            types <= allowed | {"int64"} for first, last, allowed in spans if first <= version <= last
        ):
            yield f"{node.op_type}: no kernel for {sorted(types)}"


def run(path, inputs):
    """The graph's outputs, after making sure that the CUDA provider would run every node of it."""
    model = onnx.load(path)
    evaluator = ReferenceEvaluator(model, new_ops=OPERATORS)
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    values = evaluator.run(None, feeds, intermediate=True)
    values |= {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert list(without_kernel(model, values)) == []
    return [values[output.name] for output in model.graph.output]


def check(path, module, inputs, tolerance):
    """Against the network in float32 on the same weights."""
    dtypes = {tensor.dtype for tensor in module.parameters()}
    truth = module.float()(**{name: tensor.float() for name, tensor in inputs.items()})
    module.to(*dtypes)
    truths = truth if isinstance(truth, tuple) else (truth,)
    for got, expected in zip(run(path, inputs), truths, strict=True):
        assert got.shape == tuple(expected.shape)
        error = (torch.from_numpy(got).double() - expected.double()).norm() / expected.double().norm()
        assert error <= tolerance


def kinds(path):
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def count(module, *classes):
    return sum(isinstance(child, classes) for child in module.modules())


def fused(network):
    """The operators that a U-Net's structure asks for in float16, by name."""
    resnets, transformers = count(network, layers.ResBlock), count(network, unet.Transformer)
    blocks, norms = count(network, unet.TransformerBlock), count(network, layers.GroupNorm)
    up = sum(len(block.resnets) for block in network.up_blocks)
    # A shift enters every ResNet block. A sum is normed next in every transformer, in every ResNet block but
    # the first of a level down and those up, and at the end.
    sums_normed = transformers + 1 + resnets - up - len(network.down_blocks)
    sums = resnets + transformers
    biases = {"BiasAdd": 3 * blocks + sums - sums_normed, "Add": transformers, "BiasSplitGelu": blocks}
    return Counter(biases) + Counter(
        GroupNorm=norms - resnets - sums_normed,
        SkipGroupNorm=resnets + sums_normed,
        LayerNormalization=3 * blocks,
        MultiHeadAttention=2 * blocks,
        NhwcConv=count(network, layers.Conv3x3, layers.Conv1x1),
        FusedMatMul=count(network, layers.Linear),
        Concat=up,
        Resize=count(network, layers.Upsample),
        Split=2,  # the time shifts of all blocks, and the keys and values of all layers
        Transpose=2,  # the sample, and the model's output
    )


def test_every_operation_has_a_lowering():
    refused = {"linear_fp8", "conv3x3_fp8", "linear_int8"}  # by a recipe
    assert set(CUDA) == set(CPU) - refused == set(ops.NAMES) - refused


@pytest.mark.slow
def test_sd15_is_made_of_fused_operators():
    """The real network, its weights never written. All is counted but Reshape, which moves nothing."""
    stock = json.loads((resources.files("sdfast.export") / "stock" / "sd15.json").read_text("utf-8"))
    config = UNetConfig.from_diffusers(stock["unet/config.json"])
    with torch.device("meta"):
        network = UNet(config).to(HALF)
    network = network.to_empty(device="cpu")
    model = trace(network, unet_inputs(network, 2, 64, 64, HALF), {}, ["output"])
    lower(model, CUDA)
    nodes = list(model.graph)
    found = Counter(node.op_type for node in nodes)
    assert found.pop("Reshape") > 0
    assert found == fused(network)
    assert {name: found[name] for name in ("MultiHeadAttention", "NhwcConv", "BiasSplitGelu")} == {
        "MultiHeadAttention": 32,
        "NhwcConv": 66,
        "BiasSplitGelu": 16,
    }
    assert (found["GroupNorm"], found["SkipGroupNorm"], found["BiasAdd"]) == (16, 45, 63)
    packed = [n for n in nodes if n.op_type == "MultiHeadAttention" and len(n.inputs) == 1]
    assert len(packed) == count(network, unet.SelfAttention) == 16
    silu = [n for n in nodes if "GroupNorm" in n.op_type and n.attributes["activation"].value == 1]
    assert len(silu) == 2 * count(network, layers.ResBlock) + 1
    assert {(n.domain, n.op_type) for n in nodes} <= set(KERNELS)
    assert all(n.attributes["channels_last"].value == 1 for n in nodes if "GroupNorm" in n.op_type)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(HALF, 5e-3), pytest.param(SINGLE, 1e-5, marks=pytest.mark.slow)]
)
def test_unet(tmp_path, dtype, tolerance):
    network, _, _ = unet_modules(WIDE, dtype)
    path = tmp_path / "unet.onnx"
    export_module(network, unet_inputs(network, 2, 8, 8, dtype), {}, ["output"], path, CUDA)
    found = kinds(path)
    found.pop("Reshape")
    expected = fused(network)
    if dtype == SINGLE:  # q, k and v are not packed
        expected["Split"] += count(network, unet.SelfAttention)
    assert found == expected
    check(path, network, unet_inputs(network, 2, 8, 8, dtype), tolerance)
    # ONNX Runtime checks operators, attributes, types and shapes before it looks for kernels.
    with pytest.raises(NoKernel, match=r"NhwcConv\(1\)"):
        session(path)


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance"),
    [pytest.param(SHALLOW_XL, SINGLE, 1e-5, marks=pytest.mark.slow), (UPCAST, HALF, 5e-3)],
    ids=["sdxl", "upcast"],
)
def test_sizes_without_a_fused_operator(tmp_path, config, dtype, tolerance):
    """Small widths, deep transformers; attention whose scores are float32."""
    network, _, _ = unet_modules(config, dtype)
    path = tmp_path / "unet.onnx"
    export_module(network, unet_inputs(network, 2, 8, 12, dtype), {}, ["output"], path, CUDA)
    found = kinds(path)
    assert found["Transpose"] == 2
    assert found["BiasAdd"] == found["BiasSplitGelu"] == found["Shape"] == 0
    assert found["GroupNorm"] + found["SkipGroupNorm"] == count(network, layers.GroupNorm)
    check(path, network, unet_inputs(network, 2, 8, 12, dtype), tolerance)


def test_unet_of_any_size(tmp_path):
    network, _, _ = unet_modules(SHALLOW, HALF)
    dynamic = {
        "sample": {0: BATCH, 2: HEIGHT, 3: WIDTH},
        "time_shift": {0: BATCH},
        "context": {0: BATCH, 1: ("tokens", 77, 770)},
    }
    path = tmp_path / "unet.onnx"
    export_module(network, unet_inputs(network, 1, 8, 12, HALF), dynamic, ["output"], path, CUDA)
    assert kinds(path)["Transpose"] == 2
    for batch, height, width in ((1, 8, 12), (3, 16, 8), (2, 7, 9)):
        check(path, network, unet_inputs(network, batch, height, width, HALF), 5e-3)


def test_images_stay_in_their_form_in_branches(tmp_path):
    """Each row by its own scales."""
    network, path = Branched(), tmp_path / "network.onnx"
    dynamic = {name: {0: BATCH} for name in ("x", "time_shift")}
    export_module(network, rows_with_scales(1), dynamic, ["output"], path, CUDA)
    assert kinds(path)["Transpose"] == 2
    check(path, network, rows_with_scales(2), 1e-5)


class ScaledSum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.branch = (randomise(layers.Conv1x1(8, 6), seed).to(HALF) for seed in (0, 1))

    def forward(self, x, branch, scale):
        return ops.add_scaled(self.x(x), self.branch(branch), scale)


def test_a_scaled_sum_takes_no_image_out_of_its_form(tmp_path):
    inputs = {name: torch.randn(2, 8, 4, 5, dtype=HALF) for name in ("x", "branch")}
    inputs["scale"] = torch.tensor([[0.5], [-2.0]], dtype=HALF)
    network, path = ScaledSum(), tmp_path / "sum.onnx"
    export_module(network, inputs, {}, ["output"], path, CUDA)
    assert kinds(path)["Transpose"] == 3  # the two that enter, and the one that leaves
    check(path, network, inputs, 5e-3)


class PooledSum(ScaledSum):
    """As of a ControlNet that pools: the mean of each channel is convolved, and added to every pixel."""

    def forward(self, x, branch, scale):
        pooled = self.branch(ops.mean_of_pixels(branch))
        return ops.add_scaled(self.x(x), pooled, scale)


def test_a_mean_of_pixels_is_taken_in_their_form(tmp_path):
    inputs = {name: torch.randn(2, 8, 4, 5, dtype=HALF) for name in ("x", "branch")}
    inputs["scale"] = torch.tensor([[0.5], [-2.0]], dtype=HALF)
    network, path = PooledSum(), tmp_path / "sum.onnx"
    export_module(network, inputs, {}, ["output"], path, CUDA)
    assert (kinds(path)["ReduceMean"], kinds(path)["Transpose"]) == (1, 3)
    check(path, network, inputs, 5e-3)


def test_a_free_batch_asks_for_no_shapes(tmp_path):
    """Shape arithmetic runs on the processor: a graph that leaves only the batch open has none."""
    network, _, _ = unet_modules(WIDE_LEVEL, HALF)
    dynamic = {name: {0: BATCH} for name in ("sample", "time_shift", "context")}
    path = tmp_path / "unet.onnx"
    export_module(network, unet_inputs(network, 2, 4, 4, HALF), dynamic, ["output"], path, CUDA)
    found = kinds(path)
    found.pop("Reshape")
    assert found == fused(network)
    for batch in (1, 3):
        check(path, network, unet_inputs(network, batch, 4, 4, HALF), 5e-3)


def vae_halves(config, dtype):
    from diffusers import AutoencoderKL

    weights = randomise(AutoencoderKL(**config)).state_dict()
    return load_vae(VAEConfig.from_diffusers(config), weights, dtype)


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance"),
    [
        pytest.param(SHALLOW_VAE, HALF, 5e-3, id="sd"),
        pytest.param(VAES["shifted"], HALF, 5e-3, id="shifted"),
        pytest.param(SHALLOW_VAE, SINGLE, 1e-5, id="sd-fp32", marks=pytest.mark.slow),
    ],
)
def test_vae_decoder(tmp_path, config, dtype, tolerance):
    """Latents and picture are float32. Groups of three channels, which "shifted" has, have no fused norm."""
    decoder = vae_halves(config, dtype)[0]
    latents = {"latents": torch.randn(1, decoder.config.latent_channels, 8, 12)}
    path = tmp_path / "vae.onnx"
    export_module(decoder, latents, {}, ["image"], path, CUDA)
    found = kinds(path)
    norms = [m for m in decoder.modules() if isinstance(m, layers.GroupNorm)]
    fit = [m for m in norms if group_norm_fits(len(m.weight), m.groups)]
    assert found["GroupNorm"] + found["SkipGroupNorm"] == len(fit)
    assert found["NhwcConv"] == count(decoder, layers.Conv3x3, layers.Conv1x1)
    assert found["MultiHeadAttention"] == count(decoder, vae.Attention)
    if config is SHALLOW_VAE:
        assert len(fit) == len(norms)
        assert found["Transpose"] == 2
    check(path, decoder, latents, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(HALF, 5e-3), pytest.param(SINGLE, 1e-5, marks=pytest.mark.slow)]
)
def test_vae_encoder(tmp_path, dtype, tolerance):
    """Image and moments are float32; its strided convolutions pad one end only."""
    encoder = vae_halves(SHALLOW_VAE, dtype)[1]
    picture = {"image": torch.randn(1, 3, 16, 24)}
    path = tmp_path / "vae.onnx"
    export_module(encoder, picture, {}, ["mean", "std"], path, CUDA)
    assert kinds(path)["Pad"] == count(encoder, layers.Downsample) == 2
    assert kinds(path)["Transpose"] == 2
    check(path, encoder, picture, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(HALF, 5e-3), pytest.param(SINGLE, 1e-5, marks=pytest.mark.slow)]
)
def test_tiny_vae(tmp_path, dtype, tolerance):
    """Images channels last from end to end."""
    decoder, encoder = (half.to(dtype) for half in tiny_vae_halves())
    latents, picture = {"latents": torch.randn(1, 4, 6, 8)}, {"image": torch.rand(1, 3, 24, 32) * 2 - 1}
    for half, given, output in ((decoder, latents, "image"), (encoder, picture, "mean")):
        path = tmp_path / f"{output}.onnx"
        export_module(half, given, {}, [output], path, CUDA)
        found = kinds(path)
        assert found["NhwcConv"] == count(half, layers.Conv3x3)
        assert found["Transpose"] == 2
        check(path, half, given, tolerance)


def test_conditioning(tmp_path):
    _, time_shift, context = unet_modules(SHALLOW_XL, HALF)
    inputs = {
        "timesteps": torch.tensor([981.0, 17.25]),
        "text_embeds": torch.randn(2, 40, dtype=HALF),
        "time_ids": torch.tensor([[1024.0, 768, 0, 32, 1024, 1024], [512, 512, 0, 0, 512, 640]]),
    }
    path = tmp_path / "time_shift.onnx"
    free = {name: {0: ("steps", 1, 2000)} for name in inputs}
    export_module(time_shift, inputs, free, ["time_shift"], path, CUDA)
    check(path, time_shift, inputs, 5e-3)
    hidden = {"hidden_states": torch.randn(2, 77, 56, dtype=HALF)}
    export_module(context, hidden, {}, ["context"], tmp_path / "context.onnx", CUDA)
    check(tmp_path / "context.onnx", context, hidden, 5e-3)


def test_an_fp16_engine_is_for_cuda_in_every_module(tmp_path):
    """Its text encoder too, which transformers defines but for the end of a prompt."""
    checkpoint = build_flat_sd(tmp_path / "sd")
    engine = export(checkpoint, tmp_path / "engine", Recipe(dtype="fp16", batch=1))
    manifest = read_manifest(engine)
    assert manifest.provider == manifest.recipe["provider"] == "cuda"
    assert "onnx fp16 cuda" in summary(manifest)
    for name, module in manifest.modules.items():
        spec = onnx.load(engine / module.variants[0].file, load_external_data=False)
        assert {(n.domain, n.op_type) for n in spec.graph.node} <= set(KERNELS), name
    assert {"NhwcConv", "SkipGroupNorm"} <= set(kinds(engine / "unet.onnx"))
    rows = {"input_ids": torch.randint(0, 20, (1, 77))}
    run(engine / "text_encoder.onnx", rows)
    with pytest.raises(BackendError, match="'cuda', but device 'cpu' was asked for"):
        Engine.open(engine, "cpu")


@pytest.mark.slow
def test_an_engine_for_another_provider_is_made_anew(tmp_path):
    checkpoint = build_flat_sd(tmp_path / "sd")
    engine = export(checkpoint, tmp_path / "engine", Recipe(dtype="fp16", batch=1))
    export(checkpoint, engine, Recipe(dtype="fp16", batch=1, provider="cpu"))
    assert Engine.open(engine).manifest.provider == "cpu"
    assert "NhwcConv" not in kinds(engine / "unet.onnx")


def test_scores_that_must_be_float32_are(tmp_path):
    """Queries, keys and values come to attention from a cast, each in the precision of its scores."""
    network = overflowing_unet(upcast=True)
    inputs, path = unet_inputs(network, 2, 8, 8, HALF), tmp_path / "unet.onnx"
    export_module(network, inputs, {}, ["output"], path, CUDA)
    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    attentions = [node for node in graph.node if node.op_type == "MultiHeadAttention"]
    casts = [makers[name] for node in attentions for name in node.input]
    assert {node.op_type for node in casts} == {"Cast"}
    assert {node.attribute[0].i for node in casts} == {onnx.TensorProto.FLOAT}
    assert len(casts) == 3 * len(attentions) > 0
    assert np.isfinite(run(path, inputs)[0]).all()


@pytest.mark.parametrize(("kind", "eos"), [(CLIPTextModel, 99), (CLIPTextModelWithProjection, 2)])
def test_text_encoder(tmp_path, kind, eos):
    """Every node has a CUDA kernel, in either way to find the end of a prompt."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, vocab_size=100, projection_dim=24, bos_token_id=98, eos_token_id=eos)
    model = kind._from_config(config, attn_implementation="eager")  # as an export loads it
    module = TextEncoder(randomise(model).to(HALF), final_norm=True)
    ids = torch.randint(3, 98, (1, 77))
    ids[0, 40:] = 99
    path = tmp_path / "text_encoder.onnx"
    export_module(module, {"input_ids": ids}, {}, ["hidden_states", "pooled"], path, CUDA)
    states, pooled = module.float()(ids)
    for got, expected in zip(run(path, {"input_ids": ids}), (states, pooled), strict=True):
        error = (torch.from_numpy(got).double() - expected.double()).norm() / expected.double().norm()
        assert got.dtype == np.float16
        assert error < 5e-3


def test_a_recipes_provider_chooses_the_table():
    assert lowerings(Recipe()) is CPU
    assert lowerings(Recipe(winograd=False)) is CPU_COMPACT
    assert lowerings(Recipe(dtype="fp16")) is CUDA
    assert lowerings(Recipe(provider="tensorrt")) is TENSORRT


def test_rows_by_head():
    rows = np.array([f"{part}{head}{i}" for part in "qkv" for head in "ab" for i in "01"])
    packed = ["qa0", "qa1", "ka0", "ka1", "va0", "va1", "qb0", "qb1", "kb0", "kb1", "vb0", "vb1"]
    assert by_head(rows, 2).tolist() == packed


@pytest.mark.parametrize(
    ("channels", "groups", "fits"),
    [(320, 32, True), (1920, 32, True), (96, 32, False), (128, 64, False), (330, 32, False)],
)
def test_group_norms_with_a_kernel(channels, groups, fits):
    assert group_norm_fits(channels, groups) == fits


def one_node(kind, domain, dtype):
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(kind, ["x"], ["y"], domain=domain)
    graph = onnx.helper.make_graph([node], "g", [info("x", dtype, [2])], [info("y", dtype, [2])])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets)


def test_nodes_for_the_processor_are_found():
    ones = {"x": np.ones(2, np.float32)}
    assert list(without_kernel(one_node("Gelu", "", onnx.TensorProto.FLOAT), ones)) == []
    assert list(without_kernel(one_node("Acos", "", onnx.TensorProto.FLOAT), ones)) == ["Acos 7: no kernel"]
    strange = one_node("Gelu", "com.example", onnx.TensorProto.FLOAT)
    assert list(without_kernel(strange, ones)) == ["Gelu 1: no kernel"]
    whole = {"x": np.ones(2, np.int32)}
    found = list(without_kernel(one_node("Sigmoid", "", onnx.TensorProto.INT32), whole))
    assert found == ["Sigmoid: no kernel for ['int32']"]


@pytest.mark.cuda
def test_the_listing_is_what_the_installed_build_has():
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    kernels = [k for k in get_all_opkernel_def() if k.provider == "CUDAExecutionProvider"]
    if not kernels:
        pytest.skip("this ONNX Runtime is built without CUDA")
    for (domain, name), spans in KERNELS.items():
        built = [k.version_range for k in kernels if k.op_name == name and k.domain in (domain, "ai.onnx")]
        for first, _, _ in spans:
            assert any(low <= first <= high for low, high in built), (domain, name, first)


def test_layers_that_may_be_perturbed(tmp_path):
    """Their attention is the fused one, in whose place each row may take the values."""
    from diffusers import UNet2DConditionModel

    weights = randomise(UNet2DConditionModel(**SHALLOW)).state_dict()
    network, _, _ = load_unet(UNetConfig.from_diffusers(SHALLOW), weights, HALF)
    names = matching(network, "down_blocks.1")
    perturb(network, names)
    inputs = unet_inputs(network, 2, 8, 12, HALF)
    inputs["time_shift"] = torch.cat([inputs["time_shift"], torch.tensor([[0.0], [1.0]]).to(HALF)], dim=1)
    path = tmp_path / "unet.onnx"
    export_module(network, inputs, {}, ["output"], path, CUDA)
    assert names and kinds(path)["MultiHeadAttention"] == 2 * count(network, unet.TransformerBlock)
    check(path, network, inputs, 5e-3)


def test_attention_to_images_is_the_fused_one(tmp_path):
    """One more for each image of an IP-Adapter, of as many keys as that has tokens."""
    from diffusers import UNet2DConditionModel

    weights = randomise(UNet2DConditionModel(**SHALLOW)).state_dict()
    config, tokens = UNetConfig.from_diffusers(SHALLOW), (4, 16)
    network, _, _ = load_unet(config, weights, HALF, image_tokens=tokens)
    inputs = unet_inputs(network, 2, 8, 12, HALF)
    inputs["image_context"] = torch.randn(2, sum(tokens), sum(network.context_widths)).to(HALF)
    path = tmp_path / "unet.onnx"
    export_module(network, inputs, {}, ["output"], path, CUDA)
    layers_of = count(network, unet.CrossAttention)
    assert kinds(path)["MultiHeadAttention"] == count(network, unet.SelfAttention) + 3 * layers_of
    check(path, network, inputs, 5e-3)
