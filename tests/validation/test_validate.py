"""What validate() leaves behind, refuses, and says."""

import html
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdfast.engine import Engine
from sdfast.errors import CheckpointError, EngineError, RequestError
from sdfast.manifest import read_manifest
from sdfast.validation import Report, rule, validate
from sdfast.validation.metrics import Error
from sdfast.validation.modules import Measured
from tests import checkpoints
from tests.validation import engines

PROMPTS = ["a cabin <script>alert(1)</script> & the sea", "boat"]


@pytest.fixture(scope="module")
def validated(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, list[str]]:
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("validated") / "engine")
    told: list[str] = []
    report = validate(folder, prompts=PROMPTS, steps=3, seed=5, progress=told.append)
    return folder, report, told


def test_the_figures_enter_the_manifest(validated: tuple[Path, Report, list[str]], sound: Path) -> None:
    folder, report, _ = validated
    manifest = read_manifest(folder)
    assert manifest.validation is not None
    assert manifest.validation.passed
    assert manifest.validation.figures == report.figures()
    assert (folder / manifest.validation.report).is_file()
    assert manifest.model_copy(update={"validation": None}).sealed() == read_manifest(sound)
    Engine.open(folder)


def test_the_report_can_be_read_back(validated: tuple[Path, Report, list[str]]) -> None:
    folder, report, _ = validated
    assert Report.model_validate_json((folder / "validation" / "report.json").read_text("utf-8")) == report
    seeds = [(picture.prompt, picture.seed, len(picture.drift)) for picture in report.pictures]
    assert seeds == [*[(PROMPTS[0], 5, 3), (PROMPTS[1], 6, 3)] * 2, (PROMPTS[0], 5, 1)]


