"""`sdfast generate`."""

from pathlib import Path
from typing import Any

import click

from sdfast.cli.options import ATTENTION, CONTROL_MODES, UPSCALERS
from sdfast.cli.pairs import scaled


@click.command()
@click.argument("prompt")
@click.option("--engine", type=click.Path(path_type=Path), help="The engine's directory.")
@click.option("--checkpoint", help="Instead, with --backend diffusers: what `sdfast export` takes.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), help="With --checkpoint. [default: fp32]")
@click.option("--negative", help="What the picture should not show.")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--guidance", type=float, default=7.0, show_default=True)
@click.option(
    "--guidance-start", type=float, default=0.0, help="The share of the steps before guidance begins."
)
@click.option("--guidance-end", type=float, default=1.0, help="That at which it ends; the rest costs half.")
@click.option(
    "--cache-interval",
    type=int,
    default=1,
    help="Whole evaluations of the U-Net: one in so many. For engines with a --cache-branch.",
)
@click.option(
    "--pag-scale",
    type=float,
    default=0.0,
    help="Perturbed-attention guidance, such as 3: one evaluation more a step. For engines with --pag.",
)
@click.option(
    "--pag-adaptive-scale", type=float, default=0.0, help="How much less of it for each timestep below 1000."
)
@click.option("--scheduler", default="dpmpp_2m_karras", show_default=True, help="See `sdfast schedulers`.")
@click.option("--seed", type=int, help="Picture i gets seed + i. [default: random]")
@click.option("--variation-seed", type=int, help="Picture i varies towards this seed + i. [default: random]")
@click.option(
    "--variation-strength",
    type=float,
    default=0.0,
    help="How far the first noise is turned to the variation seed's, 0 to 1. All pictures then have --seed.",
)
@click.option(
    "--seed-resize-from",
    metavar="SIZE",
    help="The WIDTHxHEIGHT at which the seed gave a picture that this one is to be like.",
)
@click.option("--size", help="WIDTHxHEIGHT in pixels. [default: the image's, or the engine's own]")
@click.option("--count", type=int, default=1, show_default=True, help="How many pictures.")
@click.option("--clip-skip", type=int, help="Text layers to leave out, as diffusers counts them.")
@click.option(
    "--long-prompts",
    type=click.Choice(["truncate", "chunk"]),
    default="truncate",
    show_default=True,
    help="What becomes of prompts over 75 tokens: cut, or read 75 at a time.",
)
@click.option(
    "--emphasis",
    type=click.Choice(["original", "no_norm", "ignore"]),
    help="(words:1.3) count more, as AUTOMATIC1111's option of that name says. [default: brackets are text]",
)
@click.option(
    "--prompt-editing",
    is_flag=True,
    help="[from:to:when] and [this|that] change the prompt between steps, as AUTOMATIC1111 reads them.",
)
@click.option("--image", type=click.Path(path_type=Path), help="Draw over this PNG, JPEG or WebP.")
@click.option("--mask", type=click.Path(path_type=Path), help="Of it, draw anew only what is white here.")
@click.option(
    "--mask-padding",
    type=int,
    metavar="PIXELS",
    help="Of it, draw nothing but that and so many pixels around, at --size, and paste it in.",
)
@click.option("--strength", type=float, help="The share of the steps that is done. [default: diffusers']")
@click.option(
    "--image-guidance", type=float, help="For InstructPix2Pix: how much --image guides. [default: 1.5]"
)
@click.option(
    "--denoising-start", type=float, help="Take over --image at this share of the denoising, adding no noise."
)
@click.option("--denoising-end", type=float, help="Leave the picture, noisy still, at this share of it.")
@click.option("--refiner", type=click.Path(path_type=Path), help="A second engine, which finishes pictures.")
@click.option("--refiner-switch-at", type=float, help="The share of the denoising before it. [default: 0.8]")
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    multiple=True,
    help="For a ControlNet: the control image. Repeatable, in the order of the engine's ControlNets; "
    '"none" for one that is to add nothing.',
)
@click.option(
    "--control-scale",
    type=float,
    multiple=True,
    help="How much of the ControlNet is added; once for all, or for each. [default: 1]",
)
@click.option(
    "--control-start", type=float, multiple=True, help="From this share of the steps on. [default: 0]"
)
@click.option("--control-end", type=float, multiple=True, help="To this share of the steps. [default: 1]")
@click.option(
    "--control-mode",
    type=click.Choice(CONTROL_MODES),
    multiple=True,
    help="What counts for more, the prompt or the ControlNet; once for all, or for each. guess is diffusers' "
    "guess_mode. [default: balanced]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="NAME[=SCALE]",
    help="Add a LoRA that the engine was exported with for requests. Repeatable. [default scale: 1]",
)
@click.option(
    "--ip-adapter-image",
    type=click.Path(path_type=Path),
    multiple=True,
    help="For an IP-Adapter: the image to be told of. Repeatable, in the order of the engine's IP-Adapters; "
    '"none" for one that is to add nothing.',
)
@click.option(
    "--ip-adapter-scale",
    multiple=True,
    help="How much it counts: a number, or by layers as JSON, as diffusers has it; once for all, or for each."
    " [default: 1]",
)
@click.option("--hires", metavar="SIZE", help="Draw over the picture once more at this WIDTHxHEIGHT.")
@click.option(
    "--hires-upscaler",
    type=click.Choice(UPSCALERS),
    default="latent",
    show_default=True,
    help="What enlarges its latents, or the picture itself, before that.",
)
@click.option(
    "--hires-strength", type=float, default=0.75, show_default=True, help="How far it is drawn anew."
)
@click.option("--hires-steps", type=int, help="Of the second pass. [default: as many as --steps]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A PNG file, or a directory.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@click.option("--device", help='"cpu", "cuda" or "cuda:N". [default: what the engine is for]')
@click.option(
    "--backend",
    type=click.Choice(["engine", "onnx", "inductor", "eager", "diffusers"]),
    default="engine",
    show_default=True,
    help="What the engine must be; or the stock pipeline.",
)
@click.option("--compile", is_flag=True, help="For eager engines: draw through torch.compile.")
@click.option("--attention", type=click.Choice(ATTENTION), help="For eager engines and diffusers.")
def generate(
    prompt: str, output: Path | None, overwrite: bool, loras: tuple[str, ...], **options: Any
) -> None:
    """Draw PROMPT and write PNG files with their parameters inside."""
    _check_source(options)
    from sdfast.pictures import Job, draw

    job = Job(prompt=prompt, loras=dict(map(scaled, loras)), **options)
    for path, seed, varied in draw(job, output, overwrite):
        click.echo(f"{path}  seed {seed}" + ("" if varied is None else f"  variation seed {varied}"))


def _check_source(options: dict[str, Any]) -> None:
    """`sdfast generate` draws with an engine, or with the stock pipeline of a checkpoint."""
    engine, checkpoint = options["engine"], options["checkpoint"]
    if (engine is None) == (checkpoint is None):
        raise click.UsageError("give --engine, or --checkpoint with --backend diffusers: one of them")
    if checkpoint is not None and options["backend"] != "diffusers":
        raise click.UsageError(
            "--checkpoint is for --backend diffusers; `sdfast export` makes an engine of it"
        )
    if checkpoint is None and options["dtype"] is not None:
        raise click.UsageError("--dtype is for --checkpoint; an engine has its own")
