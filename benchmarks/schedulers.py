"""What schedulers cost: building a table, and the loop's share of a step against stock diffusers.

    python -m benchmarks.schedulers

The network does nothing on both sides, so that what is left of a step is all there is around it: scaling the
input and doubling it for guidance, guidance, the scheduler's step with its noise. The sides run in turn.
"""

import inspect
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click
import diffusers
import torch

from benchmarks import machine
from sdfast.loop import Rows
from sdfast.noise import OwnNoise
from sdfast.row import Conditioning, Row
from sdfast.schedulers import SAMPLERS, Sampler, Schedule, schedule
from sdfast.timing import Comparison, Measure, clocked, compare, settle, table

CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
LATENTS = {"landscapes": (12, 16, 16), "SD 512x512": (4, 64, 64)}
TABLE_STEPS, LOOP_STEPS, GUIDANCE = 50, 20, 7.0


@click.command()
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(rounds: int, keep: bool) -> None:
    """Time every sampler's table, and the loop around one sampler of every class."""
    diffusers.utils.logging.set_verbosity_error()  # it tells which fields of a config a class does not know
    tables = {sampler.name: table_seconds(sampler) for sampler in SAMPLERS}
    click.echo(f"a table of {TABLE_STEPS} steps, median:")
    for name, seconds in tables.items():
        click.echo(f"  {name:<28} {seconds * 1e6:7.0f} µs")
    rows = [step(sampler, size, rounds) for size in LATENTS for sampler in one_of_each_class()]
    click.echo(f"\na step around the network, one guided picture, {torch.get_num_threads()} threads:")
    click.echo(table(rows))
    draws = {size: draw_seconds(shape) for size, shape in LATENTS.items()}
    for size, seconds in draws.items():
        click.echo(f"of which, on both sides, one draw of noise ({size}): {seconds * 1e6:.0f} µs")
    if keep:
        result = {
            "table_steps": TABLE_STEPS,
            "table_microseconds": {name: round(seconds * 1e6, 1) for name, seconds in tables.items()},
            "latents": LATENTS,
            "draw_microseconds": {size: round(seconds * 1e6, 1) for size, seconds in draws.items()},
            "comparisons": [row.as_json() for row in rows],
        }
        command = shlex.join(["python", "-m", "benchmarks.schedulers", *sys.argv[1:]])
        click.echo(f"kept in {machine.keep('schedulers-cpu', command, result)}")


def table_seconds(sampler: Sampler, times: int = 31) -> float:
    """The median time of building a table; the model's noise levels are kept from the first one on."""

    def once() -> float:
        start = time.perf_counter()
        schedule(sampler.name, CONFIG, num_inference_steps=TABLE_STEPS)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(times))


def draw_seconds(shape: tuple[int, ...], times: int = 101) -> float:
    """The median time of `torch.randn`, which both sides owe a scheduler that draws noise."""
    generator = torch.Generator().manual_seed(0)
    measure = clocked(lambda: [torch.randn(shape, generator=generator) for _ in range(LOOP_STEPS)])
    return statistics.median(measure() for _ in range(times // LOOP_STEPS + 5)) / LOOP_STEPS


def one_of_each_class() -> list[Sampler]:
    """The first sampler of every class, but for those whose noise is a Brownian motion.

    Its cost is torchsde's, on both sides, and hundreds of times a step's.
    """
    first: dict[str, Sampler] = {}
    for sampler in SAMPLERS:
        first.setdefault(sampler.scheduler, sampler)
    return [sampler for sampler in first.values() if _plan(sampler).brownian is None]


def step(sampler: Sampler, size: str, rounds: int) -> Comparison:
    """A step's time on both sides, for latents of that size."""
    shape = LATENTS[size]
    output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    sides = diffusers_step(sampler, output), sdfast_step(sampler, output)
    return compare(f"{size}, {sampler.name}", *sides, rounds=rounds)


def diffusers_step(sampler: Sampler, output: torch.Tensor) -> Measure:
    """A step of the stock pipeline's loop, when the network's output [2, C, h, w] is always the same."""
    generator = torch.Generator().manual_seed(0)

    def run() -> tuple[int, Callable[[], None]]:
        scheduler = _stock(sampler)
        scheduler.set_timesteps(LOOP_STEPS)
        steps = scheduler.timesteps
        latents = torch.randn(1, *output.shape[1:], generator=generator) * scheduler.init_noise_sigma
        options = {"generator": generator, "eta": 0.0}
        takes = inspect.signature(scheduler.step).parameters
        extra = {name: value for name, value in options.items() if name in takes}

        def loop() -> None:
            x = latents
            for t in steps:
                scheduler.scale_model_input(torch.cat([x] * 2), t)
                negative, positive = output.chunk(2)
                guided = negative + GUIDANCE * (positive - negative)
                x = scheduler.step(guided, t, x, **extra, return_dict=False)[0]

        return len(steps), loop

    return _seconds_a_step(run)


def sdfast_step(sampler: Sampler, output: torch.Tensor) -> Measure:
    """A tick of the loop around a network whose output [2, C, h, w] is always the same."""
    generator, shape = torch.Generator().manual_seed(0), output.shape[1:]
    plan = _plan(sampler)
    told = Conditioning(torch.zeros(1, 1), torch.zeros(len(plan), 1))

    def run() -> tuple[int, Callable[[], None]]:
        latents = torch.randn(*shape, generator=generator) * plan.init_noise_sigma
        noise = OwnNoise([generator], shape, ahead=int(plan.draws_noise.sum()))
        row = Row(plan, latents, told, told, GUIDANCE, noise.of_row(0))
        rows = Rows(NoNetwork(output), [row], 8, 8)

        def loop() -> None:
            while rows.active:
                rows.tick()

        return len(plan), loop

    return _seconds_a_step(run)


class NoNetwork:
    """An engine whose U-Net costs nothing: its output is there from the start."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output

    def rows(
        self,
        name: str,
        batch: int,
        height: int | None = None,
        width: int | None = None,
        tokens: int | None = None,
    ) -> int:
        return batch

    def bind(
        self,
        name: str,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        height: int | None = None,
        width: int | None = None,
    ) -> Callable[[], None]:
        outputs["output"].copy_(self.output)
        return lambda: None


def _seconds_a_step(run: Callable[[], tuple[int, Callable[[], None]]]) -> Measure:
    """The measure of a loop's time by its steps; what `run` prepares is not counted."""

    def measure() -> float:
        steps, loop = run()
        settle()
        with torch.no_grad():
            start = time.perf_counter()
            loop()
            return (time.perf_counter() - start) / steps

    return measure


def _plan(sampler: Sampler) -> Schedule:
    return schedule(sampler.name, CONFIG, num_inference_steps=LOOP_STEPS)


def _stock(sampler: Sampler) -> Any:
    """diffusers' object."""
    return getattr(diffusers, sampler.scheduler).from_config(CONFIG, **sampler.overrides)


if __name__ == "__main__":
    main()
