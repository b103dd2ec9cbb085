"""What a tiny VAE (TAESD) saves on a processor: engines with the checkpoint's own VAE and with a tiny one,
and stock diffusers with the same tiny one, in turn.

    python -m benchmarks.tiny_vae sd15 --size 512x512 --rounds 5

All run in this process. `sd15`, `sd21` and `sdxl` are the real architectures with random weights, as the tiny
VAE is TAESD's, made on first use in --workdir: how near its pictures come is nothing that they can tell.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import diffusers
import torch
from torch import Tensor

from benchmarks import machine, random_weights
from benchmarks.engine_side import EngineSide
from sdfast.columns import columns
from sdfast.timing import alternate, clocked, shown
from sdfast.validation.metrics import relative_l2

SCHEDULER = "euler"
OWN, STOCK, TINY = "own VAE", "stock, tiny", "tiny VAE"


@click.command()
@click.argument(
    "checkpoint",
    default="sd15",
    type=click.Choice([*random_weights.ARCHITECTURES, *random_weights.SMALL]),
)
@click.option("--size", help="WIDTHxHEIGHT. [default: the checkpoint's own]")
@click.option("--steps", type=int, default=1, show_default=True, help="Of the picture, without guidance.")
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(checkpoint: str, size: str | None, steps: int, rounds: int, workdir: Path, keep: bool) -> None:
    """Compare CHECKPOINT's engine with its own VAE with that of a tiny one."""
    taesd = workdir / "taesd"
    if not taesd.exists():
        torch.manual_seed(0)
        diffusers.AutoencoderTiny().save_pretrained(taesd)
    own, tiny = (Side(checkpoint, size, steps, workdir, vae) for vae in (None, taesd))
    stock = Stock(taesd, tiny)
    rows = {
        "VAE decoder": {OWN: own.decode, STOCK: stock.decode, TINY: tiny.decode},
        "VAE encoder": {OWN: own.encode, STOCK: stock.encode, TINY: tiny.encode},
        f"picture, {steps} step{'s' * (steps > 1)}": {OWN: own.picture, TINY: tiny.picture},
    }
    measured = {name: _measured(works, rounds) for name, works in rows.items()}
    errors = {
        name: relative_l2(works[TINY](), works[STOCK]()) for name, works in rows.items() if STOCK in works
    }
    click.echo(f"{checkpoint} {own.size}, onnx, {torch.get_num_threads()} threads; times of {TINY}'s")
    click.echo(columns([("", TINY, OWN, STOCK), *(_row(name, one) for name, one in measured.items())]))
    click.echo("; ".join(f"{name}: relative L2 to stock {error:.1e}" for name, error in errors.items()))
    if keep:
        result: dict[str, Any] = {
            "checkpoint": checkpoint,
            "size": own.size,
            "steps": steps,
            "seconds": measured,
            "relative_l2": errors,
        }
        command = "python -m benchmarks.tiny_vae " + shlex.join(sys.argv[1:])
        name = f"tiny-vae-{Path(checkpoint).name}-{own.size}-cpu"
        click.echo(f"kept in {machine.keep(name, command, result)}")


def _measured(works: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each side by round."""
    return alternate({name: clocked(work) for name, work in works.items()}, rounds=rounds)


def _row(name: str, seconds: dict[str, list[float]]) -> tuple[str, ...]:
    cells = [name, shown(median(seconds[TINY]))]
    for side in (OWN, STOCK):
        if side not in seconds:
            cells.append("")
            continue
        ratios = [a / b for a, b in zip(seconds[side], seconds[TINY], strict=True)]
        cells.append(f"{median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})")
    return tuple(cells)


class Side(EngineSide):
    """One engine, and what is asked of it."""

    def __init__(
        self, checkpoint: str, size: str | None, steps: int, workdir: Path, vae: Path | None
    ) -> None:
        super().__init__(checkpoint, size, steps, workdir, "tiny-vae" if vae else "", vae=vae)
        noise = self.noise()
        shape = (1, self.manifest.model.latent_channels, *self.latent_sides)
        self.latents = torch.randn(shape, generator=noise)
        self.image = torch.rand(1, 3, self.height, self.width, generator=noise) * 2 - 1

    def decode(self) -> Tensor:
        return self._call("vae_decoder", {"latents": self.latents})["image"]

    def encode(self) -> Tensor:
        return self._call("vae_encoder", {"image": self.image})["mean"]

    def _call(self, module: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        engine = self.pipe.engine
        with engine.running():
            return dict(engine.call(module, inputs, self.height, self.width))

    def picture(self) -> Tensor:
        return self.draw(SCHEDULER, guidance=1.0)


class Stock:
    """diffusers' AutoencoderTiny on the same inputs."""

    def __init__(self, folder: Path, side: Side) -> None:
        self.vae = diffusers.AutoencoderTiny.from_pretrained(folder)
        self.side = side

    @torch.no_grad()
    def decode(self) -> Tensor:
        picture: Tensor = self.vae.decode(self.side.latents).sample
        return (picture / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self) -> Tensor:
        latents: Tensor = self.vae.encode(self.side.image).latents
        return latents


if __name__ == "__main__":
    main()
