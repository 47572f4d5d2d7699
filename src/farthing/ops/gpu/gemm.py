"""The dense product y = residual + x W^T, W in any storage format.

Legend: T tokens; N output rows; K input columns; BM x BN the tile size.

Programs are ordered in groups of tile rows, so that concurrent programs share weights and inputs in L2. FP8
inputs are normed (if there is a norm) and quantized in one separate pass before the product.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.gpu.launch import Config, processors, product_config
from farthing.ops.gpu.matrix import FORMATS, Matrix
from farthing.ops.gpu.normalize import quantize, rms_norm
from farthing.ops.gpu.sparse import Blocks, TwoOfFour, multiply
from farthing.ops.gpu.tile import finish, fp8_twice, product
from farthing.ops.weights import FP8_BLOCK

Part = Matrix | TwoOfFour | Blocks
_LEAST_COLUMNS = 16
_TOGETHER = 8  # tile rows per group of programs


@triton.jit
def _gemm(
    x, x_scale, w, w_scale, w_zero, residual, out, T, N, K, stride_x, stride_r, stride_o,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, TOGETHER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    down, across = tl.cdiv(T, BM), tl.cdiv(N, 2 * BN if TWICE else BN)
    first = pid // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    m = (first + pid % (TOGETHER * across) % height) * BM + tl.arange(0, BM)
    n = pid % (TOGETHER * across) // height * (2 * BN if TWICE else BN) + tl.arange(0, BN)
    live = m < T
    rows = m.to(tl.int64) * stride_x  # FP8: stride_x is 1, rows are counted
    if TWICE:
        acc, more = fp8_twice(x, rows, live, x_scale, w, w_scale, n, BN, N, N - BN, K, BM, BN)
        finish(more, m, n + BN, T, N, None, residual, out, stride_r, stride_o, False, HAS_RESIDUAL)
    else:
        acc = product(
            x, rows, live, x_scale, w, w_scale, w_zero, n, N, K, FORMAT, GROUP, HALF, HAS_ZERO, BM, BN, BK
        )
    finish(acc, m, n, T, N, None, residual, out, stride_r, stride_o, False, HAS_RESIDUAL)


def narrowed(c: Config, rows: int, columns: int, processors: int) -> Config:
    """Choose tiles narrow enough to occupy most multiprocessors: with few rows, latency dominates."""
    bn = c.bn
    while bn > _LEAST_COLUMNS and 2 * triton.cdiv(rows, c.bm) * triton.cdiv(columns, bn) <= processors:
        bn //= 2
    return replace(c, bn=bn)


def gemm(
    x: Tensor, weight: Matrix, out: Tensor, x_scale: Tensor | None = None, residual: Tensor | None = None,
    choice: Config | None = None,
) -> None:  # fmt: skip
    """out [T, N] = residual + x [T, K] W^T; if W is FP8, x is contiguous FP8 with x_scale."""
    tokens = x.shape[0]
    fp8 = weight.format == "fp8"
    c = choice or narrowed(
        product_config("gemm", weight.format, x.dtype, tokens, x.device), tokens, weight.n,
        processors(x.device),
    )  # fmt: skip
    grid = (triton.cdiv(tokens, c.bm) * triton.cdiv(weight.n, c.bn),)
    twice = fp8 and c.bn > FP8_BLOCK
    _gemm[grid](
        x, x_scale, weight.data, weight.scale, weight.zero, residual, out, tokens, weight.n, weight.k,
        1 if fp8 else x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        FORMAT=FORMATS[weight.format], GROUP=weight.group or 1, HALF=weight.half or 1,
        HAS_ZERO=weight.zero is not None, HAS_RESIDUAL=residual is not None, TOGETHER=_TOGETHER,
        BM=c.bm, BN=c.bn // 2 if twice else c.bn, BK=c.bk, TWICE=twice, **c.resources,
    )  # fmt: skip


def linear(
    x: Tensor, parts: list[Part], norm: Tensor | None, eps: float, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x [T, K] -> [T, sum of N] in `dtype`: residual + rms_norm(x) W^T, W in parts along its rows."""
    tokens = x.shape[0]
    out = torch.empty(tokens, sum(m.n for m in parts), dtype=dtype, device=x.device)
    if not tokens:
        return out
    plain = scaled = None
    if not all(_is_fp8(m) for m in parts):
        plain = x if norm is None else rms_norm(x, norm, eps)
        first = parts[0]
        if isinstance(first, Matrix) and first.inputs is not None:  # then every part has the same range
            plain = to_integers(plain, first.inputs)
    if any(_is_fp8(m) for m in parts):
        scaled = quantize(x, norm, eps)
    start = 0
    for m in parts:
        columns = slice(start, start + m.n)
        part = None if residual is None else residual[:, columns]
        if not isinstance(m, Matrix):
            assert plain is not None
            multiply(plain, m, out[:, columns], part)
        elif m.format == "fp8":
            assert scaled is not None
            gemm(scaled[0], m, out[:, columns], scaled[1], part)
        else:
            assert plain is not None
            gemm(plain, m, out[:, columns], None, part)
        start += m.n
    return out


def to_integers(x: Tensor, scale: Tensor) -> Tensor:
    """x quantized with a calibrated scale, as integers in [-128, 127] of x's dtype."""
    return (x.float() / scale).round().clamp(-128, 127).to(x.dtype)


def _is_fp8(part: Part) -> bool:
    return isinstance(part, Matrix) and part.format == "fp8"
