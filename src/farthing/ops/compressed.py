"""What DeepSeek-V4 computes in torch, on any device: attention to a compressed past, and hyper-connections.

Legend: T tokens of the step; t those of one sequence; H query heads of size d, of which the last r are
rotated; Hi index heads of size di; E entries; K selected ones; n streams; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import IndexCache, LatentCache, Place
from farthing.ops.indexer import top_positions, write_keys
from farthing.ops.specs import CompressedParts, CompressedSpec, PoolParts, StreamParts, StreamSpec
from farthing.ops.torch_util import rotate

Here = Callable[[Tensor], Tensor]  # copies a tensor to the device


@dataclass(frozen=True, slots=True)
class Compressed:
    """A layer's parameters, on one device."""

    spec: CompressedSpec
    parts: CompressedParts
    rope: Tensor  # [2, max_len, r / 2]


@dataclass(frozen=True, slots=True)
class Streams:
    """Parameters of hyper-connections, on one device."""

    spec: StreamSpec
    parts: StreamParts


def pack_heads(spec: CompressedSpec, parts: CompressedParts, rope: Tensor, here: Here) -> Compressed:
    """`Ops.pack_compressed`."""
    pools = tuple(PoolParts(here(pool.bias), here(pool.norm)) for pool in parts.pools)
    return Compressed(spec, CompressedParts(here(parts.norm), here(parts.sinks), pools), here(rope))


def pack_streams(spec: StreamSpec, parts: StreamParts, here: Here) -> Streams:
    """`Ops.pack_streams`."""
    return Streams(spec, StreamParts(here(parts.weight), here(parts.base), here(parts.scale)))


# Attention.


def attend(q: Tensor, x: Tensor, index_q: Tensor | None, a: Compressed, place: Place) -> Tensor:
    """`Ops.compressed`, sequence by sequence."""
    s, batch = a.spec, place.batch
    cos, sin = a.rope[:, batch.positions.long()].unsqueeze(2).unbind(0)  # [T, 1, r / 2]
    query = _turned(_unit(q.float().unflatten(-1, (s.num_heads, -1)), s.norm_eps), cos, sin)
    key = _unit(x[:, None, : s.head_dim].float(), s.norm_eps) * a.parts.norm
    own = place.cache.of(s.window).entries[s.rate]
    write_keys(_keys(own), place.row, batch.of(s.window).slots, _turned(key, cos, sin)[:, 0])
    if index_q is not None and s.index is not None:
        index_q = _turned(index_q.float().unflatten(-1, (s.index.num_heads, -1)), cos, sin)
    out = torch.empty_like(query)
    pooled = x[:, s.head_dim :].float()
    for b, (start, stop) in enumerate(pairwise(batch.query_start.tolist())):
        length, rows = int(batch.context_lens[b]), slice(start, stop)
        keys, seen = _window(a, place, b, length, batch.positions[rows])
        if s.rate:
            _make_entries(pooled[rows], a, place, b, length)
            selected = None if index_q is None else (index_q[rows], pooled[rows, -index_q.shape[1] :])
            past, chosen = _past(a, place, b, length, batch.positions[rows], selected)
            keys, seen = torch.cat((keys, past)), torch.cat((seen, chosen), 1)
        scores = torch.einsum("thd,sd->ths", query[rows], keys) * s.head_dim**-0.5
        scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
        sinks = a.parts.sinks.view(1, -1, 1).expand(stop - start, -1, 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        out[rows] = weights @ keys
    return _turned(out, cos, -sin).flatten(1).to(q.dtype)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x)."""
    inverse: Tensor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., d] with its last r elements rotated by cos, sin [..., r / 2]."""
    still, last = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), -1)
    return torch.cat((still, rotate(last, cos, sin, interleaved=True)), -1)


def _keys(cache: LatentCache | IndexCache) -> IndexCache:
    """With one scale per key: an entry's is that of the latent, and its rotary part is empty."""
    if isinstance(cache, IndexCache):
        return cache
    return IndexCache(cache.data, None if cache.scale is None else cache.scale[..., 0])


def _read(cache: LatentCache | IndexCache, row: int, slots: Tensor) -> Tensor:
    """Keys [t, d] float32 in slots [t]."""
    kept = _keys(cache)
    keys = kept.data[row].flatten(0, 1)[slots].float()
    return keys if kept.scale is None else keys * kept.scale[row].flatten(0, 1)[slots].unsqueeze(1)


