"""Selection on a GPU: router logits to sorted experts, and index keys to the top k.

Legend: T tokens; E routed experts, G groups of S = E / G; k experts per token; H local experts.

Sizes are powers of two on the device: groups and their experts form a padded [G, S] with minus infinity as
padding. Everything stays on the device, so that a decode step can be captured in a graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import Batch, IndexCache, Place
from farthing.ops.indexer import Indexer, prepared_keys, rotated, top_positions, write_keys
from farthing.ops.selection import sequences_of
from farthing.ops.specs import IndexerSpec, RouterSpec
from farthing_gpu.launch import dot, widen


@triton.jit
def _groups_before(choice, TOP2: tl.constexpr):
    """How many groups of [G, S] are preferred to each: those with a larger score, or an equal earlier one."""
    group = tl.max(choice, 1)  # [G]
    g, s = tl.arange(0, choice.shape[0])[:, None], tl.arange(0, choice.shape[1])[None, :]
    if TOP2:
        best = tl.argmax(choice, 1)
        group += tl.max(tl.where(s == best[:, None], float("-inf"), choice), 1)
    other, own = group[None, :], group[:, None]
    earlier = tl.arange(0, choice.shape[0])[None, :] < g
    return tl.sum(((other > own) | ((other == own) & earlier)).to(tl.int32), 1)


@triton.jit
def _keep_mass(chosen, weight, mass, min_experts, K: tl.constexpr, KP: tl.constexpr):
    """In descending order, keep the fewest of [KP] weights whose share of the total reaches the mass."""
    slot = tl.arange(0, KP)
    total = tl.sum(weight, 0)
    left = tl.where(slot < K, weight, -1.0)
    ids = tl.zeros((KP,), tl.int32)
    kept = tl.zeros((KP,), tl.float32)
    before = 0.0
    for i in tl.static_range(K):
        at = slot == tl.argmax(left, 0)
        w = tl.sum(tl.where(at, weight, 0.0), 0)
        keep = (before / total < mass) | (i < min_experts)
        ids = tl.where(slot == i, tl.where(keep, tl.sum(tl.where(at, chosen, 0), 0), -1), ids)
        kept = tl.where(slot == i, tl.where(keep, w, 0.0), kept)
        before += w
        left = tl.where(at, -1.0, left)
    return ids, kept


@triton.jit
def _route(
    logits, bias, ids, weights, live, E, scale, mass, min_experts,
    K: tl.constexpr, KP: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, G: tl.constexpr,
    S: tl.constexpr, SCORES: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    size = E // GROUPS
    g, s = tl.arange(0, G)[:, None], tl.arange(0, S)[None, :]
    expert = g * size + s  # [G, S]
    real = (g < GROUPS) & (s < size)
    score = tl.load(logits + token * E + expert, mask=real, other=float("-inf"))
    if SCORES == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-score))
    elif SCORES == "sqrtsoftplus":
        small = tl.exp(-tl.abs(score))
        more = 1.0 + small  # the logarithm of a sum near 1 keeps its digits
        log = tl.where(more == 1.0, small, tl.log(more) * small / tl.where(more == 1.0, 1.0, more - 1.0))
        score = tl.sqrt(tl.maximum(score, 0.0) + log)
    else:
        e = tl.exp(score - tl.max(tl.max(score, 1), 0))
        score = e / tl.sum(tl.sum(e, 1), 0)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    if GROUPS > 1:
        before = _groups_before(choice, TOP2)
        choice = tl.where((before < TOP_GROUPS)[:, None], choice, float("-inf"))
    flat = tl.reshape(choice, (G * S,))
    own = tl.reshape(tl.where(real, score, 0.0), (G * S,))
    place = tl.arange(0, G * S)
    slot = tl.arange(0, KP)
    chosen = tl.zeros((KP,), tl.int32)
    weight = tl.zeros((KP,), tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(flat, 0)
        at = place == best
        chosen = tl.where(slot == i, best // S * size + best % S, chosen)
        weight = tl.where(slot == i, tl.sum(tl.where(at, own, 0.0), 0), weight)
        flat = tl.where(at, float("-inf"), flat)
    if HAS_MASS:
        chosen, weight = _keep_mass(chosen, weight, mass, min_experts, K, KP)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    if HAS_LIVE:
        chosen = tl.where(token < tl.load(live), chosen, -1)
    tl.store(ids + token * K + slot, chosen.to(tl.int64), mask=slot < K)
    tl.store(weights + token * K + slot, weight * scale, mask=slot < K)


@triton.jit
def _sort(
    ids, local, order, starts, slots, HELD, MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    before = 0
    mine = 0
    for start in range(0, slots, BLOCK):
        expert = tl.load(ids + start + j, mask=start + j < slots, other=-1).to(tl.int32)
        if MAPPED:
            expert = tl.load(local + expert, mask=expert >= 0, other=-1)
        before += tl.sum(((expert >= 0) & (expert < e)).to(tl.int32), 0)
        mine += tl.sum((expert == e).to(tl.int32), 0)
    tl.store(starts + e, before)
    if e == HELD - 1:
        tl.store(starts + HELD, before + mine)
    if mine > 0:
        at = before
        for start in range(0, slots, BLOCK):
            expert = tl.load(ids + start + j, mask=start + j < slots, other=-1).to(tl.int32)
            if MAPPED:
                expert = tl.load(local + expert, mask=expert >= 0, other=-1)
            hit = (expert == e).to(tl.int32)
            tl.store(order + at + tl.cumsum(hit, 0) - 1, start + j, mask=hit > 0)
            at += tl.sum(hit, 0)


def route(
    logits: Tensor, bias: Tensor | None, spec: RouterSpec, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] float32 -> (ids [T, k] int64, weights [T, k] float32) as in the reference.

    live [1] int32: tokens from this index on are padding of a captured step and select nothing (id -1).
    """
    tokens, k = logits.shape[0], spec.top_k
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            logits, bias, ids, weights, live, spec.num_experts, spec.scale, spec.mass or 0.0,
            spec.min_experts, K=k, KP=triton.next_power_of_2(k), GROUPS=spec.num_groups,
            TOP_GROUPS=spec.top_k_groups, G=triton.next_power_of_2(spec.num_groups),
            S=triton.next_power_of_2(spec.num_experts // spec.num_groups), SCORES=spec.scoring,
            TOP2=spec.group_score == "top2_sum", NORMALIZE=spec.normalize, HAS_BIAS=bias is not None,
            HAS_MASS=spec.mass is not None, HAS_LIVE=live is not None, num_warps=1,
        )  # fmt: skip
    return ids, weights


