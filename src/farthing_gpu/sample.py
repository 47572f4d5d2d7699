"""Kernels over rows on a GPU: sampling, RMSNorm with quantization, softmax.

Legend: n rows; V vocabulary; K candidates of a row, sorted. One program per row.

A number u in (0, 1), which depends only on the completion's seed and the token's index, is looked up in the
cumulative distribution: over the vocabulary, or over the sorted candidates kept by min_p, top_k and top_p,
in this order. Sums are float64, as in the engine, because thousands of float32 terms would drift. No
intermediate result is written: the distribution is read three times from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import Norm
from farthing.ops.sampling import CANDIDATES, Filters
from farthing_gpu.launch import FP8_MAX, LEAST_AMAX, narrow

_BLOCK = 2048


@triton.jit
def _find(e, start, running, target, token, last, BLOCK: tl.constexpr):
    """Search state: whether and where the running sum passes the target within weights e [BLOCK]."""
    n = tl.arange(0, BLOCK)
    total = tl.sum(e.to(tl.float64), 0)
    if (token < 0) & (running + total > target):
        below = (running + tl.cumsum(e.to(tl.float64), 0)) <= target
        token = start + tl.sum(below.to(tl.int32), 0)
    # Rounding may move the target past the end; then take the last nonzero weight.
    last = tl.maximum(last, tl.max(tl.where(e > 0.0, start + n, -1), 0))
    return running + total, token, last


@triton.jit
def _sample_tokens(logits, uniform, tokens, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    x = logits + row * stride
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        top = tl.maximum(top, tl.load(x + start + n, mask=start + n < V, other=float("-inf")))
    peak = tl.max(top, 0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, V, BLOCK):
        v = tl.load(x + start + n, mask=start + n < V, other=float("-inf"))
        sums += tl.exp(v - peak).to(tl.float64)
    target = tl.load(uniform + row) * tl.sum(sums, 0)
    running = tl.sum(sums, 0) * 0.0
    token, last = -1, -1
    for start in range(0, V, BLOCK):
        v = tl.load(x + start + n, mask=start + n < V, other=float("-inf"))
        running, token, last = _find(tl.exp(v - peak), start, running, target, token, last, BLOCK)
    tl.store(tokens + row, tl.where(token < 0, last, tl.minimum(token, last)).to(tl.int64))


@triton.jit
def _kept(values, ids, start, K, total, best, top_k, min_p, BLOCK: tl.constexpr):
    """(weights of the candidates kept by min_p and top_k, probabilities of all)."""
    rank = start + tl.arange(0, BLOCK)
    value = tl.load(values + rank, mask=rank < K, other=float("-inf"))
    p = tl.exp(value - total)
    by_min_p = (p >= min_p * best) & (rank < K)
    return tl.where(by_min_p & (rank < top_k), p, 0.0), p


@triton.jit
def _sample_filtered(
    values, ids, totals, uniform, top_ks, top_ps, min_ps, tokens, whole, K, V, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    total, top_p = tl.load(totals + row), tl.load(top_ps + row)
    min_p, top_k = tl.load(min_ps + row), tl.load(top_ks + row)
    value = values + row * K
    best = tl.exp(tl.load(value) - total)
    mass = tl.zeros((BLOCK,), tl.float64)
    all_of_it = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, K, BLOCK):
        kept, p = _kept(value, ids, start, K, total, best, top_k, min_p, BLOCK)
        mass += kept.to(tl.float64)
        all_of_it += p.to(tl.float64)
    # Without top_k and min_p the mass is over all of V, of which candidates may be only a part.
    open_end = (top_k >= V) & (min_p == 0.0)
    limit = top_p * tl.where(open_end, 1.0, tl.sum(mass, 0))
    # Are all tokens kept by the filter among the candidates?
    lowest = tl.exp(tl.load(value + K - 1) - total)
    enough = open_end & (tl.sum(all_of_it, 0) >= top_p) & (top_p < 1.0)
    tl.store(whole + row, ((top_k <= K) | (lowest < min_p * best) | enough | (K >= V)).to(tl.int8))
    before = tl.sum(mass, 0) * 0.0
    chosen = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, K, BLOCK):
        kept, p = _kept(value, ids, start, K, total, best, top_k, min_p, BLOCK)
        wide = kept.to(tl.float64)
        chosen += tl.where(before + tl.cumsum(wide, 0) - wide < limit, wide, 0.0)
        before += tl.sum(wide, 0)
    target = tl.load(uniform + row) * tl.sum(chosen, 0)
    before = tl.sum(mass, 0) * 0.0
    running = tl.sum(mass, 0) * 0.0
    token, last = -1, -1
    for start in range(0, K, BLOCK):
        kept, p = _kept(value, ids, start, K, total, best, top_k, min_p, BLOCK)
        wide = kept.to(tl.float64)
        kept = tl.where(before + tl.cumsum(wide, 0) - wide < limit, kept, 0.0)
        before += tl.sum(wide, 0)
        running, token, last = _find(kept, start, running, target, token, last, BLOCK)
    pick = tl.where(token < 0, last, tl.minimum(token, last))
    tl.store(tokens + row, tl.load(ids + row * K + pick))


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """logits [n, V] float32, already divided by the temperature; uniform [n] float64 -> tokens [n] int64."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _sample_tokens[(rows,)](
            logits, uniform, tokens, logits.stride(0), vocabulary, BLOCK=_block(vocabulary), num_warps=8
        )
    return tokens


