"""The command line: pictures with their parameters inside, and one line for whatever is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sdfast import infotext
from sdfast.cli import main
from sdfast.cli.export import engine_name
from sdfast.cli.options import CONTROL_MODES, UPSCALERS
from sdfast.cli.pairs import lora
from sdfast.infotext import read
from sdfast.manifest import read_manifest
from sdfast.masked_area import MaskedArea
from sdfast.pipeline import Pipeline
from sdfast.request import ControlMode
from sdfast.request.fields import Upscaler
from sdfast.schedulers import SAMPLERS, resolve
from tests import checkpoints
from tests.backends import xformers
from tests.export.embeddings import automatic1111
from tests.export.loras import kohya, random_changes, write
from tests.test_image_to_image import image, mask


def sdfast(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: Any) -> str:
    """The one line on stderr of a command that must fail."""
    result = sdfast(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.output
    return lines[0].removeprefix("Error: ")


def draw(engine: Path, *arguments: Any) -> Result:
    return sdfast("generate", "a cabin, misty", "--engine", engine, "--steps", 2, *arguments)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_picture_tells_how_it_was_made(sd_engine: Path, here: Path) -> None:
    result = draw(sd_engine, "--seed", 7, "--negative", "blurry", "--clip-skip", 1, "-o", "out/cabin.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == "out/cabin.png  seed 7\n"
    told = infotext.read(here / "out" / "cabin.png")
    assert (told.prompt, told.negative_prompt) == ("a cabin, misty", "blurry")
    assert (told.steps, told.seed, told.cfg_scale) == (2, 7, 7.0)
    assert (told.width, told.height) == Image.open(here / "out" / "cabin.png").size
    assert (told.sampler, told.schedule_type) == ("DPM++ 2M", "Karras")
    assert told.model == sd_engine.name
    assert told.extra["Clip skip"] == "2"


def test_the_same_seed_gives_the_same_file_and_the_seed_is_told(sd_engine: Path, here: Path) -> None:
    seed = draw(sd_engine, "-o", "a.png").stdout.split()[-1]
    assert draw(sd_engine, "-o", "b.png", "--seed", seed).exit_code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_several_pictures_are_numbered_in_a_directory_and_never_replaced(sd_engine: Path, here: Path) -> None:
    for _ in range(2):
        assert draw(sd_engine, "--count", 2, "--seed", 40, "-o", "out").exit_code == 0
    names = sorted(path.name for path in (here / "out").iterdir())
    assert names == ["00001-40.png", "00002-41.png", "00003-40.png", "00004-41.png"]
    assert draw(sd_engine, "--count", 2, "-o", "x.png").exit_code == 0
    assert {"x-1.png", "x-2.png"} <= {path.name for path in here.iterdir()}


def test_a_file_that_is_there_is_replaced_only_when_asked(sd_engine: Path, here: Path) -> None:
    (here / "mine.png").write_text("mine")
    message = refused("generate", "a", "--engine", sd_engine, "--steps", 1, "-o", "mine.png")
    assert message == "mine.png: already there; give another -o, or --overwrite"
    assert (here / "mine.png").read_text() == "mine"
    assert draw(sd_engine, "-o", "mine.png", "--overwrite").exit_code == 0
    assert Image.open(here / "mine.png").size == (64, 64)
    assert [path.name for path in here.iterdir()] == ["mine.png"]


def test_a_file_that_appears_meanwhile_is_not_replaced(
    sd_engine: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdfast import pictures

    drawn = pictures._images

    def slow(*arguments: Any) -> Any:
        (here / "a.png").write_text("mine")
        return drawn(*arguments)

    monkeypatch.setattr(pictures, "_images", slow)
    assert "already there" in refused("generate", "a", "--engine", sd_engine, "--steps", 1, "-o", "a.png")
    assert (here / "a.png").read_text() == "mine"
    assert [path.name for path in here.iterdir()] == ["a.png"]


def test_the_stock_pipeline_draws_the_same_request(sd_engine: Path, here: Path) -> None:
    for name, backend in (("ours.png", "engine"), ("stock.png", "diffusers")):
        result = draw(sd_engine, "--seed", 3, "--backend", backend, "-o", name)
        assert result.exit_code == 0, result.output
    ours, stock = (np.asarray(Image.open(here / name), dtype=int) for name in ("ours.png", "stock.png"))
    assert np.abs(ours - stock).max() <= 1
    assert infotext.read(here / "stock.png").seed == 3


@pytest.fixture
def files(here: Path) -> Path:
    """An image and a mask, and what is none."""
    image().save(here / "image.png")
    image().save(here / "image.webp", lossless=True)
    mask().save(here / "mask.png")
    mask(72).save(here / "wide.png")
    image().save(here / "image.gif")
    (here / "cut.png").write_bytes((here / "image.png").read_bytes()[:200])
    return here


@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_over_an_image_is_the_stock_pipelines(sd_engine: Path, files: Path, masked: bool) -> None:
    given = ["--image", "image.webp", "--strength", 0.6, *(["--mask", "mask.png"] if masked else [])]
    for name, backend in (("ours.png", "engine"), ("stock.png", "diffusers")):
        options = ["--seed", 3, "--steps", 5, "--scheduler", "Euler a", "--count", 2, "--backend", backend]
        result = draw(sd_engine, *given, *options, "-o", name)
        assert result.exit_code == 0, result.output
    for number in (1, 2):
        pair = [files / f"{name}-{number}.png" for name in ("ours", "stock")]
        ours, stock = (np.asarray(Image.open(path), dtype=int) for path in pair)
        assert np.abs(ours - stock).max() <= 1
    told = infotext.read(files / "ours-1.png")
    assert told == infotext.read(files / "stock-1.png")
    assert (told.steps, told.extra) == (5, {"Denoising strength": "0.6"})


def test_a_part_of_an_image_is_the_stock_pipelines(sd_engine: Path, here: Path) -> None:
    """Drawn at the engine's size, or the one that is asked for, and pasted: the picture has the image's."""
    whole, hole = image(0, 150, 100), Image.new("L", (150, 100))
    hole.paste(mask(40, 30), (100, 20))
    whole.save(here / "image.png")
    hole.save(here / "mask.png")
    given = ["--image", "image.png", "--mask", "mask.png", "--mask-padding", 6, "--seed", 3, "--steps", 4]
    for name, backend in (("ours.png", "engine"), ("stock.png", "diffusers")):
        result = draw(
            sd_engine, *given, "--scheduler", "Euler a", "--count", 2, "--backend", backend, "-o", name
        )
        assert result.exit_code == 0, result.output
    for number in (1, 2):
        pair = [here / f"{name}-{number}.png" for name in ("ours", "stock")]
        ours, stock = (np.asarray(Image.open(path), dtype=int) for path in pair)
        assert ours.shape == stock.shape == (100, 150, 3)
        assert np.abs(ours - stock).max() <= 1
        assert np.array_equal(ours[np.asarray(hole) == 0], np.asarray(whole)[np.asarray(hole) == 0])
    told = infotext.read(here / "ours-1.png")
    assert (told.width, told.height) == (64, 64)
    part = {"Inpaint area": "Only masked", "Masked area padding": "6"}
    assert told.extra == {"Denoising strength": "1", **part}
    assert draw(sd_engine, *given, "--size", "96x72", "-o", "large.png").exit_code == 0
    assert infotext.read(here / "large.png").width == 96
    assert Image.open(here / "large.png").size == (150, 100)


def test_a_part_is_cut_out_of_the_control_image(controlled_engine: Path, files: Path) -> None:
    image(2).save(files / "control.png")
    hole = Image.new("L", (64, 64))
    hole.paste(mask(20, 20), (30, 10))
    hole.save(files / "mask.png")
    given = [*PART, 4, "--seed", 3, "--steps", 4, "--strength", 0.7, "--control-scale", 0.8]
    for name, backend in (("ours.png", "engine"), ("stock.png", "diffusers")):
        result = draw(controlled_engine, *given, "--control", "control.png", "--backend", backend, "-o", name)
        assert result.exit_code == 0, result.output
    ours, stock = (np.asarray(Image.open(files / name), dtype=int) for name in ("ours.png", "stock.png"))
    assert np.abs(ours - stock).max() <= 1
    area = MaskedArea.make(image(), hole, padding_mask_crop=4, height=64, width=64)
    pipe = Pipeline.from_engine(controlled_engine)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        **{"prompt": "a cabin, misty", "image": area.cut(image()), "mask_image": area.cut(hole)},
        **{"control_image": area.cut(image(2)), "controlnet_conditioning_scale": 0.8, "seed": 3},
        **{"strength": 0.7, "num_inference_steps": 4, "scheduler": "dpmpp_2m_karras", "guidance_scale": 7.0},
    ).images[0]
    assert np.abs(ours - np.asarray(area.pasted(drawn), int)).max() <= 1
    other = ["generate", "a", "--engine", controlled_engine, *PART, 4, "--control", "wide.png"]
    assert "control_image: 72x64, but the image is 64x64" in refused(*other)


PART = ["--image", "image.png", "--mask", "mask.png", "--mask-padding"]
OVER: dict[str, tuple[list[Any], str]] = {
    "a mask alone": (["--mask", "mask.png"], "give --image too"),
    "a strength alone": (["--strength", 0.5], "give --image too"),
    "no file": (["--image", "nowhere.png"], "nowhere.png: cannot be read"),
    "another kind": (["--image", "image.gif"], "image.gif: is not a PNG, JPEG or WebP image"),
    "half a file": (["--image", "cut.png"], "cut.png: cannot be read"),
    "another size": (["--image", "image.png", "--size", "72x64"], "image: 64x64, but the picture is 72x64"),
    "another mask": (["--image", "image.png", "--mask", "wide.png"], "mask_image: 72x64, but the picture"),
    "a padding alone": (["--mask-padding", 8], "mask-padding is for an image and its mask; give --image and"),
    "a padding without a mask": (["--image", "image.png", "--mask-padding", 8], "give --image and --mask"),
    "a negative padding": ([*PART, -1], "padding_mask_crop: must be greater than or equal to 0 (got -1)"),
    "a padding around another mask": (
        ["--image", "image.png", "--mask", "wide.png", "--mask-padding", 8],
        "mask_image: 72x64, but the image is 64x64",
    ),
    "a part of no size": ([*PART, 8, "--size", "0x0"], "height: must be greater than or equal to 8"),
    "a huge part": ([*PART, 8, "--size", "999999999x64"], "width: must be less than or equal to 8192"),
    "a part outside": ([*PART, 8, "--size", "256x64"], "size 256x64 is not one of this engine's"),
    "a part and a second pass": ([*PART, 8, "--hires", "96x96"], "hires: is for pictures drawn from noise"),
    "too little": (["--image", "image.png", "--strength", 0.1], "strength=0.1 of 2 steps leaves no step"),
    "too much": (["--image", "image.png", "--strength", 2], "strength: must be less than or equal to 1"),
}


@pytest.mark.parametrize("case", OVER)
def test_a_bad_image_is_one_line_and_writes_nothing(sd_engine: Path, files: Path, case: str) -> None:
    options, message = OVER[case]
    assert message in refused("generate", "a", "--engine", sd_engine, "--steps", 2, *options, "-o", "a.png")
    assert not (files / "a.png").exists()


def test_an_images_size_is_looked_at_before_it_is_decoded(
    sd_engine: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8200, 8)).save(here / "long.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    assert "long.png: 8200x8, but sides are at most 8192" in refused(
        "generate", "a", "--engine", sd_engine, "--image", "long.png"
    )


def test_a_checkpoint_without_an_engine_is_drawn_by_the_stock_pipeline(
    tiny_sd: Path, sd_engine: Path, here: Path
) -> None:
    options = ["--steps", 2, "--seed", 3, "--clip-skip", 1, "--backend", "diffusers"]
    for name, source in (("engine.png", ["--engine", sd_engine]), ("alone.png", ["--checkpoint", tiny_sd])):
        result = sdfast("generate", "a cabin", *source, *options, "-o", name)
        assert result.exit_code == 0, result.output
    engine, alone = (np.asarray(Image.open(here / name)) for name in ("engine.png", "alone.png"))
    assert np.array_equal(engine, alone)
    told = infotext.read(here / "alone.png")
    assert told == infotext.read(here / "engine.png")  # also the name: both are called "sd"
    assert told.model_hash
    assert (told.steps, told.seed, told.width, told.height) == (2, 3, 64, 64)


def test_a_checkpoint_is_drawn_in_the_dtype_and_size_asked_for(tiny_sd: Path, here: Path) -> None:
    stock = ["--checkpoint", tiny_sd, "--backend", "diffusers", "--seed", 3, "--steps", 2]
    for name, dtype in (("a.png", "fp32"), ("b.png", "fp16")):
        result = sdfast("generate", "a", *stock, "--size", "72x64", "--dtype", dtype, "-o", name)
        assert result.exit_code == 0, result.output
    exact, half = (np.asarray(Image.open(here / name), dtype=int) for name in ("a.png", "b.png"))
    assert exact.shape == half.shape == (64, 72, 3)
    assert 0 < np.abs(exact - half).max() < 32
    assert "no such folder or file" in refused(
        "generate", "a", "--backend", "diffusers", "--checkpoint", "nowhere"
    )
    assert "must be a multiple of 8" in refused("generate", "a", *stock, "--size", "65x64")


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_attention_by_another_kernel_draws_the_same(sd_engine: Path, here: Path, backend: str) -> None:
    for kind in ("sdpa", "math", "flash", "auto"):
        result = draw(sd_engine, "--seed", 3, "--backend", backend, "--attention", kind, "-o", f"{kind}.png")
        assert result.exit_code == 0, result.output
        assert "ms" not in result.stderr.replace("it/s", "")  # on a processor nothing is measured
    assert draw(sd_engine, "--seed", 3, "--backend", backend, "-o", "default.png").exit_code == 0
    default = np.asarray(Image.open(here / "default.png"), dtype=int)
    for kind in ("sdpa", "math", "flash", "auto"):
        assert np.abs(np.asarray(Image.open(here / f"{kind}.png"), dtype=int) - default).max() <= 1


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_an_attention_that_is_not_here_is_one_line(
    sd_engine: Path, here: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    xformers.remove(monkeypatch)
    command = ["generate", "a", "--engine", sd_engine, "--backend", backend, "--attention"]
    assert 'pip install "sdfast[xformers]"' in refused(*command, "xformers")
    assert "'cudnn' runs on CUDA alone, and the device is 'cpu'" in refused(*command, "cudnn")
    xformers.install(monkeypatch)
    assert "'xformers' runs on CUDA alone" in refused(*command, "xformers")
    assert not list(here.iterdir())


def test_an_eager_engine_can_be_compiled_and_says_so(
    flat_engine: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdfast.backends.eager._COMPILER", "eager")  # Inductor takes a minute
    compiled = draw(flat_engine, "--seed", 3, "--backend", "eager", "--compile", "-o", "compiled.png")
    assert compiled.exit_code == 0, compiled.output
    assert "sdfast: compiling unet for sample 2x4x8x8" in compiled.stderr
    assert draw(flat_engine, "--seed", 3, "-o", "plain.png").exit_code == 0
    assert (here / "compiled.png").read_bytes() == (here / "plain.png").read_bytes()


def test_a_compiler_that_fails_is_one_line_and_no_picture(
    sd_engine: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler\nand a page of reasons")

    monkeypatch.setattr("sdfast.backends.eager._COMPILER", fails)
    result = draw(sd_engine, "--compile")
    assert result.exit_code == 1
    told, error = result.stderr.splitlines()
    assert told.startswith("sdfast: compiling vae_decoder")
    assert error.startswith("Error: vae_decoder: torch.compile failed: no compiler; it needs a C++ compiler")
    assert not list(here.iterdir())


def test_what_an_engine_cannot_be_asked_for_is_one_line(sd_engine: Path, says_onnx: Path, here: Path) -> None:
    generate = ["generate", "a", "--engine"]
    assert "the engine is eager; leave --backend out" in refused(*generate, sd_engine, "--backend", "onnx")
    assert "compile is for eager engines, and this one is onnx" in refused(*generate, says_onnx, "--compile")
    assert "attention 'auto' is for eager" in refused(*generate, says_onnx, "--attention", "auto")
    stock = refused(*generate, sd_engine, "--backend", "diffusers", "--compile")
    assert "compile is for eager engines, not for the stock pipeline" in stock
    assert "compile is for eager engines" in refused("validate", says_onnx, "--compile")


def test_an_engine_is_validated_as_it_is_run(sd_engine: Path, here: Path) -> None:
    engine = shutil.copytree(sd_engine, here / "engine")
    result = sdfast("validate", engine, "--attention", "math", "--steps", 2)
    assert result.exit_code == 0, result.output
    report = json.loads((engine / "validation" / "report.json").read_text())
    assert report["setting"]["backend"] == "eager, attention math"


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_what_was_cut_from_the_prompt_is_told_on_stderr(sd_engine: Path, here: Path, backend: str) -> None:
    options = ["--engine", sd_engine, "--backend", backend, "--steps", 1, "-o", "a.png"]
    result = sdfast("generate", ("sea " * 100).strip(), *options)
    assert result.exit_code == 0
    [told] = [line for line in result.stderr.splitlines() if line.startswith("sdfast: ")]
    told_cut = f"left out: {'sea ' * 24 + 'sea'!r} (see --long-prompts)"
    assert told == f"sdfast: the text encoder reads no more than 77 tokens; {told_cut}"
    assert result.stdout.startswith("a.png  seed ")
    assert "left out" not in sdfast("generate", "sea " * 75, *options, "--overwrite").stderr


def test_a_negative_prompt_without_guidance_is_said_to_be_unread(sd_engine: Path, here: Path) -> None:
    options = ["--engine", sd_engine, "--steps", 1, "--negative", "fog", "-o", "a.png", "--overwrite"]
    told = "sdfast: the negative prompt is not read: guidance 1 is not above 1"
    assert told in sdfast("generate", "sea", *options, "--guidance", 1).stderr
    assert "negative prompt" not in sdfast("generate", "sea", *options, "--guidance", 1.5).stderr


def test_a_checkpoint_for_inpainting_draws_with_a_mask_only(
    here: Path, tiny_inpainting: Path, inpainting_engine: Path
) -> None:
    message = refused("generate", "a", "--backend", "diffusers", "--checkpoint", tiny_inpainting)
    assert message.startswith("this U-Net takes 9 channels (inpainting)")
    image().save(here / "image.png")
    mask().save(here / "mask.png")
    over = ["--image", "image.png", "--mask", "mask.png", "--strength", 0.7, "--seed", 1, "--steps", 3]
    for name, source in (
        ("ours.png", ["--engine", inpainting_engine]),
        ("stock.png", ["--checkpoint", tiny_inpainting, "--backend", "diffusers"]),
    ):
        result = sdfast("generate", "a", *source, *over, "-o", name)
        assert result.exit_code == 0, result.output
    ours, stock = (np.asarray(Image.open(here / name), dtype=int) for name in ("ours.png", "stock.png"))
    assert np.abs(ours - stock).max() <= 1


BAD: dict[str, tuple[list[Any], str]] = {
    "no steps": (["--steps", 0], "num_inference_steps: must be greater than or equal to 1 (got 0)"),
    "a billion steps": (["--steps", 10**9], "num_inference_steps: must be less than or equal to 1000"),
    "NaN guidance": (["--guidance", "nan"], "guidance_scale: must be a finite number (got nan)"),
    "infinite guidance": (["--guidance", "inf"], "guidance_scale: must be a finite number"),
    "a billion pictures": (["--count", 10**9], "num_images_per_prompt: must be less than or equal to 128"),
    "a negative seed": (["--seed", -1], "seed: must be greater than or equal to 0 (got -1)"),
    "a huge seed": (["--seed", 2**64], "seed: must be less than"),
    "an unknown scheduler": (["--scheduler", "dpm++9"], "unknown scheduler 'dpm++9'"),
    "a size that is none": (["--size", "big"], "size: 'big' is not WIDTHxHEIGHT"),
    "a size of thousands of digits": (["--size", "9" * 5000 + "x8"], "size: "),
    "a crooked size": (["--size", "64x65"], "height: must be a multiple of 8; the nearest are 64 and 72"),
    "a size outside": (["--size", "256x64"], "size 256x64 is not one of this engine's"),
    "no size": (["--size", "0x0"], "height: must be greater"),
    "layers left out": (["--clip-skip", 9], "clip_skip: 9, but this text encoder has 3 layers"),
    "a device": (["--device", "gpu"], "device: 'gpu' is not one of 'cpu', 'cuda', 'cuda:N'"),
    "another kind of picture": (["-o", "a.jpg"], "a.jpg: pictures are written as PNG"),
    "a name that is too long": (["-o", "x" * 300 + ".png"], "File name too long; give another -o"),
    "a directory in the way": (["-o", "folder.png", "--overwrite"], "folder.png: already there"),
    "a file for a directory": (["-o", "file"], "is not a directory; give another -o"),
    "a file for a parent": (["-o", "file/a.png"], "is not a directory; give another -o"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_one_line_and_writes_nothing(sd_engine: Path, here: Path, case: str) -> None:
    (here / "folder.png").mkdir()
    (here / "file").touch()
    options, message = BAD[case]
    assert message in refused("generate", "a", "--engine", sd_engine, "--steps", 1, *options)
    assert sorted(path.name for path in here.rglob("*")) == ["file", "folder.png"]


@pytest.mark.parametrize("prompt", ["a\0b", "a \udce4 b", "x" * 40_000])
def test_a_bad_prompt_is_one_line(sd_engine: Path, here: Path, prompt: str) -> None:
    assert refused("generate", prompt, "--engine", sd_engine).startswith("prompts: ")


def test_a_damaged_engine_is_refused_with_the_file_named(sd_engine: Path, here: Path) -> None:
    engine = shutil.copytree(sd_engine, here / "engine")
    with (engine / "unet.safetensors").open("r+b") as file:
        file.truncate(1000)
    for command in (["generate", "a", "--engine", engine], ["info", engine]):
        assert f"{engine / 'unet.safetensors'}: 1000 bytes, but " in refused(*command)
    assert "no such engine; make one with" in refused("info", here / "none")
    assert "not an engine (no manifest.json)" in refused("generate", "a", "--engine", here)


def test_info_tells_what_an_engine_is(sd_engine: Path) -> None:
    result = sdfast("info", sd_engine)
    assert result.exit_code == 0
    assert "backend      eager fp32" in result.stdout
    assert '"schema_version": 1' in sdfast("info", sd_engine, "--json").stdout


def test_schedulers_lists_every_name(here: Path) -> None:
    head, *listed, blank, types = sdfast("schedulers").stdout.splitlines()
    assert head.split("  ")[0] == "name" and not blank
    known = types.removeprefix("schedule types: ").split(", ")
    assert {"Karras", "SGM Uniform", "Align Your Steps"} <= set(known)
    assert all(resolve(f"Euler {known_type}") for known_type in known)
    for sampler, line in zip(SAMPLERS, listed, strict=True):
        cells = [cell.strip() for cell in line.split("  ") if cell]
        told = [sampler.name, sampler.short_name, sampler.scheduler, str(sampler.evaluations), sampler.advice]
        assert cells == told


def test_schedulers_as_json_are_what_their_names_mean(here: Path) -> None:
    listed = json.loads(sdfast("schedulers", "--json").stdout)
    assert len(listed) == len(SAMPLERS)
    for told, sampler in zip(listed, SAMPLERS, strict=True):
        assert resolve(told["name"]) == resolve(told["short_name"]) == sampler
        assert (told["scheduler"], told["evaluations"]) == (sampler.scheduler, sampler.evaluations)
        assert told["overrides"] == dict(sampler.overrides)
        assert told["aliases"] == list(sampler.aliases)


def test_doctor_tells_versions_and_what_is_missing(here: Path) -> None:
    result = sdfast("doctor")
    assert result.exit_code == 0
    for name in ("sdfast", "python", "torch", "onnxruntime", "providers", "cuda", "xformers"):
        assert any(line.startswith(name) for line in result.stdout.splitlines()), name
    [kinds] = [line for line in result.stdout.splitlines() if line.startswith("attention")]
    assert "auto, sdpa, flash" in kinds


def test_export_says_each_stage_and_where_the_engine_is(tiny_sd: Path, here: Path) -> None:
    (here / "small.toml").write_text(f'checkpoint = "{tiny_sd}"\nbackend = "eager"')
    result = sdfast("export", "--recipe", "small.toml")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "engine: engines/small"
    for stage in ("checkpoint", "unet", "vae_decoder", "text_encoder", "digests"):
        assert f"  {stage} " in result.stdout
    assert "up to date; nothing to do" in sdfast("export", "--recipe", "small.toml").stdout
    assert draw(here / "engines" / "small", "-o", "a.png").exit_code == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/model", "model"),
        ("landscapes", "landscapes"),
        ("weights/v1.5.safetensors", "v1.5"),
        (".", "checkpoint"),
        ("../checkpoint/", "checkpoint"),
    ],
)
def test_an_engine_is_called_like_its_source(
    here: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    (here / "checkpoint").mkdir()
    monkeypatch.chdir(here / "checkpoint")
    assert engine_name(source, None) == name
    assert engine_name(source, Path("export/sd15.toml")) == "sd15"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--backend", "eager"], "no such folder or file"),
        (["{sd}", "--backend", "eager", "--batch", "0"], "batch: must be greater than or equal to 1"),
        (["{sd}", "--backend", "eager", "--height", "12", "--width", "12"], "multiples of 8"),
        (["{sd}", "--backend", "eager", "--height", "-8", "--width", "8"], "must be WIDTHxHEIGHT"),
        (["{sd}", "--recipe", "none.toml"], "not a recipe that can be read"),
        (["{sd}", "--backend", "eager", "-o", "mine"], "is there and is not an engine"),
        (["{sd}", "--backend", "eager", "--revision", "main"], "revision has no meaning"),
        (["{sd}", "--no-autotune"], "autotune: only the inductor backend times candidates"),
        (["{sd}", "--backend", "eager", "--winograd"], "winograd: only graphs for the CPU have it"),
        (["{sd}", "--backend", "eager", "--vae-dtype", "fp32"], "vae_dtype: only fp16 engines choose it"),
    ],
)
def test_a_bad_export_is_one_line(tiny_sd: Path, here: Path, arguments: list[str], message: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "file").touch()
    assert message in refused("export", *(argument.format(sd=tiny_sd) for argument in arguments))
    assert sorted(path.name for path in here.rglob("*")) == ["file", "mine"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["export"],
        ["export", "x", "--height", "64"],
        ["generate", "a"],
        ["generate", "a", "--engine", "x", "--steps", "many"],
        ["generate", "a", "--engine", "x", "--backend", "tensorrt"],
        ["generate", "a", "--engine", "x", "--checkpoint", "y", "--backend", "diffusers"],
        ["generate", "a", "--checkpoint", "x"],
        ["generate", "a", "--engine", "x", "--dtype", "fp16"],
        ["generate", "a", "--engine", "x", "--attention", "fast"],
        ["paint"],
        ["--bogus"],
    ],
)
def test_a_command_used_wrongly_shows_its_usage(here: Path, arguments: list[str]) -> None:
    result = sdfast(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.output


def test_a_list_of_prompts_that_cannot_be_read_is_one_line(sd_engine: Path, here: Path) -> None:
    (here / "empty.txt").write_text("\n \n")
    (here / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in [
        ("none", "cannot be read"),
        ("empty", "holds no prompts"),
        ("bytes", "cannot be read"),
    ]:
        assert message in refused("validate", sd_engine, "--prompts", f"{name}.txt")


def test_the_real_command_fails_with_one_line_and_shows_more_with_debug(here: Path) -> None:
    command = [sys.executable, "-m", "sdfast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for options, traceback in (([], False), (["--debug"], True)):
        result = subprocess.run(
            [*command, *options, "serve", "no/engine"],  # which takes no torch to say
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert result.returncode == 1
        assert ("Traceback" in result.stderr) == traceback
        assert traceback or result.stderr.splitlines() == [
            "Error: no/engine: no such engine; make one with `sdfast export SOURCE -o no/engine`"
        ]


def test_options_offer_what_requests_take() -> None:
    """They are written out, since importing those takes time."""
    assert get_args(ControlMode) == CONTROL_MODES
    assert get_args(Upscaler) == UPSCALERS


@pytest.mark.parametrize("module", ["sdfast", "sdfast.cli"])
def test_the_command_runs_as_a_module_under_its_own_name(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "paint"], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("Usage: sdfast [OPTIONS] COMMAND [ARGS]...")
    assert "No such command 'paint'" in result.stderr


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors=0.8", "style.safetensors", 0.8),
        ("org/style=-1", "org/style", -1.0),
        ("a=b.safetensors", "a=b.safetensors", 1.0),
        ("a=b=.5", "a=b", 0.5),
        ("a=2=1e-1", "a=2", 0.1),
    ],
)
def test_the_scale_of_a_lora_is_the_number_after_the_last_equals_sign(
    here: Path, text: str, source: str, scale: float
) -> None:
    assert lora(text) == {"source": source, **({"scale": scale} if scale != 1 else {})}


def test_loras_are_merged_told_and_rebuilt_and_stock_draws_with_them(tiny_sd: Path, here: Path) -> None:
    write(here / "style=2", random_changes(tiny_sd), kohya)
    arguments = ("export", tiny_sd, "-o", "engine", "--backend", "eager", "--lora")
    ambiguous = sdfast(*arguments, "style=2")
    assert ambiguous.exit_code == 2 and "say style=2=1, or another scale" in ambiguous.stderr
    assert "style=2: is not a LoRA; give a .safetensors file" in refused(*arguments, "style=2=0.5")
    (here / "style=2").rename(here / "style.safetensors")
    made = sdfast(*arguments, "style.safetensors=0.5", "--lora", "style.safetensors=-0.25")
    assert made.exit_code == 0, made.output
    told = "LoRAs        style.safetensors, scale 0.5; style.safetensors, scale -0.25"
    assert told in sdfast("info", "engine").output
    same = sdfast("rebuild", "engine")
    assert same.exit_code == 0 and "up to date" in same.output
    for name, backend in (("ours.png", "engine"), ("stock.png", "diffusers")):
        result = draw(here / "engine", "--seed", 3, "--backend", backend, "-o", name)
        assert result.exit_code == 0, result.output
    ours, stock = (np.asarray(Image.open(here / name), dtype=int) for name in ("ours.png", "stock.png"))
    assert np.abs(ours - stock).max() <= 1


def test_loras_of_requests_are_told_and_drawn_with(tiny_sd: Path, here: Path) -> None:
    """By stock, too, and in the parameters of pictures."""
    write(here / "style.safetensors", random_changes(tiny_sd), kohya)
    made = sdfast(
        *("export", tiny_sd, "-o", "engine", "--backend", "eager"),
        *("--lora-on-request", "style.safetensors=oil"),
    )
    assert made.exit_code == 0, made.output
    assert "LoRAs        oil, of style.safetensors, as requests choose" in sdfast("info", "engine").output
    same = sdfast("rebuild", "engine")
    assert same.exit_code == 0 and "up to date" in same.output
    for name, *given in (
        ("ours.png", "--lora", "oil=-0.5"),
        ("stock.png", "--lora", "oil=-0.5", "--backend", "diffusers"),
        ("plain.png",),
    ):
        result = draw(here / "engine", "--seed", 3, *given, "-o", name)
        assert result.exit_code == 0, result.output
    ours, stock, plain = (
        np.asarray(Image.open(here / name), dtype=int) for name in ("ours.png", "stock.png", "plain.png")
    )
    assert np.abs(ours - stock).max() <= 1 < np.abs(ours - plain).max()
    assert read(here / "ours.png").prompt.endswith(" <lora:oil:-0.5>")
    assert "has no LoRA 'ink'" in refused("generate", "a", "--engine", "engine", "--lora", "ink")
    wrong = sdfast("generate", "a", "--engine", "engine", "--lora", "oil=much")
    assert wrong.exit_code == 2 and "'much' is not a number; say oil=0.8" in wrong.stderr


def test_a_controlnet_is_told_and_rebuilt_and_stock_draws_with_it(
    tiny_sd: Path, tiny_controlnet: Path, sd_engine: Path, files: Path
) -> None:
    made = sdfast("export", tiny_sd, "-o", "engine", "--backend", "eager", "--controlnet", tiny_controlnet)
    assert made.exit_code == 0, made.output
    assert f"ControlNet   {tiny_controlnet}" in sdfast("info", "engine").output
    same = sdfast("rebuild", "engine")
    assert same.exit_code == 0 and "up to date" in same.output
    control = ["--control", "image.png", "--control-scale", 0.8, "--control-end", 0.5, "--steps", 4]
    control += ["--control-mode", "guess"]
    for name, backend in (("ours.png", "engine"), ("stock.png", "diffusers")):
        result = draw(files / "engine", "--seed", 3, "--backend", backend, *control, "-o", name)
        assert result.exit_code == 0, result.output
    ours, stock = (np.asarray(Image.open(files / name), dtype=int) for name in ("ours.png", "stock.png"))
    assert np.abs(ours - stock).max() <= 1
    told = infotext.read(files / "ours.png")
    assert told == infotext.read(files / "stock.png")
    assert told.extra == {
        "ControlNet scale": "0.8",
        "ControlNet steps": "0-0.5",
        "ControlNet mode": "Guess",
    }
    asked = ("generate", "a", "-o", "a.png", "--engine")
    assert refused(*asked, "engine").startswith("control_image: is missing; this engine has a ControlNet")
    assert "give --control too" in refused(*asked, "engine", "--control-scale", 1)
    assert "give --control too" in refused(*asked, "engine", "--control-mode", "prompt")
    no_mode = ("--control", "image.png", "--control-mode", "prompt", "--backend", "diffusers")
    assert "diffusers has no mode but guess" in refused(*asked, "engine", *no_mode)
    assert "72x64, but the picture is 64x64" in refused(
        *asked, "engine", "--control", "wide.png", "--size", "64x64"
    )
    assert "this engine has no ControlNet" in refused(*asked, sd_engine, "--control", "image.png")
    assert not (files / "a.png").exists()


def test_several_controlnets_are_told_in_their_order(
    tiny_sd: Path, tiny_controlnet: Path, files: Path
) -> None:
    second = checkpoints.build_controlnet(files / "pose", tiny_sd, seed=7)
    nets = [argument for net in (tiny_controlnet, second) for argument in ("--controlnet", net)]
    made = sdfast("export", tiny_sd, "-o", "engine", "--backend", "eager", *nets)
    assert made.exit_code == 0, made.output
    assert f"ControlNets  {tiny_controlnet}; {second}\n" in sdfast("info", "engine").output
    same = sdfast("rebuild", "engine")
    assert same.exit_code == 0 and "up to date" in same.output
    for name, files_of_both, scales in (
        ("both", ("image.png", "image.png"), (0.8, 0.0)),
        ("first", ("image.png", "none"), (0.8,)),
    ):
        control = [argument for file in files_of_both for argument in ("--control", file)]
        control += [argument for scale in scales for argument in ("--control-scale", scale)]
        result = draw(files / "engine", "--seed", 3, *control, "-o", f"{name}.png")
        assert result.exit_code == 0, result.output
        assert infotext.read(files / f"{name}.png").extra == {"ControlNet scale": "0.8/0"}
    pictures = [Image.open(files / f"{name}.png").tobytes() for name in ("both", "first")]
    assert pictures[0] == pictures[1]
    asked = ("generate", "a", "-o", "a.png", "--engine", "engine")
    assert "control_image: 1, but this engine has 2" in refused(*asked, "--control", "image.png")


def test_embeddings_are_added_told_and_rebuilt_and_stock_draws_with_them(tiny_sd: Path, here: Path) -> None:
    automatic1111(here / "neg.safetensors", 3)
    automatic1111(here / "toy=1", 1)
    arguments = ("export", tiny_sd, "-o", "engine", "--backend", "eager", "--embedding")
    ambiguous = sdfast(*arguments, "toy=1")
    assert ambiguous.exit_code == 2 and "is there under this name; say toy=1=TOKEN" in ambiguous.stderr
    assert "toy=1: is not an embedding; give a .safetensors file" in refused(*arguments, "toy=1=<toy>")
    assert "String should have at least 1 character" in refused(*arguments, "neg.safetensors=")
    (here / "toy=1").rename(here / "toy.safetensors")
    made = sdfast(*arguments, "neg.safetensors=EasyNegative", "--embedding", "toy.safetensors")
    assert made.exit_code == 0, made.output
    told = "embeddings   EasyNegative (3 vectors) of neg.safetensors; toy (1 vector) of toy.safetensors"
    assert told in sdfast("info", "engine").output
    same = sdfast("rebuild", "engine")
    assert same.exit_code == 0 and "up to date" in same.output
    pictures = {}
    for prompt in ("toy, EASYNEGATIVE, a boat", "a boat"):
        for backend in ("engine", "diffusers"):
            run = ("generate", prompt, "--engine", "engine", "--steps", 2, "--seed", 3, "--backend", backend)
            result = sdfast(*run, "-o", "drawn.png", "--overwrite")
            assert result.exit_code == 0, result.output
            pictures[prompt, backend] = np.asarray(Image.open(here / "drawn.png"), dtype=int)
        assert np.abs(pictures[prompt, "engine"] - pictures[prompt, "diffusers"]).max() <= 1
    assert (pictures["a boat", "engine"] != pictures["toy, EASYNEGATIVE, a boat", "engine"]).any()


def test_what_stock_does_not_read_of_a_token_is_told(tiny_sd: Path, here: Path) -> None:
    automatic1111(here / "neg.safetensors", 70)
    export = (
        "export",
        tiny_sd,
        "-o",
        "engine",
        "--backend",
        "eager",
        "--embedding",
        "neg.safetensors=EasyNeg",
    )
    assert sdfast(*export).exit_code == 0
    for backend, told in (("engine", "a boat"), ("diffusers", "a boat")):
        run = ("generate", f"EasyNeg, x x x x {told}", "--engine", "engine", "--backend", backend)
        assert f"left out: '{told}'" in sdfast(*run, "--steps", 1, "-o", f"{backend}.png").stderr


def test_an_engine_is_rebuilt_from_its_own_recipe(sd_engine: Path, tiny_sd: Path, here: Path) -> None:
    engine = Path(shutil.copytree(sd_engine, here / "engine"))
    same = sdfast("rebuild", engine)
    assert same.exit_code == 0 and "up to date" in same.output
    assert refused("rebuild", here / "none").startswith(f"{here / 'none'}: no such engine")
    (engine / "unet.safetensors").write_bytes(b"damaged")
    assert sdfast("rebuild", engine, "--checkpoint", tiny_sd).exit_code == 0
    assert read_manifest(engine).recipe == read_manifest(sd_engine).recipe
    assert draw(engine, "-o", "picture.png").exit_code == 0
