"""What runs begin with under a mask: AUTOMATIC1111's latent noise and latent nothing, at every strength."""

import numpy as np
import pytest
import torch

from sdfast.call import Given
from sdfast.errors import RequestError
from sdfast.first_latents import Over, encoded
from sdfast.images import from_bytes, mask_from_bytes
from sdfast.infotext import of_mask
from sdfast.manifest import Span
from sdfast.noise import generator
from sdfast.pipeline import Pipeline
from sdfast.preparation import Preparation
from sdfast.request import Request
from sdfast.row import Row
from sdfast.server.given import check_given, given_of
from sdfast.server.jobs import Job
from sdfast.server.worker import messages
from tests.fakes import FakeEngine

SIDE = 32
PIXELS = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8).tobytes()
SHADES = np.zeros((SIDE, SIDE), np.uint8)
SHADES[5:24, 8:32] = 255  # 2 x 3 latents, by the pixels at their corners
ANEW = np.zeros((4, 4), bool)
ANEW[1:3, 1:4] = True
CONTENTS = (None, "original", "fill", "latent_noise", "latent_nothing")


def engine() -> FakeEngine:
    return FakeEngine(sizes=((Span.exactly(SIDE), Span.exactly(SIDE)),))


def inpainting() -> FakeEngine:
    """With a U-Net of nine channels, which is not called here."""
    fake = engine()
    model = fake.manifest.model.model_copy(update={"in_channels": 9})
    fake.manifest = fake.manifest.model_copy(update={"model": model})
    return fake


def request(content: str | None, strength: float | None = 0.6, **fields: object) -> Request:
    return Request.make(
        **{
            **{"prompts": ("a",), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "seed": 5},
            **{"num_inference_steps": 5, "scheduler": "euler", "strength": strength},
            **{"masked_content": content, **fields},
        }
    )


def over() -> Over:
    return Over(from_bytes(PIXELS, SIDE, SIDE), mask_from_bytes(SHADES.tobytes(), SIDE, SIDE))


def rows_of(asked: Request, fake: FakeEngine | None = None, given: Given | None = None) -> list[Row]:
    return list(Preparation(fake or engine()).prepare(asked, given or Given(over=over())).rows)


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of the image and the noise that is added to them, [4, 4, 4], both of this seed."""
    mean, std = encoded(engine(), over().image)
    source = generator(seed)
    first, unit = (torch.randn(4, 4, 4, generator=source) for _ in range(2))
    assert std is not None
    return (mean + std * first)[0], unit


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("content", CONTENTS[1:])
def test_under_the_mask_are_noise_or_nothing_and_elsewhere_the_image(content: str, strength: float) -> None:
    """The noise is the picture's own: that which is added to the latents, as in AUTOMATIC1111, where the
    same seed begins both. With a strength of 1, too, the image is below the noise, as there."""
    asked = request(content, strength, num_images_per_prompt=2)
    noising = Preparation(engine()).schedule_of(asked).noising
    assert noising is not None
    a, b = map(float, noising[0])
    for seed, row in zip((5, 6), rows_of(asked), strict=True):
        clean, unit = drawn(seed)
        begun = clean.clone()
        if content == "latent_noise":
            begun[:, ANEW] = unit[:, ANEW]
        elif content == "latent_nothing":
            begun[:, ANEW] = 0
        torch.testing.assert_close(row.latents, a * begun + b * unit, rtol=1e-6, atol=1e-6)
        assert row.keep is not None
        torch.testing.assert_close(row.keep.latents, clean, rtol=1e-6, atol=1e-6)
        assert torch.equal(row.keep.noise, unit) and row.keep.anew[0].tolist() == ANEW.tolist()


def test_where_nothing_is_said_a_run_of_all_steps_begins_from_noise_alone() -> None:
    """As in diffusers; and with fewer steps it is the image's."""
    asked = request(None, 1.0)
    sigma = Preparation(engine()).schedule_of(asked).init_noise_sigma
    torch.testing.assert_close(rows_of(asked)[0].latents, drawn(5)[1] * sigma, rtol=1e-6, atol=1e-6)
    [usual], [original] = (rows_of(request(content)) for content in (None, "original"))
    assert torch.equal(usual.latents, original.latents)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_picture_is_what_it_is_alone(content: str | None, strength: float) -> None:
    asked = request(content, strength, num_images_per_prompt=3)
    for i, row in enumerate(rows_of(asked)):
        assert torch.equal(row.latents, rows_of(asked.alone(i))[0].latents)