def sample_filtered(logits: Tensor, uniform: Tensor, filters: Filters) -> Tensor:
    """Like `sample_tokens`, among the tokens kept by the filters.

    Rows are truncated to their largest logits; all of V is used for those whose filters may keep more.
    """
    rows, vocabulary = logits.shape
    if not rows:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    width = min(vocabulary, CANDIDATES)
    tokens, whole = _sample_among(logits, uniform, filters, width)
    if width < vocabulary and not bool(whole.all()):
        rest = (whole == 0).nonzero()[:, 0]
        tokens[rest] = _sample_among(logits[rest], uniform[rest], filters.at(rest), vocabulary)[0]
    return tokens


def _sample_among(logits: Tensor, uniform: Tensor, filters: Filters, width: int) -> tuple[Tensor, Tensor]:
    """Sample among the `width` largest logits. Returns also whether these include all that filters keep."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    total = logits.logsumexp(-1)
    whole = torch.empty(rows, dtype=torch.int8, device=logits.device)
    values, ids = logits.topk(width, dim=-1)
    _sample_filtered[(rows,)](
        values, ids, total, uniform, filters.top_k, filters.top_p, filters.min_p, tokens, whole, width,
        vocabulary, BLOCK=_block(width), num_warps=8,
    )  # fmt: skip
    return tokens, whole


def _block(width: int) -> int:
    return min(_BLOCK, max(16, int(triton.next_power_of_2(width))))


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


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [T, K], norm float32 -> [T, K] in x's dtype.

    Legend: T tokens; K columns. One program per token: the row is read once, kept in registers, written once.
    FP8 groups of 128 columns as in DeepSeek-V3 section 3.3 (scale = max(amax, 1e-4) / 448).
    """
    tokens, k = x.shape
    out = torch.empty(tokens, k, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(k)
    if tokens:
        _rms_norm[(tokens,)](
            x, norm.weight, out, x.stride(0), k, norm.eps, BLOCK=block, num_warps=_warps(block)
        )
    return out


def quantize(x: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """x [T, K], normed first if a norm is given -> FP8 [T, K], scales float32 [T, ceil(K / 128)]."""
    tokens, k = x.shape
    groups = triton.cdiv(k, GROUP)
    out = torch.empty(tokens, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(groups)
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    if tokens:
        _norm_quantize[(tokens,)](
            x, weight, out, scale, x.stride(0), k, eps,
            NORM=weight is not None, GROUPS=padded, WIDTH=GROUP, num_warps=_warps(padded * GROUP),
        )  # fmt: skip
    return out, scale


def _warps(width: int) -> int:
    return min(16, max(1, width // 1024))


MOST_HELD = 16384


@triton.jit
def _softmax(x, out, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + n, mask=n < N, other=float("-inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * N + n, e / tl.sum(e, 0), mask=n < N)


@triton.jit
def _softmax_long(x, out, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sum, combined once at the end.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        v = tl.load(x + row * stride + start + n, mask=start + n < N, other=float("-inf"))
        new = tl.maximum(top, v)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.exp(v - safe)
        top = new
    peak = tl.max(top, 0)
    scale = 1.0 / tl.sum(total * tl.exp(top - peak), 0)
    for start in range(0, N, BLOCK):
        v = tl.load(x + row * stride + start + n, mask=start + n < N, other=float("-inf"))
        tl.store(out + row * N + start + n, tl.exp(v - peak) * scale, mask=start + n < N)


def softmax(x: Tensor, widest: int = MOST_HELD) -> Tensor:
    """x [T, N] float32 -> [T, N]; rows longer than `widest` are streamed.

    Legend: T rows; N columns. A row that fits in the registers of one program is kept there; a longer one (a
    vocabulary) is read twice, computing maximum and sum in one pass (Milakov and Gimelshein 2018).
    """
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    if not rows:
        return out
    if n <= widest:
        block = triton.next_power_of_2(n)
        _softmax[(rows,)](x, out, x.stride(0), n, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    else:
        _softmax_long[(rows,)](x, out, x.stride(0), n, BLOCK=min(widest, 4096), num_warps=8)
    return out
