"""The reference: the stock diffusers pipeline of a checkpoint, run with the same request.

Nothing of sdfast's networks, schedulers or loop takes part here; that is what makes it a reference.
"""

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from sdfast.errors import BackendError, CheckpointError, DependencyError, RequestError, first_line
from sdfast.export.checkpoint import Checkpoint, Component
from sdfast.first_latents import Over
from sdfast.hires import enlarged_images, enlarged_latents
from sdfast.noise import generator
from sdfast.request import TOLD_SIZES, Hires, Request
from sdfast.schedulers import resolve
from sdfast.validation.reading import as_given, embeddings, in_small_letters, is_plain

if TYPE_CHECKING:
    from sdfast.backends.attention import Attention
    from sdfast.export.embedding import Embedding
    from sdfast.export.lora import Lora

TASKS = {None: "", False: "Img2Img", True: "Inpaint"}  # of nothing, over an image, and with a mask
INPAINTED_CHANNELS = (4, 9)  # of the U-Nets that diffusers' inpainting pipelines take
_ADAPTER = "sdfast"  # what diffusers is to call a LoRA while it is loaded
_VARIANT = re.compile(r"\.(\w+?)(?:-\d+-of-\d+)?\.safetensors$")


def pipeline_class(family: str, *, controlnet: bool = False, masked: bool | None = None) -> str:
    """The name of diffusers' pipeline. masked: whether what it draws over has a mask; None: over nothing."""
    parts = ("XL" * (family == "sdxl"), "ControlNet" * controlnet, TASKS[masked])
    return f"StableDiffusion{''.join(parts)}Pipeline"


def stock() -> Any:
    """The diffusers package. Raises `DependencyError` when it, or transformers, is not there."""
    try:
        import diffusers
        import transformers  # noqa: F401  (diffusers names a missing one only deep inside a pipeline)
    except ImportError as error:
        raise DependencyError(
            f'the reference pipeline needs diffusers and transformers ({error}): pip install "sdfast[export]"'
        ) from error
    return diffusers


def reference_pipeline(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: "Attention | None" = None,
) -> Any:
    """diffusers' own text-to-image pipeline of `checkpoint`, with its ControlNet if it has one, in `dtype`,
    without its safety checker.

    LoRAs are loaded and fused in float32, by diffusers' own code and peft's; embeddings are loaded by
    diffusers' own, their tokens in small letters (see `reading.as_given`).

    attention: what computes that of the U-Net and a ControlNet, for a stock pipeline that is drawn with; the
        reference of a comparison leaves it out, and PyTorch chooses.

    Raises `DependencyError` without diffusers, or without peft where there are LoRAs, `BackendError` when the
    device is not there, `CheckpointError` for a LoRA or an embedding that diffusers does not load.
    """
    diffusers, device = stock(), torch.device(device)
    checkpoint.check_weights()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "device 'cuda' was asked for, but this torch sees no CUDA device; `sdfast doctor` says more"
        )
    options: dict[str, Any] = {"add_watermarker": False}
    if checkpoint.family == "sd":
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kind = pipeline_class(checkpoint.family, controlnet=checkpoint.controlnet is not None)
    with quiet():
        if checkpoint.controlnet is not None:
            options["controlnet"] = diffusers.ControlNetModel.from_pretrained(
                checkpoint.controlnet.folder,
                use_safetensors=True,
                local_files_only=True,
                variant=_variant(checkpoint.controlnet.component),
            )
        pipe = getattr(diffusers, kind).from_pretrained(
            checkpoint.folder,
            use_safetensors=True,
            local_files_only=True,
            variant=_variant(checkpoint.components["unet"]),
            **options,
        )
        for lora in checkpoint.loras:
            _fuse(pipe, lora)
        for embedding in checkpoint.embeddings:
            _add(pipe, embedding)
        pipe = pipe.to(device, dtype)
    _restore_text_model(pipe)
    if attention is not None:
        for network in step_networks(pipe):
            processors = network.attn_processors.items()
            network.set_attn_processor({name: _Attending(stock, attention) for name, stock in processors})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def step_networks(pipe: Any) -> list[Any]:
    """What a pipeline runs at each step: the U-Net, and its ControlNet if it has one."""
    return [pipe.unet, *([pipe.controlnet] if hasattr(pipe, "controlnet") else [])]


