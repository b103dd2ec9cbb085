"""The pipeline beside stock diffusers, call by call, on tiny checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdfast.drop_in import StableDiffusionPipeline
from sdfast.engine import Engine
from sdfast.errors import BackendError, NumericalError, RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.pipeline import Pipeline
from sdfast.prompts import PromptCache, PromptState, Reading, guidance_embedding
from tests import checkpoints
from tests.fakes import Failpoint, FakeEngine

STEPS = 4
PROMPT = "a cabin in misty mountains"
Call = Callable[..., Any]


def stock(folder: Path, kind: str = "StableDiffusionPipeline") -> Any:
    options = {"safety_checker": None, "requires_safety_checker": False} if "XL" not in kind else {}
    pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(folder: Path) -> Pipeline:
    pipe = Pipeline.from_engine(folder, threads=1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd(tiny_sd: Path, sd_engine: Path) -> tuple[Any, Pipeline]:
    return stock(tiny_sd), ours(sd_engine)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path, sdxl_engine: Path) -> tuple[Any, Pipeline]:
    return stock(tiny_sdxl, "StableDiffusionXLPipeline"), ours(sdxl_engine)


def seeded(*seeds: int) -> Any:
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def both(
    pair: tuple[Any, Pipeline],
    seeds: tuple[int, ...] = (0,),
    scheduler: str = "DDIMScheduler",
    overrides: Mapping[str, Any] | None = None,
    output_type: str = "latent",
    **request: Any,
) -> tuple[Any, Any]:
    """The images of the same call, by stock diffusers and by sdfast."""
    reference, pipe = pair
    if "prompt_embeds" not in request:
        request.setdefault("prompt", PROMPT)
    if not {"timesteps", "sigmas"} & set(request):
        request.setdefault("num_inference_steps", STEPS)
    chosen = getattr(diffusers, scheduler).from_config(pipe.engine.scheduler_config, **(overrides or {}))
    reference.scheduler = pipe.scheduler = chosen
    results = []
    for call in (reference, pipe):
        results.append(call(**request, generator=seeded(*seeds), output_type=output_type).images)
    return results[0], results[1]


def assert_same(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert expected.shape == actual.shape
    error = (expected - actual).norm() / expected.norm()
    assert error < 1e-4, f"relative L2 {error:.2e}"


def embeds(pair: tuple[Any, Pipeline], prompt: str) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        found = pair[0].encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    return tuple(found)


CALLS: dict[str, dict[str, Any]] = {
    "one prompt": {},
    "several prompts": {"prompt": ["the sea", "a boat, " * 60, ""]},
    "a negative prompt": {"negative_prompt": "misty forest"},
    "a negative prompt each": {"prompt": ["a boat", "the sea"], "negative_prompt": ["mist", "style"]},
    "several pictures a prompt": {"prompt": ["a boat", "the sea"], "num_images_per_prompt": 2},
    "several pictures, a generator each": {"num_images_per_prompt": 3, "seeds": (5, 5, 9)},
    "no guidance": {"guidance_scale": 1.0},
    "little guidance": {"guidance_scale": 0.5},
    "the usual guidance": {"guidance_scale": None},
    "rescaled guidance": {"guidance_rescale": 0.7, "guidance_scale": 9.0},
    "rescaled without guidance": {"guidance_rescale": 0.7, "guidance_scale": 1.0},
    "eta": {"eta": 0.6, "num_images_per_prompt": 2},
    "LCM": {"scheduler": "LCMScheduler", "num_images_per_prompt": 2},
    "TCD": {"scheduler": "TCDScheduler", "eta": 0.3, "num_images_per_prompt": 2},
    "TCD without noise": {"scheduler": "TCDScheduler"},
    "Euler": {"scheduler": "EulerDiscreteScheduler"},
    "Euler ancestral": {"scheduler": "EulerAncestralDiscreteScheduler", "num_images_per_prompt": 2},
    "Euler ancestral, a generator each": {
        "scheduler": "EulerAncestralDiscreteScheduler",
        "num_images_per_prompt": 2,
        "seeds": (3, 4),
    },
    "DDPM": {"scheduler": "DDPMScheduler"},
    "DPM++ 2M": {"scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 7},
    "DPM++ 2M Karras": {
        "scheduler": "DPMSolverMultistepScheduler",
        "overrides": {"use_karras_sigmas": True},
        "num_inference_steps": 7,
    },
    "timesteps": {"scheduler": "EulerDiscreteScheduler", "timesteps": [901, 500, 3]},
    "sigmas": {"scheduler": "EulerDiscreteScheduler", "sigmas": [9.0, 3.0, 0.4, 0.0]},
}


@pytest.mark.parametrize("call", CALLS)
def test_sd_equals_stock_diffusers(sd: tuple[Any, Pipeline], call: str) -> None:
    request = dict(CALLS[call])
    if request.get("guidance_scale", 0) is None:
        del request["guidance_scale"]
    assert_same(*both(sd, **request))


@pytest.mark.parametrize(
    "call",
    [
        "several prompts",
        "a negative prompt",
        "a negative prompt each",
        "several pictures a prompt",
        "no guidance",
        "the usual guidance",
        "rescaled guidance",
        "Euler ancestral, a generator each",
        "DPM++ 2M Karras",
    ],
)
def test_sdxl_equals_stock_diffusers(sdxl: tuple[Any, Pipeline], call: str) -> None:
    request = dict(CALLS[call])
    if request.get("guidance_scale", 0) is None:
        del request["guidance_scale"]
    assert_same(*both(sdxl, **request))


SDXL_CALLS: dict[str, dict[str, Any]] = {
    "a second prompt": {"prompt_2": "the sea", "negative_prompt": "mist"},
    "second prompts for each": {
        "prompt": ["a boat", "a cabin"],
        "prompt_2": ["the sea", ""],
        "negative_prompt": ["mist", "style"],
        "negative_prompt_2": "in the forest",
    },
    "sizes": {"original_size": (512, 96), "crops_coords_top_left": (8, 40), "target_size": (1024, 768)},
    "negative sizes": {
        "negative_original_size": (16, 24),
        "negative_crops_coords_top_left": (3, 5),
        "negative_target_size": (32, 48),
    },
    "one negative size, which is not told": {
        "negative_original_size": (16, 24),
        "crops_coords_top_left": (8, 40),
    },
}


@pytest.mark.parametrize("call", SDXL_CALLS)
def test_what_is_sdxls_equals_stock_diffusers(sdxl: tuple[Any, Pipeline], call: str) -> None:
    expected, actual = both(sdxl, **SDXL_CALLS[call])
    assert_same(expected, actual)
    plain = {
        name: SDXL_CALLS[call][name] for name in ("prompt", "negative_prompt") if name in SDXL_CALLS[call]
    }
    without = both(sdxl, **plain)[0]
    assert (without - expected).norm() > 1e-3 * expected.norm(), "it says nothing"


def test_sdxl_layers_left_out_equal_stock_diffusers(sdxl: tuple[Any, Pipeline]) -> None:
    assert_same(*both(sdxl, clip_skip=1))


def test_other_sizes_equal_stock_diffusers(sd: tuple[Any, Pipeline]) -> None:
    assert_same(*both(sd, height=64, width=96))


@pytest.mark.parametrize("call", ["one prompt", "several pictures a prompt", "Euler ancestral", "sigmas"])
def test_an_onnx_engine_equals_stock_diffusers(flat_sd: Path, flat_onnx: Path, call: str) -> None:
    assert_same(*both((stock(flat_sd), ours(flat_onnx)), **CALLS[call]))


@pytest.mark.parametrize("prediction_type", ["v_prediction"])
def test_prediction_types_equal_stock_diffusers(tmp_path: Path, prediction_type: str) -> None:
    folder = checkpoints.build_sd(tmp_path / "sd", prediction_type=prediction_type)
    engine = export(folder, tmp_path / "engine", Recipe(backend="eager"))
    assert_same(*both((stock(folder), ours(engine))))


def test_pictures_equal_those_of_stock_diffusers_in_every_form(sd: tuple[Any, Pipeline]) -> None:
    expected, actual = both(sd, output_type="pt", num_images_per_prompt=2)
    assert actual.dtype == torch.float32
    assert_same(expected, actual)
    expected, actual = both(sd, output_type="np", num_images_per_prompt=2)
    assert isinstance(actual, np.ndarray)
    assert_same(torch.from_numpy(expected), torch.from_numpy(actual))
    expected, actual = both(sd, output_type="pil", num_images_per_prompt=2)
    for one, other in zip(expected, actual, strict=True):
        assert isinstance(other, Image.Image)
        difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
        assert one.size == other.size
        assert difference.max() <= 1


def test_one_negative_prompt_does_for_several_prompts(sd: tuple[Any, Pipeline]) -> None:
    call = {"prompt": ["a boat", "the sea"], "num_inference_steps": 1, "scheduler": "euler", "seed": 1}
    one = sd[1](**call, negative_prompt="mist", output_type="latent").images
    each = sd[1](**call, negative_prompt=["mist", "mist"], output_type="latent").images
    assert torch.equal(one, each)


def test_given_latents_equal_stock_diffusers(sd: tuple[Any, Pipeline]) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=seeded(1))
    kept = latents.clone()
    expected, actual = both(
        sd, latents=latents, num_images_per_prompt=2, scheduler="EulerAncestralDiscreteScheduler"
    )
    assert_same(expected, actual)
    assert torch.equal(latents, kept)


def test_given_embeddings_equal_stock_diffusers(sd: tuple[Any, Pipeline]) -> None:
    positive, negative = embeds(sd, "the sea")
    assert_same(*both(sd, prompt_embeds=positive, negative_prompt_embeds=negative))
    assert_same(*both(sd, prompt_embeds=positive, num_images_per_prompt=2))
    _, actual = both(sd, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert_same(actual, sd[1]("the sea", num_inference_steps=STEPS, seed=0, output_type="latent").images)


def test_given_embeddings_of_sdxl_equal_stock_diffusers(sdxl: tuple[Any, Pipeline]) -> None:
    positive, negative, pooled, negative_pooled = embeds(sdxl, "the sea")
    given = {"prompt_embeds": positive, "pooled_prompt_embeds": pooled}
    both_given = {
        **given,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    assert_same(*both(sdxl, **both_given))
    assert_same(*both(sdxl, **given))


def test_a_callback_may_change_the_latents(sd: tuple[Any, Pipeline]) -> None:
    seen: list[list[float]] = []

    def halve(pipe: Any, step: int, timestep: Any, told: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen[-1].append(float(timestep))
        return {"latents": told["latents"] * 0.5} if step == 1 else told

    reference, pipe = sd
    reference.scheduler = pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.engine.scheduler_config)
    results = []
    for call in sd:
        seen.append([])
        results.append(
            call(
                PROMPT,
                num_inference_steps=STEPS,
                generator=seeded(0),
                output_type="latent",
                callback_on_step_end=halve,
                callback_on_step_end_tensor_inputs=["latents"],
            ).images
        )
    assert_same(*results)
    assert seen[0] == seen[1]
    assert len(seen[1]) == STEPS


def test_a_callback_may_change_the_latents_in_place(sd: tuple[Any, Pipeline]) -> None:
    def halve(pipe: Any, step: int, timestep: Any, told: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        told["latents"].mul_(0.5)
        return {}

    expected, actual = both(sd, callback_on_step_end=halve)
    assert_same(expected, actual)


def test_a_callback_may_stop_the_run(sd: tuple[Any, Pipeline]) -> None:
    steps = []

    def stop(pipe: Any, step: int, timestep: Any, told: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(step)
        pipe._interrupt = step == 1
        return told

    expected, actual = both(sd, callback_on_step_end=stop)
    assert_same(expected, actual)
    assert steps[-1] == 1
    assert_same(*both(sd))  # the next run is a whole one


def test_latents_of_a_callback_must_fit(sd: tuple[Any, Pipeline]) -> None:
    with pytest.raises(RequestError, match=r"latents of callback_on_step_end: shape \(1, 1, 8, 8\)"):
        sd[1](
            PROMPT,
            num_inference_steps=STEPS,
            callback_on_step_end=lambda *told: {"latents": told[-1]["latents"][:, :1]},
        )


def test_clip_skip_reads_the_hidden_states_from_the_end(sd: tuple[Any, Pipeline]) -> None:
    reference, pipe = sd
    encoder, tokenizer = reference.text_encoder, reference.tokenizer
    ids = tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    norm = next(part for name, part in encoder.named_modules() if name.endswith("final_layer_norm"))
    for skip in (0, 1, 2, 3):
        with torch.no_grad():
            hidden = norm(encoder(ids, output_hidden_states=True).hidden_states[-(skip + 1)])
        expected = pipe.prompts.from_embeds("prompt_embeds", hidden, None, 1).context
        ((state,), _) = pipe.prompts.encode([(PROMPT, None)], skip, Reading())
        assert_same(expected, state.context)
    with pytest.raises(RequestError, match="clip_skip: 4, but this text encoder has 3 layers; at most 3"):
        pipe(PROMPT, clip_skip=4, num_inference_steps=1)


def test_scheduler_names_mean_what_the_objects_mean(sd: tuple[Any, Pipeline]) -> None:
    expected, _ = both(
        sd,
        scheduler="DPMSolverMultistepScheduler",
        overrides={"use_karras_sigmas": True},
        num_inference_steps=7,
    )
    pipe = sd[1]
    call = {"prompt": PROMPT, "num_inference_steps": 7, "seed": 0, "output_type": "latent"}
    for name in ("DPM++ 2M Karras", "dpmpp_2m_karras"):
        assert_same(expected, pipe(**call, scheduler=name).images)
    pipe.scheduler = "DPM++ 2M Karras"
    assert_same(expected, pipe(**call).images)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True
    )
    assert_same(expected, pipe(**call).images)


@pytest.mark.parametrize("value", ["DPM++ 9M", 5, None, "Restart"])
def test_a_scheduler_that_is_not_there_leaves_the_old_one(sd: tuple[Any, Pipeline], value: Any) -> None:
    pipe = sd[1]
    pipe.scheduler = "euler"
    with pytest.raises(RequestError, match="scheduler"):
        pipe.scheduler = value
    assert pipe.scheduler.name == "euler"


def test_a_scheduler_of_any_other_class_is_followed(sd: tuple[Any, Pipeline]) -> None:
    reference, pipe = sd
    reference.scheduler = pipe.scheduler = diffusers.IPNDMScheduler()
    call = {"num_inference_steps": 7, "output_type": "latent"}
    assert_same(reference(PROMPT, generator=seeded(3), **call).images, pipe(PROMPT, seed=3, **call).images)
    with pytest.raises(RequestError, match="scheduler"):
        pipe.scheduler = reference.unet  # it has a config, too


def test_every_scheduler_can_be_set(sd: tuple[Any, Pipeline]) -> None:
    from sdfast.schedulers import SAMPLERS

    for sampler in SAMPLERS:
        sd[1].scheduler = sampler.name


def test_picture_i_of_a_batch_is_the_picture_alone_and_that_of_stock(sd: tuple[Any, Pipeline]) -> None:
    reference, pipe = sd
    call = {"num_inference_steps": STEPS, "output_type": "latent"}
    reference.scheduler = pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        pipe.engine.scheduler_config
    )
    together = pipe(["the sea", "a boat"], num_images_per_prompt=2, seed=40, **call)
    assert together.seeds == (40, 41, 42, 43)
    for i, prompt in enumerate(["the sea", "the sea", "a boat", "a boat"]):
        alone = pipe(prompt, seed=40 + i, **call).images
        assert_same(alone, together.images[i : i + 1])
        assert_same(reference(prompt, generator=seeded(40 + i), **call).images, alone)


def test_the_same_request_gives_the_same_bytes(sd: tuple[Any, Pipeline], sd_engine: Path) -> None:
    def drawn(pipe: Pipeline) -> bytes:
        call = {"num_inference_steps": STEPS, "seed": 3, "scheduler": "euler_a"}
        return b"".join(image.tobytes() for image in pipe(PROMPT, num_images_per_prompt=2, **call).images)

    first = drawn(sd[1])
    assert drawn(sd[1]) == first
    assert drawn(ours(sd_engine)) == first


def test_the_seed_is_told_when_it_was_chosen(sd: tuple[Any, Pipeline]) -> None:
    call = {"num_inference_steps": 1, "scheduler": "ddim", "output_type": "latent"}
    output = sd[1](PROMPT, **call)
    again = sd[1](PROMPT, seed=output.seeds[0], **call)
    assert torch.equal(output.images, again.images)
    assert sd[1](PROMPT, generator=seeded(1), **call).seeds is None


def test_the_callers_generator_is_advanced_as_by_stock(sd: tuple[Any, Pipeline]) -> None:
    states = []
    sd[0].scheduler = sd[1].scheduler = diffusers.DDPMScheduler.from_config(sd[1].engine.scheduler_config)
    for call in sd:
        generator = seeded(11)
        call(PROMPT, num_inference_steps=STEPS, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_what_was_cut_from_a_prompt_is_told(sd: tuple[Any, Pipeline]) -> None:
    output = sd[1](["short", "sea " * 100], num_inference_steps=1, scheduler="ddim", output_type="latent")
    assert output.truncated[0] == ""
    assert output.truncated[1].startswith("sea")


def test_a_tuple_is_given_when_asked_for(sd: tuple[Any, Pipeline]) -> None:
    images, nsfw = sd[1](PROMPT, num_inference_steps=1, scheduler="ddim", return_dict=False)
    assert isinstance(images[0], Image.Image)
    assert nsfw is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ip adapter": ({"ip_adapter_image": np.zeros((2, 2))}, "ip_adapter_image: this engine has no IP-Adapter"),
    "ip adapter embeds": ({"ip_adapter_image_embeds": [torch.zeros(2, 2)]}, "image_embeds: not supported"),
    "attention kwargs": ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
    "a typing error": ({"num_inference_step": 5}, "num_inference_step: not supported"),
    "SDXL's second prompt": ({"prompt_2": "a"}, "prompts_2: only engines of SDXL"),
    "SDXL's sizes": ({"target_size": (8, 8)}, "target_size: only engines of SDXL"),
    "SDXL's crops": ({"crops_coords_top_left": (0, 1)}, "crops_coords_top_left: only engines of SDXL"),
    "half a size": ({"original_size": (8,)}, "^original_size.1: is missing"),
    "a size below zero": ({"original_size": (8, -1)}, "^original_size.1: must be greater"),
    "too few second prompts": (
        {"prompt": ["a", "b"], "prompt_2": ["c"]},
        "^prompts_2: 1 for 2 prompts",
    ),
    "a second negative prompt alone": ({"negative_prompt_2": "a"}, "give a negative prompt too"),
    "a number for a second prompt": ({"prompt_2": 5}, "^prompt_2: must be a string"),
    "a second prompt and embeddings": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 32), "prompt_2": "a"},
        "^prompt_2: with prompt_embeds",
    ),
    "no prompt": ({"prompt": None}, "prompt or prompt_embeds"),
    "no prompts": ({"prompt": []}, "^prompts: .*at least 1"),
    "a number for a prompt": ({"prompt": 5}, "^prompt: must be a string or a list of strings"),
    "bytes for a prompt": ({"prompt": b"a"}, "^prompt: must be a string"),
    "a number in the prompts": ({"prompt": ["a", 5]}, "^prompts.1"),
    "a number for a negative prompt": ({"negative_prompt": 5}, "^negative_prompt: must be a string"),
    "too few negative prompts": (
        {"prompt": ["a", "b"], "negative_prompt": ["c"]},
        "^negative_prompts: 1 for 2",
    ),
    "prompt and embeddings": ({"prompt_embeds": torch.zeros(1, 77, 32)}, "prompt or prompt_embeds"),
    "embeddings of another width": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 5)},
        r"^prompt_embeds: shape \(1, 77, 5\), but a tensor of shape \(1, 77, 32\)",
    ),
    "embeddings of another length": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 9, 32)},
        "^prompt_embeds",
    ),
    "embeddings that are no tensor": (
        {"prompt": None, "prompt_embeds": [1]},
        "^prompt_embeds: must be a tensor",
    ),
    "embeddings of NaN": ({"prompt": None, "prompt_embeds": torch.full((1, 77, 32), torch.nan)}, "finite"),
    "negative embeddings for another number": (
        {"negative_prompt_embeds": torch.zeros(2, 77, 32)},
        "^negative_prompt_embeds: shape",
    ),
    "two negatives": (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 77, 32)},
        "negative_prompt or negative_prompt_embeds",
    ),
    "pooled embeddings for SD": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 32), "pooled_prompt_embeds": torch.zeros(1, 4)},
        "^pooled_prompt_embeds: only engines of SDXL",
    ),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 9, 9)}, r"^latents: shape \(1, 4, 9, 9\)"),
    "latents of NaN": ({"latents": torch.full((1, 4, 8, 8), torch.inf)}, "^latents: .*finite"),
    "latents that are no tensor": ({"latents": np.zeros((1, 4, 8, 8))}, "^latents: ndarray"),
    "a seed for a generator": ({"generator": 42}, "^generator: 42 is not"),
    "too few generators": (
        {"generator": [torch.Generator()], "num_images_per_prompt": 2},
        "1 generators for 2",
    ),
    "no generators": ({"generator": []}, "0 generators for 1"),
    "seed and generator": ({"generator": torch.Generator(), "seed": 1}, "seed or generator"),
    "an output type": ({"output_type": "jpeg"}, "^output_type: 'jpeg'"),
    "other tensors for the callback": ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "latents"),
    "a size outside": ({"height": 512, "width": 512}, r"^size 512x512 .*64\.\.128x64\.\.128"),
    "a crooked size": ({"height": 65}, "^height: must be a multiple of 8"),
    "text for guidance": ({"guidance_scale": "high"}, "^guidance_scale: must be a valid number"),
    "NaN for guidance": ({"guidance_scale": float("nan")}, "^guidance_scale: must be a finite number"),
    "no steps": ({"num_inference_steps": 0}, "^num_inference_steps"),
    "a billion steps": ({"num_inference_steps": 10**9}, "^num_inference_steps: .*1000"),
    "a billion pictures": ({"num_images_per_prompt": 10**9}, "^num_images_per_prompt: .*128"),
    "eta for Euler": ({"eta": 0.5, "scheduler": "euler"}, "eta"),
    "timesteps for DDIM": ({"timesteps": [5, 3], "scheduler": "ddim"}, "timesteps"),
    "a scheduler nobody knows": ({"scheduler": "dpm++ 7m"}, "unknown scheduler"),
    "clip_skip": ({"clip_skip": -1}, "^clip_skip"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_name(sd: tuple[Any, Pipeline], case: str) -> None:
    fields, message = BAD[case]
    sd[1].scheduler = "ddim"
    with pytest.raises(RequestError, match=message) as caught:
        sd[1](**{"prompt": PROMPT, **fields})
    assert len(str(caught.value).splitlines()) == 1


def test_sdxl_embeddings_need_the_pooled_ones(sdxl: tuple[Any, Pipeline]) -> None:
    with pytest.raises(RequestError, match="need pooled_prompt_embeds"):
        sdxl[1](prompt_embeds=torch.zeros(1, 77, 80), scheduler="ddim")
    with pytest.raises(RequestError, match=r"^pooled_prompt_embeds: shape \(1, 3\)"):
        sdxl[1](
            prompt_embeds=torch.zeros(1, 77, 80), pooled_prompt_embeds=torch.zeros(1, 3), scheduler="ddim"
        )


def test_an_inpainting_engine_draws_no_text_to_image(inpainting_engine: Path) -> None:
    with pytest.raises(RequestError, match="inpainting"):
        ours(inpainting_engine)("a boat")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_lcm_is_told_the_guidance_as_an_embedding(tmp_path: Path, dtype: str) -> None:
    folder = checkpoints.build_sd(tmp_path / "sd", time_cond_proj_dim=17)
    engine = export(folder, tmp_path / "engine", Recipe(backend="eager", dtype=dtype))
    reference, pipe = stock(folder), ours(engine)
    for scale in (1.0, 8.5):
        stocks = reference.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=17)
        torch.testing.assert_close(guidance_embedding(torch.tensor([scale - 1.0]), 17), stocks)
    expected, actual = both((reference, pipe), guidance_scale=8.5)
    if dtype == "fp32":
        assert_same(expected, actual)
    else:
        assert (expected - actual).norm() / expected.norm() < 2e-2
    other = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=2.0, seed=0, output_type="latent").images
    assert not torch.allclose(actual, other)


def test_a_repeated_prompt_does_not_run_the_text_encoder_again() -> None:
    engine = FakeEngine()
    pipe = Pipeline(engine)
    pipe(["a", "b", "a"], num_inference_steps=2)
    assert len(engine.calls["text_encoder"]) == 3  # a, b and the empty negative prompt
    pipe("b", negative_prompt="a", num_inference_steps=3)
    assert len(engine.calls["text_encoder"]) == 3
    pipe("b", num_inference_steps=1, clip_skip=1)
    assert len(engine.calls["text_encoder"]) == 4


def test_the_prompt_cache_is_bounded_in_bytes() -> None:
    def state(size: int) -> PromptState:
        return PromptState(torch.zeros(1, 1, size // 4), None)

    cache = PromptCache(limit=1000)
    for name in "abcd":
        cache.put(name, state(400), "")
    assert [name for name in "abcd" if cache.get(name)] == ["c", "d"]
    cache.get("c")
    cache.put("e", state(400), "")
    assert [name for name in "cde" if cache.get(name)] == ["c", "e"]
    cache.put("e", state(400), "")
    cache.put("f", state(200), "")
    assert [name for name in "cef" if cache.get(name)] == ["c", "e", "f"]
    cache.put("g", state(4000), "")
    assert not any(cache.get(name) for name in "cefg")


def test_all_pictures_of_a_large_request_are_drawn_in_several_calls() -> None:
    engine = FakeEngine()
    pipe = Pipeline(engine)
    images = pipe("a", num_images_per_prompt=11, num_inference_steps=2, seed=5, output_type="latent").images
    assert engine.calls["unet"] == [8, 8, 6] * 2
    alone = Pipeline(FakeEngine())("a", num_inference_steps=2, seed=15, output_type="latent").images
    assert torch.equal(images[10:], alone)


@pytest.mark.parametrize(("module", "message"), [("unet", "latents"), ("vae_decoder", "picture")])
def test_what_is_not_finite_becomes_no_picture(module: str, message: str) -> None:
    pipe = Pipeline(FakeEngine(failpoints={module: Failpoint("nan")}))
    with pytest.raises(NumericalError, match=message):
        pipe("a", num_inference_steps=2)
    pipe.engine.failpoints.clear()
    assert pipe("a", num_inference_steps=2).images


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:nine", "", "mps"])
def test_a_device_that_is_not_one_is_refused(sd_engine: Path, device: str) -> None:
    with pytest.raises(BackendError, match="device"):
        Engine.open(sd_engine, device)
    with pytest.raises(BackendError, match="device"):
        Pipeline(FakeEngine()).to(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_not_replaced_by_the_processor(sd_engine: Path) -> None:
    with pytest.raises(BackendError, match="sees no CUDA device"):
        Engine.open(sd_engine, "cuda")


@pytest.mark.parametrize(
    ("gpu", "given", "provider"),
    [(True, None, "cuda"), (False, None, "cpu"), (False, "tensorrt", "tensorrt")],
)
def test_from_pretrained_in_float16_is_for_the_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, given: str | None, provider: str
) -> None:
    recipes: list[Recipe] = []
    keep = "sdfast.export.first_use.export"
    monkeypatch.setattr(keep, lambda _, target, recipe, **__: recipes.append(recipe))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(StableDiffusionPipeline, "from_engine", lambda folder, **_: None)
    loras = ["org/style", {"source": "a.safetensors", "scale": 0.5}]
    embeddings = ["org/toy", {"source": "a.safetensors", "token": "<a>"}]
    StableDiffusionPipeline.from_pretrained(
        "org/name", torch_dtype=torch.float16, provider=given, loras=loras, embeddings=embeddings
    )
    assert [recipe.provider for recipe in recipes] == [provider]
    assert [(lora.source, lora.scale) for lora in recipes[0].loras] == [
        ("org/style", 1.0),
        ("a.safetensors", 0.5),
    ]
    assert [(one.source, one.token) for one in recipes[0].embeddings] == [
        ("org/toy", None),
        ("a.safetensors", "<a>"),
    ]


def test_from_pretrained_exports_once_and_says_so(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDFAST_CACHE", str(tmp_path))
    for said in (True, False):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, backend="eager", safety_checker=None)
        assert isinstance(pipe, StableDiffusionPipeline)
        assert ("exporting" in capsys.readouterr().err) == said
    assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 1
    with pytest.raises(RequestError, match="torch_dtype"):
        StableDiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.bfloat16)
    with pytest.raises(RequestError, match="custom_pipeline"):
        StableDiffusionPipeline.from_pretrained(tiny_sd, custom_pipeline="x")
