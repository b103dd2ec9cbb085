"""Validation of engines with IP-Adapters: stock diffusers beside them, told of the same images."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdfast.errors import EngineError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.validation import validate
from tests import checkpoints
from tests.export.loras import ATTENTION, kohya, random_changes, write
from tests.sealing import reseal


@pytest.fixture(scope="module")
def engine(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapted")
    encoder = checkpoints.build_image_encoder(place / "image_encoder")
    files = [
        checkpoints.build_ip_adapter(place / f"{form}.safetensors", tiny_sd, form, encoder=encoder)
        for form in ("plus", "plain")
    ]
    recipe = Recipe.make(backend="eager", ip_adapters=files, cache_branch=1)
    return export(tiny_sd, place / "engine", recipe)


RUN = {"steps": 2, "prompts": ["a cabin"], "scheduler": "ddim"}


def test_an_engine_equals_stock_with_the_same_adapters(engine: Path) -> None:
    report = validate(engine, **RUN)
    assert report.passed, report.table()
    modules = {module.name: module for module in report.modules}
    names = ("image_encoder.image_embeds", "image_encoder.hidden_states", "image_context", "image_context_2")
    for name in (*names, "ip_adapter", "unet", "unet_shallow"):
        assert 0 <= modules[name].relative_l2 < 1e-5, name
    assert any("plus.safetensors, plus" in line for line in report.table().splitlines())
    page = (engine / "validation" / "report.html").read_text("utf-8")
    assert page.count('alt="an image"') == 2 and "The images of the IP-Adapters" in page


def test_with_a_lora_of_requests_the_picture_without_it_is_like_the_same_images(
    tiny_sd: Path, engine: Path, tmp_path: Path
) -> None:
    lora = write(tmp_path / "style.safetensors", random_changes(tiny_sd, ATTENTION), kohya)
    recipe = Recipe.make(
        backend="eager",
        ip_adapters=[engine.parent / "plain.safetensors"],
        loras=[{"source": lora, "on_request": True}],
    )
    report = validate(export(tiny_sd, tmp_path / "engine", recipe), **RUN)
    assert report.passed, report.table()
    assert any(picture.scheduler.endswith(", without LoRAs") for picture in report.pictures)


@pytest.mark.slow
def test_in_half_precision_it_is_as_near_as_stock(tiny_sd: Path, engine: Path, tmp_path: Path) -> None:
    files = [engine.parent / f"{form}.safetensors" for form in ("plus", "plain")]
    recipe = Recipe.make(backend="eager", dtype="fp16", ip_adapters=files)
    report = validate(export(tiny_sd, tmp_path / "engine", recipe), steps=6, scheduler="ddim")
    assert report.passed, report.table()


def broken(engine: Path, place: Path, module: str, name: str) -> Path:
    """A copy, one tensor of a module off by a tenth."""
    copy = Path(shutil.copytree(engine, place / "broken"))
    path = copy / f"{module}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    [full] = [one for one in tensors if one.endswith(name)]
    tensors[full] = tensors[full] * 1.1
    path.unlink()
    save_file(tensors, path, metadata)
    reseal(copy, lambda told: None)
    return copy


@pytest.mark.parametrize(
    ("module", "tensor", "named"),
    [
        ("image_encoder", "visual_projection.weight", "image_encoder.image_embeds"),
        ("image_context", "image_proj.latents", "image_context"),
        ("image_context_2", "proj.proj.weight", "image_context_2"),
    ],
)
@pytest.mark.slow
def test_what_is_broken_is_named(engine: Path, tmp_path: Path, module: str, tensor: str, named: str) -> None:
    report = validate(broken(engine, tmp_path, module, tensor), **RUN)
    failed = {module.name for module in report.modules if not module.passed}
    assert named in failed and not report.passed
    others = {"image_encoder.image_embeds", "image_context", "image_context_2", "unet"} - {named}
    assert not failed & others


@pytest.mark.slow
def test_an_adapter_that_changed_is_no_reference(engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engine, tmp_path / "copy"))
    reseal(copy, lambda told: told["checkpoint"]["ip_adapters"][0].update(digest="0" * 64))
    with pytest.raises(EngineError, match=r"exported from other weights than .*plus.safetensors"):
        validate(copy, **RUN)
