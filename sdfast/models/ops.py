"""The handful of operations that the networks are built on.

Each is a plain PyTorch function, and that function is the truth: eager runs and compilers see nothing
else. An exporter that lowers the operations itself opens `as_nodes()`, inside which every call leaves one
node named `sdfast::<operation>` in the traced graph instead of the PyTorch operations it consists of.
The networks may be given what computes the same otherwise: another `attention` (see `attention_by`),
`normalised` or `linear_geglu`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
Attend = Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]
"""`attention`, or what computes the same."""
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, heads, N, d], k and v [B, heads, L, d] -> [B, heads, N, d]: softmax(q kᵀ / √d) v."""
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""`linear_fp8`, `linear_int8`, or what computes the same."""
Convolution = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, int, list[int], list[int] | None],
    Tensor,
]
"""`conv3x3_fp8`, or what computes the same."""
GroupNormKernel = Callable[[Tensor, Tensor | None, Tensor, Tensor, int, float, bool], Tensor]
"""`normalised`, or what computes the same."""
LinearGeGLU = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`linear_geglu`, or what computes the same."""
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest number of E4M3
INT8_MAX = 127.0  # the largest number that has its negative in int8
SMALLEST = 2.0**-24  # of float16 above zero: a row of zeros has a scale too
NAMES: list[str] = []
_tracing_nodes = False


@contextmanager
def as_nodes() -> Iterator[None]:
    """While open, calls are recorded as `torch.ops.sdfast.*` nodes. For one export at a time."""
    global _tracing_nodes  # noqa: PLW0603
    _tracing_nodes = True
    try:
        yield
    finally:
        _tracing_nodes = False


def _named(shape: Callable[..., Sequence[int]]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Give a plain function its node. `shape`, of the function's arguments, is that of its result: the tracer
    could find it by tracing the function, but takes ten times as long."""

    def decorate(definition: Callable[P, Tensor]) -> Callable[P, Tensor]:
        node = torch.library.custom_op(f"sdfast::{definition.__name__}", definition, mutates_args=())
        node.register_fake(lambda x, *args: x.new_empty(shape(x, *args)))
        NAMES.append(definition.__name__)

        @wraps(definition)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            return node(*args, **kwargs) if _tracing_nodes else definition(*args, **kwargs)

        return call

    return decorate


def _same(x: Tensor, *_: Any) -> Sequence[int]:
    return x.shape


def _strided(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int]
) -> Sequence[int]:
    return x.shape[0], weight.shape[0], *conv3x3_sides(x.shape[2:], stride, padding)


@_named(lambda x, weight, bias: (*x.shape[:-1], weight.shape[0]))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]."""
    return F.linear(x, weight, bias)


@_named(lambda x, weight, scale, bias: (*x.shape[:-1], weight.shape[0]))
def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of numbers rounded to E4M3: x [..., I], weight [O, I] float8, scale [O] float32, bias [O].

    Each row of x has a scale of its own, found as it comes: one for the whole tensor would make a picture
    depend on those beside it in the batch. Row o of the layer's weight is weight[o] · scale[o].
    """
    rows, row_scale = quantised_rows(x)
    y = F.linear(rows.float(), weight.float()) * row_scale * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., I] -> float8 [..., I] and float32 [..., 1], whose product is x, each number within 1/16 of
    itself or, where it is small, 1/458752 of the largest in its row."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


@_named(lambda x, weight, scale, bias: (*x.shape[:-1], weight.shape[0]))
def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of numbers rounded to whole ones: x [..., I], weight [O, I] int8, scale [O] float32, bias [O].

    Each row of x has a scale of its own, as in `linear_fp8`. What is summed are products of whole numbers,
    exactly: y[r, o] = Σᵢ rows[r, i] weight[o, i] · scale[o] · row_scale[r] + bias[o].
    """
    rows, row_scale = whole_rows(x)
    total = F.linear(rows.double(), weight.double()).float()  # float64 holds every such sum
    y = total * scale * row_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def whole_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., I] -> int8 [..., I] and float32 [..., 1], whose product is x, each number within 1/254 of the
    largest in its row. Halves go to the even."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / INT8_MAX
    return (x / scale).round().to(torch.int8), scale


