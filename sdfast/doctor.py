"""What this machine can run, what is missing, and how to get it."""

import os
import platform
import shutil
from dataclasses import dataclass

import sdfast
from sdfast.versions import installed

_RUNTIME = ("torch", "numpy", "pillow", "tokenizers", "safetensors", "pydantic")
_EXPORT = ("diffusers", "transformers", "peft", "onnx", "onnxscript", "scikit-image", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do when something is missing."""

    name: str
    state: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at versions, processors, devices and providers."""
    return [
        Finding("sdfast", sdfast.__version__),
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("processor", f"{os.cpu_count()} cores, {_memory()}"),
        Finding("disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"),
        *(_package(name, 'pip install "sdfast"') for name in _RUNTIME),
        *(_package(name, 'for export and validation: pip install "sdfast[export]"') for name in _EXPORT),
        *_onnxruntime(),
        _compiler(),
        *_cuda(),
        _attention(),
        _package("xformers", 'optional, CUDA only: pip install "sdfast[xformers]"'),
    ]


def _package(name: str, advice: str) -> Finding:
    found = installed([name]).get(name)
    return Finding(name, found or "missing", "" if found else advice)


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "memory unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def _onnxruntime() -> list[Finding]:
    names = list(installed(["onnxruntime", "onnxruntime-gpu"]))
    if not names:
        return [
            Finding("onnxruntime", "missing", 'pip install "sdfast[cpu]", or "sdfast[cuda]" for NVIDIA GPUs')
        ]
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    clash = "uninstall one of the two: they overwrite each other" if len(names) > 1 else ""
    found = [Finding(" + ".join(names), onnxruntime.__version__, clash)]
    advice = "" if "CUDA" in providers else 'for CUDA: pip uninstall onnxruntime; pip install "sdfast[cuda]"'
    return [*found, Finding("providers", ", ".join(providers), advice)]


def _attention() -> Finding:
    """What `--attention` may name here, tried on the device that is used best."""
    import torch

    from sdfast.backends.attention import available

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Finding("attention", f"{', '.join(available(device))} on {device}")


def _compiler() -> Finding:
    """For `--backend inductor`: only to export, not to run."""
    from sdfast.export.toolkit import NO_COMPILER, compiler

    found = compiler()
    return Finding("C++ compiler", found or "missing", "" if found else NO_COMPILER)


def _cuda() -> list[Finding]:
    import torch

    from sdfast.export.toolkit import NO_HEADERS, cuda_home

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        headers = cuda_home()
        return [
            Finding("cuda", f"{torch.version.cuda}: {', '.join(names)}"),
            Finding("cuda headers", str(headers or "missing"), "" if headers else NO_HEADERS),
        ]
    if torch.version.cuda is None:
        advice = "install a CUDA build of torch to use a GPU"
        return [Finding("cuda", "this torch is built without it", advice)]
    return [Finding("cuda", "no device", "check the NVIDIA driver with nvidia-smi")]
