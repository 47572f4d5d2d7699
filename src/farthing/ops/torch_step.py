"""The arithmetic of the torch backend, on packed layers and without loops over tokens.

`queries`, `dense_output` and `expert_output` take one token through a layer. They can be compiled, because
the host reads no value. Prompts and batches use the same parts eagerly.
Legend: see `farthing.ops.api`; S cached tokens; I intermediate size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import AttentionSpec, Batch, LayerHandles, RouterSpec
from farthing.ops.cache import scaled
from farthing.ops.reference import Gated, gated_mlp, identity_weight, route
from farthing.ops.rotary import rotate

Mlp = tuple[Tensor, Tensor] | Gated  # gate and up [2 I, D], down [D, I]; three if inputs are rounded


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention's packed part."""

    spec: AttentionSpec
    w_uk: Tensor  # [H, n, c]
    w_uv: Tensor  # [H, c, v]
    norm: Tensor  # [c]
    rope: Tensor  # [2, max_len, r/2]

    @property
    def expand_from(self) -> int:
        """Tokens of a prompt from which keys and values of all heads are computed: less work per pair of
        tokens than in the latent space, which costs nothing to enter."""
        s = self.spec
        saved = 2 * (s.latent_dim + s.rope_dim) - 2 * max(s.nope_dim + s.rope_dim, s.value_dim)
        return s.latent_dim * (s.nope_dim + s.value_dim) // saved + 1 if saved > 0 else sys.maxsize


@dataclass(slots=True)
class Experts:
    """A router and its experts."""

    spec: RouterSpec
    gate: Tensor  # [E, D] float32
    bias: Tensor | None
    experts: list[Mlp | None]  # None: an identity, or on another rank; empty if they are stacked
    shared: Mlp | None
    stacked: tuple[Tensor, Tensor] | None  # [E, 2 I, D] and [E, D, I]


@dataclass(frozen=True, slots=True)
class Span:
    """Sequences that attend together: tokens start … stop, one per sequence, or all of one sequence."""

    start: int
    stop: int
    slots: Tensor  # [B, S] int64, cache rows
    # [B, t, S] bool, rows a token attends to; None: those up to its own, and t is 1 or S
    seen: Tensor | None


