"""Own kernels are taken where they are right and faster, and nowhere else. On stand-ins: no GPU is needed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdfast.errors import ExportError
from sdfast.export import kernels
from sdfast.export.choices import Choices
from sdfast.export.kernels import OwnKernels, compiled_alone, why_wrong
from sdfast.models import ops

Kernel = Callable[..., Tensor]


def right(*arguments: Any) -> Tensor:
    return ops.normalised(*arguments)


def skewed(*arguments: Any) -> Tensor:
    """Wrong in one number of the last picture."""
    y = ops.normalised(*arguments).clone()
    y[-1, -1, -1, -1] += 0.1
    return y


def broken(*arguments: Any) -> Tensor:
    raise RuntimeError("out of resources: shared memory")


def not_a_number(*arguments: Any) -> Tensor:
    return ops.normalised(*arguments) * float("nan")


def gated(*arguments: Any) -> Tensor:
    return ops.linear_geglu(*arguments)


class Timer:
    """Milliseconds of a run by what it calls: the stand-ins of the kernels call `touch` with their names."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = {name.replace("_", " "): time for name, time in milliseconds.items()}
        self.timed: list[str] = []
        self.name = ""

    def named(self, name: str, kernel: Kernel) -> Kernel:
        def call(*arguments: Any) -> Tensor:
            self.name = name
            return kernel(*arguments)

        return call

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        self.timed.append(self.name)
        return self.milliseconds[self.name]


class Bench:
    """What decides, on stand-ins."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, timer: Timer, **own: Kernel) -> None:
        self.timer, self.path, self.said = timer, folder / "choices.json", list[str]()
        self.own = {f"triton {name}": timer.named(f"triton {name}", kernel) for name, kernel in own.items()}
        self.compiled: list[Kernel] = []
        patch.setattr(kernels, "compiled_alone", self._compile)

    def _compile(self, definition: Kernel) -> Kernel:
        self.compiled.append(definition)
        return self.timer.named("compiler", definition)

    def decider(self, machine: str = "GPU") -> OwnKernels:
        norms = {name: kernel for name, kernel in self.own.items() if "gated" not in name}
        products = {name: kernel for name, kernel in self.own.items() if "gated" in name}
        memory = Choices(self.path, machine, self.said.append)
        return OwnKernels(norms, products, self.timer, memory, self.said.append)


def image(channels: int = 8, side: int = 4, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(batch, channels, side, side, generator=generator).to(dtype)


def normalise(own: OwnKernels, x: Tensor, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    weight, bias = torch.linspace(0.5, 1.5, x.shape[1]), torch.linspace(-1, 1, x.shape[1])
    return own.group_norm(x, shift, weight.to(x.dtype), bias.to(x.dtype), 4, 1e-5, silu)


def normalised(x: Tensor, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    weight, bias = torch.linspace(0.5, 1.5, x.shape[1]), torch.linspace(-1, 1, x.shape[1])
    return ops.normalised(x, shift, weight.to(x.dtype), bias.to(x.dtype), 4, 1e-5, silu)


def test_the_fastest_is_taken_for_each_shape_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timer = Timer(triton_whole=0.01, triton_parts=0.02, compiler=0.03, triton_gated=0.5)
    bench = Bench(monkeypatch, tmp_path, timer, whole=right, parts=right, gated=gated)
    own, x, shift = bench.decider(), image(), torch.randn(2, 8)
    assert torch.allclose(normalise(own, x), normalised(x), atol=1e-5)
    timer.milliseconds |= {"triton whole": 0.09}
    assert torch.allclose(normalise(own, x, shift), normalised(x, shift), atol=1e-5)
    timer.milliseconds |= {"triton parts": 0.08}
    assert torch.allclose(normalise(own, x, silu=False), normalised(x, silu=False), atol=1e-5)
    tokens, weight, bias = torch.randn(3, 5, 8), torch.randn(12, 8), torch.randn(12)
    assert torch.equal(own.linear_geglu(tokens, weight, bias), ops.linear_geglu(tokens, weight, bias))
    assert own.report() == [
        "group norm + SiLU of 8 channels in 4 groups, 4x4, float32: "
        "triton whole (triton whole 0.010 ms, triton parts 0.020 ms, compiler 0.030 ms), in a batch of 2",
        "shifted group norm + SiLU of 8 channels in 4 groups, 4x4, float32: "
        "triton parts (triton parts 0.020 ms, compiler 0.030 ms, triton whole 0.090 ms), in a batch of 2",
        "group norm of 8 channels in 4 groups, 4x4, float32: "
        "compiler (compiler 0.030 ms, triton parts 0.080 ms, triton whole 0.090 ms), in a batch of 2",
        "GEGLU of 5 tokens, 8 to 6 channels, float32: "
        "compiler (compiler 0.030 ms, triton gated 0.500 ms), in a batch of 3",
    ]
    assert bench.said == []
    bench.timer.name = ""
    normalise(own, x)
    assert bench.timer.name == "triton whole"  # what computes it from now on
    bench.timer.name = ""
    normalise(own, x, silu=False)
    assert bench.timer.name == ""  # the definition, which the compiler gets to see


@pytest.mark.parametrize(("milliseconds", "taken"), [(0.96, "compiler"), (0.95, "triton whole")])
def test_an_own_kernel_has_to_win_by_a_margin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, milliseconds: float, taken: str
) -> None:
    bench = Bench(monkeypatch, tmp_path, Timer(triton_whole=milliseconds, compiler=1.0), whole=right)
    own = bench.decider()
    normalise(own, image())
    assert f": {taken} (" in own.report()[0]
    assert own.uses_own() is (taken != "compiler")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (skewed, r"differs from the definition by a share of 0\.0\d+, and rounding by at most 5e-05"),
        (not_a_number, "differs from the definition by a share of nan"),
        (broken, "it fails: out of resources"),
        (lambda *a: right(*a).half(), r"it gives float16 \[2, 8, 4, 4\]"),
        (lambda *a: right(*a)[:, :4], r"it gives the shape \[2, 4, 4, 4\]"),
    ],
)
def test_a_wrong_kernel_is_left_out_loudly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: Kernel, reason: str
) -> None:
    """However fast it is; and it is told again by an export that only remembers."""
    timer = Timer(triton_whole=0.001, triton_parts=0.5, compiler=1.0)
    bench = Bench(monkeypatch, tmp_path, timer, whole=wrong, parts=right)
    for _ in range(2):
        own = bench.decider()
        assert torch.allclose(normalise(own, image()), normalised(image()), atol=1e-5)
        [line] = own.report()
        assert ": triton parts (triton parts 0.500 ms, compiler 1.000 ms)" in line
        assert "; LEFT OUT: triton whole, for it" in line
        assert len(bench.said) == 1 and "'triton whole' is left out: " in bench.said[0]
        assert re.search(reason, bench.said[0])
        bench.said.clear()
    assert timer.timed == ["triton parts", "compiler"]


def test_where_nothing_is_right_the_compiler_is_not_even_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(monkeypatch, tmp_path, Timer(), whole=skewed)
    own = bench.decider()
    assert torch.equal(normalise(own, image()), normalised(image()))
    assert bench.compiled == [] and not own.uses_own()
    assert ": compiler; LEFT OUT: triton whole" in own.report()[0]


def test_what_was_decided_is_remembered_for_any_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is measured or compiled for it again, though the times would now say otherwise."""
    timer = Timer(triton_whole=0.1, compiler=1.0)
    bench = Bench(monkeypatch, tmp_path, timer, whole=right)
    first = bench.decider()
    normalise(first, image(batch=4))
    timer.milliseconds |= {"triton whole": 9.0}
    second = bench.decider()
    normalise(second, image(batch=1))
    assert second.report() == first.report()
    assert len(timer.timed) == 2 and len(bench.compiled) == 1
    normalise(bench.decider("another GPU"), image())
    assert len(timer.timed) == 4


