"""Plain PyTorch: the networks as they are written, on an engine's weights. For development and checks."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sdfast.errors import BackendError, DependencyError, EngineError
from sdfast.models.unet import Context, TimeShift, UNet, UNetConfig, context_parts, shift_parts
from sdfast.models.vae import VAEConfig, VAEDecoder

HEADER = "sdfast"  # the key in a file's metadata that says in JSON which network it holds
_OUTPUTS = {
    "unet": ("output",),
    "context": ("context",),
    "time_shift": ("time_shift",),
    "vae_decoder": ("image",),
    "text_encoder": ("hidden_states", "text_embeds"),
    "text_encoder_2": ("hidden_states", "text_embeds"),
}


class EagerModule:
    """One network, called without a compiler."""

    def __init__(self, network: nn.Module, outputs: tuple[str, ...]) -> None:
        self._network = network
        self._outputs = outputs

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = self._network(**inputs)
        return dict(zip(self._outputs, result if isinstance(result, tuple) else (result,), strict=True))

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        def run() -> None:
            for name, value in self(inputs).items():
                outputs[name].copy_(value)

        return run


def load_eager(path: Path, device: torch.device) -> EagerModule:
    """The network in the safetensors file at `path`, on `device`."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"{path.name}: not a safetensors file ({error}); export the engine again"
        ) from error
    name = header.get("module", "")
    if name not in _OUTPUTS:
        raise EngineError(f"{path.name}: holds no module of sdfast ({name!r}); export the engine again")
    network = _network(name, header)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise BackendError(f"{path.name}: its weights do not fit this version of sdfast: {error}") from error
    return EagerModule(network.to(device).eval().requires_grad_(False), _OUTPUTS[name])


def _network(name: str, header: Mapping[str, Any]) -> nn.Module:
    config = header["config"]
    if name.startswith("text_encoder"):
        return _text_encoder(config, header)
    with torch.device("meta"):
        if name == "vae_decoder":
            return VAEDecoder(VAEConfig.from_diffusers(config))
        unet_config = UNetConfig.from_diffusers(config)
        unet = UNet(unet_config)
        if name == "time_shift":
            return TimeShift(unet_config, shift_parts(unet))
        return unet if name == "unet" else Context(unet_config, context_parts(unet))


def _text_encoder(config: dict[str, Any], header: Mapping[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise DependencyError('an eager text encoder needs: pip install "sdfast[export]"') from error
    from sdfast.models.text import TextEncoder

    model = getattr(transformers, header["class"])(transformers.CLIPTextConfig(**config))
    return TextEncoder(model, final_norm=header["family"] == "sd")
