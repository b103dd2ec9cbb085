"""sdfast beside its peers on the CPU, on one checkpoint, from the same latents to the same picture.

    python -m benchmarks.peers landscapes
    python -m benchmarks.peers sd15 --size 256x256 --steps 3 --rounds 5
    python -m benchmarks.peers landscapes --only sdfast --only openvino --no-keep

The sides are stock diffusers (eager, and channels last), optimum-onnx, OpenVINO, stable-diffusion.cpp and
sdfast's `onnx` backend. Peers are installed on first use, each in an environment of its own under
--environments, in the versions of `constraints/`; stable-diffusion.cpp is compiled then, for this very
processor, which takes a C++ compiler and minutes. A side that cannot run the checkpoint says why and is left
out. Every side is a process; they are measured in turn, round by round. They stay open, unless they have no
room in memory beside one another: then each is opened for its turn. `sd15` and `sd21` are the real
architectures with random weights, made on first use in --workdir.
"""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from benchmarks import machine, random_weights
from benchmarks.peers.channel import Worker, WorkerError
from benchmarks.peers.environments import CACHE, ENVIRONMENTS, InstallError
from benchmarks.peers.outputs import distances
from benchmarks.peers.report import Opened, tables
from benchmarks.peers.rounds import Comparison, Rounds, compared
from benchmarks.peers.sides import SIDES
from benchmarks.peers.task import ASKED, Task
from sdfast.export.checkpoint import resolve
from sdfast.export.networks import Networks
from sdfast.export.recipe import sides as sides_of
from sdfast.export.sharing import link_or_copy

REPOSITORY = Path(__file__).parents[2]
MEASURED = {name: side.measures for name, side in SIDES.items()}
ROOM = 0.6  # of the free memory: sides take more than when they open
PREFIX, PREFIXED = "text_model.", ("embeddings", "encoder", "final_layer_norm")


