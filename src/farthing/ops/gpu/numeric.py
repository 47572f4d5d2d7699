"""What the hardware does by itself and Triton's interpreter does not: the only place that tells them apart.

The interpreter (TRITON_INTERPRET=1, NumPy on a CPU) multiplies bfloat16 as integers, takes an integer's bits
for a bfloat16 number, and truncates where the hardware rounds. So there, products are taken in float32, which
holds every product of two bfloat16 or FP8 numbers exactly, and rounding is arithmetic on bits. On a GPU each
helper is one instruction.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton import knobs

# From 3.10 on Triton fuses products and sums only where it is told to; scaled sums are made of both.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED: bool = knobs.runtime.interpret
_INTERPRET = tl.constexpr(INTERPRETED)
LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores, asynchronous copies
FP8_MAX = tl.constexpr(448.0)
LEAST_AMAX = tl.constexpr(1e-4)  # of a group of activations (DeepSeek-V3's own quantizer)


@triton.jit
def dot(a, b, acc):
    """acc [M, N] float32 + a [M, K] b [K, N]; float32 operands are not rounded to TF32."""
    if _INTERPRET:
        result = acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x as `dtype` (float32, bfloat16 or float8e4nv), rounded to nearest even; |x| <= 448 for FP8."""
    if _INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        if dtype == tl.bfloat16:
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
            result = rounded.to(tl.bfloat16, bitcast=True)
        elif dtype == tl.float8e4nv:
            size = bits & 0x7FFFFFFF
            normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # the exponent's bias: 127 to 7
            # Below 2^-6 the steps are 2^-9; adding 2^23 leaves no bits behind the point.
            small = ((tl.abs(x) * 512.0 + 8388608.0) - 8388608.0).to(tl.uint32)
            code = tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 31) << 7)
            result = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        else:
            result = x.to(dtype)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x (8-bit integers, FP8, or a float no wider than it) as `dtype`, exactly."""
    if _INTERPRET:
        result = narrow(x.to(tl.float32), dtype)
    elif x.dtype == tl.float8e4nv:
        # FP8 is opened as float16, and from there to bfloat16 is an instruction of an eighth of the rate.
        result = x.to(tl.float32).to(dtype)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def round_half_even(x):
    """float32 |x| < 2^22 to the nearest integer, still float32."""
    return (x + 12582912.0) - 12582912.0  # 1.5 x 2^23: what is behind the point has no room


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))