def test_what_is_kept_does_not_depend_on_it() -> None:
    made = {
        content: Pipeline(engine()).generate(request(content), Given(over=over()), "latent").images[0]
        for content in CONTENTS
    }
    kept = [latents[:, ~ANEW] for latents in made.values()]
    assert all(torch.equal(kept[0], one) for one in kept)
    anew = [made[content][:, ANEW] for content in ("original", "latent_noise", "latent_nothing")]
    for i in range(3):
        assert (anew[i] - anew[i - 1]).abs().min() > 1e-6


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_u_net_for_inpainting_begins_so_and_is_told_the_same(strength: float) -> None:
    """What the mask hides from it is hidden whatever is there; with a strength of 1 the image's latents are
    drawn too, where a content is asked for."""
    noising = Preparation(inpainting()).schedule_of(request("fill", strength)).noising
    assert noising is not None
    a, b = map(float, noising[0])
    clean, unit = drawn(5)
    told = []
    for content in CONTENTS[1:]:
        [row] = rows_of(request(content, strength), inpainting())
        begun = clean.clone()
        if content.startswith("latent"):
            begun[:, ANEW] = unit[:, ANEW] if content == "latent_noise" else 0
        torch.testing.assert_close(row.latents, a * begun + b * unit, rtol=1e-6, atol=1e-6)
        assert row.keep is None and row.positive.beside is not None
        told.append(row.positive.beside)
    assert all(torch.equal(told[0], one) for one in told)
    assert torch.equal(told[0][0], torch.from_numpy(ANEW).float())


@pytest.mark.parametrize("content", CONTENTS[1:])
def test_a_run_that_goes_on_takes_latents_as_they_are(content: str) -> None:
    """It was begun with that: a refiner does not do it again, but its pictures tell of it."""
    latents = torch.randn(1, 4, 4, 4, generator=generator(1))
    asked = request(content, None, denoising_start=0.5)
    [row] = rows_of(asked, given=Given(over=Over(latents, over().mask)))
    assert torch.equal(row.latents, latents[0])


@pytest.mark.parametrize("content", CONTENTS)
def test_a_worker_is_told(content: str | None) -> None:
    job = Job("1", "fake", request(content), image=PIXELS, mask=SHADES.tobytes())
    came = messages.job_of(messages.take(job))
    check_given(engine(), came)
    [row] = rows_of(came.request, given=given_of(engine(), came))
    assert torch.equal(row.latents, rows_of(request(content))[0].latents)


def test_parameters_tell_of_it_as_automatic1111() -> None:
    told = [of_mask(request(content)).get("Masked content") for content in CONTENTS]
    assert told == [None, None, "fill", "latent noise", "latent nothing"]
    asked = request("latent_noise", padding_mask_crop=8)
    assert ", ".join(of_mask(asked)) == "Inpaint area, Masked area padding, Masked content"


def test_without_a_mask_it_is_refused_by_name() -> None:
    alone = Over(over().image)
    with pytest.raises(RequestError, match=r"^masked_content: is for what a mask leaves open; give a mask"):
        rows_of(request("fill"), given=Given(over=alone))
    with pytest.raises(RequestError, match=r"^masked_content: is for what a mask leaves open; give a mask"):
        check_given(engine(), Job("1", "fake", request("fill"), image=PIXELS))
    with pytest.raises(RequestError, match=r"^masked_content: is for an image to draw over, with a mask"):
        request("fill", None)
    with pytest.raises(RequestError, match=r"^masked_content: .* an image is edited as a whole"):
        request("fill", None, image_guidance_scale=1.5)
    with pytest.raises(RequestError, match=r"^masked_content: must be 'original', 'fill', .*\(got 'noise'\)"):
        request("noise")
