"""Infotexts: what is written reads back, as this program and as others write it."""

import random
from pathlib import Path

import pytest
from PIL import Image

from sdfast.errors import RequestError
from sdfast.infotext import PNG_KEY, Infotext, parse, png_info, read

FULL = Infotext(
    prompt="a cabin in misty mountains, watercolor style",
    negative_prompt="blurry",
    steps=20,
    sampler="DPM++ 2M",
    schedule_type="Karras",
    cfg_scale=7.0,
    seed=42,
    width=512,
    height=768,
    model="landscapes",
    model_hash="0123abcdef",
    version="sdfast 0.1.0",
    extra={"Denoising strength": "0.5"},
)


def test_the_text_is_what_other_programs_write() -> None:
    assert str(FULL) == (
        "a cabin in misty mountains, watercolor style\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, "
        "Model hash: 0123abcdef, Model: landscapes, Denoising strength: 0.5, Version: sdfast 0.1.0"
    )


def with_prompts(prompt: str, negative: str = "") -> Infotext:
    return Infotext(prompt, negative, steps=4, sampler="Euler a", cfg_scale=7.5, seed=2**64 - 1)


@pytest.mark.parametrize(
    "infotext",
    [
        FULL,
        with_prompts(""),
        with_prompts("", "only negative"),
        with_prompts("two\nlines", "and\n\nthree, more: lines"),
        with_prompts("  spaces, kept  ", "  here too  "),
        with_prompts("\nbegins and ends with a line break\n"),
        with_prompts("山の小屋 🎉 \u2028 é", "немного"),
        with_prompts("Steps: 99, Sampler: fake, Seed: 1\nand more"),
        with_prompts("a prompt\nSteps: 99, Sampler: fake, Seed: 1"),
        with_prompts('quotes " and \\ and (weights:1.2), [x|y]'),
        Infotext("p", steps=1, model='a, "b": c\nd\\', version=" padded ", sampler='"quoted"'),
        Infotext("p", steps=1, extra={"Hires upscale": "2", "Lora hashes": "a: 1, b: 2", "Tiling": ""}),
        Infotext("p", steps=1, seed=2, variation_seed=2**64 - 1, variation_strength=0.25),
        Infotext("a prompt and nothing else"),
    ],
)
def test_what_is_written_reads_back(infotext: Infotext) -> None:
    assert parse(str(infotext)) == infotext


def test_any_values_read_back() -> None:
    chance = random.Random(0)
    letters = 'ab ,:"\\\n\té🎉山'
    for _ in range(2000):
        model, prompt, negative = ("".join(chance.choices(letters, k=chance.randrange(9))) for _ in range(3))
        infotext = Infotext(prompt, negative, steps=1, model=model, seed=chance.randrange(2**64))
        assert parse(str(infotext)) == infotext


def test_a_prompt_line_that_starts_like_the_negative_prompt_is_read_as_one() -> None:
    infotext = parse(str(with_prompts("a\nNegative prompt: b")))
    assert (infotext.prompt, infotext.negative_prompt) == ("a", "b")


def test_other_programs_texts() -> None:
    infotext = parse(
        "masterpiece, 1 cabin <lora:x:0.8>\nNegative prompt: bad\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: "
        '6.5, Seed: 7, Size: 512x512, Lora hashes: "x: 0a1b", Hires upscaler: R-ESRGAN 4x+, Version: v1.9.4\n'
    )
    assert (infotext.steps, infotext.cfg_scale, infotext.seed, infotext.width) == (28, 6.5, 7, 512)
    assert infotext.extra == {"Lora hashes": "x: 0a1b", "Hires upscaler": "R-ESRGAN 4x+"}
    assert infotext.version == "v1.9.4"
    assert infotext.negative_prompt == "bad"


def test_values_of_another_type_are_kept_as_they_stand() -> None:
    infotext = parse("p\nSteps: many, Seed: 1, Size: big, CFG scale: 7")
    assert infotext.steps is None and infotext.width is None
    assert infotext.extra == {"Steps": "many", "Size": "big"}


@pytest.mark.parametrize(
    "text", ["", "a: b", "one, two: three", "Steps", "x" * 100_000, "a, " * 50_000, '"' * 9999]
)
def test_text_without_settings_is_a_prompt(text: str) -> None:
    assert parse(text) == Infotext(text)


@pytest.mark.parametrize("name", ["Seed", "Size", "a", "with: colon", "with, comma", ""])
def test_a_name_that_could_not_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="extra"):
        str(Infotext("p", steps=1, extra={name: "1"}))


@pytest.mark.parametrize("prompt", ["a cabin", "two\nlines", "café", "山の小屋 🎉", "with\0zero"])
def test_a_png_carries_it(tmp_path: Path, prompt: str) -> None:
    file = tmp_path / "picture.png"
    infotext = with_prompts(prompt, "n")
    Image.new("RGB", (8, 8)).save(file, pnginfo=png_info(infotext))
    assert read(file) == infotext
    chunk = b"iTXt" if "山" in prompt else b"tEXt"
    assert chunk + PNG_KEY.encode() in file.read_bytes()


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError, match="surrogates"):
        png_info(Infotext("a \ud800"))


def test_reading_what_has_none(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    text = tmp_path / "text.png"
    text.write_text("hello")
    for file, words in (
        (plain, "holds no infotext"),
        (text, "not a PNG"),
        (tmp_path / "none.png", "cannot be read"),
    ):
        with pytest.raises(RequestError, match=words):
            read(file)
