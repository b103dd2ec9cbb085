"""What computes attention: a kernel of PyTorch's or xFormers', named, or the fastest of them for each shape.

All of them compute what `sdfast.models.ops.attention` defines, and differ from it in rounding alone. They are
for the U-Net; the VAE has one attention a picture, of float32 and a wider head than flash and cuDNN take.

PyTorch's kernels are called by the names of their operations rather than through
`torch.nn.attention.sdpa_kernel`, whose switches hold for the whole process: two engines in two threads would
switch for each other, and for everybody else.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from sdfast.backends.clock import Clock, clock_of
from sdfast.backends.measured import Measured, Memory
from sdfast.errors import BackendError, DependencyError, first_line
from sdfast.models import ops

KINDS = ("auto", "sdpa", "flash", "cudnn", "efficient", "math", "xformers")
_INSTALL = 'pip install "sdfast[xformers]"'


class Shape(NamedTuple):
    """What the choice of a kernel depends on. Not on the batch, on which no row's picture may depend."""

    heads: int
    queries: int  # N
    keys: int  # L
    width: int  # d, of a head
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        heads = "1 head" if self.heads == 1 else f"{self.heads} heads"
        return f"{heads} of {self.width}, {self.queries} queries, {self.keys} keys, {dtype}"


@dataclass(frozen=True)
class Choice:
    """What computes a shape. measured: None where there was nothing to choose from."""

    kind: str
    kernel: ops.Kernel
    measured: Measured | None = None


class Attention:
    """`ops.attention` by kernels of one kind on one device; each engine has an object of its own.

    chosen: what computes each shape that was met. A shape is tried, and with "auto" measured, the first time
    that it is met, and keeps its kernel for as long as the object lives. "auto" may so choose otherwise in
    another process, and the last bits of its pictures with it. Any number of threads may call it.

    Raises `BackendError` for a kind that there is not, or not on this device, or not for a shape;
    `DependencyError` without xFormers.
    """

    def __init__(
        self,
        kind: str,
        device: torch.device,
        clock: Clock | None = None,
        kernels: Mapping[str, ops.Kernel] | None = None,
        memory: Memory | None = None,
    ) -> None:
        """`clock`: by default the device's. `kernels`: those to choose from; by default the kind's. What
        `memory` recalls is not measured again."""
        self.kind = kind
        self.device = device
        self.chosen: dict[Shape, Choice] = {}
        self._kernels = dict(kernels) if kernels else _kernels(kind, device)
        self._clock = clock or clock_of(device)
        self._memory = memory
        self._lock = threading.Lock()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, upcast: bool) -> Tensor:
        """q [B, N, C], k and v [B, L, C] -> [B, N, C], as `ops.attention`."""
        return ops.attention_by(self.kernel, q, k, v, heads, upcast)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, heads, N, d], k and v [B, heads, L, d] -> [B, heads, N, d]."""
        shape = Shape(q.shape[1], q.shape[2], k.shape[2], q.shape[3], q.dtype)
        choice = self.chosen.get(shape) or self._choose(shape, q, k, v)
        return choice.kernel(q, k, v)

    def report(self) -> list[str]:
        """A line for each shape that was measured: what computes it, and the times of all."""
        met = list(self.chosen.items())  # other threads may be adding to it
        return [f"{_words(shape)}: {choice.measured}" for shape, choice in met if choice.measured]

    def taken(self) -> dict[str, str]:
        """Of each shape that was measured, in words, the kind that computes it."""
        return {_words(shape): choice.kind for shape, choice in list(self.chosen.items()) if choice.measured}

    def _choose(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Choice:
        with self._lock:
            if shape not in self.chosen:  # another thread may have been first
                one = len(self._kernels) == 1
                self.chosen[shape] = self._only(shape, q, k, v) if one else self._best(shape, q, k, v)
            return self.chosen[shape]

    def _only(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Choice:
        [(kind, kernel)] = self._kernels.items()
        try:
            _check(kind, q, k, v)
            kernel(q, k, v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            half = "; it takes float16 alone" if kind in _HALF_ONLY and not _half(q) else ""
            raise BackendError(
                f"attention {kind!r} does not take {shape} on {q.device.type} ({first_line(error)}){half}; "
                "choose auto or sdpa"
            ) from error
        return Choice(kind, kernel)

    def _best(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Choice:
        """The fastest, as it is remembered or else measured."""
        what, kinds = _words(shape), tuple(self._kernels)
        measured = self._memory.recall(what, kinds) if self._memory else None
        if measured is None:
            measured = self._fastest(shape, q, k, v)
            if self._memory:
                measured = self._memory.keep(what, measured, kinds)
        return Choice(measured.kind, self._kernels[measured.kind], measured)

    def _fastest(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Measured:
        times: dict[str, float] = {}
        for kind, kernel in self._kernels.items():
            try:
                _check(kind, q, k, v)
                times[kind] = self._clock(lambda kernel=kernel: kernel(q, k, v))  # type: ignore[misc]
            except RuntimeError:  # this one does not take the shape
                continue
        if not times:
            raise BackendError(f"attention 'auto': nothing here takes {shape}; choose sdpa")
        return Measured(min(times, key=lambda kind: times[kind]), times, rows=len(q))


def _words(shape: Shape) -> str:
    return f"attention of {shape}"


def exportable(device: torch.device) -> dict[str, ops.Kernel]:
    """The kernels that compiled code can call: PyTorch's own."""
    return {kind: kernel for kind, kernel in _ON[device.type].items() if kind != "xformers"}


