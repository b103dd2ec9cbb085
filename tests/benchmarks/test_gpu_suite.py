"""The GPU suite's dry run: every part on a CPU, then nothing twice; and its arithmetic."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import accuracy, own_kernels, report, work
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.comparison import within
from benchmarks.gpu.document import Document
from benchmarks.gpu.measure import alternate, burst
from benchmarks.gpu.plan import Part, Runner, parts
from benchmarks.gpu.sides import COMPILED, EAGER, SIDES, WITH_OWN, WITHOUT_OWN, SideSpec, usual
from benchmarks.gpu.workloads import workload
from sdfast.manifest import read_manifest
from sdfast.validation.rule import BARS

ROW = {
    "side",
    "failed",
    "milliseconds",
    "milliseconds_low",
    "milliseconds_high",
    "rounds",
    "iterations_per_second",
    "ratio_to_eager",
    "ratio_to_compiled",
    "floor_milliseconds",
    "roofline_share",
}
ERROR = {"relative_l2", "psnr_db", "stock_relative_l2", "within_bar"}


@dataclass
class DryRun:
    """A run with a side that cannot be built, and the same run again."""

    folder: Path
    first: dict[str, Any]
    again: dict[str, Any]
    said: str

    @property
    def parts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.first["parts"]
        return found


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    folder = tmp_path_factory.mktemp("gpu")
    good = ["--side", "stock-eager", "--side", "sdfast-eager"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SDFAST_CACHE"):
            patch.setenv(name, str(folder / "cache"))  # so that what the command sets is undone
        patch.setitem(SIDES, "sdfast-broken", SideSpec("cannot be built", backend="nonesuch"))
        patch.setattr("benchmarks.gpu.sides.known_backends", lambda: ("eager", "nonesuch"))
        run(folder, *good, "--side", "sdfast-broken")
        first = json.loads((folder / "result.json").read_text("utf-8"))
        said = run(folder, *good)
    yield DryRun(folder, first, json.loads((folder / "result.json").read_text("utf-8")), said)


def run(folder: Path, *options: str, name: str = "sd15") -> str:
    command = [name, "--device", "cpu", "--architecture", "tiny", "--batch", "1"]
    paths = ["--result", str(folder / "result.json"), "--workdir", str(folder / "work")]
    done = CliRunner().invoke(main, [*command, *paths, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_sdxl_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SDFAST_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    run(tmp_path, "--side", "stock-eager", "--side", "sdfast-eager", name="sdxl")
    parts = json.loads((tmp_path / "result.json").read_text("utf-8"))["parts"]
    assert {part["state"] for part in parts.values()} == {"done"}
    modules = parts["accuracy/sdfast-eager/batch 1"]["result"]["modules"]
    assert all(one["within_bar"] for one in modules)


def rows(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["side"]: row for row in part["result"]["rows"]}


def test_own_kernels_are_measured_last_and_shape_by_shape(dry_run: DryRun) -> None:
    """On a CPU, where there are none, the definitions alone, and the reason."""
    names = list(dry_run.parts)
    last = names[names.index("tick/batch 1") :]
    shapes = last[1:]
    assert len(shapes) > 10 and all(name.startswith("kernels/") for name in shapes)
    norm = "kernels/shifted group norm + SiLU of 32 channels in 32 groups, 4x4, float16/batch 1"
    product = "kernels/GEGLU of 4 tokens, 64 to 256 channels, float16/batch 1"
    convolution = "kernels/3x3 convolution of 32 to 32 channels, 4x4, float16 or FP8/batch 1"
    for name in (norm, product, convolution, "tick/batch 1"):
        result = dry_run.parts[name]["result"]
        assert "run on NVIDIA GPUs" in result["without_own"]
        [row] = result["rows"]
        assert row["milliseconds"] > 0 and row["failed"] is None
    assert rows(dry_run.parts[norm])["definition"]["roofline_share"] > 0
    assert "shifted group norm + SiLU of 32 channels" in report.text(dry_run.first)


def test_a_step_is_measured_as_the_sides_come() -> None:
    """What compiles nothing at once, then sdfast's compiled side; the next batch waits for all of its own."""
    load, sides = workload("sd15"), [EAGER, COMPILED, WITH_OWN, "sdfast-inductor-fp8", "sdfast-onnx"]
    listed = [part for part in parts(load, sides, [1, 4], Path("traces")) if part.kind in ("build", "step")]
    first = [(part.name.removesuffix("/batch 1"), part.sides) for part in listed if part.batch == 1]
    assert first == [
        ("build/sdfast-onnx", ()),
        ("step", (EAGER, "sdfast-onnx")),
        ("build/sdfast-inductor", ()),
        ("step", (EAGER, WITH_OWN, "sdfast-onnx")),
        ("build/stock-compiled/guided", ()),
        ("step", (EAGER, COMPILED, WITH_OWN, "sdfast-onnx")),
        ("build/sdfast-inductor-fp8", ()),
        ("step", tuple(sides)),
        ("build/stock-compiled/no guidance", ()),
    ]
    assert [part.sides for part in listed if part.name == "step/batch 4"] == [tuple(sides)]
    alone = [part.name for part in parts(load, [WITH_OWN], [1], Path("traces")) if part.kind == "step"]
    assert alone == ["step/batch 1"]


