"""The comparison with peers: its channel, rounds, environments and tables. No peer is installed here."""

import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks import machine, random_weights
from benchmarks.peers import environments, outputs, sides, worker
from benchmarks.peers.__main__ import Bench, _task, for_every_version
from benchmarks.peers.channel import Worker, WorkerError, answer_all
from benchmarks.peers.environments import ENVIRONMENTS, Environment, InstallError
from benchmarks.peers.report import Opened, measures, properties
from benchmarks.peers.rounds import Comparison, Rounds, compared, order
from benchmarks.peers.sides import SIDES, InParts, Measured, StableDiffusionCpp
from benchmarks.peers.task import ASKED, MEASURES, Task
from sdfast.export.checkpoint import resolve

REPOSITORY = Path(__file__).parents[2]


def answering(tmp_path: Path, body: str) -> Worker:
    """A process that answers with the function `answer` of `body`."""
    script = f"""
import os, sys
from benchmarks.peers.channel import answer_all, own_stdout
{textwrap.dedent(body)}
answer_all(answer, sys.stdin, own_stdout())
"""
    return Worker([sys.executable, "-c", script], log=tmp_path / "log", folder=REPOSITORY)


def test_a_worker_answers_and_what_libraries_print_is_no_answer(tmp_path: Path) -> None:
    worker = answering(
        tmp_path,
        """
        def answer(question):
            os.system("echo a library speaks")
            print("so does another", flush=True)
            if question["do"] == "fail":
                raise ValueError("no such thing\\nas this")
            if question["do"] == "end":
                print("it is over", file=sys.stderr, flush=True)
                os._exit(3)
            return {"twice": 2 * question["number"]}
        """,
    )
    assert worker.ask(do="double", number=4) == {"twice": 8}
    with pytest.raises(WorkerError, match=r"^ValueError: no such thing$"):
        worker.ask(do="fail")
    assert worker.ask(do="double", number=1) == {"twice": 2}
    with pytest.raises(WorkerError, match="ended with status 3: it is over"):
        worker.ask(do="end")
    with pytest.raises(WorkerError, match="ended with status 3"):
        worker.ask(do="double", number=1)
    worker.close()


def test_a_worker_that_fails_unasked_says_why(tmp_path: Path) -> None:
    failing = Worker(
        [sys.executable, "-c", "raise SystemExit('no room')"], log=tmp_path / "log", folder=tmp_path
    )
    with pytest.raises(WorkerError, match="status 1: no room"):
        failing.finish()
    Worker([sys.executable, "-c", ""], log=tmp_path / "log", folder=tmp_path).finish()


def test_every_question_has_one_answer() -> None:
    answers = StringIO()
    answer_all(lambda asked: {"n": 1 / asked["n"]}, StringIO('{"n": 2}\n{"n": 0}\n{"n": 4}\n'), answers)
    told = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert told[0] == {"n": 0.5} and told[2] == {"n": 0.25}
    assert told[1]["error"].startswith("ZeroDivisionError")


class Clockwork:
    """A side whose every measure takes `seconds`, until it fails at `fails`."""

    def __init__(self, name: str, seconds: float, asked: list[tuple[str, str]], fails: str = "") -> None:
        self._name, self._seconds, self._asked, self._fails = name, seconds, asked, fails

    def ask(self, **question: Any) -> dict[str, Any]:
        self._asked.append((self._name, question["do"]))
        if question["do"] == self._fails:
            raise WorkerError("out of memory")
        step = self._seconds / 10 if question["do"] == "picture" else None
        return {"seconds": self._seconds, "step_seconds": step, "idle": self._seconds / 100}


def test_sides_are_measured_in_turn_and_compared_round_by_round() -> None:
    asked: list[tuple[str, str]] = []
    turns = {name: Clockwork(name, n, asked) for name, n in (("sdfast", 2.0), ("a", 3.0), ("b", 5.0))}
    measuring = Rounds(list(turns), lambda message: None)
    seconds = measuring.together(turns, {**dict.fromkeys(ASKED, 2), "picture": 1})
    texts = [name for name, measure in asked if measure == "text"]
    assert texts == [
        "b",
        "sdfast",
        "a",
        "sdfast",
        "a",
        "b",
        "a",
        "b",
        "sdfast",
    ]  # the first three do not count
    assert seconds["text"] == {"sdfast": [2.0] * 2, "a": [3.0] * 2, "b": [5.0] * 2}
    assert seconds["step"] == {"sdfast": [0.2], "a": [0.3], "b": [0.5]}
    assert measuring.idle == {"sdfast": 0.02, "a": 0.03, "b": 0.05}
    figures = {(one.measure, one.side): one for one in compared(seconds)}
    assert figures.keys() == {(measure, side) for measure in MEASURES for side in turns}
    assert (figures["unet", "b"].ratio, figures["picture", "b"].rounds) == (2.5, 1)


