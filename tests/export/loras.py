"""Random LoRAs for tiny checkpoints, under every name that files have for their layers."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.original_layout import _unet_name

ATTENTION = r"\.attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"
# Linear layers, 1x1 and 3x3 convolutions, with and without a stride, in every kind of block.
EVERY_KIND = (
    ATTENTION + r"|proj_in$|proj_out$|ff\.net\.|mlp\.fc|conv1$|conv_shortcut$|samplers\.0\.conv$"
    r"|time_emb_proj$|^conv_in$|^conv_out$|^time_embedding\.|^add_embedding\.|^text_projection$"
)


@dataclass(frozen=True)
class Change:
    """What is done to one layer: down [rank, in, …], up [out, rank, …]."""

    component: str
    layer: str
    down: Tensor
    up: Tensor
    alpha: float

    def added_to(self, weight: Tensor, scale: float) -> Tensor:
        """The definition, in float64."""
        product = torch.tensordot(self.up.double().flatten(1), self.down.double(), dims=1)
        return weight.double() + scale * self.alpha / self.down.shape[0] * product.reshape(weight.shape)


def weights_of(folder: Path, component: str) -> dict[str, Tensor]:
    (path,) = (folder / component).glob("*.safetensors")
    return {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}


def random_changes(
    folder: Path,
    layers: str = EVERY_KIND,
    *,
    components: Iterable[str] | None = None,
    alphas: tuple[float, ...] = (2.0,),
    ranks: tuple[int, ...] = (4,),
    seed: int = 0,
) -> list[Change]:
    """Changes of the layers whose names match; alphas and ranks are dealt out in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for component in components or ("unet", "text_encoder", "text_encoder_2"):
        if not (folder / component).is_dir():
            continue
        for name, weight in sorted(weights_of(folder, component).items()):
            layer = name.removesuffix(".weight")
            if not name.endswith(".weight") or weight.dim() not in (2, 4) or not re.search(layers, layer):
                continue
            rank, alpha = ranks[len(found) % len(ranks)], alphas[len(found) % len(alphas)]
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2), generator=generator) * 0.05
            found.append(Change(component, layer, down, up, alpha))
    return found


def peft(change: Change) -> dict[str, Tensor]:
    where = f"{change.component}.{_with_level(change)}"
    return {f"{where}.lora_A.weight": change.down, f"{where}.lora_B.weight": change.up}


def diffusers(change: Change) -> dict[str, Tensor]:
    where = f"{change.component}.{_with_level(change)}"
    kind = "lora" if change.component == "unet" or change.layer == "text_projection" else "lora_linear_layer"
    return {f"{where}.{kind}.down.weight": change.down, f"{where}.{kind}.up.weight": change.up}


def processors(change: Change) -> dict[str, Tensor]:
    """The first names, of attention alone."""
    block, part = re.fullmatch(r"(.+)\.(?:to_)?(q|k|v|out)(?:_proj|\.0|)", change.layer).groups()  # type: ignore[union-attr]
    processor = ".processor" if change.component == "unet" else ""
    level = "" if change.component == "unet" else "text_model."
    where = f"{change.component}.{level}{block}{processor}.to_{part}_lora"
    return {f"{where}.down.weight": change.down, f"{where}.up.weight": change.up}


def kohya(change: Change) -> dict[str, Tensor]:
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[change.component]
    return _flat(prefix, _with_level(change), change)


def kohya_xl(change: Change) -> dict[str, Tensor]:
    """For SDXL: the U-Net's layers by their names in the original layout."""
    if change.component == "unet":
        return _flat("lora_unet", _unet_name(f"{change.layer}.weight", 1).removesuffix(".weight"), change)
    prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[change.component]
    return _flat(prefix, _with_level(change), change)


def _flat(prefix: str, layer: str, change: Change) -> dict[str, Tensor]:
    where = f"{prefix}_{layer.replace('.', '_')}"
    return {
        f"{where}.lora_down.weight": change.down,
        f"{where}.lora_up.weight": change.up,
        f"{where}.alpha": torch.tensor(change.alpha),
    }


def _with_level(change: Change) -> str:
    """Files of text encoders have a level that transformers took out."""
    plain = change.component == "unet" or change.layer == "text_projection"
    return change.layer if plain else f"text_model.{change.layer}"


Naming = Callable[[Change], dict[str, Tensor]]


def write(
    path: Path, changes: Iterable[Change], naming: Naming, metadata: Mapping[str, object] | None = None
) -> Path:
    """A LoRA's file. Names without alphas have them in the header, as PEFT's config, where any is given."""
    tensors = {name: tensor for change in changes for name, tensor in naming(change).items()}
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if metadata else {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)
    return path
