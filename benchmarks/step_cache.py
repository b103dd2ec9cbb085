"""What step caching saves and costs on an engine: its pictures with it and without, in turn.

    python -m benchmarks.step_cache
    python -m benchmarks.step_cache sd15 --size 256x256 --steps 6 --rounds 3

Every interval is drawn in every round, in changing order, so that a drift of the machine meets all; a ratio
is the median of those of the rounds. `sd15`, `sd21` and `sdxl` are the real architectures with random
weights, made on first use in --workdir, whose pictures say nothing of the price.
"""

import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image, ImageDraw

from benchmarks import machine, random_weights
from sdfast.columns import columns
from sdfast.export.build import export
from sdfast.export.recipe import Recipe, sides
from sdfast.manifest import SHALLOW
from sdfast.pipeline import Pipeline, to_uint8
from sdfast.timing import clocked
from sdfast.validation.metrics import psnr, ssim

PROMPTS = (
    "a cabin in misty mountains, watercolor style",
    "a lighthouse at the sea at sunset",
    "a castle in the hills at noon, pixel art",
    "a boat on a lake at night",
)
SEED, GUIDANCE, SCHEDULER = 240, 7.0, "dpmpp_2m_karras"
LABEL = 14  # pixels over a column of pictures


@dataclass(frozen=True)
class Price:
    """Of one interval. seconds: of a picture, the median. ratio: of the time without caching to that with it.
    psnr, ssim: of `PROMPTS`' pictures to those without caching, the median and the lowest."""

    interval: int
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    psnr: tuple[float, float]
    ssim: tuple[float, float]

    def row(self) -> tuple[str, ...]:
        return (
            f"one in {self.interval}",
            f"{self.seconds * 1e3:.1f} ms",
            f"{self.ratio:.2f}× ({self.ratio_low:.2f}–{self.ratio_high:.2f})",
            f"{self.psnr[0]:.1f} dB ({self.psnr[1]:.1f})",
            f"{self.ssim[0]:.3f} ({self.ssim[1]:.3f})",
        )


@click.command()
@click.argument("checkpoint", default="landscapes")
@click.option("--size", help="WIDTHxHEIGHT. [default: the checkpoint's own]")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--branch", type=int, default=0, show_default=True)
@click.option("--interval", "intervals", type=int, multiple=True, default=(2, 3, 5), show_default=True)
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--backend", type=click.Choice(["onnx", "inductor"]), default="onnx", show_default=True)
@click.option(
    "--sheet", type=click.Path(path_type=Path), help="Write the pictures here, a column an interval."
)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(
    checkpoint: str,
    size: str | None,
    steps: int,
    branch: int,
    intervals: tuple[int, ...],
    rounds: int,
    workdir: Path,
    backend: str,
    sheet: Path | None,
    keep: bool,
) -> None:
    """Price step caching on CHECKPOINT's engine."""
    bench = Bench(checkpoint, size, steps, branch, workdir, backend)
    seconds = bench.seconds((1, *intervals), rounds)
    pictures = {interval: bench.pictures(interval) for interval in (1, *intervals)}
    prices = [price(interval, seconds, pictures) for interval in intervals]
    plain = statistics.median(seconds[1])
    click.echo(f"{checkpoint} {bench.size}, {backend}, {steps} steps, {torch.get_num_threads()} threads")
    head = ("whole evaluations", "a picture", "ratio", "PSNR (lowest)", "SSIM (lowest)")
    click.echo(columns([head, ("all", f"{plain * 1e3:.1f} ms", "", "", ""), *(p.row() for p in prices)]))
    whole, shallow = bench.weights()
    click.echo(f"weights of the shallow steps: {shallow / whole:.1%} of the U-Net's")
    if sheet is not None:
        draw_sheet(pictures).save(sheet, quality=90)
    if keep:
        result: dict[str, Any] = {
            "checkpoint": checkpoint,
            "backend": backend,
            "size": bench.size,
            "steps": steps,
            "branch": branch,
            "rounds": rounds,
            "seconds_without": plain,
            "weights_shallow": round(shallow / whole, 4),
            "intervals": [vars(p) for p in prices],
        }
        command = "python -m benchmarks.step_cache " + shlex.join(sys.argv[1:])
        kind = "" if backend == "onnx" else f"-{backend}"
        name = f"step-cache-{Path(checkpoint).name}-{bench.size}-branch{branch}{kind}-cpu"
        click.echo(f"kept in {machine.keep(name, command, result)}")


