"""VAEs in single `.safetensors` files: read where they lie, by diffusers' names.

Files have diffusers' layout or the original one, there with `first_stage_model.` before every name, as within
a whole checkpoint, or without.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from sdfast.errors import CheckpointError
from sdfast.export import layout
from sdfast.export.files import numbers_in, tensor_names
from sdfast.models.vae import TINY

KL = "AutoencoderKL"
_PREFIXES = ("first_stage_model.", "vae.")
_TRAINING = ("loss.", "model_ema.")  # what some trainers leave in their files
_ENDS = {"norm_out": "conv_norm_out"}
_MIDDLE = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_SUPPORTED = "supported: the VAEs of SD 1.x, SD 2.x and SDXL (AutoencoderKL), and the tiny ones (TAESD)"


def read(path: Path, source: str) -> tuple[str, dict[str, str]]:
    """The class of the VAE in a file, and diffusers' names for its tensors, by those in the file. Errors
    speak of `source`.

    Raises `CheckpointError` for what holds no VAE.
    """
    if path.suffix.lower() in layout.PICKLE_SUFFIXES:
        raise CheckpointError(f"{source} is a pickle. {layout.CONVERT}")
    bare = _own(tensor_names(path, source))
    there = set(bare.values())
    if any(name.startswith("decoder.layers.") for name in there):
        return TINY, bare
    if any(name.startswith("decoder.up_blocks.") for name in there):
        return KL, bare
    if not any(name.startswith("decoder.up.") for name in there):
        raise CheckpointError(f"{source}: holds {_what(there)}; {_SUPPORTED}")
    levels = 1 + max(numbers_in(there, r"decoder\.up\.(\d{1,4})\."))
    return KL, {name: _renamed(original, levels) for name, original in bare.items()}


def _own(names: Iterable[str]) -> dict[str, str]:
    """The names of the VAE's own tensors, without what is before each of them."""
    listed = [name for name in names if not name.startswith(_TRAINING)]
    for prefix in _PREFIXES:
        if within := {name: name.removeprefix(prefix) for name in listed if name.startswith(prefix)}:
            return within
    return {name: name for name in listed}


def _what(names: Collection[str]) -> str:
    """What a file without a VAE seems to be."""
    if any(re.match(r"\d+\.", name) for name in names):
        return (
            "one half of a tiny VAE in the layout of its author; give diffusers' file or folder, which has "
            "both halves (madebyollin/taesd, madebyollin/taesdxl)"
        )
    if not any(name.startswith("decoder.") for name in names):
        return f"no VAE's decoder, but {min(names, default='nothing')}"
    return f"a decoder of another kind ({min(name for name in names if name.startswith('decoder.'))})"


def _renamed(name: str, levels: int) -> str:
    """diffusers' name for a tensor of the original layout, which numbers the decoder's levels from its end.

    A name that no VAE has is left as it is: the loading of the weights tells of it.
    """
    layer, _, leaf = name.rpartition(".")
    half, _, within = layer.partition(".")
    if half not in ("encoder", "decoder"):
        return name  # quant_conv and post_quant_conv
    return f"{half}.{_layer(within, levels)}.{leaf}"


def _layer(name: str, levels: int) -> str:
    name = _ENDS.get(name, name).replace("nin_shortcut", "conv_shortcut")
    if match := re.fullmatch(r"mid\.block_(\d)\.(.+)", name):
        return f"mid_block.resnets.{int(match[1]) - 1}.{match[2]}"
    if match := re.fullmatch(r"mid\.attn_1\.(.+)", name):
        return f"mid_block.attentions.0.{_MIDDLE.get(match[1], match[1])}"
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", name):
        side, number, rest = match.groups()
        level = levels - 1 - int(number) if side == "up" else int(number)
        rest = rest.replace("block.", "resnets.").replace(f"{side}sample.", f"{side}samplers.0.")
        return f"{side}_blocks.{level}.{rest}"
    return name
