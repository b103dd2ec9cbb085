"""ControlNets in single `.safetensors` files: read where they lie, by diffusers' names, with a config.

Files have diffusers' layout or the original one, there with `control_model.` before every name or without.
What the shapes do not tell, such as the number of attention heads, is taken from the checkpoint's U-Net, of
which a ControlNet began as a copy.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sdfast.errors import CheckpointError
from sdfast.export import layout
from sdfast.export.files import numbers_in, tensor_shapes
from sdfast.export.lora_keys import family_of
from sdfast.models.controlnet import POOLS

Shapes = Mapping[str, tuple[int, ...]]

_PREFIX = "control_model."
_EMBEDDING = "controlnet_cond_embedding"
_HINT = "input_hint_block"
_KINDS = (
    (re.compile(r"^lllite_"), "a ControlLLLite"),
    (re.compile(r"lora"), "a Control-LoRA, or another LoRA"),
    (
        re.compile(r"^(control_add_embedding|task_embedding|spatial_ch_projs|transformer_layes)\b"),
        "a ControlNet union",
    ),
    (re.compile(r"^(adapter\.)?body\.\d"), "a T2I-Adapter"),
    (re.compile(r"^(ip_adapter|image_proj)\."), "an IP-Adapter"),
    (re.compile(r"^difference$"), "a difference from a U-Net"),
    (
        re.compile(r"^(.*\.)?(double|single|joint)_blocks\.\d|^transformer_blocks\.\d"),
        "what is for a model with a transformer",
    ),
    (re.compile(r"^(up_blocks|model\.diffusion_model|output_blocks)\."), "a U-Net"),
)
_POOLING = "shuffle"  # in names of files: these pool, of which their tensors tell nothing
_OF_THE_UNET = (
    *("attention_head_dim", "num_attention_heads", "norm_num_groups", "norm_eps", "act_fn"),
    *("flip_sin_to_cos", "freq_shift", "upcast_attention"),
)


def read(path: Path, source: str, unet: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of a ControlNet beside a U-Net with the config `unet`; and diffusers' names for its tensors,
    by those in the file. Errors speak of `source`.

    Raises `CheckpointError` for what is no ControlNet, and for one of a U-Net with other levels.
    """
    if path.suffix.lower() in layout.PICKLE_SUFFIXES:
        raise CheckpointError(f"{source} is a pickle. {layout.CONVERT}")
    shapes, _ = tensor_shapes(path, source)
    names = _diffusers_names(shapes, source)
    pools = _POOLING in path.stem.lower()
    try:
        config = _config({theirs: shapes[name] for name, theirs in names.items()}, unet, source)
        return config | ({POOLS: True} if pools else {}), names
    except KeyError as error:
        raise CheckpointError(f"{source}: tensor {error} is missing; download it again") from error
    except IndexError as error:
        raise CheckpointError(f"{source}: a tensor has too few axes for a ControlNet's") from error


def _diffusers_names(shapes: Shapes, source: str) -> dict[str, str]:
    """diffusers' name of each of the ControlNet's tensors, by its name in the file."""
    prefixed = [name for name in shapes if name.startswith(_PREFIX)]
    bare = {name: name.removeprefix(_PREFIX) for name in prefixed or shapes}
    there = set(bare.values())
    for pattern, kind in _KINDS:
        if found := next((name for name in bare.values() if pattern.search(name)), None):
            raise _no_controlnet(source, f"{kind} ({found})")
    if f"{_EMBEDDING}.conv_in.weight" in there:
        return bare
    if f"{_HINT}.0.weight" not in there:
        raise _no_controlnet(source, f"neither {_EMBEDDING} nor {_HINT}")
    rename = _renaming(there)
    return {name: rename(original) for name, original in bare.items()}


def _no_controlnet(source: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: holds {found}; supported: ControlNets for SD 1.x, SD 2.x and SDXL, in diffusers' layout "
        "or the original one"
    )


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block_out.0": "controlnet_mid_block",
    f"{_HINT}.0": f"{_EMBEDDING}.conv_in",
}
_BLOCK = re.compile(r"(input_blocks\.(\d{1,4})|middle_block)\.(\d)\.(.+)")


