"""Every kind of attention computes the definition where it runs, and is refused by name where it does not."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sdfast.backends import attention
from sdfast.backends.attention import KINDS, Attention, available
from sdfast.errors import BackendError, DependencyError
from sdfast.models import ops
from tests.backends import xformers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = {  # batch, queries, keys, channels, heads
    "self": (2, 64, 64, 80, 2),
    "cross": (1, 64, 77, 96, 3),
    "one head": (3, 16, 16, 32, 1),
}


def tokens(shape: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> list[torch.Tensor]:
    """q, k and v; the last two as slices of one tensor, as the networks have them."""
    batch, queries, keys, channels, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, queries, channels, generator=generator)
    kv = torch.randn(batch, keys, 2 * channels, generator=generator)
    return [t.to(device, dtype) for t in (q, *kv.chunk(2, dim=-1))]


def no_clock(run: Callable[[], object]) -> float:
    raise AssertionError("nothing is to be measured")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["sdpa", "flash", "math", "auto"])
@pytest.mark.parametrize("upcast", [False, True])
def test_a_kind_computes_the_definition(kind: str, shape: str, upcast: bool) -> None:
    q, k, v = tokens(shape)
    attend = Attention(kind, CPU, no_clock)
    out = attend(q, k, v, SHAPES[shape][-1], upcast)
    expected = ops.attention(q, k, v, SHAPES[shape][-1], upcast)
    assert out.shape == expected.shape
    assert torch.allclose(out, expected, atol=1e-5)
    assert attend.report() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upcast_attention_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = tokens("self", dtype)
    attend = Attention("math", CPU)
    assert attend(q, k, v, 2, True).dtype == dtype
    assert [shape.dtype for shape in attend.chosen] == [torch.float32]


@pytest.mark.parametrize("shape", SHAPES)
def test_xformers_computes_the_definition(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    xformers.install(monkeypatch)
    q, k, v = tokens(shape)
    out = Attention("xformers", CUDA)(q, k, v, SHAPES[shape][-1], False)
    expected = ops.attention(q, k, v, SHAPES[shape][-1], False)
    assert out.stride() == expected.stride()
    assert torch.allclose(out, expected, atol=1e-5)


def test_xformers_is_one_node_to_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    xformers.install(monkeypatch)
    q, k, v = tokens("cross")
    attend = Attention("xformers", CUDA)
    expected = attend(q, k, v, 3, False)  # now its shape is chosen
    nodes: list[str] = []

    def look(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., object]:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(attend, backend=look, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, 3, False), expected)
    assert sum("xformers_attention" in node for node in nodes) == 1


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_xformers_that_is_not_there_is_named_with_how_to_get_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    xformers.remove(monkeypatch)
    with pytest.raises(DependencyError, match=r'xformers .*pip install "sdfast\[xformers\]".*auto or sdpa'):
        Attention("xformers", device)


@pytest.mark.parametrize("kind", ["cudnn", "efficient", "xformers"])
def test_what_needs_a_gpu_is_refused_on_a_processor(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    xformers.install(monkeypatch)
    with pytest.raises(BackendError, match=f"{kind}' runs on CUDA alone.*choose one of: auto, sdpa, flash"):
        Attention(kind, CPU)


def test_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(BackendError, match="'fast' is not one of: auto, sdpa, flash"):
        Attention("fast", CPU)


def test_a_kernel_that_does_not_take_a_shape_is_refused_with_the_shape() -> None:
    """cuDNN's has no code for a processor's tensors, which is as good a reason as any."""
    message = r"'cudnn' does not take 3 heads of 32, 64 queries, 77 keys, float32 .*it takes float16 alone; "
    with pytest.raises(BackendError, match=message) as caught:
        Attention("cudnn", CUDA)(*tokens("cross"), 3, False)
    assert len(str(caught.value).splitlines()) == 1


def test_a_kernel_that_pytorch_would_not_use_on_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setitem(attention._CAN_USE, "flash", lambda params: asked.append(params.query.shape))
    with FakeTensorMode():
        q = torch.empty(2, 8, 64, 40, device=CUDA, dtype=torch.float16)
        with pytest.raises(BackendError, match=r"'flash' does not take 8 heads of 40.*\(PyTorch has no such"):
            Attention("flash", CUDA).kernel(q, q, q)
    assert asked == [(2, 8, 64, 40)]


@pytest.mark.parametrize("kind", ["flash", "cudnn", "efficient", "math"])
def test_the_kernels_of_a_gpu_are_called_as_pytorch_declares_them(kind: str) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 64, 8, 40, device=CUDA, dtype=torch.float16).transpose(1, 2)
        kv = torch.empty(2, 77, 8, 40, device=CUDA, dtype=torch.float16).transpose(1, 2)
        out = attention._ON["cuda"][kind](q, kv, kv)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")


class Clock:
    """Gives each run that works the next of some times."""

    def __init__(self, *milliseconds: float) -> None:
        self.left = list(milliseconds)

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        return self.left.pop(0)


def test_auto_takes_the_fastest_of_those_that_run_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor's tensors only two of the candidates of a GPU have code: sdpa and the stand-in."""
    xformers.install(monkeypatch)
    clock = Clock(3.0, 2.0, 0.5, 0.75)
    attend = Attention("auto", CUDA, clock)
    for _ in range(2):
        for shape in ("cross", "self"):
            q, k, v = tokens(shape)
            heads = SHAPES[shape][-1]
            assert torch.allclose(
                attend(q, k, v, heads, False), ops.attention(q, k, v, heads, False), atol=1e-5
            )
    assert clock.left == []  # each shape once
    assert [choice.kind for choice in attend.chosen.values()] == ["xformers", "sdpa"]
    assert attend.report() == [
        "attention of 3 heads of 32, 64 queries, 77 keys, float32: "
        "xformers (xformers 2.000 ms, sdpa 3.000 ms)",
        "attention of 2 heads of 40, 64 queries, 64 keys, float32: sdpa (sdpa 0.500 ms, xformers 0.750 ms)",
    ]


