"""What the parts work on: checkpoint, engines, opened sides and the float32 truth, made when first needed."""

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_weights
from benchmarks.gpu.document import one_line
from benchmarks.gpu.sides import SIDES, Side, open_side
from benchmarks.gpu.workloads import SEED, Draw, Workload
from sdfast.export.build import BUILD_CODE, Silent, Stage, export
from sdfast.export.recipe import Recipe
from sdfast.versions import code_digest

DTYPE = "fp16"


class Bench:
    """One workload on one device. All that can be kept on disk is kept in `workdir`."""

    def __init__(self, workload: Workload, device: torch.device, workdir: Path) -> None:
        self.workload = workload
        self.device = device
        self.workdir = workdir
        self.roofline: dict[str, Any] | None = None
        self._sides: dict[tuple[str, int | None], Side] = {}
        self._failed: dict[tuple[str, int | None], str] = {}
        self._exact: Any = None

    # ------------------------------------------------------------ on disk

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies, and beside it all that was made of it."""
        return self.workdir / f"{self.workload.architecture}-{DTYPE}"

    def source(self) -> Path:
        """The checkpoint, in half precision: the error measured is that of computing, not of storing."""
        source = self.folder / "checkpoint"
        if not (source / "model_index.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # of other weights
        return random_weights.build(self.workload.architecture, source, torch.float16, self.device)

    def engine_folder(self, side: str, batch: int) -> Path:
        """One engine for each batch, so that what is measured first waits for no build of the others."""
        spec = SIDES[side]
        kind = f"{spec.backend}{'-fp8' * spec.fp8}{f'-{spec.kernels}' if spec.kernels else ''}"
        name = f"{kind}-{self.workload.size}-b{batch}-{code_digest(*BUILD_CODE)[:12]}"
        return self.folder / "engines" / name

    def build(self, side: str, batch: int) -> dict[str, Any]:
        """Export the engine if it is not there; what that cost, now or then."""
        folder = self.engine_folder(side, batch)
        note = folder.with_name(folder.name + ".json")
        source = self.source()
        if not (folder.exists() and note.exists()):
            told, code = _Stages(), nbytes(self.workdir / "sdfast" / "code") > 0
            recipe = Recipe.make(
                backend=SIDES[side].backend,
                dtype=DTYPE,
                sizes=(self.workload.size,),
                batch=(batch,),
                device=self.device.type if SIDES[side].backend == "inductor" else None,
                fp8=SIDES[side].fp8,
                kernels=SIDES[side].kernels if self.device.type == "cuda" else None,  # a CPU has none
            )
            start = time.perf_counter()
            export(str(source), folder, recipe, progress=told)
            cost = {"seconds": time.perf_counter() - start, "stages": told.seconds}
            cost |= {"nbytes": nbytes(folder), "some_code_was_kept": code}
            note.write_text(json.dumps(cost), encoding="utf-8")
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return found

    # ------------------------------------------------------------ in memory

    def side(self, name: str, batch: int) -> Side:
        """An opened side. What once could not be opened is not tried again: a build may take minutes."""
        ours = SIDES[name].backend is not None
        key = (name, batch if ours else None)
        if key in self._failed:
            raise RuntimeError(self._failed[key])
        if key not in self._sides:
            try:
                engine = None
                if ours:
                    self.build(name, batch)
                    engine = self.engine_folder(name, batch)
                self._sides[key] = open_side(name, self.workload, self.source(), engine, self.device)
            except Exception as error:
                self._failed[key] = one_line(error)
                raise
        return self._sides[key]

    def keep_only(self, batch: int) -> None:
        """Close the engines of other batches."""
        others = [key for key in self._sides if key[1] not in (None, batch)]
        for key in others:
            del self._sides[key]
        if others:
            self.tidy()

    def tidy(self) -> None:
        """Give back the memory that nothing uses."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------ the truth

    def exact(self) -> Any:
        """The stock pipeline in float32, open until `forget_exact`."""
        if self._exact is None:
            from benchmarks.gpu.stock import open_pipeline

            self._exact = open_pipeline(self.source(), torch.float32, self.device)
        return self._exact

    def forget_exact(self) -> None:
        self._exact = None
        self.tidy()

    def truths(self, draw: Draw) -> dict[int, torch.Tensor]:
        """By index in the batch: its first and last picture [3, H, W] by stock in float32, drawn alone."""
        indices = sorted({0, draw.batch - 1})
        return {i: self._truth(draw, SEED + i) for i in indices}

    def _truth(self, draw: Draw, seed: int) -> torch.Tensor:
        load = self.workload
        name = f"{load.size}-{draw.steps}-{'guided' if draw.guided else 'plain'}-{seed}.pt"
        path = self.folder / "truth" / name
        if not path.exists():
            from benchmarks.gpu.stock import draw_with
            from sdfast.validation.reference import as_reference

            with as_reference():
                picture = draw_with(self.exact(), load, draw, "pt", [seed])[0].float().cpu()
            path.parent.mkdir(parents=True, exist_ok=True)
            place = path.with_suffix(f".{os.getpid()}")
            torch.save(picture, place)
            place.replace(path)
        found: torch.Tensor = torch.load(path, weights_only=True)
        return found


def use_caches(workdir: Path) -> None:
    """Let what torch and sdfast compile lie in `workdir`, for this process and those it starts."""
    os.environ["SDFAST_CACHE"] = str(workdir / "sdfast")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(workdir / "inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", str(workdir / "triton"))


def nbytes(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


class _Stages(Silent):
    """Remembers what each stage of an export took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def end(self, stage: Stage) -> None:
        self.seconds[stage.name] = round(stage.seconds, 3)


def pictures(images: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures [n, 3, H, W] one by one, [3, H, W] float32 on the CPU."""
    return [image.detach().float().cpu() for image in images]
