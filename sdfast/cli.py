"""The command line: `sdfast export | rebuild | generate | serve | validate | bench | info | schedulers | …`.

Each command is a thin layer over the package. What sdfast raises on purpose is shown as one line, with exit
status 1; `--debug` shows the traceback. Heavy imports are inside the commands, so that `--help` is immediate.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from sdfast import __version__
from sdfast.columns import columns
from sdfast.errors import RequestError, SdfastError

ATTENTION = (  # `sdfast.backends.attention.KINDS`, which takes torch to import
    "auto",
    "sdpa",
    "flash",
    "cudnn",
    "efficient",
    "math",
    "xformers",
)

UPSCALERS = (  # `sdfast.request.Upscaler`, which takes pydantic to import
    "latent",
    "latent_antialiased",
    "latent_bicubic",
    "latent_bicubic_antialiased",
    "latent_nearest",
    "latent_nearest_exact",
    "lanczos",
    "nearest",
)

CONTROL_MODES = ("balanced", "prompt", "control", "guess")  # `sdfast.request.ControlMode`, likewise

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class _OneLineErrors(click.Group):
    """A group whose commands' own errors are one line, unless `--debug` asks for more."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SdfastError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="sdfast")
def main(debug: bool) -> None:
    """Export Stable Diffusion once, serve it fast, prove it is the same picture."""


@main.command()
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
        given["loras"] = [*map(_lora, loras), *map(_lora_on_request, on_request)]
    if embeddings:
        given["embeddings"] = [_embedding(text) for text in embeddings]
    if ip_adapters:
        given["ip_adapters"] = [_ip_adapter(text) for text in ip_adapters]
    if (height is None) != (width is None):
        raise click.UsageError("give --height and --width together")
    if height is not None:
        given["sizes"] = (f"{width}x{height}",)
    chosen = Recipe.read(recipe, **given) if recipe else Recipe.make(**given)
    target = output or Path("engines") / _engine_name(source, recipe)
    folder = build(source, target, chosen, progress=Stages())
    click.echo(f"engine: {folder}")


@main.command()
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


@main.command()
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

    job = Job(prompt=prompt, loras=dict(map(_scaled, loras)), **options)
    for path, seed, varied in draw(job, output, overwrite):
        click.echo(f"{path}  seed {seed}" + ("" if varied is None else f"  variation seed {varied}"))


@main.command()
@click.argument("engines", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of these settings.")
@click.option("--host", help="[default: 127.0.0.1]")
@click.option("--port", type=int, help="[default: 8000]")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="A file with the key clients must show."
)
@click.option("--max-rows", type=int, help="The most pictures denoised together. [default: 4; on CUDA 16]")
@click.option(
    "--previews",
    type=click.Choice(["auto", "full", "fast"]),
    help="Of pictures under way: decoded, or coarse ones that cost nothing. [default: auto: fast where "
    "decoding takes more than 0.25 s]",
)
@click.option("--queue", type=int, help="The most jobs that wait. [default: 64]")
@click.option("--timeout", type=float, help="Seconds that a job may wait. [default: 60]")
@click.option("--step-timeout", type=float, help="Seconds that a network's call may take. [default: 120]")
@click.option("--drain", type=float, help="Seconds that running work has after SIGTERM. [default: 120]")
@click.option("--max-body", type=int, help="Bytes of a request. [default: 16 MiB]")
@click.option("--max-bodies", type=int, help="Bytes of all requests together. [default: 16 x max-body]")
@click.option("--allow-public", is_flag=True, default=None, help="Listen beyond this machine without a key.")
@click.option("--device", help="[default: what the engines are for]")
def serve(engines: tuple[Path, ...], config: Path | None, device: str | None, **given: Any) -> None:
    """Serve ENGINES over HTTP: the APIs of OpenAI and AUTOMATIC1111, health, metrics.

    Every setting can also be an environment variable (SDFAST_PORT, SDFAST_API_KEY), or stand in the file.
    """
    from sdfast.server.settings import Settings
    from sdfast.server.start import start

    settings = Settings.load(given, os.environ, config)
    if not start(engines, settings, device):
        sys.exit(1)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="The reference. [default: the checkpoint the engine was made from]")
