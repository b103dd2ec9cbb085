"""Checkpoints with the real architectures and random weights: the cost of the real thing without its weights.

python -m benchmarks.random_weights sd15 /tmp/sd15

`tiny` and `tiny-xl` are SD 1.5 and SDXL with fewer and narrower layers, for dry runs: pictures of 64x64.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import click
import torch

from sdfast.export.single_file import write_clip_vocabulary

ARCHITECTURES = ("sd15", "sd21", "sdxl")

_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
_TINY_VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 8}
# The real architecture that each is a small one of, and what of its configs is replaced.
_SMALL: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "tiny": (
        "sd15",
        {
            "unet": {**_TINY_UNET, "cross_attention_dim": 32, "attention_head_dim": 2},
            "vae": _TINY_VAE,
            "text_encoder": {**_TINY_TEXT, "projection_dim": 32},
        },
    ),
    "tiny-xl": (
        "sdxl",
        {
            "unet": {
                **_TINY_UNET,
                "cross_attention_dim": 32 + 48,
                "attention_head_dim": [2, 4],
                "transformer_layers_per_block": [1, 2],
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 48 + 6 * 8,
            },
            "vae": _TINY_VAE,
            "text_encoder": {**_TINY_TEXT, "projection_dim": 32},
            "text_encoder_2": {
                **_TINY_TEXT,
                "hidden_size": 48,
                "intermediate_size": 96,
                "projection_dim": 48,
            },
        },
    ),
}
SMALL = tuple(_SMALL)


def configs(name: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a checkpoint of architecture `name`, by their paths in its folder."""
    real, replaced = _SMALL.get(name, (name, {}))
    text = (resources.files("sdfast.export") / "stock" / f"{real}.json").read_text("utf-8")
    files: dict[str, dict[str, Any]] = json.loads(text)
    for component, fields in replaced.items():
        files[f"{component}/config.json"].update(fields)
    return files


def build(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Path:
    """A diffusers folder of architecture `name` with random weights, drawn on `device`, stored in `dtype`.

    Built once: a folder that is complete is kept.
    """
    if (folder / "model_index.json").exists():
        return folder
    files = configs(name)
    index = files.pop("model_index.json")
    for file, config in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        if path.parent.name.startswith("tokenizer"):
            write_clip_vocabulary(path.parent)
        elif path.name == "config.json":
            _save(index[path.parent.name], config, path.parent, dtype, device)
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder


def _save(
    entry: list[str], config: dict[str, Any], folder: Path, dtype: torch.dtype, device: str | torch.device
) -> None:
    """One component with random weights, saved as safetensors."""
    torch.manual_seed(0)
    library, class_name = entry
    with torch.device(device):
        if library == "transformers":
            import transformers

            cls = getattr(transformers, class_name)
            model = cls(transformers.CLIPTextConfig(**config))
        else:
            import diffusers

            model = getattr(diffusers, class_name).from_config(config)
    if class_name == "UNet2DConditionModel":
        _as_loud_as_trained(model)
    model.to(dtype).save_pretrained(folder, safe_serialization=True, max_shard_size="10GB")


@torch.no_grad()
def _as_loud_as_trained(unet: Any) -> None:
    """Give the output unit variance, which is that of the noise that a trained U-Net predicts.

    torch draws the weights of a layer with n inputs with variance 1/(3 n); SiLU leaves a mean square of 0.356
    of the normalised values before the last layer, which thus gives 0.356/3.
    """
    unet.conv_out.weight.mul_((3 / 0.356) ** 0.5)


@click.command()
@click.argument("name", type=click.Choice([*ARCHITECTURES, *SMALL]))
@click.argument("folder", type=click.Path(path_type=Path))
def main(name: str, folder: Path) -> None:
    """Write a checkpoint of architecture NAME with random weights to FOLDER."""
    click.echo(build(name, folder))


if __name__ == "__main__":
    main()
