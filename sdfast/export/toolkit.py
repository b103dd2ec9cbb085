"""What compiling with Inductor needs beside torch: a C++ compiler, and for CUDA the toolkit's headers."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sdfast.errors import first_line, root_cause

# What compiled modules include, and what that includes in turn.
HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h")
NO_COMPILER = "Inductor needs a C++ compiler: apt-get install g++, or set CXX"
NO_HEADERS = (
    "Inductor needs CUDA's headers: install the CUDA toolkit and set CUDA_HOME to it, or pip install "
    "nvidia-cuda-crt in the version of torch's CUDA"
)
_ERROR = re.compile(r".*\berror: .+")


def compiler() -> str | None:
    """The C++ compiler that torch will call, if it is there."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cuda_home(places: Sequence[Path] | None = None) -> Path | None:
    """The folder whose `include` has the headers: the toolkit that torch found, or else what pip installed.

    places: where to look instead.
    """
    if places is None:
        from torch.utils import cpp_extension

        found = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
        places = [*found, *sorted((Path(torch.__file__).parents[1] / "nvidia").glob("cu[0-9]*"))]
    whole = (place for place in places if all((place / "include" / name).is_file() for name in HEADERS))
    return next(whole, None)


@contextmanager
def with_cuda_headers() -> Iterator[None]:
    """Inside, torch compiles with the headers that there are, where it would look in vain by itself."""
    from torch.utils import cpp_extension

    before, here = cpp_extension.CUDA_HOME, cuda_home()
    if here is not None:
        cpp_extension.CUDA_HOME = str(here)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


def advice(failure: BaseException) -> str:
    """What a compiler's failure says, in a line, and what to do where that is known."""
    cause = root_cause(failure)
    told = next((line.strip() for line in str(cause).strip().splitlines()[1:] if _ERROR.match(line)), "")
    first = f"{first_line(cause)}: {told}" if told else first_line(cause)
    if any(f"{name}: No such file" in told for name in HEADERS):
        return f"{first}; {NO_HEADERS}"
    if compiler() is None or "compiler" in first.lower():
        return f"{first}; {NO_COMPILER}"
    return first