@_named(_strided)
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int]) -> Tensor:
    """x [B, I, H, W], weight [O, I, 3, 3] -> [B, O, H', W']; padding: before and after."""
    before, after = padding
    if before != after:
        x, before = F.pad(x, (before, after, before, after)), 0  # left, right, top, bottom
    return F.conv2d(x, weight, bias, stride=stride, padding=before)


def conv3x3_sides(sides: Sequence[int], stride: int, padding: list[int]) -> list[int]:
    """Height and width of what a 3×3 convolution makes of an image of that height and width."""
    return [(side + sum(padding) - 3) // stride + 1 for side in sides]


def _gathered(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    size: list[int] | None,
) -> Sequence[int]:
    sides = x.shape[2:] if size is None else size
    return x.shape[0], weight.shape[0], *conv3x3_sides(sides, stride, padding)


@_named(_gathered)
def conv3x3_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    size: list[int] | None,
) -> Tensor:
    """`conv3x3` of numbers rounded to E4M3: x [B, I, h, w], weight [O, 9, I] float8, its taps line by line,
    scale [O] float32, bias [O] -> [B, O, H', W'].

    Each pixel of x has a scale of its own, as each row of `linear_fp8` has: what a tap sums over the channels
    is multiplied by that of the pixel which it reads. Output channel o of the layer's weight is
    weight[o] · scale[o]. size: height and width that x is enlarged to before, as by `upsample_nearest`: twice
    its own, or one less.
    """
    pixels, pixel_scale = (_enlarged(t, size) for t in quantised_rows(x.permute(0, 2, 3, 1)))
    height, width = conv3x3_sides(pixels.shape[1:3], stride, padding)
    around = (0, 0, *padding, *padding)  # channels, left and right, top and bottom
    read, read_scale = F.pad(pixels.float(), around), F.pad(pixel_scale, around)
    y = torch.zeros([], device=x.device)
    for tap, of_tap in enumerate(weight.float().unbind(1)):
        top, left = divmod(tap, 3)
        lines = slice(top, top + stride * (height - 1) + 1, stride)
        columns = slice(left, left + stride * (width - 1) + 1, stride)
        y = y + F.linear(read[:, lines, columns], of_tap) * read_scale[:, lines, columns]
    y = y * scale
    return (y if bias is None else y + bias.float()).to(x.dtype).permute(0, 3, 1, 2).contiguous()


def _enlarged(x: Tensor, size: list[int] | None) -> Tensor:
    """x [B, h, w, C] -> [B, *size, C]."""
    if size is None:
        return x
    lines, columns = (torch.arange(n, device=x.device) // 2 for n in size)
    return x[:, lines][:, :, columns]


@_named(lambda x, weight, bias: (x.shape[0], weight.shape[0], *x.shape[2:]))
def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, I, H, W], weight [O, I, 1, 1] -> [B, O, H, W]."""
    return F.conv2d(x, weight, bias)


@_named(_same)
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """x [B, C, H, W] -> [B, C, H, W] (Wu & He 2018)."""
    return F.group_norm(x, groups, weight, bias, eps)


@_named(_same)
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU after group_norm, the pair that opens every convolution of a ResNet block."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@_named(_same)
def shifted_group_norm_silu(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """group_norm_silu of x + shift, where shift [B, C] is the same for every pixel: how a timestep enters."""
    return F.silu(F.group_norm(x + shift[:, :, None, None], groups, weight, bias, eps))


def normalised(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Whichever of the three above is asked for: x [B, C, H, W], shift [B, C]; with a shift, SiLU follows."""
    if shift is not None:
        return shifted_group_norm_silu(x, shift, weight, bias, groups, eps)
    op = group_norm_silu if silu else group_norm
    return op(x, weight, bias, groups, eps)


