"""Latent attention of single tokens over the paged cache: key splits with online softmax, then combined.

Legend: n queries (tokens); H heads, BH per program; c latent, r rotary; BK keys per iteration; S splits.

Every head reads the same keys: a key is the latent followed by the rotary key (512 + 64 in V3), its value is
the latent. So a tile is BH heads of one token times BK keys, and each key is loaded once for both products
(as in FlashMLA). With an 8-bit cache the scale of a key multiplies its score and its weight, not its
elements. Model and cache block sizes are constants, so that address computations are shifts without masks.
Each split covers an equal share of its own sequence's keys, so that the splits of a sequence finish together
(flash-decoding); a split without keys stores minus infinity as its sum.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import LatentCache
from farthing.ops.gpu.launch import Config, config, processors
from farthing.ops.gpu.numeric import dot, narrow, widen

_MOST_SPLITS = 64
_COMBINED = 128  # columns combined per program: with 64 splits, 64 registers per thread
_START = 64  # start-up and end of a program, in units of keys read; an estimate
_RESULT = 4  # bytes of a head's result (written and reread) relative to a key: 8 c / 2 (c + r)


@triton.jit
def _decode(
    q, q_pe, data, k_scale, table, sequences, positions, part, lse, scale, stride_t, splits,
    size: tl.constexpr, H: tl.constexpr, c: tl.constexpr, r: tl.constexpr, SPLIT: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, EIGHT_BITS: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    query, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + query) + 1
    share = tl.cdiv(tl.cdiv(length, splits), BK) * BK
    begin = split * share
    end = tl.minimum(begin + share, length)
    sequence = tl.load(sequences + query).to(tl.int64)
    h = block * BH + tl.arange(0, BH)
    j, i, s = tl.arange(0, C), tl.arange(0, R), tl.arange(0, BK)
    row = query * H + h
    ql = tl.load(
        q + row[:, None] * c + j[None, :], mask=(h[:, None] < H) & (j[None, :] < c), other=0.0
    )  # [BH, C]
    qp = tl.load(q_pe + row[:, None] * r + i[None, :], mask=(h[:, None] < H) & (i[None, :] < r), other=0.0)
    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, C), tl.float32)
    for start in range(begin, end, BK):
        at = start + s
        ok = at < end
        where = tl.load(table + sequence * stride_t + at // size, mask=ok, other=0).to(tl.int64)
        slot = where * size + at % size
        key = data + slot[:, None] * (c + r)
        latent = tl.load(key + j[None, :], mask=ok[:, None] & (j[None, :] < c), other=0.0)
        pe = tl.load(key + c + i[None, :], mask=ok[:, None] & (i[None, :] < r), other=0.0)
        latent, pe = widen(latent, ql.dtype), widen(pe, ql.dtype)
        score = dot(ql, tl.trans(latent), tl.zeros((BH, BK), tl.float32))
        if EIGHT_BITS:
            s_latent = tl.load(k_scale + slot * 2, mask=ok, other=0.0)
            s_pe = tl.load(k_scale + slot * 2 + 1, mask=ok, other=0.0)
            score = score * s_latent[None, :]
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
    found = total > 0.0
    result = acc / tl.where(found, total, 1.0)[:, None]
    mask = (h[:, None] < H) & (j[None, :] < c)
    tl.store(part + at[:, None] * c + j[None, :], narrow(result, part.dtype.element_ty), mask=mask)
    if SPLIT:
        sum_log = tl.where(found, top + tl.log(tl.where(found, total, 1.0)), float("-inf"))
        tl.store(lse + at, sum_log, mask=h < H)


@triton.jit
def _combine(part, lse, out, S, c: tl.constexpr, SP: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, j = tl.arange(0, SP), tl.program_id(1) * BC + tl.arange(0, BC)
    sums = tl.load(lse + row * S + s, mask=s < S, other=float("-inf"))
    weight = tl.exp(sums - tl.max(sums, 0))
    weight = weight / tl.sum(weight, 0)
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
    q: Tensor, q_pe: Tensor, cache: LatentCache, layer: int, table: Tensor, sequences: Tensor,
    positions: Tensor, scale: float, splits: int | None = None, choice: Config | None = None,
) -> Tensor:  # fmt: skip
    """Queries q [n, H, c] in the latent space, q_pe [n, H, r] rotated -> mixed latents [n, H, c].

    Query i attends to the first positions[i] + 1 tokens of sequence sequences[i] of table [B, max_blocks].
    """
    n, heads, c = q.shape
    r = q_pe.shape[2]
    data = cache.data[layer]
    kernel = "decode" if cache.scale is None else "decode_8bit"
    if q.dtype is torch.float32:  # twice the bytes per tile
        kernel = "decode_float32"
    k = choice or config(kernel, heads, q.device)
    count = splits or splits_for(n, heads, table.shape[1] * cache.block_size, k, processors(q.device))
    out = torch.empty_like(q)
    part = out if count == 1 else torch.empty(n, heads, count, c, dtype=torch.float32, device=q.device)
    lse = torch.empty(n, heads, count, dtype=torch.float32, device=q.device) if count > 1 else part
    padded = max(16, triton.next_power_of_2(c))
    _decode[(n, triton.cdiv(heads, k.bm), count)](
        q, q_pe, data, data if cache.scale is None else cache.scale[layer], table, sequences, positions,
        part, lse, scale, table.stride(0), count, size=cache.block_size, H=heads, c=c, r=r, SPLIT=count > 1,
        C=padded, R=max(16, triton.next_power_of_2(r)), EIGHT_BITS=cache.scale is not None, BH=k.bm, BK=k.bk,
        **k.resources,
    )  # fmt: skip
    if count > 1:
        columns = min(padded, _COMBINED)
        _combine[(n * heads, triton.cdiv(c, columns))](
            part, lse, out, count, c=c, SP=triton.next_power_of_2(count), BC=columns, num_warps=4
        )
    return out
