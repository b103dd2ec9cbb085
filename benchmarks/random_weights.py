"""Checkpoints with the real architectures and random weights: the cost of the real thing without its weights.

python -m benchmarks.random_weights sd15 /tmp/sd15
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import click
import torch

from sdfast.export.single_file import write_clip_vocabulary

ARCHITECTURES = ("sd15", "sd21", "sdxl")


def build(name: str, folder: Path) -> Path:
    """A diffusers folder of architecture `name` ("sd15", "sd21", "sdxl") with random float32 weights.

    Built once: a folder that is complete is kept.
    """
    if (folder / "model_index.json").exists():
        return folder
    text = (resources.files("sdfast.export") / "stock" / f"{name}.json").read_text("utf-8")
    configs: dict[str, Any] = json.loads(text)
    index = configs.pop("model_index.json")
    for file, config in configs.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        if path.parent.name.startswith("tokenizer"):
            write_clip_vocabulary(path.parent)
        elif path.name == "config.json":
            _save(index[path.parent.name], config, path.parent)
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder


def _save(entry: list[str], config: dict[str, Any], folder: Path) -> None:
    """One component with random weights, saved as safetensors."""
    torch.manual_seed(0)
    library, class_name = entry
    if library == "transformers":
        import transformers

        cls = getattr(transformers, class_name)
        model = cls(transformers.CLIPTextConfig(**config))
    else:
        import diffusers

        model = getattr(diffusers, class_name).from_config(config)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="10GB")


@click.command()
@click.argument("name", type=click.Choice(ARCHITECTURES))
@click.argument("folder", type=click.Path(path_type=Path))
def main(name: str, folder: Path) -> None:
    """Write a checkpoint of architecture NAME with random weights to FOLDER."""
    click.echo(build(name, folder))


if __name__ == "__main__":
    main()
