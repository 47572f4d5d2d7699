"""RMSNorm, fused with the quantization of its output.

Legend: T tokens; K columns. One program per token: the row is read once, kept in registers, written once.
FP8 groups of 128 columns as in DeepSeek-V3 section 3.3 (scale = max(amax, 1e-4) / 448).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.gpu.numeric import FP8_MAX, LEAST_AMAX, narrow

GROUP = 128


@triton.jit
def _rms_norm(x, weight, out, stride, K, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    v = tl.load(x + row * stride + k, mask=mask, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / K + eps) * tl.load(weight + k, mask=mask, other=0.0)
    tl.store(out + row * K + k, narrow(v, out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_quantize(
    x, weight, out, scale, stride, K, eps, NORM: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    groups = (K + WIDTH - 1) // WIDTH
    g = tl.arange(0, GROUPS)
    k = g[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [GROUPS, WIDTH]
    mask = k < K
    v = tl.load(x + row * stride + k, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(v * v, 1), 0) / K
        v = v * tl.rsqrt(mean + eps) * tl.load(weight + k, mask=mask, other=0.0)
    s = tl.maximum(tl.max(tl.abs(v), 1), LEAST_AMAX) / FP8_MAX  # [GROUPS]
    q = tl.clamp(v / s[:, None], -FP8_MAX, FP8_MAX)
    tl.store(out + row * K + k, narrow(q, tl.float8e4nv), mask=mask)
    tl.store(scale + row * groups + g, s, mask=g < groups)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, K], weight [K] float32 -> [T, K] in x's dtype."""
    tokens, k = x.shape
    out = torch.empty(tokens, k, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(k)
    if tokens:
        _rms_norm[(tokens,)](x, weight, out, x.stride(0), k, eps, BLOCK=block, num_warps=_warps(block))
    return out


def quantize(x: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """x [T, K], normed first if a weight is given -> FP8 [T, K], scales float32 [T, ceil(K / 128)]."""
    tokens, k = x.shape
    groups = triton.cdiv(k, GROUP)
    out = torch.empty(tokens, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(groups)
    if tokens:
        _norm_quantize[(tokens,)](
            x, weight, out, scale, x.stride(0), k, eps,
            NORM=weight is not None, GROUPS=padded, WIDTH=GROUP, num_warps=_warps(padded * GROUP),
        )  # fmt: skip
    return out, scale


def _warps(width: int) -> int:
    return min(16, max(1, width // 1024))