def test_a_definition_that_cannot_be_compiled_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(monkeypatch, tmp_path, Timer(triton_whole=0.1), whole=right)
    monkeypatch.setattr(kernels, "compiled_alone", lambda _: broken)
    with pytest.raises(ExportError, match=r"group norm .* out of resources.*export with --kernels compiler"):
        normalise(bench.decider(), image())


def test_rounding_is_no_error_and_more_than_that_is() -> None:
    weight, bias = torch.randn(64).half(), torch.randn(64).half()
    x = image(64, 8, 3, torch.float16) * 20 + 100
    rest = (weight, bias, 8, 1e-5, True)
    exact = ops.normalised(x.double(), None, weight.double(), bias.double(), *rest[2:])
    assert why_wrong(exact.half(), ops.normalised, (x, None), rest) == ""
    assert why_wrong(exact.half() * 1.01, ops.normalised, (x, None), rest)
    assert why_wrong(exact.half()[[0, 2, 1]], ops.normalised, (x, None), rest)
    tokens, matrix, offset = (
        torch.randn(2, 7, 320).half(),
        (torch.randn(64, 320) / 18).half(),
        torch.randn(64).half(),
    )
    product = ops.linear_geglu(tokens.double(), matrix.double(), offset.double()).half()
    assert why_wrong(product, ops.linear_geglu, (tokens,), (matrix, offset)) == ""
    value, gate = (tokens.float() @ matrix.float().T + offset.float()).chunk(2, dim=-1)
    assert why_wrong(  # the sigmoid in place of the error function
        (value * gate * torch.sigmoid(1.702 * gate)).half(), ops.linear_geglu, (tokens,), (matrix, offset)
    )


@pytest.mark.slow
def test_the_compiler_compiles_every_shape_and_not_only_the_first_eight() -> None:
    """By itself it gives up on a function after eight, and then runs it uncompiled."""
    shapes = [image(8, side) for side in range(3, 13)]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=kernels.SHAPES):
        for x in shapes:
            compiled = compiled_alone(ops.normalised)
            out = compiled(x, None, torch.ones(8), torch.zeros(8), 4, 1e-5, True)
            assert torch.allclose(out, ops.normalised(x, None, torch.ones(8), torch.zeros(8), 4, 1e-5, True))
