"""Matrix products on a GPU: dense ones, and gated MLPs of many experts with tokens sorted by expert.

Legend: T tokens; N output rows; K input columns; BM x BN the tile size.

Programs are ordered in groups of tile rows, so that concurrent programs share weights and inputs in L2. FP8
inputs are normed (if there is a norm) and quantized in one separate pass before the product.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import Norm
from farthing.ops.specs import SILU, Gate
from farthing.ops.weights import FP8_BLOCK
from farthing_gpu.launch import FP8_MAX, LEAST_AMAX, Config, gated, narrow, processors, product_config
from farthing_gpu.matrix import FORMATS, FP8, Matrix, finish, fp8_twice, product
from farthing_gpu.sample import quantize, rms_norm
from farthing_gpu.sparse import Blocks, TwoOfFour, multiply
from farthing_gpu.sparse import find as find  # for the backend

Part = Matrix | TwoOfFour | Blocks
_LEAST_COLUMNS = 16
_TOGETHER = 8  # tile rows per group of programs


@triton.jit
def _gemm(
    x, x_scale, x_order, w, w_scale, w_zero, residual, out, T, N, K, stride_x, stride_r, stride_o,
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
            x, rows, live, x_scale, x_order, w, w_scale, w_zero, n, N, K, FORMAT, GROUP, HALF, HAS_ZERO,
            BM, BN, BK,
        )  # fmt: skip
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
        x, x_scale, weight.order, weight.data, weight.scale, weight.zero, residual, out, tokens, weight.n,
        weight.k,
        1 if fp8 else x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        FORMAT=FORMATS[weight.format], GROUP=weight.group or 1, HALF=weight.half or 1,
        HAS_ZERO=weight.zero is not None, HAS_RESIDUAL=residual is not None, TOGETHER=_TOGETHER,
        BM=c.bm, BN=c.bn // 2 if twice else c.bn, BK=c.bk, TWICE=twice, **c.resources,
    )  # fmt: skip


def linear(
    x: Tensor, parts: list[Part], norm: Norm | None, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x [T, K] -> [T, sum of N] in `dtype`: residual + rms_norm(x) W^T, W in parts along its rows."""
    tokens = x.shape[0]
    out = torch.empty(tokens, sum(m.n for m in parts), dtype=dtype, device=x.device)
    if not tokens:
        return out
    plain = scaled = None
    if not all(_is_fp8(m) for m in parts):
        plain = x if norm is None else rms_norm(x, norm)
        first = parts[0]
        if isinstance(first, Matrix) and first.inputs is not None:  # then every part has the same range
            plain = to_integers(plain, first.inputs)
    if any(_is_fp8(m) for m in parts):
        scaled = quantize(x, norm)
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


_FP8_ROWS = 128  # rows of a gate-and-up tile, which keeps two accumulators in registers


@triton.jit
def _tiles(starts, E, EP: tl.constexpr, BM: tl.constexpr):
    """(tile rows per expert [EP], their inclusive prefix sum)."""
    e = tl.arange(0, EP)
    first = tl.load(starts + e, mask=e < E, other=0)
    tiles = (tl.load(starts + e + 1, mask=e < E, other=0) - first + BM - 1) // BM
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def _place(starts, tiles, upto, m, E, EP: tl.constexpr, BM: tl.constexpr):
    """(expert, sorted rows [BM], mask of existing rows) of the m-th tile row."""
    e = tl.arange(0, EP)
    expert = tl.sum((upto <= m).to(tl.int32), 0)
    inside = m - tl.sum(tl.where(e == expert, upto - tiles, 0), 0)
    row = tl.load(starts + expert) + inside * BM + tl.arange(0, BM)
    return expert, row, row < tl.load(starts + expert + 1)


