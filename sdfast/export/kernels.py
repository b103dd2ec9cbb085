"""Kernels of our own in the compiled networks: each only where it was measured to beat the compiler's.

Group normalisation and the gated product of the feed-forward have kernels in `sdfast.kernels`. Which is the
fastest depends on the GPU and the shape, so a network is run once before it is traced, and each shape that it
meets is decided: every own kernel is compared with the definition on the very input, and one that is wrong is
left out; the others are timed beside what the compiler makes of the definition. What was decided is part of
what is traced.

The compiler's is timed alone, while in a network it can join what comes before and after: an own kernel has
to be faster by a margin.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast import kernels
from sdfast.backends.clock import Clock
from sdfast.backends.measured import Measured, Memory
from sdfast.errors import ExportError, cause_line
from sdfast.export.quiet import quiet_compiler
from sdfast.models import ops
from sdfast.models.layers import GroupNorm, use_group_norm
from sdfast.models.unet import Attending
from sdfast.versions import installed

COMPILER = "compiler"  # the name of what the compiler makes of the definition
MARGIN = 1.05  # how many times faster an own kernel must be
WITHOUT = "export with --kernels compiler"
# The largest difference from the definition, as a share of the number and the row's root mean square: two
# units in the last place of half precision; for float32, what sums of a thousand products may differ by.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 5e-5}
SHAPES = 1000  # that dynamo may compile one function for; its own limit is 8, after which it gives up

Kernel = Callable[..., Tensor]


def compiled_alone(definition: Kernel) -> Kernel:
    """What the compiler makes of it for the sizes that it is called with, tuned as an engine's code is."""
    compiled: Kernel = torch.compile(
        definition, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs"
    )
    return compiled


@contextmanager
def compiling_alone() -> Iterator[None]:
    """Where what `compiled_alone` gives is called: for many shapes, and without what the compiler prints."""
    with quiet_compiler(), torch._dynamo.config.patch(recompile_limit=SHAPES):
        yield


def own_version() -> str:
    """A digest of the own kernels and of what compiles them: with another, they are other code."""
    digest = hashlib.sha256(str(installed(["triton"])).encode())
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Contest:
    """Own kernels against what the compiler makes of a definition: which computes each shape.

    Not thread-safe. A shape is decided when it is first met, unless `memory` recalls it; the batch is no part
    of it, for no row's picture may depend on the batch. `say` is told of every kernel that is left out.
    tolerance: as those of `TOLERANCE`, where it is not that of the dtype.

    Raises `ExportError` when what the compiler is given cannot be compiled.
    """

    def __init__(
        self,
        clock: Clock,
        memory: Memory,
        say: Callable[[str], None],
        tolerance: float | None = None,
    ) -> None:
        self._clock, self._memory, self._say, self._tolerance = clock, memory, say, tolerance
        self._met: dict[str, Measured] = {}

    def uses_own(self) -> bool:
        """Whether some shape that was met is computed by an own kernel."""
        return any(measured.kind != COMPILER for measured in self._met.values())

    def taken(self) -> dict[str, str]:
        """Of each shape that was met, in words, the kernel that computes it, or `COMPILER`."""
        return {what: measured.kind for what, measured in self._met.items()}

    def report(self) -> list[str]:
        """A line for each shape that was met: what computes it, the times of all, and what was left out."""
        return [f"{what}: {_outcome(measured)}" for what, measured in self._met.items()]

    def _decide(
        self,
        what: str,
        definition: Kernel,
        own: Mapping[str, Kernel],
        batched: tuple[Tensor | None, ...],
        rest: tuple[Any, ...],
        timed: Mapping[str, Callable[[], object]] | None = None,
    ) -> None:
        """Decide `what`, a shape that is met for the first time.

        batched, rest: the arguments, as of `why_wrong`. timed: where the clock is not to see the kernels and
        the compiled definition by themselves, what it is to see of each, by name.
        """
        kinds = (COMPILER, *own)
        measured = self._memory.recall(what, kinds)
        if measured is None:
            with compiling_alone():
                fresh = self._measure(what, definition, own, batched, rest, timed or {})
            measured = self._memory.keep(what, fresh, kinds)
        for kind, reason in measured.refused.items():
            self._say(f"{what}: the kernel {kind!r} is left out: {reason}")
        self._met[what] = measured

    def _measure(
        self,
        what: str,
        definition: Kernel,
        own: Mapping[str, Kernel],
        batched: tuple[Tensor | None, ...],
        rest: tuple[Any, ...],
        timed: Mapping[str, Callable[[], object]],
    ) -> Measured:
        times: dict[str, float] = {}
        refused: dict[str, str] = {}
        for kind, kernel in own.items():
            try:
                result = kernel(*batched, *rest)
                refused[kind] = why_wrong(result, definition, batched, rest, self._tolerance)
                if not refused[kind]:
                    times[kind] = self._clock(timed.get(kind, lambda kernel=kernel: kernel(*batched, *rest)))  # type: ignore[misc]
            except torch.OutOfMemoryError:
                refused[kind] = "not enough memory on the GPU to compare it with the definition"
            except Exception as error:  # Triton raises many unrelated types
                refused[kind] = f"it fails: {cause_line(error)}"
        refused = {kind: reason for kind, reason in refused.items() if reason}
        rows = len(batched[0]) if batched[0] is not None else 0
        if not times:
            return Measured(COMPILER, {}, rows, refused)
        best = min(times, key=lambda kind: times[kind])
        times[COMPILER] = self._time_of_compilers(what, definition, (*batched, *rest), timed)
        wins = times[best] * MARGIN <= times[COMPILER]
        return Measured(best if wins else COMPILER, times, rows, refused)

    def _time_of_compilers(
        self,
        what: str,
        definition: Kernel,
        arguments: tuple[Any, ...],
        timed: Mapping[str, Callable[[], object]],
    ) -> float:
        try:
            if COMPILER in timed:
                return self._clock(timed[COMPILER])
            compiled = compiled_alone(definition)
            return self._clock(lambda: compiled(*arguments))
        except Exception as error:  # compilers fail in as many ways as there are
            raise ExportError(
                f"{what}: the definition cannot be compiled alone: {cause_line(error)}; {WITHOUT}"
            ) from error


