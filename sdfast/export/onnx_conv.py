"""3×3 convolutions by fewer multiplications than their definition has, in standard ONNX operators.

Both are the same sums in another order: exact but for rounding.
"""

from functools import partial

import numpy as np
import onnx_ir

from sdfast.export.onnx_graph import Array, Graph, Value

# Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016): a 4 × 4 tile of the result from a 6 × 6 tile
# of x by 36 multiplications in place of 144. The points 0, ±3/4, ±3/2, ∞ halve the rounding error of the
# usual 0, ±1, ±2, ∞ (how points set the error: Barabasz et al. 2020).
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
TILE = 4


def toom_cook() -> tuple[Array, Array, Array]:
    """Matrices A [6, 4], G [6, 3], B [6, 6]: result = Aᵀ ((G w) · (B x)) is w, three taps, along six of x."""
    n = len(POINTS)
    rest = [[p for p in POINTS if p != point] for point in POINTS]
    scale = np.array(
        [np.prod([point - p for p in others]) for point, others in zip(POINTS, rest, strict=True)]
    )
    infinity = np.eye(1, n)[:, ::-1]
    A = np.vstack([np.vander(POINTS, TILE, increasing=True), infinity[:, n - TILE :]])
    G = np.vstack([np.vander(POINTS, 3, increasing=True) / scale[:, None], infinity[:, n - 3 :]])
    B = np.array([[*np.poly(others)[::-1], 0] for others in rest] + [np.poly(POINTS)[::-1]])
    return A, G, B


def winograd_pays(x: Value, weight: Value) -> bool:
    """Whether it is faster than a convolution: measured, for float32 from 16 × 16 pixels and 128 channels on.

    Its weights are four times as large and its tiles twice as large as x, so pictures of many megabytes go
    without. Of images of unknown size only those of the U-Nets' two outer levels are sure to be large.
    """
    (outputs, inputs), (height, width) = weight.shape[:2], x.shape[2:]
    if x.dtype != onnx_ir.DataType.FLOAT or min(outputs, inputs) < 128:
        return False
    if not isinstance(height, int) or not isinstance(width, int):
        return bool(min(outputs, inputs) >= 320 and outputs * inputs <= 640 * 1280)
    return bool(min(height, width) >= 16 and inputs * height * width <= 2**25)


def winograd(g: Graph, x: Value, weight: Value, bias: Value | None) -> Value:
    A, G, B = toom_cook()
    outputs, inputs = weight.shape[:2]
    (batch,), (height, width) = g.sizes(x, 0, 1), g.sizes(x, 2, 4)
    # Both transforms of x at once: 36 fixed filters over every channel as an image of its own.
    filters = g.constant(np.kron(B, B).reshape(36, 1, 6, 6).astype(np.float32))
    planes = g.reshape(x, -1, 1, height, width)
    tiles = g.Conv(planes, filters, kernel_shape=[6, 6], strides=[TILE, TILE], pads=[1, 1, TILE, TILE])
    tiles = g.Transpose(g.reshape(tiles, batch, inputs, 36, -1), perm=[2, 1, 0, 3])  # [36, I, B, tiles]
    product = g.MatMul(
        g.transformed(weight, "winograd", (36, outputs, inputs), lambda w: _winograd_weight(G, w)),
        g.Reshape(tiles, g.ints(36, inputs, -1)),
    )  # [36, O, B tiles]
    back = g.constant(np.kron(A.T, A.T).astype(np.float32))
    rows, columns = _tiles(g, height), _tiles(g, width)
    result = g.MatMul(back, g.Reshape(product, g.ints(36, -1)))
    # To pixels in two steps, which ONNX Runtime does by whole runs of memory, in a third of the time of one.
    result = g.Transpose(g.Reshape(result, g.ints(TILE, TILE, -1)), perm=[0, 2, 1])
    across = _times(g, columns, TILE)
    result = g.reshape(result, TILE, outputs, -1, rows, across)
    result = g.Transpose(result, perm=[2, 1, 3, 0, 4])  # [B, O, rows, 4, 4 columns]
    result = g.reshape(result, batch, outputs, _times(g, rows, TILE), across)
    result = _crop(g, result, height, width)
    return result if bias is None else g.Add(result, g.Reshape(bias, g.ints(-1, 1, 1)))


def _winograd_weight(G: Array, weight: Array) -> Array:
    """[O, I, 3, 3] float32 -> [36, O, I] float32."""
    flat = weight.reshape(-1, 9).astype(np.float64)
    return (np.kron(G, G) @ flat.T).astype(np.float32).reshape(36, *weight.shape[:2])


def _tiles(g: Graph, size: int | Value) -> int | Value:
    if isinstance(size, int):
        return -(-size // TILE)
    return g.Div(g.Add(size, g.ints(TILE - 1)), g.ints(TILE))


def _times(g: Graph, size: int | Value, factor: int) -> int | Value:
    return size * factor if isinstance(size, int) else g.Mul(size, g.ints(factor))


def _crop(g: Graph, x: Value, height: int | Value, width: int | Value) -> Value:
    """The last tiles may reach over the edge."""
    if isinstance(height, int) and isinstance(width, int) and height % TILE == 0 == width % TILE:
        return x
    ends = [g.ints(s) if isinstance(s, int) else s for s in (height, width)]
    return g.Slice(x, g.ints(0, 0), g.Concat(*ends, axis=0), g.ints(2, 3))


# Of an image that was enlarged twice by repeating its pixels, three rows of taps read two rows of the small
# image: the upper two read the same one for odd rows of the result, and the lower two for even rows. So each
# of the result's four phases is a 2×2 convolution of the small image: 4 multiplications in place of 9.
PHASES = (np.array([[1, 0, 0], [0, 1, 1]]), np.array([[1, 1, 0], [0, 0, 1]]))  # [taps of the small, taps]


def of_enlarged(g: Graph, x: Value, weight: Value, bias: Value | None) -> Value:
    """The convolution, with a pixel of zeros around, of x [B, I, h, w] enlarged twice: [B, O, 2 h, 2 w]."""
    outputs, inputs = weight.shape[:2]
    rows = []
    for a in (0, 1):
        row = []
        for b in (0, 1):
            taps = partial(_phase_weight, a, b)
            phase = g.transformed(weight, f"phase_{a}{b}", (outputs, inputs, 2, 2), taps)
            given = [x, phase] if bias is None else [x, phase, bias]
            pixels = g.Conv(*given, kernel_shape=[2, 2], pads=[1 - a, 1 - b, a, b])  # [B, O, h, w]
            row.append(g.Unsqueeze(pixels, g.ints(-1)))
        # Side by side along the width, then rows above one another: each a copy of whole runs of memory.
        rows.append(g.reshape(g.Concat(*row, axis=-1), 0, 0, 0, -1))  # [B, O, h, 2 w]
    [width] = g.sizes(x, 3, 4)
    return g.reshape(g.Concat(*rows, axis=-1), 0, outputs, -1, _times(g, width, 2))


def _phase_weight(a: int, b: int, weight: Array) -> Array:
    """[O, I, 3, 3] -> [O, I, 2, 2] of the result's rows 2 i + a and columns 2 j + b."""
    taps: Array = np.einsum("pu,oiuv,qv->oipq", PHASES[a], weight.astype(np.float64), PHASES[b])
    return taps.astype(weight.dtype)
