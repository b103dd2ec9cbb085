"""Plain PyTorch: the networks as they are written, on an engine's weights. For development and checks."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sdfast import kernels
from sdfast.backends.fp8 import gathering, scaled_mm
from sdfast.errors import BackendError, DependencyError, EngineError, first_line
from sdfast.manifest import IMAGE_ENCODER, SHALLOW
from sdfast.models import ops
from sdfast.models.controlnet import Controlled, ControlNetConfig, control_embedding
from sdfast.models.fp8 import use_convolution, use_product
from sdfast.models.half_range import set_eps
from sdfast.models.ip_adapter import ImageContext, ImageEncoder, IPAdapterConfig
from sdfast.models.lora import Choosing, attach, attach_to_step, attach_to_text_model, empty_of
from sdfast.models.pag import Perturbing, perturb
from sdfast.models.rounded import rounded
from sdfast.models.step_cache import ShallowUNet
from sdfast.models.tiny_vae import TinyEncoder
from sdfast.models.unet import (
    Attending,
    Context,
    TimeShift,
    UNet,
    UNetConfig,
    context_parts,
    shift_parts,
)
from sdfast.models.vae import vae_config, vae_decoder, vae_encoder

_NUMBERED = re.compile(r"(?<=^image_context)_\d+$")  # of several IP-Adapters' all but the first
HEADER = "sdfast"  # the key in a file's metadata that says in JSON which network it holds
_OUTPUTS = {
    "unet": ("output",),
    SHALLOW: ("output",),
    "context": ("context",),
    "time_shift": ("time_shift",),
    "control_embedding": ("control",),
    "vae_decoder": ("image",),
    "vae_encoder": ("mean", "std"),
    "text_encoder": ("hidden_states", "text_embeds"),
    "text_encoder_2": ("hidden_states", "text_embeds"),
    IMAGE_ENCODER: ("image_embeds", "hidden_states"),
    "image_context": ("image_context",),
}
# What torch.compile is for. The rest runs once a prompt or an image, or for any number of timesteps at once:
# compiling it takes longer than it ever saves.
_WORTH_COMPILING = ("unet", SHALLOW, "vae_decoder")
_COMPILER = "inductor"
_ALL_SHAPES = 10_000  # in place of Dynamo's limit of 8, beyond which a network is not compiled any more


class EagerModule:
    """One network, called without a compiler."""

    def __init__(self, network: nn.Module, outputs: tuple[str, ...]) -> None:
        self._network = network
        self._outputs = outputs
        # With LoRAs or perturbed layers it holds what it is told while it runs, which is one call's.
        told = any(isinstance(part, Choosing) and part.loras is not None for part in network.modules())
        told |= any(isinstance(part, Perturbing) and part.switch is not None for part in network.modules())
        self._alone: AbstractContextManager[object] = threading.Lock() if told else nullcontext()

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with self._alone:
            result = self._run(inputs)
        return dict(zip(self._outputs, result if isinstance(result, tuple) else (result,), strict=True))

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        def run() -> None:
            for name, value in self(inputs).items():
                outputs[name].copy_(value)

        return run

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self._network(**inputs)


class TorchCompiledModule(EagerModule):
    """One network through torch.compile, once for each shape of its inputs, which is said on stderr.

    `bind` compiles, so that no step of a picture waits for it; so does the first call of a shape. Raises
    `BackendError` when it cannot be compiled.
    """

    def __init__(self, name: str, network: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__(network, outputs)
        self._name = name
        self._compiled: Callable[..., Any] | None = None
        self._known: set[Hashable] = set()
        self._lock = threading.Lock()

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        self(inputs)
        return super().bind(inputs, outputs)

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        case = _case(inputs)
        if self._compiled is not None and case in self._known:
            return self._compiled(**inputs)
        with self._lock:
            if self._compiled is None or case not in self._known:  # another thread may have been first
                self._compiled = self._compile_for(inputs)
                self._known.add(case)
        return self._compiled(**inputs)

    def _compile_for(self, inputs: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
        # As it is first: what is wrong with the inputs is then no failure of the compiler, and attention has
        # chosen its kernels, which it could not while it is traced.
        self._network(**inputs)
        name, tensor = next(iter(inputs.items()))
        shape = "x".join(map(str, tensor.shape))
        _say(f"compiling {self._name} for {name} {shape}, once in this process; it can take minutes")
        start = time.perf_counter()
        try:
            from torch._dynamo import config  # which fails where its cache cannot be written

            compiled = self._compiled
            if compiled is None:
                compiled = torch.compile(self._network, dynamic=False, fullgraph=True, backend=_COMPILER)
            with config.patch(recompile_limit=_ALL_SHAPES, accumulated_recompile_limit=_ALL_SHAPES):
                compiled(**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever goes wrong in Dynamo, Inductor, a C++ compiler, Triton
            cause = getattr(error, "inner_exception", None) or error  # Dynamo wraps what the compiler raises
            raise BackendError(
                f"{self._name}: torch.compile failed: {first_line(cause)}; it needs a C++ compiler, and "
                "Triton on CUDA: install them, or run the engine without compile"
            ) from error
        _say(f"compiled {self._name} in {time.perf_counter() - start:.1f} s")
        return compiled


def load_eager(
    path: Path, device: torch.device, *, compile: bool = False, attention: ops.Attend | None = None
) -> EagerModule:
    """The network in the safetensors file at `path`, on `device`.

    compile: through torch.compile, where it is worth it: the U-Net and the VAE. attention: what computes the
    U-Net's, in place of the definition.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"{path.name}: not a safetensors file ({error}); export the engine again"
        ) from error
    name = _NUMBERED.sub("", header.get("module", ""))
    if name not in _OUTPUTS:
        raise EngineError(f"{path.name}: holds no module of sdfast ({name!r}); export the engine again")
    network = _network(name, header)
    try:
        network.load_state_dict(state, assign=True)
        set_eps(network, header.get("eps", {}))
    except (RuntimeError, KeyError) as error:
        raise BackendError(f"{path.name}: its weights do not fit this version of sdfast: {error}") from error
    network.to(device).eval().requires_grad_(False)
    if attention is not None and isinstance(network, Attending):
        network.use_attention(attention)
    if device.type == "cuda" and isinstance(network, Attending):
        use_product(network, scaled_mm)
        if header.get("fp8") and not kernels.why_none(device):
            use_convolution(network, gathering(kernels.convolution_fp8()))
    outputs = _OUTPUTS[name]
    if isinstance(network, UNet) and network.branch is not None:
        outputs = (*outputs, "deep")
    if isinstance(network, TinyEncoder):
        outputs = ("mean",)  # about which nothing spreads
    if compile and name in _WORTH_COMPILING:
        return TorchCompiledModule(name, network, outputs)
    return EagerModule(network, outputs)


