"""ONNX modules give what their PyTorch definitions give."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from sdfast.errors import ExportError
from sdfast.export import inductor
from sdfast.export.onnx import export_module
from sdfast.export.onnx_cpu import CPU, CPU_COMPACT
from sdfast.export.onnx_tensorrt import TENSORRT
from sdfast.models import ops
from sdfast.models.layers import Conv1x1, Conv3x3, GroupNorm, Linear
from sdfast.models.lora import Choosing, attach, empty_of
from sdfast.models.pag import matching, perturb
from sdfast.models.step_cache import ShallowUNet
from sdfast.models.text import TextEncoder
from sdfast.models.unet import (
    FeedForward,
    SelfAttention,
    TransformerBlock,
    UNetConfig,
    load_unet,
    skip_levels,
)
from sdfast.models.vae import VAEConfig, load_vae
from tests.export.microsoft import OPERATORS
from tests.models.conftest import SHALLOW, SHALLOW_VAE, SHALLOW_XL, UPCAST, randomise, tiny_vae_halves

BATCH = ("batch", 1, 8)
HEIGHT, WIDTH = ("height", 4, 64), ("width", 4, 64)


def unet_modules(config, dtype=None, branch=None):
    from diffusers import UNet2DConditionModel

    weights = randomise(UNet2DConditionModel(**config)).state_dict()
    return load_unet(UNetConfig.from_diffusers(config), weights, dtype, branch)


def unet_inputs(unet, batch, height, width, dtype=torch.float32):
    return {
        "sample": torch.randn(batch, unet.config.in_channels, height, width, dtype=dtype),
        "time_shift": torch.randn(batch, sum(unet.shift_widths), dtype=dtype),
        "context": torch.randn(batch, 77, sum(unet.context_widths), dtype=dtype),
    }


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def kinds(path):
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def check(path, module, inputs, tolerance=2e-6):
    with torch.no_grad():
        expected = module(**inputs)
    got = session(path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    for value, truth in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert value.shape == tuple(truth.shape)
        error = (torch.from_numpy(value).double() - truth.double()).norm() / truth.double().norm()
        assert error < tolerance


def test_every_operation_has_a_lowering():
    every = set(ops.NAMES) - {"linear_fp8", "conv3x3_fp8"}  # which a recipe refuses for this backend
    assert set(CPU) == set(CPU_COMPACT) == every
    assert set(TENSORRT) == every - {"linear_int8"}  # and this one for a GPU


def test_unet_of_fixed_size(tmp_path):
    unet, _, _ = unet_modules(SHALLOW)
    inputs = unet_inputs(unet, 2, 8, 12)
    export_module(unet, inputs, {}, ["model_output"], tmp_path / "unet.onnx")
    check(tmp_path / "unet.onnx", unet, inputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unet.onnx", "unet.onnx.data"]


def test_tiny_vae(tmp_path):
    """Both halves; each convolution of an enlarged image is four of the small one."""
    decoder, encoder = tiny_vae_halves()
    latents, image = {"latents": torch.randn(1, 4, 6, 8)}, {"image": torch.rand(1, 3, 24, 32) * 2 - 1}
    export_module(decoder, latents, {}, ["image"], tmp_path / "decoder.onnx")
    export_module(encoder, image, {}, ["mean"], tmp_path / "encoder.onnx")
    check(tmp_path / "decoder.onnx", decoder, latents)
    check(tmp_path / "encoder.onnx", encoder, image)
    assert "Resize" not in kinds(tmp_path / "decoder.onnx")


class Branched(Choosing):
    """A convolution of each kind and an attention, all changed by two LoRAs."""

    def __init__(self):
        super().__init__()
        self.conv = Conv3x3(4, 8, stride=2)
        self.shortcut = Conv1x1(8, 16)
        self.attn = SelfAttention(16, 2, upcast=False)
        layers = ("conv", "shortcut", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
        attach(self, 2, empty_of(self, {name: [(0, 4), (1, 3)] for name in layers}))
        randomise(self)

    def forward(self, x, time_shift):
        self.told_last(time_shift)
        image = self.shortcut(self.conv(x))
        return ops.image_from_tokens(self.attn(ops.tokens_from_image(image)), image)


def rows_with_scales(rows):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, 4, 8, 12), "time_shift": (rows, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_layers_with_loras(tmp_path):
    """Of any batch; each row by its own scales."""
    network, path = Branched(), tmp_path / "network.onnx"
    dynamic = {name: {0: BATCH} for name in ("x", "time_shift")}
    export_module(network, rows_with_scales(1), dynamic, ["output"], path)
    for rows in (1, 3):
        check(path, network, rows_with_scales(rows), 1e-5)


@pytest.mark.parametrize("layers", [pytest.param(["mid"], marks=pytest.mark.slow), ["mid", "up_blocks.0"]])
def test_layers_that_may_be_perturbed(tmp_path, layers):
    """Of any batch, each row as it is told; in shallow steps too, which have none of the middle."""
    unet, _, _ = unet_modules(SHALLOW, branch=2)
    names = [name for pattern in layers for name in matching(unet, pattern)]
    assert names
    perturb(unet, names)
    shallow = ShallowUNet.of(unet, 2)
    for network, outputs in ((unet, ["output", "deep"]), (shallow, ["output"])):
        path = tmp_path / f"{len(outputs)}.onnx"
        dynamic = {name: {0: BATCH} for name in told_which(network, 1)}
        export_module(network, told_which(network, 1), dynamic, outputs, path)
        for rows in (1, 3):
            check(path, network, told_which(network, rows), 1e-5)


def told_which(network, rows):
    """The inputs of a step of so many rows, of which every second is perturbed."""
    inputs = unet_inputs(network, rows, 8, 12)
    perturbed = torch.arange(rows).add(1).remainder(2)[:, None].to(inputs["time_shift"])
    inputs["time_shift"] = torch.cat([inputs["time_shift"], perturbed], dim=1)
    if isinstance(network, ShallowUNet):
        inputs["deep"] = torch.randn(rows, network.rungs[2].channels, 4, 6)
    return inputs


def test_many_weights_go_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sdfast.export.onnx.SHARD", 100_000)
    module, inputs = nn.Sequential(*(nn.Linear(160, 160) for _ in range(5))), {"input": torch.randn(2, 160)}
    export_module(module, inputs, {}, ["output"], tmp_path / "layers.onnx")
    check(tmp_path / "layers.onnx", module, inputs)
    weights = sorted(tmp_path.glob("layers*-of-*.data"))
    assert len(weights) > 3
    assert len(list(tmp_path.iterdir())) == len(weights) + 1


def test_unet_of_any_size(tmp_path):
    """One with a cache branch, whose deep feature is a second output."""
    unet, _, _ = unet_modules(SHALLOW, branch=2)
    dynamic = {
        "sample": {0: BATCH, 2: HEIGHT, 3: WIDTH},
        "time_shift": {0: BATCH},
        "context": {0: BATCH, 1: ("tokens", 77, 770)},
    }
    path = tmp_path / "unet.onnx"
    export_module(unet, unet_inputs(unet, 1, 8, 12), dynamic, ["model_output", "deep"], path)
    for batch, height, width in ((1, 8, 12), (3, 16, 8), (2, 7, 9)):
        check(path, unet, unet_inputs(unet, batch, height, width))
    long = unet_inputs(unet, 1, 8, 8) | {"context": torch.randn(1, 154, sum(unet.context_widths))}
    check(path, unet, long)
    opened = session(path)
    assert [i.name for i in opened.get_inputs()] == ["sample", "time_shift", "context"]
    assert opened.get_inputs()[0].shape == ["batch", 4, "height", "width"]
    assert [o.name for o in opened.get_outputs()] == ["model_output", "deep"]


@pytest.mark.parametrize("branch", [0, 2])
def test_a_shallow_step(tmp_path, branch):
    """Of any size, where what it takes is of the latents' size. It does not use all that it is told."""
    unet, path = unet_modules(SHALLOW)[0], tmp_path / "shallow.onnx"
    channels, scale = unet.rungs[branch].channels, 2 ** skip_levels(unet.config)[branch]
    image, dynamic = {0: BATCH, 2: HEIGHT, 3: WIDTH}, {}
    if scale == 1:
        dynamic = {"sample": image, "time_shift": {0: BATCH}, "context": {0: BATCH}, "deep": image}

    def inputs(batch, height, width):
        deep = torch.randn(batch, channels, -(-height // scale), -(-width // scale))
        return unet_inputs(unet, batch, height, width) | {"deep": deep}

    shallow = ShallowUNet.of(unet, branch)
    export_module(shallow, inputs(2, 7, 12), dynamic, ["model_output"], path)
    for size in ((2, 7, 12), (3, 16, 8)) if dynamic else ((2, 7, 12),):
        check(path, shallow, inputs(*size))
    assert [i.name for i in session(path).get_inputs()] == ["sample", "time_shift", "context", "deep"]


def test_a_gated_products_halves_are_products_of_their_own(tmp_path):
    block, x = randomise(FeedForward(16)), {"x": torch.randn(2, 9, 16)}
    export_module(block, x, {}, ["y"], tmp_path / "ff.onnx")
    check(tmp_path / "ff.onnx", block, x)
    nodes = kinds(tmp_path / "ff.onnx")
    assert nodes.count("Gemm") == 3 and "Split" not in nodes


def test_the_compact_table_leaves_convolutions_as_they_are(tmp_path):
    path, x = tmp_path / "conv.onnx", {"x": torch.randn(1, 128, 16, 16)}
    export_module(Convolution(128, 128, True), x, {}, ["y"], path, CPU_COMPACT)
    assert "MatMul" not in kinds(path)


class Convolution(nn.Module):
    def __init__(self, inputs, outputs, bias):
        super().__init__()
        self.conv = randomise(Conv3x3(inputs, outputs, bias=bias))

    def forward(self, x):
        return ops.upsample_twice(self.conv(x))[:, :, ::2, ::2]


@pytest.mark.parametrize(
    ("size", "bias"),
    [
        ((16, 16), True),
        ((17, 30), False),
        ("any", True),
        pytest.param((16, 16), False, marks=pytest.mark.slow),
        pytest.param((17, 30), True, marks=pytest.mark.slow),
        pytest.param("any", False, marks=pytest.mark.slow),
    ],
)
def test_winograd_is_the_convolution(tmp_path, size, bias):
    """As exact as float32 allows: a few roundings more than the direct sum, against float64."""
    channels = 320 if size == "any" else 128  # of unknown size, only wide layers are transformed
    module = Convolution(channels, channels + 32, bias)
    dynamic = {"x": {0: BATCH, 2: HEIGHT, 3: WIDTH}} if size == "any" else {}
    height, width = (16, 16) if size == "any" else size
    path = tmp_path / "conv.onnx"
    export_module(module, {"x": torch.randn(2, channels, height, width)}, dynamic, ["y"], path)
    assert [node.op_type for node in onnx.load(path, load_external_data=False).graph.node].count(
        "MatMul"
    ) == 2
    for rows, h, w in ((2, height, width), (1, 4, 7), (3, 21, 18))[: 3 if dynamic else 1]:
        x = torch.randn(rows, channels, h, w)
        got = torch.from_numpy(session(path).run(None, {"x": x.numpy()})[0])
        conv = module.conv
        truth = nn.functional.conv2d(x.double(), conv.weight.double(), padding=1)
        if bias:
            truth += conv.bias.double()[:, None, None]
        assert got.shape == truth.shape
        assert (got - truth).norm() / truth.norm() < 2e-6


class EnlargedConvolution(nn.Module):
    """like: a size to enlarge to, of an image; by default twice its own."""

    def __init__(self, inputs, outputs, bias):
        super().__init__()
        self.conv = randomise(Conv3x3(inputs, outputs, bias=bias))

    def forward(self, x, like=None):
        return self.conv(ops.upsample_twice(x) if like is None else ops.upsample_nearest(x, like))


@pytest.mark.parametrize("table", [CPU, CPU_COMPACT], ids=["cpu", "compact"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 16), (5, 3), "any"])
def test_a_convolution_of_an_enlarged_image_reads_the_small_one(tmp_path, size, bias, table):
    """By four multiplications in place of nine, and as exact: against float64."""
    module, path = EnlargedConvolution(128, 48, bias), tmp_path / "conv.onnx"
    dynamic = {"x": {0: BATCH, 2: ("height", 2, 64), 3: ("width", 2, 64)}} if size == "any" else {}
    height, width = (8, 16) if size == "any" else size
    export_module(module, {"x": torch.randn(2, 128, height, width)}, dynamic, ["y"], path, table)
    assert kinds(path).count("Conv") == 4
    assert "Resize" not in kinds(path)
    for rows, h, w in ((2, height, width), (1, 5, 2), (3, 2, 9))[: 3 if dynamic else 1]:
        x = torch.randn(rows, 128, h, w)
        got = torch.from_numpy(session(path).run(None, {"x": x.numpy()})[0])
        large = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
        truth = nn.functional.conv2d(large, module.conv.weight.double(), padding=1)
        if bias:
            truth += module.conv.bias.double()[:, None, None]
        assert got.shape == truth.shape
        assert (got - truth).norm() / truth.norm() < 1e-6


@pytest.mark.parametrize("twice", [True, False])
def test_enlarging_to_a_size_reads_the_small_image_only_where_that_is_twice_its_own(tmp_path, twice):
    module, path = EnlargedConvolution(32, 16, True), tmp_path / "conv.onnx"
    size = (10, 14) if twice else (9, 14)
    inputs = {"x": torch.randn(2, 32, 5, 7), "like": torch.randn(1, 4, *size)}
    export_module(module, inputs, {}, ["y"], path)
    assert ("Resize" in kinds(path)) is not twice
    check(path, module, inputs)


class Normalisation(nn.Module):
    def __init__(self, channels, groups, silu):
        super().__init__()
        self.norm = randomise(GroupNorm(channels, groups, 1e-5, silu=silu))

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("channels", "groups"), [(32, 4), (24, 4)])
def test_a_group_norm_scales_in_blocks_where_its_channels_fill_them(tmp_path, channels, groups, silu):
    module, path = Normalisation(channels, groups, silu), tmp_path / "norm.onnx"
    x = {"x": torch.randn(2, channels, 6, 5)}
    export_module(module, x, {"x": {0: BATCH, 2: HEIGHT, 3: WIDTH}}, ["y"], path)
    assert ("Conv" in kinds(path)) is (channels % 16 == 0)
    check(path, module, x)
    check(path, module, {"x": torch.randn(1, channels, 9, 2)})


