"""Every op in plain torch, as the papers define it: the oracle of all backends.

Written for clarity, not speed. Weights are dequantized once; activations are quantized only with calibrated
ranges, which are part of the model.
Legend: see `farthing.ops.api`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops import compressed as past
from farthing.ops.api import HostOps, LatentCache, Norm, Place
from farthing.ops.delta import Delta, pack_delta
from farthing.ops.delta import delta as advance
from farthing.ops.indexer import Indexer, index
from farthing.ops.selection import chosen, in_rows, pieces, visible
from farthing.ops.specs import (
    SILU,
    AttentionSpec,
    CompressedParts,
    CompressedSpec,
    DeltaParts,
    DeltaSpec,
    Gate,
    GroupedParts,
    GroupedSpec,
    IndexerSpec,
    MoEWeights,
    RouterSpec,
    StreamParts,
    StreamSpec,
)
from farthing.ops.torch_util import (
    cache_max,
    quantized,
    read_cache,
    rotate,
    scaled,
    write_cache,
)
from farthing.ops.weights import InputRounding, Weight, inputs_of, rounded


@dataclass(frozen=True, slots=True)
class Grouped:
    """A layer's heads, on one device.

    A key-value head is a row of the latent cache whose latent is the value and whose rotary part is the key.
    Legend: T tokens; B sequences; S cached tokens; H query heads; G key-value heads; d head size.
    """

    spec: GroupedSpec
    parts: GroupedParts
    rope: Tensor  # [2, max_len, rotated / 2]


def pack_grouped(
    spec: GroupedSpec, parts: GroupedParts, rope: Tensor, here: Callable[[Tensor], Tensor]
) -> Grouped:
    """here: copies a tensor to the device."""
    found = (parts.bias, parts.q_norm, parts.k_norm, parts.sinks, parts.v_norm)
    return Grouped(spec, GroupedParts(*(None if part is None else here(part) for part in found)), here(rope))


def gated_output(out: Tensor, qkv: Tensor, g: Grouped) -> Tensor:
    """Attention's output [T, H d] times the sigmoid of the last columns of qkv, if heads have gates."""
    if not g.spec.gated:
        return out
    gate = qkv[:, -out.shape[1] :]
    if g.parts.bias is not None:
        gate = gate + g.parts.bias[-out.shape[1] :].to(gate.dtype)
    return out * gate.sigmoid()


def prepared(qkv: Tensor, g: Grouped, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (H + 2 G) d] -> queries [T, H, d], keys and values [T, G, d]: biased, normed and rotated."""
    s, parts = g.spec, g.parts
    qkv = qkv[:, : (s.num_heads + 2 * s.kv_heads) * s.head_dim]
    if parts.bias is not None:
        qkv = qkv + parts.bias[: qkv.shape[1]].to(qkv.dtype)
    q, k, v = qkv.split((s.num_heads * s.head_dim, *(s.kv_heads * s.head_dim,) * 2), -1)
    if s.whole_norm:
        q, k = normed(q, parts.q_norm, s.norm_eps), normed(k, parts.k_norm, s.norm_eps)
    q, k, v = (x.unflatten(-1, (-1, s.head_dim)) for x in (q, k, v))
    if not s.whole_norm:
        q, k = normed(q, parts.q_norm, s.norm_eps), normed(k, parts.k_norm, s.norm_eps)
    v = normed(v, parts.v_norm, s.norm_eps)
    cos, sin = g.rope[:, positions].unsqueeze(2).unbind(0)  # [T, 1, rotated / 2]

    def turned(x: Tensor) -> Tensor:
        rotated, still = x.split((s.rope_dim, s.head_dim - s.rope_dim), -1)
        return torch.cat((rotate(rotated, cos, sin, s.interleaved), still), -1)

    return turned(q), turned(k), v


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in float32; without a weight x itself."""
    if weight is None:
        return x
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * x32.to(x.dtype)


