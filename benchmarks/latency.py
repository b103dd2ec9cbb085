"""Latency of sdfast against stock diffusers: each module, a guided step, a whole picture, the loop itself.

    python -m benchmarks.latency landscapes
    python -m benchmarks.latency sd15 --size 256x256 --steps 3 --rounds 5

Both sides run in this process on the same checkpoint, in turn. `sd15`, `sd21` and `sdxl` are the real
architectures with random weights, made on first use in --workdir.
"""

import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import diffusers
import torch

from benchmarks import machine, random_weights
from sdfast.engine import Engine
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.recipe import Recipe, sides
from sdfast.pipeline import Pipeline
from sdfast.prompts import Prompts
from sdfast.timing import Comparison, Measure, clocked, compare, settle, table

PROMPT, GUIDANCE = "a cabin in misty mountains, watercolor style", 7.0


@click.command()
@click.argument("checkpoint")
@click.option("--size", help="WIDTHxHEIGHT. [default: the checkpoint's own]")
@click.option("--steps", type=int, default=20, show_default=True, help="Of the whole picture.")
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--backend", type=click.Choice(["onnx", "inductor"]), default="onnx", show_default=True)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(
    checkpoint: str, size: str | None, steps: int, rounds: int, workdir: Path, backend: str, keep: bool
) -> None:
    """Compare CHECKPOINT's engine with stock diffusers."""
    bench = Bench(checkpoint, size, workdir, backend)
    rows = [*bench.modules(rounds), bench.guided_step(steps, rounds), bench.whole_picture(steps, rounds)]
    host = bench.host_seconds_per_step(steps)
    click.echo(f"{checkpoint} {bench.size}, {backend}, {steps} steps, {torch.get_num_threads()} threads")
    click.echo(table(rows))
    click.echo(f"host time outside the U-Net: {host * 1e6:.0f} µs a step")
    if keep:
        result = {
            "checkpoint": checkpoint,
            "backend": backend,
            "size": bench.size,
            "steps": steps,
            "comparisons": [row.as_json() for row in rows],
            "host_microseconds_per_step": round(host * 1e6, 1),
        }
        command = "python -m benchmarks.latency " + shlex.join(sys.argv[1:])
        kind = "" if backend == "onnx" else f"-{backend}"
        name = f"latency-{Path(checkpoint).name}-{bench.size}{kind}-cpu"
        click.echo(f"kept in {machine.keep(name, command, result)}")


