"""A deliberately broken engine fails, and the report names the part at fault.

The engines are whole as far as digests go: each is sealed again after it was broken. What is broken differs
from the checkpoint by as little as one weight tensor of a hundred, changed by 1 %.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.models.unet import UNet
from sdfast.validation import Report, validate
from sdfast.validation.rule import RELATIVE_L2
from tests.conftest import FLAT_SIZES
from tests.export.loras import ATTENTION, kohya, random_changes, write
from tests.validation import engines

PROMPT = ["a cabin in misty mountains, watercolor style"]
SOUND = 1e-5  # ten times below the bar: what float32 rounding leaves in a sound engine


def short(folder: Path, **options: object) -> Report:
    return validate(folder, **{"prompts": PROMPT, "steps": 2, "scheduler": "Euler a", **options})


def errors(report: Report) -> dict[str, float]:
    return {module.name: module.worst for module in report.modules}


def at_fault(report: Report) -> set[str]:
    return {failure.part for failure in report.failures}


def test_a_sound_engine_passes_with_a_margin(engine: Path) -> None:
    report = validate(engine, prompts=PROMPT, steps=4)
    assert report.passed, report.table()
    assert max(errors(report).values()) < SOUND
    assert min(picture.psnr for picture in report.pictures) > 90
    own = "DPMSolverMultistepScheduler"
    assert {picture.scheduler for picture in report.pictures} == {own, "Euler a", f"{own}, over a picture"}


@pytest.mark.parametrize(
    ("module", "tensor", "named"),
    [
        ("unet", "mid_block.resnets.0.conv2.weight", "unet"),
        ("unet", "down_blocks.0.resnets.0.conv1.weight", "unet"),
        ("unet", "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight", "unet"),
        ("context", "proj.weight", "context"),
        ("time_shift", "time_embedding.linear_1.weight", "time_shift"),
        ("vae_decoder", "decoder.conv_in.weight", "vae_decoder"),
        ("vae_encoder", "encoder.conv_in.weight", "vae_encoder"),
        ("text_encoder", "model.encoder.layers.1.mlp.fc1.weight", "text_encoder.hidden_states"),
    ],
)
def test_one_weight_changed_by_one_percent(engine: Path, module: str, tensor: str, named: str) -> None:
    engines.change_weight(engine, module, tensor, engines.perturbed)
    report = short(engine)
    print(f"{tensor} changed by 1 %: {named} {errors(report)[named]:.2e}, bar {RELATIVE_L2:.0e}")
    assert named in at_fault(report)
    networks = {"text_encoder.hidden_states", "context", "time_shift", "unet", "vae_decoder", "vae_encoder"}
    for sound in networks - {named}:
        assert errors(report)[sound] < SOUND, report.table()


def test_swapped_keys_and_values(engine: Path, checkpoint: Path) -> None:
    with torch.device("meta"):
        widths = UNet(Networks.of(resolve(checkpoint)).unet).context_widths

    def swapped(weight: torch.Tensor) -> torch.Tensor:
        parts = list(weight.split(widths))
        parts[0], parts[1] = parts[1], parts[0]
        return torch.cat(parts)

    engines.change_weight(engine, "context", "proj.weight", swapped)
    report = short(engine)
    assert {"context", "step"} <= at_fault(report)
    assert errors(report)["unet"] < SOUND


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "EulerDiscreteScheduler"},
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        {"beta_end": 0.0121},
        {"use_karras_sigmas": False},
        {"prediction_type": "v_prediction"},
    ],
)
def test_a_scheduler_that_is_not_the_checkpoints(engine: Path, fields: dict[str, object]) -> None:
    engines.change_scheduler(engine, **fields)
    report = validate(engine, prompts=PROMPT, steps=4)
    assert {"scheduler config", "scheduler DPMSolverMultistepScheduler"} <= at_fault(report)
    for module in ("unet", "context", "time_shift", "vae_decoder"):
        assert errors(report)[module] < SOUND
    reason = next(f.reason for f in report.failures if f.part == "scheduler config")
    assert all(field in reason for field in fields if field != "clip_sample")


def test_a_scheduler_that_only_the_figures_can_tell(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config is right, the table is not: the first order of the solver in place of the second."""
    from sdfast.validation import comparison

    def first_order(name: str, config: dict[str, object], **run: object) -> object:
        return schedule(name, {**config, "solver_order": 1}, **run)

    schedule = comparison.schedule
    monkeypatch.setattr(comparison, "schedule", first_order)
    monkeypatch.setattr("sdfast.preparation.schedule", first_order)
    report = validate(engine, prompts=PROMPT, steps=6)
    assert at_fault(report) - {"picture"} == {"scheduler DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("module", ["unet", "vae_decoder", "vae_encoder"])
def test_not_a_number(engine: Path, module: str) -> None:
    def broken(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[0] = torch.nan
        return weight

    name = {"unet": "conv_out", "vae_decoder": "decoder.conv_out", "vae_encoder": "encoder.conv_out"}[module]
    engines.change_weight(engine, module, f"{name}.weight", broken)
    report = short(engine)
    assert {module, "picture"} <= at_fault(report)
    reasons = {failure.part: failure.reason for failure in report.failures}
    assert "not numbers" in reasons[module]
    assert "not numbers" in reasons["picture"]
    again = Report.model_validate_json((engine / "validation" / "report.json").read_text("utf-8"))
    assert at_fault(again) == at_fault(report)


def test_another_tokenizer(engine: Path) -> None:
    path = engine / "tokenizer" / "sdfast_tokenizer.json"
    settings = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**settings, "pad": 0}), "utf-8")
    engines.reseal(engine)
    assert "tokenizer" in at_fault(short(engine))


@pytest.mark.usefixtures("parsed_once")
def test_one_weight_of_an_onnx_engine(flat_sd: Path, flat_onnx: Path, tmp_path: Path) -> None:
    """The same through ONNX Runtime, with a LoRA: sound as exported, not when external data is changed."""
    pytest.importorskip("onnxruntime")
    checkpoint = engines.use_own_scheduler(shutil.copytree(flat_sd, tmp_path / "checkpoint"))
    changes = random_changes(checkpoint, ATTENTION, components=["text_encoder"])
    lora = write(tmp_path / "lora.safetensors", changes, kohya)
    folder = Path(shutil.copytree(flat_onnx, tmp_path / "onnx"))
    export(checkpoint, folder, Recipe.make(sizes=FLAT_SIZES, batch=2, loras=[lora]))  # other modules are kept
    report = validate(folder, prompts=PROMPT, steps=4)
    assert report.passed, report.table()
    assert max(errors(report).values()) < SOUND
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensor = engines.perturb_onnx_weight(broken, "unet")
    report = short(broken)
    print(f"{tensor} changed by 1 %: unet {errors(report)['unet']:.2e}, bar {RELATIVE_L2:.0e}")
    assert "unet" in at_fault(report)
    assert errors(report)["context"] < SOUND
