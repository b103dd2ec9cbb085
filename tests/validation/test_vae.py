"""Validation of engines with another VAE: stock diffusers beside them with the same one."""

from pathlib import Path

import pytest

from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.validation import validate
from tests import checkpoints
from tests.validation import engines

RUN = {"steps": 2, "prompts": ["a cabin"], "scheduler": "ddim"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")


def test_a_tiny_one_equals_stock_and_a_broken_one_is_named(tiny_sd: Path, tiny: Path, tmp_path: Path) -> None:
    engine = export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", vae=tiny))
    report = validate(engine, **RUN)
    assert report.passed, report.table()
    modules = {module.name: module for module in report.modules}
    for name in ("vae_decoder", "vae_encoder"):
        assert 0 <= modules[name].relative_l2 < 1e-5, name
    assert any(str(tiny) in line for line in report.table().splitlines())
    for module, tensor in (("vae_decoder", "decoder.layers.0"), ("vae_encoder", "encoder.layers.0")):
        engines.change_weight(engine, module, f"{tensor}.weight", engines.perturbed)
        assert module in {failure.part for failure in validate(engine, **RUN).failures}


def test_an_autoencoder_kl_equals_stock(tiny_sd: Path, tmp_path: Path) -> None:
    vae = checkpoints.build_vae(tmp_path / "vae")
    engine = export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", vae=vae))
    report = validate(engine, **RUN)
    assert report.passed, report.table()
    assert all(module.relative_l2 < 1e-5 for module in report.modules if module.name.startswith("vae"))


def test_inpainting_with_a_tiny_one_equals_stock(tiny_inpainting: Path, tiny: Path, tmp_path: Path) -> None:
    """Its U-Net is told the masked image's latents, for which nothing is drawn."""
    engine = export(tiny_inpainting, tmp_path / "engine", Recipe.make(backend="eager", vae=tiny))
    report = validate(engine, **RUN)
    assert report.passed, report.table()
    assert {"masked_image", "mask"} <= {module.name for module in report.modules}


def test_in_half_precision_it_is_as_near_as_stock(tiny_sd: Path, tiny: Path, tmp_path: Path) -> None:
    engine = export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", dtype="fp16", vae=tiny))
    report = validate(engine, **RUN)
    modules = {module.name: module for module in report.modules}
    for name in ("vae_decoder", "vae_encoder"):
        assert modules[name].passed, report.table()
        assert modules[name].stock_relative_l2 is not None
