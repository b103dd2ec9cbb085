"""Folders as `optimum-cli export onnx` writes them: stock diffusers' modules by torch's exporter, with
optimum's names of inputs, outputs and axes. Optimum itself needs versions that exclude those of the tests."""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import onnx
import torch
from torch import Tensor, nn

IMAGE = {0: "batch_size", 2: "height", 3: "width"}
OWN_NAMES = {"StableDiffusionPipeline": "ORT", "StableDiffusionXLPipeline": "ORT"}


class Text(nn.Module):
    """SDXL's encoders give every layer."""

    def __init__(self, model: Any, every_layer: bool) -> None:
        super().__init__()
        self.model, self.every_layer = model, every_layer

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids, output_hidden_states=self.every_layer)
        layers = output.hidden_states[:-1] if self.every_layer else ()
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return (output.last_hidden_state, pooled, *layers)


class Unet(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        output: Tensor = self.model(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, added_cond_kwargs=added
        ).sample
        return output


class Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        output: Tensor = self.vae.decode(latent_sample).sample
        return output


class Encoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        output: Tensor = self.vae.encode(sample).latent_dist.parameters
        return output


def write_optimum_folder(checkpoint: Path, folder: Path) -> Path:
    """What optimum makes of a checkpoint."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint)
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["_class_name"] = f"ORT{index['_class_name']}"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        if (checkpoint / name).exists():
            shutil.copytree(checkpoint / name, folder / name)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            _write_text(getattr(pipe, name), hasattr(pipe, "text_encoder_2"), checkpoint, folder / name)
    write_unet(pipe.unet, folder)
    _configure(checkpoint / "unet", folder / "unet", "ORTUnet")
    channels = pipe.vae.config.latent_channels
    halves: dict[str, tuple[nn.Module, dict[str, Tensor], str]] = {
        "vae_decoder": (Decoder(pipe.vae), {"latent_sample": torch.randn(1, channels, 8, 8)}, "sample"),
        "vae_encoder": (Encoder(pipe.vae), {"sample": torch.randn(1, 3, 16, 16)}, "latent_parameters"),
    }
    for name, (module, inputs, output) in halves.items():
        write_graph(module, inputs, [output], dict.fromkeys(inputs, IMAGE), folder / name)
        _configure(checkpoint / "vae", folder / name, "ORTVaeDecoder")
    return folder


def write_unet(unet: Any, folder: Path, axes: Mapping[str, Mapping[int, str]] | None = None) -> None:
    """The U-Net's graph. axes: those that are free. [default: all that optimum leaves free]"""
    config = unet.config
    inputs = {
        "sample": torch.randn(2, config.in_channels, 8, 8),
        "timestep": torch.tensor(3.0),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim),
    }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim)
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.randn(2, pooled), "time_ids": torch.rand(2, 6)}
    free: dict[str, Mapping[int, str]] = {name: {0: "batch_size"} for name in inputs if name != "timestep"}
    free |= {"sample": IMAGE, "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"}}
    write_graph(Unet(unet), inputs, ["out_sample"], free if axes is None else axes, folder / "unet")


def _write_text(model: Any, every_layer: bool, checkpoint: Path, folder: Path) -> None:
    model.set_attn_implementation("eager")
    pooled = "text_embeds" if hasattr(model, "text_projection") else "pooler_output"
    layers = [f"hidden_states.{i}" for i in range(model.config.num_hidden_layers)] if every_layer else []
    ids = {"input_ids": torch.ones(1, 77, dtype=torch.int64)}
    axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
    write_graph(Text(model, every_layer), ids, ["last_hidden_state", pooled, *layers], axes, folder)
    _configure(checkpoint / folder.name, folder, "ORTTextEncoder")


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    folder: Path,
) -> None:
    """`folder/model.onnx`, its weights beside it where they are many, as optimum's."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of constants in traces, and of an exporter that torch is to drop
        torch.onnx.export(
            module.eval(),
            kwargs=dict(inputs),
            f=str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(free) for name, free in axes.items()},
            opset_version=18,
            dynamo=False,
        )
    if folder.name == "unet":
        onnx.save_model(
            onnx.load(str(path)), str(path), save_as_external_data=True, location="model.onnx_data"
        )


def _configure(source: Path, folder: Path, class_name: str) -> None:
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": class_name}))
