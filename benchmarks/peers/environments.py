"""An environment for each peer: peers need versions of transformers and diffusers that exclude each other's.

torch is installed first and alone, in the version that sdfast is tested with, so that pip takes it from where
this machine has it from; nothing that follows may replace it.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "sdfast" / "peers"
CONSTRAINTS = Path(__file__).parent / "constraints"
_READY = ".constraints"  # in an environment that is whole: the digest of what it was made from


class InstallError(Exception):
    """A peer's environment cannot be made here."""


@dataclass(frozen=True)
class Environment:
    """requirements: what is installed after torch; the versions are those of the peer's constraints file.
    removed: what that brings along and the peer neither needs here nor can have beside this torch.
    """

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()

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
            [*install, *self.requirements],
        ]
        if self.removed:
            commands.append([pip, "uninstall", "--quiet", "--yes", *self.removed])
        return commands

    def digest(self) -> str:
        made_of = [
            sys.version,
            *self.requirements,
            *self.removed,
            self.constraints.read_text(encoding="utf-8"),
        ]
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
}
"""By side. The other sides run in the environment that the benchmark runs in."""
