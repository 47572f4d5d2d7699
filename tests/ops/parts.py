"""Parts of random models, and the error measure for quantized kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from farthing.ops.weights import Weight, quantize_int4, quantize_int8


def distance(x: Tensor, y: Tensor) -> float:
    """1 - 2 x·y / (x·x + y·y) in float64: 0 if equal, about half the squared relative error."""
    x, y = x.double(), y.double()
    total = (x * x).sum() + (y * y).sum()
    return float(1 - 2 * (x * y).sum() / total) if total > 0 else 0.0


# Error bound per storage format, from int8 activations and float sums in another order.
BOUNDS = {"f32": 1e-10, "bf16": 1e-9, "fp8": 1e-9, "int8": 1e-4, "int4": 1e-4, "int4_zero": 1e-4}
FORMATS = list(BOUNDS)


def weight(name: str, n: int, k: int, group: int = 32) -> Weight:
    """A random matrix [n, k] of about unit gain in a storage format."""
    w = torch.randn(n, k) / k**0.5
    if name == "f32":
        return Weight("dense", w)
    if name == "bf16":
        return Weight("dense", w.bfloat16())
    if name == "int8":
        return quantize_int8(w)
    if name == "fp8":
        scale = torch.rand((n + 127) // 128, (k + 127) // 128) + 0.5
        return Weight("fp8", (w * 16).to(torch.float8_e4m3fn), scale / 16)
    w4 = quantize_int4(w, group)
    if name == "int4":
        return w4
    assert w4.scale is not None
    return Weight("int4", w4.data, w4.scale, torch.randint(-4, 5, w4.scale.shape, dtype=torch.int8))