def test_networks_without_own_kernels_are_an_engine_of_their_own() -> None:
    """Beside the one that may have them, at the end, and in no other comparison."""
    load, place = workload("sd15"), Path("traces")
    listed = {part.name: part for part in parts(load, [EAGER, WITH_OWN], [1, 4], place)}
    for network in ("unet", "vae_decoder"):
        assert listed[f"choice/{network}/batch 1"].sides == (WITH_OWN, WITHOUT_OWN)
        assert f"choice/{network}/batch 4" not in listed
    assert not any(WITHOUT_OWN in part.sides for part in listed.values() if part.kind != "choice")
    names = list(listed)
    assert names.index("choice/unet/batch 1") > names.index("picture/4 steps, no guidance/batch 4")
    assert not any(part.kind == "choice" for part in parts(load, [EAGER], [1], place))
    assert WITHOUT_OWN not in usual(torch.device("cpu"))
    bench = Bench(load, torch.device("cpu"), Path("work"))
    assert bench.engine_folder(WITH_OWN, 1) != bench.engine_folder(WITHOUT_OWN, 1)


@pytest.mark.parametrize(
    ("architecture", "kinds", "convolutions"),
    [
        ("sd15", {"norm": 29, "product": 4, "convolution": 20}, 50),
        ("sdxl", {"norm": 24, "product": 2, "convolution": 16}, 38),
    ],
)
def test_the_shapes_are_those_of_the_real_networks(
    architecture: str, kinds: dict[str, int], convolutions: int
) -> None:
    found = own_kernels.cases(workload(architecture), 1)
    assert Counter(case.kind for case in found) == kinds
    met = {case.what: case.count for case in found}
    sample = {
        "sd15": {
            "GEGLU of 4096 tokens, 320 to 1280 channels, float16": 5,
            "3x3 convolution of 640 to 640 channels, 32x32 enlarged to 64x64, float16 or FP8": 1,
        },
        "sdxl": {
            "GEGLU of 1024 tokens, 1280 to 5120 channels, float16": 60,
            "3x3 convolution of 1280 to 1280 channels, 32x32, float16 or FP8": 10,
        },
    }
    for what, count in sample[architecture].items():
        assert met[what] == count
    assert (
        sum(case.count for case in found if case.kind == "convolution")
        == ({"sd15": 50, "sdxl": 38}[architecture])
    )


