"""Latent attention of one step on a GPU: inputs and cache, prompts, single tokens, and the choice.

Legend: see `farthing.ops.api`. Two methods compute the same result. Absorbed (`decode`): the query is mapped
to the latent space and applied to the cache directly, 2 c + r multiplications per key and head. Expanded
(`prefill`): latents are expanded to heads once, c (n + v) per key and head, after which each query costs
n + r + v. So a sequence is expanded if it has more than c (n + v) / (2 c - n - v) new tokens: 171 in V3.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import LatentCache
from farthing_gpu.launch import FP8_MAX, Config, config, dot, narrow, processors, round_half_even, widen

FLOAT_CACHE = 0
FP8_CACHE = tl.constexpr(1)
INT8_CACHE = tl.constexpr(2)
_ROWS = 16  # cache rows gathered per program
CACHE_KINDS = {torch.float8_e4m3fn: 1, torch.int8: 2}


@triton.jit
def _rotate_queries(
    q, out, positions, cos, sin, stride_q, H, n, r, BH: tl.constexpr, HALF_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, i = tl.arange(0, BH)[:, None], tl.arange(0, HALF_R)[None, :]
    mask = (h < H) & (2 * i < r)
    step, far = (2, 1) if INTERLEAVED else (1, r // 2)
    x = q + token * stride_q + h * (n + r) + n + i * step
    at = tl.load(positions + token).to(tl.int64) * (r // 2) + i
    a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + far, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + at, mask=2 * i < r, other=0.0)
    s = tl.load(sin + at, mask=2 * i < r, other=0.0)
    to = out + (token * H + h) * r + i * step
    tl.store(to, narrow(a * c - b * s, out.dtype.element_ty), mask=mask)
    tl.store(to + far, narrow(b * c + a * s, out.dtype.element_ty), mask=mask)


@triton.jit
def _top(x, mask):
    """The largest magnitude of x, NaN if a number is not finite. Maxima of floats drop NaN; bits of
    magnitudes have the order of their numbers, with NaN above all."""
    bits = tl.where(mask, x, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(bits, 0).to(tl.float32, bitcast=True)
    return top + top * 0.0


@triton.jit
def store_part(x, mask, data, scale, KIND: tl.constexpr):
    """Store float32 x in the cache at data, with its scale if the cache is 8-bit."""
    if KIND == FP8_CACHE:
        s = tl.maximum(_top(x, mask) / FP8_MAX, 1e-20, propagate_nan=tl.PropagateNan.ALL)
        tl.store(data, narrow(tl.clamp(x / s, -FP8_MAX, FP8_MAX), tl.float8e4nv), mask=mask)
        tl.store(scale, s)
    elif KIND == INT8_CACHE:
        s = tl.maximum(_top(x, mask) / 127.0, 1e-20, propagate_nan=tl.PropagateNan.ALL)
        tl.store(data, round_half_even(tl.clamp(x / s, -127.0, 127.0)).to(tl.int8), mask=mask)
        tl.store(scale, s)
    else:
        tl.store(data, narrow(x, data.dtype.element_ty), mask=mask)


@triton.jit
def _write_latent(
    kv, norm, positions, cos, sin, slots, data, scale, stride_kv, c, r, eps, C: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    to = data + slot * (c + r)
    x = kv + token * stride_kv
    j = tl.arange(0, C)
    latent = tl.load(x + j, mask=j < c, other=0.0).to(tl.float32)
    latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / c + eps)
    latent = latent * tl.load(norm + j, mask=j < c, other=0.0)
    store_part(latent, j < c, to + j, scale + slot * 2, KIND)
    at = tl.load(positions + token).to(tl.int64) * (r // 2)
    i = tl.arange(0, R)
    step = 1 if INTERLEAVED else r // 2
    # Each lane loads its partner: (x0, x1) is rotated to x0 cos - x1 sin, x1 cos + x0 sin.
    first = (i % 2 == 0) if INTERLEAVED else (i < r // 2)
    angle = i // 2 if INTERLEAVED else i % (r // 2)
    other = tl.where(first, i + step, i - step)
    own = tl.load(x + c + i, mask=i < r, other=0.0).to(tl.float32)
    peer = tl.load(x + c + other, mask=(i < r) & (other < r), other=0.0).to(tl.float32)
    cosine = tl.load(cos + at + angle, mask=i < r, other=0.0)
    sine = tl.load(sin + at + angle, mask=i < r, other=0.0)
    key = own * cosine + tl.where(first, -peer, peer) * sine
    store_part(key, i < r, to + c + i, scale + slot * 2 + 1, KIND)


@triton.jit
def _gather(
    data, scale, table, first, length, latent, key, stride_t, size, c, r, C: tl.constexpr, R: tl.constexpr,
    EIGHT_BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ok = place < tl.load(length + sequence)
    block = tl.load(table + sequence.to(tl.int64) * stride_t + place // size, mask=ok, other=0)
    slot = (block.to(tl.int64) * size + place % size)[:, None]
    row = (tl.load(first + sequence) + place).to(tl.int64)[:, None]
    j, i = tl.arange(0, C)[None, :], tl.arange(0, R)[None, :]
    ok = ok[:, None]
    x = tl.load(data + slot * (c + r) + j, mask=ok & (j < c), other=0.0).to(tl.float32)
    k = tl.load(data + slot * (c + r) + c + i, mask=ok & (i < r), other=0.0).to(tl.float32)
    if EIGHT_BITS:
        x = x * tl.load(scale + slot * 2, mask=ok, other=0.0)
        k = k * tl.load(scale + slot * 2 + 1, mask=ok, other=0.0)
    tl.store(latent + row * c + j, narrow(x, latent.dtype.element_ty), mask=ok & (j < c))
    tl.store(key + row * r + i, narrow(k, key.dtype.element_ty), mask=ok & (i < r))


def rotate_queries(
    q: Tensor, positions: Tensor, rope: Tensor, heads: int, nope: int, rotary: int, interleaved: bool
) -> Tensor:
    """q [T, H (n + r)] -> its rotary parts, rotated [T, H, r]; rope [2, max_len, r / 2] float32.

    Legend: T tokens; H heads; n, r the nope and rotary head sizes; c the KV latent. One program per token
    rotates the queries of all heads. Another norms the latent, rotates its key and stores both; an 8-bit
    cache has one scale per part. Also here: the gather of cached rows that a prefill expands.
    """
    tokens = q.shape[0]
    out = torch.empty(tokens, heads, rotary, dtype=q.dtype, device=q.device)
    half = triton.next_power_of_2(rotary // 2)
    _rotate_queries[(tokens,)](
        q, out, positions, rope[0], rope[1], q.stride(0), heads, nope, rotary,
        BH=triton.next_power_of_2(heads), HALF_R=half, INTERLEAVED=interleaved, num_warps=4,
    )  # fmt: skip
    return out


def write_latent(
    kv: Tensor, norm: Tensor, eps: float, positions: Tensor, rope: Tensor, interleaved: bool,
    cache: LatentCache, layer: int, slots: Tensor,
) -> None:  # fmt: skip
    """Norm and rotate kv [T, c + r] and store it in `slots` of the layer."""
    c, width = norm.shape[0], kv.shape[1]
    data = cache.data[layer]
    scale = data if cache.scale is None else cache.scale[layer]
    _write_latent[(kv.shape[0],)](
        kv, norm, positions, rope[0], rope[1], slots, data, scale, kv.stride(0), c, width - c, eps,
        C=triton.next_power_of_2(c), R=triton.next_power_of_2(width - c), INTERLEAVED=interleaved,
        KIND=CACHE_KINDS.get(data.dtype, FLOAT_CACHE), num_warps=2,
    )  # fmt: skip


def gather(
    cache: LatentCache, layer: int, table: Tensor, lengths: list[int], c: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The first lengths[b] cached rows of every sequence of table [B, max_blocks], concatenated.

    -> latents [S, c], keys [S, r], the first row of each sequence [B] int32.
    """
    data = cache.data[layer]
    r, device, total = data.shape[-1] - c, data.device, sum(lengths)
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    first = length.cumsum(0, dtype=torch.int32) - length
    latent = torch.empty(total, c, dtype=dtype, device=device)
    key = torch.empty(total, r, dtype=dtype, device=device)
    scale = data if cache.scale is None else cache.scale[layer]
    _gather[(len(lengths), triton.cdiv(max(lengths), _ROWS))](
        data, scale, table, first, length, latent, key, table.stride(0), cache.block_size, c, r,
        C=triton.next_power_of_2(c), R=triton.next_power_of_2(r), EIGHT_BITS=cache.scale is not None,
        ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return latent, key, first


@triton.jit
def _turn(
    q, qp, position, acc, total, top, start, kv, k_pe, first, length, head, scale,
    H: tl.constexpr, n: tl.constexpr, r: tl.constexpr, v: tl.constexpr, MASK: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of keys from `start`; kv rows are H (n + v) wide."""
    at = start + tl.arange(0, BK)
    ok = at < length
    row = (first + at).to(tl.int64)
    d, i, w = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V)
    own = kv + row * (H * (n + v)) + head * (n + v)
    key = tl.load(own[None, :] + d[:, None], mask=ok[None, :] & (d[:, None] < n), other=0.0)  # [N, BK]
    pe = tl.load(k_pe + row[None, :] * r + i[:, None], mask=ok[None, :] & (i[:, None] < r), other=0.0)
    score = dot(q, key, tl.zeros((q.shape[0], BK), tl.float32))
    score = dot(qp, pe, score) * scale
    if MASK:
        score = tl.where(at[None, :] <= position[:, None], score, float("-inf"))
    new = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp(top - new)
    p = tl.exp(score - new[:, None])
    value = tl.load(own[:, None] + n + w[None, :], mask=ok[:, None] & (w[None, :] < v), other=0.0)
    acc = dot(narrow(p, q.dtype), value, acc * shrink[:, None])
    return acc, total * shrink + tl.sum(p, 1), new


@triton.jit
def _prefill(
    q, q_pe, kv, k_pe, out, query_start, key_first, key_length, scale, stride_q, stride_o,
    H: tl.constexpr, n: tl.constexpr, r: tl.constexpr, v: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    V: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Later tiles have the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sequence = tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(query_start + 2 * sequence), tl.load(query_start + 2 * sequence + 1)
    token = begin + tile * BM + tl.arange(0, BM)
    if begin + tile * BM < end:
        first, length = tl.load(key_first + sequence), tl.load(key_length + sequence)
        live = token < end
        # This step's tokens are the last of their sequence. Padding rows behave like the last row.
        position = length - end + tl.minimum(token, end - 1)
        d, i, w = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V)
        wide = token.to(tl.int64)[:, None]
        a = tl.load(
            q + wide * stride_q + head * (n + r) + d[None, :],
            mask=live[:, None] & (d[None, :] < n),
            other=0.0,
        )
        b = tl.load(
            q_pe + (wide * H + head) * r + i[None, :], mask=live[:, None] & (i[None, :] < r), other=0.0
        )
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, V), tl.float32)
        oldest = length - end + begin + tile * BM  # the tile's first position
        plain = (oldest + 1) // BK * BK
        newest = tl.minimum(oldest + BM, length)
        for start in range(0, plain, BK):
            acc, total, top = _turn(
                a, b, position, acc, total, top, start, kv, k_pe, first, length, head, scale,
                H, n, r, v, False, N, R, V, BK,
            )  # fmt: skip
        for start in range(plain, newest, BK):
            acc, total, top = _turn(
                a, b, position, acc, total, top, start, kv, k_pe, first, length, head, scale,
                H, n, r, v, True, N, R, V, BK,
            )  # fmt: skip
        result = narrow(acc / total[:, None], out.dtype.element_ty)
        tl.store(out + wide * stride_o + head * v + w[None, :], result, mask=live[:, None] & (w[None, :] < v))


def prefill(
    q: Tensor, q_pe: Tensor, kv: Tensor, k_pe: Tensor, out: Tensor, spans: list[tuple[int, int]],
    key_first: Tensor, key_lengths: list[int], scale: float, sizes: tuple[int, int, int, int],
    choice: Config | None = None,
) -> None:  # fmt: skip
    """out [T, H v] at the tokens of `spans`: causal attention of q [T, H (n + r)], q_pe [T, H, r] rotated.

    kv [S, H (n + v)], k_pe [S, r]: sequence b has key_lengths[b] rows from key_first[b] on; its queries are
    the tokens spans[b] = (begin, end), at its last positions. sizes = (H, n, r, v).

    Legend: T tokens of the step; S keys of their sequences, concatenated; H heads; n, r, v the nope, rotary
    and value head sizes; BM queries and BK keys per tile.

    A head's key is (its part of the expanded latent, the rotary key shared by all heads), so the rotary part
    is never copied per head (DeepSeek-V2 section 2.1.2). Tiles entirely below the diagonal need no mask.
    """
    heads, n, r, v = sizes
    kernel = "prefill_float32" if q.dtype is torch.float32 else "prefill"
    longest = max(end - begin for begin, end in spans)
    c = choice or config(kernel, longest, q.device)
    starts = torch.tensor([*spans], dtype=torch.int32, device=q.device)
    lengths = torch.tensor(key_lengths, dtype=torch.int32, device=q.device)
    _prefill[(triton.cdiv(longest, c.bm), heads, len(spans))](
        q, q_pe, kv, k_pe, out, starts, key_first, lengths, scale, q.stride(0), out.stride(0), H=heads,
        n=n, r=r, v=v, N=_padded(n), R=_padded(r), V=_padded(v), BM=c.bm, BK=c.bk, **c.resources,
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


_MOST_SPLITS = 64
_COMBINED = 128  # columns combined per program: with 64 splits, 64 registers per thread
_START = 64  # start-up and end of a program, in units of keys read; an estimate
_RESULT = 4  # bytes of a head's result (written and reread) relative to a key: 8 c / 2 (c + r)


@triton.jit
def _decode(
    q, q_pe, data, k_scale, table, sequences, positions, sinks, part, lse, scale, stride_t, splits,
    size: tl.constexpr, H: tl.constexpr, c: tl.constexpr, r: tl.constexpr, SPLIT: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, EIGHT_BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    query, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + query) + 1
    oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    share = tl.cdiv(tl.cdiv(length - oldest, splits), BK) * BK
    begin = oldest + split * share
    end = tl.minimum(begin + share, length)
    sequence = tl.load(sequences + query).to(tl.int64)
    h = block * BH + tl.arange(0, BH)
    j, i, s = tl.arange(0, C), tl.arange(0, R), tl.arange(0, BK)
    row, live = query * H + h, h[:, None] < H
    ql = tl.load(q + row[:, None] * c + j[None, :], mask=live & (j[None, :] < c), other=0.0)  # [BH, C]
    if r:
        qp = tl.load(q_pe + row[:, None] * r + i[None, :], mask=live & (i[None, :] < r), other=0.0)
    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    if SINKS:  # a key of the first split, whose value is zero
        top = tl.where(split == 0, tl.load(sinks + h, mask=h < H, other=0.0), top)
        total = tl.where(split == 0, 1.0, total)
    acc = tl.zeros((BH, C), tl.float32)
    for start in range(begin, end, BK):
        at = start + s
        ok = at < end
        where = tl.load(table + sequence * stride_t + at // size, mask=ok, other=0).to(tl.int64)
        slot = where * size + at % size
        key = data + slot[:, None] * (c + r)
        latent = tl.load(key + j[None, :], mask=ok[:, None] & (j[None, :] < c), other=0.0)
        latent = widen(latent, ql.dtype)
        score = dot(ql, tl.trans(latent), tl.zeros((BH, BK), tl.float32))
        if EIGHT_BITS:
            s_latent = tl.load(k_scale + slot * 2, mask=ok, other=0.0)
            score = score * s_latent[None, :]
        if r:
            pe = tl.load(key + c + i[None, :], mask=ok[:, None] & (i[None, :] < r), other=0.0)
            pe = widen(pe, ql.dtype)
            if EIGHT_BITS:
                s_pe = tl.load(k_scale + slot * 2 + 1, mask=ok, other=0.0)
                score += dot(qp, tl.trans(pe), tl.zeros((BH, BK), tl.float32)) * s_pe[None, :]
            else:
                score = dot(qp, tl.trans(pe), score)
        score = tl.where(ok[None, :], score * scale, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - new)
        p = tl.exp(score - new[:, None])  # [BH, BK]
        total = total * shrink + tl.sum(p, 1)
        if EIGHT_BITS:
            p = p * s_latent[None, :]
        acc = dot(narrow(p, ql.dtype), latent, acc * shrink[:, None])
        top = new
    at = row * splits + split
    any_key = total > 0.0
    result = acc * (1.0 / tl.where(any_key, total, 1.0))[:, None]
    mask = (h[:, None] < H) & (j[None, :] < c)
    tl.store(part + at[:, None] * c + j[None, :], narrow(result, part.dtype.element_ty), mask=mask)
    if SPLIT:
        sum_log = tl.where(any_key, top + tl.log(tl.where(any_key, total, 1.0)), float("-inf"))
        tl.store(lse + at, sum_log, mask=h < H)


@triton.jit
def _combine(part, lse, out, S, c: tl.constexpr, SP: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, j = tl.arange(0, SP), tl.program_id(1) * BC + tl.arange(0, BC)
    sums = tl.load(lse + row * S + s, mask=s < S, other=float("-inf"))
    top = tl.max(sums, 0)
    weight = tl.exp(sums - tl.where(top == float("-inf"), 0.0, top))  # of a token without keys zeros
    weight = weight / tl.maximum(tl.sum(weight, 0), 1.0)  # at least 1 but for those
    rows = part + (row * S + s[:, None]) * c + j[None, :]
    # A split without keys has stored zeros.
    parts = tl.load(rows, mask=(s[:, None] < S) & (j[None, :] < c), other=0.0)
    result = tl.sum(parts * weight[:, None], 0)
    tl.store(out + row * c + j, narrow(result, out.dtype.element_ty), mask=j < c)


@lru_cache(4096)
def splits_for(queries: int, heads: int, keys: int, c: Config, processors: int) -> int:
    """Number of splits of a sequence's keys that minimizes the finish time of the last program.

    Cost in units of a key's bytes: a program's share of the keys, its queries, and its result, which is
    written and reread in float32. `c.per_processor` programs run concurrently per multiprocessor.
    """
    programs = max(1, queries * triton.cdiv(heads, c.bm))
    at_once = processors * c.per_processor
    alone = _START + c.bm * (1 + _RESULT)

    def time(splits: int) -> tuple[int, int]:
        share = triton.cdiv(triton.cdiv(keys, splits), c.bk) * c.bk
        return triton.cdiv(programs * splits, at_once) * (share + (alone if splits > 1 else _START)), splits

    return min(range(1, min(_MOST_SPLITS, triton.cdiv(keys, c.bk)) + 1), key=time)


def decode(
    q: Tensor, q_pe: Tensor | None, cache: LatentCache, layer: int, table: Tensor, sequences: Tensor,
    positions: Tensor, scale: float, splits: int | None = None, choice: Config | None = None,
    window: int | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries q [n, H, c] in the latent space, q_pe [n, H, r] rotated, or None, -> mixed latents [n, H, c].

    Query i attends to the first positions[i] + 1 tokens of sequence sequences[i] of table [B, max_blocks], or
    to the last `window` of those; sinks [H] float32.

    Legend: n queries (tokens); H heads, BH per program; c latent, r rotary; BK keys per iteration; S splits.

    Every head reads the same keys: a key is the latent followed by the rotary key (512 + 64 in V3), its value
    is the latent. So a tile is BH heads of one token times BK keys, and each key is loaded once for both
    products (as in FlashMLA). With an 8-bit cache the scale of a key multiplies its score and its weight, not
    its elements. Model and cache block sizes are constants, so that address computations are shifts without
    masks. Each split covers an equal share of its own sequence's keys, so that the splits of a sequence
    finish together (flash-decoding); a split without keys stores minus infinity as its sum.
    """
    n, heads, c = q.shape
    r = 0 if q_pe is None else q_pe.shape[2]
    data = cache.data[layer]
    single = "decode_rows" if cache.block_size == 1 else "decode"  # rows of lists: 64 heads spill less so
    kernel = single if cache.scale is None else "decode_8bit"
    if q.dtype is torch.float32:  # twice the bytes per tile
        kernel = "decode_float32"
    k = choice or config(kernel, heads, q.device)
    keys = min(table.shape[1] * cache.block_size, window or sys.maxsize)
    count = splits or splits_for(n, heads, keys, k, processors(q.device))
    out = torch.empty_like(q)
    part = out if count == 1 else torch.empty(n, heads, count, c, dtype=torch.float32, device=q.device)
    lse = torch.empty(n, heads, count, dtype=torch.float32, device=q.device) if count > 1 else part
    padded = max(16, triton.next_power_of_2(c))
    _decode[(n, triton.cdiv(heads, k.bm), count)](
        q, q_pe, data, data if cache.scale is None else cache.scale[layer], table, sequences, positions,
        lse if sinks is None else sinks, part, lse, scale, table.stride(0), count, size=cache.block_size,
        H=heads, c=c, r=r, SPLIT=count > 1, C=padded, R=max(16, triton.next_power_of_2(r)),
        EIGHT_BITS=cache.scale is not None, SINKS=sinks is not None, WINDOW=window or 0, BH=k.bm, BK=k.bk,
        **k.resources,
    )  # fmt: skip
    if count > 1:
        columns = min(padded, _COMBINED)
        _combine[(n * heads, triton.cdiv(c, columns))](
            part, lse, out, count, c=c, SP=triton.next_power_of_2(count), BC=columns, num_warps=4
        )
    return out
