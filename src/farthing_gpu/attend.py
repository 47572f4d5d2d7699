"""Attention of one step on a GPU: which kernel takes each sequence.

Legend: see `farthing.ops.api`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.ops.api import Batch, LatentCache, Place
from farthing.ops.reference import Grouped, gated_output, prepared, read_heads, turning, write_heads
from farthing.ops.reference import attend as attend_heads
from farthing.ops.selection import chosen, in_rows, pieces, visible
from farthing.ops.specs import AttentionSpec
from farthing_gpu.attention import decode, gather, prefill, rotate_queries, write_latent

GROUPED_TOGETHER = 8  # new tokens per sequence above which torch's attention takes them together; an estimate
MOST_EXPANDED = 1 << 29  # limit on expanded keys and values held at once (one sequence may exceed it)


@dataclass(frozen=True, slots=True)
class Heads:
    """kv_b_proj per head: rows [W_UK (n); W_UV (v)]."""

    spec: AttentionSpec
    kv_b: Tensor  # [H, n + v, c]
    norm: Tensor  # [c] float32
    rope: Tensor  # [2, max_len, r / 2] float32


def expand_from(heads: Heads | Grouped) -> float:
    """Number of new tokens per sequence above which expanding its keys is cheaper."""
    if isinstance(heads, Grouped):
        return GROUPED_TOGETHER
    s = heads.spec
    wide = s.nope_dim + s.value_dim
    saved = 2 * s.latent_dim - wide
    return s.latent_dim * wide / saved if saved > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a step, on the host."""

    sequence: int
    begin: int
    end: int
    keys: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The methods of a step: expanded sequences, and the tokens (with their sequences) that decode."""

    expanded: list[Span]
    tokens: Tensor | None  # [m] int64; None: all of them
    sequences: Tensor | None  # [m] int32


def plan(batch: Batch, expand_from: float) -> Plan:
    """Copies the batch to the host unless every sequence has one token."""
    count, device = batch.context_lens.shape[0], batch.positions.device
    if batch.positions.shape[0] == count:
        return Plan([], None, torch.arange(count, dtype=torch.int32, device=device))
    starts, keys = batch.query_start.tolist(), batch.context_lens.tolist()
    spans = [Span(b, starts[b], starts[b + 1], keys[b]) for b in range(count)]
    expanded = [s for s in spans if s.end - s.begin > expand_from]
    few = [s for s in spans if s.end - s.begin <= expand_from]
    if not few:
        return Plan(expanded, None, None)
    tokens = torch.tensor([t for s in few for t in range(s.begin, s.end)], device=device)
    sequences = [s.sequence for s in few for _ in range(s.begin, s.end)]
    return Plan(
        expanded, None if not expanded else tokens, torch.tensor(sequences, dtype=torch.int32, device=device)
    )


def attend(
    q: Tensor, kv: Tensor, heads: Heads, place: Place, plan: Plan, select: Tensor | None = None
) -> Tensor:
    """`Ops.mla`: q [T, H (n + r)], kv [T, c + r] -> [T, H v]."""
    s, cache, layer, batch = heads.spec, place.cache, place.row, place.batch
    q_pe = rotate_queries(q, batch.positions, heads.rope, s.num_heads, s.nope_dim, s.rope_dim, s.interleaved)
    write_latent(
        kv, heads.norm, s.norm_eps, batch.positions, heads.rope, s.interleaved, cache, layer, batch.slots
    )
    if select is not None:
        reads = chosen(select, batch, cache.block_size)
        return _absorbed(
            q, q_pe, heads, in_rows(cache), layer, reads.slots, reads.starts[:-1], reads.counts - 1
        )
    if plan.sequences is not None and not plan.expanded:
        return _absorbed(q, q_pe, heads, cache, layer, batch.block_table, plan.sequences, batch.positions)
    out = torch.empty(q.shape[0], s.num_heads * s.value_dim, dtype=q.dtype, device=q.device)
    if plan.sequences is not None and plan.tokens is not None:
        some = plan.tokens
        out[some] = _absorbed(
            q[some], q_pe[some], heads, cache, layer, batch.block_table, plan.sequences, batch.positions[some]
        )
    for group in _groups(plan.expanded, s.num_heads * (s.nope_dim + s.value_dim)):
        _expand(q, q_pe, heads, cache, layer, batch, group, out)
    return out


def attend_grouped(qkv: Tensor, heads: Grouped, place: Place, plan: Plan) -> Tensor:
    """`Ops.gqa`. Few tokens take the latent kernel, one key-value head at a time: where a key has no part in
    common with its value, queries have zeros. Prompts take torch's attention."""
    s, cache, row, batch = heads.spec, place.cache, place.row, place.batch
    q, k, v = prepared(qkv, heads, batch.positions.long())
    write_heads(cache, row, batch.slots, k, v, heads)
    out = torch.empty(q.shape[0], s.num_heads, s.head_dim, dtype=q.dtype, device=q.device)
    if plan.sequences is not None:
        few = slice(None) if plan.tokens is None else plan.tokens
        each, positions = s.num_heads // s.kv_heads, batch.positions[few]
        for g in range(s.kv_heads):
            group = slice(g * each, (g + 1) * each)
            query = q[few, group]
            latent = torch.zeros_like(query)
            if s.turning is not None and heads.parts.k_norm is not None:
                at = turning(s)
                latent = (query * heads.parts.k_norm).to(query.dtype)
                latent[..., at] = 0
                query = query[..., at]
            sinks = None if heads.parts.sinks is None else heads.parts.sinks[group]
            out[few, group] = decode(
                latent.contiguous(), query.contiguous(), cache, row + g, batch.block_table, plan.sequences,
                positions, s.scale, window=s.window, sinks=sinks,
            )  # fmt: skip
    size = cache.block_size
    for span in plan.expanded:
        window = None if s.window is None or s.window >= span.keys else s.window
        for tokens, read in pieces(span.begin, span.end, span.keys - (span.end - span.begin), window):
            at = torch.arange(read.start, read.stop, device=q.device)
            slots = batch.block_table[span.sequence, at // size].long() * size + at % size
            keys, values = read_heads(cache, row, heads, slots[None])
            whole = window is None and tokens.stop - tokens.start == len(read)
            seen = None if whole else visible(at, batch.positions[tokens, None], window)[None]
            mixed = attend_heads(q[tokens], keys, values, seen, heads)
            out[tokens] = mixed.unflatten(1, (s.num_heads, -1))
    return gated_output(out.flatten(1), qkv, heads)


def _absorbed(
    q: Tensor, q_pe: Tensor, heads: Heads, cache: LatentCache, layer: int, table: Tensor, sequences: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    s = heads.spec
    w_uk, w_uv = heads.kv_b.split((s.nope_dim, s.value_dim), 1)
    nope = q.unflatten(1, (s.num_heads, -1))[..., : s.nope_dim]
    latent = torch.bmm(nope.transpose(0, 1), w_uk).transpose(0, 1).contiguous()  # [m, H, c]
    mixed = decode(latent, q_pe, cache, layer, table, sequences, positions, s.scale)
    return torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1).flatten(1)


def _expand(
    q: Tensor, q_pe: Tensor, heads: Heads, cache: LatentCache, layer: int, batch: Batch, group: list[Span],
    out: Tensor,
) -> None:  # fmt: skip
    s = heads.spec
    lengths = [span.keys for span in group]
    table = batch.block_table[[span.sequence for span in group]]
    latent, key, first = gather(cache, layer, table, lengths, s.latent_dim, q.dtype)
    expanded = latent @ heads.kv_b.flatten(0, 1).t()  # [S, H (n + v)]
    prefill(
        q, q_pe, expanded, key, out, [(span.begin, span.end) for span in group], first, lengths, s.scale,
        (s.num_heads, s.nope_dim, s.rope_dim, s.value_dim),
    )  # fmt: skip


def _groups(spans: list[Span], width: int) -> list[list[Span]]:
    groups: list[list[Span]] = []
    size = 0
    for span in spans:
        if not groups or size + span.keys * width > MOST_EXPANDED:
            groups.append([])
            size = 0
        groups[-1].append(span)
        size += span.keys * width
    return groups