class OwnKernels(Contest):
    """Computes group norms and gated products, each shape by what is the fastest for it."""

    def __init__(
        self,
        group_norms: Mapping[str, ops.GroupNormKernel],
        linear_geglus: Mapping[str, ops.LinearGeGLU],
        clock: Clock,
        memory: Memory,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(clock, memory, say)
        self._group_norms, self._linear_geglus = dict(group_norms), dict(linear_geglus)

    def group_norm(
        self,
        x: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        """As `ops.normalised`."""
        what = group_norm_words(x, shift, groups, silu)
        rest = (weight, bias, groups, eps, silu)

        def last(kernel: Kernel) -> Kernel:
            """The kernel on images whose channels lie last, as they do between compiled convolutions."""
            return lambda x, *others: kernel(x.contiguous(memory_format=torch.channels_last), *others)

        own = {name: last(kernel) for name, kernel in self._group_norms.items()}
        if what not in self._met:
            given = x.contiguous(memory_format=torch.channels_last)
            self._decide(what, ops.normalised, own, (given, shift), rest)
        return own.get(self._met[what].kind, ops.normalised)(x, shift, *rest)

    def linear_geglu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As `ops.linear_geglu`, x [B, N, I]."""
        what = geglu_words(x, weight)
        own = self._linear_geglus
        if what not in self._met:
            self._decide(what, ops.linear_geglu, own, (x,), (weight, bias))
        return own.get(self._met[what].kind, ops.linear_geglu)(x, weight, bias)


def group_norm_words(x: Tensor, shift: Tensor | None, groups: int, silu: bool) -> str:
    """What the choice of a kernel for a group norm depends on. Not the batch."""
    _, channels, height, width = x.shape
    kind = f"{'shifted ' * (shift is not None)}group norm{' + SiLU' * silu}"
    return f"{kind} of {channels} channels in {groups} groups, {width}x{height}, {dtype_name(x)}"


def geglu_words(x: Tensor, weight: Tensor) -> str:
    """What the choice of a kernel for a gated product depends on, x [B, N, I]. Not the batch."""
    tokens, inputs = x.shape[1:]
    return f"GEGLU of {tokens} tokens, {inputs} to {len(weight) // 2} channels, {dtype_name(x)}"


def use_own(network: nn.Module, chosen: OwnKernels | None) -> None:
    """Let a network's group norms and gated products be computed by `chosen`, or by their definitions."""
    use_group_norm(network, chosen.group_norm if chosen else ops.normalised)
    if isinstance(network, Attending):
        network.use_geglu(chosen.linear_geglu if chosen else ops.linear_geglu)


def has_place(network: nn.Module) -> bool:
    """Whether there is anything in a network that own kernels compute."""
    return any(isinstance(module, GroupNorm) for module in network.modules())


def why_wrong(
    result: Tensor,
    definition: Kernel,
    batched: tuple[Tensor | None, ...],
    rest: tuple[Any, ...],
    tolerance: float | None = None,
) -> str:
    """How a result differs from the definition in wider numbers; "" where that is rounding.

    batched: the arguments that have a batch [B, …], compared row by row, since wider copies of all would take
    several times the memory. rest: the other arguments. Differences are shares; tolerance: default, that of
    the dtype in `TOLERANCE`.
    """
    first = batched[0]
    if first is None or result.dtype != first.dtype or len(result) != len(first):
        return f"it gives {dtype_name(result)} {list(result.shape)}"
    wide = torch.float32 if first.dtype != torch.float32 else torch.float64
    tolerance = TOLERANCE[first.dtype] if tolerance is None else tolerance
    for row, given in enumerate(zip(*(_rows(tensor, len(first)) for tensor in batched), strict=True)):
        truth = definition(*(_wider(argument, wide) for argument in (*given, *rest)))
        if result[row : row + 1].shape != truth.shape:
            return f"it gives the shape {list(result.shape)}"
        size = truth.abs() + truth.square().mean().sqrt().clamp(min=torch.finfo(wide).tiny)
        difference = float(((result[row : row + 1].to(wide) - truth).abs_() / size).max())
        if not difference <= tolerance:  # nor is NaN
            return (
                f"it differs from the definition by a share of {difference:.2g}, and rounding by at most"
                f" {tolerance:.2g}"
            )
    return ""


def _rows(tensor: Tensor | None, batch: int) -> list[Tensor | None]:
    return [None] * batch if tensor is None else [tensor[i : i + 1] for i in range(batch)]


def _wider(argument: Any, dtype: torch.dtype) -> Any:
    return argument.to(dtype) if isinstance(argument, Tensor) else argument


def _outcome(measured: Measured) -> str:
    told = f"{measured}, in a batch of {measured.rows}" if measured.milliseconds else measured.kind
    for kind, reason in measured.refused.items():
        told += f"; LEFT OUT: {kind}, for {reason}"
    return told


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
