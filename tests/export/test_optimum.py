"""Engines of graphs that optimum exported: the pictures of stock diffusers, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import onnx
import pytest
import torch
from click.testing import CliRunner

from sdfast.backends.onnx import OnnxRuntime
from sdfast.cli import main
from sdfast.engine import Engine
from sdfast.errors import CheckpointError, EngineError, ExportError, RequestError
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.graphs import Graphs, compile_graph
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.manifest import Span, read_manifest
from sdfast.pipeline import Pipeline
from sdfast.validation import validate
from sdfast.validation.metrics import psnr
from sdfast.validation.reference import reference_pipeline
from tests import checkpoints
from tests.export.optimum_folder import write_optimum_folder, write_unet

PROMPTS = ["a cabin in the mountain", "a boat"]


SHALLOW: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
"""Attention is in the middle alone: what is changed of a graph are its ends."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build_sd(tmp_path_factory.mktemp("few-layers") / "sd", text_layers=1, **SHALLOW)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """optimum's folder of that checkpoint: copy it before changing it."""
    return write_optimum_folder(checkpoint, tmp_path_factory.mktemp("optimum") / "sd")


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(folder, tmp_path_factory.mktemp("engines") / "sd", Recipe.make())


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def pictures_alike(engine: Path, checkpoint: Path, **call: Any) -> float:
    """The PSNR of the worst of two pictures, with a scheduler whose timesteps are not whole."""
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(checkpoint)
    stock.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        stock.scheduler.config, use_karras_sigmas=True
    )
    ours = Pipeline.from_engine(engine)
    ours.scheduler = stock.scheduler
    images = []
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        images.append(pipe(PROMPTS, num_inference_steps=3, generator=seeds, output_type="pt", **call).images)
    return min(psnr(image.float(), truth.float()) for image, truth in zip(images[1], images[0], strict=True))


def test_pictures_are_those_of_stock_diffusers(engine: Path, checkpoint: Path) -> None:
    assert pictures_alike(engine, checkpoint, guidance_scale=7.0) > 100
    assert pictures_alike(engine, checkpoint, guidance_scale=1.0, height=32, width=80) > 100  # any size


@pytest.mark.slow
def test_sdxl_too(tmp_path: Path) -> None:
    tiny_sdxl = checkpoints.build_sdxl(tmp_path / "sdxl", transformer_layers_per_block=1, **SHALLOW)
    folder = write_optimum_folder(tiny_sdxl, tmp_path / "folder")
    engine = export(folder, tmp_path / "engine", Recipe.make())
    assert pictures_alike(engine, tiny_sdxl, guidance_scale=7.0, original_size=(96, 64)) > 100
    assert pictures_alike(engine, tiny_sdxl, guidance_scale=7.0, clip_skip=1) > 100  # every layer is there
    assert read_manifest(engine).model.zero_empty_negative


def test_each_row_has_a_timestep_of_its_own(engine: Path, checkpoint: Path) -> None:
    opened, unet = (
        Engine.open(engine),
        diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet"),
    )
    generator, times = torch.Generator().manual_seed(0), torch.tensor([811.5, 20.0, 500.0])
    sample = torch.randn(3, 4, 8, 8, generator=generator)
    hidden = torch.randn(3, 77, 32, generator=generator)
    shift = opened.call("time_shift", {"timesteps": times})["time_shift"]
    context = opened.call("context", {"hidden_states": hidden})["context"]
    inputs = {"sample": sample, "time_shift": shift, "context": context}
    output = opened.call("unet", inputs, 64, 64)["output"]
    with torch.no_grad():
        truth = torch.cat([unet(sample[i : i + 1], times[i], hidden[i : i + 1]).sample for i in range(3)])
    assert (output - truth).norm() / truth.norm() < 1e-5


def test_an_lcm_is_told_the_guidance(own: Path, tmp_path: Path) -> None:
    """Its `timestep_cond`, beside the timestep in the row."""
    config = {**json.loads((own / "unet" / "config.json").read_text()), "time_cond_proj_dim": 16}
    (own / "unet" / "config.json").write_text(json.dumps(config))
    unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    write_unet(unet, own)
    graphs = Graphs.of(resolve(own))
    specs = {spec.name: spec for spec in graphs.specs(Recipe.make())}
    runtime = OnnxRuntime(torch.device("cpu"))
    modules = {}
    for name in ("unet", "time_shift"):
        [variant, *_] = compile_graph(specs[name], tmp_path)
        modules[name] = runtime.load(tmp_path / variant.file)
    generator = torch.Generator().manual_seed(0)
    sample, hidden = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (77, 32)))
    times, told = torch.tensor([700.0, 30.0]), torch.randn(2, 16, generator=generator)
    shift = modules["time_shift"]({"timesteps": times, "timestep_cond": told})["time_shift"]
    output = modules["unet"]({"sample": sample, "time_shift": shift, "context": hidden})["output"]
    with torch.no_grad():
        truth = unet(sample, times, hidden, timestep_cond=told).sample
    assert (output - truth).norm() / truth.norm() < 1e-5
    model = graphs.model()
    assert (model.guidance_embedding, model.time_shift_width) == (16, 17)