def _window(a: Compressed, place: Place, b: int, length: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [S, d] of a sequence up to `length` that its tokens of the step see, and which one does [t, S]."""
    s, table = a.spec, place.batch.of(a.spec.window).block_table[b]
    kept = place.cache.of(s.window).entries[s.rate]
    at = torch.arange(max(0, length - len(positions) - s.window + 1), length, device=positions.device)
    keys = _read(
        kept, place.row, table[at // kept.block_size].long() * kept.block_size + at % kept.block_size
    )
    return keys, (at <= positions[:, None]) & (at > positions[:, None] - s.window)


def _slots(a: Compressed, place: Place, b: int, entries: Tensor) -> Tensor:
    """Slots of a sequence's entries, of which a block has as many as its tokens make."""
    size = place.cache.entries[a.spec.rate].block_size
    return place.batch.block_table[b][entries // size].long() * size + entries % size


def _make_entries(x: Tensor, a: Compressed, place: Place, b: int, length: int) -> None:
    """Entries of the windows that t tokens complete, from their pooled columns x [t, …] and earlier ones."""
    s, cache, batch = a.spec, place.cache, place.batch
    assert cache.open is not None and batch.state_slots is not None
    x = x[:, : 2 * sum(s.pooled)]
    kept = cache.open.rows[s.rate][place.row, int(batch.state_slots[b])]  # [open_tokens, columns]
    before, size = length - len(x), s.open_tokens
    first, last = before // s.rate, length // s.rate  # the windows that are completed
    if first < last:
        start = max(0, (first + 1) * s.rate - size)
        early = torch.arange(start, before, device=x.device)
        rows = torch.cat((kept[early % size], x[: last * s.rate - before]))
        if first == 0 and size > s.rate:  # nothing is before the first window
            rows = torch.cat((rows.new_zeros(s.rate, rows.shape[1]), rows))
        entries = torch.arange(first, last, device=x.device)
        turns = a.rope[:, entries * s.rate]
        stores = [cache.entries[s.rate], cache.index]
        column = 0
        for pool, width, store in zip(a.parts.pools, s.pooled, stores, strict=False):
            values, gates = rows[:, column : column + 2 * width].split(width, -1)
            column += 2 * width
            entry = _pooled(values, gates, pool, s, empty=first == 0)
            entry = _turned(_unit(entry, s.norm_eps) * pool.norm, *turns.unbind(0))
            assert store is not None
            write_keys(_keys(store), place.row, _slots(a, place, b, entries), entry)
    late = torch.arange(max(before, length - size), length, device=x.device)
    kept[late % size] = x[late - before]


def _pooled(values: Tensor, gates: Tensor, pool: PoolParts, s: CompressedSpec, empty: bool) -> Tensor:
    """Values and gates [(E or E + 1) rate, w] -> [E, d]: of the window, or of the first half of the columns
    of the window before it and the second half of its own. empty: nothing is before the first one."""
    gates = (gates.unflatten(0, (-1, s.rate)) + pool.bias).flatten(0, 1)
    values, gates = (each.unflatten(0, (-1, s.rate)) for each in (values, gates))
    if s.index is not None:
        if empty:
            gates[0] = float("-inf")
        half = values.shape[-1] // 2
        values, gates = (torch.cat((each[:-1, :, :half], each[1:, :, half:]), 1) for each in (values, gates))
    return (values * gates.softmax(1)).sum(1)


def _past(
    a: Compressed,
    place: Place,
    b: int,
    length: int,
    positions: Tensor,
    selected: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Entries [E, d] of a sequence, and which of them its tokens attend to [t, E].

    selected: the index queries [t, Hi, di] and weights [t, Hi] of the tokens.
    """
    s, cache = a.spec, place.cache
    entries = torch.arange(length // s.rate, device=positions.device)
    slots = _slots(a, place, b, entries)
    seen = entries < ((positions + 1) // s.rate)[:, None]
    if selected is not None and s.index is not None and len(entries) > s.index.top_k:
        assert cache.index is not None
        (query, w), keys = selected, _read(cache.index, place.row, slots)
        scores = torch.einsum("thd,ed->the", query, keys).relu() * s.index.head_dim**-0.5
        scores = torch.einsum("th,the->te", w * s.index.num_heads**-0.5, scores)
        best = top_positions(scores.masked_fill(~seen, float("-inf")), s.index.top_k).long()
        chosen = torch.zeros(len(positions), len(entries) + 1, dtype=torch.bool, device=seen.device)
        seen = chosen.scatter_(1, torch.where(best < 0, len(entries), best), True)[:, :-1]
    return _read(cache.entries[s.rate], place.row, slots), seen


# Hyper-connections.


def collapse(x: Tensor, h: Streams) -> tuple[Tensor, Tensor]:
    """`Ops.collapse`, in float32."""
    n, eps = h.spec.count, h.spec.eps
    streams = x.float().unflatten(-1, (n, -1))
    found = F.linear(_unit(x.float(), h.spec.norm_eps), h.parts.weight)
    base = h.parts.base
    into = torch.sigmoid(found[:, :n] * h.parts.scale[0] + base[:n]) + eps
    u = (into.unsqueeze(-1) * streams).sum(1).to(x.dtype)
    if found.shape[1] == n:
        return u, found[:, :0]
    out = 2 * torch.sigmoid(found[:, n : 2 * n] * h.parts.scale[1] + base[n : 2 * n])
    mixing = (found[:, 2 * n :] * h.parts.scale[2] + base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + eps
    mixing = mixing / (mixing.sum(-2, keepdim=True) + eps)
    for _ in range(h.spec.steps - 1):
        mixing = mixing / (mixing.sum(-1, keepdim=True) + eps)
        mixing = mixing / (mixing.sum(-2, keepdim=True) + eps)
    return u, torch.cat((out, mixing.flatten(1)), -1)


def spread(x: Tensor, y: Tensor, mix: Tensor) -> Tensor:
    """`Ops.spread`: stream j is y times its weight, and the sum over i of mixing[i, j] times stream i."""
    n = int(mix.shape[1] ** 0.5)
    out, mixing = mix.split((n, n * n), -1)
    streams = torch.einsum("tij,tid->tjd", mixing.unflatten(-1, (n, n)), x.float().unflatten(-1, (n, -1)))
    found: Tensor = (out.unsqueeze(-1) * y.float().unsqueeze(1) + streams).flatten(1).to(x.dtype)
    return found