def test_the_batch_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a row's picture would depend on the rows beside it."""
    xformers.remove(monkeypatch)
    attend = Attention("auto", CUDA, Clock(1.0))
    q, k, v = tokens("self")
    together = attend(q, k, v, 2, False)
    assert torch.allclose(attend(q[:1], k[:1], v[:1], 2, False), together[:1], atol=1e-6)
    assert [choice.kind for choice in attend.chosen.values()] == ["sdpa"]


def test_auto_says_when_nothing_takes_a_shape() -> None:
    def broken(run: Callable[[], object]) -> float:
        raise RuntimeError("no kernel")

    with pytest.raises(BackendError, match="'auto': nothing here takes 3 heads of 32"):
        Attention("auto", CUDA, broken)(*tokens("cross"), 3, False)


def test_a_shape_that_many_threads_meet_at_once_is_measured_once() -> None:
    clock = Clock(1.0)
    attend = Attention("auto", CUDA, clock)
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(attend(*tokens("cross"), 3, False))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


def test_threads_with_different_kinds_do_not_choose_for_each_other() -> None:
    """PyTorch's own switches would: they hold for the whole process."""
    q, k, v = tokens("self")
    attends = {kind: Attention(kind, CPU) for kind in ("flash", "math")}
    expected = {kind: attend(q, k, v, 2, False) for kind, attend in attends.items()}
    assert not torch.equal(expected["flash"], expected["math"])
    wrong: list[str] = []

    def work(kind: str) -> None:
        for _ in range(100):
            if not torch.equal(attends[kind](q, k, v, 2, False), expected[kind]):
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("flash", "math") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_available_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    xformers.remove(monkeypatch)
    assert available(CPU) == ["auto", "sdpa", "flash", "math"]


def test_the_command_line_names_the_same_kinds() -> None:
    from sdfast.cli.options import ATTENTION

    assert ATTENTION == KINDS


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_computes_the_definition_on_a_gpu(kind: str, shape: str) -> None:
    if kind not in available(CUDA):
        pytest.skip(f"this machine has no {kind} attention")
    q, k, v = tokens(shape, torch.float16, CUDA)
    heads = SHAPES[shape][-1]
    attend = Attention(kind, CUDA)
    truth = ops.attention(q.float(), k.float(), v.float(), heads, False)
    for _ in range(2):
        error = (attend(q, k, v, heads, False).float() - truth).abs().max()
        assert error < 2e-3
    [choice] = attend.chosen.values()
    assert choice.kind == kind or (kind == "auto" and choice.measured)
