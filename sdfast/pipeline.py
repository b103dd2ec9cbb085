"""prompt → picture: the whole way, in the order in which it happens. The call that starts it is in `call`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from tqdm import tqdm

from sdfast.backends import check_options, parse_device
from sdfast.bucket import Buckets
from sdfast.call import DiffusersCall, Given, PipelineOutput, StepCallback, refuse
from sdfast.engine import Engine
from sdfast.errors import NumericalError
from sdfast.first_latents import Over, check_pasted
from sdfast.hires import enlarged_images, enlarged_latents
from sdfast.ip_adapter import ImagePrompts
from sdfast.loop import Rows
from sdfast.preparation import Preparation, Prepared
from sdfast.prompts import Prompts, check_tensor
from sdfast.request import Request


class Pipeline(Preparation, DiffusersCall):
    """Text to image on one engine, or over an image.

    >>> pipe = Pipeline.from_engine("engines/landscapes")
    >>> image = pipe("a cabin in misty mountains, watercolor style", seed=42).images[0]
    >>> again = pipe("a cabin in snowy mountains, watercolor style", image=image, strength=0.6).images[0]
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._buckets = Buckets()
        self._progress: dict[str, Any] = {"disable": None}
        self._interrupt = False

    @classmethod
    def from_engine(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        *,
        threads: int | None = None,
        compile: bool = False,
        attention: str | None = None,
    ) -> Self:
        """Open the engine in `folder`; see `Engine.open`."""
        return cls(Engine.open(folder, device, threads=threads, compile=compile, attention=attention))

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        backend: str = "onnx",
        provider: str | None = None,
        sizes: Sequence[str] | None = None,
        loras: Sequence[str | Path | Mapping[str, Any]] = (),
        controlnet: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]] | None = None,
        embeddings: Sequence[str | Path | Mapping[str, Any]] = (),
        ip_adapters: Sequence[str | Path | Mapping[str, Any]] = (),
        image_encoder: str | Path | None = None,
        vae: str | Path | Mapping[str, Any] | None = None,
        cache_branch: int | None = None,
        pag_applied_layers: str | Sequence[str] = (),
        compile: bool = False,
        **refused: Any,
    ) -> Self:
        """A pipeline for a checkpoint (Hub id, diffusers folder, single file, or "landscapes").

        The engine is exported on first use into the cache (`SDFAST_CACHE`, by default
        `~/.cache/sdfast/engines`), which is said, and opened from there after that. It has the checkpoint's
        own size, or `sizes` ("512x768", width first). `provider` ("cpu", "cuda", "tensorrt"): what ONNX
        graphs are written for, which is where they run; default: "cuda" for float16 where there is a GPU,
        else "cpu". `loras`: what is merged into the weights, each a file, a folder or a Hub id, or a mapping
        of `source`, `weight_name`, `revision` and `scale`; with `on_request` in place of `scale`, and perhaps
        a `name`, what calls choose by their `loras`. `embeddings`: what tokens in prompts stand for
        (textual inversion), likewise, with `token` in place of `scale`. `controlnet`: what is put beside the
        U-Net, a folder, a file or a Hub id, or a mapping of `source`, `revision` and `variant`; or a list of
        several. `ip_adapters`: by what images can be told, each a file, a folder or a Hub id, or a mapping of
        `source`, `subfolder`, `weight_name` and `revision`, as diffusers' load_ip_adapter has them;
        `image_encoder`: the folder of what they see with, by default that beside the first one's file.
        `vae`: what takes the place of the checkpoint's own VAE, a tiny one too: a folder, a file or a Hub id,
        or a mapping of `source`, `revision` and `variant`.
        `cache_branch`: for calls with a `cache_interval`, see `sdfast.models.step_cache`.
        `pag_applied_layers`: for calls with a `pag_scale`, see `sdfast.models.pag`.
        `compile`, for `backend="eager"`: see `Engine.open`.
        """
        from sdfast.export.first_use import cached_engine

        refuse(refused, "from_pretrained", neutral={"use_safetensors": True})
        check_options(backend, torch.device("cpu"), compile=compile, attention=None)  # before it exports
        folder = cached_engine(
            checkpoint,
            dtype=torch_dtype,
            revision=revision,
            variant=variant,
            backend=backend,
            provider=provider,
            sizes=tuple(sizes) if sizes else None,
            loras=loras,
            controlnet=controlnet,
            embeddings=embeddings,
            ip_adapters=ip_adapters,
            image_encoder=image_encoder,
            vae=vae,
            cache_branch=cache_branch,
            pag=(pag_applied_layers,) if isinstance(pag_applied_layers, str) else tuple(pag_applied_layers),
        )
        return cls.from_engine(folder, compile=compile)

    def to(self, device: str | torch.device) -> Self:
        """Move to `device` ("cpu", "cuda", "cuda:1"): the engine's modules are loaded anew there."""
        target = parse_device(device)
        if target != self.engine.device:
            self.engine = self.engine.moved(target)
            self.prompts, self.images = Prompts(self.engine), ImagePrompts(self.engine)
            self._buckets = Buckets()
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the tqdm progress bar, as in diffusers (`disable=True` hides it)."""
        self._progress = options

    @property
    def interrupt(self) -> bool:
        """Set to True in a step callback to stop after that step."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @torch.no_grad()
    def generate(
        self,
        request: Request,
        given: Given | None = None,
        output_type: str = "pil",
        callback: StepCallback | None = None,
    ) -> PipelineOutput:
        """Draw what `request` asks for: encode, denoise, decode; and for a second pass denoise again.

        Pictures over a part of an image are given as that image, with the part pasted into it.
        """
        given, passes = given or Given(), request.passes
        check_pasted(given.over, output_type)
        for one in passes:
            self.engine.check_size(one.height, one.width)
        with self.engine.running():
            prepared = self.prepare(request, given)
            if output_type != "latent":
                self.prepare_decoder(passes[-1], request.images)
            latents = self._denoise(prepared, callback)
            if len(passes) > 1 and not self._interrupt:
                over = self.enlarged(latents, request)
                given = _again(given, request, over)
                latents = self._denoise(self.prepare(passes[-1], given, first=request), callback)
            images = _as(latents if output_type == "latent" else self.decode(latents), output_type)
        if given.over is not None and given.over.area is not None:
            images = [given.over.area.pasted(picture) for picture in images]
        own_seeds = given.generators is None and given.latents is None
        return PipelineOutput(
            images,
            request.seeds if own_seeds else None,
            prepared.truncated,
            variation_seeds=request.variation_seeds or None,
        )

    @torch.no_grad()
    def enlarged(self, latents: torch.Tensor, request: Request) -> Over:
        """What the second pass of `request` draws over: latents [n, C, h, w] of the first, at its size."""
        hires, factor = request.hires, self.engine.manifest.model.vae_scale_factor
        if hires is None:
            raise ValueError("the request has no second pass")
        if hires.latent:
            return Over(enlarged_latents(latents, request, hires, factor))
        return Over(enlarged_images(to_uint8(self.decode(latents)).cpu().numpy(), request, hires, factor))

    def _denoise(self, prepared: Prepared, callback: StepCallback | None) -> torch.Tensor:
        """The loop: latents [n, C, h, w] float32."""
        rows, plan = prepared.rows, prepared.schedule
        _, h, w = rows[0].latents.shape
        factor = self.engine.manifest.model.vae_scale_factor
        running = Rows(self.engine, rows, h * factor, w * factor, buckets=self._buckets)
        self._interrupt = False
        for k in tqdm(range(len(plan)), **self._progress):
            running.tick()
            if callback is not None:
                running.check()
                told = {"latents": running.latents}
                changed = callback(self, k, float(plan.timesteps[k]), told) or {}
                new = changed.get("latents", told["latents"])  # returned, or changed in place
                check_tensor("latents of callback_on_step_end", new, tuple(told["latents"].shape))
                running.latents = new
            if self._interrupt:
                break
        running.check()
        latents = running.latents
        running.close()
        return latents

    def prepare_decoder(self, request: Request, images: int) -> None:
        """What has to be compiled to decode so many pictures at a time is, before the first step."""
        shape = (images, *self._latent_shape(request))
        self.engine.prepare(
            "vae_decoder", {"latents": torch.zeros(shape, device=self.device)}, request.height, request.width
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [n, C, h, w] → pictures [n, 3, H, W] float32 in [0, 1].

        Raises `NumericalError` for pictures that are not finite.
        """
        height, width = (side * self.engine.manifest.model.vae_scale_factor for side in latents.shape[2:])
        images = self.engine.call("vae_decoder", {"latents": latents}, height, width)["image"]
        if not bool(torch.isfinite(images).all()):
            raise NumericalError(
                f"the VAE's picture is not finite; {self.engine.manifest.remedy('vae_decoder')}"
            )
        return images


def _again(given: Given, request: Request, over: Over) -> Given:
    """What a second pass is given: the same, over what the first has drawn."""
    given = replace(given, latents=None, over=over)
    if request.hires is not None and request.hires.prompts is not None:
        given = replace(given, prompt_embeds=None, pooled_prompt_embeds=None)
    if request.hires is not None and request.hires.negative_prompts is not None:
        given = replace(given, negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    return given


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, H, W] in [0, 1] as [n, H, W, 3] uint8, rounded as diffusers rounds."""
    return images.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _as(images: torch.Tensor, output_type: str) -> Any:
    if output_type in ("pt", "latent"):
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in to_uint8(images).cpu().numpy()]