def test_second_run_measures_nothing(dry_run: DryRun) -> None:
    good = {name: part for name, part in dry_run.parts.items() if not name.endswith("sdfast-broken/batch 1")}
    assert {name: dry_run.again["parts"][name] for name in good} == good
    assert f"{len(good)} of {len(good)} parts are there already" in dry_run.said
    assert dry_run.again["left"] == []


def test_a_failing_side_is_recorded_and_stops_no_other(dry_run: DryRun) -> None:
    build = dry_run.parts["build/sdfast-broken/batch 1"]
    assert (build["state"], build["result"]) == ("failed", None)
    assert "nonesuch" in build["error"] and "\n" not in build["error"]
    for name in ("first", "accuracy", "profile"):
        assert dry_run.parts[f"{name}/sdfast-broken/batch 1"]["state"] == "failed"
    step = dry_run.parts["step/batch 1"]
    assert step["state"] == "partial"
    assert "nonesuch" in rows(step)["sdfast-broken"]["failed"]
    assert rows(step)["sdfast-broken"]["milliseconds"] is None
    assert rows(step)["sdfast-eager"]["milliseconds"] > 0
    assert "failed:" in report.text(dry_run.first)


def test_every_comparison_has_every_field(dry_run: DryRun) -> None:
    compared = [name for name in dry_run.parts if name.split("/")[0] in ("step", "picture", "modules")]
    assert compared == [
        "step/batch 1",
        "picture/3 steps/batch 1",
        "modules/text_encoder/batch 1",
        "modules/unet/batch 1",
        "modules/vae_decoder/batch 1",
        "picture/5 steps/batch 1",
        "picture/1 step, no guidance/batch 1",
        "picture/4 steps, no guidance/batch 1",
    ]
    for name in compared:
        for side in ("stock-eager", "sdfast-eager"):
            row = rows(dry_run.parts[name])[side]
            assert set(row) == (ROW | ERROR if name.startswith("picture") else ROW)
            assert row["rounds"] == 2
            assert row["milliseconds_low"] <= row["milliseconds"] <= row["milliseconds_high"]
            assert row["roofline_share"] == pytest.approx(row["floor_milliseconds"] / row["milliseconds"])
        assert rows(dry_run.parts[name])["stock-eager"]["ratio_to_eager"] == 1.0
        assert rows(dry_run.parts[name])["sdfast-eager"]["ratio_to_compiled"] is None  # not measured


def test_errors_are_of_half_precision_and_stand_beside_stocks(dry_run: DryRun) -> None:
    for name, part in dry_run.parts.items():
        if name.startswith("picture"):
            ours, stock = rows(part)["sdfast-eager"], rows(part)["stock-eager"]
            assert 1e-5 < ours["relative_l2"] < 1e-2
            assert ours["stock_relative_l2"] == stock["relative_l2"]
            assert ours["psnr_db"] > 40
    modules = dry_run.parts["accuracy/sdfast-eager/batch 1"]["result"]["modules"]
    names = [one["name"] for one in modules]
    told_apart = ["text_encoder.hidden_states", "context", "time_shift", "unet", "step"]
    assert names == [*told_apart, "vae_decoder", "vae_encoder"]
    assert all(one["within_bar"] for one in modules)
    told = dry_run.again["summary"]
    step = next(
        row for row in told["rows"] if row["part"] == "step/batch 1" and row["side"] == "sdfast-eager"
    )
    assert step["relative_l2"] == modules[4]["relative_l2"]
    assert told["verdicts"][0]["side"] == "sdfast-eager"
    assert told["verdicts"][0]["modules_within_bar"] == len(modules)


def test_what_only_a_gpu_has_is_none(dry_run: DryRun) -> None:
    assert dry_run.first["machine"]["gpu"] is None
    for side in ("stock-eager", "sdfast-eager"):
        first = dry_run.parts[f"first/{side}/batch 1"]["result"]
        assert 0 < first["imported_seconds"] < first["opened_seconds"] < first["seconds"]
        assert first["peak_allocated_bytes"] is None
        assert first["peak_reserved_bytes"] is None
        assert first["peak_device_bytes"] is None
    assert {goal["met"] for goal in dry_run.again["summary"]["goals"]} == {None}


