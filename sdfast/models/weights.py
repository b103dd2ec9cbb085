"""Putting a checkpoint's tensors into our modules by diffusers' names; what needs no change is not copied."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sdfast.errors import CheckpointError
from sdfast.models.layers import PackedLinear

SHOWN = 4


def load_weights(
    component: str, modules: Sequence[nn.Module], state_dict: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Replace every (meta) parameter of `modules` by the tensor, or the packed tensors, of its name.

    `modules` together must use every tensor of `state_dict` and find all they need there.
    """
    sources = {(m, name): s for m, module in enumerate(modules) for name, s in _sources(module).items()}
    _check_names(component, {n for part in sources.values() for n in part.needed}, state_dict)
    for (m, name), source in sources.items():
        target = modules[m].get_parameter(name)
        tensor = source.tensor(component, state_dict, target.shape, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(modules[m].get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


class _Source:
    """Where a parameter comes from: `parts` (name, rows) one under the other, plus the sum with `extra`."""

    def __init__(self, parts: list[tuple[str, int | None]], extra: Sequence[str | None] = ()) -> None:
        self.parts, self.extra = parts, extra

    @property
    def needed(self) -> list[str]:
        return [name for name, _ in self.parts] + [name for name in self.extra if name]

    def tensor(
        self, component: str, tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype | None
    ) -> Tensor:
        rows = [shape[0] if n is None else n for _, n in self.parts]
        parts = [
            _read(component, tensors, name, torch.Size([n, *shape[1:]]), dtype)
            for (name, _), n in zip(self.parts, rows, strict=True)
        ]
        if self.extra:
            extra = [_read(component, tensors, e, p.shape, dtype) if e else 0 for e, p in self._pairs(parts)]
            parts = [part + more for part, more in zip(parts, extra, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pairs(self, parts: list[Tensor]) -> list[tuple[str | None, Tensor]]:
        return list(zip(self.extra, parts, strict=True))


def _sources(module: nn.Module) -> dict[str, _Source]:
    """Every parameter's name in `module`, with where it comes from."""
    sources: dict[str, _Source] = {}
    for path, layer in module.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, _ in layer.named_parameters(recurse=False):
            sources[prefix + leaf] = _Source([(prefix + leaf, None)])
            if isinstance(layer, PackedLinear):
                own = zip(layer.names(path), layer.parts, strict=True)
                parts = [(f"{name}.{leaf}", p.rows) for name, p in own]
                extra = [p.extra_bias for p in layer.parts] if leaf == "bias" else []
                sources[prefix + leaf] = _Source(list(parts), extra)
    return sources


def _check_names(component: str, needed: set[str], state_dict: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(needed - set(state_dict)), sorted(set(state_dict) - needed)
    if missing or unexpected:
        said = [
            f"{len(n)} {what}: {_few(n)}"
            for what, n in (("missing", missing), ("unexpected", unexpected))
            if n
        ]
        raise CheckpointError(
            f"the {component} weights do not fit its config.json; {'; '.join(said)}. "
            "Check that the config and the weights come from the same checkpoint."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _read(
    component: str, tensors: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype | None
) -> Tensor:
    tensor = tensors[name]
    flat = tensor.reshape(shape) if tensor.dim() == 4 and tensor.shape == (*shape, 1, 1) else tensor
    if flat.shape != shape:
        raise CheckpointError(
            f"the {component} weight {name} has shape {list(tensor.shape)}, but its config.json needs "
            f"{list(shape)}. Check that the config and the weights come from the same checkpoint."
        )
    if not flat.is_floating_point():
        raise CheckpointError(f"the {component} weight {name} is {flat.dtype}; floating point is needed")
    return flat if dtype is None else flat.to(dtype)