def sort_by_expert(ids: Tensor, experts: int, local: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Selected experts [T, k] -> (order [T k] int32, starts [H + 1] int32).

    order[starts[e] … starts[e + 1]] are the slots t k + j of the tokens of local expert e, ascending.
    held [E] int32 maps experts to local indices, -1 if on another rank; None: all are local, in order. One
    program per expert counts and places its slots without atomics, so the order is deterministic.
    """
    slots = ids.numel()
    order = torch.empty(max(1, slots), dtype=torch.int32, device=ids.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    _sort[(experts,)](
        ids, local, order, starts, slots, experts, MAPPED=local is not None,
        BLOCK=min(2048, max(16, triton.next_power_of_2(slots))), num_warps=4,
    )  # fmt: skip
    return order, starts


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


def pack_indexer(spec: IndexerSpec, norm: Tensor, bias: Tensor, rope: Tensor) -> Indexer:
    """An indexer of parameters on the device."""
    return Indexer(spec, norm, bias, rope)


def index(q: Tensor, k: Tensor, w: Tensor, indexer: Indexer, place: Place) -> Tensor | None:
    """`Ops.index` without device reads: returns None only if no block table can hold more keys.

    Legend: T tokens; H index heads, BH per product; d their size; BK keys per program. A program scores BK
    keys for one token: a product [BH, d] x [d, BK], ReLU, and the weighted sum over heads, so that scores per
    head stay in registers. With an 8-bit cache the scale of a key, which is positive, multiplies its sum.
    """
    s, cache, row, batch = indexer.spec, place.cache.index, place.row, place.batch
    assert cache is not None
    cos, sin = indexer.rope[:, batch.positions.long()].unbind(0)
    write_keys(cache, row, batch.slots, prepared_keys(k, indexer, cos, sin))
    most = batch.block_table.shape[1] * cache.data.shape[2]
    if most <= s.top_k:
        return None
    q = rotated(q.float().unflatten(-1, (s.num_heads, s.head_dim)), cos[:, None], sin[:, None], s)
    q = q.to(k.dtype).contiguous()
    w = (w.float() * (s.num_heads * s.head_dim) ** -0.5).contiguous()
    return best(q, w, cache, row, batch, sequences_of(batch).to(torch.int32), s.top_k)


def best(
    q: Tensor, w: Tensor, cache: IndexCache, row: int, batch: Batch, sequences: Tensor, k: int
) -> Tensor:
    """The k best of the keys up to each token's position, [T, K] int32 as in `Ops.index`."""
    step = max(1, _MOST_SCORES // (batch.block_table.shape[1] * cache.data.shape[2]))
    parts = [
        top_positions(scores(q, w, cache, row, batch, sequences, slice(at, at + step)), k)
        for at in range(0, q.shape[0], step)
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