def test_the_document_says_on_what_it_was_measured(dry_run: DryRun) -> None:
    assert {"command", "date", "machine", "workload", "architecture", "size", "sides"} <= set(dry_run.first)
    assert {"torch", "diffusers", "sdfast"} <= set(dry_run.first["machine"]["versions"])
    assert dry_run.first["sides"]["stock-compiled"]["measured"] is False
    roof = dry_run.parts["roofline"]["result"]
    assert roof["flops_per_second"] == pytest.approx(2 * 256**3 / roof["gemm_seconds"])
    assert roof["bytes_per_second"] == pytest.approx(2 * 2**24 / roof["copy_seconds"])
    assert dry_run.parts["build/sdfast-eager/batch 1"]["result"]["seconds"] > 0


def test_a_profile_names_what_took_longest_and_saves_the_trace(dry_run: DryRun) -> None:
    for side in ("stock-eager", "sdfast-eager"):
        result = dry_run.parts[f"profile/{side}/batch 1"]["result"]
        assert (dry_run.folder / "result-profile" / result["trace"]).stat().st_size > 1000
        times = [one["microseconds"] for one in result["top"]]
        assert times == sorted(times, reverse=True) and times[0] > 0
        assert any("conv" in one["name"] for one in result["top"])


def test_an_fp8_side_is_built_beside_the_others_and_held_to_its_own_bar(
    dry_run: DryRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIDES, "sdfast-fp8", SideSpec("fp8", backend="eager", fp8=True))
    bench = Bench(workload("sd15", "tiny"), torch.device("cpu"), dry_run.folder / "work")
    bench.build("sdfast-fp8", 1)
    folders = [bench.engine_folder(side, 1) for side in ("sdfast-fp8", "sdfast-eager")]
    assert [bool(read_manifest(folder).fp8) for folder in folders] == [True, False]
    modules = {one["name"]: one for one in accuracy.modules(bench, "sdfast-fp8", 1)["modules"]}
    assert modules["unet"]["within_bar"] and modules["unet"]["bar"] == BARS["FP8"]["unet"]
    assert modules["unet"]["relative_l2"] > 3 * modules["unet"]["stock_relative_l2"]
    for side, error, met in (("sdfast-fp8", 0.19, True), ("sdfast-fp8", 0.21, False)):
        assert within(side, error, stock=1e-3) is met
    assert within("sdfast-eager", 0.19, stock=1e-3) is False
    assert SIDES["sdfast-inductor-fp8"].absent(torch.device("cpu")) == "FP8 is compiled for GPUs alone"


# ---------------------------------------------------------------- its parts, without a network


@pytest.mark.parametrize(
    ("architecture", "side", "unet", "vae_decoder"),
    [("sd15", 512, 803, 2514), pytest.param("sdxl", 1024, 6761, 10470, marks=pytest.mark.slow)],
)
def test_flops_are_those_of_the_literature(
    architecture: str, side: int, unet: float, vae_decoder: float
) -> None:
    """GFLOP of one sample, 2 a multiply-add; the prompt's and the time's projections are left out, < 2 %."""
    assert work.unet(architecture, 1, side, side).flops / 1e9 == pytest.approx(unet, rel=0.02)
    assert work.vae_decoder(architecture, 1, side, side).flops / 1e9 == pytest.approx(vae_decoder, rel=0.02)
    assert work.text_encoder(architecture, "text_encoder").flops / 1e9 == pytest.approx(13, rel=0.05)


def test_flops_grow_with_the_batch() -> None:
    one, two = (work.unet("tiny", rows, 32, 32).flops for rows in (1, 2))
    assert two == 2 * one > 0