def turning(spec: GroupedSpec) -> Tensor:
    """The elements of a key that are cached: all, or those that turn."""
    count, half = spec.turning or spec.head_dim, spec.head_dim // 2
    every = torch.arange(spec.head_dim)
    return every[every % half < count // 2] if spec.turning else every


def write_heads(cache: LatentCache, row: int, slots: Tensor, k: Tensor, v: Tensor, g: Grouped) -> None:
    """Store keys and values [T, G, d] in the rows from `row` on."""
    rows = slice(row, row + k.shape[1])
    data = cache.data[rows].flatten(1, 2)
    keys = k.transpose(0, 1)[..., turning(g.spec)]
    values, scale = quantized(v.transpose(0, 1), keys, data.dtype, g.spec.cache_scales)
    data[:, slots] = values
    if cache.scale is not None and scale is not None:
        cache.scale[rows].flatten(1, 2)[:, slots] = scale


def read_heads(cache: LatentCache, row: int, g: Grouped, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, d] float32 at slots [B, S]."""
    rows, width = slice(row, row + g.spec.kv_heads), g.spec.head_dim
    pairs = cache.data[rows].flatten(1, 2)[:, slots].float()  # [G, B, S, d + d], or d + what turns
    if cache.scale is not None and cache_max(cache.data.dtype):
        pairs = scaled(pairs, cache.scale[rows].flatten(1, 2)[:, slots], width)
    v, k = pairs.transpose(0, 1).tensor_split([width], -1)
    if g.spec.turning is None:
        return k, v
    assert g.parts.k_norm is not None
    keys = v * g.parts.k_norm.float()
    keys[..., turning(g.spec)] = k
    return keys, v


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, g: Grouped) -> Tensor:
    """q [B t, H, d], k and v [B, G, S, d] -> [B t, H d]; seen [B, t, S] bool, None: up to a token's own."""
    s = g.spec
    query = q.unflatten(0, (k.shape[0], -1)).transpose(1, 2)  # [B, H, t, d]
    k, v = k.to(query.dtype), v.to(query.dtype)
    if g.parts.sinks is not None:
        query, k, v, seen = _with_sink(query, k, v, seen, g.parts.sinks / s.scale)
    causal = seen is None and query.shape[2] > 1
    mask = None if seen is None else seen.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        query, k, v, mask, is_causal=causal, scale=s.scale, enable_gqa=s.kv_heads != s.num_heads
    )
    return out[..., : s.head_dim].transpose(1, 2).flatten(2).flatten(0, 1)


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, score: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs of attention with a last key that is the sink, whose value is 0: a further column holds the
    score [H] in queries, 1 in that key and 0 in the others."""
    batch, _, t, _ = q.shape
    column = score.to(q.dtype).view(1, -1, 1, 1).expand(batch, -1, t, 1)
    k, v = F.pad(k, (0, 1, 0, 1)), F.pad(v, (0, 1, 0, 1))
    k[..., -1, -1] = 1
    if seen is None and t > 1:
        seen = torch.ones(batch, t, t, dtype=torch.bool, device=q.device).tril()
    return torch.cat((q, column), -1), k, v, None if seen is None else F.pad(seen, (0, 1), value=True)


def attend_plainly(qkv: Tensor, g: Grouped, place: Place) -> Tensor:
    """`Ops.gqa`, sequence by sequence."""
    s, cache, row, batch = g.spec, place.cache, place.row, place.batch
    size = cache.block_size
    q, k, v = prepared(qkv, g, batch.positions.long())
    write_heads(cache, row, batch.slots, k, v, g)
    out = torch.empty(q.shape[0], s.num_heads * s.head_dim, dtype=q.dtype, device=q.device)
    starts, lengths = batch.query_start.tolist(), batch.context_lens.tolist()
    for b, length in enumerate(lengths):
        start, stop = starts[b], starts[b + 1]
        for tokens, read in pieces(start, stop, length - (stop - start), s.window):
            at = torch.arange(read.start, read.stop, device=q.device)
            slots = batch.block_table[b, at // size].long() * size + at % size
            keys, values = read_heads(cache, row, g, slots[None])
            seen = visible(at, batch.positions[tokens, None], s.window)
            out[tokens] = attend(q[tokens], keys, values, seen[None], g)
    return gated_output(out, qkv, g)


@dataclass(slots=True)
class Ranged:
    """A matrix whose input is rounded with a calibrated range."""

    weight: Tensor
    inputs: InputRounding


@dataclass(slots=True)
class Biased:
    """A matrix whose products get a bias [N]."""

    weight: Tensor | Ranged
    bias: Tensor


Value = Tensor | Ranged | Biased
Gated = tuple[Value, Value, Value]


@dataclass(frozen=True, slots=True)
class Mlp:
    """A dense gated MLP, in whatever form a backend multiplies by it."""

    parts: Any
    activation: Gate


@dataclass(slots=True)
class _Attention:
    spec: AttentionSpec
    w_uk: Tensor  # [H, n, c]
    w_uv: Tensor  # [H, v, c]
    norm: Tensor  # [c]
    rope: Tensor  # [2, max_len, r/2]


@dataclass(slots=True)
class _MoE:
    spec: RouterSpec
    gate: Tensor
    bias: Tensor | None
    experts: list[Gated | None]
    shared: Gated | None
    shared_gate: Tensor | None
    logit_bias: Tensor | None
    expert_scale: Tensor | None


class ReferenceOps(HostOps):
    """Every op in torch, on any device torch runs on."""

    def __init__(self, dtype: torch.dtype, quantization: str | None = None) -> None:
        self.name = f"reference {str(dtype).removeprefix('torch.')}"
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.cache_dtype = "float32" if dtype is torch.float32 else "bfloat16"
        self._quantization = quantization

    def _value(self, weight: Weight, mlp: bool = False) -> Tensor:
        return rounded(weight, self._quantization, mlp).dequantize(self.dtype)

    # -- packing

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]], heads: int = 1) -> Value:
        parts = weights()
        return _ranged(torch.cat([self._value(w) for w in parts]), parts)

    def pack_mlp(
        self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]], activation: Gate = SILU
    ) -> Any:
        return Mlp(self._matrices(weights()), activation)

    def _matrices(self, weights: tuple[Weight, Weight, Weight]) -> Any:
        """Those of an MLP in the form that this backend multiplies by."""
        gate, up, down = weights
        return (
            self._biased(_ranged(self._value(gate, True), [gate, up]), gate),
            self._biased(_ranged(self._value(up, True), [gate, up]), up),
            self._biased(_ranged(self._value(down, True), [down]), down),
        )

    def _biased(self, value: Tensor | Ranged, weight: Weight) -> Value:
        if weight.bias is None:
            return value
        return Biased(value, weight.bias.to(self.device, self.dtype))

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> _MoE:
        w = weights()
        experts = [self._matrices(e()) if e else None for e in w.experts]
        shared = self._matrices(w.shared()) if w.shared else None
        given = (w.bias, w.shared_gate, w.logit_bias, w.expert_scale)
        bias, shared_gate, *found = (None if b is None else b.float() for b in given)
        return _MoE(spec, w.gate.float(), bias, experts, shared, shared_gate, *found)

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> _Attention:
        kv_b, norm = weights()
        heads = self._value(kv_b).view(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        w_uk, w_uv = heads.split((spec.nope_dim, spec.value_dim), dim=1)
        return _Attention(spec, w_uk, w_uv, norm.to(self.dtype), rope)

    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> Grouped:
        return pack_grouped(spec, parts, rope, lambda x: x)

    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> Indexer:
        weight, bias = norm()
        return Indexer(spec, weight.float(), bias.float(), rope)

    def pack_delta(self, name: str, spec: DeltaSpec, parts: Callable[[], DeltaParts]) -> Delta:
        return pack_delta(spec, parts(), lambda x: x)

    def pack_compressed(
        self, name: str, spec: CompressedSpec, parts: Callable[[], CompressedParts], rope: Tensor
    ) -> past.Compressed:
        return past.pack_heads(spec, parts(), rope, lambda x: x)

    def pack_streams(
        self, name: str, spec: StreamSpec, hidden: int, parts: Callable[[], StreamParts]
    ) -> past.Streams:
        return past.pack_streams(spec, parts(), lambda x: x)

    # -- computing

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table).to(self.dtype)

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return normed(x, norm.weight, norm.eps)

    def linear(
        self, x: Tensor, weight: Value, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if norm is not None:
            x = self.rms_norm(x, norm)
        y = product(x, weight)
        return y if residual is None else residual + y

    def mla(
        self, q: Tensor, kv: Tensor, heads: _Attention, place: Place, select: Tensor | None = None
    ) -> Tensor:
        s, cache, row, batch = heads.spec, place.cache, place.row, place.batch
        cos, sin = heads.rope[:, batch.positions.long()].unbind(0)  # [T, r/2]
        q_nope, q_pe = q.view(-1, s.num_heads, s.nope_dim + s.rope_dim).split((s.nope_dim, s.rope_dim), -1)
        q_pe = rotate(q_pe, cos.unsqueeze(1), sin.unsqueeze(1), s.interleaved)
        latent, k_pe = kv.split((s.latent_dim, s.rope_dim), -1)
        latent = normed(latent, heads.norm, s.norm_eps)
        write_cache(cache, row, batch.slots, latent, rotate(k_pe, cos, sin, s.interleaved))
        # Absorbed: the query is mapped to the latent space, so that keys are never expanded.
        q_latent = torch.einsum("thn,hnc->thc", q_nope, heads.w_uk)
        query = torch.cat((q_latent, q_pe), -1).float()  # [T, H, c + r]
        out = torch.empty(q.shape[0], s.num_heads, s.latent_dim)
        starts, lengths, table, seen = (
            batch.query_start,
            batch.context_lens,
            batch.block_table,
            batch.positions,
        )
        if select is not None:
            reads = chosen(select, batch, cache.block_size)
            starts, lengths, table, seen = reads.starts, reads.counts, reads.slots, reads.counts - 1
            cache = in_rows(cache)
        for b, (start, stop) in enumerate(pairwise(starts)):
            keys = read_cache(cache, row, table[b], int(lengths[b]), s.latent_dim)
            scores = torch.einsum("thw,sw->ths", query[start:stop], keys) * s.scale
            visible = torch.arange(keys.shape[0]) <= seen[start:stop, None]  # [t, S]
            weights = scores.masked_fill(~visible.unsqueeze(1), float("-inf")).softmax(-1)
            out[start:stop] = weights @ keys[:, : s.latent_dim]
        return torch.einsum("thc,hvc->thv", out.to(self.dtype), heads.w_uv).flatten(1)

    def gqa(self, qkv: Tensor, heads: Grouped, place: Place) -> Tensor:
        return attend_plainly(qkv, heads, place)

    def delta(self, x: Tensor, gates: Tensor, delta: Delta, place: Place) -> Tensor:
        return advance(x, gates, delta, place, 1)

    def compressed(
        self, q: Tensor, x: Tensor, index_q: Tensor | None, heads: past.Compressed, place: Place
    ) -> Tensor:
        return past.attend(q, x, index_q, heads, place)

    def collapse(self, x: Tensor, streams: past.Streams) -> tuple[Tensor, Tensor]:
        return past.collapse(x, streams)

    def spread(self, x: Tensor, y: Tensor, mix: Tensor, streams: past.Streams) -> Tensor:
        return past.spread(x, y, mix)

    def index(self, q: Tensor, k: Tensor, w: Tensor, indexer: Indexer, place: Place) -> Tensor | None:
        return index(q, k, w, indexer, place)

    def mlp(self, x: Tensor, weights: Mlp, norm: Norm, residual: bool = True) -> Tensor:
        out = gated_mlp(self.rms_norm(x, norm), weights.parts, weights.activation)
        return x + out if residual else out

    def moe(
        self, x: Tensor, weights: _MoE, norm: Norm, counts: Tensor | None = None, residual: bool = True,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        n = self.rms_norm(x, norm)
        if chosen is None:
            routed = self.route(n, weights)
        else:
            routed = route(F.linear(n.float(), weights.gate), None, weights.spec, chosen)
        return self._experts(x if residual else None, n, weights, *routed, counts)

    def moe_chosen(self, x: Tensor, weights: _MoE, norm: Norm, ids: Tensor, gates: Tensor) -> Tensor:
        return self._experts(x, self.rms_norm(x, norm), weights, ids, gates, None)

    def _experts(
        self, x: Tensor | None, n: Tensor, weights: _MoE, ids: Tensor, gates: Tensor, counts: Tensor | None
    ) -> Tensor:
        out = torch.zeros_like(n, dtype=torch.float32)
        for e, expert in enumerate(weights.experts):
            token, slot = torch.where(ids == e)
            if counts is not None:
                counts[e] += token.numel()
            if expert is not None and token.numel():
                y = gated_mlp(n[token], expert, weights.spec.gate).float()
                out.index_add_(0, token, y * gates[token, slot, None])
        if weights.spec.identities:
            out += n.float() * identity_weight(ids, gates, weights.spec)
        if weights.shared is not None:
            shared = gated_mlp(n, weights.shared, weights.spec.gate).float()
            out += shared_weight(n, weights.shared_gate) * shared
        return out.to(self.dtype) if x is None else x + out.to(self.dtype)

    def reroute(self, weights: _MoE, spec: RouterSpec) -> None:
        weights.spec = spec

    def route(self, n: Tensor, weights: _MoE) -> tuple[Tensor, Tensor]:
        logits = F.linear(n.float(), weights.gate, weights.logit_bias)
        return scaled_choice(*route(logits, weights.bias, weights.spec), weights.expert_scale)

    def logits(self, x: Tensor, head: Value, norm: Norm) -> Tensor:
        return capped(self.linear(x, head, norm).float(), norm)

    def top_logits(self, x: Tensor, head: Value, norm: Norm, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return largest(self.logits(x, head, norm), k)


def create(
    dtype: torch.dtype | None, threads: int | None, quantization: str | None, packed: str | None
) -> ReferenceOps:
    """The backend's factory (see `farthing.ops.select`)."""
    if packed is not None:
        raise ValueError("the reference backend reads no packed file; use backend 'cpu'")
    if threads is not None:
        torch.set_num_threads(threads)
    return ReferenceOps(dtype or torch.float32, quantization)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V] -> (values [T, k], ids [T, k], logsumexp [T]); ties in order of id."""
    # A stable sort keeps ties in order of id; topk does not guarantee it.
    values, ids = (
        logits.max(-1, keepdim=True) if k == 1 else logits.sort(stable=True, dim=-1, descending=True)
    )
    return values[:, :k], ids[:, :k], logits.logsumexp(-1)


def _ranged(value: Tensor, shared: Sequence[Weight]) -> Tensor | Ranged:
    """`value` with the calibrated range, if any, of the matrices that share its input."""
    inputs = inputs_of(shared)
    return value if inputs is None or inputs.scale is None else Ranged(value, inputs)


def product(x: Tensor, weight: Value) -> Tensor:
    """x W^T, with x rounded if the model says so, and the bias if it has one."""
    if isinstance(weight, Biased):
        return product(x, weight.weight) + weight.bias
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    return F.linear(weight.inputs(x.float(), x.shape[-1]).to(x.dtype), weight.weight)


def gated_mlp(x: Tensor, weights: Gated, activation: Gate = SILU) -> Tensor:
    """down(activation(gate(x), up(x)))."""
    gate, up, down = weights
    return product(gated_by(activation, product(x, gate), product(x, up)), down)


def gated_by(a: Gate, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, or what `Gate` describes."""
    if a == SILU:
        return F.silu(gate) * up
    if a.limit < math.inf:
        gate, up = gate.clamp(max=a.limit), up.clamp(-a.limit, a.limit)
    wide = a.alpha * gate if a.cubic == 0.0 else a.alpha * gate * (1 + a.cubic * gate.square())
    return (up + a.shift) * (gate * torch.sigmoid(wide))


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}


