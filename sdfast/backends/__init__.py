"""Backends: how a compiled module is loaded and called. Each lives in a file of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from sdfast.errors import BackendError
from sdfast.manifest import Target

if TYPE_CHECKING:
    from sdfast.backends.attention import Attention


class CompiledModule(Protocol):
    """One loaded function of an engine. Inputs and outputs are tensors on the engine's device, by name."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once; the outputs are new tensors."""
        ...

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        """A call that reads `inputs` and writes `outputs` in place each time, without a copy.

        The tensors must be contiguous and keep their storage for as long as the call is used.
        """
        ...


Loader = Callable[[Path], CompiledModule]
PROVIDER_DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}  # execution provider → what it runs on


def parse_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises `BackendError` for what is neither a processor nor a CUDA device."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise BackendError(f"device: {str(device)!r} is not one of 'cpu', 'cuda', 'cuda:N'")
    return found


def default_device(provider: str | None, target: Target | None) -> torch.device:
    """Where an engine runs that was exported for a provider, or compiled for a target; else on the CPU."""
    if target is not None:
        return torch.device(target.device)
    return torch.device(PROVIDER_DEVICES.get(provider or "cpu", "cpu"))


def check_provider(provider: str, device: torch.device, engine: str, source: str) -> None:
    """Raises `BackendError` unless graphs that were exported for `provider` run on `device`.

    engine, source: the engine's name and its checkpoint, for the message.
    """
    runs_on = PROVIDER_DEVICES.get(provider)
    if runs_on is None:
        raise BackendError(f"engine {engine!r} is for provider {provider!r}; there are {[*PROVIDER_DEVICES]}")
    if runs_on != device.type:
        raise BackendError(
            f"engine {engine!r} was exported for provider {provider!r}, which runs on {runs_on!r}, but "
            f"device {str(device)!r} was asked for, whose provider is {device.type!r}; open it on "
            f"{runs_on!r}, or make one with `sdfast export {source} --provider {device.type} -o DIR`"
        )


def check_device(device: torch.device) -> None:
    """Raises `BackendError` for a CUDA device that is not there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "device 'cuda' was asked for, but this torch sees no CUDA device; "
            "`sdfast doctor` says what is missing"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device: {str(device)!r}, but there are {torch.cuda.device_count()} CUDA devices")


def loader(
    backend: str,
    device: torch.device,
    threads: int | None,
    *,
    provider: str | None = None,
    looped: frozenset[str] = frozenset(),
    compile: bool = False,
    attention: "Attention | None" = None,
) -> Loader:
    """What loads a module file of `backend` on `device`. Raises `BackendError` when it cannot run here.

    provider: the one that an ONNX engine was exported for. looped: names of its files whose bound calls are
    repeated many times. compile, attention: for eager engines; see `Engine.open`.
    """
    check_device(device)
    if backend == "onnx":
        from sdfast.backends.onnx import OnnxRuntime

        return OnnxRuntime(device, threads, provider or "cpu", looped).load
    if backend == "eager":
        from sdfast.backends.eager import load_eager

        return lambda path: load_eager(path, device, compile=compile, attention=attention)
    if backend == "inductor":
        from sdfast.backends.inductor import Inductor

        return Inductor(device).load
    raise BackendError(f"this sdfast has no {backend!r} backend; it runs engines of: onnx, inductor, eager")


def check_options(
    backend: str, device: torch.device, *, compile: bool, attention: str | None
) -> "Attention | None":
    """What computes attention in an engine of `backend`: None for what is compiled into it.

    Raises `BackendError` for what was asked for and does not run here, or is no choice of this backend.
    """
    if compile:
        _check_eager("compile", backend, "it was compiled when it was exported")
    if attention is None:
        return None
    _check_eager(f"attention {attention!r}", backend, "its attention was chosen when it was exported")
    check_device(device)
    from sdfast.backends.attention import Attention

    return Attention(attention, device)


def _check_eager(asked: str, backend: str, why_not: str) -> None:
    if backend != "eager":
        raise BackendError(
            f"{asked} is for eager engines, and this one is {backend}: {why_not}; leave it out, "
            "or make another with `sdfast export SOURCE --backend eager`"
        )