@click.option("--prompts", type=click.Path(path_type=Path), help="A text file, one prompt a line.")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option(
    "--guidance-start", type=float, default=0.0, help="Price guidance from this share of the steps on."
)
@click.option("--guidance-end", type=float, default=1.0, help="Price guidance to this share of the steps.")
@click.option("--cache-interval", type=int, default=1, help="Price step caching with this interval.")
@click.option("--device", help="[default: what the engine is for]")
@click.option("--compile", is_flag=True, help="For eager engines: run through torch.compile.")
@click.option("--attention", type=click.Choice(ATTENTION), help="For eager engines.")
def validate(
    engine: Path,
    checkpoint: str | None,
    prompts: Path | None,
    device: str | None,
    compile: bool,
    attention: str | None,
    **how: Any,
) -> None:
    """Run stock diffusers beside ENGINE and compare modules, steps and pictures."""
    from sdfast.engine import Engine
    from sdfast.validation import validate as run

    lines = _prompt_lines(prompts) if prompts else None
    opened = Engine.open(engine, device, compile=compile, attention=attention)
    report = run(opened, checkpoint=checkpoint, prompts=lines, progress=click.echo, **how)
    click.echo(report.table())
    click.echo(f"report: {engine / 'validation' / 'report.html'}")
    if not report.passed:
        sys.exit(1)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--size", help="WIDTHxHEIGHT in pixels. [default: the engine's own]")
@click.option("--count", type=int, default=1, show_default=True, help="Pictures of a call.")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--guidance", type=float, default=7.0, show_default=True)
@click.option("--scheduler", default="dpmpp_2m_karras", show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True, help="How often each part is measured.")
@click.option("--reference", is_flag=True, help="Beside stock diffusers on the same checkpoint, in turn.")
@click.option("--checkpoint", help="With --reference. [default: the checkpoint the engine was made from]")
@click.option("--device", help="[default: what the engine is for]")
@click.option("--compile", is_flag=True, help="For eager engines: draw through torch.compile.")
@click.option("--attention", type=click.Choice(ATTENTION), help="For eager engines.")
@click.option("--json", "as_json", is_flag=True, help="The seconds of every round.")
def bench(engine: Path, size: str | None, count: int, guidance: float, as_json: bool, **how: Any) -> None:
    """Measure ENGINE on this machine: prompts, steps, decoding and whole pictures."""
    from sdfast.bench import bench as run
    from sdfast.pictures import parse_size

    told = run(
        engine,
        size=parse_size("--size", size),
        images=count,
        guidance_scale=guidance,
        progress=lambda part: click.echo(f"  {part}", err=True),
        **how,
    )
    click.echo(json.dumps(told.as_json(), indent=1) if as_json else told.table())


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The whole manifest.")
def info(engine: Path, as_json: bool) -> None:
    """Verify ENGINE and show what it is."""
    from sdfast.engine import verify
    from sdfast.manifest import read_manifest
    from sdfast.summary import summary

    manifest = read_manifest(engine)
    verify(engine, manifest.files)
    click.echo(manifest.to_json() if as_json else summary(manifest))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="With every alias, and what each name decides.")
def schedulers(as_json: bool) -> None:
    """List the samplers: AUTOMATIC1111's name, the short name, the diffusers class; --scheduler takes each.

    A sampler evaluates the network once or twice a step: what a step costs. A plain sampler's name may be
    followed by a schedule type of AUTOMATIC1111, as in "Euler a Karras" or "DPM++ 2M Align Your Steps".
    """
    from sdfast.schedulers import SAMPLERS, SCHEDULE_TYPES

    if as_json:
        listed = [{**vars(s), "name": s.name, "overrides": dict(s.overrides)} for s in SAMPLERS]
        click.echo(json.dumps(listed, indent=2))
        return
    rows = [(s.name, s.short_name, s.scheduler, str(s.evaluations), s.advice) for s in SAMPLERS]
    click.echo(columns([("name", "short name", "diffusers class", "evaluations a step", "when"), *rows]))
    click.echo(f"\nschedule types: {', '.join(SCHEDULE_TYPES)}")