@triton.jit
def _gate_up(
    x, x_scale, x_order, w, w_scale, w_zero, bias, order, starts, h, h_scale, h_inputs, N, K, E, stride_x,
    w_size, s_size, STATIC: tl.constexpr, SLOTS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HALF: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ALPHA: tl.constexpr,
    CUBIC: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles, upto = _tiles(starts, E, EP, BM)
    I = N // 2  # noqa: E741
    OUT: tl.constexpr = BN if FORMAT == FP8 else BN // 2  # output columns of a tile
    across = tl.cdiv(I, OUT)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0) * across, tl.num_programs(0)):
        expert, row, live = _place(starts, tiles, upto, tile // across, E, EP, BM)
        token = tl.load(order + row, mask=live, other=0).to(tl.int64) // SLOTS
        e = expert.to(tl.int64)
        i = tile % across * OUT + tl.arange(0, OUT)
        if FORMAT == FP8:
            gate, up = fp8_twice(
                x, token * stride_x, live, x_scale, w + e * w_size, w_scale + e * s_size,
                i, I, I, I, K, BM, OUT,
            )  # fmt: skip
        else:
            columns = x_order
            if x_order is not None:
                columns = x_order + e * K
            acc = product(
                x, token * stride_x, live, x_scale, columns, w + e * w_size, w_scale + e * s_size,
                w_zero + e * s_size, tile % across * BN + tl.arange(0, BN), N, K, FORMAT, GROUP, HALF,
                HAS_ZERO, BM, BN, BK,
            )  # fmt: skip
            gate, up = tl.split(tl.reshape(acc, (BM, OUT, 2)))
        if HAS_BIAS:  # [E, 2, I]
            at = bias + e * N + i
            gate += tl.load(at, mask=i < I, other=0.0)[None, :]
            up += tl.load(at + I, mask=i < I, other=0.0)[None, :]
        value = gated(gate, up, ALPHA, CUBIC, LIMIT, SHIFT)
        mask = live[:, None] & (i[None, :] < I)
        at = row.to(tl.int64)[:, None] * I + i[None, :]
        if FORMAT == FP8:
            value = tl.where(i[None, :] < I, value, 0.0)
            scale = tl.maximum(tl.max(tl.abs(value), 1), LEAST_AMAX) / FP8_MAX
            value = tl.clamp(value / scale[:, None], -FP8_MAX, FP8_MAX)
            tl.store(h_scale + row.to(tl.int64) * across + tile % across, scale, mask=live)
        if STATIC:  # integers; adding 1.5 * 2^23 rounds half to even
            value = tl.clamp(value / tl.load(h_inputs + expert), -128.0, 127.0)
            value = (value + 12582912.0) - 12582912.0
        tl.store(h + at, narrow(value, h.dtype.element_ty), mask=mask)


@triton.jit
def _down(
    h, h_scale, w, w_scale, w_zero, bias, order, starts, gates, y, N, K, E, w_size, s_size,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATES: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    tiles, upto = _tiles(starts, E, EP, BM)
    across = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0) * across, tl.num_programs(0)):
        expert, row, live = _place(starts, tiles, upto, tile // across, E, EP, BM)
        n = tile % across * BN + tl.arange(0, BN)
        e = expert.to(tl.int64)
        rows = row.to(tl.int64)
        if FORMAT != FP8:
            rows = rows * K
        acc = product(
            h, rows, live, h_scale, None, w + e * w_size, w_scale + e * s_size, w_zero + e * s_size, n, N, K,
            FORMAT, GROUP, HALF, HAS_ZERO, BM, BN, BK,
        )  # fmt: skip
        slot = tl.load(order + row, mask=live, other=0).to(tl.int64)
        if HAS_BIAS:
            acc += tl.load(bias + e * N + n, mask=n < N, other=0.0)[None, :]
        if HAS_GATES:
            acc = acc * tl.load(gates + slot, mask=live, other=0.0)[:, None]
        mask = live[:, None] & (n[None, :] < N)
        tl.store(y + slot[:, None] * N + n[None, :], narrow(acc, y.dtype.element_ty), mask=mask)


@triton.jit
def _combine(
    y, ids, local, shared, residual, out, D, stride_r, SLOTS: tl.constexpr, MAPPED: tl.constexpr,
    HAS_SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < D
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(ids + token * SLOTS + slot)
        if MAPPED:
            expert = tl.load(local + expert, mask=expert >= 0, other=-1).to(tl.int64)
        if expert >= 0:
            total += tl.load(y + (token * SLOTS + slot) * D + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared + token * D + d, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual + token * stride_r + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, narrow(total, out.dtype.element_ty), mask=mask)


def experts_mlp(
    x: Tensor, x_scale: Tensor | None, gate_up: Matrix, down: Matrix, order: Tensor, starts: Tensor,
    slots: int, gates: Tensor | None, dtype: torch.dtype, choice: Config | None = None,
    activation: Gate = SILU, biases: tuple[Tensor, Tensor] | None = None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, D] (FP8 with x_scale if the weights are FP8) -> [T * slots, D]: weighted expert output per slot.

    biases: float32, of gate and up [E, 2, I] and of down [E, D].
    order, starts: see `route.sort_by_expert`. Rows of slots without a local expert are not written.
    y: the output, if other experts write the rest of it.

    Legend: R = T k slots, sorted by expert; E local experts; D hidden; I intermediate; BM x BN the tile size.

    There are two products: silu(gate) * up of every slot's token, gathered on load; then down, whose rows are
    weighted and written back to their slot. A final kernel sums a token's k slots in a fixed order, so that
    the result does not depend on the order in which tiles finish.

    The number of tiles is known only on the device. Each program computes it from the experts' starts and
    processes every P-th tile (P programs, one per multiprocessor), so nothing waits for the host.
    """
    tokens, device = x.shape[0], x.device
    count, inner = gate_up.data.shape[0], gate_up.n // 2
    fp8 = gate_up.format == "fp8"
    per_expert = max(1, tokens * slots // count)
    c = choice or product_config("grouped", gate_up.format, x.dtype, per_expert, device)
    # A tile of FP8 results is one quantization group of the next product's input.
    bm, bn, columns, warps = (
        (min(c.bm, _FP8_ROWS), FP8_BLOCK, FP8_BLOCK, 8) if fp8 else (c.bm, c.bn, c.bn // 2, c.num_warps)
    )
    rows = tokens * slots
    h = torch.empty(rows, inner, dtype=torch.float8_e4m3fn if fp8 else dtype, device=device)
    h_scale = torch.empty(rows, triton.cdiv(inner, 128), device=device) if fp8 else None
    ep, at_once = triton.next_power_of_2(count), processors(device) * c.per_processor
    most = min(count, rows) + rows // bm  # upper bound on tile rows
    _gate_up[(min(at_once, most * triton.cdiv(inner, columns)),)](
        x, x_scale, gate_up.order, *_tensors(gate_up), None if biases is None else biases[0], order, starts,
        h, h_scale, down.inputs, gate_up.n, gate_up.k, count, 1 if fp8 else x.stride(0),
        gate_up.data[0].numel(), _size(gate_up), STATIC=down.inputs is not None, SLOTS=slots,
        **_constants(gate_up), HAS_BIAS=biases is not None, ALPHA=activation.alpha, CUBIC=activation.cubic,
        LIMIT=activation.limit if activation.limit < math.inf else 0.0, SHIFT=activation.shift,
        EP=ep, BM=bm, BN=bn, BK=c.bk, num_warps=warps, num_stages=c.num_stages,
    )  # fmt: skip
    if y is None:
        y = torch.empty(rows, down.n, dtype=dtype, device=device)
    most = min(count, rows) + rows // c.bm
    _down[(min(at_once, most * triton.cdiv(down.n, c.bn)),)](
        h, h_scale, *_tensors(down), None if biases is None else biases[1], order, starts, gates, y, down.n,
        down.k, count, down.data[0].numel(), _size(down), **_constants(down), HAS_BIAS=biases is not None,
        HAS_GATES=gates is not None, EP=ep, BM=c.bm, BN=c.bn, BK=c.bk, **c.resources,
    )  # fmt: skip
    return y


def combine(y: Tensor, ids: Tensor, local: Tensor | None, shared: Tensor | None, residual: Tensor) -> Tensor:
    """residual [T, D] + shared [T, D] + sum of each token's slots in y [T k, D] -> [T, D]."""
    tokens, d = residual.shape
    out = torch.empty(tokens, d, dtype=residual.dtype, device=residual.device)
    block = min(2048, triton.next_power_of_2(d))
    if tokens:
        _combine[(tokens, triton.cdiv(d, block))](
            y, ids, local, shared, residual, out, d, residual.stride(0), SLOTS=ids.shape[1],
            MAPPED=local is not None, HAS_SHARED=shared is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def _tensors(m: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Data, scales, zero points; data replaces missing parts, because kernels still compute addresses."""
    return m.data, m.data if m.scale is None else m.scale, m.data if m.zero is None else m.zero


def _size(m: Matrix) -> int:
    """Scales of one expert."""
    return 0 if m.scale is None else m.scale[0].numel()


def _constants(m: Matrix) -> dict[str, int | bool]:
    return dict(FORMAT=FORMATS[m.format], GROUP=m.group or 1, HALF=m.half or 1, HAS_ZERO=m.zero is not None)
