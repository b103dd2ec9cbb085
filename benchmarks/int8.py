"""What INT8 saves and costs on a processor: an engine in float32 and one with INT8 layers, in turn.

    python -m benchmarks.int8
    python -m benchmarks.int8 sd15 --size 512x512 --steps 3 --rounds 5

Both engines are of one checkpoint and run in this process. `sd15`, `sd21` and `sdxl` are the real
architectures with random weights, made on first use in --workdir, whose pictures say nothing of the price.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.engine_side import EngineSide
from sdfast.columns import columns
from sdfast.timing import Comparison, clocked, compare
from sdfast.validation.metrics import psnr, relative_l2

GUIDANCE, SCHEDULER = 7.0, "dpmpp_2m_karras"


@click.command()
@click.argument("checkpoint", default="landscapes")
@click.option("--size", help="WIDTHxHEIGHT. [default: the checkpoint's own]")
@click.option("--steps", type=int, default=20, show_default=True, help="Of the whole picture.")
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(checkpoint: str, size: str | None, steps: int, rounds: int, workdir: Path, keep: bool) -> None:
    """Compare CHECKPOINT's engine with INT8 layers with the one in float32."""
    exact, rounded = (Side(checkpoint, size, steps, workdir, int8) for int8 in (False, True))
    rows = [
        compare("U-Net, 2 rows", clocked(exact.unet()), clocked(rounded.unet()), rounds=rounds),
        compare(
            "whole picture", clocked(exact.picture), clocked(rounded.picture), rounds=max(3, rounds // 2)
        ),
    ]
    error, away = relative_l2(rounded.output, exact.output), psnr(rounded.picture()[0], exact.picture()[0])
    click.echo(f"{checkpoint} {exact.size}, onnx, {steps} steps, {torch.get_num_threads()} threads")
    click.echo(columns([("", "float32", "INT8", "ratio", "range"), *(row.row() for row in rows)]))
    click.echo(
        f"{len(rounded.manifest.int8)} layers in INT8; U-Net's relative L2 {error:.1e}, picture {away:.1f} dB"
    )
    click.echo(
        f"weights of the U-Net: {exact.weights / 1e6:,.0f} MB, with INT8 {rounded.weights / 1e6:,.0f} MB"
    )
    if keep:
        result: dict[str, Any] = {
            "checkpoint": checkpoint,
            "size": exact.size,
            "steps": steps,
            "layers": len(rounded.manifest.int8),
            "comparisons": [_as_json(row) for row in rows],
            "unet_relative_l2": error,
            "picture_psnr": away,
            "weights": {"float32": exact.weights, "int8": rounded.weights},
        }
        command = "python -m benchmarks.int8 " + shlex.join(sys.argv[1:])
        name = f"int8-{Path(checkpoint).name}-{exact.size}-cpu"
        click.echo(f"kept in {machine.keep(name, command, result)}")


class Side(EngineSide):
    """One engine, and what is asked of it. output: what its U-Net gave."""

    output: Tensor

    def __init__(self, checkpoint: str, size: str | None, steps: int, workdir: Path, int8: bool) -> None:
        super().__init__(checkpoint, size, steps, workdir, "int8" * int8, int8=int8)

    @property
    def weights(self) -> int:
        """Bytes of the U-Net's files."""
        return sum(
            file.size for file in self.manifest.files if file.path in self.manifest.modules["unet"].files
        )

    def unet(self) -> Callable[[], None]:
        """One evaluation with guidance, on the same numbers on both sides."""
        engine, model, noise = self.pipe.engine, self.manifest.model, self.noise()
        shape = (2, model.in_channels, *self.latent_sides)
        times = {"timesteps": torch.full((2,), 500.0)}
        if model.pooled_width is not None:
            times["text_embeds"] = torch.randn(2, model.pooled_width, generator=noise)
            times["time_ids"] = torch.tensor(
                [[self.height, self.width, 0, 0, self.height, self.width]] * 2
            ).float()
        hidden = torch.randn(2, 77, model.text_width, generator=noise)
        inputs = {
            "sample": torch.randn(shape, generator=noise),
            "time_shift": engine.call("time_shift", times)["time_shift"],
            "context": engine.call("context", {"hidden_states": hidden})["context"],
        }
        self.output = torch.empty(2, model.latent_channels, *shape[2:])
        run = engine.bind("unet", inputs, {"output": self.output}, self.height, self.width)

        def evaluate() -> None:
            with engine.running():
                run()

        return evaluate

    def picture(self) -> Tensor:
        return self.draw(SCHEDULER, GUIDANCE)


def _as_json(row: Comparison) -> dict[str, Any]:
    told = row.as_json()
    return {"name": told.pop("name"), "float32": told.pop("reference"), "int8": told.pop("sdfast"), **told}


if __name__ == "__main__":
    main()
