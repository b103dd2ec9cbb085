"""Engines with own kernels, on stand-ins: what was measured is what is traced, compiled once and told."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdfast import kernels
from sdfast.backends import clock
from sdfast.backends.inductor import Code, Inductor
from sdfast.backends.measured import Measured
from sdfast.backends.target import this_machine
from sdfast.errors import ExportError
from sdfast.export import inductor
from sdfast.export.checkpoint import resolve
from sdfast.export.code_store import CodeStore
from sdfast.export.inductor import Compiler, _Chosen, _Rounded
from sdfast.export.kernels import OwnKernels, use_own
from sdfast.export.modules import Form, ModuleSpec, module_specs
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.export.tracing import traced_with
from sdfast.manifest import Span
from sdfast.models import ops
from sdfast.models.layers import Conv3x3, GroupNorm, use_group_norm
from tests.models.conftest import randomise

CPU = torch.device("cpu")


class Blocks(nn.Module):
    """Every kind of group norm that the networks have, around a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GroupNorm(16, 4, 1e-5, silu=True), GroupNorm(16, 4, 1e-5, silu=True)
        self.conv, self.last = Conv3x3(16, 16), GroupNorm(16, 4, 1e-6)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:  # x [B, 16, H, W], shift [B, 16]
        y: torch.Tensor = self.last(self.second(self.conv(self.first(x)), shift))
        return y


def blocks() -> ModuleSpec:
    network = randomise(Blocks(), 0)
    given = {"x": torch.randn(2, 16, 8, 8), "shift": torch.randn(2, 16)}
    forms = (Form(Span.exactly(2)),)
    return ModuleSpec("blocks", lambda: network, lambda *_: given, {}, ("y",), (), forms)


@torch.library.custom_op("sdfast_tests::group_norm", mutates_args=())
def own_group_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    y = ops.normalised(x, shift, weight, bias, groups, eps, silu)
    return y.clone(memory_format=torch.channels_last)


@own_group_norm.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Stand-ins of the own kernels, which run on a processor; what each takes."""
    times = {"own": 1.0, "compiler": 2.0}
    monkeypatch.setattr(kernels, "why_none", lambda device: "")
    monkeypatch.setattr(kernels, "group_norms", lambda: {"own": own_group_norm})
    monkeypatch.setattr(kernels, "linear_geglus", dict)
    monkeypatch.setattr("sdfast.export.kernels.compiled_alone", lambda definition: definition)

    def time(run: Any, _: torch.device) -> float:
        run()
        return times["own" if run.__defaults__ else "compiler"]

    monkeypatch.setattr(clock, "milliseconds", time)
    return times


def graph_of(compiler: Compiler, spec: ModuleSpec) -> str:
    network = spec.load()
    inputs, _ = traced_with(spec, spec.forms[0])
    compiler._choose(network, inputs, _Rounded(), fixed=True)
    return str(inductor._trace(network, inputs, {}).graph)


def test_an_own_kernel_is_traced_where_it_is_faster_and_wanted(
    tmp_path: Path, own_kernels: dict[str, float]
) -> None:
    spec, here = blocks(), this_machine(CPU)

    def graph(name: str, **settings: Any) -> str:
        return graph_of(
            Compiler(here, **{"autotune": True, "store": CodeStore(tmp_path / name), **settings}), spec
        )

    faster = graph("faster")
    norms = faster.count("sdfast_tests.group_norm")
    assert norms == 3 and "aten.group_norm" not in faster
    for other in (
        graph("not wanted", own_kernels=False),
        graph("not tuned", autotune=False),
    ):
        assert "sdfast_tests" not in other and other.count("aten.group_norm") == norms
    own_kernels["own"] = 1.99
    assert "sdfast_tests" not in graph("hardly faster")
    assert graph("faster") == faster


def test_an_engine_with_own_kernels_is_compiled_once_and_says_so(
    tmp_path: Path, own_kernels: dict[str, float], compiled: list[str]
) -> None:
    """Another export asks nobody, and the numbers are the definition's."""
    spec, said = blocks(), list[str]()
    codes, taken = [], []
    for number in (1, 2):
        place = tmp_path / str(number)
        place.mkdir()
        compiler = Compiler(this_machine(CPU), True, CodeStore(tmp_path / "store"), say=said.append)
        [variant] = compiler.compile(spec, place).variants
        taken.append(variant.kernels)
        codes.append((place / "blocks.json").read_text("utf-8"))
        own_kernels["own"] = 5.0
    assert compiled == ["blocks"]
    assert codes[0] == codes[1]
    told = Code.model_validate_json(codes[0]).kernels
    assert told and all(": own (own 1.000 ms, compiler 2.000 ms), in a batch of 2" in line for line in told)
    assert {line.partition(":")[0]: "own" for line in told} == taken[0] == taken[1]
    assert said == []
    inputs = spec.inputs(2, 8, 8)
    ours = Inductor(CPU).load(tmp_path / "1" / "blocks.pt2")(inputs)["y"]
    network = spec.load()
    use_group_norm(network, ops.normalised)
    truth = network(*inputs.values())
    assert torch.linalg.norm(ours - truth) <= 1e-5 * torch.linalg.norm(truth)