def available(device: torch.device) -> list[str]:
    """The kinds that compute attention on `device`: each is tried on a small one that suits them all."""
    return [kind for kind in KINDS if kind == "auto" or _runs(kind, device)]


def _runs(kind: str, device: torch.device) -> bool:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    tokens = torch.zeros(1, 64, 64, dtype=dtype, device=device)
    try:
        Attention(kind, device)(tokens, tokens, tokens, 1, False)
    except (BackendError, DependencyError):
        return False
    return True


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return out


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
    return out


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, N or L, heads, d]
    # The node costs more than the call, and is for torch.compile alone, which cannot look into xFormers.
    out: Tensor = (_xformers_node if torch.compiler.is_compiling() else _memory_efficient)(q, k, v)
    return out.transpose(1, 2)


def _memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, N, heads, d], k and v [B, L, heads, d] -> [B, N, heads, d]."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q, k, v)
    return out


@torch.library.custom_op("sdfast::xformers_attention", mutates_args=())
def _xformers_node(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _memory_efficient(q, k, v).contiguous()


@_xformers_node.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


_ON: Mapping[str, Mapping[str, ops.Kernel]] = {
    "cpu": {"sdpa": F.scaled_dot_product_attention, "flash": _flash_cpu, "math": _math},
    "cuda": {
        "sdpa": F.scaled_dot_product_attention,
        "flash": _flash,
        "cudnn": _cudnn,
        "efficient": _efficient,
        "math": _math,
        "xformers": _xformers,
    },
}
_HALF_ONLY = ("flash", "cudnn")  # on a GPU
_CAN_USE = {
    "flash": can_use_flash_attention,
    "cudnn": can_use_cudnn_attention,
    "efficient": can_use_efficient_attention,
}


def _kernels(kind: str, device: torch.device) -> dict[str, ops.Kernel]:
    """The kernels to choose from: one, but for "auto" on CUDA, which leaves out what is never the fastest."""
    if kind not in KINDS:
        raise BackendError(f"attention: {kind!r} is not one of: {', '.join(KINDS)}")
    here = dict(_ON[device.type])
    if kind == "auto":
        if device.type == "cpu":
            return {"sdpa": here["sdpa"]}
        del here["math"]
        if _why_no_xformers():
            del here["xformers"]
        return here
    if kind == "xformers" and (why := _why_no_xformers()):
        raise DependencyError(
            f"attention 'xformers' needs the package xformers ({why}), and a CUDA device: {_INSTALL}; "
            "or choose auto or sdpa"
        )
    if kind not in here:
        raise BackendError(
            f"attention {kind!r} runs on CUDA alone, and the device is {str(device)!r}; "
            f"choose one of: auto, {', '.join(here)}"
        )
    return {kind: here[kind]}


def _why_no_xformers() -> str:
    """Why xFormers cannot be imported; "" when it can."""
    try:
        import xformers.ops  # noqa: F401
    except (ImportError, OSError) as error:  # a build for another CUDA does not load
        return first_line(error)
    return ""


def _check(kind: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises `RuntimeError` for what PyTorch itself would not give to its kernel on this GPU."""
    can_use = _CAN_USE.get(kind)
    if can_use and q.is_cuda and not can_use(SDPAParams(q, k, v, None, 0.0, False, False)):
        raise RuntimeError("PyTorch has no such kernel for them on this device")


def _half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
