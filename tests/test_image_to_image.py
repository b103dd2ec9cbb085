"""Drawing over images, beside stock diffusers' pipelines for that, on tiny checkpoints."""

import io
import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdfast import drop_in
from sdfast.arithmetic import DeviceArithmetic
from sdfast.call import Given
from sdfast.errors import NumericalError, RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.first_latents import Over, encoded
from sdfast.images import read_images, read_masks
from sdfast.loop import Rows
from sdfast.masked_area import MaskedArea
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.batcher import Batcher
from sdfast.server.given import check_given
from sdfast.server.jobs import Job
from sdfast.server.worker.opening import warm_up
from tests import checkpoints
from tests.fakes import Failpoint, FakeEngine
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

SIDE = 64
STEPS = 5

KINDS = {
    ("sd", False): "StableDiffusionImg2ImgPipeline",
    ("sd", True): "StableDiffusionInpaintPipeline",
    ("sdxl", False): "StableDiffusionXLImg2ImgPipeline",
    ("sdxl", True): "StableDiffusionXLInpaintPipeline",
}


def stock(folder: Path, kind: str) -> Any:
    """diffusers' pipeline of that name."""
    without = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pairs(tiny_sd: Path, sd_engine: Path, tiny_sdxl: Path, sdxl_engine: Path) -> dict[Any, Any]:
    """(family, whether there is a mask) -> stock's pipeline and sdfast's."""
    folders = {"sd": (tiny_sd, ours(sd_engine)), "sdxl": (tiny_sdxl, ours(sdxl_engine))}
    return {key: (stock(folders[key[0]][0], kind), folders[key[0]][1]) for key, kind in KINDS.items()}


