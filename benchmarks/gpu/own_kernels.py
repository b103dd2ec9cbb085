"""sdfast's own kernels: shape by shape beside the definition and the compiler's, and in a whole network.

The shapes are those that the networks meet, found by running them on meta tensors. Each is timed alone, by
the clock that an export chooses by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import comparison
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.document import one_line
from benchmarks.gpu.sides import WITH_OWN, WITHOUT_OWN
from benchmarks.gpu.work import Work, unet_on_meta, vae_decoder_on_meta
from benchmarks.gpu.workloads import Workload
from sdfast import kernels
from sdfast.backends.clock import milliseconds
from sdfast.backends.inductor import Code
from sdfast.export.kernels import (
    compiled_alone,
    compiling_alone,
    geglu_words,
    group_norm_words,
    why_wrong,
)
from sdfast.manifest import read_manifest
from sdfast.models import ops
from sdfast.models.layers import use_group_norm
from sdfast.models.unet import UNet

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One shape. tensors: shape and dtype of each argument that has a batch, then of the weights; None where
    there is no shift. settings: the arguments after them. count: how often a network meets it."""

    what: str
    norm: bool
    batched: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    weights: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    settings: tuple[Any, ...]
    work: Work
    count: int = 1


def cases(load: Workload, batch: int) -> list[Case]:
    """Every shape that a guided step and the decoder meet, for a batch of so many pictures."""
    seen = _Seen()
    unet, inputs = unet_on_meta(load.architecture, 2 * batch, load.height, load.width)
    decoder, latents = vae_decoder_on_meta(load.architecture, load.height, load.width)
    for network, given in ((unet, inputs), (decoder, latents)):
        use_group_norm(network, seen.group_norm)
        if isinstance(network, UNet):
            network.use_geglu(seen.linear_geglu)
        with torch.no_grad():
            network(*given)
    return list(seen.cases.values())


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """A row for the definition, and on a GPU for the compiler's kernel and each own one."""
    generator = torch.Generator(bench.device).manual_seed(0)
    batched = tuple(None if one is None else _random(*one, generator) for one in case.batched)
    rest = (*(_random(*one, generator) for one in case.weights), *case.settings)
    definition = ops.normalised if case.norm else ops.linear_geglu
    rows = [
        _row(bench, case, name, kernel, definition, batched, rest)
        for name, kernel in _candidates(bench.device, definition, case.norm).items()
    ]
    if bench.device.type == "cuda":
        bench.tidy()
    return {"rows": rows, "count": case.count, "without_own": kernels.why_none(bench.device)}


def choice(bench: Bench, name: str, batch: int) -> dict[str, Any]:
    """A network compiled with own kernels, where they were chosen, and without any; what was chosen."""
    result = comparison.module(bench, (WITH_OWN, WITHOUT_OWN), name, batch)
    folder = bench.engine_folder(WITH_OWN, batch)
    files = [folder / variant.file for variant in read_manifest(folder).modules[name].variants]
    codes = [Code.model_validate_json(file.with_suffix(".json").read_bytes()) for file in files]
    return {**result, "chosen": sorted({line for code in codes for line in code.kernels})}


def _candidates(device: torch.device, definition: Kernel, norm: bool) -> Mapping[str, Kernel]:
    if device.type != "cuda":  # a compiler takes a minute there, and says nothing of a GPU
        return {"definition": definition}
    found: dict[str, Kernel] = {"definition": definition, "compiler": compiled_alone(definition)}
    if not kernels.why_none(device):
        found |= kernels.group_norms() if norm else kernels.linear_geglus()
    return found


def _row(
    bench: Bench,
    case: Case,
    name: str,
    kernel: Kernel,
    definition: Kernel,
    batched: Sequence[Tensor | None],
    rest: Sequence[Any],
) -> dict[str, Any]:
    row: dict[str, Any] = {"side": name, "failed": None, "milliseconds": None, "roofline_share": None}
    try:
        with torch.no_grad(), compiling_alone():
            wrong = why_wrong(kernel(*batched, *rest), definition, tuple(batched), tuple(rest))
            if wrong and name != "definition":  # whose own rounding is what it is
                return {**row, "failed": wrong}
            row["milliseconds"] = milliseconds(lambda: kernel(*batched, *rest), bench.device)
    except Exception as error:  # the other kernels go on
        return {**row, "failed": one_line(error)}
    if bench.roofline is not None:
        floor = case.work.seconds(bench.roofline["flops_per_second"], bench.roofline["bytes_per_second"])
        row["roofline_share"] = floor * 1e3 / row["milliseconds"]
    return row


class _Seen:
    """Stands in for the operations, and notes what they are given."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}

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
        read_and_written = Work(0.0, 2 * x.numel() * x.element_size())
        self._note(
            Case(
                group_norm_words(x, shift, groups, silu),
                True,
                (_like(x), None if shift is None else _like(shift)),
                (_like(weight), _like(bias)),
                (groups, eps, silu),
                read_and_written,
            )
        )
        return torch.empty_like(x)

    def linear_geglu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], len(weight) // 2)
        numbers = x.numel() + weight.numel() + out.numel()
        work = Work(2.0 * x.numel() * len(weight), numbers * x.element_size())
        what = geglu_words(x, weight)
        self._note(Case(what, False, (_like(x),), (_like(weight), _like(bias)), (), work))
        return out

    def _note(self, case: Case) -> None:
        known = self.cases.get(case.what)
        self.cases[case.what] = replace(case, count=known.count + 1) if known else case


def _like(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of unit variance, and a matrix so that its product is too; an image's channels lie last."""
    tensor = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 2:
        tensor /= shape[1] ** 0.5
    if len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.to(dtype)
