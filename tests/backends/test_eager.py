"""Eager engines: compiled when that is asked for, and told; attention by the kind that was named."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdfast.backends import eager
from sdfast.backends.eager import TorchCompiledModule
from sdfast.engine import Engine
from sdfast.errors import BackendError, DependencyError
from sdfast.models import ops
from sdfast.pipeline import Pipeline
from tests.backends import xformers

RUN: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces, and runs what it traced as it is: Inductor takes a minute for what this shows."""
    torch._dynamo.reset()
    monkeypatch.setattr(eager, "_COMPILER", "eager")


def draw(pipe: Pipeline, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe("a cabin", **{**RUN, **options}).images
    return images


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said, without the seconds."""
    lines = capsys.readouterr().err.splitlines()
    return [line.partition(" in ")[0] if "compiled" in line else line.partition(",")[0] for line in lines]


class Net(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Untraceable(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def compiled(network: nn.Module) -> TorchCompiledModule:
    return TorchCompiledModule("net", network.eval().requires_grad_(False), ("y",))


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_engine_draws_the_same_and_compiles_before_the_first_step(
    flat_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = draw(Pipeline.from_engine(flat_engine))
    pipe = Pipeline.from_engine(flat_engine, compile=True)
    assert told(capsys) == []
    steps: list[list[str]] = []

    def look(*_: Any) -> dict[str, torch.Tensor]:
        steps.append(told(capsys))
        return {}

    assert torch.equal(draw(pipe, callback_on_step_end=look), expected)
    before, *later = steps
    assert before == [
        "sdfast: compiling vae_decoder for latents 1x4x8x8",
        "sdfast: compiled vae_decoder",
        "sdfast: compiling unet for sample 2x4x8x8",
        "sdfast: compiled unet",
    ]
    assert later
    assert not any(later)
    draw(pipe)
    assert told(capsys) == []
    draw(pipe, height=32)
    assert "sdfast: compiling unet for sample 2x4x16x8" in told(capsys)


@pytest.mark.usefixtures("dynamo")
def test_latents_need_no_decoder(flat_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Pipeline.from_engine(flat_engine, compile=True), output_type="latent")
    assert not [line for line in told(capsys) if "vae" in line]


@pytest.mark.usefixtures("dynamo")
def test_more_shapes_than_dynamo_takes_by_itself_are_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    module = compiled(Net(2.0))
    for _ in range(2):
        for n in range(2, 14):
            assert torch.equal(module({"x": torch.ones(n)})["y"], torch.full((n,), 2.0))
    assert told(capsys)[::2] == [f"sdfast: compiling net for x {n}" for n in range(2, 14)]


@pytest.mark.usefixtures("dynamo")
def test_two_compiled_modules_of_one_class_keep_their_own_weights() -> None:
    x = {"x": torch.ones(3)}
    two, five = compiled(Net(2.0)), compiled(Net(5.0))
    for _ in range(2):
        assert two(x)["y"].tolist() == [2.0] * 3
        assert five(x)["y"].tolist() == [5.0] * 3


@pytest.mark.usefixtures("dynamo")
def test_threads_compile_a_shape_once(capsys: pytest.CaptureFixture[str]) -> None:
    module, results = compiled(Net(2.0)), []
    threads = [
        threading.Thread(target=lambda: results.append(module({"x": torch.ones(7)})["y"].sum().item()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [14.0] * 6
    assert told(capsys) == ["sdfast: compiling net for x 7", "sdfast: compiled net"]


@pytest.mark.usefixtures("dynamo")
def test_what_cannot_be_traced_is_one_line() -> None:
    with pytest.raises(
        BackendError, match=r"net: torch\.compile failed: .*run the engine without compile"
    ) as e:
        compiled(Untraceable(2.0))({"x": torch.ones(3)})
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.usefixtures("dynamo")
def test_what_the_compiler_says_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any) -> Callable[..., Any]:
        raise RuntimeError("No working C++ compiler found in: g++\nand a page more")

    monkeypatch.setattr(eager, "_COMPILER", no_compiler)
    with pytest.raises(BackendError) as caught:
        compiled(Net(2.0))({"x": torch.ones(3)})
    assert str(caught.value).startswith(
        "net: torch.compile failed: No working C++ compiler found in: g++; it"
    )
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.usefixtures("dynamo")
def test_a_mistake_of_the_caller_is_not_the_compilers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError):
        compiled(Net(2.0))({"z": torch.ones(3)})
    assert told(capsys) == []


@pytest.mark.slow
def test_inductor_draws_the_same_picture(sd_engine: Path) -> None:
    torch._dynamo.reset()
    expected = draw(Pipeline.from_engine(sd_engine))
    images = draw(Pipeline.from_engine(sd_engine, compile=True, attention="flash"))
    assert (images - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["sdpa", "flash", "math", "auto"])
def test_an_engine_with_another_attention_draws_the_same(sd_engine: Path, kind: str) -> None:
    engine = Engine.open(sd_engine, attention=kind)
    assert (draw(Pipeline(engine)) - draw(Pipeline.from_engine(sd_engine))).abs().max() < 1e-4
    assert engine.attention is not None
    assert {shape.keys for shape in engine.attention.chosen} == {16, 77}
    assert {c.kind for c in engine.attention.chosen.values()} == {"sdpa" if kind == "auto" else kind}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_engines_of_one_process_keep_their_own_attention(flat_engine: Path, compile: bool) -> None:
    expected = {kind: draw(Pipeline.from_engine(flat_engine, attention=kind)) for kind in ("flash", "math")}
    assert not torch.equal(expected["flash"], expected["math"])
    pipes = {
        kind: Pipeline.from_engine(flat_engine, attention=kind, compile=compile) for kind in ("flash", "math")
    }
    for kind in ("flash", "math", "flash"):
        assert torch.equal(draw(pipes[kind]), expected[kind])


def test_the_networks_of_other_engines_keep_the_definition(sd_engine: Path) -> None:
    Engine.open(sd_engine, attention="math", load=True)
    engine = Engine.open(sd_engine, load=True)
    assert engine.attention is None
    [unet] = [m._network for f, m in engine._loaded.items() if f.startswith("unet")]  # type: ignore[attr-defined]
    assert {m.attend for m in unet.modules() if hasattr(m, "attend")} == {ops.attention}


def test_an_engine_that_moves_is_opened_as_it_was(sd_engine: Path) -> None:
    engine = Engine.open(sd_engine, threads=1, compile=True, attention="math").moved(torch.device("cpu"))
    assert (engine.threads, engine.compile, engine.running_as) == (1, True, ["compiled", "attention math"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "compile is for eager engines, and this one is onnx: it was compiled when"),
        (
            {"attention": "flash"},
            "attention 'flash' is for eager engines, and this one is onnx: its attention",
        ),
        ({"attention": "xformers"}, "attention 'xformers' is for eager engines"),
    ],
)
def test_an_engine_with_nothing_to_choose_refuses_the_choice(
    says_onnx: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        Engine.open(says_onnx, **options)
    assert "sdfast export SOURCE --backend eager" in str(caught.value)


def test_from_pretrained_refuses_to_compile_before_it_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDFAST_CACHE", str(tmp_path))
    with pytest.raises(BackendError, match="compile is for eager engines"):
        Pipeline.from_pretrained("landscapes", compile=True)
    assert not list(tmp_path.iterdir())


def test_xformers_that_is_not_there_is_told_when_the_engine_is_opened(
    sd_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xformers.remove(monkeypatch)
    with pytest.raises(DependencyError, match=r'pip install "sdfast\[xformers\]"'):
        Engine.open(sd_engine, attention="xformers")
