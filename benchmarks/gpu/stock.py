"""The stock diffusers pipeline in fp16: as it comes, or as its documentation advises for speed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.workloads import PROMPT, SCHEDULER, SEED, Draw, Workload
from sdfast.noise import generator
from sdfast.validation.drawing import stock_scheduler
from sdfast.validation.modules import token_ids
from sdfast.validation.reference import quiet


def draw_with(pipe: Any, workload: Workload, draw: Draw, output_type: str, seeds: list[int]) -> Any:
    """Pictures of the prompt by a diffusers pipeline, one for each seed.

    The first latents are drawn in float32 whatever the pipeline is in: asked for half precision, a generator
    on the CPU may draw other numbers, so another picture.
    """
    unet, scale = pipe.unet, pipe.vae_scale_factor
    shape = (unet.config.in_channels, workload.height // scale, workload.width // scale)
    latents = torch.stack([torch.randn(shape, generator=generator(seed)) for seed in seeds])
    with quiet():
        return pipe(
            prompt=PROMPT,
            num_inference_steps=draw.steps,
            guidance_scale=draw.guidance,
            height=workload.height,
            width=workload.width,
            num_images_per_prompt=len(seeds),
            latents=latents.to(unet.device, unet.dtype),
            output_type=output_type,
        ).images


def open_pipeline(source: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' pipeline of the checkpoint, loaded as its users do, with the scheduler of all sides."""
    import diffusers

    sdxl = (source / "text_encoder_2").exists()
    with quiet():
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            source,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **({"add_watermarker": False} if sdxl else {}),
        ).to(device)
    pipe.scheduler = stock_scheduler(pipe, SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Stock:
    """The stock pipeline in fp16."""

    def __init__(self, workload: Workload, source: Path, device: torch.device, *, compiled: bool) -> None:
        self.workload = workload
        self.pipe = open_pipeline(source, torch.float16, device)
        self._unet, self._decode = self.pipe.unet, self.pipe.vae.decode
        self._upcasts = hasattr(self.pipe, "text_encoder_2") and self.pipe.vae.config.force_upcast
        if compiled:
            self._compile()

    def draw(self, draw: Draw, output_type: str = "pil") -> Any:
        seeds = [SEED + i for i in range(draw.batch)]
        return draw_with(self.pipe, self.workload, draw, output_type, seeds)

    @contextmanager
    def module(self, name: str, batch: int) -> Iterator[Callable[[], object]]:
        if name.startswith("text_encoder"):
            yield self._text_encoder(name)
            return
        args, given = self._calls(batch)[name]
        if name == "unet":
            yield lambda: self.pipe.unet(*args, **given)
            return
        with self._vae_as_the_pipeline_runs_it():
            yield lambda: self.pipe.vae.decode(*args, **given)

    def _compile(self) -> None:
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.pipe.vae.to(memory_format=torch.channels_last)
        # One kernel set for each shape, as max-autotune needs; a second shape would else give symbolic ones.
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self.pipe.unet = torch.compile(self._unet, mode="max-autotune", **options)
        # A VAE that the pipeline casts for each picture has its weights elsewhere each time, which a CUDA
        # graph could not follow.
        mode = "max-autotune-no-cudagraphs" if self._upcasts else "max-autotune"
        self.pipe.vae.decode = torch.compile(self._decode, mode=mode, **options)

    def _text_encoder(self, name: str) -> Callable[[], object]:
        model = getattr(self.pipe, name)
        ids = token_ids(self.pipe, int(name.endswith("_2")), [PROMPT]).to(model.device)
        every = hasattr(self.pipe, "text_encoder_2")  # SDXL takes a hidden state before the last
        return lambda: model(ids, output_hidden_states=every)

    def _calls(self, batch: int) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        """How the pipeline calls the U-Net and the VAE: other arguments would have torch compile anew."""
        seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        pipe = self.pipe
        unet, decode = pipe.unet, pipe.vae.decode
        handle = self._unet.register_forward_pre_hook(
            lambda _module, args, given: seen.update(unet=(args, given)), with_kwargs=True
        )

        def decoding(*args: Any, **given: Any) -> Any:
            seen["vae_decoder"] = args, given
            return self._decode(*args, **given)

        pipe.unet, pipe.vae.decode = self._unet, decoding
        try:
            self.draw(Draw(2, batch, True), "pt")
        finally:
            handle.remove()
            pipe.unet, pipe.vae.decode = unet, decode
        return seen

    @contextmanager
    def _vae_as_the_pipeline_runs_it(self) -> Iterator[None]:
        """In float32 where the pipeline casts it for every picture: that cast is not part of the module."""
        if not self._upcasts:
            yield
            return
        self._cast_vae(torch.float32)
        try:
            yield
        finally:
            self._cast_vae(torch.float16)

    def _cast_vae(self, dtype: torch.dtype) -> None:
        with quiet():
            self.pipe.vae.to(dtype=dtype)