def _fuse(pipe: Any, lora: "Lora") -> None:
    """Load a LoRA as diffusers' users do, fuse it into the pipeline's weights, and let go of it."""
    if find_spec("peft") is None:
        raise DependencyError(
            f'the reference pipeline needs peft for LoRA {lora.name}: pip install "sdfast[export]"'
        )
    try:
        pipe.load_lora_weights(_as_trained(pipe, lora), adapter_name=_ADAPTER)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"LoRA {lora.name}: diffusers does not load it ({first_line(error)}), so there is no reference"
        ) from error
    components = [name for name, adapters in pipe.get_list_adapters().items() if _ADAPTER in adapters]
    if set(components) != set(lora.parts):
        raise CheckpointError(
            f"LoRA {lora.name}: diffusers finds {' and '.join(sorted(components)) or 'nothing'} in it, where "
            f"there is {' and '.join(sorted(lora.parts))}, so there is no reference"
        )
    pipe.fuse_lora(components, lora_scale=lora.scale, adapter_names=[_ADAPTER])
    pipe.unload_lora_weights()


def _as_trained(pipe: Any, lora: "Lora") -> Any:
    """What to give to `load_lora_weights`: the file.

    Where its alphas differ, its tensors by diffusers' own names for them, each times its alpha / rank, since
    diffusers loses the alphas of attention, and takes the most frequent one.
    """
    with safe_open(lora.path, framework="pt") as file:
        alphas = {float(file.get_tensor(name)) for name in file.keys() if name.endswith(".alpha")}  # noqa: SIM118
    if len(alphas) < 2:
        return str(lora.path)
    # What `load_lora_weights` tells it: of SDXL, whose layers kohya's files name after the original layout.
    config = {"unet_config": pipe.unet.config} if hasattr(pipe, "text_encoder_2") else {}
    tensors, scaled = pipe.lora_state_dict(str(lora.path), **config)
    for name, tensor in tensors.items():
        if ".down." in name:
            tensors[name] = tensor.float() * (scaled[f"{name.split('.lora.')[0]}.alpha"] / tensor.shape[0])
    return tensors


def _add(pipe: Any, embedding: "Embedding") -> None:
    """Load an embedding as diffusers' users do: from its file, or for SDXL each text encoder's vectors."""
    for component, name in embedding.tensors.items():
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        several = len(embedding.tensors) > 1
        try:
            pipe.load_textual_inversion(
                load_file(embedding.path)[name] if several else str(embedding.path),
                token=in_small_letters(tokenizer, embedding.token),
                tokenizer=tokenizer,
                text_encoder=getattr(pipe, component),
            )
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"embedding {embedding.name}: diffusers does not load it ({first_line(error)}), so there is "
                "no reference"
            ) from error


class _Attending:
    """A stock attention processor whose call of PyTorch's attention another kernel answers."""

    def __init__(self, processor: Any, attention: "Attention") -> None:
        self._processor = processor
        self._attention = attention

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _Answering(self._attention):
            return self._processor(attn, hidden_states, *args, **kwargs)


class _Answering(TorchFunctionMode):
    """While open in this thread, `scaled_dot_product_attention` is computed by an `Attention`."""

    def __init__(self, attention: "Attention") -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _plain(**kwargs):
            return self._attention.kernel(*args)
        return func(*args, **kwargs)


def _plain(
    attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None, **_: Any
) -> bool:
    """Whether attention is all that is asked for, as always between a prompt and a picture."""
    return attn_mask is None and not dropout_p and not is_causal and scale is None


