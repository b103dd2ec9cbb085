"""What HTTP, the batcher and the worker's process add to one request on an idle server.

    python -m benchmarks.serving.overhead

`Pipeline` in this process, its picture written as a PNG with its parameters, and the same request sent to
`sdfast serve` on a connection that is open already, in turn.
"""

import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import httpx

from benchmarks import machine
from benchmarks.serving.sides import served
from sdfast.engine import Engine
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.infotext import infotext_of, png
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.timing import settle

CHECKPOINT, PROMPT, SCHEDULER = (
    "landscapes",
    "a cabin in misty mountains, watercolor style",
    "dpmpp_2m_karras",
)


@click.command()
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--rounds", type=int, default=41, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(steps: int, rounds: int, workdir: Path, keep: bool) -> None:
    """Time a picture by `Pipeline` and by `sdfast serve`."""
    folder = export(CHECKPOINT, workdir / "engines" / f"{CHECKPOINT}-serving", Recipe.make())
    direct = _direct(folder, steps)
    with (
        served("sdfast", folder, CHECKPOINT, None, workdir / "serving-overhead.log") as url,
        httpx.Client(base_url=url, timeout=60.0) as client,
    ):
        pairs = [(_seconds(direct), _seconds(_http(client, steps))) for _ in range(rounds + 3)][3:]
    alone = statistics.median(pair[0] for pair in pairs)
    added = statistics.median(pair[1] - pair[0] for pair in pairs)
    click.echo(
        f"{CHECKPOINT}, {steps} steps: Pipeline and PNG {alone * 1e3:.1f} ms, "
        f"served {added * 1e3:+.1f} ms (medians of {rounds}, in turn)"
    )
    if keep:
        result = {
            "checkpoint": CHECKPOINT,
            "steps": steps,
            "rounds": rounds,
            "pipeline_milliseconds": round(alone * 1e3, 2),
            "added_milliseconds": round(added * 1e3, 2),
        }
        command = "python -m benchmarks.serving.overhead " + shlex.join(sys.argv[1:])
        click.echo(f"kept in {machine.keep('serving-overhead-landscapes-cpu', command.strip(), result)}")


def _direct(folder: Path, steps: int) -> Callable[[], object]:
    pipeline = Pipeline(Engine.open(folder, load=True))
    pipeline.set_progress_bar_config(disable=True)
    manifest = pipeline.engine.manifest
    request = Request.make(
        prompts=(PROMPT,),
        negative_prompts=(None,),
        height=manifest.model.default_height,
        width=manifest.model.default_width,
        num_inference_steps=steps,
        guidance_scale=7.0,
        scheduler=SCHEDULER,
        seed=0,
    )

    def draw() -> bytes:
        image = pipeline.generate(request).images[0]
        plan, weights = pipeline.schedule_of(request), manifest.checkpoint.weights
        return png(image, infotext_of(request, plan, 0, model=manifest.name, weights=weights))

    return draw


def _http(client: httpx.Client, steps: int) -> Callable[[], object]:
    body = {
        "prompt": PROMPT,
        "num_inference_steps": steps,
        "guidance_scale": 7.0,
        "scheduler": SCHEDULER,
        "seed": 0,
    }

    def draw() -> bytes:
        return client.post("/v1/images/generations", json=body).raise_for_status().content

    return draw


def _seconds(work: Callable[[], object]) -> float:
    settle()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
