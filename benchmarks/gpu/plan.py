"""The parts of a run, in order of what they are worth, and how a run goes through them."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import accuracy, comparison, kernels, own_kernels, roofline, tick
from benchmarks.gpu.bench import Bench, nbytes
from benchmarks.gpu.document import Document, one_line
from benchmarks.gpu.first_picture import fresh
from benchmarks.gpu.sides import COMPILED, EAGER, SIDES, WITH_OWN, WITHOUT_OWN
from benchmarks.gpu.workloads import Draw, Workload

# Seconds that a part may take on a GPU, for as long as none of its kind was measured.
EXPECTED = {
    "roofline": 10.0,
    "weights": 15.0,
    "build": 120.0,
    "step": 30.0,
    "picture": 30.0,
    "first": 45.0,
    "modules": 20.0,
    "accuracy": 30.0,
    "profile": 15.0,
    "tick": 30.0,
    "choice": 150.0,  # with the build of the side that has no own kernels
    "kernels": 15.0,
}
KINDS = tuple(EXPECTED)
NEEDED = ("roofline", "weights", "build")  # by the others, so that no choice of parts leaves them out


@dataclass(frozen=True)
class Part:
    """One thing that is measured and written by itself.

    kind: what `--only` names it by. like: parts that take about as long share it. about: what of the case
    determines the result. sides: each must have its row. ours: whether sdfast's code has a share in it.
    """

    name: str
    kind: str
    like: str
    run: Callable[[Bench], dict[str, Any]]
    about: Mapping[str, Any]
    sides: tuple[str, ...] = ()
    batch: int | None = None
    ours: bool = True


def parts(load: Workload, sides: Sequence[str], batches: Sequence[int], traces: Path) -> Iterator[Part]:
    """All of them, batch by batch, of each batch first what the goals speak of.

    Compiling takes most of a run, so the first batch's step is measured as the sides come: of those that
    compile nothing at once, and anew with each other one. What tells of single kernels comes last: it
    compiles much, and a run that has no time left for it is none the worse.
    """
    yield Part(
        "roofline",
        "roofline",
        "roofline",
        _roofline,
        {"gemm": load.gemm, "copy": load.copy_bytes},
        ours=False,
    )
    yield Part("weights", "weights", "weights", _weights, {}, ours=False)
    for batch in batches:
        case = _Case(load, tuple(sides), batch)
        main, *others = load.pictures(batch)
        yield from case.steps_as_sides_come() if batch == batches[0] else (*case.builds(), case.step())
        yield case.picture(main)
        yield from case.first_pictures()
        yield from case.accuracies()
        yield from case.modules()
        if batch == batches[0]:
            yield from case.profiles(traces)
        yield from (case.picture(draw) for draw in others if draw.guided)
        yield from case.compilation(Draw(1, batch, False))
        yield from (case.picture(draw) for draw in others if not draw.guided)
    yield from _Case(load, tuple(sides), batches[0]).single_kernels()


@dataclass(frozen=True)
class _Case:
    """The parts of one batch."""

    load: Workload
    sides: tuple[str, ...]
    batch: int

    def steps_as_sides_come(self) -> Iterator[Part]:
        """Builds, and after each that compiles the step of all sides that there are by then."""
        there = [side for side in self.sides if not SIDES[side].compiles]
        later = [side for side in self.sides if SIDES[side].compiles]
        later.sort(key=lambda side: (SIDES[side].fp8, SIDES[side].backend is None))  # sdfast, stock, FP8
        yield from self._of(there).builds()
        if there:
            yield self._of(there).step()
        for side in later:
            yield from self._of([side]).builds()
            there.append(side)
            yield self._of(there).step()

    def _of(self, sides: Collection[str]) -> "_Case":
        return replace(self, sides=tuple(side for side in self.sides if side in sides))

    def builds(self) -> Iterator[Part]:
        for side in self.sides:
            if SIDES[side].backend is not None:
                yield self._part("build", side, lambda bench, side=side: bench.build(side, self.batch))
        yield from self.compilation(Draw(2, self.batch, True))

    def compilation(self, draw: Draw) -> Iterator[Part]:
        """What stock's compilation of the networks for this number of rows takes: the first such picture."""
        if COMPILED in self.sides:
            name = f"{COMPILED}/{'guided' if draw.guided else 'no guidance'}"
            yield self._part("build", name, lambda bench: _compile(bench, draw), ours=False)

    def step(self) -> Part:
        return self._part(
            "step", "", lambda bench: comparison.step(bench, self.sides, self.batch), self.sides
        )

    def picture(self, draw: Draw) -> Part:
        return self._part(
            "picture",
            str(draw),
            lambda bench: comparison.picture(bench, self.sides, draw),
            self.sides,
            steps=draw.steps,
            guided=draw.guided,
        )

    def modules(self) -> Iterator[Part]:
        texts = self.load.text_encoders if self.batch == 1 else ()  # they encode one prompt at a time
        for name in (*texts, "unet", "vae_decoder"):
            yield self._part(
                "modules",
                name,
                lambda bench, name=name: comparison.module(bench, self.sides, name, self.batch),
                self.sides,
            )

    def first_pictures(self) -> Iterator[Part]:
        for side in self.sides:
            yield self._part(
                "first",
                side,
                lambda bench, side=side: _first(bench, side, self.batch),
                ours=SIDES[side].backend is not None,
            )

    def accuracies(self) -> Iterator[Part]:
        for side in self.sides:
            if SIDES[side].backend is not None and EAGER in self.sides:
                yield self._part(
                    "accuracy", side, lambda bench, side=side: accuracy.modules(bench, side, self.batch)
                )

    def profiles(self, traces: Path) -> Iterator[Part]:
        for side in self.sides:
            yield self._part(
                "profile",
                side,
                lambda bench, side=side: kernels.one_step(
                    bench.side(side, self.batch), self.load, bench.device, traces / f"{side}.json.gz"
                ),
                ours=SIDES[side].backend is not None,
            )

    def single_kernels(self) -> Iterator[Part]:
        """The arithmetic of a tick; networks with own kernels and without; those kernels one by one."""
        yield self._part("tick", "", lambda bench: tick.measure(bench, self.batch))
        if WITH_OWN in self.sides:
            for name in ("unet", "vae_decoder"):
                yield self._part(
                    "choice",
                    name,
                    lambda bench, name=name: own_kernels.choice(bench, name, self.batch),
                    (WITH_OWN, WITHOUT_OWN),
                )
        for case in own_kernels.cases(self.load, self.batch):
            yield self._part("kernels", case.what, lambda bench, case=case: own_kernels.measure(bench, case))

    def _part(
        self,
        kind: str,
        what: str,
        run: Callable[[Bench], dict[str, Any]],
        sides: tuple[str, ...] = (),
        ours: bool = True,
        **about: Any,
    ) -> Part:
        like = f"{kind}/{what}" if what else kind
        about = {"batch": self.batch, "what": what, **about}
        return Part(f"{like}/batch {self.batch}", kind, like, run, about, sides, self.batch, ours)


