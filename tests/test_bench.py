"""`sdfast bench`: what is measured of an engine, and beside stock diffusers."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sdfast import bench as benchmark
from sdfast import timing
from sdfast.bench import Benchmark, Figure, bench, step_of
from sdfast.cli import main
from sdfast.errors import EngineError, RequestError
from sdfast.validation import reference
from tests.validation import engines

PARTS = ["prompts", "step", "decoding", "picture"]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "settle", lambda: None)


@pytest.mark.parametrize("engine", ["flat_engine", "sdxl_engine", "inpainting_engine", "controlled_engine"])
def test_every_part_of_a_picture_is_measured(engine: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(engine)
    done = bench(folder, steps=2, images=2, rounds=2, scheduler="euler")
    assert [figure.name for figure in done.figures] == PARTS
    assert all(len(figure.seconds) == 2 and not figure.reference for figure in done.figures)
    assert all(min(figure.seconds) > 0 for figure in done.figures if figure.name != "step")
    assert done.opened_seconds > 0 and done.peak_bytes is not None and done.peak_bytes > 2**20
    assert (done.setting["engine"], done.setting["images"]) == (folder.name, 2)


def test_what_is_told_is_what_was_drawn(flat_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture: prompts and steps anew each round, at the size and with as many images as asked."""
    drawn: list[Any] = []
    generate = benchmark.Pipeline.generate

    def seen(pipe: Any, request: Any, *rest: Any) -> Any:
        drawn.append(request)
        return generate(pipe, request, *rest)

    monkeypatch.setattr(benchmark.Pipeline, "generate", seen)
    asked = {"steps": 10, "images": 2, "guidance_scale": 1.0, "scheduler": "heun"}
    bench(flat_engine, size=(24, 32), rounds=1, **asked)  # type: ignore[arg-type]
    assert {(one.width, one.height, one.images, one.guidance_scale, one.scheduler) for one in drawn} == {
        (24, 32, 2, 1.0, "heun")
    }
    # twice each (one round does not count): a step's two runs, and the picture; a run of one step to decode
    assert sorted(one.num_inference_steps for one in drawn) == [1, 2, 2, 10, 10, 10, 10]


def test_stock_diffusers_is_measured_in_turn(flat_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def noted(name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawing(*given: Any, **how: Any) -> Any:
            turns.append(name)
            return draw(*given, **how)

        return drawing

    monkeypatch.setattr(benchmark.Pipeline, "generate", noted("own", benchmark.Pipeline.generate))
    monkeypatch.setattr(benchmark._Stock, "_draw", noted("stock", benchmark._Stock._draw))
    done = bench(flat_engine, steps=2, rounds=2, reference=True)
    figures = {figure.name: figure for figure in done.figures}
    assert [len(figures[name].reference) for name in PARTS] == [0, 2, 0, 2]
    assert min(figures["picture"].reference) > 0
    assert done.peak_bytes is None  # of both
    assert turns[-6:] == ["own", "stock", "own", "stock", "stock", "own"]


def test_stock_diffusers_draws_with_the_checkpoint_that_is_named(
    flat_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(flat_sd, tmp_path / "checkpoint")
    folder = engines.build(moved, tmp_path / "engine")
    elsewhere = moved.rename(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="--checkpoint"):
        bench(folder, steps=1, rounds=1, reference=True)
    drawn_with: list[Path] = []
    pipeline = reference.reference_pipeline

    def seen(checkpoint: Any, **how: Any) -> Any:
        drawn_with.append(checkpoint.folder)
        return pipeline(checkpoint, **how)

    monkeypatch.setattr(reference, "reference_pipeline", seen)
    done = bench(folder, steps=1, rounds=1, reference=True, checkpoint=elsewhere)
    assert drawn_with == [elsewhere] and done.notes == ()

    weights = elsewhere / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_out.bias"] += 0.3
    save_file(state, weights)
    command = ["bench", str(folder), "--steps", "1", "--rounds", "1", "--checkpoint", str(elsewhere)]
    told = CliRunner().invoke(main, [*command, "--reference"])
    assert "as asked, with weights that the engine was not exported from: vae/" in told.stdout, told.output
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1 and "give it with --reference" in refused.output


def test_ratios_are_of_the_same_round() -> None:
    figure = Figure("step", (1.0, 2.0, 4.0), (3.0, 2.0, 16.0), "it/s")
    assert figure.ratios == [3.0, 1.0, 4.0]
    told = figure.as_json()
    assert (told["median"], told["per_second"], told["ratio"]) == (2.0, 0.5, 3.0)
    done = Benchmark(SETTING, 0.5, (figure, Figure("picture", (1.0,))), peak_bytes=2**30)
    table = done.table()
    assert re.search(r"step +2\.00 s +1\.00 s to 4\.00 s +0\.5 it/s +3\.00 s +3\.00× +1\.00 to 4\.00", table)
    assert "opened in 500.00 ms" in table and "peak memory 1.00 GiB" in table


SETTING = {
    "engine": "e",
    "backend": "onnx",
    "dtype": "fp32",
    "size": "64x64",
    "images": 1,
    "steps": 20,
    "scheduler": "euler",
    "guidance_scale": 7.0,
    "device": "the processor, 2 threads",
    "rounds": 3,
}


def test_a_step_is_what_a_longer_run_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    clock = cycle([0.0, 1.0, 10.0, 15.0])  # 1 s, then 5 s
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert step_of(lambda steps, _output_type: drawn.append(steps), 20)() == 4.0 / 16
    assert drawn == [4, 20]


def test_the_command_prints_a_table_or_json(flat_engine: Path) -> None:
    command = ["bench", str(flat_engine), "--steps", "2", "--rounds", "1", "--count", "2"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "2 at a time, 2 steps of dpmpp_2m_karras, guidance 7" in shown.stdout
    assert all(re.search(rf"^{part} ", shown.stdout, re.MULTILINE) for part in PARTS)
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert [figure["name"] for figure in told["figures"]] == PARTS
    assert told["device"].startswith("the processor")


def test_one_step_has_no_difference_to_measure(flat_engine: Path) -> None:
    done = bench(flat_engine, steps=1, rounds=1)
    assert [figure.name for figure in done.figures] == ["prompts", "decoding", "picture"]


def test_what_cannot_be_measured_is_refused(flat_engine: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="rounds: 0, but at least 1"):
        bench(flat_engine, rounds=0)
    with pytest.raises(RequestError, match="num_inference_steps"):
        bench(flat_engine, steps=0)
    with pytest.raises(RequestError, match="63"):
        bench(flat_engine, size=(63, 64))
    with pytest.raises(EngineError):
        bench(tmp_path)
    refused = CliRunner().invoke(main, ["bench", str(flat_engine), "--size", "big"])
    assert refused.exit_code == 1 and "--size: 'big' is not WIDTHxHEIGHT" in refused.output