def _renaming(names: Iterable[str]) -> Callable[[str], str]:
    """What turns a name of the original layout, which numbers its blocks through, into diffusers'."""
    ends = numbers_in(names, r"input_blocks\.(\d{1,4})\.0\.op\.weight")
    stride = min(ends, default=0) or _count(names, r"zero_convs\.(\d{1,4})\.") or 1
    last = max(numbers_in(names, rf"{_HINT}\.(\d{{1,4}})\."))

    def rename(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        if layer in _ENDS:
            return f"{_ENDS[layer]}.{leaf}"
        if match := re.fullmatch(rf"{_HINT}\.(\d{{1,4}})", layer):
            number = int(match[1])
            place = "conv_out" if number == last else f"blocks.{number // 2 - 1}"
            return f"{_EMBEDDING}.{place}.{leaf}"
        if match := re.fullmatch(r"zero_convs\.(\d+)\.0", layer):
            return f"controlnet_down_blocks.{match[1]}.{leaf}"
        if match := _BLOCK.fullmatch(layer):
            return f"{_block(match, stride)}.{leaf}"
        return name  # which no ControlNet has: the loading of the weights tells of it

    return rename


def _block(match: re.Match[str], stride: int) -> str:
    """A layer of a block. stride: blocks of a level."""
    _, number, slot, rest = match.groups()
    if number is None:
        rest = _RESNET.get(rest, rest)
        return (
            f"mid_block.attentions.0.{rest}" if slot == "1" else f"mid_block.resnets.{int(slot) // 2}.{rest}"
        )
    level, place = divmod(int(number) - 1, stride)
    if rest == "op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    if slot == "1":
        return f"down_blocks.{level}.attentions.{place}.{rest}"
    return f"down_blocks.{level}.resnets.{place}.{_RESNET.get(rest, rest)}"


def _config(shapes: Shapes, unet: Mapping[str, Any], source: str) -> dict[str, Any]:
    """As diffusers' `config.json` of the ControlNet with tensors of these shapes."""
    widths = {shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")}
    levels = _count(shapes, r"down_blocks\.(\d{1,4})\.resnets")
    of_unet = len(unet.get("down_block_types", ()))
    if levels != of_unet:
        made_for = f", for {family_of(widths.pop())}" if len(widths) == 1 else ""
        raise CheckpointError(
            f"{source}: a ControlNet of {levels} levels{made_for}, but this checkpoint's U-Net has "
            f"{of_unet}; take one that was made for this kind of Stable Diffusion"
        )
    attends = [
        _count(shapes, rf"down_blocks\.{level}\.attentions\.(\d{{1,4}})") > 0 for level in range(levels)
    ]
    depths = [
        _count(shapes, rf"down_blocks\.{level}\..*transformer_blocks\.(\d{{1,4}})") for level in range(levels)
    ]
    middle = _count(shapes, r"mid_block\.attentions\.(\d{1,4})") > 0
    if middle and not attends[-1]:  # the depth of the last level is the middle's
        depths[-1] = _count(shapes, r"mid_block\..*transformer_blocks\.(\d{1,4})")
    config = {name: unet[name] for name in _OF_THE_UNET if name in unet} | {
        "in_channels": shapes["conv_in.weight"][1],
        "conditioning_channels": shapes[f"{_EMBEDDING}.conv_in.weight"][1],
        "conditioning_embedding_out_channels": _embedding(shapes),
        "down_block_types": ["CrossAttnDownBlock2D" if it else "DownBlock2D" for it in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "block_out_channels": [
            shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)
        ],
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d{1,4})"),
        "transformer_layers_per_block": depths,
        "cross_attention_dim": widths.pop() if len(widths) == 1 else unet.get("cross_attention_dim"),
        "use_linear_projection": any(
            name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in shapes.items()
        ),
    }
    if (added := shapes.get("add_embedding.linear_1.weight")) is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": unet.get("addition_time_embed_dim"),
            "projection_class_embeddings_input_dim": added[1],
        }
    return config


def _count(names: Iterable[str], numbered: str) -> int:
    """How many there are of what is numbered from 0 on."""
    return 1 + max(numbers_in(names, numbered), default=-1)


def _embedding(shapes: Shapes) -> list[int]:
    """The channels of the control image's embedding, each half as large as the one before."""
    blocks = _count(shapes, rf"{_EMBEDDING}\.blocks\.(\d{{1,4}})")
    layers = ["conv_in", *(f"blocks.{number}" for number in range(1, blocks, 2))]
    return [shapes[f"{_EMBEDDING}.{layer}.weight"][0] for layer in layers]
