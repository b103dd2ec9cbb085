"""An engine as one side of a benchmark: exported for it once, and asked to draw."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import random_weights
from sdfast.export.build import export
from sdfast.export.recipe import Recipe, sides
from sdfast.pipeline import Pipeline

PROMPT, SEED = "a cabin in misty mountains, watercolor style", 240


class EngineSide:
    """An ONNX engine of `checkpoint`, for one picture of `size` ("WIDTHxHEIGHT"; default: its own).

    `sd15`, `sd21` and `sdxl` are the real architectures with random weights, made on first use in `workdir`.
    called: what tells its folder from those of other engines of the checkpoint. recipe: beyond the size.
    """

    def __init__(
        self, checkpoint: str, size: str | None, steps: int, workdir: Path, called: str = "", **recipe: Any
    ) -> None:
        source = checkpoint
        if checkpoint in (*random_weights.ARCHITECTURES, *random_weights.SMALL):
            source = str(random_weights.build(checkpoint, workdir / checkpoint))
        chosen = Recipe.make(sizes=(size,) if size else None, batch=1, **recipe)
        name = "-".join(filter(None, [Path(checkpoint).name, size or "own", called]))
        self.pipe = Pipeline.from_engine(export(source, workdir / "engines" / name, chosen))
        self.pipe.set_progress_bar_config(disable=True)
        self.manifest = self.pipe.engine.manifest
        model = self.manifest.model
        self.height, self.width = sides(size) if size else (model.default_height, model.default_width)
        self.size, self.steps = f"{self.width}x{self.height}", steps

    @property
    def latent_sides(self) -> tuple[int, int]:
        factor = self.manifest.model.vae_scale_factor
        return self.height // factor, self.width // factor

    def noise(self) -> torch.Generator:
        """The same on every side."""
        return torch.Generator().manual_seed(SEED)

    def draw(self, scheduler: str, guidance: float) -> Tensor:
        """From prompt to pixels, [1, 3, H, W] in [0, 1]; the prompt is remembered."""
        drawn: Tensor = self.pipe(
            PROMPT,
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            guidance_scale=guidance,
            scheduler=scheduler,
            output_type="pt",
            seed=SEED,
        ).images
        return drawn