@_named(_same)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., C], normalised over C."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@_named(_same)
def relu(x: Tensor) -> Tensor:
    """x [B, C, H, W], what is below zero as zero."""
    return F.relu(x)


@_named(_same)
def add(x: Tensor, branch: Tensor) -> Tensor:
    """x and the branch that left it, of one shape: the addition that ends a residual block."""
    return x + branch


@_named(_same)
def add_scaled(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """x [B, C, H, W], branch the same or [B, C, 1, 1], scale [B, 1] -> x + scale · branch, each row by its
    own scale."""
    return x + branch * scale[:, :, None, None]


@_named(lambda x: (*x.shape[:2], 1, 1))
def mean_of_pixels(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> the mean of each channel, [B, C, 1, 1]."""
    return x.mean(dim=(2, 3), keepdim=True)


@_named(_same)
def scale_channels(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, C], tokens [B, N, C] or an image [B, C, H, W], scale [B or 1, C or 1]: each row's channels by its
    own."""
    if x.dim() == 4:
        return x * scale[:, :, None, None]
    return x * (scale if x.dim() == 2 else scale[:, None])


@_named(lambda x, y: (x.shape[0], x.shape[1] + y.shape[1], *x.shape[2:]))
def concat_channels(x: Tensor, y: Tensor) -> Tensor:
    """x [B, C, H, W], y [B, D, H, W] -> [B, C + D, H, W]."""
    return torch.cat([x, y], dim=1)


@_named(_same)
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, upcast: bool) -> Tensor:
    """q [B, N, C], k and v [B, L, C] -> [B, N, C]: softmax(q kᵀ / √d) v in each of `heads` slices of C.

    With `upcast` in float32 whatever the dtype, for checkpoints whose scores overflow float16.
    """
    return attention_by(F.scaled_dot_product_attention, q, k, v, heads, upcast)


@_named(lambda x, weight, *_: (*x.shape[:-1], weight.shape[0] // 3))
def self_attention(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, upcast: bool) -> Tensor:
    """x [B, N, I], weight [3 C, I], bias [3 C] -> [B, N, C]: attention of x to itself.

    The weight and the bias are those of q, then of k, then of v.
    """
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    return attention_by(F.scaled_dot_product_attention, q, k, v, heads, upcast)


def attention_by(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, heads: int, upcast: bool) -> Tensor:
    """What `attention` does, its heads computed by `kernel`."""
    shape = (q.shape[0], -1, heads, q.shape[2] // heads)
    queries, keys, values = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))  # [B, heads, N or L, d]
    if upcast:
        queries, keys, values = queries.float(), keys.float(), values.float()
    out = kernel(queries, keys, values)
    return out.transpose(1, 2).flatten(2).to(q.dtype)


@_named(lambda x: (*x.shape[:-1], x.shape[-1] // 2))
def geglu(x: Tensor) -> Tensor:
    """x [..., 2 F] -> [..., F]: first half × GELU(second half), the exact GELU (Shazeer 2020)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., I], weight [2 F, I], bias [2 F] -> [..., F]: `geglu` of `linear`."""
    return geglu(linear(x, weight, bias))


@_named(lambda x, like: (*x.shape[:2], *like.shape[2:]))
def upsample_nearest(x: Tensor, like: Tensor) -> Tensor:
    """x [B, C, h, w], like [..., H, W] -> [B, C, H, W]."""
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")


@_named(lambda x: (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
def upsample_twice(x: Tensor) -> Tensor:
    """x [B, C, h, w] -> [B, C, 2 h, 2 w]: each pixel four times."""
    return F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="nearest")


@_named(lambda x: (x.shape[0], x.shape[2] * x.shape[3], x.shape[1]))
def tokens_from_image(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> [B, H W, C]."""
    return x.flatten(2).transpose(1, 2).contiguous()


@_named(lambda x, like: like.shape)
def image_from_tokens(x: Tensor, like: Tensor) -> Tensor:
    """x [B, H W, C], like [B, C, H, W] -> [B, C, H, W]."""
    return x.transpose(1, 2).reshape(like.shape).contiguous()
