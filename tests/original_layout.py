"""The way back: a diffusers folder's weights under the names of the original (LDM) single-file layout.

sdfast never writes that layout. Tests need it, at any size, to read it.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_MIDDLE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def save_original(folder: Path, file: Path, *, sd2: bool = False) -> Path:
    """Write a tiny diffusers checkpoint as one file: SD 1.x, SD 2.x, SDXL when it has two encoders, or its
    refiner when it has the second alone."""
    paths = {path.parent.name: path for path in folder.glob("*/*.safetensors")}
    states = {component: load_file(path) for component, path in paths.items()}
    save_file(to_original(states, layers_per_block=1, sd2=sd2), file)
    return file


def to_original(states: dict[str, Tensors], *, layers_per_block: int, sd2: bool = False) -> Tensors:
    """The tensors of all components under the names and in the shapes of the original layout."""
    unet, vae, text = states["unet"], states["vae"], states.get("text_encoder")
    tensors = {f"model.diffusion_model.{_unet_name(n, layers_per_block)}": t for n, t in unet.items()}
    tensors |= {f"first_stage_model.{_vae_name(n)}": _vae_tensor(n, t) for n, t in vae.items()}
    if text is None:  # SDXL's refiner has the second alone
        second = _open_clip(states["text_encoder_2"])
        tensors |= {f"conditioner.embedders.0.model.{n}": t for n, t in second.items()}
    elif sd2:
        tensors |= {f"cond_stage_model.model.{n}": t for n, t in _open_clip(text).items()}
    else:
        where = "conditioner.embedders.0" if "text_encoder_2" in states else "cond_stage_model"
        tensors |= {f"{where}.transformer.text_model.{_bare(n)}": t for n, t in text.items()}
    if text is not None and "text_encoder_2" in states:
        second = _open_clip(states["text_encoder_2"])
        tensors |= {f"conditioner.embedders.1.model.{n}": t for n, t in second.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def controlnet_to_original(state: Tensors, *, layers_per_block: int) -> Tensors:
    """The tensors of a ControlNet likewise."""
    return {_controlnet_name(name, layers_per_block): tensor for name, tensor in state.items()}


def _controlnet_name(name: str, layers: int) -> str:
    if match := re.fullmatch(r"controlnet_cond_embedding\.(conv_in|blocks\.(\d)|conv_out)\.(\w+)", name):
        layer, block, leaf = match.groups()
        number = 2 * int(block) + 2 if block else {"conv_in": 0, "conv_out": 14}[layer]
        return f"input_hint_block.{number}.{leaf}"
    name = name.replace("controlnet_mid_block.", "middle_block_out.0.")
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(\w+)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    return name if name.startswith("middle_block_out.") else _unet_name(name, layers)


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def _unet_name(name: str, layers: int) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, j, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{_resnet(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|\w+samplers)\.(\d)\.(.+)", name)
    assert match, name
    side, block, kind, j, rest = match.groups()
    return _block_name(side, int(block), kind, int(j), rest, layers)


def _block_name(side: str, block: int, kind: str, j: int, rest: str, layers: int) -> str:
    slot = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "down":
        if slot is None:
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{1 + block * (layers + 1) + j}.{slot}.{_resnet(kind, rest)}"
    if slot is None:
        return f"output_blocks.{block * (layers + 1) + layers}.2.{rest}"
    return f"output_blocks.{block * (layers + 1) + j}.{slot}.{_resnet(kind, rest)}"


def _resnet(kind: str, rest: str) -> str:
    part, _, leaf = rest.partition(".")
    return f"{_RESNET[part]}.{leaf}" if kind == "resnets" else rest


def _vae_name(name: str) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        head, rest = name.split("mid_block.attentions.0.")
        part, leaf = rest.rsplit(".", 1)
        return f"{head}mid.attn_1.{_VAE_MIDDLE[part]}.{leaf}"
    name = re.sub(
        r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", name
    )  # four levels, numbered from below
    name = name.replace("down_blocks", "down").replace("resnets", "block")
    return re.sub(r"(down|up)samplers\.0", r"\1sample", name)


def _vae_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The original attention of the VAE is made of 1x1 convolutions."""
    return tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor


def _open_clip(tensors: Tensors) -> Tensors:
    """A CLIP encoder under OpenCLIP's names: Q, K, V packed, the projection, if it has one, transposed."""
    projection = tensors.get("text_projection.weight")
    out = {} if projection is None else {"text_projection": projection.T}
    bare = {_bare(name): tensor for name, tensor in tensors.items()}
    for name, tensor in bare.items():
        if name in _OPEN_CLIP_ENDS:
            out[_OPEN_CLIP_ENDS[name]] = tensor
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, part, leaf = match.groups()
            if part in _OPEN_CLIP:
                out[f"transformer.resblocks.{layer}.{_OPEN_CLIP[part]}.{leaf}"] = tensor
            elif part == "self_attn.q_proj":
                packed = [bare[f"encoder.layers.{layer}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
                out[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(packed)
    return out