def route(
    logits: Tensor, bias: Tensor | None, spec: RouterSpec, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] float32 -> (ids [T, k] int64, weights [T, k] float32), heaviest choice first.

    DeepSeek-V3 section 2.1.2: the bias affects the selection but not the weights; excluded groups are minus
    infinity, because biased scores can be negative. Skipped experts (spec.mass) have id -1 and weight 0.
    """
    scores = SCORES[spec.scoring](logits)
    if chosen is not None:
        return chosen, _weighed(scores.gather(1, chosen), spec)
    choice = scores if bias is None else scores + bias
    if spec.num_groups > 1:
        groups = choice.view(-1, spec.num_groups, spec.num_experts // spec.num_groups)
        if spec.group_score == "top2_sum":
            group_score = groups.topk(2, dim=-1).values.sum(-1)
        else:
            group_score = groups.amax(-1)
        kept = group_score.topk(spec.top_k_groups, dim=-1).indices
        excluded = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
        choice = groups.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(spec.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if spec.mass is not None:
        ids, weights = keep_mass(ids, weights, spec.mass, spec.min_experts)
    return ids, _weighed(weights, spec)


def _weighed(weights: Tensor, spec: RouterSpec) -> Tensor:
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * spec.scale


def scaled_choice(ids: Tensor, weights: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A router's choice with the weight of each expert times its scale [E]; None: as it is."""
    return (ids, weights) if scale is None else (ids, weights * scale[ids.clamp_min(0)])


