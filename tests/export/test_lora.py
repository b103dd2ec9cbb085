"""LoRAs merged into weights: equal to what stock diffusers and peft fuse, and to the definition."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdfast.errors import CheckpointError, DependencyError
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.lora import with_loras
from sdfast.export.recipe import Recipe
from sdfast.validation import reference
from sdfast.validation.reference import reference_pipeline
from tests.export import loras
from tests.export.loras import Change, Naming, random_changes, write

RELATIVE = 1e-6
PLAIN = (4.0,)  # alphas that make nothing of them: the rank


def merged(folder: Path, *given: Any) -> Checkpoint:
    return with_loras(resolve(folder), Recipe.make(loras=given).loras)


def fused(checkpoint: Checkpoint, component: str) -> dict[str, Tensor]:
    """What stock diffusers makes of the same LoRAs."""
    return dict(getattr(reference_pipeline(checkpoint), component).state_dict())


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def assert_same(own: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert own.keys() == truth.keys()
    for name, tensor in own.items():
        assert tensor.dtype == torch.float32
        error = (tensor.double() - truth[name].double()).norm() / truth[name].double().norm()
        assert error < RELATIVE, f"{name}: {error:.1e}"


def assert_merged(folder: Path, checkpoint: Checkpoint, changes: Iterable[Change], scale: float) -> None:
    """Own weights, stock's and the definition agree, in every tensor of every network."""
    pipe = reference_pipeline(checkpoint)
    by_component: dict[str, dict[str, Change]] = {}
    for change in changes:
        by_component.setdefault(change.component, {})[f"{change.layer}.weight"] = change
    assert by_component
    for component in checkpoint.components.keys() - {"vae"}:
        plain = loras.weights_of(folder, component)
        defined = {
            name: by_component[component][name].added_to(tensor, scale)
            if name in by_component.get(component, {})
            else tensor
            for name, tensor in plain.items()
        }
        own = bare(checkpoint.state_dict(component))
        assert_same(own, defined)
        assert_same(own, bare(getattr(pipe, component).state_dict()))
        for name in by_component.get(component, {}):  # that something was to be seen
            assert (own[name] - plain[name]).norm() > 0.01 * plain[name].norm()


@pytest.mark.parametrize(
    ("family", "naming", "layers", "alphas"),
    [
        ("sd", loras.peft, loras.EVERY_KIND, PLAIN),
        ("sdxl", loras.peft, loras.EVERY_KIND, PLAIN),
        ("sd", loras.diffusers, loras.EVERY_KIND, PLAIN),
        ("sdxl", loras.diffusers, loras.ATTENTION, PLAIN),
        ("sd", loras.processors, loras.ATTENTION, PLAIN),
        ("sd", loras.kohya, loras.EVERY_KIND, (1.0,)),
        ("sd", loras.kohya, loras.EVERY_KIND, (1.0, 1.0, 3.0)),
        ("sdxl", loras.kohya_xl, loras.EVERY_KIND, (8.0,)),
        ("sdxl", loras.kohya_xl, loras.EVERY_KIND, (2.0, 8.0, 8.0)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_format(
    family: str,
    naming: Naming,
    layers: str,
    alphas: tuple[float, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    ranks = (4,) if alphas == PLAIN else (4, 2)
    changes = random_changes(folder, layers, alphas=alphas, ranks=ranks)
    file = write(tmp_path / "lora.safetensors", changes, naming)
    assert_merged(folder, merged(folder, {"source": file, "scale": -0.7}), changes, -0.7)
