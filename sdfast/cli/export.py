"""`sdfast export` and `sdfast rebuild`."""

from pathlib import Path
from typing import Any

import click

from sdfast.cli.pairs import embedding, ip_adapter, lora, lora_on_request
from sdfast.cli.stages import Stages


@click.command()
@click.argument("source", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The engine's directory.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A recipe, such as export/sd15.toml.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--variant", help='Weights variant, such as "fp16".')
@click.option("--backend", type=click.Choice(["onnx", "inductor", "eager"]), help="[default: onnx]")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), help="[default: fp32]")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    help="What ONNX graphs are for. [default: cpu in fp32, cuda in fp16]",
)
@click.option("--height", type=int, help="Pixels. [default: the checkpoint's own]")
@click.option("--width", type=int, help="Pixels. [default: the checkpoint's own]")
@click.option("--batch", type=int, help="The most pictures of one call. [default: 4]")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="What inductor compiles for. [default: cuda for fp16, else cpu]",
)
@click.option("--autotune/--no-autotune", default=None, help="Inductor: time candidates. [default: on CUDA]")
@click.option(
    "--kernels",
    type=click.Choice(["auto", "compiler"]),
    help="Inductor on CUDA: sdfast's own where faster, or none. [default: auto]",
)
@click.option(
    "--winograd/--no-winograd", default=None, help="ONNX on the CPU: fast 3x3 convolutions. [default: yes]"
)
@click.option("--fp8", is_flag=True, default=None, help="Layers of the U-Net in FP8: an approximation.")
@click.option(
    "--int8", is_flag=True, default=None, help="ONNX on the CPU: linear layers in INT8: an approximation."
)
@click.option(
    "--long-prompts",
    is_flag=True,
    default=None,
    help="Inductor: compile for prompts over 75 tokens too; other backends take them anyway.",
)
@click.option(
    "--vae",
    metavar="SOURCE",
    help="Take this VAE in the place of the checkpoint's own, a tiny one (TAESD) too: a folder, a "
    ".safetensors file, or a Hub id.",
)
@click.option(
    "--vae-dtype",
    type=click.Choice(["auto", "fp32"]),
    help="Of fp16 engines. [default: auto, fp16 where its numbers can be made to fit]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="SOURCE[=SCALE]",
    help="Merge a LoRA into the weights: a .safetensors file, a folder, or a Hub id. Repeatable: several add "
    "up, in place of the recipe's. [default scale: 1]",
)
@click.option(
    "--lora-on-request",
    "on_request",
    multiple=True,
    metavar="SOURCE[=NAME]",
    help="Put a LoRA beside the weights, of which each request says how much is added. Repeatable. "
    "[default name: its file's]",
)
@click.option(
    "--controlnet",
    multiple=True,
    metavar="SOURCE",
    help="Put a ControlNet beside the U-Net: a folder, a .safetensors file, or a Hub id. Repeatable, in "
    "place of the recipe's: several add up.",
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="SOURCE[=TOKEN]",
    help="Give prompts a token for a textual inversion: a .safetensors file, a folder, or a Hub id. "
    "Repeatable, in place of the recipe's. [default token: what the file says, else its name]",
)
@click.option(
    "--ip-adapter",
    "ip_adapters",
    multiple=True,
    metavar="SOURCE[=FILE]",
    help="Let images be told beside the prompt by an IP-Adapter: a .safetensors file; or FILE in a folder or "
    "of a Hub id, h94/IP-Adapter=models/ip-adapter_sd15.safetensors. Repeatable, in place of the recipe's.",
)
@click.option(
    "--image-encoder",
    metavar="FOLDER",
    help="What IP-Adapters see images with, here or in the first one's repository. [default: the "
    "checkpoint's own, or image_encoder beside the first one's file]",
)
@click.option(
    "--cache-branch",
    type=int,
    help="Make shallow steps too, for --cache-interval: an approximation. 0 is the usual branch.",
)
@click.option(
    "--pag",
    multiple=True,
    metavar="LAYER",
    help="For --pag-scale: let the self-attention layers in whose names this is found be perturbed, as "
    "diffusers does; mid is usual. Repeatable, in place of the recipe's.",
)
def export(
    source: str | None,
    output: Path | None,
    recipe: Path | None,
    height: int | None,
    width: int | None,
    loras: tuple[str, ...],
    on_request: tuple[str, ...],
    controlnet: tuple[str, ...],
    embeddings: tuple[str, ...],
    ip_adapters: tuple[str, ...],
    pag: tuple[str, ...],
    **fields: Any,
) -> None:
    """Build an engine of SOURCE: a Hub id, a diffusers folder, a .safetensors file, or "landscapes". A folder
    of `optimum-cli export onnx` is one too.

    The scale of a LoRA is the number after the last "=". A source that itself ends so, such as a file named
    "a=2", needs one: "a=2=1". Likewise the token of an embedding, the name of a LoRA for requests, and the
    file of an IP-Adapter, is what follows the last "=".
    """
    from sdfast.export.build import export as build
    from sdfast.export.recipe import Recipe

    given = {name: value for name, value in fields.items() if value is not None}
    if controlnet:
        given["controlnet"] = controlnet
    if pag:
        given["pag"] = pag
    if loras or on_request:
        given["loras"] = [*map(lora, loras), *map(lora_on_request, on_request)]
    if embeddings:
        given["embeddings"] = [embedding(text) for text in embeddings]
    if ip_adapters:
        given["ip_adapters"] = [ip_adapter(text) for text in ip_adapters]
    if (height is None) != (width is None):
        raise click.UsageError("give --height and --width together")
    if height is not None:
        given["sizes"] = (f"{width}x{height}",)
    chosen = Recipe.read(recipe, **given) if recipe else Recipe.make(**given)
    target = output or Path("engines") / engine_name(source, recipe)
    folder = build(source, target, chosen, progress=Stages())
    click.echo(f"engine: {folder}")


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="Where its checkpoint lies now. [default: where it lay]")
def rebuild(engine: Path, checkpoint: str | None) -> None:
    """Export ENGINE again from its own recipe, for this machine and these versions."""
    from sdfast.export.build import export as build
    from sdfast.export.recipe import Recipe
    from sdfast.manifest import read_manifest

    made = read_manifest(engine)
    folder = build(
        checkpoint or made.checkpoint.source, engine, Recipe.recorded(made.recipe), progress=Stages()
    )
    click.echo(f"engine: {folder}")


def engine_name(source: str | None, recipe: Path | None) -> str:
    """What an engine is called: like its recipe, or else its source."""
    if recipe is not None:
        return recipe.stem
    if source is None:
        raise click.UsageError("give SOURCE or --recipe")
    from sdfast.export.checkpoint import name_of

    return name_of(source)