def test_a_side_that_fails_later_leaves_the_comparison() -> None:
    calls = iter([1.0, 1.0])

    def failing() -> float:
        return next(calls)

    timed = alternate({"a": lambda: 2.0, "b": lambda: 1.0, "c": failing}, rounds=5, limit=60.0)
    assert timed.seconds == {"a": [2.0] * 5, "b": [1.0] * 5}
    assert list(timed.failed) == ["c"]
    assert timed.ratio("b", "a") == 2.0
    assert timed.ratio("c", "a") is None


def test_short_work_is_timed_in_bursts() -> None:
    calls: list[int] = []
    seconds = burst(lambda: calls.append(1), torch.device("cpu"))()
    assert len(calls) > 10
    assert 0 < seconds < 0.01


def runner(document: Document, minutes: float, said: list[str], code: str = "1") -> Runner:
    bench = Bench(workload("sd15", "tiny"), torch.device("cpu"), document.path.parent)
    return Runner(bench, document, {"gpu": None}, code, minutes, said.append, lambda _: None)


def part(name: str, measured: list[str], *, ours: bool = True) -> Part:
    def run(_bench: Bench) -> dict[str, Any]:
        measured.append(name)
        return {"value": float("nan")}

    return Part(name, "profile", name, run, {"what": name}, ours=ours)


def test_time_that_is_out_stops_before_a_part_and_says_what_is_left(tmp_path: Path) -> None:
    measured: list[str] = []
    said: list[str] = []
    document = Document(tmp_path / "result.json")
    wanted = [part("a", measured), part("b", measured)]
    assert runner(document, 0.0, said).run(wanted) == ["a", "b"]
    assert measured == []
    assert "no time for a" in said[-1]
    assert runner(document, 1.0, said).run(wanted) == []
    assert measured == ["a", "b"]


def test_other_code_is_measured_anew_and_the_old_figures_are_kept_apart(tmp_path: Path) -> None:
    measured: list[str] = []
    path = tmp_path / "result.json"
    wanted = [part("ours", measured), part("stock", measured, ours=False)]
    runner(Document(path), 1.0, []).run(wanted)
    runner(Document(path), 1.0, [], code="2").run(wanted)
    assert measured == ["ours", "stock", "ours"]
    content = json.loads(path.read_text("utf-8"))
    assert content["earlier"]["ours"]["key"]["code"] == "1"
    assert content["parts"]["ours"]["key"]["code"] == "2"
    assert content["parts"]["ours"]["result"] == {"value": "nan"}  # JSON has no such number
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_rows_of_sides_that_took_no_part_stay(tmp_path: Path) -> None:
    document = Document(tmp_path / "result.json")
    for side in ("a", "b"):
        document.record("step", {"gpu": None}, 1.0, {"rows": [{"side": side, "failed": None}]})
    assert document.finished("step", {"gpu": None}, ["a", "b"])
    assert not document.finished("step", {"gpu": None}, ["a", "c"])
    assert not document.finished("step", {"gpu": "other"}, ["a"])


@pytest.mark.parametrize(
    ("gpu", "expected"), [("NVIDIA H200", [True, True, False, False, True]), ("RTX", [None] * 5)]
)
def test_goals_are_judged_only_where_they_were_measured(gpu: str, expected: list[bool | None]) -> None:
    row = {"side": "sdfast-inductor", "iterations_per_second": 201.0, "ratio_to_eager": 3.0}
    step = {"result": {"rows": [{**row, "ratio_to_compiled": 1.29}]}}
    picture = {"result": {"rows": [{"side": "sdfast-inductor", "milliseconds": 131.0}]}}
    parts = {
        "step/batch 1": step,
        "picture/20 steps/batch 1": picture,
        "first/sdfast-inductor/batch 1": {"result": {"seconds": 9.9}},
    }
    assert [goal["met"] for goal in report.goals(parts, "sd15", gpu)] == expected