def _restore_text_model(pipe: Any) -> None:
    """transformers 5 took a level out of its CLIP text model; diffusers still wants it for `clip_skip`."""
    model = pipe.text_encoder
    if not hasattr(model, "text_model"):
        object.__setattr__(model, "text_model", model)  # not as a submodule: a module cannot hold itself


class as_reference(ContextDecorator):  # noqa: N801 (a decorator)
    """Compute as the reference does: no gradients, and float32 that is not rounded to TF32 on a GPU."""

    def __enter__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        parts: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
        self._flags = [(part, part.allow_tf32) for part in parts]
        torch.set_grad_enabled(False)
        for part, _ in self._flags:
            part.allow_tf32 = False

    def __exit__(self, *_error: object) -> None:
        torch.set_grad_enabled(self._gradients)
        for part, allowed in self._flags:
            part.allow_tf32 = allowed


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' and transformers' bars and warnings: of float16 on a processor, asked for here, of
    their own deprecated calls. The progress bar of the steps is not theirs to lose."""
    import diffusers
    import transformers

    logs = [diffusers.logging, transformers.logging]
    verbosity = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, verbosity, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


class DrawnInFloat32(TorchFunctionMode):
    """Noise in half precision is that of float32, rounded, as long as this is entered.

    torch 2.11 draws other numbers from a generator on the CPU when it is asked for half precision, from 2.13
    on (at the latest) the same ones: the pipeline in half precision would draw another picture, not one with
    an error, and its error would be no bar.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype") in (torch.float16, torch.bfloat16):
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(kwargs["dtype"])
        return func(*args, **kwargs)


def stock_scheduler(pipe: Any, name: str | None) -> Any:
    """A new diffusers scheduler with the config of the checkpoint, which the name may override in part.

    name: any that `sdfast.schedulers.resolve` knows; None for the checkpoint's own class.
    """
    config = pipe.scheduler.config
    if name is None:
        return type(pipe.scheduler).from_config(config)
    sampler = resolve(name)
    return getattr(stock(), sampler.scheduler).from_config(config, **sampler.overrides)


def generate(
    pipe: Any,
    request: Request,
    *,
    scheduler: Any = None,
    output_type: str = "pil",
    over: Over | None = None,
    control: torch.Tensor | None = None,
    cache_branch: int | None = None,
) -> Any:
    """The pictures of `request` by the stock pipeline, the way sdfast's `Pipeline.generate` draws them.

    Image i has the generator of seed + i. scheduler: a diffusers scheduler in place of the one that the
    request names. over: what a request with `strength` is drawn over, by the stock pipeline for that, on the
    networks of `pipe`. control: the control images of a pipeline with a ControlNet, [m, 3, H, W], which the
    pictures take in turn. cache_branch: of a request with a `cache_interval`, see `cached_steps`. Returns a
    list of PIL images; or for `output_type="pt"` a tensor [n, 3, H, W] float32 in [0, 1], for "latent" the
    latents [n, C, h, w] float32.

    Raises `RequestError` and `BackendError` for what that pipeline cannot do.
    """
    if request.prompt_editing:
        raise RequestError("prompt_editing: diffusers has none; leave it out, or draw with an engine")
    if request.hires is not None:
        return _generate_twice(pipe, request, request.hires, scheduler, output_type, cache_branch)
    drawing = pipe if over is None else _pipeline_over(pipe, request, over)
    own = drawing.scheduler
    drawing.scheduler = scheduler or stock_scheduler(pipe, request.scheduler)
    try:
        with quiet():
            parts = [
                _generate_one(drawing, request, i, output_type, over, control, cache_branch)
                for i in range(len(request.prompts))
            ]
    finally:
        drawing.scheduler = own
    if output_type in ("pt", "latent"):
        return torch.cat(parts).float()
    return [image for part in parts for image in part]