class TransformerAfterLinear(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.proj_in, self.block = Linear(channels, channels), TransformerBlock(channels, 2, False)

    def forward(self, x, k, v):
        return self.block(self.proj_in(x), iter([[(k, v)]]))


@pytest.mark.parametrize("free", [False, True])
def test_the_rows_of_a_transformer_are_laid_out_as_tokens_only_for_attention(tmp_path, free):
    module, path = randomise(TransformerAfterLinear(32)), tmp_path / "block.onnx"

    def inputs(rows, tokens):
        return {name: torch.randn(rows, n, 32) for name, n in (("x", tokens), ("k", 7), ("v", 7))}

    dynamic = {"x": {0: BATCH, 1: ("tokens", 2, 99)}, "k": {0: BATCH}, "v": {0: BATCH}} if free else {}
    export_module(module, inputs(2, 12), dynamic, ["y"], path)
    # Before and after each of two attentions, and for x as it comes and the result as it leaves.
    assert kinds(path).count("Reshape") == 6
    check(path, module, inputs(2, 12))
    if free:
        check(path, module, inputs(3, 5))


def test_conditioning_of_sdxl(tmp_path):
    _, time_shift, context = unet_modules(SHALLOW_XL)
    inputs = {
        "timesteps": torch.tensor([981.0, 17.25]),
        "text_embeds": torch.randn(2, 40),
        "time_ids": torch.tensor([[1024.0, 768, 0, 32, 1024, 1024], [512, 512, 0, 0, 512, 640]]),
    }
    path = tmp_path / "time_shift.onnx"
    export_module(time_shift, inputs, {n: {0: ("steps", 1, 2000)} for n in inputs}, ["time_shift"], path)
    check(path, time_shift, inputs)
    check(path, time_shift, {name: tensor[:1] for name, tensor in inputs.items()})
    hidden = {"hidden_states": torch.randn(2, 77, 56)}
    path = tmp_path / "context.onnx"
    export_module(context, hidden, {"hidden_states": {0: BATCH}}, ["context"], path)
    check(path, context, {"hidden_states": torch.randn(3, 77, 56)})


def test_conditioning_of_an_lcm_whose_inputs_are_not_all_of_them(tmp_path):
    """It takes the guidance's embedding, which comes last, and no pooled prompt, which would come before."""
    _, time_shift, _ = unet_modules(SHALLOW | {"time_cond_proj_dim": 17})
    inputs = {"timesteps": torch.tensor([981.0, 17.25]), "timestep_cond": torch.randn(2, 17)}
    dynamic, path = {n: {0: ("steps", 1, 2000)} for n in inputs}, tmp_path / "time_shift.onnx"
    export_module(time_shift, inputs, dynamic, ["time_shift"], path)
    check(path, time_shift, inputs)
    program = inductor._trace(time_shift, inputs, dynamic)
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    assert names == list(inputs)  # in which order compiled code is called
    torch.testing.assert_close(program.module()(**inputs), time_shift(**inputs))


@pytest.mark.parametrize("half", [0, 1], ids=["decoder", "encoder"])
def test_vae(tmp_path, half):
    from diffusers import AutoencoderKL

    weights = randomise(AutoencoderKL(**SHALLOW_VAE)).state_dict()
    module = load_vae(VAEConfig.from_diffusers(SHALLOW_VAE), weights)[half]
    name, channels = (("latents", 4), ("image", 3))[half]
    outputs = (["image"], ["mean", "std"])[half]
    dynamic = {name: {0: BATCH, 2: ("height", 8, 64), 3: ("width", 8, 64)}}
    export_module(module, {name: torch.randn(1, channels, 16, 16)}, dynamic, outputs, tmp_path / "vae.onnx")
    for shape in ((1, channels, 8, 16), (2, channels, 16, 8)):
        check(tmp_path / "vae.onnx", module, {name: torch.rand(shape)})


@pytest.mark.parametrize(
    ("projected", "eos", "table"),
    [  # every pair of two
        pytest.param(False, 2, CPU, id="pooled-2-cpu"),
        pytest.param(True, 99, TENSORRT, id="projected-99-tensorrt"),
        pytest.param(False, 99, TENSORRT, id="pooled-99-tensorrt", marks=pytest.mark.slow),
        pytest.param(True, 99, CPU, id="projected-99-cpu", marks=pytest.mark.slow),
        pytest.param(True, 2, TENSORRT, id="projected-2-tensorrt", marks=pytest.mark.slow),
    ],
)
def test_text_encoder(tmp_path, projected, eos, table):
    """eos 2, of old configs: transformers takes the largest id for the end of the prompt."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = kind(
        CLIPTextConfig(**sizes, vocab_size=100, projection_dim=24, bos_token_id=98, eos_token_id=eos)
    )
    module = TextEncoder(randomise(model), final_norm=not projected)
    ids = torch.randint(0, 98, (2, 77))
    ids[0, 9:], ids[1, 30:] = 99, 99
    path = tmp_path / "text_encoder.onnx"
    outputs = ["hidden_states", "pooled"]
    export_module(module, {"input_ids": ids}, {"input_ids": {0: BATCH}}, outputs, path, table)
    for rows in (ids, ids[:1]):
        check(path, module, {"input_ids": rows}, 1e-5)
    with torch.no_grad():
        states, pooled = module(ids)
        theirs = model(ids, output_hidden_states=True)
    assert states.shape == (2, 3, 77, 32)
    last = theirs.last_hidden_state if module.final_norm else theirs.hidden_states[-1]
    assert torch.equal(states[:, -1], last)
    assert torch.equal(pooled, theirs.text_embeds if projected else theirs.pooler_output)


def test_half_precision_keeps_what_must_stay_single(tmp_path):
    """upcast_attention: the scores are computed in float32, all else in float16."""
    unet, _, _ = unet_modules(UPCAST, torch.float16)
    path = tmp_path / "unet.onnx"
    export_module(unet, unet_inputs(unet, 2, 8, 8, torch.float16), {}, ["out"], path)
    graph = onnx.load(path, load_external_data=False).graph
    assert {i.type.tensor_type.elem_type for i in [*graph.input, *graph.output]} == {onnx.TensorProto.FLOAT16}
    attentions = [node for node in graph.node if node.op_type == "MultiHeadAttention"]
    makers = {name: node for node in graph.node for name in node.output}
    assert attentions
    assert all(makers[name].op_type == "Cast" for node in attentions for name in node.input)
    weights = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert weights == {onnx.TensorProto.FLOAT16}
    with torch.no_grad():
        inputs = unet_inputs(unet, 2, 8, 8, torch.float16)
        expected = unet.float()(**{name: tensor.float() for name, tensor in inputs.items()})
    got = torch.from_numpy(session(path).run(None, {n: t.numpy() for n, t in inputs.items()})[0]).float()
    assert (got - expected).norm() / expected.norm() < 5e-3


def overflowing_unet(upcast):
    """Queries and keys of some hundreds, whose products are beyond float16's 65504."""
    unet, _, _ = unet_modules(UPCAST | {"upcast_attention": upcast}, torch.float16)
    attentions = [m for m in unet.modules() if isinstance(m, SelfAttention)]
    assert attentions
    for attention in attentions:
        queries_and_keys = attention.to_qkv.weight.shape[0] // 3 * 2
        attention.to_qkv.weight[:queries_and_keys] *= 400
    return unet


@pytest.mark.parametrize("upcast", [True, False])
def test_scores_beyond_float16_are_no_trouble_upcast(tmp_path, upcast):
    """The graph for TensorRT, where the scores are a tensor, number by number in numpy: without upcast it
    gives no numbers, so that this would show."""
    unet = overflowing_unet(upcast)
    inputs, path = unet_inputs(unet, 2, 8, 8, torch.float16), tmp_path / "unet.onnx"
    export_module(unet, inputs, {}, ["out"], path, TENSORRT)
    with np.errstate(over="ignore", invalid="ignore"):
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        (got,) = ReferenceEvaluator(onnx.load(path), new_ops=OPERATORS).run(None, feeds)
    assert np.isfinite(got).all() == upcast
    if upcast:
        assert torch.isfinite(unet(**inputs)).all()


def test_a_module_that_cannot_be_traced_is_an_export_error(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branches cannot be exported"):
        export_module(Branches(), {"x": torch.ones(2)}, {}, ["y"], tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_dynamic_axes_of_an_unknown_input_are_refused(tmp_path):
    with pytest.raises(ExportError, match="'z'"):
        export_module(nn.Identity(), {"x": torch.ones(2)}, {"z": {0: BATCH}}, ["y"], tmp_path / "m.onnx")


def test_a_folder_that_is_not_there_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="cannot write"):
        inputs = {"input": torch.ones(2, 64)}
        export_module(nn.Linear(64, 64), inputs, {}, ["y"], tmp_path / "none" / "m.onnx")


@pytest.mark.parametrize(
    "config", [pytest.param(SHALLOW_XL, marks=pytest.mark.slow, id="sdxl"), pytest.param(UPCAST, id="upcast")]
)
def test_graphs_for_tensorrt_are_of_standard_operators(tmp_path, config):
    unet, _, _ = unet_modules(config)
    path, inputs = tmp_path / "unet.onnx", unet_inputs(unet, 2, 8, 12)
    dynamic = {name: {0: BATCH} for name in inputs}
    export_module(unet, inputs, dynamic, ["model_output"], path, TENSORRT)
    assert {node.domain for node in onnx.load(path, load_external_data=False).graph.node} == {""}
    check(path, unet, inputs)
    check(path, unet, unet_inputs(unet, 3, 8, 12))


def test_graphs_for_tensorrt_upcast_the_scores_alone(tmp_path):
    unet, _, _ = unet_modules(UPCAST, torch.float16)
    path = tmp_path / "unet.onnx"
    export_module(unet, unet_inputs(unet, 2, 8, 8, torch.float16), {}, ["out"], path, TENSORRT)
    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert len(casts) == 4 * len(softmaxes) > 0
    inputs = unet_inputs(unet, 2, 8, 8, torch.float16)
    with torch.no_grad():
        expected = unet.float()(**{name: tensor.float() for name, tensor in inputs.items()})
    got = torch.from_numpy(session(path).run(None, {n: t.numpy() for n, t in inputs.items()})[0]).float()
    assert (got - expected).norm() / expected.norm() < 5e-3
    assert {makers[node.input[0]] for node in softmaxes} == {"MatMul"}
