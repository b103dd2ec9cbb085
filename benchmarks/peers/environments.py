"""An environment for each peer: peers need versions of transformers and diffusers that exclude each other's.

torch is installed first and alone, in the version that sdfast is tested with, so that pip takes it from where
this machine has it from; nothing that follows may replace it. A peer that comes as source is compiled for the
processor of this machine, and again on another.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine

CACHE = Path.home() / ".cache" / "sdfast" / "peers"
CONSTRAINTS = Path(__file__).parent / "constraints"
_READY = ".constraints"  # in an environment that is whole: the digest of what it was made from


class InstallError(Exception):
    """A peer's environment cannot be made here."""


@dataclass(frozen=True)
class Environment:
    """requirements: what is installed after torch; the versions are those of the peer's constraints file.
    removed: what that brings along and the peer neither needs here nor can have beside this torch.
    built_with: CMake's variables for what is compiled here, of the requirements that come as source.
    """

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    built_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def constraints(self) -> Path:
        return CONSTRAINTS / f"{self.name}.txt"

    def commands(self, folder: Path) -> list[list[str]]:
        """What makes it in `folder`."""
        pip = str(folder / "bin" / "pip")
        install = [pip, "install", "--quiet", "--no-compile", "--constraint", str(self.constraints)]
        commands = [
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [*install, "torch"],
            [*install, *self._build_options(), *self.requirements],
        ]
        if self.removed:
            commands.append([pip, "uninstall", "--quiet", "--yes", *self.removed])
        return commands

    def _build_options(self) -> list[str]:
        """None of what pip compiled before: its cache does not know for which processor."""
        if not self.built_with:
            return []
        settings = {f"cmake.define.{name}": value for name, value in self.built_with.items()}
        settings["build.tool-args"] = f"-j{os.cpu_count() or 1}"
        return ["--no-cache-dir", *(f"--config-settings={name}={value}" for name, value in settings.items())]

    def digest(self) -> str:
        made_of = [
            sys.version,
            *self.requirements,
            *self.removed,
            self.constraints.read_text(encoding="utf-8"),
        ]
        if self.built_with:
            made_of += [machine.instructions(), *map("=".join, self.built_with.items())]
        return hashlib.sha256("\n".join(made_of).encode()).hexdigest()

    def python(self, cache: Path) -> Path:
        """Its interpreter. Made on first use, and again when the constraints changed.

        Raises `InstallError` with what the failing command said last.
        """
        folder = cache / self.name
        ready, python = folder / _READY, folder / "bin" / "python"
        if ready.is_file() and ready.read_text(encoding="utf-8") == self.digest():
            return python
        cache.mkdir(parents=True, exist_ok=True)
        for command in self.commands(folder):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                raise InstallError(f"could not be installed: {_reason(made.stderr or made.stdout)}")
        ready.write_text(self.digest(), encoding="utf-8")
        return python


def _reason(said: str) -> str:
    """The error in what pip said, or the last that it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no reason given"])[-1][:300]


ENVIRONMENTS: Mapping[str, Environment] = {
    "optimum-onnx": Environment("optimum-onnx", ("optimum-onnx[onnxruntime]", "diffusers", "onnxscript")),
    # torchvision, of which transformers takes hold where it is, is built for torch's CUDA build and fails
    # beside another.
    "openvino": Environment("openvino", ("optimum-intel[openvino]", "diffusers"), removed=("torchvision",)),
    # The first of the variables has a default that depends on how it is built; the third, off by default, is
    # ggml's own fast matrix products in float32 and float16.
    "stable-diffusion.cpp": Environment(
        "stable-diffusion.cpp",
        ("stable-diffusion-cpp-python", "numpy", "safetensors"),
        built_with={
            "CMAKE_BUILD_TYPE": "Release",
            "GGML_NATIVE": "ON",
            "GGML_OPENMP": "ON",
            "GGML_LLAMAFILE": "ON",
        },
    ),
}
"""By side. The other sides run in the environment that the benchmark runs in."""
