"""What a LoRA's file says: its tensors and its header, read for one checkpoint.

Everything in a file has to find its layer, or the file is refused: nothing of a LoRA is left out silently.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import Checkpoint
from sdfast.export.files import load_tensors, tensor_shapes
from sdfast.export.lora_keys import Layers, Role, family_of, looks_like, other_method, parse

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config in a file's header


@dataclass(frozen=True)
class Part:
    """What a LoRA does to one layer: the names of its tensors in the file, and the factor of their product.

    factor: scale · alpha / rank.
    """

    layer: str
    down: str
    up: str
    factor: float
    magnitude: str | None = None

    def merged(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """weight [out, in] or [out, in, h, w] of any floating dtype -> the merged one, float32."""
        down, up = tensors[self.down].float(), tensors[self.up].float()
        flat = torch.addmm(weight.float().flatten(1), up.flatten(1), down.flatten(1) * self.factor)
        if self.magnitude is not None:
            lengths = flat.norm(dim=1, keepdim=True)
            flat *= tensors[self.magnitude].float().view(-1, 1) / lengths
        return flat.view(weight.shape)


def networks_of(checkpoint: Checkpoint) -> dict[str, Layers]:
    """The layers that LoRAs may change, by component. A LoRA for the VAE is none that anybody makes."""
    found = {}
    for name, component in checkpoint.components.items():
        if name == "vae":
            continue
        shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint.state_dict(name).items()}
        per_block = component.config.get("layers_per_block") if name == "unet" else None
        found[name] = Layers.of(shapes, per_block if isinstance(per_block, int) else None)
    return found


@dataclass(frozen=True)
class Reading:
    """One file, read for one checkpoint. Every error names the file, what in it is wrong, and what to do."""

    path: Path
    name: str
    scale: float
    checkpoint: Checkpoint
    networks: Mapping[str, Layers]

    def parts(self) -> dict[str, tuple[Part, ...]]:
        shapes, metadata = tensor_shapes(self.path, self.name)
        if found := other_method(shapes):
            raise self._error(
                f"{found[0]} belongs to {found[1]}, which is not supported; give a LoRA, or merge it into "
                "the checkpoint with the tool that made it"
            )
        layers = self._sorted(shapes)
        configs = self._configs(metadata)
        tensors = load_tensors(self.path, self.name)
        self._check_alphas(layers)
        parts: dict[str, list[Part]] = {}
        for (component, layer), names in layers.items():
            alpha = self._alpha(names.get("alpha"), tensors)
            self._check_shapes(component, layer, names, shapes)
            self._check_numbers(names, tensors)
            rank = shapes[names["down"]][0]
            factor = _factor(configs.get(component, {}), _spelled(names["down"]), rank, alpha)
            parts.setdefault(component, []).append(
                Part(layer, names["down"], names["up"], self.scale * factor, names.get("magnitude"))
            )
        self._check_dora(layers, configs)
        return {component: tuple(found) for component, found in parts.items()}

    def _sorted(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, str], dict[Role, str]]:
        """The names of the tensors of each (component, layer), by their roles."""
        layers: dict[tuple[str, str], dict[Role, str]] = {}
        lost = []
        for name in sorted(shapes):
            key = parse(name)
            layer = self.networks[key.component].find(key) if key and key.component in self.networks else None
            if key is None or layer is None:
                lost.append(name)
                continue
            names = layers.setdefault((key.component, layer), {})
            if key.role in names:
                raise self._error(
                    f"{names[key.role]} and {name} are both of {key.component}'s {layer}; remove one of them"
                )
            names[key.role] = name
        if lost:
            raise self._error(self._why_lost(lost, shapes))
        if not layers:
            raise self._error("holds no tensors; download it again")
        for (_, layer), names in layers.items():
            self._check_whole(layer, names)
        return layers

    def _why_lost(self, lost: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        key = parse(lost[0])
        if key is None:
            what = "is none of the names that LoRAs of Stable Diffusion have (PEFT's, diffusers', kohya's)"
        elif key.component not in self.networks:
            what = f"is for {key.component}, which {self.checkpoint.source} does not have"
        else:
            what = f"meets no layer of the {key.component} of {self.checkpoint.source}"
        return f"{lost[0]}{more} {what}; {self._advice(shapes)}"

    def _advice(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        looks, here = looks_like(shapes), self._family()
        if looks and looks != here:
            return (
                f"it looks like a LoRA for {looks}, and the checkpoint is of {here}; give one made for that"
            )
        return "give a LoRA that is made for this checkpoint, and check that the file is whole"

    def _family(self) -> str:
        width = self.checkpoint.components["unet"].config.get("cross_attention_dim")
        return family_of(width) if isinstance(width, int) else self.checkpoint.family

    def _check_whole(self, layer: str, names: Mapping[Role, str]) -> None:
        missing = [role for role in ("down", "up") if role not in names]
        if missing:
            raise self._error(
                f"{next(iter(names.values()))} has no partner: the {' and the '.join(missing)} matrix of "
                f"{layer} is missing; download the file again"
            )

    def _check_alphas(self, layers: Mapping[tuple[str, str], Mapping[Role, str]]) -> None:
        """A file has an alpha for each layer, or for none, where alpha is the rank."""
        without = [names["down"] for names in layers.values() if "alpha" not in names]
        if without and len(without) < len(layers):
            raise self._error(
                f"{without[0]} has no alpha, and {len(layers) - len(without)} other layers have one; the "
                "file is not whole: download it again"
            )

    def _alpha(self, name: str | None, tensors: Mapping[str, Tensor]) -> float | None:
        if name is None:
            return None
        tensor = tensors[name]
        alpha = float(tensor.float().item()) if tensor.numel() == 1 else math.nan
        if not math.isfinite(alpha) or not alpha:
            raise self._error(f"{name} is not a number other than 0; download the file again")
        return alpha

    def _check_shapes(
        self, component: str, layer: str, names: Mapping[Role, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        weight = self.networks[component].shapes[layer]
        rank = shapes[names["down"]][0] if shapes[names["down"]] else 0
        ones = (1,) * (len(weight) - 2)
        wanted = {"down": (rank, *weight[1:]), "up": (weight[0], rank, *ones)}
        for role in ("down", "up"):
            found = shapes[names[role]]
            if found != wanted[role] or not rank:
                raise self._error(
                    f"{names[role]} has shape {list(found)}, and the layer's weight {list(weight)} needs "
                    f"{_with_rank(wanted[role], role)}; {self._advice(shapes)}"
                )
        if "magnitude" in names and math.prod(shapes[names["magnitude"]]) != weight[0]:
            raise self._error(
                f"{names['magnitude']} has shape {list(shapes[names['magnitude']])}, and the layer has "
                f"{weight[0]} outputs; {self._advice(shapes)}"
            )

    def _check_numbers(self, names: Mapping[Role, str], tensors: Mapping[str, Tensor]) -> None:
        for name in names.values():
            tensor = tensors[name]
            if name != names.get("alpha") and not tensor.is_floating_point():
                raise self._error(f"{name} is {tensor.dtype}; floating point is needed")
            if not torch.isfinite(tensor.float()).all():
                raise self._error(
                    f"{name} holds numbers that are not finite: its training failed, or the file is damaged"
                )

    def _check_dora(
        self,
        layers: Mapping[tuple[str, str], Mapping[Role, str]],
        configs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """All layers of a network have magnitudes (DoRA), or none has; as the header says, if it does."""
        every = Counter(component for component, _ in layers)
        having = Counter(component for (component, _), names in layers.items() if "magnitude" in names)
        for component, count in every.items():
            wanted = count if configs.get(component, {}).get("use_dora", having[component] > 0) else 0
            if having[component] != wanted:
                raise self._error(
                    f"{having[component]} of {count} layers of the {component} have a magnitude (DoRA), and "
                    f"{wanted} should; download the file again"
                )

    def _configs(self, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """PEFT's config for each component, from the file's header; none where that has none."""
        text = metadata.get(METADATA)
        if text is None:
            return {}
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(f"its {METADATA} cannot be read as JSON; save it again") from error
        if not isinstance(fields, dict):
            raise self._error(f"its {METADATA} is not a JSON object; save it again")
        configs: dict[str, dict[str, Any]] = {}
        for field, value in fields.items():
            component, _, name = field.partition(".")
            configs.setdefault(component, {})[name] = value
        for component, config in configs.items():
            self._check_config(component, config)
        return configs

    def _check_config(self, component: str, config: Mapping[str, Any]) -> None:
        """Refuse what would make another sum of it; what it was trained with does not matter here."""
        for field, value in config.items():
            if field in _UNDERSTOOD or value in _OFF.get(field, (None, False, {}, [])):
                continue
            raise self._error(
                f"its {METADATA} has {component}.{field} = {value!r:.60}, which is not supported; give a "
                "plain LoRA or DoRA, or fuse it into the checkpoint with diffusers"
            )
        for field in ("lora_alpha", "alpha_pattern"):
            value = config.get(field, 1 if field == "lora_alpha" else {})
            alphas = value.values() if isinstance(value, dict) else [value]
            patterns = value if isinstance(value, dict) else {}
            if not all(_is_alpha(alpha) for alpha in alphas) or not all(map(_is_plain, patterns)):
                raise self._error(f"its {METADATA} has {component}.{field} = {value!r:.60}; save it again")

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"LoRA {self.name}: {message}")


_UNDERSTOOD = {
    *("lora_alpha", "alpha_pattern", "use_rslora", "use_dora"),
    # Which layers it was trained on, with which ranks, is what the tensors say themselves.
    *("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_OFF: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others begin from changed weights of the checkpoint, which the file does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(pattern: str) -> bool:
    """Whether one of PEFT's patterns is a name, or the end of one, and no more."""
    return all(part.isidentifier() or part.isdigit() for part in pattern.removeprefix("^").split("."))


def _factor(config: Mapping[str, Any], layer: str, rank: int, alpha: float | None) -> float:
    """alpha / rank of a layer; 1 where nothing is said of alpha. rsLoRA divides by the root of the rank."""
    if alpha is None and "lora_alpha" not in config:
        return 1.0
    if alpha is None:
        patterns = config.get("alpha_pattern") or {}
        alpha = next(
            (value for name, value in patterns.items() if _matches(name, layer)), config["lora_alpha"]
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(pattern: str, layer: str) -> bool:
    if pattern.startswith("^"):
        return layer == pattern.removeprefix("^")
    return layer == pattern or layer.endswith(f".{pattern}")


def _spelled(name: str) -> str:
    """The layer in the name of a tensor, as the file spells it."""
    key = parse(name)
    return key.layer if key else name


def _with_rank(shape: Sequence[int], role: str) -> str:
    sides = ["rank" if i == (0 if role == "down" else 1) else str(side) for i, side in enumerate(shape)]
    return f"[{', '.join(sides)}]"