@main.command()
def doctor() -> None:
    """Show versions, devices and providers: what runs here, what is missing, and how to get it."""
    from sdfast.doctor import examine

    click.echo(columns([(finding.name, finding.state, finding.advice) for finding in examine()]))


@main.command()
@click.option("--engines", type=click.Path(path_type=Path), default=Path("engines"), show_default=True)
@click.option("--outputs", type=click.Path(path_type=Path), default=Path("outputs"), show_default=True)
def demo(engines: Path, outputs: Path) -> None:
    """Export the built-in checkpoint, draw a picture, validate the engine."""
    from sdfast.demo import run

    passed = run(engines, outputs, Stages(), click.echo)
    if not passed:
        sys.exit(1)


class Stages:
    """Shows an export's stages, one line each."""

    def begin(self, stage: str) -> None:
        if sys.stdout.isatty():
            click.echo(f"  {stage:<16} …\r", nl=False)

    def end(self, stage: Any) -> None:
        size = f"{stage.size / 1e6:,.1f} MB" if stage.size else ""
        click.echo(f"  {stage.name:<16} {stage.seconds:>6.1f} s  {size:>12}  {stage.note}".rstrip())

    def say(self, message: str) -> None:
        click.echo(f"  {message}")


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


def _lora(text: str) -> dict[str, Any]:
    """The source and the scale in SOURCE[=SCALE]."""
    source, separator, scale = text.rpartition("=")
    if not separator or not _NUMBER.fullmatch(scale):
        return {"source": text}
    if Path(text).exists():
        raise click.UsageError(f"--lora {text}: is there under this name; say {text}=1, or another scale")
    return {"source": source, "scale": float(scale)}


def _scaled(text: str) -> tuple[str, float]:
    """The name and the scale in NAME[=SCALE]."""
    name, separator, scale = text.partition("=")
    if not separator:
        return name, 1.0
    if not _NUMBER.fullmatch(scale):
        raise click.UsageError(f"--lora {text}: {scale!r} is not a number; say {name}=0.8, or another scale")
    return name, float(scale)


def _lora_on_request(text: str) -> dict[str, Any]:
    """The source and the name in SOURCE[=NAME]."""
    return {**_named(text, "--lora-on-request", "name"), "on_request": True}


def _embedding(text: str) -> dict[str, Any]:
    """The source and the token in SOURCE[=TOKEN]."""
    return _named(text, "--embedding", "token")


def _named(text: str, option: str, field: str) -> dict[str, Any]:
    """The source, and in `field` what follows the last "="."""
    source, separator, name = text.rpartition("=")
    if not separator:
        return {"source": text}
    if Path(text).exists():
        raise click.UsageError(f"{option} {text}: is there under this name; say {text}={field.upper()}")
    return {"source": source, field: name}


def _ip_adapter(text: str) -> dict[str, Any]:
    """The source and the file in SOURCE[=FILE]."""
    source, separator, file = text.rpartition("=")
    return (
        {"source": source, "weight_name": file} if separator and not Path(text).exists() else {"source": text}
    )


def _engine_name(source: str | None, recipe: Path | None) -> str:
    if recipe is not None:
        return recipe.stem
    if source is None:
        raise click.UsageError("give SOURCE or --recipe")
    from sdfast.export.checkpoint import name_of

    return name_of(source)


def _prompt_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path}: cannot be read as text ({error}); give a file of one prompt a line"
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise RequestError(f"{path}: holds no prompts; give a file of one prompt a line")
    return prompts


if __name__ == "__main__":
    main(prog_name="sdfast")