def test_the_page_needs_nothing_else(validated: tuple[Path, Report, list[str]]) -> None:
    page = (validated[0] / "validation" / "report.html").read_text("utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("data:image/png;base64,") == 3 * len(validated[1].pictures)


def test_progress_is_told(validated: tuple[Path, Report, list[str]]) -> None:
    told = validated[2]
    assert told[0] == "checkpoint"
    assert "Euler a: picture 2 of 2" in told


def test_the_table_is_aligned_and_complete(validated: tuple[Path, Report, list[str]]) -> None:
    table = validated[1].table()
    for part in ("text_encoder", "context", "unet", "vae_decoder", "scheduler Euler a", "SSIM", "passed in"):
        assert part in table
    assert "vae_encoder" in table
    assert ", over a picture" in table
    heads = [line for line in table.splitlines() if line.startswith("unet ")]
    assert heads[0].endswith("ok")


def test_a_changed_checkpoint_is_refused_unless_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    folder = engines.build(changed, tmp_path / "engine")
    weights = changed / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_out.bias"] += 0.3
    save_file(state, weights)
    with pytest.raises(EngineError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        validate(folder, prompts=["boat"], steps=1)
    report = validate(folder, checkpoint=changed, prompts=["boat"], steps=1, scheduler="DDIM")
    assert "vae_decoder" in {failure.part for failure in report.failures}
    assert "as asked" in report.notes[0]


def test_a_checkpoint_that_is_gone(checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    folder = engines.build(moved, tmp_path / "engine")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="--checkpoint"):
        validate(folder, steps=1)
    assert validate(folder, checkpoint=tmp_path / "elsewhere", prompts=["boat"], steps=1).passed
    with pytest.raises(CheckpointError):
        validate(folder, checkpoint=tmp_path / "nowhere", steps=1)


def test_bad_arguments(engine: Path) -> None:
    before = (engine / "manifest.json").read_bytes()
    with pytest.raises(RequestError, match="unknown scheduler"):
        validate(engine, scheduler="Eulr")
    with pytest.raises(RequestError, match="num_inference_steps"):
        validate(engine, steps=0)
    with pytest.raises(RequestError, match="guidance_scale"):
        validate(engine, guidance_scale=float("nan"))
    with pytest.raises(RequestError, match="prompts"):
        validate(engine, prompts=[])
    assert (engine / "manifest.json").read_bytes() == before
    assert not (engine / "validation").exists()


def test_an_engine_replaced_meanwhile_is_left_alone(engine: Path) -> None:
    opened = Engine.open(engine)
    manifest = read_manifest(engine).model_copy(update={"name": "another", "seal": ""})
    (engine / "manifest.json").write_text(manifest.to_json(), "utf-8")
    with pytest.raises(EngineError, match="another engine"):
        validate(opened, prompts=["boat"], steps=1, scheduler="DDIM")
    assert json.loads((engine / "manifest.json").read_text("utf-8"))["name"] == "another"


def test_an_sdxl_engine(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Two text encoders, pooled embeddings, zeros for a missing negative prompt."""
    folder = engines.build(tiny_sdxl, tmp_path / "sdxl")
    report = validate(folder, prompts=["boat"], steps=2)
    assert report.passed, report.table()
    assert "text_encoder_2.text_embeds" in {module.name for module in report.modules}


@pytest.fixture(scope="module")
def small(shallow_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for half precision, of which a processor takes ten times as long."""
    return engines.use_own_scheduler(shutil.copytree(shallow_sd, tmp_path_factory.mktemp("small") / "sd"))


def test_half_precision_is_measured_against_stock_in_half_precision(small: Path, tmp_path: Path) -> None:
    folder = engines.build(small, tmp_path / "half", dtype="fp16")
    report = validate(folder, prompts=["boat", "cabin"], steps=2, scheduler="DDIM")
    modules = {module.name: module for module in report.modules}
    networks = ("text_encoder.hidden_states", "context", "time_shift", "unet", "vae_decoder", "vae_encoder")
    for name in (*networks, "pictures"):
        module = modules[name]
        assert module.stock_relative_l2 is not None
        assert module.bar == pytest.approx(max(1e-4, 1.1 * module.stock_relative_l2))
        assert module.passed == (module.relative_l2 <= module.bar)
        assert module.relative_l2 < 2 * module.stock_relative_l2
    assert modules["scheduler DDIM"].stock_relative_l2 is None
    engines.change_weight(folder, "unet", "conv_in.weight", engines.perturbed)
    assert "unet" in {f.part for f in validate(folder, prompts=["boat"], steps=1, scheduler="DDIM").failures}


@pytest.mark.parametrize("vae", ["auto", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_vae_that_stock_keeps_in_float32_is_held_to_stock_in_bfloat16(tmp_path: Path, vae: str) -> None:
    """Only where the engine's is float16; the pictures' bar is that of stock as it is."""
    quiet = checkpoints.build_sdxl(tmp_path / "quiet", vae=checkpoints.SMALL_VAE)
    checkpoint = engines.use_own_scheduler(loud_vae(quiet, tmp_path / "sdxl"))
    folder = engines.build(checkpoint, tmp_path / "half", dtype="fp16", vae_dtype=vae)
    report = validate(folder, prompts=["boat"], steps=2, scheduler="DDIM")
    modules = {module.name: module for module in report.modules}
    for name in ("vae_decoder", "vae_encoder"):
        module = modules[name]
        assert module.passed, report.table()
        assert module.stock_relative_l2 is not None
        if vae == "auto":
            assert module.stock_dtype == "bfloat16"
            assert module.bar == pytest.approx(1.1 * module.stock_relative_l2)
            assert module.stock_relative_l2 > 1e-3
            assert module.relative_l2 < module.stock_relative_l2 / 2
        else:
            assert module.stock_dtype is None
            assert module.bar == pytest.approx(max(1e-4, 1.1 * module.stock_relative_l2))
            assert module.relative_l2 < 1e-5
    assert {m.name for m in report.modules if m.stock_dtype} == (
        {"vae_decoder", "vae_encoder"} if vae == "auto" else set()
    )
    assert modules["pictures"].bar == pytest.approx(1.1 * (modules["pictures"].stock_relative_l2 or 0))
    page = (folder / "validation" / "report.html").read_text("utf-8")
    for told in (report.table(), page):
        assert ("stock diffusers keeps this VAE in float32" in told.replace("Stock", "stock")) == (
            vae == "auto"
        )
        assert ("bfloat16" in told) == (vae == "auto")
    engines.change_weight(folder, "vae_decoder", "decoder.conv_out.weight", lambda weight: weight * 1.1)
    failed = validate(folder, prompts=["boat"], steps=1, scheduler="DDIM").failures
    reason = next(failure.reason for failure in failed if failure.part == "vae_decoder")
    assert ("x the error of stock diffusers in bfloat16" in reason) == (vae == "auto")


def loud_vae(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint, its VAE overflowing float16 as SDXL's does."""
    shutil.copytree(checkpoint, folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    gains = {
        name: 3e5 if name.endswith(("conv1.weight", "conv2.weight")) else 1.0 for name in load_file(path)
    }
    save_file({name: tensor * gains[name] for name, tensor in load_file(path).items()}, path)
    return folder


def test_zero_guidance_and_one_step(engine: Path) -> None:
    report = validate(engine, prompts=["boat"], steps=1, guidance_scale=1.0, scheduler="DDPM")
    assert report.passed, report.table()
    assert torch.isfinite(torch.tensor(report.pictures[0].drift)).all()


def test_guidance_in_some_steps_is_priced_and_not_judged(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "engine"))
    call = {"prompts": ["boat"], "steps": 4, "scheduler": "DDIM"}
    report = validate(folder, **call, guidance_end=0.5)
    price = report.guidance
    assert report.passed and price is not None
    assert price.rows == (2 + 2 + 1 + 1) / 8
    assert price.psnr_min < report.pictures[0].psnr - 20
    page = (folder / "validation" / "report.html").read_text("utf-8")
    for told in (report.table(), page):
        assert "rice of guidance from 0% to 50% of the steps: 75% of the U-Net's rows" in html.unescape(told)
    assert validate(folder, **call).guidance is None
    with pytest.raises(RequestError, match="is not below guidance_end"):
        validate(folder, **call, guidance_start=0.6, guidance_end=0.6)


def test_int8_has_bars_of_its_own_and_its_price_is_told(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside stock in float32, of which nothing else is: the rest is held to it as ever."""
    monkeypatch.setattr("sdfast.models.int8.PAYS_FROM", 0)
    folder = engines.build(small, tmp_path / "int8", int8=True)
    report = validate(folder, prompts=["boat"], steps=2, scheduler="DDIM")
    modules = {module.name: module for module in report.modules}
    for name, bar in {"unet": 1 / 16, "step": 1 / 16, "pictures": 1 / 10}.items():
        module = modules[name]
        assert (module.bar, module.passed, module.stock_relative_l2) == (bar, True, None), report.table()
        assert module.relative_l2 > 1e-3
    assert modules["vae_decoder"].bar == modules["context"].bar == 1e-4
    assert report.setting.int8 == len(read_manifest(folder).int8) > 0
    picture = report.pictures[0]
    assert picture.bar is None and picture.stock_psnr is None
    assert report.prices == [
        f"the price of INT8 in {report.setting.int8} layers: the U-Net's relative L2 is "
        f"{modules['unet'].relative_l2:.2e}; the furthest picture is {picture.psnr:.1f} dB from the reference"
    ]
    page = html.unescape((folder / "validation" / "report.html").read_text("utf-8"))
    assert report.prices[0][1:] in page and "with INT8 the relative L2 error of the pictures" in page
    assert "and 0.0625 for the U-Net, which INT8 approximates" in page
    assert "stock.picture.psnr_min" not in report.figures()
    broken = Measured("unet", "on its inputs", Error(1, 0.1, 0.1, 1.0, 0.99))
    judged = rule.judge_module(broken, rounding="INT8")
    [failure] = rule.failures([judged], [], [])
    assert failure.reason == "relative L2 1.00e-01 is above 0.0625, the bar of INT8 (on its inputs)"


def test_fp8_has_bars_of_its_own_and_its_price_is_told(small: Path, tmp_path: Path) -> None:
    folder = engines.build(small, tmp_path / "fp8", dtype="fp16", fp8=True)
    report = validate(folder, prompts=["boat"], steps=2, scheduler="DDIM")
    modules = {module.name: module for module in report.modules}
    for name, bar in {"unet": 1 / 8, "step": 1 / 8, "pictures": 1 / 5}.items():
        module = modules[name]
        assert (module.bar, module.passed) == (bar, True), report.table()
        assert module.stock_relative_l2 is not None
        assert module.relative_l2 > 2 * module.stock_relative_l2
    untouched = modules["vae_decoder"]
    assert untouched.bar == pytest.approx(max(1e-4, 1.1 * (untouched.stock_relative_l2 or 0)))
    assert report.setting.fp8 == len(read_manifest(folder).fp8) > 0
    furthest, stock = report.pictures[0].psnr, report.pictures[0].stock_psnr
    assert len(report.prices) == 1 and stock is not None and furthest < stock
    for told in (report.table(), (folder / "validation" / "report.html").read_text("utf-8")):
        assert f"{furthest:.1f} dB from the reference, stock" in told
        assert f"{modules['unet'].relative_l2:.2e}, that of stock in fp16" in told
    assert report.figures()["stock.picture.psnr_min"] == min(one.stock_psnr or 0 for one in report.pictures)
    engines.change_weight(folder, "unet", "conv_in.weight", lambda weight: weight * 2)
    broken = validate(folder, prompts=["boat"], steps=2, scheduler="DDIM")
    reason = next(failure.reason for failure in broken.failures if failure.part == "unet")
    assert "is above 0.125, the bar of FP8" in reason
