"""Tiny engines to validate, and ways to break one that no digest would notice."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdfast.engine import sha256
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.manifest import MANIFEST_NAME, read_manifest

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "use_karras_sigmas": True,
}


def use_own_scheduler(checkpoint: Path) -> Path:
    """Give a tiny checkpoint a scheduler of its own that sdfast has."""
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), "utf-8")
    index = json.loads((checkpoint / "model_index.json").read_text("utf-8"))
    index["scheduler"] = ["diffusers", SCHEDULER["_class_name"]]
    (checkpoint / "model_index.json").write_text(json.dumps(index), "utf-8")
    return checkpoint


def build(checkpoint: Path, folder: Path, **recipe: object) -> Path:
    return export(checkpoint, folder, Recipe.make(batch=2, **{"backend": "eager", **recipe}))


def reseal(folder: Path) -> None:
    """Write the digests of the files as they now are: the engine looks whole."""
    manifest = read_manifest(folder)
    files = tuple(
        file.model_copy(
            update={"size": (folder / file.path).stat().st_size, "sha256": sha256(folder / file.path)}
        )
        for file in manifest.files
    )
    changed = manifest.model_copy(update={"files": files}).to_json()
    (folder / MANIFEST_NAME).write_text(changed, encoding="utf-8")


def change_weight(
    folder: Path, module: str, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Change one tensor of an eager engine's module."""
    path = folder / f"{module}.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    state[tensor] = change(state[tensor]).contiguous()
    save_file(state, path, metadata=header)
    reseal(folder)


def perturbed(weight: torch.Tensor) -> torch.Tensor:
    """Every element changed by about 1 % of itself. (Scaling all by one factor is nothing before a norm.)"""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return weight * (1 + 0.01 * noise).to(weight.dtype)


def change_scheduler(folder: Path, **fields: object) -> None:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")
    reseal(folder)


def perturb_onnx_weight(folder: Path, module: str) -> str:
    """Perturb the largest weight of an ONNX engine's module, in its external data; returns its name."""
    import onnx

    graph = onnx.load(folder / f"{module}.onnx", load_external_data=False).graph
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in graph.initializer}
    name = max((n for n, place in places.items() if place), key=lambda n: int(places[n]["length"]))
    place = places[name]
    data = np.memmap(
        folder / place["location"],
        dtype=np.float32,
        mode="r+",
        offset=int(place.get("offset", 0)),
        shape=(int(place["length"]) // 4,),
    )
    data[:] = perturbed(torch.from_numpy(data.copy())).numpy()
    data.flush()
    del data
    reseal(folder)
    return name
