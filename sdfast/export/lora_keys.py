"""How LoRA files name the layers of Stable Diffusion's networks, and what they say of each.

Two families of names are read. diffusers' and PEFT's are a layer's own, with three older spellings of what
follows the layer ("unet.mid_block….to_q.lora_A.weight"). Those of kohya's sd-scripts and of LyCORIS have
underscores for dots ("lora_unet_mid_block_…_to_q.lora_down.weight"), and for SDXL they are made of the names
of the original layout ("lora_unet_input_blocks_4_1_…").
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Role = Literal["down", "up", "magnitude", "alpha"]


@dataclass(frozen=True)
class Key:
    """What the name of a tensor says: `layer` is spelled as diffusers spells it, or flat, as kohya does."""

    component: str
    layer: str
    role: Role
    flat: bool = False


_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_KOHYA_ROLES: Mapping[str, Role] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
_ROLES: tuple[tuple[str, Role], ...] = (  # after a layer's name
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".alpha", "alpha"),
)
_OF_ATTENTION = re.compile(r"(.+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")  # of the attention processors
_IN_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_IN_TEXT_ENCODER = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}

_OTHER_METHODS = (
    (re.compile(r"\.hada_"), "LoHa, of LyCORIS"),
    (re.compile(r"\.lokr_"), "LoKr, of LyCORIS"),
    (re.compile(r"\.(oft_|oft_blocks)"), "OFT"),
    (re.compile(r"\.on_input$"), "(IA)³, of LyCORIS"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA, of LyCORIS"),
    (re.compile(r"\.lora_mid\."), "a LoCon with a third matrix (lora_mid)"),
    (re.compile(r"\.dora_scale$"), "DoRA in kohya's naming, of which diffusers leaves half out"),
    (re.compile(r"\.diff(_b)?$"), "whole differences (diff)"),
    (re.compile(r"\.w_norm$|\.b_norm$"), "trained norms, of LyCORIS"),
    (re.compile(r"\.lora(_B|\.up|_up)\.bias$"), "biases (lora_bias)"),
    (re.compile(r"\.lora_embedding_"), "trained embeddings"),
    (re.compile(r"^(bundle_emb\.|emb_params|string_to_param)"), "textual inversion"),
    (re.compile(r"lora_controlnet"), "a control LoRA"),
)


def parse(name: str) -> Key | None:
    """What a tensor's name says; None for a name that none of the formats has."""
    for prefix, component in _KOHYA.items():
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            role = _KOHYA_ROLES.get(rest)
            return Key(component, layer, role, flat=True) if role and layer else None
    component, _, rest = name.partition(".")
    if component not in ("unet", "text_encoder", "text_encoder_2"):
        return None
    rest = rest.replace(".processor.", ".")
    if match := _OF_ATTENTION.fullmatch(rest):
        parts = _IN_UNET if component == "unet" else _IN_TEXT_ENCODER
        return Key(component, f"{match[1]}.{parts[match[2]]}", "down" if match[3] == "down" else "up")
    for ending, role in _ROLES:
        if rest.endswith(ending):
            return Key(component, rest.removesuffix(ending), role)
    return None


def other_method(names: Iterable[str]) -> tuple[str, str] | None:
    """The first name of a kind of adapter that is not a LoRA, or is more than one; and the kind."""
    for name in names:
        for pattern, method in _OTHER_METHODS:
            if pattern.search(name):
                return name, method
    return None


@dataclass(frozen=True)
class Layers:
    """The layers of a network that a LoRA may speak of: those with a matrix or a kernel for a weight.

    shapes: of each layer's weight, by the layer's name in the checkpoint. per_block: the U-Net's
    `layers_per_block`; None for a text encoder, and where blocks differ.
    """

    shapes: Mapping[str, tuple[int, ...]]
    per_block: int | None = None

    @classmethod
    def of(cls, weights: Mapping[str, tuple[int, ...]], per_block: int | None = None) -> "Layers":
        """Those of a network whose tensors have these shapes."""
        shapes = {
            name.removesuffix(".weight"): shape
            for name, shape in weights.items()
            if name.endswith(".weight") and len(shape) in (2, 4) and "embeddings." not in name
        }
        return cls(shapes, per_block)

    def find(self, key: Key) -> str | None:
        """The layer that a key speaks of, by its name in the checkpoint; None where there is none."""
        if key.flat:
            return self._flat.get(key.layer.removeprefix("text_model_"))
        return self._dotted.get(_bare(key.layer))

    @cached_property
    def _dotted(self) -> dict[str, str]:
        return {_bare(layer): layer for layer in self.shapes}

    @cached_property
    def _flat(self) -> dict[str, str]:
        names = dict(self._dotted)
        if self.per_block is not None:
            names |= {_original(layer, self.per_block, self.shapes): layer for layer in self.shapes}
        return {name.replace(".", "_"): layer for name, layer in names.items()}


def _bare(layer: str) -> str:
    """transformers 5 took a level out of its CLIP text model: files have it, or not."""
    return layer.removeprefix("text_model.")


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def _original(layer: str, per_block: int, layers: Iterable[str]) -> str:
    """A U-Net layer's name in the original layout, where blocks are numbered through from end to end."""
    if layer in _ENDS:
        return _ENDS[layer]
    if match := _MIDDLE.fullmatch(layer):
        kind, index, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_RESNET.get(rest, rest)}"
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return layer
    side, block, kind, index, rest = match.groups()
    first = int(block) * (per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block + 1}.0.op"
    if kind == "upsamplers":
        attends = any(name.startswith(f"up_blocks.{block}.attentions.") for name in layers)
        return f"output_blocks.{first + per_block}.{2 if attends else 1}.conv"
    where = (
        f"input_blocks.{1 + first + int(index)}" if side == "down" else f"output_blocks.{first + int(index)}"
    )
    return f"{where}.{1 if kind == 'attentions' else 0}.{_RESNET.get(rest, rest)}"


_CONTEXT = re.compile(r"attn2[._](?:processor\.)?to_[kv][._]lora[._](?:A|down)\.weight$")
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_TRANSFORMERS = re.compile(
    r"^(base_model\.model\.)?(lora_)?(transformer|diffusion_model|double_blocks|single_blocks)[._]"
    r"|_(double|single|joint)_blocks_"
)


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The models that a file's names and shapes speak of; None where they do not tell."""
    if any(_TRANSFORMERS.search(name) for name in shapes):
        return "a model with a transformer, such as Flux or SD3"
    widths = {shape[1] for name, shape in shapes.items() if len(shape) > 1 and _CONTEXT.search(name)}
    if len(widths) == 1:
        return family_of(widths.pop())
    if any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in shapes):
        return "SDXL"
    return None


def family_of(width: int) -> str:
    """The released models whose prompts have `width` numbers a token."""
    return _FAMILIES.get(width, f"models with {width} numbers a token of the prompt")
