"""The pictures in the docs, drawn by the built-in checkpoint's engine.

    python -m benchmarks.pictures

- `docs/landscapes.png`: eight prompts.
- `docs/schedulers.jpg`: one prompt and seed by every sampler at 8, 12, 20 and 50 steps.
- `docs/convergence.png`: for samplers that draw no noise, the distance of their pictures from what 1000 steps
  of DDIM make of the same seeds, against the number of network evaluations.
"""

from pathlib import Path

import click
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sdfast.pipeline import Pipeline
from sdfast.schedulers import SAMPLERS, Sampler, schedule

GALLERY = (
    "a cabin in misty mountains, watercolor style",
    "a lighthouse at the sea at sunset",
    "a castle in the hills at noon, pixel art",
    "a boat on a lake at night",
    "a lone tree in the desert at sunset",
    "a boat on the sea at noon, watercolor",
    "a cabin in the forest in the rain, ink",
    "a lighthouse in the mountains at dawn, pixel art",
)
SEEDS = (240, 241, 242, 143, 145, 150, 255, 152)
STEPS = (8, 12, 20, 50)
PROMPT, SEED, GUIDANCE = "a lighthouse at the sea at sunset, clear", 7, 7.0
COMPARED = (
    "a cabin in misty mountains, watercolor style",
    "a lighthouse at the sea at sunset",
    "a castle in the hills at noon, pixel art",
    "a boat on a lake at night",
)
FINE = 1000  # steps of the reference
COUNTS = (5, 8, 12, 20, 30, 50)
LABEL = 210  # pixels beside a row of pictures


@click.command()
@click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
def main(docs: Path) -> None:
    """Draw them all."""
    pipe = Pipeline.from_pretrained("landscapes")
    pipe.set_progress_bar_config(disable=True)
    docs.mkdir(exist_ok=True)
    gallery(pipe).save(docs / "landscapes.png")
    samplers = [sampler for sampler in SAMPLERS if draws_pictures(sampler)]
    sheet(pipe, samplers).save(docs / "schedulers.jpg", quality=85)
    convergence(pipe, [s for s in samplers if not draws_noise(pipe, s)], docs / "convergence.png")
    click.echo(
        f"drawn into {docs}: landscapes.png, schedulers.jpg, convergence.png ({len(samplers)} samplers)"
    )


def draws_pictures(sampler: Sampler) -> bool:
    """Whether the sampler goes from noise to a picture with any checkpoint: not for special ones only."""
    special = ("DDIMInverse", "LCM", "TCD", "EDM")
    return not sampler.scheduler.startswith(special)


def draws_noise(pipe: Pipeline, sampler: Sampler) -> bool:
    return bool(schedule(sampler.name, pipe.scheduler.config, num_inference_steps=8).draws_noise.any())


def draw(pipe: Pipeline, prompt: str, sampler: str, steps: int, seed: int) -> NDArray[np.float32]:
    """One picture [H, W, 3] float32 in 0 … 1."""
    image: NDArray[np.float32] = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        seed=seed,
        scheduler=sampler,
        output_type="np",
    ).images[0]
    return image


def gallery(pipe: Pipeline, columns: int = 4) -> Image.Image:
    """The prompts of `GALLERY`, 20 steps, twice as large, each over its prompt."""
    side = 2 * pipe.engine.manifest.model.default_width
    rows = len(GALLERY) // columns
    page = Image.new("RGB", (columns * side, rows * (side + 24)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, prompt in enumerate(GALLERY):
        picture = draw(pipe, prompt, "dpmpp_2m_karras", 20, SEEDS[i])
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        x, y = i % columns * side, i // columns * (side + 24)
        page.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        pen.text((x + 4, y + side + 4), prompt, "black", font)
    return page


def sheet(pipe: Pipeline, samplers: list[Sampler]) -> Image.Image:
    """A row of pictures a sampler, a column a number of steps."""
    side = pipe.engine.manifest.model.default_width
    page = Image.new("RGB", (LABEL + side * len(STEPS), 20 + side * len(samplers)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, steps in enumerate(STEPS):
        pen.text((LABEL + side * column + 6, 2), f"{steps} steps", "black", font)
    for row, sampler in enumerate(samplers):
        pen.text((6, 20 + side * row + side // 2 - 8), sampler.name, "black", font)
        for column, steps in enumerate(STEPS):
            picture = draw(pipe, PROMPT, sampler.short_name, steps, SEED)
            image = Image.fromarray((picture * 255).round().astype(np.uint8))
            page.paste(image, (LABEL + side * column, 20 + side * row))
    return page


def convergence(pipe: Pipeline, samplers: list[Sampler], path: Path) -> None:
    """Root mean square distance of pictures (in 0 … 1) from the fine solution, over evaluations.

    The mean over pictures is geometric: with few steps some picture turns out as another one altogether, far
    away at any number of steps until it does not, and would hide what the others do.
    """
    fine = [draw(pipe, prompt, "DDIM SGM Uniform", FINE, i) for i, prompt in enumerate(COMPARED)]
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    styles = [(c, line) for line in ("-", "--", ":", "-.") for c in plt.colormaps["tab10"].colors]  # type: ignore[attr-defined]
    for sampler, (color, line) in zip(samplers, styles, strict=False):
        evaluations, distances = [], []
        for steps in COUNTS:
            pictures = [draw(pipe, p, sampler.short_name, steps, i) for i, p in enumerate(COMPARED)]
            evaluations.append(len(schedule(sampler.name, pipe.scheduler.config, num_inference_steps=steps)))
            each = np.sqrt(np.mean((np.stack(pictures) - np.stack(fine)) ** 2, axis=(1, 2, 3)))
            distances.append(np.exp(np.log(each).mean()))
        axes.loglog(evaluations, distances, color=color, linestyle=line, marker=".", label=sampler.name)
    axes.set_xlabel("network evaluations (with guidance: two U-Net rows each)")
    axes.set_ylabel(f"distance from {FINE} steps of DDIM (RMS, pictures in 0 … 1)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
