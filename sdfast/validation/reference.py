"""The reference: the stock diffusers pipeline of a checkpoint, and how it computes while it is one.

Nothing of sdfast's networks, schedulers or loop takes part in it, nor in what draws with it (`drawing`); that
is what makes it a reference.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ContextDecorator, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from sdfast.errors import BackendError, CheckpointError, DependencyError, RequestError, first_line
from sdfast.export.checkpoint import Checkpoint, Component
from sdfast.export.embedding import TWO_ENCODERS
from sdfast.validation.reading import in_small_letters

if TYPE_CHECKING:
    from sdfast.backends.attention import Attention
    from sdfast.export.controlnet import ControlNetSource
    from sdfast.export.embedding import Embedding
    from sdfast.export.ip_adapter import ImageEncoderSource, IPAdapterSource
    from sdfast.export.lora import Lora, LoraBeside
    from sdfast.export.vae import VAESource

TASKS = {None: "", False: "Img2Img", True: "Inpaint"}  # of nothing, over an image, and with a mask
_INSTRUCTED = "InstructPix2Pix"
_ADAPTER = "sdfast"  # what diffusers is to call a LoRA while it is loaded
_VARIANT = re.compile(r"\.(\w+?)(?:-\d+-of-\d+)?\.safetensors$")


def pipeline_class(
    family: str,
    *,
    controlnet: bool = False,
    masked: bool | None = None,
    instructed: bool = False,
    pag: bool = False,
) -> str:
    """The name of diffusers' pipeline. masked: whether what it draws over has a mask; None: over nothing.
    instructed: of one that edits an image as the prompt says. pag: of one with perturbed-attention guidance.
    """
    task = _INSTRUCTED if instructed else TASKS[masked]
    parts = ("XL" * (family == "sdxl"), "ControlNet" * controlnet, "PAG" * pag, task)
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
    pag: Sequence[str] = (),
) -> Any:
    """diffusers' own text-to-image pipeline of `checkpoint`, or for SDXL's refiner that over images, with its
    ControlNets and another VAE if it has some, in `dtype`, without its safety checker.

    LoRAs are loaded and fused in float32, by diffusers' own code and peft's; those that requests choose are
    loaded and left to run beside its layers, and `set_loras` says how much of each is added, at first none.
    Embeddings are loaded by diffusers' own code, their tokens in small letters (see `reading.as_given`).

    pag: which layers are perturbed for requests with a `pag_scale`; the pipeline is then of the kind that has
        this guidance, and has none of it unless it is asked for.
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
    kind = pipeline_class(
        checkpoint.family,
        controlnet=bool(checkpoint.controlnets),
        masked=False if checkpoint.scored else None,
        instructed=_edits(checkpoint),
        pag=bool(pag),
    )
    if pag:
        options["pag_applied_layers"] = list(pag)
    with quiet():
        if checkpoint.controlnets:
            networks = [_controlnet(added) for added in checkpoint.controlnets]
            options["controlnet"] = networks if len(networks) > 1 else networks[0]
        if checkpoint.vae is not None:
            options["vae"] = _vae(checkpoint.vae)
        pipe = getattr(diffusers, kind).from_pretrained(
            checkpoint.folder,
            use_safetensors=True,
            local_files_only=True,
            variant=_variant(checkpoint.components["unet"]),
            **options,
        )
        for lora in checkpoint.loras:
            _load(pipe, lora, _ADAPTER)
            _fuse(pipe, lora)
        for chosen in checkpoint.chosen:
            _load(pipe, chosen, _adapter(chosen.called))
        for embedding in checkpoint.embeddings:
            _add(pipe, embedding)
        if checkpoint.image_encoder is not None:
            _adapt(pipe, checkpoint.ip_adapters, checkpoint.image_encoder)
        pipe = pipe.to(device, dtype)
    _restore_text_model(pipe)
    set_loras(pipe, {})
    if attention is not None:
        for network in step_networks(pipe):
            processors = network.attn_processors.items()
            network.set_attn_processor({name: _Attending(stock, attention) for name, stock in processors})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae(given: "VAESource") -> Any:
    """diffusers' own network of a VAE that is in the place of the checkpoint's; of a file in the original
    layout by diffusers' own conversion of its names."""
    component = given.component
    network = getattr(stock(), component.class_name)
    if given.names is None:
        return network.from_pretrained(
            given.folder, use_safetensors=True, local_files_only=True, variant=_variant(component)
        )
    if all(name.endswith(theirs) for name, theirs in given.names.items()):  # in diffusers' layout
        loaded = network.from_config(dict(component.config))
        loaded.load_state_dict(given.state_dict())
        return loaded
    with _config_folder(component) as folder:
        return network.from_single_file(str(component.weights[0]), config=folder, local_files_only=True)


