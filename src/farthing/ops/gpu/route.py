"""Router logits to selected experts, and selected experts to rows sorted by expert.

Legend: T tokens; E routed experts, G groups of S = E / G; k experts per token; H local experts.

Sizes are powers of two on the device: groups and their experts form a padded [G, S] with minus infinity as
padding. Everything stays on the device, so that a decode step can be captured in a graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import RouterSpec


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
    S: tl.constexpr, SIGMOID: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    size = E // GROUPS
    g, s = tl.arange(0, G)[:, None], tl.arange(0, S)[None, :]
    expert = g * size + s  # [G, S]
    real = (g < GROUPS) & (s < size)
    score = tl.load(logits + token * E + expert, mask=real, other=float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-score))
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
    ids, held, order, starts, slots, HELD, MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    before = 0
    mine = 0
    for start in range(0, slots, BLOCK):
        expert = tl.load(ids + start + j, mask=start + j < slots, other=-1).to(tl.int32)
        if MAPPED:
            expert = tl.load(held + expert, mask=expert >= 0, other=-1)
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
                expert = tl.load(held + expert, mask=expert >= 0, other=-1)
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
            S=triton.next_power_of_2(spec.num_experts // spec.num_groups), SIGMOID=spec.scoring == "sigmoid",
            TOP2=spec.group_score == "top2_sum", NORMALIZE=spec.normalize, HAS_BIAS=bias is not None,
            HAS_MASS=spec.mass is not None, HAS_LIVE=live is not None, num_warps=1,
        )  # fmt: skip
    return ids, weights


def sort_by_expert(ids: Tensor, experts: int, held: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Selected experts [T, k] -> (order [T k] int32, starts [H + 1] int32).

    order[starts[e] … starts[e + 1]] are the slots t k + j of the tokens of local expert e, ascending.
    held [E] int32 maps experts to local indices, -1 if on another rank; None: all are local, in order. One
    program per expert counts and places its slots without atomics, so the order is deterministic.
    """
    slots = ids.numel()
    order = torch.empty(max(1, slots), dtype=torch.int32, device=ids.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    _sort[(experts,)](
        ids, held, order, starts, slots, experts, MAPPED=held is not None,
        BLOCK=min(2048, max(16, triton.next_power_of_2(slots))), num_warps=4,
    )  # fmt: skip
    return order, starts