class Bench:
    """An engine with shallow steps, and the pictures that it is asked for."""

    def __init__(
        self, checkpoint: str, size: str | None, steps: int, branch: int, workdir: Path, backend: str
    ) -> None:
        source = checkpoint
        if checkpoint in random_weights.ARCHITECTURES:
            source = str(random_weights.build(checkpoint, workdir / checkpoint))
        batch = 1 if backend == "onnx" else (1,)  # compiled code is for one number of rows each
        sizes = (size,) if size else None
        recipe = Recipe.make(sizes=sizes, batch=batch, backend=backend, cache_branch=branch)
        name = f"{Path(checkpoint).name}-{size or 'own'}-{backend}-branch{branch}"
        self.pipe = Pipeline.from_engine(export(source, workdir / "engines" / name, recipe))
        self.pipe.set_progress_bar_config(disable=True)
        model = self.pipe.engine.manifest.model
        self.height, self.width = sides(size) if size else (model.default_height, model.default_width)
        self.size, self.steps = f"{self.width}x{self.height}", steps

    def seconds(self, intervals: Sequence[int], rounds: int) -> dict[int, list[float]]:
        """Of a picture from prompt to pixels, by interval, one for each round; the prompt is remembered."""
        measures = {n: clocked(lambda n=n: self._draw(PROMPTS[0], n, "pil")) for n in intervals}  # type: ignore[misc]
        for measure in measures.values():
            measure()
        taken: dict[int, list[float]] = {n: [] for n in intervals}
        for turn in range(rounds):
            for n in sorted(intervals, reverse=bool(turn % 2)):
                taken[n].append(measures[n]())
        return taken

    def pictures(self, interval: int) -> torch.Tensor:
        """One of each prompt, [n, 3, H, W] in [0, 1]."""
        return torch.cat([self._draw(prompt, interval, "pt") for prompt in PROMPTS])

    def weights(self) -> tuple[int, int]:
        """Bytes of a whole step's files and of a shallow one's."""
        manifest = self.pipe.engine.manifest
        sizes = {file.path: file.size for file in manifest.files}
        whole, shallow = (
            sum(sizes[path] for path in manifest.modules[name].files) for name in ("unet", SHALLOW)
        )
        return whole, shallow

    def _draw(self, prompt: str, interval: int, output_type: str) -> Any:
        return self.pipe(
            prompt,
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            scheduler=SCHEDULER,
            cache_interval=interval,
            output_type=output_type,
            seed=SEED,
        ).images


def price(interval: int, seconds: dict[int, list[float]], pictures: dict[int, torch.Tensor]) -> Price:
    ratios = [a / b for a, b in zip(seconds[1], seconds[interval], strict=True)]
    pairs = list(zip(pictures[interval], pictures[1], strict=True))
    return Price(
        interval=interval,
        seconds=statistics.median(seconds[interval]),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        psnr=_median_and_lowest([psnr(*pair) for pair in pairs]),
        ssim=_median_and_lowest([ssim(*pair) for pair in pairs]),
    )


def _median_and_lowest(values: Sequence[float]) -> tuple[float, float]:
    return statistics.median(values), min(values)


def draw_sheet(pictures: dict[int, torch.Tensor]) -> Image.Image:
    """A row a prompt, a column an interval."""
    [(count, _, height, width), *_] = [images.shape for images in pictures.values()]
    sheet = Image.new("RGB", (len(pictures) * width, LABEL + count * height), "white")
    for column, (interval, images) in enumerate(pictures.items()):
        label = "all whole" if interval == 1 else f"one in {interval}"
        ImageDraw.Draw(sheet).text((column * width + 4, 1), label, fill="black")
        for row, pixels in enumerate(to_uint8(images).cpu().numpy()):
            sheet.paste(Image.fromarray(pixels), (column * width, LABEL + row * height))
    return sheet


if __name__ == "__main__":
    main()