def _case(inputs: Mapping[str, torch.Tensor]) -> Hashable:
    """What torch.compile compiles anew for: the tensors' kind, and the settings of torch that it looks at."""
    tensors = ((name, t.shape, t.stride(), t.dtype, t.is_inference()) for name, t in inputs.items())
    return *tensors, torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32


def _say(message: str) -> None:
    print(f"sdfast: {message}", file=sys.stderr)


def _network(name: str, header: Mapping[str, Any]) -> nn.Module:
    config = header["config"]
    if name.startswith("text_encoder") or name == IMAGE_ENCODER:
        return _encoder(name, config, header)
    with torch.device("meta"):
        if name == "vae_decoder":
            return vae_decoder(vae_config(header["class"], config))
        if name == "vae_encoder":
            return vae_encoder(vae_config(header["class"], config))
        if name == "control_embedding":
            return control_embedding(_controlnets(header) or [ControlNetConfig.from_diffusers(config)])
        if name == "image_context":
            return ImageContext(IPAdapterConfig(**config), UNetConfig.from_diffusers(header["unet"]))
        return _unet_part(name, header)


def _unet_part(name: str, header: Mapping[str, Any]) -> nn.Module:
    """One of the modules that the weights of a U-Net, and of its ControlNets, are dealt out to."""
    config, tokens = UNetConfig.from_diffusers(header["config"]), header.get("image_tokens", ())
    loras, layers = header.get("loras", {}), (header.get("fp8", ()), header.get("int8", ()))
    count, ranks = loras.get("count", 0), loras.get("ranks", {})
    if name == SHALLOW:
        shallow = ShallowUNet(config, header["cache_branch"], tokens)
        attach_to_step(shallow, count, empty_of(shallow, ranks))
        perturb(shallow, header.get("perturbed", ()))
        return rounded(shallow, *layers)
    unet = UNet(config, header.get("cache_branch"), tokens)
    own = unet, TimeShift(config, shift_parts(unet)), Context(config, context_parts(unet))
    attach_to_step(unet, count, empty_of(unet, ranks))
    perturb(unet, header.get("perturbed", ()))
    for network in own[1:]:
        attach(network, count, empty_of(network, ranks))
    parts: Sequence[nn.Module] = own
    if beside := _controlnets(header):
        parts = Controlled.of(*own, beside)
    return rounded(parts[("unet", "time_shift", "context").index(name)], *layers)


def _controlnets(header: Mapping[str, Any]) -> list[ControlNetConfig]:
    """The ControlNets that a module has a part of."""
    return [ControlNetConfig.from_diffusers(config) for config in header.get("controlnets", ())]


def _encoder(name: str, config: dict[str, Any], header: Mapping[str, Any]) -> nn.Module:
    """transformers' network of a text encoder, or of the image encoder."""
    try:
        import transformers
    except ImportError as error:
        raise DependencyError('an eager text encoder needs: pip install "sdfast[export]"') from error
    from sdfast.models.text import TextEncoder

    if name == IMAGE_ENCODER:
        seeing = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
        return ImageEncoder(seeing)
    model = getattr(transformers, header["class"])(transformers.CLIPTextConfig(**config))
    loras = header.get("loras", {})
    scales = attach_to_text_model(model, loras.get("count", 0), empty_of(model, loras.get("ranks", {})))
    return TextEncoder(model, header["family"] == "sd", scales)