def test_a_side_is_seen_to_sleep_only_while_another_is_measured() -> None:
    """The last of a round may be the first of the next: what it did between the two says nothing."""
    asked: list[tuple[str, str]] = []

    class Busy(Clockwork):
        def ask(self, **question: Any) -> dict[str, Any]:
            in_a_row = asked and asked[-1][0] == self._name
            return {**super().ask(**question), "idle": 0.9 if in_a_row else 0.01}

    turns = {name: Busy(name, 1.0, asked) for name in ("sdfast", "a")}
    measuring = Rounds(list(turns), lambda message: None)
    measuring.together(turns, dict.fromkeys(ASKED, 3))
    assert any(before[0] == after[0] for before, after in pairwise(asked))
    assert measuring.idle == {"sdfast": 0.01, "a": 0.01}


def test_ratios_are_of_the_same_round() -> None:
    [own, other] = compared({"unet": {"sdfast": [1.0, 2.0, 4.0], "a": [3.0, 2.0, 6.0]}})
    assert (own.ratio, own.ratio_low, own.ratio_high) == (1.0, 1.0, 1.0)
    assert (other.seconds, other.ratio, other.ratio_low, other.ratio_high) == (3.0, 1.5, 1.0, 3.0)
    [alone] = compared({"unet": {"a": [1.0]}})
    assert alone.ratio is None


def test_a_side_that_fails_is_left_out_and_says_why() -> None:
    asked: list[tuple[str, str]] = []
    turns = {"sdfast": Clockwork("sdfast", 1.0, asked), "a": Clockwork("a", 1.0, asked, fails="vae")}
    measuring = Rounds(list(turns), lambda message: None)
    seconds = measuring.together(turns, dict.fromkeys(ASKED, 2))
    assert measuring.failed == {"a": "vae: out of memory"}
    assert [measure for name, measure in asked if name == "a"].count("vae") == 1
    assert seconds["picture"] == {"sdfast": [1.0, 1.0]}
    assert all("a" not in by_side for by_side in seconds.values())  # no column of it is half there
    assert "a: vae: out of memory" in properties({"a": Opened(failed=measuring.failed["a"])})


def test_sides_without_room_beside_one_another_are_opened_in_turn() -> None:
    asked: list[tuple[str, str]] = []
    turns = {name: Clockwork(name, n, asked) for name, n in (("sdfast", 2.0), ("a", 3.0))}
    open_now: set[str] = set()

    @contextmanager
    def opened(name: str) -> Iterator[Clockwork]:
        assert not open_now
        open_now.add(name)
        asked.append((name, "open"))
        yield turns[name]
        open_now.remove(name)

    measuring = Rounds(list(turns), lambda message: None)
    seconds = measuring.apart(opened, {**dict.fromkeys(ASKED, 2), "picture": 1})
    assert [name for name, do in asked if do == "open"] == ["sdfast", "a", "a", "sdfast"]
    assert asked[:9] == [("sdfast", do) for do in ("open", *(each for each in ASKED for _ in range(2)))]
    assert seconds["unet"] == {
        "sdfast": [2.0] * 2,
        "a": [3.0] * 2,
    }  # the first of each opening does not count
    assert seconds["picture"] == {"sdfast": [2.0], "a": [3.0]}
    assert measuring.idle == {}