def capped(logits: Tensor, norm: Norm) -> Tensor:
    """The logits of a head behind `norm`."""
    return logits if norm.cap == 0.0 else norm.cap * torch.tanh(logits / norm.cap)


def shared_weight(n: Tensor, gate: Tensor | None) -> Tensor | float:
    """The factor [T, 1] of the shared expert's output; 1 without a gate [1, D]."""
    return 1.0 if gate is None else F.linear(n.float(), gate).sigmoid()


def identity_weight(ids: Tensor, gates: Tensor, spec: RouterSpec) -> Tensor:
    """The weight [T, 1] of the identity experts among a token's choice."""
    return gates.masked_fill(ids < spec.num_experts - spec.identities, 0.0).sum(-1, keepdim=True)


def keep_mass(ids: Tensor, weights: Tensor, mass: float, min_experts: int) -> tuple[Tensor, Tensor]:
    """Keep the fewest experts (at least min_experts) whose share of the weights reaches `mass`."""
    weights, order = weights.sort(stable=True, dim=-1, descending=True)
    ids = ids.gather(1, order)
    share = weights / weights.sum(-1, keepdim=True)
    before = share.cumsum(-1) - share  # share of the experts ranked above this one
    keep = (before < mass) | (torch.arange(ids.shape[1], device=ids.device) < min_experts)
    return ids.masked_fill(~keep, -1), weights.masked_fill(~keep, 0.0)