def _roofline(bench: Bench) -> dict[str, Any]:
    result = roofline.measure(bench.device, bench.workload.gemm, bench.workload.copy_bytes)
    bench.tidy()
    return result


def _weights(bench: Bench) -> dict[str, Any]:
    return {"nbytes": nbytes(bench.source(), "*.safetensors"), "dtype": "float16"}


def _compile(bench: Bench, draw: Draw) -> dict[str, Any]:
    side = bench.side(COMPILED, draw.batch)
    start = time.perf_counter()
    side.draw(draw)
    seconds = time.perf_counter() - start
    first = bench.folder / "compiled" / f"{torch.__version__}-{draw.batch}-{draw.guided}"
    again = first.exists()  # from torch's cache, then
    if not again:
        first.parent.mkdir(parents=True, exist_ok=True)
        first.write_text(repr(seconds), encoding="utf-8")
    return {"seconds": float(first.read_text("utf-8")), "again_seconds": seconds if again else None}


def _first(bench: Bench, side: str, batch: int) -> dict[str, Any]:
    engine = None
    if SIDES[side].backend is not None:
        bench.build(side, batch)
        engine = bench.engine_folder(side, batch)
    return fresh(
        bench.workload, side, batch, bench.source(), engine, bench.device, bench.folder / "first pictures"
    )


class Runner:
    """Goes through parts: skips what is finished, keeps each result at once, stops before time is out."""

    def __init__(
        self,
        bench: Bench,
        document: Document,
        key: Mapping[str, Any],
        code: str,
        minutes: float,
        say: Callable[[str], None],
        conclude: Callable[[list[str]], None],
    ) -> None:
        """key: what determines every result; code: a digest of sdfast's, for those it has a share in.

        conclude: called with the names of the parts that are left, at the start and after every part.
        """
        self.bench = bench
        self.document = document
        self._key, self._code, self._say, self._conclude = key, code, say, conclude
        self._end = time.monotonic() + minutes * 60

    def run(self, wanted: Sequence[Part]) -> list[str]:
        """The names of the parts that are left, as there was no time for them."""
        self.document.set_aside({**self._key, "code": self._code})
        left = [part for part in wanted if not self._finished(part)]
        self._say(f"{len(wanted) - len(left)} of {len(wanted)} parts are there already")
        self._conclude([part.name for part in left])
        self._restore_roofline()
        while left:
            part = left[0]
            if time.monotonic() + self._expected(part) > self._end:
                self._say(f"no time for {part.name}, which may take {self._expected(part):.0f} s")
                break
            self._one(left.pop(0))
            self._conclude([part.name for part in left])
        return [part.name for part in left]

    def _one(self, part: Part) -> None:
        if part.batch is not None:
            self.bench.keep_only(part.batch)
        start = time.monotonic()
        try:
            result = part.run(self.bench)
        except Exception as error:  # the other parts go on
            self.document.fail(part.name, self._key_of(part), time.monotonic() - start, one_line(error))
            self.bench.tidy()
        else:
            self.document.record(part.name, self._key_of(part), time.monotonic() - start, result)
            if part.kind == "roofline":
                self.bench.roofline = result
        kept = self.document.parts[part.name]
        self._say(f"{part.name}: {kept['error'] or kept['state']} ({kept['seconds']:.1f} s)")

    def _finished(self, part: Part) -> bool:
        return self.document.finished(part.name, self._key_of(part), part.sides)

    def _key_of(self, part: Part) -> dict[str, Any]:
        return {**self._key, **part.about, "code": self._code if part.ours else None}

    def _restore_roofline(self) -> None:
        self.bench.roofline = self.document.result("roofline")

    def _expected(self, part: Part) -> float:
        """Seconds: the most that a like part took here, or what the kind may take."""
        names = [
            name for name in self.document.parts if name == part.like or name.startswith(part.like + "/")
        ]
        taken = [self.document.parts[name]["seconds"] for name in names if self.document.result(name)]
        return max(taken, default=EXPECTED[part.kind] * self.bench.workload.weight)