def image(seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def mask(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """White in an oval that cuts through latents, with grey at its edge."""
    y, x = np.mgrid[0:height, 0:width]
    away = ((x - width / 2) / width) ** 2 + ((y - height / 3) / height) ** 2
    return Image.fromarray((255 * np.clip(1.6 - 10 * away, 0, 1)).astype(np.uint8))


def both(
    pair: tuple[Any, Pipeline],
    scheduler: str = "DDIMScheduler",
    overrides: Mapping[str, Any] | None = None,
    seeds: tuple[int, ...] = (0,),
    output_type: str = "latent",
    **request: Any,
) -> tuple[Any, Any]:
    """The images of the same call, by stock diffusers and by sdfast."""
    reference, pipe = pair
    if not {"timesteps", "sigmas"} & set(request):
        request.setdefault("num_inference_steps", STEPS)
    chosen = getattr(diffusers, scheduler).from_config(pipe.engine.scheduler_config, **(overrides or {}))
    reference.scheduler = pipe.scheduler = chosen
    request = {"prompt": PROMPT, "image": image(), **request}
    results = []
    for call in (reference, pipe):
        results.append(call(**request, generator=seeded(*seeds), output_type=output_type).images)
    return results[0], results[1]


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "SA-Solver": ("SASolverScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 3}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_over_an_image_equals_stock_diffusers(pairs: dict[Any, Any], name: str) -> None:
    assert_same(*both(pairs["sd", False], *SCHEDULERS[name], strength=0.6))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_a_mask_equals_stock_diffusers(pairs: dict[Any, Any], name: str) -> None:
    assert_same(*both(pairs["sd", True], *SCHEDULERS[name], strength=0.6, mask_image=mask()))


CALLS: dict[str, dict[str, Any]] = {
    "all steps": {"strength": 1.0},
    "one step": {"strength": 0.2},
    "nearly all": {"strength": 0.9999},
    "no guidance": {"guidance_scale": 1.0},
    "several pictures of one generator": {"num_images_per_prompt": 2},
    "a generator each": {"num_images_per_prompt": 2, "seeds": (3, 4)},
    "an image each": {"num_images_per_prompt": 2, "image": [image(1), image(2)]},
    "an image and a generator each": {
        "num_images_per_prompt": 2,
        "image": [image(1), image(2)],
        "seeds": (3, 4),
    },
    "images in turn": {
        "prompt": ["a boat", "the sea"],
        "image": [image(1), image(2)],
        "num_images_per_prompt": 2,
    },
    "an array": {"image": np.asarray(image(), np.float32) / 255},
    "a tensor": {"image": torch.rand(1, 3, SIDE, SIDE, generator=seeded(1))},
    "eta": {"scheduler": "DDIMScheduler", "eta": 0.7},
    "timesteps": {"scheduler": "EulerDiscreteScheduler", "timesteps": [901, 500, 200, 3]},
    "sigmas": {"scheduler": "EulerDiscreteScheduler", "sigmas": [9.0, 3.0, 1.0, 0.4, 0.0]},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_calls_equal_stock_diffusers(pairs: dict[Any, Any], call: str, masked: bool) -> None:
    """Euler a draws at every step, so that a generator that is drawn from otherwise shows."""
    given = {"mask_image": mask()} if masked else {}
    fields = {"scheduler": "EulerAncestralDiscreteScheduler", "strength": 0.6, **given, **CALLS[call]}
    assert_same(*both(pairs["sd", masked], **fields))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("call", ["one step", "a generator each", "several pictures of one generator"])
def test_sdxl_equals_stock_diffusers(pairs: dict[Any, Any], call: str, masked: bool) -> None:
    given = {"mask_image": mask()} if masked else {}
    fields = {"scheduler": "EulerAncestralDiscreteScheduler", "strength": 0.6, **given, **CALLS[call]}
    assert_same(*both(pairs["sdxl", masked], guidance_scale=4.0, **fields))


@pytest.mark.parametrize("masked", [False, True])
def test_the_sizes_that_sdxl_is_told_equal_stock_diffusers(pairs: dict[Any, Any], masked: bool) -> None:
    """Over an image diffusers takes negative sizes one by one, and the crop of the picture for both."""
    given = {"mask_image": mask()} if masked else {}
    sizes = {"original_size": (512, 96), "negative_target_size": (9, 9)}
    crops = {"crops_coords_top_left": (8, 40), "negative_crops_coords_top_left": (100, 100)}
    assert_same(*both(pairs["sdxl", masked], guidance_scale=4.0, strength=0.6, **given, **sizes, **crops))


@pytest.mark.parametrize(("family", "masked"), KINDS)
def test_the_usual_strength_is_diffusers(pairs: dict[Any, Any], family: str, masked: bool) -> None:
    given = {"mask_image": mask()} if masked else {}
    assert_same(*both(pairs[family, masked], num_inference_steps=10, guidance_scale=3.0, **given))


def test_other_sizes_and_several_masks_equal_stock_diffusers(pairs: dict[Any, Any]) -> None:
    assert_same(*both(pairs["sd", False], image=image(width=96, height=72)))
    wide = {"image": image(width=96), "mask_image": mask(width=96), "width": 96, "height": 64}
    assert_same(*both(pairs["sd", True], **wide))
    flipped = mask().transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    two = {"mask_image": [mask(), flipped], "num_images_per_prompt": 2, "seeds": (1, 2)}
    assert_same(*both(pairs["sd", True], **two, scheduler="EulerAncestralDiscreteScheduler"))


def test_latents_in_place_of_an_image_equal_stock_diffusers(pairs: dict[Any, Any]) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=seeded(5))
    assert_same(*both(pairs["sd", False], image=latents))


def test_the_first_latents_are_drawn_from_the_images_own_spread(pairs: dict[Any, Any]) -> None:
    """On both sides, and seen: another generator makes other latents of the same image and noise."""
    engine = pairs["sd", False][1].engine
    mean, std = encoded(engine, read_images(image(), 4))
    truth = pairs["sd", False][0].vae.encode(read_images(image(), 4) * 2 - 1).latent_dist
    scale = pairs["sd", False][0].vae.config.scaling_factor
    assert_same(truth.mean * scale, mean)
    assert std is not None
    assert_same(truth.std * scale, std)
    assert (std / mean.abs().mean()).min() > 0.01


@pytest.mark.parametrize("kind", ["array", "rows", "tensor", "flat tensor", "bool"])
def test_masks_in_every_form(pairs: dict[Any, Any], kind: str) -> None:
    pixels = np.asarray(mask(), np.float32) / 255
    given = {
        "array": pixels,
        "rows": pixels[..., None],
        "tensor": torch.from_numpy(pixels)[None, None],
        "flat tensor": torch.from_numpy(pixels),
        "bool": torch.from_numpy(pixels >= 0.5),
    }[kind]
    assert torch.equal(read_masks(given), read_masks(mask()))


def test_an_onnx_engine_equals_stock_diffusers(flat_sd: Path, flat_onnx: Path) -> None:
    size = {"width": 32, "height": 24}
    for masked in (False, True):
        given = {"mask_image": mask(**size), **size} if masked else {}
        pair = stock(flat_sd, KINDS["sd", masked]), ours(flat_onnx)
        assert_same(*both(pair, image=image(**size), strength=0.6, output_type="pt", **given))


def test_pictures_of_a_seed_are_what_they_are_alone(pairs: dict[Any, Any]) -> None:
    pipe = pairs["sd", False][1]
    call = {"image": image(), "num_inference_steps": 4, "scheduler": "Euler a", "output_type": "latent"}
    for given in ({}, {"mask_image": mask()}):
        many = pipe(PROMPT, seed=7, num_images_per_prompt=3, **call, **given)
        for i, latents in enumerate(many.images):
            alone = pipe(PROMPT, seed=7 + i, **call, **given).images
            torch.testing.assert_close(latents, alone[0], rtol=1e-5, atol=1e-5)


def test_what_is_black_in_a_mask_stays(pairs: dict[Any, Any]) -> None:
    pipe = pairs["sd", True][1]
    call = {"image": image(), "num_inference_steps": 4, "seed": 1, "output_type": "latent"}
    latents = {name: pipe(name, mask_image=mask(), **call).images[0] for name in ("a boat", "the sea")}
    anew = read_masks(mask())[0, 0, ::8, ::8].bool()
    apart = (latents["a boat"] - latents["the sea"]).abs().amax(0)
    assert 0 < anew.sum() < 64
    assert (apart[~anew] == 0).all()
    assert (apart[anew] > 0).all()


def assert_same_pictures(expected: list[Image.Image], drawn: list[Image.Image]) -> None:
    """Of one size and number, and nowhere further apart than rounding is."""
    assert [picture.size for picture in drawn] == [picture.size for picture in expected]
    for one, other in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def spot(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A mask with an oval, and grey at its edge."""
    small = mask(box[2] - box[0], box[3] - box[1])
    whole = Image.new("L", (width, height))
    whole.paste(small, box)
    return whole


PARTS: dict[str, dict[str, Any]] = {
    "in the middle": {},
    "without padding": {"padding_mask_crop": 0},
    "at a corner": {"mask_image": spot(200, 152, (160, 120, 200, 152))},
    "wide": {"mask_image": spot(200, 152, (20, 60, 190, 80)), "padding_mask_crop": 3},
    "of an image that is too low": {
        "image": image(4, 200, 40),
        "mask_image": spot(200, 40, (10, 4, 150, 36)),
    },
    "at another size": {"width": 96, "height": 72},
    "of a small image": {"image": image(4, 40, 36), "mask_image": spot(40, 36, (8, 8, 30, 30))},
    "several pictures": {"num_images_per_prompt": 2, "strength": 1.0},
    "several prompts": {"prompt": ["a boat", "the sea"]},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_an_image_equals_stock_diffusers(pairs: dict[Any, Any], part: str) -> None:
    call = {
        **{"image": image(4, 200, 152), "mask_image": spot(200, 152, (70, 40, 110, 90))},
        **{"padding_mask_crop": 8, "strength": 0.6, "output_type": "pil", **PARTS[part]},
    }
    expected, drawn = both(pairs["sd", True], "EulerAncestralDiscreteScheduler", **call)
    assert_same_pictures(expected, drawn)
    assert drawn[0].size == call["image"].size
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(call["image"], int)).max() > 50  # it was drawn over


def test_a_part_by_sdxl_and_by_a_u_net_for_inpainting_equals_stock_diffusers(
    pairs: dict[Any, Any], inpainting: tuple[Any, Pipeline]
) -> None:
    call = {"image": image(4, 150, 120), "mask_image": spot(150, 120, (30, 20, 80, 100))}
    call |= {"padding_mask_crop": 12, "output_type": "pil", "guidance_scale": 4.0}
    for pair in (pairs["sdxl", True], inpainting):
        assert_same_pictures(*both(pair, **call))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_part_by_a_drop_in_is_what_diffusers_class_draws(pairs: dict[Any, Any], family: str) -> None:
    """By places alone, at the size that is theirs: the engine's own, not the image's."""
    reference, pipe = pairs[family, True]
    own = getattr(drop_in, KINDS[family, True])(pipe.engine)
    own.set_progress_bar_config(disable=True)
    reference.scheduler = own.scheduler = diffusers.DDIMScheduler.from_config(pipe.engine.scheduler_config)
    whole = (image(4, 120, 200), spot(120, 200, (30, 20, 80, 100)))
    args = (PROMPT, *[None] * (family == "sdxl"), *whole, None, None, None, 6)
    assert_same_pictures(
        *[call(*args, num_inference_steps=4, generator=seeded(1)).images for call in (reference, own)]
    )


def test_a_part_is_the_pipelines_picture_of_that_part_alone(pairs: dict[Any, Any]) -> None:
    """Pasted: and each picture of a seed is what it is alone."""
    pipe, whole = pairs["sd", True][1], image(4, 200, 152)
    hole = spot(200, 152, (70, 40, 110, 90))
    call = {"num_inference_steps": 3, "scheduler": "Euler a"}
    area = MaskedArea.make(whole, hole, padding_mask_crop=8, height=SIDE, width=SIDE)
    given = {"image": area.cut(whole), "mask_image": area.cut(hole)}
    apart = [area.pasted(pipe(PROMPT, seed=seed, **given, **call).images[0]) for seed in (3, 4)]
    given = {"image": whole, "mask_image": hole, "padding_mask_crop": 8, "num_images_per_prompt": 2}
    assert_same_pictures(apart, pipe(PROMPT, seed=3, **given, **call).images)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a mask alone": (
        {"image": None, "mask_image": mask()},
        "mask_image, strength, denoising_start, image_guidance_scale are for",
    ),
    "a strength alone": (
        {"image": None, "strength": 0.5},
        "mask_image, strength, denoising_start, image_guidance_scale are for",
    ),
    "no strength": ({"strength": 0.0}, "^strength: must be greater than 0"),
    "too much strength": ({"strength": 1.5}, "^strength: must be less than or equal to 1"),
    "no step left": ({"strength": 0.1}, "strength=0.1 of 4 steps leaves no step"),
    "another size": ({"height": 72, "width": 64}, "^image: 64x64, but the picture is 64x72"),
    "a mask of another size": ({"mask_image": mask(72)}, "^mask_image: 72x64, but the picture is 64x64"),
    "an image outside the engine's sizes": ({"image": image(0, 256, 256)}, "size 256x256 is not one of"),
    "a crooked image": ({"image": image().resize((60, 64))}, "^width: must be a multiple of 8"),
    "images of different sizes": ({"image": [image(), image(0, 72)]}, r"^image: .*\(64x64, 72x64\)"),
    "no images": ({"image": []}, "^image: an empty list"),
    "too many images": ({"image": [image()] * 3}, "^image: 3 for 1 pictures"),
    "bytes for an image": ({"image": b"png"}, "^image: bytes is not a PIL image"),
    "whole numbers": ({"image": np.zeros((64, 64, 3), np.uint8)}, "^image: numbers of uint8"),
    "numbers of a whole mask": (
        {"mask_image": torch.ones(64, 64, dtype=torch.int32)},
        "^mask_image: numbers",
    ),
    "numbers below": ({"image": torch.full((3, 64, 64), -1.0)}, r"^image: numbers from -1 to -1"),
    "NaN": ({"image": torch.full((3, 64, 64), torch.nan)}, "^image: numbers from nan"),
    "channels": ({"image": torch.zeros(2, 64, 64)}, r"^image: Tensor of shape \(2, 64, 64\)"),
    "a coloured mask": ({"mask_image": torch.zeros(1, 3, 64, 64)}, "^mask_image: Tensor of shape"),
    "latents too": ({"latents": torch.zeros(1, 4, 8, 8)}, "^latents: with an image"),
    "a part without a mask": ({"padding_mask_crop": 8}, "^mask_image: is missing; with padding_mask_crop"),
    "a part of nothing": (
        {"padding_mask_crop": 8, "image": None, "mask_image": mask()},
        "^image: is missing; with padding_mask_crop",
    ),
    "a part of an array": (
        {"padding_mask_crop": 8, "image": np.zeros((64, 64, 3), np.float32), "mask_image": mask()},
        "^image: ndarray is not a PIL image; with padding_mask_crop give one image and one mask",
    ),
    "a part of several images": (
        {"padding_mask_crop": 8, "image": [image()] * 2, "mask_image": mask()},
        "^image: list is not a PIL image",
    ),
    "a part of an empty mask": (
        {"padding_mask_crop": 8, "mask_image": Image.new("L", (64, 64))},
        "^mask_image: nothing of it is white",
    ),
    "a part with a mask of another size": (
        {"padding_mask_crop": 8, "mask_image": mask(72)},
        "^mask_image: 72x64, but the image is 64x64; with padding_mask_crop they have one size",
    ),
    "a part and less": (
        {"padding_mask_crop": -1, "mask_image": mask()},
        "^padding_mask_crop: must be greater than or equal to 0",
    ),
    "a part as a tensor": (
        {"padding_mask_crop": 8, "mask_image": mask(), "output_type": "pt"},
        "^output_type: 'pt', but with padding_mask_crop pictures are pasted into the image",
    ),
    "a part as latents": (
        {"padding_mask_crop": 8, "mask_image": mask(), "output_type": "latent"},
        "^output_type: 'latent', but with padding_mask_crop",
    ),
    "a part, and a second pass": (
        {"padding_mask_crop": 8, "mask_image": mask(), "hires": {"height": 96, "width": 96}},
        "^hires: is for pictures drawn from noise, without an image",
    ),
    "a score": ({"aesthetic_score": 7.0}, "^aesthetic_score: only engines of SDXL's refiner"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_name(pairs: dict[Any, Any], case: str) -> None:
    fields, message = BAD[case]
    call = {"image": image(), "num_inference_steps": 4, "scheduler": "ddim", **fields}
    with pytest.raises(RequestError, match=message):
        pairs["sd", False][1](PROMPT, **call)


def test_a_part_of_an_image_without_a_mask_is_refused_by_the_engine(pairs: dict[Any, Any]) -> None:
    """Whoever asks: a call looks for its mask before."""
    asked = Request.make(
        **{"prompts": (PROMPT,), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "strength": 0.6},
        **{"num_inference_steps": 4, "scheduler": "ddim", "padding_mask_crop": 8},
    )
    over = Over(read_images(image(), 4))
    with pytest.raises(RequestError, match=r"^padding_mask_crop: is for what a mask leaves open"):
        pairs["sd", False][1].generate(asked, Given(over=over))
    job = Job("1", "engine", asked, image=image().tobytes())
    with pytest.raises(RequestError, match=r"^padding_mask_crop: is for what a mask leaves open"):
        check_given(pairs["sd", False][1].engine, job)


def test_an_engine_without_an_encoder_says_so() -> None:
    pipe = Pipeline(FakeEngine(edits=False))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(RequestError, match=r"engine 'fake' has no VAE encoder.*export it again"):
        pipe("a", image=image(0, 16, 16))
    pipe("a", num_inference_steps=1)


def test_latents_of_an_image_that_are_no_numbers_are_told() -> None:
    pipe = Pipeline(FakeEngine(failpoints={"vae_encoder": Failpoint("nan")}))
    with pytest.raises(NumericalError, match="image's latents are not finite"):
        pipe("a", image=image(0, 16, 16))


def test_a_scheduler_object_without_add_noise_draws_over_nothing(pairs: dict[Any, Any]) -> None:
    class Silent(diffusers.DDIMParallelScheduler):
        def __getattribute__(self, name: str) -> Any:
            if name == "add_noise":
                raise AttributeError(name)
            return super().__getattribute__(name)

    pipe = pairs["sd", False][1]
    pipe.scheduler = Silent(clip_sample=False)
    with pytest.raises(RequestError, match="Silent has no add_noise"):
        pipe(PROMPT, image=image(), strength=1.0, num_inference_steps=2)


@pytest.mark.parametrize(("family", "masked"), KINDS)
def test_a_drop_in_draws_what_diffusers_class_draws(pairs: dict[Any, Any], family: str, masked: bool) -> None:
    reference, pipe = pairs[family, masked]
    own = getattr(drop_in, KINDS[family, masked])(pipe.engine)
    own.set_progress_bar_config(disable=True)
    args = (PROMPT, *[None] * (family == "sdxl"), image(), *[mask()] * masked)
    reference.scheduler = own.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.engine.scheduler_config
    )
    results = [
        call(*args, num_inference_steps=10, generator=seeded(1), output_type="latent").images
        for call in (reference, own)
    ]
    assert_same(*results)
    with pytest.raises(RequestError, match="prompt: given twice"):
        own(*args, prompt="again")
    with pytest.raises(RequestError, match=f"image: is missing; {KINDS[family, masked]}"):
        own(PROMPT)


@pytest.fixture(scope="module")
def inpainting(tiny_inpainting: Path, inpainting_engine: Path) -> tuple[Any, Pipeline]:
    """A U-Net of nine channels."""
    return stock(tiny_inpainting, "StableDiffusionInpaintPipeline"), ours(inpainting_engine)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("call", ["no guidance", "several pictures of one generator", "a generator each"])
def test_a_u_net_for_inpainting_equals_stock_diffusers(
    inpainting: tuple[Any, Pipeline], scheduler: str, strength: float, call: str
) -> None:
    fields = {"mask_image": mask(), "scheduler": scheduler, **CALLS[call], "strength": strength}
    assert_same(*both(inpainting, **fields))


def test_rows_of_an_inpainting_u_net_on_a_device(inpainting: tuple[Any, Pipeline]) -> None:
    pipe, call = inpainting[1], {"scheduler": "euler", "num_inference_steps": 3, "seed": 1}
    prepared = pipe.prepare(
        Request.make(
            **{"prompts": (PROMPT,), "negative_prompts": (None,), "height": SIDE, "width": SIDE},
            **{**call, "strength": 1.0, "num_images_per_prompt": 2},
        ),
        Given(over=Over(read_images(image(), 4), read_masks(mask()))),
    )
    expected = pipe(PROMPT, image=image(), mask_image=mask(), output_type="latent", **call).images
    rows = Rows(pipe.engine, prepared.rows, SIDE, SIDE, DeviceArithmetic)
    while rows.active:
        rows.tick()
    assert_same(expected[0], rows.latents[0])


def test_a_u_net_for_inpainting_is_served(inpainting: tuple[Any, Pipeline]) -> None:
    """It is warmed up, and refuses jobs without a mask at once."""
    engine, told = inpainting[1].engine, queue.Queue[Any]()
    warm_up(engine)
    fields = {"prompts": (PROMPT,), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "seed": 1}
    asked = Request.make(**fields, num_inference_steps=3, strength=0.7, scheduler="euler")
    batcher, drawn = Batcher(engine), {"image": image().tobytes(), "mask": mask().tobytes()}
    batcher.submit(Job("1", "engine", asked, **drawn), told.put)
    with pytest.raises(RequestError, match="9 channels"):
        batcher.submit(Job("2", "engine", asked, image=drawn["image"]), told.put)
    assert batcher.close(timeout=20)
    *_, last = told.queue
    given = Given(over=Over(read_images(image(), 4), read_masks(mask())))
    [expected] = inpainting[1].generate(asked, given).images
    [png] = last.pngs
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(expected))


def test_a_u_net_for_inpainting_masks_no_latents(inpainting: tuple[Any, Pipeline]) -> None:
    with pytest.raises(RequestError, match=r"^image: .*latents cannot be masked"):
        inpainting[1](PROMPT, image=torch.zeros(1, 4, 8, 8), mask_image=mask())


def test_a_u_net_for_inpainting_needs_a_mask(inpainting: tuple[Any, Pipeline]) -> None:
    for given in ({}, {"image": image()}):
        with pytest.raises(RequestError, match=r"9 channels \(inpainting\): give it an image and a mask"):
            inpainting[1](PROMPT, **given)


# ---------------------------------------------------------------- tiny VAEs


@pytest.fixture(scope="module")
def tiny_pairs(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """With a tiny VAE in the place of the checkpoint's, on both sides."""
    place = tmp_path_factory.mktemp("tiny-vae")
    vae = checkpoints.build_tiny_vae(place / "vae")
    sizes = {"min": "64x64", "max": "96x96"}
    engine = export(tiny_sd, place / "engine", Recipe.make(backend="eager", sizes=sizes, vae=vae))
    pairs = {key: (stock(tiny_sd, kind), ours(engine)) for key, kind in KINDS.items() if key[0] == "sd"}
    for reference, _ in pairs.values():
        reference.register_modules(vae=diffusers.AutoencoderTiny.from_pretrained(vae))
    return pairs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "call", ["all steps", "one step", "several pictures of one generator", "a generator each"]
)
def test_with_a_tiny_vae_equals_stock_diffusers(tiny_pairs: dict[Any, Any], call: str, masked: bool) -> None:
    """Which draws nothing for the latents of an image: the noise that is added is the generator's first."""
    given = {"mask_image": mask()} if masked else {}
    fields = {"scheduler": "EulerAncestralDiscreteScheduler", "strength": 0.6, **given, **CALLS[call]}
    assert_same(*both(tiny_pairs["sd", masked], **fields))


def test_the_pictures_of_a_tiny_vae_equal_stock_diffusers(tiny_pairs: dict[Any, Any]) -> None:
    assert_same(*both(tiny_pairs["sd", False], output_type="pt"))
    mean, std = encoded(tiny_pairs["sd", False][1].engine, read_images(image(), 4))
    assert std is None
    truth = tiny_pairs["sd", False][0].vae.encode(read_images(image(), 4) * 2 - 1).latents
    assert_same(truth, mean)