class Recalled:
    """A memory that has every shape computed by the first own kernel of a name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def recall(self, what: str, kinds: Collection[str]) -> Measured | None:
        return Measured(next(one for one in kinds if one.startswith(self.kind)), {}, rows=1)

    def keep(self, what: str, measured: Measured, kinds: Collection[str]) -> Measured:
        raise AssertionError(f"{what} is known, and was measured")


@pytest.mark.parametrize("kind", ["triton whole", "triton parts"])
def test_the_real_kernels_are_traced_into_a_network(kind: str) -> None:
    """Their numbers are shown elsewhere; here, that a network with them can be exported."""
    pytest.importorskip("triton")
    spec = blocks()
    network = spec.load()

    def clock_of_none(run: object) -> float:
        raise AssertionError("nothing is to be measured")

    chosen = OwnKernels(kernels.group_norms(), {}, clock_of_none, Recalled(kind), print)
    use_own(network, chosen)
    graph = str(inductor._trace(network, spec.inputs(2, 8, 8), {}).graph)
    assert graph.count("sdfast_triton.group_norm_" + kind.split()[1]) == 3
    assert "aten.group_norm" not in graph
    assert chosen.uses_own() and len(chosen.report()) == 3


def test_changed_kernels_are_other_code(
    tmp_path: Path, own_kernels: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are measured anew: their names alone, which are what a graph shows, do not tell."""
    spec, keys = blocks(), list[str]()

    class Store(CodeStore):
        def fill(self, key: str, targets: Any, compile_now: Any) -> None:
            keys.append(key)
            raise KeyboardInterrupt

    for version in ("1", "2"):
        monkeypatch.setattr(inductor, "own_version", lambda version=version: version)
        for wanted in (True, False):
            with pytest.raises(KeyboardInterrupt):
                Compiler(this_machine(CPU), True, Store(tmp_path), wanted).compile(spec, tmp_path)
    assert keys[0] != keys[2]
    assert keys[1] == keys[3]
    machines = json.loads((tmp_path / "choices.json").read_text("utf-8"))["choices"]
    assert sorted(name.rpartition(" ")[2] for name in machines) == ["1", "2"]


@pytest.mark.parametrize("milliseconds", [1.0, 3.0])
def test_code_that_cannot_be_compiled_with_own_kernels_may_be_without(
    tmp_path: Path,
    own_kernels: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    milliseconds: float,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("ptxas is not there")

    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    own_kernels["own"] = milliseconds
    with pytest.raises(ExportError, match="ptxas is not there") as caught:
        Compiler(this_machine(CPU), True, CodeStore(tmp_path)).compile(blocks(), tmp_path)
    advised = str(caught.value).endswith("; it has own kernels: export with --kernels compiler")
    assert advised is (milliseconds < 2.0)


def test_the_largest_batch_decides_for_all(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_kernels: dict[str, float]
) -> None:
    """Whichever a recipe names first. The manifest has the recipe's order, and the choices."""
    recipe = Recipe.make(backend="inductor", sizes=["64x64"], batch=[1, 2])
    spec = module_specs(Networks.of(resolve(tiny_sd)), recipe)[0]
    order: list[str] = []

    def form(
        _self: Compiler, spec: ModuleSpec, form: Form, network: nn.Module, rounded: _Rounded, path: Path
    ) -> Any:
        order.append(path.stem)
        chosen = _Chosen((), (), {"attention": path.stem}, {"norm": path.stem}, own=True)
        return Code(module="unet", inputs=(), outputs=(), constants={}, literals={}), chosen

    monkeypatch.setattr(Compiler, "_form", form)
    variants = Compiler(this_machine(CPU), True, CodeStore(tmp_path)).compile(spec, tmp_path).variants
    assert order == ["unet-64x64-b4", "unet-64x64-b2", "unet-64x64-b1"]
    assert [(form.file, form.attention, form.kernels) for form in variants] == [
        (f"{name}.pt2", {"attention": name}, {"norm": name})
        for name in ("unet-64x64-b1", "unet-64x64-b2", "unet-64x64-b4")
    ]


def test_own_kernels_are_not_tried_where_they_cannot_run(tmp_path: Path) -> None:
    """On this processor, without stand-ins."""
    assert "NVIDIA" in kernels.why_none(CPU)
    spec = blocks()
    graph = graph_of(Compiler(this_machine(CPU), autotune=True, store=CodeStore(tmp_path)), spec)
    assert "aten.group_norm" in graph
    assert not (tmp_path / "choices.json").exists()
