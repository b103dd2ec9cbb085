"""sdfast on an engine of one backend, in fp16."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.workloads import PROMPT, SCHEDULER, SEED, Draw, Workload
from sdfast.engine import Engine
from sdfast.pipeline import Pipeline
from sdfast.prompts import Prompts


class Sdfast:
    """sdfast's pipeline on an engine."""

    def __init__(self, workload: Workload, engine: Path, device: torch.device) -> None:
        self.workload = workload
        self.engine = Engine.open(engine, device, load=True)
        self.pipe = Pipeline(self.engine)
        self.pipe.scheduler = SCHEDULER
        self.pipe.set_progress_bar_config(disable=True)

    def draw(self, draw: Draw, output_type: str = "pil") -> Any:
        """Its memory of prompts is emptied before: the stock pipeline encodes the prompt each time too."""
        self.pipe.prompts = Prompts(self.engine)
        return self.pipe(
            prompt=PROMPT,
            num_inference_steps=draw.steps,
            guidance_scale=draw.guidance,
            height=self.workload.height,
            width=self.workload.width,
            num_images_per_prompt=draw.batch,
            seed=SEED,
            output_type=output_type,
        ).images

    @contextmanager
    def module(self, name: str, batch: int) -> Iterator[Callable[[], object]]:
        if name == "unet":
            call = self._unet(2 * batch)
        elif name == "vae_decoder":
            call = self._vae_decoder(batch)
        else:
            call = self._text_encoder(name)

        def run() -> None:
            with self.engine.running():
                call()

        yield run

    def _text_encoder(self, name: str) -> Callable[[], object]:
        tokenizer = self.engine.tokenizers[int(name.endswith("_2"))]
        ids = torch.from_numpy(tokenizer([PROMPT]).input_ids).to(self.engine.device)
        return lambda: self.engine.call(name, {"input_ids": ids})

    def _unet(self, rows: int) -> Callable[[], None]:
        engine, model, size = self.engine, self.engine.manifest.model, self._size()
        rows = engine.rows("unet", rows, *size)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(rows, *shape, device=engine.device, dtype=engine.dtype)

        sample = random(model.latent_channels, *self._latent_sides())
        inputs = {
            "sample": sample,
            "time_shift": random(model.time_shift_width),
            "context": random(77, model.context_width),
        }
        return engine.bind("unet", inputs, {"output": torch.empty_like(sample)}, *size)

    def _vae_decoder(self, batch: int) -> Callable[[], object]:
        shape = (batch, self.engine.manifest.model.latent_channels, *self._latent_sides())
        latents = torch.randn(shape, device=self.engine.device)
        return lambda: self.engine.call("vae_decoder", {"latents": latents}, *self._size())

    def _size(self) -> tuple[int, int]:
        return self.workload.height, self.workload.width

    def _latent_sides(self) -> tuple[int, int]:
        factor = self.engine.manifest.model.vae_scale_factor
        return self.workload.height // factor, self.workload.width // factor