def test_a_side_is_asked_for_no_more_than_it_can_measure() -> None:
    asked: list[tuple[str, str]] = []
    turns = {"sdfast": Clockwork("sdfast", 2.0, asked), "a": Clockwork("a", 3.0, asked)}
    rounds, measures = {**dict.fromkeys(ASKED, 3), "picture": 2}, {"a": ("picture",)}
    measuring = Rounds(list(turns), lambda message: None, measures)
    seconds = measuring.together(turns, rounds)
    assert {do for name, do in asked if name == "a"} == {"picture"}
    assert seconds["unet"] == {"sdfast": [2.0] * 3}
    assert seconds["picture"] == {"sdfast": [2.0] * 2, "a": [3.0] * 2}

    @contextmanager
    def opened(name: str) -> Iterator[Clockwork]:
        openings.append(name)
        yield turns[name]

    openings: list[str] = []
    measuring = Rounds(list(turns), lambda message: None, measures)
    assert measuring.apart(opened, rounds) == seconds
    assert openings == ["sdfast", "a", "a", "sdfast", "sdfast"]  # in the last round nothing is due of it


def test_a_side_that_cannot_be_opened_again_is_left_out() -> None:
    asked: list[tuple[str, str]] = []
    turns = {name: Clockwork(name, 1.0, asked) for name in ("sdfast", "a")}
    opened_before: set[str] = set()

    @contextmanager
    def opened(name: str) -> Iterator[Clockwork]:
        if name == "a" and name in opened_before:
            raise WorkerError("could not be opened")
        opened_before.add(name)
        yield turns[name]

    measuring = Rounds(list(turns), lambda message: None)
    seconds = measuring.apart(opened, dict.fromkeys(ASKED, 3))
    assert measuring.failed == {"a": "could not be opened"}
    assert seconds["text"] == {"sdfast": [1.0] * 3}


