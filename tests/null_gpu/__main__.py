"""Run a Python command on the GPU that computes nothing: `python -m tests.null_gpu -m pytest -m cuda …`."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
# The source of each library, in the order in which they are loaded, and its name.
LIBRARIES = {
    "runtime.c": "libcudart.so.13",
    "blas_lt.c": "libcublasLt.so.13",
    "blas.c": "libcublas.so.13",
    "driver.c": "libcuda.so.1",
}
# What torch does not bring, and what does.
HEADERS = {"crt/host_defines.h": "nvidia-cuda-crt", "nv/target": "nvidia-cuda-cccl"}
# Of what is compiled: for this GPU it is kept from what is compiled for a real one.
KEPT = "NULL_GPU_CACHE"  # the variable that names a folder where it stays from one command to the next
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SDFAST_CACHE")


def site() -> Path:
    """Where pip puts torch's CUDA. torch is not imported: the libraries must be there before it."""
    torch = find_spec("torch")
    packages = Path(torch.origin).parents[1] if torch and torch.origin else None
    if packages is None or not (packages / "nvidia" / "cu13").is_dir():
        sys.exit("a GPU that computes nothing needs torch with CUDA 13 from pip")
    for header, package in HEADERS.items():
        if not (packages / "nvidia/cu13/include" / header).is_file():
            sys.exit(f"CUDA's headers are missing: pip install {package}==13.0.*")
    return packages / "nvidia" / "cu13"


def names(*command: str | Path) -> list[str]:
    """The functions that `nm` finds."""
    done = subprocess.run(["nm", "--defined-only", *command], check=True, capture_output=True, text=True)
    found = (line.split()[1:] for line in done.stdout.splitlines())
    return sorted({name.split("@")[0] for kind, name in found if kind == "T"})


def declared(header: Path) -> list[str]:
    """The functions of the driver, which no package has."""
    words = header.read_text("utf-8").replace("(", " ").split()
    return sorted({b for a, b in pairwise(words) if a == "CUDAAPI" and b.startswith("cu")})


def build(cuda: Path, folder: Path) -> list[Path]:
    """Write the libraries: what is not written out here succeeds and does nothing."""
    libraries = []
    for source, name in LIBRARIES.items():
        part, rest, symbols = (folder / f"{source}{suffix}" for suffix in (".o", ".rest.c", ".map"))
        flags = ["-O1", "-fPIC", "-w", f"-I{cuda / 'include'}"]
        subprocess.run(["gcc", *flags, "-c", HERE / source, "-o", part], check=True)
        real = cuda / "lib" / name
        wanted = names("-D", real) if real.exists() else declared(cuda / "include" / "cuda.h")
        others = sorted(set(wanted) - set(names(part)))
        rest.write_text("".join(f"int {other}(void) {{ return 0; }}\n" for other in others), "utf-8")
        symbols.write_text(f"{name} {{ global: *; }};\n", "utf-8")
        made = folder / name
        link = [f"-Wl,-soname,{name}", f"-Wl,--version-script,{symbols}", "-o", made, *libraries[:1]]
        subprocess.run(["gcc", "-shared", *flags, "-fno-builtin", part, rest, *link, "-ldl"], check=True)
        libraries.append(made)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # what compiled packages link with
    return libraries


def main() -> None:
    cuda = site()
    with tempfile.TemporaryDirectory(prefix="null-gpu-") as made:
        folder = Path(made)
        libraries = build(cuda, folder)
        # Python imports a module of this name whenever it starts, in the command's own processes too.
        (folder / "sitecustomize.py").write_text("import tests.null_gpu.stand_ins\n", "utf-8")
        caches = Path(os.environ.get(KEPT, made)).absolute()
        environment = {
            **os.environ,
            "LD_PRELOAD": ":".join(map(str, libraries)),
            "LD_LIBRARY_PATH": str(folder),
            "LIBRARY_PATH": str(folder),
            "TRITON_LIBCUDA_PATH": str(folder),
            "CUDA_HOME": str(cuda),
            "PYTHONPATH": ":".join(map(str, (folder, HERE.parents[1]))),
            **{name: str(caches / name) for name in CACHES},
        }
        plugin = ["-p", "tests.null_gpu.plugin"] if sys.argv[1:3] == ["-m", "pytest"] else []
        command = [sys.executable, *sys.argv[1:3], *plugin, *sys.argv[3:]]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
