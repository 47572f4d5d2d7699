"""Arithmetic that Triton's interpreter does differently from the hardware; all special cases are here.

The interpreter (TRITON_INTERPRET=1, NumPy on a CPU) multiplies bfloat16 as integers, interprets an integer's
bits as bfloat16, and truncates where the hardware rounds. When interpreting, products therefore use float32,
which represents every product of two bfloat16 or FP8 numbers exactly, and rounding uses bit arithmetic. On a
GPU each helper is one instruction.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton import knobs

# Since 3.10 Triton fuses multiply-adds only on request; scaled sums need them.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED: bool = knobs.runtime.interpret
_INTERPRET = tl.constexpr(INTERPRETED)
LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores, asynchronous copies
FP8_MAX = tl.constexpr(448.0)
LEAST_AMAX = tl.constexpr(1e-4)  # minimum amax of an activation group (as in DeepSeek-V3's quantizer)


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
            normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # exponent bias 127 to 7
            # Below 2^-6 the step is 2^-9; adding 2^23 leaves no fractional bits.
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
        # FP8 converts to float16; float16 to bfloat16 runs at an eighth of the rate.
        result = x.to(tl.float32).to(dtype)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def round_half_even(x):
    """float32 |x| < 2^22 rounded to the nearest integer, as float32."""
    return (x + 12582912.0) - 12582912.0  # 1.5 x 2^23 leaves no room for fractional bits


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))
