"""The stock pipeline takes the same request as sdfast's and draws the same pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sdfast.backends.attention import Attention
from sdfast.errors import DependencyError
from sdfast.export.checkpoint import resolve
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.validation import generate, reference_pipeline
from sdfast.validation.reference import DrawnInFloat32, _Answering
from tests.backends import xformers

ONE = Request.make(
    prompts=("boat",),
    negative_prompts=(None,),
    height=64,
    width=64,
    num_inference_steps=2,
    scheduler="ddim",
    seed=5,
)


@pytest.mark.parametrize(
    "fields",
    [
        {"scheduler": "Euler a", "num_images_per_prompt": 2},
        {"negative_prompts": ("misty", None), "guidance_rescale": 0.5},
        {"clip_skip": 1, "scheduler": "DDIM", "eta": 0.7},
        {"timesteps": (900, 500, 20), "num_inference_steps": None, "scheduler": "DDPM"},
        {"sigmas": (10.0, 3.0, 0.5, 0.0), "num_inference_steps": None, "scheduler": "Euler"},
        {"guidance_scale": 1.0},
    ],
)
def test_the_same_request_on_both_sides(checkpoint: Path, sound: Path, fields: dict[str, object]) -> None:
    request = Request.make(
        **{
            "prompts": ("a cabin", "the sea at night"),
            "negative_prompts": (None, None),
            "height": 64,
            "width": 64,
            "num_inference_steps": 3,
            "seed": 11,
            **fields,
        }
    )
    pipe = reference_pipeline(resolve(checkpoint))
    own = type(pipe.scheduler)
    truth = generate(pipe, request, output_type="pt")
    engine = Pipeline.from_engine(sound)
    engine.set_progress_bar_config(disable=True)
    images = engine.generate(request, output_type="pt").images
    assert truth.shape == images.shape
    assert (truth - images).abs().max() < 1e-4
    assert type(pipe.scheduler) is own


def test_pictures_for_a_person(checkpoint: Path) -> None:
    request = Request.make(
        prompts=("boat",),
        negative_prompts=(None,),
        height=64,
        width=64,
        num_inference_steps=1,
        scheduler="ddim",
    )
    images = generate(reference_pipeline(resolve(checkpoint)), request)
    assert [image.size for image in images] == [(64, 64)]


def test_reduced_precision(checkpoint: Path) -> None:
    pipe = reference_pipeline(resolve(checkpoint), dtype=torch.float16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}


def test_without_diffusers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(DependencyError, match=r"pip install \"sdfast\[export\]\""):
        reference_pipeline(resolve(checkpoint))


def test_the_stock_pipeline_with_another_attention(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """xFormers is on CUDA alone, but its stand-in takes a processor's tensors."""
    xformers.install(monkeypatch)
    resolved = resolve(checkpoint)
    truth = generate(reference_pipeline(resolved), ONE, output_type="pt")
    for kind, device, exact in (("sdpa", "cpu", True), ("math", "cpu", False), ("xformers", "cuda", False)):
        attention = Attention(kind, torch.device(device))
        images = generate(reference_pipeline(resolved, attention=attention), ONE, output_type="pt")
        assert torch.equal(images, truth) == exact
        assert (images - truth).abs().max() < 1e-5
        assert {shape.keys for shape in attention.chosen} == {
            16,
            77,
        }  # of the U-Net, and not the text's or the VAE's
        assert {choice.kind for choice in attention.chosen.values()} == {kind}


def test_attention_with_a_mask_stays_pytorchs() -> None:
    attention = Attention("math", torch.device("cpu"))
    q, mask = torch.randn(1, 2, 4, 8), torch.tensor([[True, True, False, False]])
    expected = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    with _Answering(attention):
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, attn_mask=mask), expected)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert not attention.chosen
        F.scaled_dot_product_attention(q, q, q)
        assert attention.chosen


def test_stock_pipelines_of_one_process_keep_their_own_attention(checkpoint: Path) -> None:
    resolved, kinds = resolve(checkpoint), ("flash", "math")
    attentions = {kind: Attention(kind, torch.device("cpu")) for kind in kinds}
    pipes = {kind: reference_pipeline(resolved, attention=attentions[kind]) for kind in kinds}
    images = {kind: generate(pipes[kind], ONE, output_type="pt") for kind in kinds}
    assert not torch.equal(images["flash"], images["math"])
    assert torch.equal(generate(pipes["flash"], ONE, output_type="pt"), images["flash"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_in_half_precision_is_rounded_noise(dtype: torch.dtype) -> None:
    """Also where torch would draw other numbers, as torch 2.11 does; other functions are left alone."""
    from diffusers.utils.torch_utils import randn_tensor

    def draw(dtype: torch.dtype) -> torch.Tensor:
        return randn_tensor((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=dtype)

    exact, asked = draw(torch.float32), []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.randn:
                asked.append(kwargs["dtype"])
            return func(*args, **(kwargs or {}))

    with Seen(), DrawnInFloat32():
        assert torch.equal(draw(dtype), exact.to(dtype))
        assert torch.zeros(2, dtype=dtype).dtype == dtype
    assert asked == [torch.float32]