def _generate_twice(
    pipe: Any, request: Request, hires: Hires, scheduler: Any, output_type: str, cache_branch: int | None
) -> Any:
    """Text to image, what that gives enlarged, and image to image over it."""
    first, second = request.model_copy(update={"hires": None}), request.passes[-1]
    factor = pipe.vae_scale_factor
    if hires.latent:
        latents = generate(pipe, first, scheduler=scheduler, output_type="latent", cache_branch=cache_branch)
        over = Over(enlarged_latents(latents, request, hires, factor))
    else:
        images = generate(pipe, first, scheduler=scheduler, cache_branch=cache_branch)
        over = Over(enlarged_images(np.stack(images), request, hires, factor))
    own = None if hires.scheduler is not None else scheduler
    return generate(
        pipe, second, scheduler=own, output_type=output_type, over=over, cache_branch=cache_branch
    )


def _pipeline_over(pipe: Any, request: Request, over: Over) -> Any:
    """diffusers' own image-to-image or inpainting pipeline, on the networks of `pipe`."""
    channels = pipe.unet.config.in_channels
    if over.mask is not None and channels not in INPAINTED_CHANNELS:
        raise BackendError(
            f"diffusers' inpainting takes U-Nets of 4 or 9 channels, and this one has {channels}; leave the "
            "mask out, or draw with an engine"
        )
    sdxl, controlnet = hasattr(pipe, "text_encoder_2"), hasattr(pipe, "controlnet")
    if request.guidance_rescale and (controlnet or not sdxl):
        raise RequestError("guidance_rescale: diffusers takes none over an image; leave it at 0")
    without = {"add_watermarker": False} if sdxl else {"requires_safety_checker": False}
    kind = pipeline_class("sdxl" if sdxl else "sd", controlnet=controlnet, masked=over.mask is not None)
    with quiet():
        made = getattr(stock(), kind).from_pipe(pipe, torch_dtype=pipe.unet.dtype, **without)
    made.set_progress_bar_config(**pipe._progress_bar_config)
    return made


def _over_arguments(request: Request, rows: range, over: Over) -> dict[str, Any]:
    """What the stock pipeline is told of an image: one for each picture, which its own generator samples."""
    run: dict[str, Any] = {
        "strength": request.strength,
        "image": over.image[[i % len(over.image) for i in rows]],
    }
    if over.mask is not None:
        run |= {"mask_image": over.mask[[i % len(over.mask) for i in rows]]}
        run |= {"height": request.height, "width": request.width}
    return run


def _control_arguments(
    request: Request, rows: range, control: torch.Tensor, over: Over | None
) -> dict[str, Any]:
    """What the stock pipeline is told of a control image, which is its `image` unless it has another."""
    return {
        "image" if over is None else "control_image": control[[i % len(control) for i in rows]],
        "controlnet_conditioning_scale": request.controlnet_conditioning_scale,
        "control_guidance_start": request.control_guidance_start,
        "control_guidance_end": request.control_guidance_end,
    }