def test_order_moves_on() -> None:
    assert [order("abc", turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert order([], 3) == []


def test_the_tables() -> None:
    figures = [
        Comparison("unet", "sdfast", 0.01, 1.0, 1.0, 1.0, 3),
        Comparison("unet", "openvino", 2.5, 250.0, 200.0, 300.0, 3),
        Comparison("step", "sdfast", 5e-5, None, None, None, 3),
    ]
    told = measures(figures).splitlines()
    assert told[1].split()[:5] == ["U-Net,", "2", "rows", "sdfast", "10.00"]
    assert "250.00×" in told[2] and "200.00–300.00" in told[2] and "U-Net" not in told[2]
    assert "50 µs" in told[3] and "×" not in told[3]
    facts = {"precision": {"used": "f32", "without_the_hint": "bf16"}}
    far = {"picture": 101.25, "unet": 1.5e-6}
    known = {
        "diffusers": Opened([1.0, 3.0, 2.0], peak_bytes=2**31),
        "openvino": Opened([1.0], facts, distances=far, idle=0.01),
        "optimum-onnx": Opened(failed="could not be installed: no matching distribution"),
    }
    stock, other, lost = properties(known).splitlines()[1:]
    assert "2.00 s" in stock and "2.00 GiB" in stock and "the reference" in stock
    assert all(part in other for part in ("101.2 dB", "1.5e-06", "bf16", "1.0%"))
    assert lost == "optimum-onnx: could not be installed: no matching distribution"
    told_json = json.loads(json.dumps({name: side.as_json() for name, side in known.items()}))
    assert told_json["optimum-onnx"]["failed"] and told_json["diffusers"]["open_seconds"] == 2.0
    same = Opened(distances={"picture": float("inf")}).as_json()
    assert same["distances"] == {"picture": "the same"}


def test_the_tables_have_gaps_where_a_side_has_no_figures() -> None:
    figures = [
        Comparison("unet", "sdfast", 0.01, 1.0, 1.0, 1.0, 3),
        Comparison("picture", "sdfast", 1.0, 1.0, 1.0, 1.0, 3),
        Comparison("picture", "a", 2.0, 2.0, 2.0, 2.0, 3),
    ]
    lines = [line.split() for line in measures(figures).splitlines()[1:]]
    assert lines[0][:4] == ["U-Net,", "2", "rows", "sdfast"] and lines[1] == ["a", "-", "-", "-", "-"]
    assert lines[2][:3] == ["whole", "picture", "sdfast"] and "2.00×" in lines[3]
    known = {
        "diffusers": Opened([1.0]),
        "a": Opened(
            [1.0], {"precision": {"used": "mixed"}, "note": "other noise"}, distances={"picture": 40.0}
        ),
        "b": Opened([1.0]),
        "c": Opened(left_out="its unet is written for other widths"),
    }
    stock, a, b, *notes = properties(known).splitlines()[1:]
    assert stock.split() == ["diffusers", "1.00", "s", "the", "reference", "float32"]
    assert a.split() == ["a", "1.00", "s", "40.0", "dB", "-", "mixed"]
    assert b.split() == ["b", "1.00", "s", "-", "-", "float32"]
    assert notes == ["a: other noise", "c: its unet is written for other widths"]
    assert known["c"].as_json() == {"left_out": "its unet is written for other widths"}


def test_distances_are_those_from_stock_diffusers(tmp_path: Path) -> None:
    for side, off in (("diffusers", 0.0), ("sdfast", 0.1), ("same", 0.0), ("pictures", 0.1)):
        (tmp_path / side).mkdir()
        for measure in ASKED:
            np.save(tmp_path / side / f"{measure}.npy", np.full((1, 4), 0.5 + off, np.float32))
    everything = dict.fromkeys(("sdfast", "diffusers", "same"), ASKED)
    told = outputs.distances(tmp_path, {**everything, "pictures": ("picture",)})
    assert told["sdfast"]["picture"] == pytest.approx(20.0, abs=1e-4)  # an error of a tenth everywhere
    assert told["sdfast"]["unet"] == pytest.approx(0.2, rel=1e-6)
    assert told["same"] == {"text": 0.0, "unet": 0.0, "vae": 0.0, "picture": float("inf")}
    assert told["pictures"] == {"picture": told["sdfast"]["picture"]}
    assert outputs.distances(tmp_path, {"sdfast": ASKED}) == {}
    np.save(tmp_path / "sdfast" / "vae.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="sdfast: vae is"):
        outputs.distances(tmp_path, everything)


def test_an_environment_has_torch_first_and_every_version_pinned(tmp_path: Path) -> None:
    for side, environment in ENVIRONMENTS.items():
        venv, torch_alone, rest, *_ = environment.commands(tmp_path)
        assert venv[-1] == str(tmp_path) and torch_alone[-1] == "torch"
        assert all(str(environment.constraints) in command for command in (torch_alone, rest))
        lines = environment.constraints.read_text(encoding="utf-8").splitlines()
        pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
        assert {name.split("[")[0] for name in environment.requirements} <= pinned
        assert "torch==2.13.0" in lines, side
    assert ENVIRONMENTS.keys() < SIDES.keys()


def test_what_comes_as_source_is_compiled_for_this_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = ENVIRONMENTS["stable-diffusion.cpp"]
    *_, install = compiled.commands(tmp_path)
    assert "--config-settings=cmake.define.GGML_NATIVE=ON" in install
    assert "--config-settings=cmake.define.CMAKE_BUILD_TYPE=Release" in install
    assert "--no-cache-dir" in install  # pip's cache does not know the processor
    assert install[-3:] == list(compiled.requirements)
    for environment in (compiled, ENVIRONMENTS["openvino"]):
        here = environment.digest()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(machine, "instructions", lambda: "sse2")
            assert (environment.digest() != here) == bool(environment.built_with)
    assert not any("config-settings" in word for word in ENVIRONMENTS["openvino"].commands(tmp_path)[-2])


def test_an_environment_is_made_once_and_its_failure_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(environments, "CONSTRAINTS", tmp_path)
    mine, runs = Environment("mine", ("peer",)), tmp_path / "runs"
    code = (
        f"open({str(runs)!r}, 'a').write('x'); __import__('pathlib').Path({str(tmp_path / 'mine')!r}).mkdir()"
    )
    monkeypatch.setattr(Environment, "commands", lambda self, folder: [[sys.executable, "-c", code]])
    assert mine.python(tmp_path) == mine.python(tmp_path) == tmp_path / "mine" / "bin" / "python"
    assert runs.read_text() == "x"

    said = "import sys; sys.exit('ERROR: no matching distribution\\nhint: look elsewhere')"
    monkeypatch.setattr(Environment, "commands", lambda self, folder: [[sys.executable, "-c", said]])
    (tmp_path / "mine.txt").write_text("torch==2.14.0\n")  # other versions: it is made again
    with pytest.raises(InstallError, match=r"could not be installed: ERROR: no matching distribution$"):
        mine.python(tmp_path)
    assert not (tmp_path / "mine").exists()


def test_text_weights_have_the_names_that_every_version_of_transformers_reads(tmp_path: Path) -> None:
    tensors = {"encoder.layers.0.bias": 1, "text_model.final_layer_norm.bias": 2, "text_projection.weight": 3}
    for name in ("text_encoder_2", "unet"):
        (tmp_path / "given" / name).mkdir(parents=True)
        held = {key: torch.full((2,), float(value)) for key, value in tensors.items()}
        save_file(held, tmp_path / "given" / name / "model.safetensors")
    made = for_every_version(tmp_path / "given", tmp_path / "made")
    text = load_file(made / "text_encoder_2" / "model.safetensors")
    assert {name: int(tensor[0]) for name, tensor in text.items()} == {
        "text_model.encoder.layers.0.bias": 1,
        "text_model.final_layer_norm.bias": 2,
        "text_projection.weight": 3,
    }
    assert load_file(made / "unet" / "model.safetensors").keys() == tensors.keys()


class Toy(InParts):
    """A side that computes what is plain to see."""

    packages, modules = ("numpy",), ("numpy",)

    def prepare(self, task: Task) -> None:
        self.export_folder(task, "toy", lambda folder: folder.mkdir())

    def load(self, task: Task) -> Any:
        class Pipe:
            images = np.full((1, 8, 8, 3), 0.5)

            def set_progress_bar_config(self, disable: bool) -> None: ...

            def __call__(self, callback_on_step_end: Any, latents: Any, **call: Any) -> Any:
                assert call == task.call()
                for step in range(call["num_inference_steps"]):
                    callback_on_step_end(self, step, 0, {})
                latents.zero_()
                return self

        return Pipe()

    def text(self) -> Measured:
        return Measured(1.0, self.inputs["ids"])

    def unet(self) -> Measured:
        return Measured(2.0, self.inputs["sample"])

    def vae(self) -> Measured:
        raise RuntimeError("no memory")


def test_a_worker_measures_what_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SETTLE", 0.0)
    monkeypatch.setattr(sides, "scheduler_of", lambda task: f"that of {task.checkpoint}")
    inputs = {"ids": torch.ones(1, 77, dtype=torch.int64), "sample": torch.ones(2, 4, 1, 1)}
    save_file({**inputs, "latents": torch.ones(1, 4, 1, 1)}, tmp_path / "inputs")
    paths = {"exports": str(tmp_path), "outputs": str(tmp_path), "inputs": str(tmp_path / "inputs")}
    task = Task(checkpoint="toy", **paths, height=8, width=8, steps=3, threads=torch.get_num_threads())
    assert Task.read(task.write(tmp_path / "task.json")) == task
    side = Toy()
    side.prepare(task)
    side.prepare(task)  # it is there already
    assert (tmp_path / "toy").is_dir()

    serving = worker.Serving(side, task, tmp_path / "toy-outputs")
    opened = serving.answer({"do": "open"})
    assert opened["facts"]["versions"].keys() == {"numpy"} and opened["peak_bytes"] > 2**20
    assert side.pipe.scheduler == "that of toy"
    first, second = (serving.answer({"do": "picture"}) for _ in range(2))
    assert first["idle"] is None and second["idle"] >= 0
    assert 0 <= first["step_seconds"] <= first["seconds"]
    assert serving.answer({"do": "unet"})["step_seconds"] is None
    assert np.array_equal(np.load(tmp_path / "toy-outputs" / "unet.npy"), np.ones((2, 4, 1, 1), np.float32))
    assert bool((side.inputs["latents"] == 1).all())  # a side that writes into its latents has its own
    with pytest.raises(KeyError):
        serving.answer({"do": "prepare"})
    with pytest.raises(RuntimeError, match="no memory"):
        serving.answer({"do": "vae"})


@pytest.mark.parametrize(
    ("measure", "took", "told", "calls"),
    [
        ("unet", [9e-3, 3e-3, 1e-3, 2e-3, 5e-3, 4e-3], 3e-3, 6),  # the first after a pause is not counted
        ("unet", [0.5], 0.5, 1),
        ("picture", [9e-3], 9e-3, 1),
    ],
)
def test_a_short_module_is_called_until_it_is_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: str, took: list[float], told: float, calls: int
) -> None:
    monkeypatch.setattr(worker, "SETTLE", 0.0)
    left, side = iter(took), Toy()
    monkeypatch.setattr(side, measure, lambda: Measured(next(left), np.ones(1)))
    task = Task(checkpoint="toy", exports="", outputs="", inputs="", height=8, width=8, steps=3, threads=1)
    serving = worker.Serving(side, task, tmp_path)
    assert serving.answer({"do": measure})["seconds"] == told
    assert list(left) == []
    assert len(took) == calls


def task_of(checkpoint: Path, outputs: Path) -> Task:
    return Task(str(checkpoint), str(outputs), "", str(outputs), height=16, width=24, steps=3, threads=2)


def configs_of(name: str, folder: Path) -> Path:
    """The configs of a checkpoint, without its weights."""
    for file, config in random_weights.configs(name).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(config))
    return folder


def test_stable_diffusion_cpp_is_left_out_of_networks_that_it_does_not_have(tmp_path: Path) -> None:
    landscapes = resolve("landscapes").folder
    why = StableDiffusionCpp.left_out(task_of(landscapes, tmp_path))
    assert why == "its unet is written for blocks of [320, 640, 1280, 1280] channels; this has [64, 96, 128]"
    for name in ("sd15", "sd21"):
        task = task_of(configs_of(name, tmp_path / name), tmp_path)
        assert [side for side, cls in SIDES.items() if cls.left_out(task)] == []


def test_a_side_that_is_left_out_is_neither_installed_nor_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "_prepare", lambda self, name: pytest.fail(f"{name} is prepared"))
    task = task_of(configs_of("tiny", tmp_path / "tiny"), tmp_path)
    bench = Bench(task, ("stable-diffusion.cpp",), tmp_path / "environments")
    assert bench.run(dict.fromkeys(ASKED, 1), openings=1) == []
    told = bench.opened["stable-diffusion.cpp"].as_json()
    assert told["left_out"].startswith("its unet is written for")


