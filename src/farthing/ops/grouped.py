"""Grouped-query attention in torch, on any device.

A key-value head is a row of the latent cache whose latent is the value and whose rotary part is the key.
Legend: T tokens; B sequences; S cached tokens; H query heads; G key-value heads; d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import Batch, GroupedParts, GroupedSpec, LatentCache
from farthing.ops.cache import cache_max, quantized, scaled
from farthing.ops.rotary import rotate


@dataclass(frozen=True, slots=True)
class Grouped:
    """A layer's heads, on one device."""

    spec: GroupedSpec
    parts: GroupedParts
    rope: Tensor  # [2, max_len, rotated / 2]


def pack_grouped(
    spec: GroupedSpec, parts: GroupedParts, rope: Tensor, here: Callable[[Tensor], Tensor]
) -> Grouped:
    """here: copies a tensor to the device."""
    moved = (None if part is None else here(part) for part in (parts.bias, parts.q_norm, parts.k_norm))
    return Grouped(spec, GroupedParts(*moved), here(rope))


def prepared(
    qkv: Tensor, g: Grouped, positions: Tensor, eps: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (H + 2 G) d] -> queries [T, H, d], keys and values [T, G, d]: biased, normed and rotated."""
    s, parts = g.spec, g.parts
    if parts.bias is not None:
        qkv = qkv + parts.bias.to(qkv.dtype)
    q, k, v = qkv.split((s.num_heads * s.head_dim, *(s.kv_heads * s.head_dim,) * 2), -1)
    if s.whole_norm:
        q, k = _normed(q, parts.q_norm, eps), _normed(k, parts.k_norm, eps)
    q, k, v = (x.unflatten(-1, (-1, s.head_dim)) for x in (q, k, v))
    if not s.whole_norm:
        q, k = _normed(q, parts.q_norm, eps), _normed(k, parts.k_norm, eps)
    cos, sin = g.rope[:, positions].unsqueeze(2).unbind(0)  # [T, 1, rotated / 2]

    def turned(x: Tensor) -> Tensor:
        rotated, still = x.split((s.rope_dim, s.head_dim - s.rope_dim), -1)
        return torch.cat((rotate(rotated, cos, sin, s.interleaved), still), -1)

    return turned(q), turned(k), v


def _normed(x: Tensor, weight: Tensor | None, eps: float | Tensor) -> Tensor:
    if weight is None:
        return x
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * x32.to(x.dtype)


def write_heads(cache: LatentCache, row: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store keys and values [T, G, d] in the rows from `row` on."""
    rows = slice(row, row + k.shape[1])
    data = cache.data[rows].flatten(1, 2)
    values, scale = quantized(v.transpose(0, 1), k.transpose(0, 1), data.dtype)
    data[:, slots] = values
    if cache.scale is not None and scale is not None:
        cache.scale[rows].flatten(1, 2)[:, slots] = scale


def read_heads(cache: LatentCache, row: int, groups: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, d] float32 at slots [B, S]."""
    rows = slice(row, row + groups)
    found = cache.data[rows].flatten(1, 2)[:, slots].float()  # [G, B, S, 2 d]
    width = found.shape[-1] // 2
    if cache.scale is not None and cache_max(cache.data.dtype):
        found = scaled(found, cache.scale[rows].flatten(1, 2)[:, slots], width)
    v, k = found.transpose(0, 1).split(width, -1)
    return k, v


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, s: GroupedSpec) -> Tensor:
    """q [B t, H, d], k and v [B, G, S, d] -> [B t, H d]; seen [B, t, S] bool, None: up to a token's own."""
    query = q.unflatten(0, (k.shape[0], -1)).transpose(1, 2)  # [B, H, t, d]
    causal = seen is None and query.shape[2] > 1
    mask = None if seen is None else seen.unsqueeze(1)
    k, v = k.to(query.dtype), v.to(query.dtype)
    out = F.scaled_dot_product_attention(
        query, k, v, mask, is_causal=causal, scale=s.scale, enable_gqa=s.kv_heads != s.num_heads
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def attend_plainly(qkv: Tensor, g: Grouped, cache: LatentCache, row: int, batch: Batch, eps: float) -> Tensor:
    """`Ops.gqa`, sequence by sequence."""
    s, size = g.spec, cache.block_size
    q, k, v = prepared(qkv, g, batch.positions.long(), eps)
    write_heads(cache, row, batch.slots, k, v)
    out = torch.empty(q.shape[0], s.num_heads * s.head_dim, dtype=q.dtype, device=q.device)
    starts, lengths = batch.query_start.tolist(), batch.context_lens.tolist()
    for b, length in enumerate(lengths):
        start, stop = starts[b], starts[b + 1]
        at = torch.arange(length, device=q.device)
        slots = batch.block_table[b, at // size].long() * size + at % size
        keys, values = read_heads(cache, row, s.kv_heads, slots[None])
        seen = at <= batch.positions[start:stop, None]
        out[start:stop] = attend(q[start:stop], keys, values, seen[None], s)
    return out
