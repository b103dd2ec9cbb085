"""Modules that Inductor compiled ahead of time: native code in a package, the weights beside it.

A form of a module is a package (`unet-b2.pt2`) and what must be known to call it (`unet-b2.json`, a `Code`).
The weights of all forms lie in safetensors files, found by `unet.index.json`, and are handed to the code as
constants that it does not own: forms share them, on a processor they stay in the mapped file, and a GPU gets
them straight from there.

The compiled code checks nothing of what it is given: constants in other strides give other numbers, a
missing one ends the process. Everything is therefore checked here, once, before the first call. The package
goes to torch's own C++ loader; its loader in Python would unpickle what it finds in an archive.
"""

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from sdfast.errors import BackendError, EngineError, first_line

# Of `load_constants`: not for a second set of constants, all of them, and not owned by the code.
_IN_USE_WHOLE_NOT_OWNED = (False, True, True)

Axis = int | tuple[int, int]  # a size, or the lowest and the highest of those that it may have


class Layout(BaseModel):
    """How a tensor lies in memory. stride: in elements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str  # "float16"
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Layout":
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(dtype=dtype, shape=tuple(tensor.shape), stride=tensor.stride())


class Literal(BaseModel):
    """A small tensor that is part of the code, such as the frequencies of a sinusoid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[int, ...]
    values: tuple[int | float, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Literal":
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(dtype=dtype, shape=tuple(tensor.shape), values=tuple(tensor.flatten().tolist()))

    def tensor(self, device: torch.device) -> torch.Tensor:
        dtype = getattr(torch, self.dtype)
        return torch.tensor(self.values, dtype=dtype, device=device).reshape(self.shape)


class Input(BaseModel):
    """An input of the code: a contiguous tensor of this dtype and shape."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dtype: str
    shape: tuple[Axis, ...]

    def check(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Raises `BackendError` unless `tensor` is one."""
        sizes = tuple(tensor.shape)
        fits = len(sizes) == len(self.shape) and all(
            size == axis if isinstance(axis, int) else axis[0] <= size <= axis[1]
            for size, axis in zip(sizes, self.shape, strict=True)
        )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not fits or dtype != self.dtype or tensor.device.type != device.type:
            raise BackendError(
                f"tensor {self.name!r} is {dtype} {list(sizes)} on {tensor.device}, and this form was"
                f" compiled for {self.dtype} {list(self.shape)} on {device}"
            )
        if not tensor.is_contiguous():
            raise BackendError(f"tensor {self.name!r} is not contiguous")


class Code(BaseModel):
    """What must be known to call a package.

    attention: what computes each shape of it, where that was measured. kernels: likewise of group norms,
    gated products, and convolutions that may be in FP8.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Layout]
    literals: dict[str, Literal]
    attention: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


class Inductor:
    """Loads compiled modules on one device. Forms of a module share its weights."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._weights: dict[Path, Weights] = {}

    def load(self, path: Path) -> "InductorModule":
        """The module in the package at `path`, its weights in the files beside it."""
        code = _read_code(path.with_suffix(".json"))
        index = path.with_name(f"{code.module}.index.json")
        weights = self._weights.setdefault(index, Weights(index, self._device))
        constants = {name: weights.tensor(name, layout) for name, layout in code.constants.items()}
        constants |= {name: literal.tensor(self._device) for name, literal in code.literals.items()}
        runner = _runner(path, self._device)
        wanted = set(runner.get_constant_fqns())
        if wanted != set(constants):
            odd = sorted(wanted ^ set(constants))[0]
            raise EngineError(f"{path.name}: its code and its description differ in the constant {odd!r}")
        runner.load_constants(constants, *_IN_USE_WHOLE_NOT_OWNED)
        return InductorModule(runner, code, constants, weights, self._device)


class Weights:
    """The weights of a module's forms, each loaded when a form first asks for it."""

    def __init__(self, index: Path, device: torch.device) -> None:
        self._folder, self._device = index.parent, device
        self._files = _read_index(index)
        self._loaded: dict[str, torch.Tensor] = {}
        # The code keeps a reference to every constant for good, so that dropping ours frees no memory.
        weakref.finalize(self, _release, self._loaded)

    def tensor(self, name: str, layout: Layout) -> torch.Tensor:
        """The weight of that name. Raises `EngineError` unless it lies in memory as `layout` says."""
        if name not in self._loaded:
            self._loaded[name] = self._read(name, layout)
        found = Layout.of(self._loaded[name])
        if found != layout:
            raise EngineError(f"weight {name}: {found!r}, but the code was compiled for {layout!r}")
        return self._loaded[name]

    def _read(self, name: str, layout: Layout) -> torch.Tensor:
        if name not in self._files:
            raise EngineError(f"the weight {name} is not among those of the engine; export the engine again")
        path = self._folder / self._files[name]
        try:
            with safe_open(path, framework="pt", device=str(self._device)) as file:
                stored: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{path.name}: no weight {name} ({error}); export the engine again") from error
        return in_memory(stored, layout)


def in_memory(stored: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A tensor stored in the order in which it lies in memory, as a view with its shape and strides."""
    if stored.numel() != _span(layout):
        raise EngineError(f"a weight of {stored.numel()} numbers, but {list(layout.shape)} was compiled")
    return stored.as_strided(layout.shape, layout.stride)


def _span(layout: Layout) -> int:
    """How many numbers a tensor of that layout reaches over; as many as it has, if it is dense."""
    if 0 in layout.shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(layout.shape, layout.stride, strict=True))


def _release(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        if tensor.is_cuda:
            tensor.untyped_storage().resize_(0)
    weights.clear()


class InductorModule:
    """One compiled form."""

    def __init__(
        self,
        runner: Any,
        code: Code,
        constants: Mapping[str, torch.Tensor],
        weights: Weights,
        device: torch.device,
    ) -> None:
        self._runner, self._code, self._device = runner, code, device
        self._held = constants, weights  # the code knows only their addresses

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = self._run(self._checked(inputs))
        return {name: value.contiguous() for name, value in zip(self._code.outputs, results, strict=True)}

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Callable[[], None]:
        given = self._checked(inputs)
        targets = [outputs[name] for name in self._code.outputs]

        def run() -> None:
            for target, value in zip(targets, self._run(given), strict=True):
                target.copy_(value)

        return run

    def _checked(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The inputs in the order of the code."""
        for wanted in self._code.inputs:
            if wanted.name not in inputs:
                raise BackendError(f"module {self._code.module!r} needs the input {wanted.name!r}")
            wanted.check(inputs[wanted.name], self._device)
        return [inputs[wanted.name] for wanted in self._code.inputs]

    def _run(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        try:
            results: list[torch.Tensor] = self._runner.run(given)
        except RuntimeError as error:
            raise BackendError(f"module {self._code.module!r} failed: {first_line(error)}") from error
        return results


def _runner(path: Path, device: torch.device) -> Any:
    """torch's runner of the package: one at a time, on `device`, on the caller's stream."""
    try:
        from torch._C._aoti import AOTIModelPackageLoader
    except ImportError as error:
        raise BackendError(f"torch {torch.__version__} cannot run compiled packages; install 2.11") from error
    index = -1 if device.type == "cpu" else (device.index or 0)
    try:
        return AOTIModelPackageLoader(str(path), "model", True, 1, index)
    except RuntimeError as error:
        raise EngineError(f"{path.name}: cannot be loaded: {first_line(error)}") from error


def _read_code(path: Path) -> Code:
    try:
        return Code.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EngineError(f"{path.name}: cannot be read ({first_line(error)}); export again") from error


def _read_index(path: Path) -> dict[str, str]:
    """Weight → the file beside `path` that holds it."""
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineError(f"{path.name}: cannot be read ({error}); export the engine again") from error
    if not isinstance(index, dict) or not all(_is_beside(file) for file in index.values()):
        raise EngineError(f"{path.name}: names files that are not beside it; do not use this engine")
    return index


def _is_beside(file: object) -> bool:
    return isinstance(file, str) and bool(file) and "\0" not in file and Path(file).name == file