def _generate_one(
    pipe: Any,
    request: Request,
    index: int,
    output_type: str,
    over: Over | None = None,
    control: torch.Tensor | None = None,
    cache_branch: int | None = None,
) -> Any:
    """The pictures of one prompt: diffusers takes a missing negative prompt for all prompts or for none."""
    count, sdxl = request.num_images_per_prompt, hasattr(pipe, "text_encoder_2")
    rows = range(index * count, (index + 1) * count)
    seeds = [request.seeds[i] for i in rows]
    run: dict[str, Any] = {"num_inference_steps": request.num_inference_steps}
    if request.timesteps is not None:
        run = {"timesteps": [_whole(t) for t in request.timesteps]}
    if request.sigmas is not None:
        run = {"sigmas": list(request.sigmas)}
    if pipe.scheduler.config.get("noise_sampler_seed", 0) is None:
        # DPM++ SDE would seed its Brownian motion at random; sdfast gives each picture its own
        pipe.scheduler.noise_sampler_seed = seeds
    if over is None:
        run |= {"height": request.height, "width": request.width}
    else:
        run |= _over_arguments(request, rows, over)
    if control is not None:
        run |= _control_arguments(request, rows, control, over)
    if "guidance_rescale" in inspect.signature(pipe.__call__).parameters:
        run["guidance_rescale"] = request.guidance_rescale
    if is_plain(request):
        texts = {"prompt": request.prompts[index], "negative_prompt": request.negative_prompts[index]}
        run |= {name: as_given(pipe.tokenizer, text) for name, text in texts.items()}
        if sdxl:
            # as lists, in which diffusers takes an empty text for one
            seconds = {
                "prompt_2": request.pairs[index][1],
                "negative_prompt_2": request.negative_pairs[index][1],
            }
            run |= {
                name: None if text is None else [as_given(pipe.tokenizer_2, text)]
                for name, text in seconds.items()
            }
    else:
        run |= embeddings(pipe, request, index)
    if sdxl:
        run |= {name: getattr(request, name) for name in TOLD_SIZES}
    with _guided(pipe, request), cached_steps(pipe, request.cache_interval, cache_branch):
        return pipe(
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=count,
            eta=request.eta,
            clip_skip=request.clip_skip,
            generator=[generator(seed) for seed in seeds],
            output_type=output_type,
            **run,
        ).images


@contextmanager
def _guided(pipe: Any, request: Request) -> Iterator[None]:
    """Guidance in the steps that have some: in the others the U-Net's answer to the negative prompt is made
    that to the prompt, so that the pipeline, which knows of no such steps, is guided nowhere."""
    if (request.guidance_start, request.guidance_end) == (0.0, 1.0):
        yield
        return
    calls = 0

    def answer(_: Any, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if pipe.do_classifier_free_guidance and calls - 1 not in request.guided(pipe.num_timesteps):
            positive = output[0].chunk(2)[1]
            return (torch.cat([positive, positive]), *output[1:])
        return output

    hook = pipe.unet.register_forward_hook(answer)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class Cached:
    """Step caching at work in a stock U-Net. deep: what was kept of the last whole evaluation."""

    calls: int = 0
    deep: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def cached_steps(pipe: Any, interval: int, branch: int | None) -> Iterator[Cached]:
    """Step caching: in every `interval`th evaluation of the U-Net, what enters the ResNet block that consumes
    skip `branch` beside that is kept, and it is what enters there in the others.

    It saves nothing: what lies deeper is computed all the same, and comes to nothing. Raises `RequestError`
    for an interval without a branch.
    """
    cached = Cached()
    if interval == 1:
        yield cached
        return
    if branch is None:
        raise RequestError(
            f"cache_interval: {interval}, but a checkpoint does not say up to which branch shallow steps go; "
            "leave it out, or draw with an engine that was exported with one"
        )
    unet, width = pipe.unet, _skip_widths(pipe.unet)[branch]

    def count(*_: Any) -> None:
        cached.calls += 1

    def enter(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if (cached.calls - 1) % interval == 0:
            cached.deep = args[0][:, :-width]
            return None
        return torch.cat([cached.deep, args[0][:, -width:]], dim=1), *args[1:]

    consumers = [resnet for block in unet.up_blocks for resnet in block.resnets][::-1]
    hooks = [unet.register_forward_pre_hook(count), consumers[branch].register_forward_pre_hook(enter)]
    try:
        yield cached
    finally:
        for hook in hooks:
            hook.remove()


def _skip_widths(unet: Any) -> list[int]:
    """The channels of each skip of a stock U-Net, in the order in which the way down leaves them."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        widths += [part.out_channels for part in (*block.resnets, *(block.downsamplers or ()))]
    return widths


def _whole(timestep: float) -> float:
    return int(timestep) if timestep == int(timestep) else timestep


def _variant(component: Component) -> str | None:
    """The variant ("fp16") that the weights' file names speak of."""
    match = _VARIANT.search(component.weights[0].name)
    return match.group(1) if match else None