def spans(batch: Batch, block_size: int) -> list[Span]:
    """The batch's sequences; adjacent ones with a single token attend together."""
    starts, lens = batch.query_start.tolist(), batch.context_lens.tolist()
    offset = torch.arange(max(lens), device=batch.positions.device)
    table = batch.block_table.long()

    def span(first: int, last: int) -> Span:
        rows = offset[: max(lens[first:last])]
        slots = table[first:last, rows // block_size] * block_size + rows % block_size
        tokens = starts[last] - starts[first]
        if last - first == 1 and tokens in (1, lens[first]):
            return Span(starts[first], starts[last], slots, None)
        positions = batch.positions[starts[first] : starts[last]].view(last - first, -1, 1)
        return Span(starts[first], starts[last], slots, rows <= positions)

    found, first = [], 0
    single = [stop - start == 1 for start, stop in pairwise(starts)]
    for b, alone in enumerate(single):
        if not alone or b + 1 == len(single) or not single[b + 1]:
            found.append(span(first, b + 1))
            first = b + 1
    return found


# -- one token through a layer


def queries(
    h: Tensor, layer: LayerHandles, positions: Tensor, eps: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's input h [T, D] -> queries [T, H, c + r] in the latent space; latent and key to cache."""
    qkv = F.linear(normed(h, layer.norm, eps), layer.qkv_a)
    q, kv = qkv[:, : layer.q_width], qkv[:, layer.q_width :]
    if layer.q_b is not None:
        assert layer.q_norm is not None
        q = F.linear(normed(q, layer.q_norm, eps), layer.q_b)
    q_nope, q_pe, latent, k_pe = rotated(q, kv, layer.heads, positions, eps)
    return absorbed(q_nope, q_pe, layer.heads), latent, k_pe


def dense_output(h: Tensor, query: Tensor, keys: Tensor, layer: LayerHandles, eps: float | Tensor) -> Tensor:
    """The layer's output [1, D] with a dense MLP; keys [1, S, c + r]."""
    h = h + F.linear(values(attend(query, keys, None, layer.heads.spec), layer.heads, h.dtype), layer.o)
    return h + gated(normed(h, layer.feed_norm, eps), layer.feed)


def expert_output(
    h: Tensor, query: Tensor, keys: Tensor, layer: LayerHandles, eps: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output [1, D] with experts; also their ids [k], and 1 or, if skipped, 0 for each."""
    h = h + F.linear(values(attend(query, keys, None, layer.heads.spec), layer.heads, h.dtype), layer.o)
    n = normed(h, layer.feed_norm, eps)
    w: Experts = layer.feed
    assert w.stacked is not None
    ids, gates = route(F.linear(n.float(), w.gate), w.bias, w.spec)
    chosen = ids[0].clamp_min(0)
    # Products and sums instead of matrix products: compiled, they read the chosen experts in place.
    gate, up = (w.stacked[0][chosen].float() * n.float()).sum(-1).to(n.dtype).chunk(2, -1)  # [k, I]
    inner = (F.silu(gate) * up).float() * gates[0].unsqueeze(-1)
    out = (w.stacked[1][chosen].float() * inner.unsqueeze(1)).sum(-1).sum(0, keepdim=True)  # [1, D]
    if w.shared is not None:
        out = out + gated(n, w.shared).float()
    return h + out.to(h.dtype), chosen, (ids[0] >= 0).long()


# -- parts


def normed(x: Tensor, weight: Tensor, eps: float | Tensor) -> Tensor:
    """`Ops.rms_norm`."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * x32.to(x.dtype)


def gated(x: Tensor, w: Mlp) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    if len(w) == 3:
        return gated_mlp(x, w)
    gate, up = F.linear(x, w[0]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w[1])


def rotated(
    q: Tensor, kv: Tensor, a: Heads, positions: Tensor, eps: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [T, H, n] and [T, H, r], and the latent [T, c] and key [T, r] to cache."""
    s = a.spec
    cos, sin = a.rope[:, positions].unbind(0)  # [T, r/2]
    q_nope, q_pe = q.view(-1, s.num_heads, s.nope_dim + s.rope_dim).split((s.nope_dim, s.rope_dim), -1)
    latent, k_pe = kv.split((s.latent_dim, s.rope_dim), -1)
    q_pe = rotate(q_pe, cos.unsqueeze(1), sin.unsqueeze(1), s.interleaved)
    return q_nope, q_pe, normed(latent, a.norm, eps), rotate(k_pe, cos, sin, s.interleaved)


def absorbed(q_nope: Tensor, q_pe: Tensor, a: Heads) -> Tensor:
    """Queries [T, H, c + r] float32 in the latent space."""
    return torch.cat((torch.einsum("thn,hnc->thc", q_nope, a.w_uk), q_pe), -1).float()


def gathered(data: Tensor, scale: Tensor | None, slots: Tensor, latent_dim: int) -> Tensor:
    """Keys [B, S, c + r] float32 from cache rows data [*, c + r], with scale [*, 2] if it is 8-bit."""
    keys = data[slots].float()
    return keys if scale is None else scaled(keys, scale[slots], latent_dim)


def attend(query: Tensor, keys: Tensor, seen: Tensor | None, s: AttentionSpec) -> Tensor:
    """query [T, H, c + r], keys [B, S, c + r], seen as in `Span` -> [T, H, c] float32."""
    grouped = query.view(keys.shape[0], -1, *query.shape[1:])  # [B, t, H, c + r]
    if grouped.shape[1] > 1:  # values are the keys' first part
        shared = keys.unsqueeze(1).expand(-1, s.num_heads, -1, -1)
        return _causal(grouped.transpose(1, 2), shared, shared, seen, s)[..., : s.latent_dim]
    scores = torch.bmm(grouped.squeeze(1), keys.transpose(1, 2)) * s.scale
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.bmm(scores.softmax(-1), keys[..., : s.latent_dim])


def attend_expanded(
    q_nope: Tensor, q_pe: Tensor, keys: Tensor, seen: Tensor | None, a: Heads, dtype: torch.dtype
) -> Tensor:
    """One sequence with keys and values of every head: q [t, H, n] and [t, H, r] -> [t, H v]."""
    s = a.spec
    latent, k_pe = keys.split((s.latent_dim, s.rope_dim), -1)  # [1, S, …]
    k_nope = torch.matmul(latent.to(dtype), a.w_uk.transpose(1, 2))  # [H, S, n]
    value = torch.matmul(latent.to(dtype), a.w_uv)  # [H, S, v]
    key = torch.cat((k_nope, k_pe.to(dtype).expand(s.num_heads, -1, -1)), -1)
    query = torch.cat((q_nope, q_pe), -1).transpose(0, 1)
    out = _causal(query[None], key[None], value[None], seen, s)
    return out[..., : s.value_dim].flatten(1)


def _causal(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, s: AttentionSpec) -> Tensor:
    """query [B, H, t, *], key and value [B, H, S, *] -> [B t, H, *], padded to one width."""
    width = max(key.shape[-1], value.shape[-1])  # torch's fast kernels want one

    def padded(x: Tensor) -> Tensor:
        return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))

    mask = None if seen is None else seen.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), mask, is_causal=seen is None, scale=s.scale
    )
    return out.transpose(1, 2).flatten(0, 1)


def values(mixed: Tensor, a: Heads, dtype: torch.dtype) -> Tensor:
    """Attention's output [T, H, c] mapped from the latent space to the heads' values [T, H v]."""
    return torch.einsum("thc,hcv->thv", mixed.to(dtype), a.w_uv).flatten(1)


def mixture(n: Tensor, w: Experts, ids: Tensor, gates: Tensor, counts: Tensor | None) -> Tensor:
    """The weighted sum of experts [T, D] float32: each one computes all its tokens at once."""
    k = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    found = torch.bincount(ids.flatten() + 1, minlength=w.spec.num_experts + 1)
    if counts is not None:
        counts += found[1:]
    skipped, *numbers = found.tolist()  # skipped experts, with id -1, come first
    y = _each(n.index_select(0, order[skipped:] // k), numbers, w)
    if skipped:
        y = torch.cat((y.new_zeros(skipped, y.shape[1]), y))
    # Row t sums the outputs that its experts left at these places of y.
    places = order.argsort().view(-1, k)
    out = F.embedding_bag(places, y, mode="sum", per_sample_weights=gates.to(y.dtype)).float()
    if w.spec.identities:
        out += n.float() * identity_weight(ids, gates, w.spec)
    return out if w.shared is None else out + gated(n, w.shared).float()


def _each(tokens: Tensor, numbers: list[int], w: Experts) -> Tensor:
    """tokens [N, D] in order of their expert, of which expert e has numbers[e] -> its output for each."""
    if w.stacked is None:
        parts = zip(tokens.split(numbers), w.experts, strict=True)
        return torch.cat([torch.zeros_like(x) if e is None else gated(x, e) for x, e in parts])
    gate, up = _products(tokens, numbers, w.stacked[0]).chunk(2, -1)
    return _products(F.silu(gate) * up, numbers, w.stacked[1])


def _products(x: Tensor, numbers: list[int], matrices: Tensor) -> Tensor:
    """x [N, K] times matrices [E, M, K], of which matrix e gets the next numbers[e] rows -> [N, M]."""
    out = x.new_empty(x.shape[0], matrices.shape[1])
    parts = zip(x.split(numbers), matrices.transpose(1, 2), out.split(numbers), strict=True)
    for rows, matrix, result in parts:
        if rows.shape[0]:
            torch.mm(rows, matrix, out=result)
    return out