class Bench:
    """The two sides, on one checkpoint."""

    def __init__(self, checkpoint: str, size: str | None, workdir: Path, backend: str) -> None:
        source = checkpoint
        if checkpoint in random_weights.ARCHITECTURES:
            source = str(random_weights.build(checkpoint, workdir / checkpoint))
        batch = 1 if backend == "onnx" else (1,)  # compiled code is for one number of rows each
        recipe = Recipe.make(sizes=(size,) if size else None, batch=batch, backend=backend)
        kind = "" if backend == "onnx" else f"-{backend}"
        name = f"{Path(checkpoint).name}-{size or 'own'}{kind}"
        folder = export(source, workdir / "engines" / name, recipe)
        self.engine = Engine.open(folder)
        self.pipe = Pipeline(self.engine)
        self.stock = _stock(resolve(source).folder)
        self.pipe.scheduler = self.stock.scheduler
        self.pipe.set_progress_bar_config(disable=True)
        model = self.engine.manifest.model
        self.height, self.width = sides(size) if size else (model.default_height, model.default_width)
        self.size = f"{self.width}x{self.height}"

    def modules(self, rounds: int) -> list[Comparison]:
        """The text encoder, the U-Net with two rows, the VAE decoder."""
        stock, engine = self.stock, self.engine
        ids = torch.from_numpy(engine.tokenizers[0]([PROMPT]).input_ids)
        sample = torch.randn(2, *self._latent_shape())
        size = (self.height, self.width)
        return [
            compare(
                "text encoder",
                clocked(lambda: stock.text_encoder(ids)),
                clocked(self._running(lambda: engine.call("text_encoder", {"input_ids": ids}))),
                rounds=rounds,
            ),
            compare("U-Net, 2 rows", *self._unets(sample), rounds=rounds),
            compare(
                "VAE decoder",
                clocked(lambda: stock.vae.decode(sample[:1])),
                clocked(self._running(lambda: engine.call("vae_decoder", {"latents": sample[:1]}, *size))),
                rounds=rounds,
            ),
        ]

    def guided_step(self, steps: int, rounds: int) -> Comparison:
        """One step of the loop with guidance: the median time between two step callbacks."""
        steps = max(3, min(steps, 6))

        def measure(pipe: Any) -> Measure:
            def seconds() -> float:
                settle()
                return statistics.median(self._step_seconds(pipe, steps))

            return seconds

        return compare("guided step", measure(self.stock), measure(self.pipe), rounds=max(3, rounds // 2))

    def whole_picture(self, steps: int, rounds: int) -> Comparison:
        """Prompt to PIL image. sdfast's memory of prompts is emptied before each."""

        def ours() -> None:
            self.pipe.prompts = Prompts(self.engine)
            self.pipe(**self._call(steps, "pil"))

        def reference() -> None:
            self.stock(**self._call(steps, "pil"))

        return compare("whole picture", clocked(reference), clocked(ours), rounds=max(3, rounds // 2))

    def host_seconds_per_step(self, steps: int) -> float:
        """What a step takes outside of its U-Net call: from the end of one to the start of the next."""
        timed = _TimedEngine(self.engine)
        pipe = Pipeline(timed)  # type: ignore[arg-type]  # the engine, with a clock
        pipe.scheduler = self.stock.scheduler
        pipe.set_progress_bar_config(disable=True)
        settle()
        pipe(**self._call(max(3, steps), "latent"))
        return statistics.median(later[0] - sooner[1] for sooner, later in pairwise(timed.calls))

    def _latent_shape(self) -> tuple[int, int, int]:
        model = self.engine.manifest.model
        factor = model.vae_scale_factor
        return model.latent_channels, self.height // factor, self.width // factor

    def _unets(self, sample: torch.Tensor) -> tuple[Measure, Measure]:
        stock, engine, model = self.stock, self.engine, self.engine.manifest.model
        hidden, extra = torch.randn(2, 77, model.text_width), {}
        if model.pooled_width is not None:
            ids = torch.tensor([[self.height, self.width, 0, 0, self.height, self.width]] * 2).float()
            extra = {"text_embeds": torch.randn(2, model.pooled_width), "time_ids": ids}
        times = {"timesteps": torch.full((2,), 500.0), **extra}
        inputs = {
            "sample": sample,
            "time_shift": engine.call("time_shift", times)["time_shift"],
            "context": engine.call("context", {"hidden_states": hidden})["context"],
        }
        run = engine.bind("unet", inputs, {"output": torch.empty_like(sample)}, self.height, self.width)
        reference = clocked(lambda: stock.unet(sample, 500, hidden, added_cond_kwargs=extra or None))
        return reference, clocked(self._running(run))

    def _running(self, work: Callable[[], object]) -> Callable[[], None]:
        """`work` as the pipeline calls it."""

        def run() -> None:
            with self.engine.running():
                work()

        return run

    def _step_seconds(self, pipe: Any, steps: int) -> list[float]:
        """The seconds between one step callback and the next, of one call."""
        ends: list[float] = []

        def at_step_end(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            return {}

        pipe(**self._call(steps, "latent"), callback_on_step_end=at_step_end)
        return [later - sooner for sooner, later in pairwise(ends)]

    def _call(self, steps: int, output_type: str) -> dict[str, Any]:
        return {
            "prompt": PROMPT,
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE,
            "height": self.height,
            "width": self.width,
            "generator": torch.Generator().manual_seed(0),
            "output_type": output_type,
        }


class _TimedEngine:
    """An engine that notes when each call of its U-Net starts and ends."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def bind(
        self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *size: int
    ) -> Callable[[], None]:
        run = self._engine.bind(name, inputs, outputs, *size)

        def timed() -> None:
            start = time.perf_counter()
            run()
            self.calls.append((start, time.perf_counter()))

        return timed


def _stock(folder: Path) -> Any:
    """The stock pipeline in float32, with DPM++ 2M Karras."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    main()
