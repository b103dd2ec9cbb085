"""What is compared: ways to draw the same picture, as data, and how each is opened."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, get_args

import torch

from benchmarks.gpu.workloads import Draw, Workload
from sdfast.backends.target import check_fp8
from sdfast.errors import BackendError

EAGER, COMPILED = "stock-eager", "stock-compiled"  # the two that ratios are taken to
WITH_OWN, WITHOUT_OWN = "sdfast-inductor", "sdfast-inductor-compiler"  # sdfast's own kernels, or none


class Side(Protocol):
    """An opened side."""

    def draw(self, draw: Draw, output_type: str = "pil") -> Any:
        """The pictures; image i from the seed SEED + i, "pt" as [n, 3, H, W] in [0, 1]."""
        ...

    def module(self, name: str, batch: int) -> AbstractContextManager[Callable[[], object]]:
        """A repeatable call of one network, as a guided picture in a batch of that many would call it.

        name: "text_encoder", "text_encoder_2" (one prompt), "unet" (two rows a picture) or "vae_decoder".
        """
        ...


@dataclass(frozen=True)
class SideSpec:
    """backend: sdfast's, or None for stock diffusers. compiled: stock with channels-last, torch.compile.
    fp8: the U-Net in FP8. kernels: which the recipe names. aside: in no comparison with
    stock, unless it is asked for by name.
    """

    title: str
    backend: str | None = None
    compiled: bool = False
    fp8: bool = False
    kernels: str | None = None
    aside: bool = False

    @property
    def compiles(self) -> bool:
        """Whether it takes minutes until it draws."""
        return self.compiled or self.backend == "inductor"

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None where it can."""
        if self.backend is None:
            missing = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
            if self.compiled and device.type == "cuda" and find_spec("triton") is None:
                missing.append("triton")
            return f"needs {', '.join(missing)}" if missing else None
        if self.backend not in known_backends():
            return f"this sdfast has no {self.backend!r} backend"
        if self.fp8 and (reason := _without_fp8(device, self.backend)):
            return reason
        return _without_cuda_provider(device) if self.backend == "onnx" else None


SIDES = {
    EAGER: SideSpec("stock diffusers, fp16, eager"),
    COMPILED: SideSpec("stock diffusers, fp16, channels-last, torch.compile(max-autotune)", compiled=True),
    WITH_OWN: SideSpec("sdfast, inductor backend, fp16", backend="inductor"),
    "sdfast-inductor-fp8": SideSpec(
        "sdfast, inductor backend, fp16, the U-Net in FP8", backend="inductor", fp8=True
    ),
    WITHOUT_OWN: SideSpec(
        "sdfast, inductor backend, fp16, no kernels of its own",
        backend="inductor",
        kernels="compiler",
        aside=True,
    ),
    "sdfast-onnx": SideSpec("sdfast, onnx backend, fp16", backend="onnx"),
    "sdfast-eager": SideSpec("sdfast, eager backend, fp16", backend="eager"),
}


def usual(device: torch.device) -> list[str]:
    """The sides of a run that names none: on a CPU those that need no compiler, so that it stays a dry run.

    On a GPU all that can run, but sdfast's eager backend only where no other of its can.
    """
    here = [name for name, side in SIDES.items() if side.absent(device) is None and not side.aside]
    uncompiled = [name for name in here if not SIDES[name].compiles and SIDES[name].backend != "onnx"]
    if device.type != "cuda":
        return uncompiled
    fast = [name for name in here if SIDES[name].backend not in (None, "eager")]
    return [name for name in here if SIDES[name].backend != "eager" or not fast]


def known_backends() -> tuple[str, ...]:
    """Those that a recipe may name."""
    from sdfast.export.recipe import Recipe

    return get_args(Recipe.model_fields["backend"].annotation)


def _without_fp8(device: torch.device, backend: str) -> str | None:
    if device.type != "cuda":
        return "FP8 is compiled for GPUs alone" if backend == "inductor" else None
    try:
        check_fp8(device, "another GPU is needed")
    except BackendError as error:
        return str(error)
    return None


def _without_cuda_provider(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "float16 on ONNX Runtime needs a GPU"
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return "needs onnx and onnxruntime-gpu"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA provider; needs onnxruntime-gpu"
    return None


def open_side(name: str, workload: Workload, source: Path, engine: Path | None, device: torch.device) -> Side:
    """Open a side on the checkpoint in `source`, or on the engine that was exported of it.

    Each kind imports only what it needs: the time that it takes counts for the first picture.
    """
    spec = SIDES[name]
    if spec.backend is None:
        from benchmarks.gpu.stock import Stock

        return Stock(workload, source, device, compiled=spec.compiled)
    if engine is None:
        raise ValueError(f"{name} is opened on an engine")
    from benchmarks.gpu.ours import Sdfast

    return Sdfast(workload, engine, device)
