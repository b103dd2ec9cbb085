"""An engine: a sealed directory, opened, verified, its modules loaded when first used.

Nothing is loaded before its digest has been checked, and nothing outside the manifest's sizes is run.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from sdfast.backends import (
    CompiledModule,
    check_options,
    check_provider,
    default_device,
    loader,
    parse_device,
)
from sdfast.backends.target import check_fp8, check_int8, check_target
from sdfast.errors import EngineError
from sdfast.manifest import SHALLOW, File, Manifest, Module, Span, StepCache, Variant, read_manifest
from sdfast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sdfast.backends.attention import Attention

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Engine:
    """An opened engine on one device.

    `manifest` says what it is; `dtype` is that of the networks' inputs and outputs; `call` runs a module once
    and `bind` prepares a call that is repeated on the same tensors. `attention` is what computes the U-Net's
    when that was asked for: its `report` says what "auto" chose.
    """

    compile = False
    attention: "Attention | None" = None
    on_call: Callable[[], object] | None = None
    """Called before each of the calls that a larger batch takes, so that a watcher sees it go on."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: torch.device,
        threads: int | None = None,
        *,
        compile: bool = False,
        attention: str | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.device = device
        self.threads = threads
        self.dtype = DTYPES[manifest.dtype]
        if manifest.provider is not None:
            check_provider(manifest.provider, device, manifest.name, manifest.checkpoint.source)
        self.compile = compile
        self.attention = check_options(manifest.backend, device, compile=compile, attention=attention)
        self._load = loader(
            manifest.backend,
            device,
            threads,
            provider=manifest.provider,
            looped=_looped(manifest),
            compile=compile,
            attention=self.attention,
        )
        if manifest.fp8:
            check_fp8(device, f"make an engine without: `sdfast export {manifest.checkpoint.source} -o DIR`")
        if manifest.int8 and manifest.backend == "onnx":
            check_int8(f"make an engine without: `sdfast export {manifest.checkpoint.source} -o DIR`")
        if manifest.builder.target is not None:
            check_target(manifest.builder.target, device, rebuild=f"sdfast rebuild {folder}")
        self._loaded: dict[str, CompiledModule] = {}
        self._prepared: set[tuple[str, int, int | None, int | None]] = set()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        *,
        threads: int | None = None,
        load: bool = False,
        compile: bool = False,
        attention: str | None = None,
    ) -> "Engine":
        """Open the engine in `folder` on `device`, every file's digest checked.

        `device`: default: "cuda" for an ONNX engine that was exported for CUDA or TensorRT, else "cpu".
        `threads`: of ONNX Runtime on a processor (default: as many as torch has); the other backends compute
        with torch's. `load`: load every module too, each once its own files are checked, while larger files
        are still being read.

        For eager engines, `compile`: the U-Net and the VAE through torch.compile, when a size is first drawn,
        which is said on stderr. `attention`: what computes that of the U-Net, one of
        `sdfast.backends.attention.KINDS` (default: PyTorch's choice, "sdpa").

        Raises `EngineError` when a file is missing or changed, `BackendError` when the device, the backend or
        the attention is not there, `DependencyError` when it needs a package.
        """
        folder = Path(folder)
        chosen = None if device is None else parse_device(device)
        manifest = read_manifest(folder)
        chosen = chosen or default_device(manifest.provider, manifest.builder.target)
        engine = cls(folder, manifest, chosen, threads, compile=compile, attention=attention)
        with Verification(folder, manifest.files) as verification:
            if load:
                for module in sorted(manifest.modules.values(), key=verification.size_of):
                    verification.wait(module.files)
                    for variant in module.variants:
                        engine._module(variant)
            verification.wait()
        return engine

    def moved(self, device: torch.device) -> "Engine":
        """The same engine on another device, with what it was opened with; its modules are loaded anew."""
        attention = self.attention.kind if self.attention else None
        return Engine(
            self.folder, self.manifest, device, self.threads, compile=self.compile, attention=attention
        )

    @property
    def running_as(self) -> list[str]:
        """What was asked for when it was opened, for a person: "compiled", "attention flash"."""
        kind = [f"attention {self.attention.kind}"] if self.attention else []
        return ["compiled"] * self.compile + kind

    @cached_property
    def tokenizers(self) -> tuple[Tokenizer, ...]:
        return tuple(Tokenizer.load(self.folder / path) for path in self.manifest.tokenizers)

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The checkpoint's scheduler config, as diffusers wrote it."""
        text = (self.folder / self.manifest.scheduler_config).read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        return config

    def check_size(self, height: int, width: int) -> None:
        """Raises `RequestError` listing the engine's sizes when `height` × `width` pixels is none of them."""
        self.manifest.check_size(height, width)

    def load(self, height: int | None = None, width: int | None = None) -> None:
        """Load every module that a picture of this size needs (all sizes when not given)."""
        for module in self.manifest.modules.values():
            for variant in module.variants:
                if height is None or variant.fits(height, width):
                    self._module(variant)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a run of many calls: on a CPU, ONNX Runtime's threads are the only ones that work.

        torch's threads spin for a while after each operation that they share, and take the processor from
        ONNX Runtime's, whose every operation then waits: a step takes half as long again.
        """
        threads = torch.get_num_threads()
        if self.manifest.backend != "onnx" or self.device.type != "cpu" or threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @property
    def step_cache(self) -> StepCache | None:
        """What shallow steps take from whole ones; None where there are none."""
        return self.manifest.model.step_cache

    @property
    def capturable(self) -> bool:
        """Whether calls of `bind` can be part of a CUDA graph; ONNX Runtime's cannot, it has its own."""
        return self.manifest.backend != "onnx"

    def rows(
        self,
        name: str,
        batch: int,
        height: int | None = None,
        width: int | None = None,
        tokens: int | None = None,
    ) -> int:
        """How many rows `bind` wants for `batch` rows of module `name`: more where all forms are larger.

        tokens: of the context that a U-Net is told.
        """
        return sum(size for size, _ in self._cover(name, batch, height, width, tokens))

    def call(
        self,
        name: str,
        inputs: Mapping[str, torch.Tensor],
        height: int | None = None,
        width: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run module `name` once on inputs whose first axis is the batch; outputs are new tensors."""
        batch = len(next(iter(inputs.values())))
        parts, start = [], 0
        for size, variant in self._cover(name, batch, height, width, _tokens(inputs)):
            part = {key: _padded(value[start : start + size], size) for key, value in inputs.items()}
            self._tell()
            parts.append(self._module(variant)(part))
            start += size
        if len(parts) == 1:
            return {key: value[:batch] for key, value in parts[0].items()}
        return {key: torch.cat([part[key] for part in parts])[:batch] for key in parts[0]}

    def prepare(
        self,
        name: str,
        inputs: Mapping[str, torch.Tensor],
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Have module `name` compiled for inputs like these, if it is compiled when first called."""
        case = (name, len(next(iter(inputs.values()))), height, width)
        if self.compile and case not in self._prepared:
            self.call(name, inputs, height, width)
            self._prepared.add(case)

    def bind(
        self,
        name: str,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        height: int | None = None,
        width: int | None = None,
    ) -> Callable[[], None]:
        """A repeatable call of module `name` that reads `inputs` and writes `outputs` in place.

        The first axis of every tensor is the batch, of the length that `rows` gives.
        """
        calls, start = [], 0
        batch = len(next(iter(inputs.values())))
        for size, variant in self._cover(name, batch, height, width, _tokens(inputs)):
            rows = slice(start, start + size)
            part_in = {key: value[rows] for key, value in inputs.items()}
            part_out = {key: value[rows] for key, value in outputs.items()}
            calls.append(self._module(variant).bind(part_in, part_out))
            start += size
        if len(calls) == 1:
            return calls[0]

        def run_all() -> None:
            for call in calls:
                self._tell()
                call()

        return run_all

    def _tell(self) -> None:
        if self.on_call is not None:
            self.on_call()

    def _cover(
        self, name: str, batch: int, height: int | None, width: int | None, tokens: int | None
    ) -> list[tuple[int, Variant]]:
        variants = [v for v in self.manifest.modules[name].variants if v.fits(height, width, tokens)]
        if not variants:
            told = "" if tokens is None else f" and prompts of {tokens} tokens"
            raise EngineError(f"module {name!r} has no form for {width}x{height}{told}")
        sizes = cover(batch, [variant.batch for variant in variants])
        return [(size, next(v for v in variants if size in v.batch)) for size in sizes]

    def _module(self, variant: Variant) -> CompiledModule:
        if variant.file not in self._loaded:
            self._loaded[variant.file] = self._load(self.folder / variant.file)
        return self._loaded[variant.file]


def _tokens(inputs: Mapping[str, torch.Tensor]) -> int | None:
    """The length of the prompts that a module is told of; None of one that is told of none."""
    return inputs["context"].shape[1] if "context" in inputs else None


def _looped(manifest: Manifest) -> frozenset[str]:
    """The files whose bound calls a loop repeats on pictures of one size."""
    modules = (manifest.modules[name] for name in ("unet", SHALLOW) if name in manifest.modules)
    forms = [form for module in modules for form in module.variants]
    sized = (f for f in forms if f.height and f.width and f.height.fixed and f.width.fixed)
    return frozenset(form.file for form in sized)


def cover(batch: int, spans: Iterable[Span]) -> list[int]:
    """The call sizes that together hold `batch` rows: as few padded rows as can be, then as few calls.

    So the sizes for the sum of these sizes are the same again, which `rows` and `bind` rely on.

    >>> cover(6, [Span.exactly(1), Span.exactly(4)])
    [4, 1, 1]
    """
    spans = list(spans)
    if any(batch in span for span in spans):
        return [batch]
    sizes = sorted({n for span in spans for n in range(span.low, max(span.low, min(span.high, batch)) + 1)})
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # for each number of rows: total, calls, the largest call
    for rows in range(1, batch + 1):
        rests = ((size, best[max(rows - size, 0)]) for size in sizes)
        best.append(min((size + total, calls + 1, -size) for size, (total, calls, _) in rests))
    chosen = []
    while batch > 0:
        chosen.append(-best[batch][2])
        batch -= chosen[-1]
    return chosen


class Verification:
    """Digests of an engine's files being checked, the largest first, on as many threads as there are cores.

    Raises `EngineError` naming a file that is missing or outside `folder` at once, one that was changed when
    it is waited for.
    """

    def __init__(self, folder: Path, files: Sequence[File]) -> None:
        root = folder.resolve()
        for file in files:
            _check_file(root, folder / file.path, file)
        self._folder = folder
        self._files = {file.path: file for file in sorted(files, key=lambda file: -file.size)}

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1))
        self._digests = {path: self._pool.submit(sha256, self._folder / path) for path in self._files}
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def size_of(self, module: Module) -> int:
        """Bytes of a module's files."""
        return sum(self._files[path].size for path in module.files)

    def wait(self, paths: Iterable[str] | None = None) -> None:
        """Until these files (default: all) are known to be what was exported."""
        for path in self._files if paths is None else paths:
            digest, due = self._digests[path].result(), self._files[path].sha256
            if digest != due:
                raise EngineError(
                    f"{self._folder / path}: digest {digest[:12]}…, but {due[:12]}… was exported: "
                    "the file was changed or damaged; export the engine again"
                )


def verify(folder: Path, files: Sequence[File]) -> None:
    """Raises `EngineError` naming the first file that is missing, outside `folder`, or was changed."""
    with Verification(folder, files) as verification:
        verification.wait()


def _check_file(root: Path, path: Path, file: File) -> None:
    """Raises `EngineError` unless `path` is a file under `root` of the stated size."""
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size if real.is_file() else None
    except FileNotFoundError:
        raise EngineError(f"{path}: missing; export the engine again") from None
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError
        raise EngineError(f"{path}: cannot be read ({error}); export the engine again") from error
    if not real.is_relative_to(root):
        raise EngineError(f"{path}: leads out of the engine; do not use this engine")
    if size is None:
        raise EngineError(f"{path}: is not a file; export the engine again")
    if size != file.size:
        raise EngineError(f"{path}: {size} bytes, but {file.size} were exported; export the engine again")


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex. Raises `EngineError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _padded(tensor: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(tensor)
    if missing == 0:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
