"""The lightning indexer: one kernel scores the cached index keys, torch's radix select picks the top k.

Legend: T tokens; H index heads, BH per product; d their size; BK keys per program. A program scores BK keys
for one token: a product [BH, d] x [d, BK], ReLU, and the weighted sum over heads, so that scores per head
stay in registers. With an 8-bit cache the scale of a key, which is positive, multiplies its sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import Batch, IndexCache
from farthing.ops.gpu.numeric import dot, widen
from farthing.ops.indexer import Indexer, prepared_keys, rotated, top_positions, write_keys
from farthing.ops.selection import sequences_of

_MOST_SCORES = 1 << 26  # scores in memory at once


@triton.jit
def _index_scores(
    q, w, data, scale, table, sequences, positions, out, stride_t, stride_o, size: tl.constexpr,
    H: tl.constexpr, d: tl.constexpr, D: tl.constexpr, EIGHT_BITS: tl.constexpr, BH: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BK + tl.arange(0, BK)
    seen = at <= tl.load(positions + token)
    sequence = tl.load(sequences + token).to(tl.int64)
    where = tl.load(table + sequence * stride_t + at // size, mask=seen, other=0).to(tl.int64)
    slot = where * size + at % size
    j = tl.arange(0, D)
    key = tl.load(data + slot[None, :] * d + j[:, None], mask=seen[None, :] & (j[:, None] < d), other=0.0)
    total = tl.zeros((BK,), tl.float32)
    for first in range(0, H, BH):
        h = first + tl.arange(0, BH)
        head = (token * H + h).to(tl.int64)
        query = tl.load(
            q + head[:, None] * d + j[None, :], mask=(h[:, None] < H) & (j[None, :] < d), other=0.0
        )
        score = dot(query, widen(key, query.dtype), tl.zeros((BH, BK), tl.float32))
        weight = tl.load(w + head, mask=h < H, other=0.0)
        total += tl.sum(tl.maximum(score, 0.0) * weight[:, None], 0)
    if EIGHT_BITS:
        total = total * tl.load(scale + slot, mask=seen, other=0.0)
    tl.store(out + token * stride_o + at, tl.where(seen, total, float("-inf")))


def index(
    q: Tensor, k: Tensor, w: Tensor, indexer: Indexer, cache: IndexCache, row: int, batch: Batch
) -> Tensor | None:
    """`Ops.index` without device reads: returns None only if no block table can hold more keys."""
    s, tokens = indexer.spec, q.shape[0]
    cos, sin = indexer.rope[:, batch.positions.long()].unbind(0)
    write_keys(cache, row, batch.slots, prepared_keys(k, indexer, cos, sin))
    most = batch.block_table.shape[1] * cache.data.shape[2]
    if most <= s.top_k:
        return None
    q = rotated(q.float().unflatten(-1, (s.num_heads, s.head_dim)), cos[:, None], sin[:, None], s)
    q = q.to(k.dtype).contiguous()
    w = (w.float() * (s.num_heads * s.head_dim) ** -0.5).contiguous()
    sequences = sequences_of(batch).to(torch.int32)
    step = max(1, _MOST_SCORES // most)
    parts = [
        top_positions(scores(q, w, cache, row, batch, sequences, slice(at, at + step)), s.top_k)
        for at in range(0, tokens, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scores(
    q: Tensor, w: Tensor, cache: IndexCache, row: int, batch: Batch, sequences: Tensor, part: slice
) -> Tensor:
    """Scores [t, S] float32 of the tokens `part`; minus infinity after a token's own position."""
    q, w, data = q[part], w[part], cache.data[row]
    tokens, heads, d = q.shape
    # Float32 takes twice the bytes per tile, and no tensor cores: smaller tiles stay in registers.
    most_heads, keys = (16, 16) if q.dtype is torch.float32 else (64, 64)
    blocks = triton.cdiv(batch.block_table.shape[1] * data.shape[1], keys)
    out = torch.empty(tokens, blocks * keys, dtype=torch.float32, device=q.device)
    _index_scores[(tokens, blocks)](
        q, w, data, data if cache.scale is None else cache.scale[row], batch.block_table, sequences[part],
        batch.positions[part], out, batch.block_table.stride(0), out.stride(0), size=data.shape[1], H=heads,
        d=d, D=max(16, triton.next_power_of_2(d)), EIGHT_BITS=cache.scale is not None,
        BH=max(16, min(most_heads, triton.next_power_of_2(heads))), BK=keys, num_warps=4,
    )  # fmt: skip
    return out