@click.command()
@click.argument("checkpoint", type=click.Choice(["landscapes", "sd15", "sd21"]))
@click.option("--size", help="WIDTHxHEIGHT. [default: the checkpoint's own]")
@click.option("--steps", type=click.IntRange(min=2), default=20, show_default=True, help="Of the picture.")
@click.option("--rounds", type=click.IntRange(min=1), default=11, show_default=True, help="Of each module.")
@click.option("--pictures", type=click.IntRange(min=1), help="Rounds of pictures. [default: half as many]")
@click.option("--openings", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--only", type=click.Choice([*SIDES]), multiple=True, help="These sides.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="1 on a machine with other work, where threads of one side wait for each other. [default: torch's]",
)
@click.option("--environments", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()) / "sdfast-bench"
)
@click.option("--keep/--no-keep", default=True, help="Write the result to benchmarks/results/.")
def main(
    checkpoint: str,
    size: str | None,
    steps: int,
    rounds: int,
    pictures: int | None,
    openings: int,
    only: tuple[str, ...],
    threads: int | None,
    environments: Path,
    workdir: Path,
    keep: bool,
) -> None:
    """Compare CHECKPOINT on every side."""
    task = _task(checkpoint, size, steps, threads or torch.get_num_threads(), workdir.resolve())
    bench = Bench(task, only or tuple(SIDES), environments)
    counts = {**dict.fromkeys(ASKED, rounds), "picture": pictures or max(3, rounds // 2)}
    result = bench.run(counts, openings)
    size = f"{task.width}x{task.height}"
    click.echo(f"{checkpoint} {size}, {steps} steps, {task.threads} threads")
    click.echo(tables(result, bench.opened))
    if keep:
        document = {
            "checkpoint": checkpoint,
            "size": size,
            "steps": steps,
            "threads": task.threads,
            "open_at_once": bench.together,
            "comparisons": [one.as_json() for one in result],
            "sides": {name: side.as_json() for name, side in bench.opened.items()},
        }
        command = "python -m benchmarks.peers " + shlex.join(sys.argv[1:])
        name = f"peers-{checkpoint}-{size}-cpu{f'-{threads}-threads' if threads else ''}"
        click.echo(f"kept in {machine.keep(name, command, document)}")


class Bench:
    """The sides of one task."""

    def __init__(self, task: Task, names: tuple[str, ...], environments: Path) -> None:
        self.opened = {name: Opened() for name in names}
        self._task = task
        self._environments = environments
        self._file = task.write(Path(task.outputs) / "task.json")
        self._pythons: dict[str, str] = {}
        self.together = True
        """Whether the sides were open at once."""

    def run(self, rounds: Mapping[str, int], openings: int) -> list[Comparison]:
        for name, side in self.opened.items():
            side.left_out = SIDES[name].left_out(self._task)
            if side.left_out is not None:
                click.echo(f"{name}: {side.left_out}")
        for name in self.taking:
            self._part(name, lambda name=name: self._prepare(name))
        for _ in range(max(1, openings - 1)):  # and once more to be measured
            for name in self.taking:
                self._part(name, lambda name=name: self._open(name).close())
        self.together = self._have_room()
        if self.together:
            with self._all_open() as workers:
                measuring = Rounds(list(workers), click.echo, MEASURED)
                seconds = measuring.together(workers, rounds)
        else:
            measuring = Rounds(self.taking, click.echo, MEASURED)
            seconds = measuring.apart(self._one_open, rounds)
        for name, why in measuring.failed.items():
            self.opened[name].failed = why
        for name in self.taking:
            self.opened[name].idle = measuring.idle.get(name)
        computed = {name: MEASURED[name] for name in self.taking}
        for name, far in distances(Path(self._task.outputs), computed).items():
            self.opened[name].distances = far
        return compared(seconds)

    @property
    def taking(self) -> list[str]:
        """The sides that take part."""
        return [name for name, side in self.opened.items() if side.absent is None]

    def _part(self, name: str, work: Callable[[], object]) -> None:
        """Do a part of a side; one that cannot is out, with the reason."""
        try:
            work()
        except (InstallError, WorkerError) as error:
            self.opened[name].failed = str(error)
            click.echo(f"{name}: {error}")

    def _prepare(self, name: str) -> None:
        if name in ENVIRONMENTS:
            click.echo(f"{name}: its environment, in {self._environments / name}")
            self._pythons[name] = str(ENVIRONMENTS[name].python(self._environments))
        else:
            self._pythons[name] = sys.executable
        click.echo(f"{name}: its export")
        worker = self._worker("prepare", name)
        try:
            worker.finish()
        except WorkerError as error:
            raise WorkerError(f"could not export: {error}") from error

    def _have_room(self) -> bool:
        """Whether all sides can be open at once. Without room the system throws out pages of the files that
        some have mapped, and what is measured is its disk."""
        peaks = [self.opened[name].open_peak_bytes for name in self.taking]
        free = machine.free_bytes()
        if free is None or sum(peak or 0 for peak in peaks) < ROOM * free:
            return True
        click.echo("too little memory for all sides at once: each is opened for its turn, and closed")
        return False

    @contextmanager
    def _all_open(self) -> Iterator[dict[str, Worker]]:
        workers: dict[str, Worker] = {}
        with ExitStack() as stack:

            def start(name: str) -> None:
                workers[name] = stack.enter_context(self._one_open(name))

            for name in self.taking:
                self._part(name, lambda name=name: start(name))
            yield workers

    @contextmanager
    def _one_open(self, name: str) -> Iterator[Worker]:
        worker, side = self._open(name), self.opened[name]
        try:
            yield worker
            with suppress(WorkerError):  # one that has ended failed before, and is left out
                side.peak_bytes = max(worker.ask(do="memory")["peak_bytes"], side.peak_bytes or 0)
        finally:
            worker.close()

    def _open(self, name: str) -> Worker:
        worker, side = self._worker("serve", name), self.opened[name]
        try:
            answer = worker.ask(do="open")
        except WorkerError as error:
            worker.close()
            raise WorkerError(f"could not be opened: {error}") from error
        side.seconds.append(answer["seconds"])
        side.facts, side.open_peak_bytes = answer["facts"], answer["peak_bytes"]
        return worker

    def _worker(self, work: str, name: str) -> Worker:
        command = [self._pythons[name], "-m", "benchmarks.peers.worker", work, name, str(self._file)]
        environment = {"OMP_NUM_THREADS": str(self._task.threads), "HF_HUB_OFFLINE": "1"}
        log = Path(self._task.outputs) / f"{name}.log"
        return Worker(command, log=log, folder=REPOSITORY, environment=environment)


def _task(name: str, size: str | None, steps: int, threads: int, workdir: Path) -> Task:
    """The task, its inputs written."""
    source = str(random_weights.build(name, workdir / name)) if name in random_weights.ARCHITECTURES else name
    checkpoint = resolve(source)
    model = Networks.of(checkpoint).model()
    height, width = sides_of(size) if size else (model.default_height, model.default_width)
    place = workdir / "peers" / name
    outputs = place / f"{width}x{height}"
    outputs.mkdir(parents=True, exist_ok=True)
    task = Task(
        checkpoint=str(for_every_version(checkpoint.folder, place / "checkpoint")),
        exports=str(place),
        inputs=str(outputs / "inputs.safetensors"),
        outputs=str(outputs),
        height=height,
        width=width,
        steps=steps,
        threads=threads,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (model.latent_channels, height // model.vae_scale_factor, width // model.vae_scale_factor)
    inputs = {
        "ids": _ids(checkpoint.folder, task.prompt),
        "sample": torch.randn(2, *shape, generator=generator),
        "hidden": torch.randn(2, 77, model.text_width, generator=generator),
        "latents": torch.randn(1, *shape, generator=torch.Generator().manual_seed(task.seed)),
    }
    save_file(inputs, task.inputs)
    return task


def for_every_version(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint in a folder that every version of transformers reads, made once.

    transformers 5 leaves a prefix out of the names of CLIP's text weights that it reads with and without;
    transformers 4 takes weights without it for missing, and draws random ones in their place.
    """
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        target = part / path.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name.startswith("text_encoder") and path.suffix == ".safetensors":
            weights = {in_old_names(name): tensor for name, tensor in load_file(path).items()}
            save_file(weights, target, {"format": "pt"})
        else:
            link_or_copy(path, target)
    part.rename(folder)
    return folder


def in_old_names(name: str) -> str:
    """The name of a weight of CLIP's text encoder with the prefix; a projection's has none."""
    return f"{PREFIX}{name}" if name.split(".", maxsplit=1)[0] in PREFIXED else name


def _ids(folder: Path, prompt: str) -> torch.Tensor:
    """The prompt's tokens [1, 77] int64, by transformers' own tokenizer."""
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids: torch.Tensor = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return ids


if __name__ == "__main__":
    main()
