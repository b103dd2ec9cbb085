"""checkpoint → engine: every stage, in order."""

import errno
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import sdfast
from sdfast.backends.target import check_fp8, check_int8, this_machine
from sdfast.engine import sha256, verify
from sdfast.errors import DependencyError, EngineError, ExportError
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.controlnet import with_controlnets
from sdfast.export.embedding import with_embeddings
from sdfast.export.ip_adapter import with_ip_adapters
from sdfast.export.lora import with_loras
from sdfast.export.modules import Compiled, Form, module_specs
from sdfast.export.networks import Networks
from sdfast.export.publish import check_space, clear_leftovers, locked, publish, workplace
from sdfast.export.recipe import Recipe
from sdfast.export.sharing import link_or_copy, share_with
from sdfast.export.tokenizer import save_runtime_tokenizer
from sdfast.export.vae import with_vae
from sdfast.manifest import (
    CHUNK,
    MANIFEST_NAME,
    SHALLOW,
    Builder,
    File,
    HalfRange,
    Manifest,
    Module,
    Source,
    Target,
    json_digest,
    read_manifest,
)
from sdfast.versions import code_digest, installed

if TYPE_CHECKING:
    from sdfast.export.graphs import Graphs
    from sdfast.export.inductor import Compiler

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "transformers", "diffusers")
BUILD_CODE = ("export", "kernels", "models")  # of sdfast, what writes a module's files
SPARE = 64 * 2**20  # bytes beside the weights that an engine may take
VALIDATION = "validation/"  # where the report of an engine lies


@dataclass(frozen=True)
class Stage:
    """A finished stage of an export, for the caller's progress display."""

    name: str
    seconds: float
    size: int  # bytes written
    note: str = ""


class Progress(Protocol):
    """Who is told of an export's stages."""

    def begin(self, stage: str) -> None: ...
    def end(self, stage: Stage) -> None: ...
    def say(self, message: str) -> None: ...


class Silent:
    """The progress of a caller who asked for none."""

    def begin(self, stage: str) -> None:
        """A stage begins."""

    def end(self, stage: Stage) -> None:
        """A stage ended."""

    def say(self, message: str) -> None:
        """Something worth a line."""


class Spec(Protocol):
    """What is to be known of a module whatever it is made of: see `ModuleSpec`, and `graphs.GraphSpec`."""

    @property
    def name(self) -> str: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def components(self) -> tuple[str, ...]: ...
    @property
    def forms(self) -> tuple[Form, ...]: ...
    @property
    def fp8(self) -> tuple[str, ...]: ...
    @property
    def int8(self) -> tuple[str, ...]: ...
    @property
    def half_range(self) -> Callable[[], HalfRange | None]: ...
    @property
    def inputs(self) -> Callable[[int, int, int, int], Iterable[str]]: ...


Compile = Callable[[Any, Path], Compiled]


