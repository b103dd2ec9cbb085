"""sdfast's own kernels: shape by shape beside the definition and the compiler's, and in a whole network.

Convolutions in FP8 stand beside those in fp16, and round what they read. The shapes are those that the
networks meet, found by running them on meta tensors. Each is timed alone, by the clock that an export chooses
by.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from sdfast.backends.fp8 import gathering
from sdfast.backends.inductor import Code
from sdfast.backends.target import check_fp8
from sdfast.errors import BackendError
from sdfast.export.fp8 import OWN, TOLERANCE, convolution_words, enlarging_conv3x3
from sdfast.export.kernels import (
    compiled_alone,
    compiling_alone,
    geglu_words,
    group_norm_words,
    why_wrong,
)
from sdfast.manifest import read_manifest
from sdfast.models import ops
from sdfast.models.fp8 import convert, fp8_convolutions, use_convolution
from sdfast.models.layers import use_group_norm
from sdfast.models.unet import UNet

Kernel = Callable[..., Tensor]


Kind = Literal["norm", "product", "convolution"]
DEFINITIONS: Mapping[Kind, Kernel] = {
    "norm": ops.normalised,
    "product": ops.linear_geglu,
    "convolution": enlarging_conv3x3,
}
OWN_KERNELS: Mapping[Kind, Callable[[], Mapping[str, Kernel]]] = {
    "norm": kernels.group_norms,
    "product": kernels.linear_geglus,
    "convolution": dict,
}


@dataclass(frozen=True)
class Case:
    """One shape. tensors: shape and dtype of each argument that has a batch, then of the weights; None where
    there is no shift or no bias. settings: the arguments after them. count: how often a network meets it."""

    what: str
    kind: Kind
    batched: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    weights: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    settings: tuple[Any, ...]
    work: Work
    count: int = 1


@dataclass(frozen=True)
class Candidate:
    """What computes a shape. run: what is timed. wrong: see `why_wrong`; the definition itself is never."""

    run: Callable[[], object]
    wrong: Callable[[], str] = lambda: ""


def cases(load: Workload, batch: int) -> list[Case]:
    """Every shape that a guided step and the decoder meet, for a batch of so many pictures."""
    seen = _Seen()
    unet, inputs = unet_on_meta(load.architecture, 2 * batch, load.height, load.width)
    decoder, latents = vae_decoder_on_meta(load.architecture, load.height, load.width)
    for network, given in ((unet, inputs), (decoder, latents)):
        use_group_norm(network, seen.group_norm)
        if isinstance(network, UNet):
            network.use_geglu(seen.linear_geglu)
            use_convolution(convert(network, fp8_convolutions(network)), seen.convolution)
        with torch.no_grad():
            network(*given)
    return list(seen.cases.values())


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """A row for the definition, and on a GPU for the compiler's kernel and each own one."""
    generator = torch.Generator(bench.device).manual_seed(0)
    batched, weights = (
        tuple(None if one is None else _random(*one, generator) for one in of)
        for of in (case.batched, case.weights)
    )
    rows = [
        _row(bench, case, name, candidate)
        for name, candidate in _candidates(bench.device, case, batched, (*weights, *case.settings)).items()
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


def _candidates(
    device: torch.device, case: Case, batched: tuple[Tensor | None, ...], rest: tuple[Any, ...]
) -> Mapping[str, Candidate]:
    definition = DEFINITIONS[case.kind]
    found = {"definition": Candidate(lambda: definition(*batched, *rest))}
    if device.type != "cuda":  # a compiler takes a minute there, and says nothing of a GPU
        return found
    found["compiler"] = _in_place(compiled_alone(definition), definition, batched, rest)
    if not kernels.why_none(device):
        for name, kernel in OWN_KERNELS[case.kind]().items():
            found[name] = _in_place(kernel, definition, batched, rest)
    if case.kind == "convolution" and not _without_fp8(device):
        found[OWN] = _in_fp8(batched, *rest)
    return found


def _in_place(
    kernel: Kernel, definition: Kernel, batched: tuple[Tensor | None, ...], rest: tuple[Any, ...]
) -> Candidate:
    """A kernel that computes what the definition does."""
    return Candidate(
        lambda: kernel(*batched, *rest),
        lambda: why_wrong(kernel(*batched, *rest), definition, batched, rest),
    )


def _without_fp8(device: torch.device) -> str:
    try:
        check_fp8(device, "another GPU is needed")
    except BackendError as error:
        return str(error)
    return kernels.why_none(device)


def _in_fp8(batched: tuple[Tensor | None, ...], weight: Tensor, *rest: Any) -> Candidate:
    """The own kernel, its rounding compiled. It is compared with what it computes, not with fp16."""
    outputs, inputs = weight.shape[:2]
    rows, scale = ops.quantised_rows(weight.permute(0, 2, 3, 1).flatten(1))
    given = rows.view(outputs, 9, inputs), scale[:, 0], *rest
    convolution = gathering(kernels.convolution_fp8())
    compiled = compiled_alone(convolution)

    def wrong() -> str:
        return why_wrong(convolution(*batched, *given), ops.conv3x3_fp8, batched, given, TOLERANCE)

    return Candidate(lambda: compiled(*batched, *given), wrong)


def _row(bench: Bench, case: Case, name: str, candidate: Candidate) -> dict[str, Any]:
    row: dict[str, Any] = {"side": name, "failed": None, "milliseconds": None, "roofline_share": None}
    try:
        with torch.no_grad(), compiling_alone():
            wrong = candidate.wrong()
            if wrong:
                return {**row, "failed": wrong}
            row["milliseconds"] = milliseconds(candidate.run, bench.device)
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
                "norm",
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
        self._note(Case(what, "product", (_like(x),), (_like(weight), _like(bias)), (), work))
        return out

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: list[int],
        size: list[int] | None,
    ) -> Tensor:
        """Given FP8, noted in fp16."""
        outputs, _, inputs = weight.shape
        sides = ops.conv3x3_sides(x.shape[2:] if size is None else size, stride, padding)
        out = x.new_empty(len(x), outputs, *sides)
        numbers = x.numel() + weight.numel() + out.numel()
        work = Work(2.0 * out.numel() * 9 * inputs, numbers * x.element_size())
        weights = ((outputs, inputs, 3, 3), x.dtype), None if bias is None else _like(bias)
        what = convolution_words(x, outputs, stride, size)
        self._note(Case(what, "convolution", (_like(x),), weights, (stride, padding, size), work))
        return out

    def _note(self, case: Case) -> None:
        known = self.cases.get(case.what)
        self.cases[case.what] = replace(case, count=known.count + 1) if known else case


def _like(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of unit variance, and a weight so that its product is too; an image's channels lie last."""
    tensor = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 2:
        tensor /= shape[1] ** 0.5
    if shape[2:] == (3, 3):
        tensor /= (9 * shape[1]) ** 0.5
    if len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.to(dtype)
