"""Variation seeds: the first noise is turned towards another seed's, as AUTOMATIC1111 does it."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdfast import infotext
from sdfast.call import Given
from sdfast.ensemble import Ensemble
from sdfast.errors import RequestError
from sdfast.manifest import Span
from sdfast.noise import OwnNoise, VariedNoise, generator, in_the_middle, turned
from sdfast.pipeline import Pipeline
from sdfast.request import Hires, Request
from tests.fakes import FakeEngine
from tests.server.test_batcher import Open, assert_drawn, open_batcher, submit
from tests.test_cli import draw, refused
from tests.test_image_to_image import image, mask
from tests.test_pipeline import assert_same, ours, seeded

__all__ = ["open_batcher"]  # a fixture
SIZES = [(Span.exactly(16), Span.exactly(16)), (Span.exactly(32), Span.exactly(32))]
SHAPE = (4, 8, 8)


def request(**fields: Any) -> Request:
    given = {"prompts": ("a",), "negative_prompts": (None,), "height": 16, "width": 16, "seed": 3}
    return Request.make(**{**given, "num_inference_steps": 4, **fields})


def first_noise(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned_by_hand(low: torch.Tensor, high: torch.Tensor, share: float) -> torch.Tensor:
    """Column by column in float64: in the plane of the two, the share of the angle away from the first."""
    found = low.double().numpy().copy()
    for channel in range(low.shape[0]):
        for x in range(low.shape[2]):
            a, b = (noise[channel, :, x].double().numpy() for noise in (low, high))
            e, f = a / np.linalg.norm(a), b / np.linalg.norm(b)
            angle = math.atan2(np.linalg.norm(f - (e @ f) * e), e @ f)
            # slerp of vectors whose lengths differ: the weights of the directions, on the vectors
            weights = math.sin((1 - share) * angle), math.sin(share * angle)
            found[channel, :, x] = (weights[0] * a + weights[1] * b) / math.sin(angle)
    return torch.from_numpy(found)


@pytest.fixture(scope="module")
def pipe(sd_engine: Path) -> Pipeline:
    return ours(sd_engine)


def latents(pipe: Pipeline, **call: Any) -> torch.Tensor:
    found: torch.Tensor = pipe("a boat", num_inference_steps=3, output_type="latent", **call).images
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_noise_is_turned_column_by_column(share: float) -> None:
    low, high = first_noise(1), first_noise(2)
    torch.testing.assert_close(
        turned(low, high, share).double(), turned_by_hand(low, high, share), rtol=1e-5, atol=1e-5
    )


def test_all_the_way_is_the_other_noise_bit_for_bit() -> None:
    low, high = first_noise(1), first_noise(2)
    assert torch.equal(turned(low, high, 1.0), high)


def test_what_lies_between_directions_that_are_one_is_a_number() -> None:
    """Where an angle has no sine: the same noise, the opposite one, and columns of one number."""
    low = first_noise(1)
    torch.testing.assert_close(turned(low, low, 0.3), low)
    assert torch.isfinite(turned(low, -low, 0.3)).all()
    flat = first_noise(1, (4, 1, 8)), first_noise(2, (4, 1, 8))
    torch.testing.assert_close(turned(*flat, 0.25), 0.75 * flat[0] + 0.25 * flat[1])


@pytest.mark.parametrize(
    ("inner", "outer"), [((8, 8), (12, 16)), ((12, 16), (8, 8)), ((8, 16), (11, 9)), ((5, 5), (8, 2))]
)
def test_the_middle_of_another_noise_is_put_in_the_middle(
    inner: tuple[int, int], outer: tuple[int, int]
) -> None:
    noise, around = first_noise(1, (1, 4, *inner)), first_noise(2, (1, 4, *outer))
    found, due = in_the_middle(noise, around), around.clone()
    offsets = [math.floor((there - here) / 2) for here, there in zip(inner, outer, strict=True)]
    for y in range(outer[0]):
        for x in range(outer[1]):
            place = y - offsets[0], x - offsets[1]
            # of a longer inner side as much is cut off behind as before, a latent too much if it is odd
            ends = [n + min(offset, 0) for n, offset in zip(inner, offsets, strict=True)]
            if all(0 <= p < end for p, end in zip(place, ends, strict=True)):
                due[0, :, y, x] = noise[0, :, place[0], place[1]]
    assert torch.equal(found, due)


def test_the_first_noise_is_that_of_automatic1111(pipe: Pipeline) -> None:
    """Both: the noise of another size is turned, and put in the middle of the own."""
    asked = request(
        **{"height": 64, "width": 64, "num_images_per_prompt": 2, "seed": 3},
        **{"variation_seed": 9, "variation_strength": 0.3, "seed_resize_from": (96, 48)},
        scheduler="ddim",
    )
    rows = pipe.prepare(asked).rows
    for i, row in enumerate(rows):
        small = turned_by_hand(first_noise(3, (4, 12, 6)), first_noise(9 + i, (4, 12, 6)), 0.3)
        due = first_noise(3)
        due[:, :, 1:7] = small.float()[:, 2:10]
        torch.testing.assert_close(row.latents, due, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_sde"])
def test_no_strength_is_the_plain_picture_bit_for_bit(pipe: Pipeline, sampler: str) -> None:
    plain = latents(pipe, seed=3, scheduler=sampler)
    assert torch.equal(latents(pipe, seed=3, scheduler=sampler, variation_strength=0.0), plain)
    assert torch.equal(latents(pipe, seed=3, scheduler=sampler, seed_resize_from=(64, 64)), plain)


@pytest.mark.parametrize("how", ["from noise", "over an image", "with a mask", "twice"])
def test_all_the_way_is_the_variation_seeds_picture(pipe: Pipeline, how: str) -> None:
    """Of samplers that draw no noise in their steps."""
    over: dict[str, Any] = {"from noise": {}, "twice": {"hires": {"height": 96, "width": 96}}}.get(
        how, {"image": image(), "strength": 0.7}
    )
    call = {"scheduler": "euler", **over, **({"mask_image": mask()} if how == "with a mask" else {})}
    varied = latents(pipe, seed=3, variation_seed=8, variation_strength=1.0, **call)
    assert torch.equal(varied, latents(pipe, seed=8, **call))
    half = latents(pipe, seed=3, variation_seed=8, variation_strength=0.5, **call)
    for other in (varied, latents(pipe, seed=3, **call)):
        assert (half - other).norm() > 0.02 * other.norm()


def test_the_steps_draw_from_the_seeds_own_generator() -> None:
    """As far on as in the plain picture, so that later noise is the same; Brownian motions have its seed."""
    plain = Pipeline(FakeEngine()).prepare(request(scheduler="euler_a")).rows[0]
    for more in ({"variation_strength": 1.0, "variation_seed": 8}, {"seed_resize_from": (32, 32)}):
        varied = Pipeline(FakeEngine()).prepare(request(scheduler="euler_a", **more)).rows[0]
        assert not torch.equal(varied.latents, plain.latents)
        assert torch.equal(varied.noise(0), torch.randn((4, 2, 2), generator=advanced(3)))
    sde = [
        Pipeline(FakeEngine()).prepare(request(scheduler="dpmpp_sde", **more)).rows[0].noise(0)
        for more in ({}, {"variation_strength": 1.0, "variation_seed": 8})
    ]
    assert torch.equal(*sde)


def advanced(seed: int) -> torch.Generator:
    source = torch.Generator().manual_seed(seed)
    torch.randn((4, 2, 2), generator=source)
    return source


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_picture_is_the_same_alone(pipe: Pipeline, sampler: str) -> None:
    """All have the seed, and each its own variation seed."""
    asked = request(
        **{"prompts": ("a", "b"), "negative_prompts": (None, None), "num_images_per_prompt": 2},
        **{"height": 64, "width": 64, "variation_seed": 8, "variation_strength": 0.4, "scheduler": sampler},
    )
    assert asked.seeds == (3, 3, 3, 3) and asked.variation_seeds == (8, 9, 10, 11)
    together = pipe.generate(asked, output_type="latent").images
    for i in range(4):
        alone = asked.alone(i)
        assert (alone.seeds, alone.variation_seeds) == ((3,), (8 + i,))
        assert_same(pipe.generate(alone, output_type="latent").images[0], together[i])


def test_a_random_variation_is_told() -> None:
    output = Pipeline(FakeEngine())("a", num_inference_steps=2, seed=3, variation_strength=0.5)
    assert output.seeds == (3,) and output.variation_seeds is not None
    [seed] = output.variation_seeds
    again = Pipeline(FakeEngine())(
        "a", num_inference_steps=2, seed=3, variation_seed=seed, variation_strength=0.5
    )
    assert np.array_equal(*(np.asarray(one.images[0]) for one in (output, again)))
    assert Pipeline(FakeEngine())("a", num_inference_steps=2, seed=3).variation_seeds is None


@pytest.mark.parametrize("count", [1, 2])
def test_two_engines_share_a_varied_picture(pipe: Pipeline, count: int) -> None:
    asked = request(
        **{"height": 64, "width": 64, "num_images_per_prompt": count, "scheduler": "euler"},
        **{"variation_seed": 8, "variation_strength": 1.0},
    )
    output = Ensemble(pipe, pipe, 0.5).generate(asked, output_type="latent")
    plain = asked.model_copy(update={"seed": 8, "variation_seed": None, "variation_strength": 0.0})
    assert_same(Ensemble(pipe, pipe, 0.5).generate(plain, output_type="latent").images, output.images)
    assert output.variation_seeds == tuple(range(8, 8 + count))


def test_jobs_are_the_pipelines_pictures_and_tell_their_seeds(open_batcher: Open) -> None:
    """Beside others, with a second pass, and with what came from another engine's process."""
    batcher, drawing = open_batcher(FakeEngine(sizes=SIZES), max_rows=4), Pipeline(FakeEngine(sizes=SIZES))
    fields = {"variation_seed": 8, "variation_strength": 0.25, "seed_resize_from": (24, 32)}
    hires = Hires.make(height=32, width=32, strength=0.5)
    several = [
        request(num_images_per_prompt=3, scheduler="euler_a", **fields),
        request(seed=4),
        request(num_images_per_prompt=2, hires=hires, **fields),
    ]
    several = [Request.model_validate_json(one.model_dump_json()) for one in several]
    ears = [submit(batcher, one, f"job{i}") for i, one in enumerate(several)]
    for ear, one in zip(ears, several, strict=True):
        assert_drawn(ear.done(), one, drawing)
    texts = [Image.open(io.BytesIO(png)).info["parameters"] for png in ears[0].done().pngs]
    told = [infotext.parse(text) for text in texts]
    assert [(one.seed, one.variation_seed, one.variation_strength) for one in told] == [
        (3, 8 + i, 0.25) for i in range(3)
    ]
    assert told[0].extra["Seed resize from"] == "32x24"
    assert "Seed: 3, Size: 16x16, Model hash" in texts[0]
    assert "Variation seed: 8, Variation seed strength: 0.25, Seed resize from: 32x24" in texts[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variation_seed": 8}, "variation_seed: is for a variation_strength above 0; give that too"),
        ({"variation_seed": 8, "variation_strength": 1.5}, "variation_strength: must be less than or equal"),
        ({"variation_strength": -0.5}, "variation_strength: must be greater than or equal to 0"),
        ({"variation_strength": "much"}, "variation_strength: must be a valid number"),
        ({"variation_seed": -1, "variation_strength": 0.5}, "variation_seed: must be greater than"),
        ({"variation_seed": 2**64, "variation_strength": 0.5}, "variation_seed: must be less than"),
        (
            {"variation_seed": 2**64 - 1, "variation_strength": 0.5, "num_images_per_prompt": 2},
            "variation_seed: 18446744073709551615 leaves no seeds below",
        ),
        ({"seed_resize_from": (64, 60)}, "seed_resize_from.1: must be a multiple of 8 "),
        ({"seed_resize_from": (0, 64)}, "seed_resize_from.0: must be greater than or equal to 8"),
        ({"seed_resize_from": (64,)}, "seed_resize_from"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        request(**fields)


def test_the_last_seeds_may_vary() -> None:
    """All pictures have the one seed."""
    last = request(seed=2**64 - 1, num_images_per_prompt=3, variation_seed=2**64 - 4, variation_strength=0.5)
    assert last.seeds == (2**64 - 1,) * 3 and last.variation_seeds[-1] == 2**64 - 2


@pytest.mark.parametrize("field", ["variation_strength", "seed_resize_from"])
def test_noise_that_is_given_does_not_vary(field: str) -> None:
    drawing = Pipeline(FakeEngine())
    how = {field: 0.5 if field == "variation_strength" else (32, 32), "num_inference_steps": 2}
    for given, message in (
        ({"latents": torch.zeros(1, 4, 2, 2)}, "is for noise by seeds, and the first latents are given"),
        ({"generator": seeded(1)}, "is for noise by seeds; give seed in place of generator"),
        ({"generator": seeded(1, 2), "num_images_per_prompt": 2}, "give seed in place of generator"),
    ):
        with pytest.raises(RequestError, match=f"^{field}: .*{message}"):
            drawing("a", **how, **given)


def test_generators_of_the_seeds_are_the_seeds() -> None:
    asked = request(variation_seed=8, variation_strength=0.5, num_images_per_prompt=2)
    given = Given([generator(3), generator(3)])
    found = Pipeline(FakeEngine()).generate(asked, given, "latent").images
    assert torch.equal(found, Pipeline(FakeEngine()).generate(asked, None, "latent").images)


def test_it_is_the_same_for_the_first_few_pictures() -> None:
    noise = VariedNoise(OwnNoise([generator(1), generator(2)], SHAPE), None, None)
    assert noise.apart and noise.seeds() == [1, 2]
    assert torch.equal(noise.initial(1), first_noise(1)[None])


def test_on_the_command_line(sd_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    varied = draw(
        *(sd_engine, "--seed", 7, "--variation-seed", 9, "--variation-strength", 0.2, "--count", 2),
        *("--seed-resize-from", "32x96", "-o", "out"),
    )
    assert varied.exit_code == 0, varied.output
    assert varied.stdout == (
        "out/00001-7.png  seed 7  variation seed 9\nout/00002-7.png  seed 7  variation seed 10\n"
    )
    told = infotext.read(tmp_path / "out" / "00002-7.png")
    assert (told.seed, told.variation_seed, told.variation_strength) == (7, 10, 0.2)
    assert told.extra["Seed resize from"] == "32x96"
    pictures = [Image.open(path).tobytes() for path in sorted((tmp_path / "out").iterdir())]
    assert pictures[0] != pictures[1]
    command = ("generate", "a", "--engine", sd_engine, "--steps", 1)
    assert "give that too" in refused(*command, "--variation-seed", 1)
    assert "WIDTHxHEIGHT" in refused(*command, "--seed-resize-from", "big")
    stock = refused(*command, "--variation-strength", 0.5, "--backend", "diffusers")
    assert stock.startswith("variation_strength, seed_resize_from: diffusers has neither")