def export(
    source: str | Path | None,
    target: str | Path,
    recipe: Recipe | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Build the engine of a checkpoint in the directory `target`, and return that.

    source: a Hub id, a diffusers folder, one of optimum's graphs (see `graphs`), a single file, or
        "landscapes"; default: the recipe's.
    An engine that is there already is kept when nothing changed; modules that did not change are reused.

    Raises `CheckpointError` for what is wrong with the source and `ExportError` for the rest; whatever
    happens, `target` is the old engine or the new one, never a part.
    """
    recipe, progress, target = recipe or Recipe(), progress or Silent(), Path(target)
    _require("transformers", *(("onnx", "onnxscript") if recipe.backend == "onnx" else ()))
    source = source or recipe.checkpoint
    if source is None:
        raise ExportError("no checkpoint: name one, or use a recipe that does")
    _check_target(target)
    if recipe.int8 and recipe.backend == "onnx":
        check_int8("leave int8 out, or export on the machine that will run the engine")
    progress.begin("checkpoint")
    start = time.perf_counter()
    checkpoint = resolve(source, revision=recipe.revision, variant=recipe.variant, progress=progress.say)
    if checkpoint.graphs:
        from sdfast.export.graphs import recipe_for_graphs

        recipe = recipe_for_graphs(recipe, checkpoint.source)
    checkpoint = with_vae(checkpoint, recipe.vae, progress.say)
    checkpoint = with_loras(checkpoint, recipe.loras, progress.say)
    checkpoint = with_embeddings(checkpoint, recipe.embeddings, progress.say)
    checkpoint = with_controlnets(checkpoint, recipe.controlnet, progress.say)
    checkpoint = with_ip_adapters(checkpoint, recipe.ip_adapters, recipe.image_encoder, progress.say)
    digests, size = checkpoint.digests(), checkpoint.nbytes
    progress.end(Stage("checkpoint", time.perf_counter() - start, 0, f"{size / 1e6:,.1f} MB of weights"))
    try:
        with locked(target, progress.say):
            return _Build(checkpoint, digests, recipe, target, progress).run()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full; make room" if full else f"{error}; check its permissions"
        raise ExportError(
            f"{target}: {what}, or choose another directory with -o. Nothing was changed."
        ) from error


class _Build:
    """One export, under the lock."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        digests: dict[str, str],
        recipe: Recipe,
        target: Path,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.digests = digests
        self.recipe = recipe
        self.target = target
        self.progress = progress
        self.networks, self.specs = _modules(checkpoint, recipe)
        self.code_target = _code_target(recipe)
        self.fingerprints = {spec.name: self._fingerprint(spec) for spec in self.specs}
        self.old = _existing(target)

    def run(self) -> Path:
        clear_leftovers(self.target)
        if self.old is not None and self._unchanged(self.old):
            self.progress.say(f"{self.target} is up to date; nothing to do")
            return self.target
        if self.old is not None:
            _check_foreign_files(self.target, self.old)
        if "vae_encoder" not in self.fingerprints:
            self.progress.say("no vae_encoder: the checkpoint has none; the engine will take no images")
        check_space(self.target, self._space())
        with workplace(self.target) as place:
            modules = {spec.name: self._module(spec, place) for spec in self.specs}
            manifest = self._finish(place, modules)
            (place / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            _check_target(self.target)  # once more: the export took its time
            publish(place, self.target)
        return self.target

    def _unchanged(self, old: Manifest) -> bool:
        """Whether a new engine would be the old one, and the old one is whole."""
        fingerprints = {name: module.fingerprint for name, module in old.modules.items()}
        then = (fingerprints, old.model, old.checkpoint, old.builder.target)
        now = (self.fingerprints, self.networks.model(), self._source(), self.code_target)
        if then != now or not _same_recipe(old.recipe, self._recipe()):
            return False
        try:
            verify(self.target, old.files)
        except EngineError:  # each module's own check tells of it
            return False
        return True

    def _space(self) -> int:
        itemsize = 4 if self.recipe.dtype == "fp32" else 2
        # The checkpoint may be stored in either precision: the larger of the two is never too little.
        return self.checkpoint.nbytes * itemsize // 2 + SPARE

    def _module(self, spec: Spec, place: Path) -> Module:
        kept = self._kept(spec, place)
        if kept is not None:
            return kept
        before = set(place.iterdir())
        with self._stage(spec.name, place):
            compiled = self._compiler()(spec, place)
        files = sorted(path.name for path in set(place.iterdir()) - before)
        inputs = tuple(spec.inputs(1, self.networks.default_side, self.networks.default_side, CHUNK))
        half_range = spec.half_range()
        if half_range is not None:
            self.progress.say(f"{spec.name}: {half_range}")
        return Module(
            inputs=inputs,
            outputs=spec.outputs,
            variants=tuple(compiled.variants),
            files=tuple(files),
            fingerprint=self.fingerprints[spec.name],
            fp8=compiled.fp8,
            int8=spec.int8,
            half_range=half_range,
        )

    def _kept(self, spec: Spec, place: Path) -> Module | None:
        """The old engine's module, its files linked into the new one, when it would come out the same."""
        if self.old is None:
            return None
        module = self.old.modules.get(spec.name)
        if module is None or module.fingerprint != self.fingerprints[spec.name]:
            return None
        try:
            verify(self.target, [file for file in self.old.files if file.path in module.files])
        except EngineError as error:
            self.progress.say(f"{spec.name}: built again, for {error}")
            return None
        for name in module.files:
            link_or_copy(self.target / name, place / name)
        self.progress.end(Stage(spec.name, 0.0, 0, "unchanged, kept"))
        return module

    def _compiler(self) -> Compile:
        if self.checkpoint.graphs:
            from sdfast.export.graphs import compile_graph

            return lambda spec, place: Compiled(compile_graph(spec, place))
        if self.recipe.backend == "eager":
            from sdfast.export.eager import compile_eager

            return lambda spec, place: Compiled(compile_eager(spec, place, self.checkpoint), spec.fp8)
        if self.code_target is not None:
            return self._inductor(self.code_target).compile
        from sdfast.export.forms import compile_onnx, lowerings

        return lambda spec, place: Compiled(compile_onnx(spec, place, lowerings(self.recipe)))

    def _inductor(self, target: Target) -> "Compiler":
        from sdfast.export.code_store import CodeStore
        from sdfast.export.inductor import Compiler

        autotune = self.recipe.autotune
        tunes = target.device == "cuda" if autotune is None else autotune
        own = self.recipe.kernels != "compiler"
        return Compiler(target, tunes, CodeStore(), own, self.progress.say)

    def _finish(self, place: Path, modules: dict[str, Module]) -> Manifest:
        tokenizers = sorted(self.checkpoint.tokenizers)
        vectors = {embedding.token: embedding.vectors for embedding in self.checkpoint.embeddings}
        for name in tokenizers:
            save_runtime_tokenizer(self.checkpoint.tokenizers[name], place / name, vectors)
        config = dict(self.checkpoint.scheduler_config)
        (place / "scheduler_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        with self._stage("digests", place):
            files = _files(place)
            share_with(self.target, place, files)
        return Manifest(
            name=self.target.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            backend=self.recipe.backend,
            dtype=self.recipe.dtype,
            checkpoint=self._source(),
            recipe=self._recipe(),
            model=self.networks.model(),
            max_images=self.recipe.max_images,
            modules=modules,
            tokenizers=tuple(tokenizers),
            scheduler_config="scheduler_config.json",
            files=files,
            builder=Builder(
                sdfast=sdfast.__version__,
                python=platform.python_version(),
                packages=_versions(),
                target=self.code_target,
            ),
        )

    def _source(self) -> Source:
        made_of = self.checkpoint
        settings = {
            "scheduler": dict(made_of.scheduler_config),
            "tokenizers": {
                f"{name}/{path.name}": sha256(path)
                for name, folder in made_of.tokenizers.items()
                for path in folder.iterdir()
                if path.is_file()
            },
        }
        return Source(
            source=made_of.source,
            revision=made_of.revision,
            weights=self.digests,
            settings=json_digest(settings),
            loras=tuple(lora.record() for lora in made_of.loras),
            chosen=tuple(lora.record() for lora in made_of.chosen),
            controlnets=tuple(controlnet.record() for controlnet in made_of.controlnets),
            embeddings=tuple(embedding.record() for embedding in made_of.embeddings),
            ip_adapters=tuple(adapter.record() for adapter in made_of.ip_adapters),
            image_encoder=made_of.image_encoder.record() if made_of.image_encoder else None,
            vae=made_of.vae.record() if made_of.vae else None,
            graphs="optimum" if made_of.graphs else None,
        )

    def _recipe(self) -> dict[str, Any]:
        return self.recipe.model_dump(mode="json", exclude_none=True)

    def _fingerprint(self, spec: Spec) -> str:
        """A digest of everything that the module's files depend on."""
        parts = [self.checkpoint.component(name) for name in spec.components]
        depends: dict[str, Any] = {
            "name": spec.name,
            "weights": [self.checkpoint.digest_of(path) for part in parts for path in part.weights],
            "configs": [dict(part.config) for part in parts],
            "forms": [str(form) for form in spec.forms],
            "backend": self.recipe.backend,
            "dtype": self.recipe.dtype,
            "fp8": spec.fp8,
            "int8": spec.int8,
            "provider": self.recipe.provider,
            "winograd": self.recipe.winograd is not False,
            "target": self.code_target.model_dump() if self.code_target else None,
            "autotune": self.recipe.autotune,
            "versions": {**_versions(), "sdfast": sdfast.__version__},
            "code": code_digest(*BUILD_CODE),
        }
        if "vae" in spec.components and self.recipe.dtype == "fp16":
            depends["vae"] = self.recipe.vae_dtype
        loras = [[x.digest, x.scale] for x in self.checkpoint.loras if x.parts.keys() & set(spec.components)]
        if loras:
            depends["loras"] = loras
        if self.checkpoint.chosen and self._told_of_loras(spec):
            depends["chosen loras"] = [
                x.digest if x.parts.keys() & set(spec.components) else None for x in self.checkpoint.chosen
            ]
        embeddings = [x.digest for x in self.checkpoint.embeddings if x.first.keys() & set(spec.components)]
        if embeddings:
            depends["embeddings"] = embeddings
        tokens = [adapter.config.tokens for adapter in self.checkpoint.ip_adapters]
        if tokens and spec.name in ("unet", SHALLOW):
            depends["image tokens"] = tokens
        if self.recipe.cache_branch is not None and spec.name in ("unet", SHALLOW):
            depends["cache branch"] = self.recipe.cache_branch
        if self.recipe.pag and spec.name in ("unet", SHALLOW):
            depends["pag"] = self.recipe.pag
        if self.code_target is not None and self.code_target.device == "cuda":
            depends["kernels"] = self.recipe.kernels or "auto"
        return json_digest(depends)

    def _told_of_loras(self, spec: Spec) -> bool:
        """Whether a module is told of the LoRAs that requests choose: an input, or columns of the U-Net's."""
        side = self.networks.default_side
        return spec.name in ("unet", SHALLOW) or "loras" in spec.inputs(1, side, side, CHUNK)

    @contextmanager
    def _stage(self, name: str, place: Path) -> Iterator[None]:
        """Tell of a stage, with the time it took and what it wrote in `place`."""
        self.progress.begin(name)
        start, before = time.perf_counter(), _size(place)
        yield
        self.progress.end(Stage(name, time.perf_counter() - start, _size(place) - before))


def _same_recipe(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both ask for the same engine: older ones may say it otherwise."""
    try:
        return Recipe.recorded(old) == Recipe.recorded(new)
    except ExportError:
        return False


def _modules(checkpoint: Checkpoint, recipe: Recipe) -> "tuple[Networks | Graphs, Sequence[Spec]]":
    """The networks of a checkpoint, and every module that an engine of `recipe` has of them."""
    if checkpoint.graphs:
        from sdfast.export.graphs import Graphs

        graphs = Graphs.of(checkpoint)
        return graphs, graphs.specs(recipe)
    networks = Networks.of(checkpoint, recipe.cache_branch, recipe.pag)
    return networks, module_specs(networks, recipe)


def _require(*packages: str) -> None:
    """Raises `DependencyError` when a package that exporting needs is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DependencyError(f'exporting needs {", ".join(missing)}: pip install "sdfast[export]"')


def _check_target(target: Path) -> None:
    """A directory that is something else than an engine is never replaced."""
    if "\0" in str(target):
        raise ExportError(f"{str(target)!r}: holds a NUL character; choose another directory with -o")
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise ExportError(f"{target}: is there and is not a directory; choose another with -o")
        if target.is_dir() and any(target.iterdir()) and not _holds_engine(target):
            raise ExportError(f"{target}: is there and is not an engine; choose another directory with -o")
    except OSError as error:  # such as a name that is too long
        raise ExportError(f"{target}: {error}; choose another directory with -o") from error


def _holds_engine(folder: Path) -> bool:
    """Whether a manifest of ours lies there, be it damaged or of another version."""
    path = folder / MANIFEST_NAME
    return path.is_file() and b'"schema_version"' in path.read_bytes()[:1000]


def _check_foreign_files(target: Path, old: Manifest) -> None:
    """Raises `ExportError` for a file that is not the engine's own and would go with it."""
    own = {file.path for file in old.files} | {MANIFEST_NAME}
    names = (path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir())
    foreign = sorted(n for n in names if n not in own and not n.startswith((VALIDATION, ".")))
    if foreign:
        raise ExportError(
            f"{target / foreign[0]}: is not part of the engine that would be replaced; "
            "move it away, or choose another directory with -o"
        )


def _existing(target: Path) -> Manifest | None:
    """The manifest of the engine that is there, if there is one that can be read."""
    try:
        return read_manifest(target)
    except EngineError:
        return None


def _files(place: Path) -> tuple[File, ...]:
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, paths))
    return tuple(
        File(path=path.relative_to(place).as_posix(), size=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, digests, strict=True)
    )


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def _code_target(recipe: Recipe) -> Target | None:
    """The machine that native code is made for: this one."""
    if recipe.backend != "inductor":
        return None
    device = recipe.target_device
    if device == "cuda" and not torch.cuda.is_available():
        raise ExportError(
            "compiling for CUDA needs a CUDA device, and this torch sees none: run the export on the machine"
            " that will run the engine, or take --device cpu; `sdfast doctor` says what is missing"
        )
    if recipe.fp8:
        check_fp8(torch.device(device), "leave fp8 out, or export on the machine that will run the engine")
    return this_machine(torch.device(device))


@cache
def _versions() -> dict[str, str]:
    return installed(PACKAGES)