def test_stable_diffusion_cpp_draws_the_task_and_tells_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, Any] = {}
    drawn: dict[str, Any] = {}

    class StableDiffusion:
        def __init__(self, **told: Any) -> None:
            opened.update(told)

        def generate_image(self, progress_callback: Any, **call: Any) -> list[Image.Image]:
            drawn.update(call)
            for step in range(call["sample_steps"] + 1):
                progress_callback(step, call["sample_steps"], 0.0)
            return [Image.new("RGBA", (call["width"], call["height"]), (255, 0, 51))]

    library = ModuleType("stable_diffusion_cpp")
    library.StableDiffusion = StableDiffusion  # type: ignore[attr-defined]
    library.sd_get_system_info = lambda: b"System Info: \n    AVX2 = 1 | "  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", library)
    monkeypatch.setattr(sides, "version", lambda name: "1.0")
    inputs = tmp_path / "inputs"
    save_file({"latents": torch.zeros(1)}, inputs)
    task = replace(task_of(configs_of("sd21", tmp_path / "sd21"), tmp_path), inputs=str(inputs))

    side = StableDiffusionCpp()
    side.prepare(task)
    side.open(task)
    assert (opened["model_path"], opened["prediction"]) == (task.checkpoint, "v")
    assert (opened["n_threads"], opened["wtype"], opened["rng_type"]) == (task.threads, "f32", "cpu")
    assert side.facts()["built_for"] == "System Info: AVX2 = 1 |"
    measured = side.picture()
    assert (drawn["seed"], drawn["sample_steps"], drawn["cfg_scale"]) == (task.seed, 3, task.guidance)
    assert measured.output.shape == (1, 16, 24, 3)
    assert measured.output[0, 0, 0] == pytest.approx([1.0, 0.0, 0.2])
    assert measured.step_seconds is not None and 0 <= measured.step_seconds <= measured.seconds
    with pytest.raises(KeyError):
        worker.Serving(side, task, tmp_path).answer({"do": "unet"})


def test_the_latents_are_what_torchs_generator_draws_with_the_tasks_seed(tmp_path: Path) -> None:
    """A side that draws them itself, with a generator like torch's, begins with the same."""
    task = _task("landscapes", None, 3, 1, tmp_path)
    latents = load_file(task.inputs)["latents"]
    assert torch.equal(
        latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(task.seed))
    )