@contextmanager
def _config_folder(component: Component) -> Iterator[str]:
    """A folder with its `config.json` alone."""
    with TemporaryDirectory() as folder:
        config = {"_class_name": component.class_name, **component.config}
        (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")
        yield folder


def _controlnet(added: "ControlNetSource") -> Any:
    """diffusers' own network of a ControlNet; of a single file by diffusers' own conversion of its names.

    That leaves out SDXL's added embedding, so that such a file is renamed by sdfast.
    """
    network = stock().ControlNetModel
    if added.names is None:
        return network.from_pretrained(
            added.folder,
            use_safetensors=True,
            local_files_only=True,
            variant=_variant(added.component),
        )
    with _config_folder(added.component) as folder:
        sdxl = any("label_emb." in name for name in added.names)
        given = added.state_dict() if sdxl else str(added.component.weights[0])
        return network.from_single_file(given, config=folder, local_files_only=True)


def tokenizers_of(pipe: Any) -> list[Any]:
    """A pipeline's tokenizers: SDXL's refiner has the second alone."""
    found = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [tokenizer for tokenizer in found if tokenizer is not None]


def is_instructed(pipe: Any) -> bool:
    """Whether it is a pipeline that edits an image as the prompt says."""
    return _INSTRUCTED in type(pipe).__name__


def _edits(checkpoint: Checkpoint) -> bool:
    parts = checkpoint.components
    channels = int(parts["vae"].config.get("latent_channels", 4))
    return int(parts["unet"].config.get("in_channels", 4)) == 2 * channels


def is_scored(pipe: Any) -> bool:
    """Whether it is a pipeline of SDXL's refiner, which is told an aesthetic score."""
    return bool(pipe.config.get("requires_aesthetics_score"))


def step_networks(pipe: Any) -> list[Any]:
    """What a pipeline runs at each step: the U-Net, and its ControlNets if it has some."""
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is None:
        return [pipe.unet]
    return [pipe.unet, *getattr(controlnet, "nets", [controlnet])]


def _load(pipe: Any, lora: "Lora | LoraBeside", adapter: str) -> None:
    """Load a LoRA as diffusers' users do. adapter: what diffusers is to call it."""
    if find_spec("peft") is None:
        raise DependencyError(
            f'the reference pipeline needs peft for LoRA {lora.name}: pip install "sdfast[export]"'
        )
    try:
        pipe.load_lora_weights(_as_trained(pipe, lora), adapter_name=adapter)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"LoRA {lora.name}: diffusers does not load it ({first_line(error)}), so there is no reference"
        ) from error
    components = [name for name, adapters in pipe.get_list_adapters().items() if adapter in adapters]
    if set(components) != set(lora.parts):
        raise CheckpointError(
            f"LoRA {lora.name}: diffusers finds {' and '.join(sorted(components)) or 'nothing'} in it, where "
            f"there is {' and '.join(sorted(lora.parts))}, so there is no reference"
        )


def _fuse(pipe: Any, lora: "Lora") -> None:
    """Fuse a LoRA that was just loaded into the pipeline's weights, and let go of it."""
    pipe.fuse_lora(list(lora.parts), lora_scale=lora.scale, adapter_names=[_ADAPTER])
    pipe.unload_lora_weights()


def _adapter(name: str) -> str:
    """What diffusers is to call a LoRA that requests choose: peft takes no name with a dot in it."""
    return f"{_ADAPTER}_{name.encode().hex()}"


def set_loras(pipe: Any, scales: Mapping[str, tuple[float, float]]) -> None:
    """Have the pipeline add so much of each of its LoRAs that requests choose, by their names: in its text
    encoders, and in its U-Net. Of those that are not named it adds nothing.

    Raises `RequestError` for one that it does not have.
    """
    there = sorted({name for names in pipe.get_list_adapters().values() for name in names})
    asked = {_adapter(name): scale for name, scale in scales.items()}
    if missing := [name for name in scales if _adapter(name) not in there]:
        raise RequestError(f"loras: the stock pipeline has no LoRA {missing[0]!r:.100}; leave it out")
    if not there:
        return
    encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    pairs = [asked.get(adapter, (0.0, 0.0)) for adapter in there]
    weights = [{**dict.fromkeys(encoders, text), "unet": unet} for text, unet in pairs]
    with quiet():
        pipe.set_adapters(there, weights)


def _as_trained(pipe: Any, lora: "Lora | LoraBeside") -> Any:
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
        several = name in TWO_ENCODERS.values()
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


def _adapt(pipe: Any, adapters: "Sequence[IPAdapterSource]", encoder: "ImageEncoderSource") -> None:
    """Load IP-Adapters as diffusers' users do: from their files, beside an image encoder and a processor."""
    import transformers

    processor, cls = encoder.processor, transformers.CLIPVisionModelWithProjection
    pipe.register_modules(
        image_encoder=cls.from_pretrained(encoder.folder, use_safetensors=True, local_files_only=True),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": processor.resize},
            crop_size=processor.crop,
            image_mean=list(processor.mean),
            image_std=list(processor.std),
        ),
    )
    try:
        pipe.load_ip_adapter(
            [str(adapter.path.parent) for adapter in adapters],
            subfolder=[""] * len(adapters),
            weight_name=[adapter.path.name for adapter in adapters],
            local_files_only=True,
        )
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        names = " and ".join(adapter.name for adapter in adapters)
        raise CheckpointError(
            f"IP-Adapter {names}: diffusers does not load it ({first_line(error)}), so there is no reference"
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
    if model is not None and not hasattr(model, "text_model"):
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
    their own deprecated calls; and peft's of a second LoRA. The bar of the steps is not theirs to lose."""
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
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are meant
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


def _variant(component: Component) -> str | None:
    """The variant ("fp16") that the weights' file names speak of."""
    match = _VARIANT.search(component.weights[0].name)
    return match.group(1) if match else None
