"""The product and epilogue of one tile for every storage format, shared by dense, grouped, sparse GEMMs.

Legend: BM x BN the tile size; K input columns; BK columns per iteration. x rows are given individually, so
that a grouped product can gather its tokens on load.

Accumulation is float32. FP8 follows DeepGEMM: the tensor cores sum 128 columns, then the partial sum is
scaled and added in a separate register, because the tensor cores' accumulator keeps only about 14 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farthing.ops.gpu.numeric import dot, narrow, widen

DENSE = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
FP8 = tl.constexpr(3)
_BLOCK = tl.constexpr(128)  # rows and columns of an FP8 scale


@triton.jit
def product(
    x, rows, live, x_scale, w, w_scale, w_zero, n, N, K,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HAS_ZERO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x rows [BM] (element offsets, int64; x_scale of FP8: by row number) times w rows n [BN], transposed.

    live [BM]: rows that exist. For FP8 `rows` counts rows of K columns each.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if FORMAT == INT4:
        acc = _int4(acc, x, rows, live, w, w_scale, w_zero, n, N, K, GROUP, HALF, HAS_ZERO)
    elif FORMAT == FP8:
        acc = _fp8(acc, x, rows, live, x_scale, w, w_scale, n, N, K)
    else:
        wide = w + n.to(tl.int64)[None, :] * K
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            a = tl.load(x + rows[:, None] + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
            b = tl.load(wide + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
            acc = dot(a, widen(b, a.dtype), acc)
        if FORMAT == INT8:
            acc = acc * tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
    return acc


@triton.jit
def _int4(
    acc, x, rows, live, w, w_scale, w_zero, n, N, K,
    GROUP: tl.constexpr, HALF: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    runs = (K + 2 * HALF - 1) // (2 * HALF)
    groups = (K + 2 * GROUP - 1) // (2 * GROUP) * 2
    j = tl.arange(0, HALF)
    wide = w + n.to(tl.int64)[None, :] * (runs * HALF)
    ok = n < N
    for run in range(0, runs):
        codes = tl.load(wide + run * HALF + j[:, None], mask=ok[None, :], other=0x88)
        for high in tl.static_range(2):
            start = run * 2 * HALF + high * HALF
            k = start + j
            a = tl.load(x + rows[:, None] + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
            code = (codes >> 4) if high else (codes & 15)
            q = code.to(tl.int8) - 8
            where = n * groups + start // GROUP
            if HAS_ZERO:
                q = q - tl.load(w_zero + where, mask=ok, other=0)[None, :]
            scale = tl.load(w_scale + where, mask=ok, other=0.0)
            part = dot(a, widen(q, a.dtype), tl.zeros_like(acc))
            acc += part * scale[None, :]
    return acc


@triton.jit
def _fp8(acc, x, rows, live, x_scale, w, w_scale, n, N, K):
    blocks = (K + _BLOCK - 1) // _BLOCK
    j = tl.arange(0, _BLOCK)
    wide = w + n.to(tl.int64)[None, :] * K
    scales = w_scale + tl.min(n, 0) // _BLOCK * blocks  # a tile of at most 128 rows is in one scale block
    for block in range(0, blocks):
        # Issue plain memory loads before the product that waits for the tensor cores.
        scale = tl.load(x_scale + rows * blocks + block, mask=live, other=0.0) * tl.load(scales + block)
        k = block * _BLOCK + j
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
        b = tl.load(wide + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        acc += dot(a, b, tl.zeros_like(acc)) * scale[:, None]
    return acc


@triton.jit
def fp8_twice(x, rows, live, x_scale, w, w_scale, n, far, N, M, K, BM: tl.constexpr, BN: tl.constexpr):
    """x rows [BM] times w rows n [BN] that are less than N, and times rows n + far where n is less than M.

    The input is loaded once for both: two tiles of 128 rows read a quarter less from L2 than as two programs,
    and while one warp group accumulates its first tile, the other uses the tensor cores. Each tile is in one
    scale block.
    """
    blocks = (K + _BLOCK - 1) // _BLOCK
    j = tl.arange(0, _BLOCK)
    near = w + n.to(tl.int64)[None, :] * K
    step = tl.cast(far, tl.int64) * K
    start = tl.min(n, 0)
    scales = w_scale + start // _BLOCK * blocks
    scale_step = (far + _BLOCK - 1) // _BLOCK * blocks
    first = tl.zeros((BM, BN), tl.float32)
    second = tl.zeros((BM, BN), tl.float32)
    for block in range(0, blocks):
        x_s = tl.load(x_scale + rows * blocks + block, mask=live, other=0.0)
        s = tl.load(scales + block)
        t = tl.load(scales + scale_step + block, mask=start < M, other=0.0)
        k = block * _BLOCK + j
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
        b = tl.load(near + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        c = tl.load(near + step + k[:, None], mask=(n[None, :] < M) & (k[:, None] < K), other=0.0)
        first += dot(a, b, tl.zeros_like(first)) * (x_s * s)[:, None]
        second += dot(a, c, tl.zeros_like(second)) * (x_s * t)[:, None]
    return first, second


@triton.jit
def finish(
    acc, m, n, T, N, scale, residual, out, stride_r, stride_o,
    HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out [T, N] at rows m, columns n = residual + scale [N] * acc."""
    if HAS_SCALE:
        acc = acc * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    mask = (m[:, None] < T) & (n[None, :] < N)
    rows = m.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + rows * stride_r + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * stride_o + n[None, :], narrow(acc, out.dtype.element_ty), mask=mask)
