"""ONNX Runtime's fused operators in numpy, so that their graphs run without a GPU.

Written from the operators' documentation, and stricter than that: what a CUDA kernel does not take is an
error here too. The arithmetic is float32, the results are of the inputs' dtype.
"""

import math
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[np.float64])(x).astype(np.float32)


def _gelu(x: Any) -> Any:
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def _single(*arrays: Any) -> list[Any]:
    return [None if array is None else array.astype(np.float32) for array in arrays]


class Operator(OpRun):
    op_domain = "com.microsoft"


class FusedMatMul(Operator):
    def _run(self, a, b, transA=None, transB=None, alpha=None, **_):
        x, y = _single(a, b)
        assert not transA
        return (((alpha or 1.0) * (x @ (y.T if transB else y))).astype(a.dtype),)


class NhwcConv(Operator):
    def _run(self, x, w, b=None, kernel_shape=None, strides=None, pads=None, **_):
        """x [B, H, W, I], w [O, h, w, I]; pads: top, left, bottom, right."""
        image, filters, bias = _single(x, w, b)
        assert list(w.shape[1:3]) == list(kernel_shape)
        assert x.shape[3] == w.shape[3]
        (sy, sx), (top, left, bottom, right) = strides or (1, 1), pads or (0, 0, 0, 0)
        padded = np.pad(image, ((0, 0), (top, bottom), (left, right), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel_shape), axis=(1, 2))
        result = np.einsum("byxihw,ohwi->byxo", windows[:, ::sy, ::sx], filters, optimize=True)
        return ((result if bias is None else result + bias).astype(x.dtype),)


def _group_norm(x: Any, gamma: Any, beta: Any, groups: int, epsilon: float, activation: int) -> Any:
    assert gamma.dtype == beta.dtype == np.float32
    batch, height, width, channels = x.shape
    assert channels % groups == 0
    assert groups <= 32
    assert channels // groups % 2 == 0
    grouped = x.reshape(batch, height * width, groups, -1)
    mean, variance = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
    return y / (1 + np.exp(-y)) if activation else y


class GroupNorm(Operator):
    def _run(self, x, gamma, beta, groups=None, epsilon=None, activation=None, channels_last=None):
        assert channels_last == 1
        y = _group_norm(x.astype(np.float32), gamma, beta, groups, epsilon, activation)
        return (y.astype(x.dtype),)


class SkipGroupNorm(Operator):
    def _run(
        self,
        x,
        gamma,
        beta,
        skip,
        bias=None,
        groups=None,
        epsilon=None,
        activation=None,
        channels_last=None,
    ):
        assert channels_last == 1
        assert skip.shape in (x.shape, (x.shape[0], x.shape[3]))
        first, second, addend = _single(x, skip, bias)
        total = first + (second if second.ndim == 4 else second[:, None, None, :])
        total = (total if addend is None else total + addend).astype(x.dtype)
        y = _group_norm(total.astype(np.float32), gamma, beta, groups, epsilon, activation)
        return (y.astype(x.dtype), total)[: len(self.onnx_node.output)]


class MultiHeadAttention(Operator):
    def _run(self, query, key=None, value=None, *_, num_heads=None, **__):
        """query [B, N, C], key and value [B, L, C], or query [B, N, heads, 3, d] alone."""
        if key is None:
            assert query.dtype == np.float16
            assert query.shape[2:4] == (num_heads, 3)
            q, k, v = (query[:, :, :, i].astype(np.float32).swapaxes(1, 2) for i in range(3))
        else:
            q, k, v = (
                t.astype(np.float32).reshape(*t.shape[:2], num_heads, -1).swapaxes(1, 2)
                for t in (query, key, value)
            )
        scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max(axis=3, keepdims=True))
        out = (weights / weights.sum(axis=3, keepdims=True)) @ v
        return (out.swapaxes(1, 2).reshape(*query.shape[:2], -1).astype(query.dtype),)


class BiasSplitGelu(Operator):
    def _run(self, x, bias):
        assert x.ndim == 3
        assert x.shape[2] in (2560, 5120, 10240)
        value, gate = np.split(x.astype(np.float32) + bias.astype(np.float32), 2, axis=2)
        return ((value * _gelu(gate)).astype(x.dtype),)


class BiasAdd(Operator):
    def _run(self, x, bias, skip):
        assert x.ndim == 3
        assert x.shape == skip.shape
        assert x.shape[2] in (320, 640, 1280)
        return (sum(_single(x, bias, skip)).astype(x.dtype),)


class QuickGelu(Operator):
    def _run(self, x, alpha=None):
        y = x.astype(np.float32)
        return ((y / (1 + np.exp(-alpha * y))).astype(x.dtype),)


class Gelu(OpRun):
    """The standard operator: onnx's own evaluator rounds every step of it to float16."""

    op_domain = ""

    def _run(self, x, approximate=None):
        assert approximate in (None, "none")
        return (_gelu(x.astype(np.float32)).astype(x.dtype),)


class LayerNormalization(OpRun):
    """The standard operator, over the last axis: statistics in float32, as `stash_type` asks."""

    op_domain = ""

    def _run(self, x, scale, bias, axis=None, epsilon=None, stash_type=None):
        assert axis == -1
        y, gamma, beta = _single(x, scale, bias)
        mean, variance = y.mean(axis=-1, keepdims=True), y.var(axis=-1, keepdims=True)
        return (((y - mean) / np.sqrt(variance + epsilon) * gamma + beta).astype(x.dtype),)


class InstanceNormalization(OpRun):
    """The standard operator: its kernels' statistics are float32, those of onnx's own evaluator float16."""

    op_domain = ""

    def _run(self, x, scale, bias, epsilon=None):
        y, gamma, beta = (a[..., None] if a.ndim == 1 else a for a in _single(x, scale, bias))
        assert y.ndim == 3
        mean, variance = y.mean(axis=-1, keepdims=True), y.var(axis=-1, keepdims=True)
        return (((y - mean) / np.sqrt(variance + epsilon) * gamma + beta).astype(x.dtype),)


class Resize(OpRun):
    """The standard operator, nearest from above and left: onnx's own evaluator goes pixel by pixel."""

    op_domain = ""

    def _run(self, x, roi=None, scales=None, sizes=None, **attributes):
        assert attributes["coordinate_transformation_mode"] == "asymmetric"
        assert attributes["nearest_mode"] == "floor"
        for axis, size in enumerate(x.shape):
            target = int(size * scales[axis]) if sizes is None else int(sizes[axis])
            x = np.take(x, np.arange(target) * size // target, axis=axis)
        return (x,)


OPERATORS = [
    FusedMatMul,
    NhwcConv,
    GroupNorm,
    SkipGroupNorm,
    MultiHeadAttention,
    BiasSplitGelu,
    BiasAdd,
    QuickGelu,
    Gelu,
    LayerNormalization,
    InstanceNormalization,
    Resize,
]
