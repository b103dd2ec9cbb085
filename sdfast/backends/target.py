"""Which machine native code was compiled for, and whether this one can run it."""

import ctypes
import platform
import sys
from pathlib import Path
from typing import Literal

import torch

from sdfast.errors import BackendError, first_line
from sdfast.manifest import Target

# What compilers make use of when they are told to compile for this processor: one that lacks it stops at an
# unknown instruction.
_INSTRUCTIONS = (
    *("avx", "f16c", "fma", "bmi2", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512cd", "avx512dq"),
    *("avx512vl", "avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg"),
    *("avx512_vpopcntdq", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
_X86 = ("x86_64", "amd64", "x86", "i386", "i686")
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")  # any of these; without, sums of INT8 products overflow
_FP8 = (8, 9)  # compute capability of the first GPUs that have it: Ada, before Hopper and Blackwell


def this_machine(device: torch.device) -> Target:
    """The target that code for `device` is compiled for here."""
    version = str(torch.__version__)
    if device.type == "cpu":
        return Target(device="cpu", architecture=_processor(), torch=version)
    major, minor = torch.cuda.get_device_capability(device)
    return Target(
        device="cuda",
        architecture=f"sm_{major}{minor}",
        torch=version,
        cuda=torch.version.cuda,
        driver=driver_version(),
    )


def driver_version(library: str = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1") -> int:
    """The newest CUDA version that the driver knows, as CUDA counts them (13000 is 13.0).

    Asked of the driver's library, since torch does not tell it. Raises `BackendError` where that is not there
    or fails.
    """
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError) as error:
        raise BackendError(f"the CUDA driver cannot be asked for its version: {first_line(error)}") from error
    if status != 0:
        raise BackendError(f"the CUDA driver does not tell its version (error {status}); see nvidia-smi")
    return version.value


def check_target(target: Target, device: torch.device, rebuild: str) -> None:
    """Raises `BackendError` with both values where this machine cannot run what was compiled for `target`.

    rebuild: the command that compiles it here.
    """
    if target.device != device.type:
        raise BackendError(
            f"this engine was compiled for device {target.device!r} and was opened on {str(device)!r}:"
            f" open it on {target.device!r}, or export one for {device.type!r}"
        )
    here = this_machine(device)
    for name in ("torch", "cuda", "architecture", "driver"):
        built, found = getattr(target, name), getattr(here, name)
        if not _serves(name, built, found):
            raise BackendError(
                f"this engine was compiled for {name} {built}, and this machine has {found}; compile it here"
                f" with: {rebuild}"
            )


def check_fp8(device: torch.device, advice: str) -> None:
    """Raises `BackendError` on a GPU without FP8. On a processor the definition runs, for checks."""
    if device.type != "cuda":
        return
    here = torch.cuda.get_device_capability(device)
    if here < _FP8:
        raise BackendError(
            f"FP8 needs a GPU of compute capability {_dotted(_FP8)} or above, and "
            f"{torch.cuda.get_device_name(device)} has {_dotted(here)}: {advice}"
        )


def check_int8(advice: str) -> None:
    """Raises `BackendError` on an x86 processor where ONNX Runtime's INT8 products would be wrong.

    Without VNNI it multiplies by `vpmaddubsw`, which adds two products in 16 bits and holds at 32767 what is
    larger: 2 · 255 · 127 is twice that. Other architectures have products that widen first.
    """
    found = torch.cpu.get_capabilities()
    if platform.machine().lower() not in _X86 or any(found.get(name) for name in _INT8):
        return
    has = [name for name in ("avx512_f", "avx2", "avx") if found.get(name)]
    raise BackendError(
        f"INT8 needs an x86 processor with {' or '.join(_INT8)}, and {found.get('cpu_name', 'this one')} has "
        f"{has[0] if has else 'none of them'}: sums of products would overflow; {advice}"
    )


def _serves(name: Literal["torch", "cuda", "architecture", "driver"], built: object, found: object) -> bool:
    """A processor may know more, and a driver be newer, than the code was compiled for."""
    if name == "architecture":
        return set(str(built).split()) <= set(str(found).split())
    if name == "driver":
        return built is None or (isinstance(built, int) and isinstance(found, int) and built <= found)
    return built == found


def _processor() -> str:
    """The processor's architecture and its vector instructions, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    known = next((line for line in lines if line.split(":")[0].strip() in ("flags", "Features")), "")
    flags = set(known.partition(":")[2].split())
    return " ".join([platform.machine(), *(name for name in _INSTRUCTIONS if name in flags)])


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