def test_the_engine_says_what_it_is_made_of(engine: Path, folder: Path, checkpoint: Path) -> None:
    manifest = read_manifest(engine)
    assert manifest.checkpoint.graphs == "optimum" and manifest.checkpoint.source == str(folder)
    assert "unet/model.onnx_data" in manifest.checkpoint.weights
    shown = CliRunner().invoke(main, ["info", str(engine)])
    assert "graphs       optimum's" in shown.output
    assert export(folder, engine, Recipe.make()) == engine  # nothing changed
    assert read_manifest(engine).created == manifest.created
    with pytest.raises(RequestError, match="multiples of 16"):
        manifest.check_size(72, 64)
    manifest.check_size(48, 64)


def test_validation_needs_the_checkpoint_by_name(
    engine: Path, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="with --checkpoint"):
        validate(engine)
    with pytest.raises(CheckpointError, match="holds graphs that optimum exported"):
        validate(engine, checkpoint=folder)
    own = Path(shutil.copytree(engine, tmp_path / "engine"))
    report = validate(own, checkpoint=checkpoint, prompts=["a boat"], steps=2, scheduler="euler")
    assert report.passed, report.table()
    names = {module.name for module in report.modules}
    assert {"step", "text_encoder.hidden_states", "vae_decoder", "vae_encoder"} <= names
    assert not names & {"unet", "context", "time_shift"}
    assert any("optimum" in note for note in report.notes)

    other = checkpoints.build_sd(tmp_path / "other", seed=1)
    wrong = validate(own, checkpoint=other, prompts=["a boat"], steps=2, scheduler="euler")
    assert {"step", "text_encoder.hidden_states", "picture"} <= {failure.part for failure in wrong.failures}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"backend": "eager"}, "backend: .* holds graphs .* export the checkpoint itself"),
        ({"backend": "inductor"}, "backend: "),
        ({"loras": ["some.safetensors"]}, "loras: .* LoRAs are merged into weights"),
        (
            {"embeddings": ["some.safetensors"]},
            "embeddings: .* export the checkpoint itself, or leave it out",
        ),
        ({"controlnet": "org/canny"}, "controlnet: .* U-Net"),
        ({"backend": "eager", "dtype": "fp16", "fp8": True}, "backend: "),
        ({"int8": True}, "int8: .* networks of sdfast's own"),
        ({"cache_branch": 0}, "cache_branch: .* shallow steps"),
        ({"dtype": "fp16"}, "dtype: .* for fp16"),
        ({"provider": "tensorrt"}, "provider: .* cpu or cuda"),
        ({"sizes": ("72x64",)}, "sizes: 72x64: .* multiples of 16"),
    ],
)
def test_what_graphs_cannot_have_is_refused_by_name(
    folder: Path, tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        export(folder, tmp_path / "engine", Recipe.make(**asked))
    assert not (tmp_path / "engine").exists()


def test_only_exports_take_graphs(folder: Path) -> None:
    found = resolve(folder)
    for take in (Networks.of, reference_pipeline):
        with pytest.raises(CheckpointError, match="give the checkpoint that they were exported from"):
            take(found)
    with pytest.raises(CheckpointError, match="leave variant out"):
        resolve(folder, variant="fp16")


def test_weights_beside_graphs_are_what_is_exported(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(checkpoint, tmp_path / "both"))
    shutil.copy(folder / "unet" / "model.onnx", both / "unet")
    assert not resolve(both).graphs and resolve(folder).graphs


def test_fixed_axes_are_the_engines(folder: Path, own: Path, checkpoint: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    write_unet(unet, own, axes={"sample": {0: "batch_size"}, "encoder_hidden_states": {0: "batch_size"}})
    graphs = Graphs.of(resolve(own))
    [form] = graphs.specs(Recipe.make())[0].forms
    assert (form.height, form.width, form.tokens.high) == (Span.exactly(64), Span.exactly(64), 77)
    assert form.batch == Span(low=1, high=8)
    with pytest.raises(ExportError, match="exported for 64x64 alone, not for 128x64"):
        graphs.specs(Recipe.make(sizes=("128x64",)))
    forms = Graphs.of(resolve(folder)).specs(Recipe.make(sizes=("128x64", "64x64"), batch=2))[0].forms
    assert [(f.width, f.height, f.batch.high) for f in forms] == [
        (Span.exactly(128), Span.exactly(64), 4),
        (Span.exactly(64), Span.exactly(64), 4),
    ]


Change = Callable[[onnx.ModelProto], None]


def changed(folder: Path, name: str, change: Change) -> Path:
    path = folder / name / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return folder


def first_outside(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def placed(key: str, value: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = first_outside(model)
        kept = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
        del tensor.external_data[:]
        for name, text in kept.items():
            tensor.external_data.add(key=name, value=text)

    return change


@pytest.mark.parametrize("location", ["../unet/model.onnx_data", "/etc/passwd", "a/b", "..", "", "a\\b", "."])
def test_weights_that_lie_elsewhere_are_refused(own: Path, location: str) -> None:
    changed(own, "unet", placed("location", location))
    with pytest.raises(CheckpointError, match=r"do not trust this folder|is not a file"):
        resolve(own)


def test_links_out_of_the_folder_are_refused(own: Path, tmp_path: Path) -> None:
    data = own / "unet" / "model.onnx_data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        resolve(own)
    data.unlink()
    (tmp_path / "elsewhere").rename(data)
    model = own / "vae_decoder" / "model.onnx"
    model.rename(tmp_path / "graph")
    model.symlink_to(tmp_path / "graph")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        resolve(own)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-4"), ("offset", "1000000000"), ("length", "4"), ("length", "x")]
)
def test_weights_beyond_their_file_are_refused(own: Path, key: str, value: str) -> None:
    changed(own, "unet", placed(key, value))
    with pytest.raises(CheckpointError, match=r"is damaged|cannot be read"):
        resolve(own)


def test_a_truncated_file_of_weights_is_refused(own: Path) -> None:
    data = own / "unet" / "model.onnx_data"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="is damaged"):
        resolve(own)


def test_what_is_no_graph_is_refused(own: Path) -> None:
    (own / "text_encoder" / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"text_encoder/model\.onnx is not an ONNX file"):
        resolve(own)


def foreign(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="evil.ops", version=1)


def old(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 11


def whole_steps(model: onnx.ModelProto) -> None:
    [timestep] = [value for value in model.graph.input if value.name == "timestep"]
    timestep.type.tensor_type.elem_type = onnx.TensorProto.INT64


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("down_block_0", onnx.TensorProto.FLOAT, [1]))


def two_readers(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Sin", ["timestep"], ["unheard"]))


def other_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "noise"
    for node in model.graph.node:
        node.output[:] = [
            "noise" if name in ("out_sample", "latent_parameters") else name for name in node.output
        ]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("unet", foreign, "operations of 'evil.ops'"),
        ("unet", old, "opset 11; export it again"),
        ("unet", whole_steps, "takes timestep as INT64"),
        ("unet", another_input, "takes down_block_0, "),
        ("unet", two_readers, "does not spread its timestep over the rows"),
        ("unet", other_name, "gives noise, and no out_sample"),
        ("vae_encoder", other_name, "gives latents that it draws by itself"),
    ],
)
def test_graphs_of_another_kind_are_refused(
    own: Path, tmp_path: Path, name: str, change: Change, said: str
) -> None:
    changed(own, name, change)
    with pytest.raises(CheckpointError, match=said):
        export(own, tmp_path / "engine", Recipe.make())
    assert not (tmp_path / "engine").exists()


def test_a_folder_without_an_encoder_takes_no_images(own: Path, tmp_path: Path) -> None:
    shutil.rmtree(own / "vae_encoder")
    manifest = read_manifest(export(own, tmp_path / "engine", Recipe.make()))
    assert not manifest.edits


def test_code_in_the_folder_is_refused(own: Path) -> None:
    index = json.loads((own / "model_index.json").read_text())
    (own / "model_index.json").write_text(json.dumps({**index, "unet": ["my_module", "MyUNet"]}))
    with pytest.raises(CheckpointError, match="sdfast runs no code from a checkpoint"):
        resolve(own)
