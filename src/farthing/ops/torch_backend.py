"""The torch backend: every op on any device torch runs on (`--backend torch --device xpu`)."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops import reference
from farthing.ops.api import (
    ALL,
    Batch,
    Handle,
    LatentCache,
    LayerHandles,
    Norm,
    Place,
    StreamedHandles,
    plain_layers,
)
from farthing.ops.delta import CHUNK, Delta, pack_delta
from farthing.ops.delta import delta as advance
from farthing.ops.indexer import Indexer
from farthing.ops.reference import (
    Gated,
    ReferenceOps,
    gated_by,
    gated_mlp,
    identity_weight,
    normed,
    route,
    shared_weight,
)
from farthing.ops.selection import Span, chosen, in_rows, spans
from farthing.ops.specs import (
    SILU,
    AttentionSpec,
    DeltaParts,
    DeltaSpec,
    Gate,
    GroupedParts,
    GroupedSpec,
    IndexerSpec,
    MoEWeights,
    RouterSpec,
)
from farthing.ops.torch_util import DeviceCopies, rotate, scaled, write_cache
from farthing.ops.weights import Weight

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
    shared_gate: Tensor | None
    stacked: tuple[Tensor, Tensor] | None  # [E, 2 I, D] and [E, D, I]
    logit_bias: Tensor | None
    expert_scale: Tensor | None


# -- one token through a layer


def queries(h: Tensor, layer: LayerHandles, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's input h [T, D] -> queries [T, H, c + r] in the latent space; latent and key to cache.

    `queries`, `dense_output` and `expert_output` take one token through a layer. They can be compiled,
    because the host reads no value. Prompts and batches use the same parts eagerly. Legend: see
    `farthing.ops.api`; S cached tokens; I intermediate size.
    """
    qkv = F.linear(normed(h, layer.norm.weight, layer.norm.eps), layer.qkv_a)
    q, kv = qkv[:, : layer.q_width], qkv[:, layer.q_width :]
    if layer.q_b is not None:
        assert layer.q_norm is not None
        q = F.linear(normed(q, layer.q_norm.weight, layer.q_norm.eps), layer.q_b)
    q_nope, q_pe, latent, k_pe = rotated(q, kv, layer.heads, positions)
    return absorbed(q_nope, q_pe, layer.heads), latent, k_pe


def dense_output(h: Tensor, query: Tensor, keys: Tensor, layer: LayerHandles) -> Tensor:
    """The layer's output [1, D] with a dense MLP; keys [1, S, c + r]."""
    h = h + F.linear(values(attend(query, keys, None, layer.heads.spec), layer.heads, h.dtype), layer.o)
    n = normed(h, layer.feed_norm.weight, layer.feed_norm.eps)
    return h + gated(n, layer.feed.parts, layer.feed.activation)


def expert_output(
    h: Tensor, query: Tensor, keys: Tensor, layer: LayerHandles
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output [1, D] with experts; also their ids [k], and 1 or, if skipped, 0 for each."""
    h = h + F.linear(values(attend(query, keys, None, layer.heads.spec), layer.heads, h.dtype), layer.o)
    n = normed(h, layer.feed_norm.weight, layer.feed_norm.eps)
    w: Experts = layer.feed
    assert w.stacked is not None
    ids, gates = route(F.linear(n.float(), w.gate, w.logit_bias), w.bias, w.spec)
    chosen = ids[0].clamp_min(0)
    # Products and sums instead of matrix products: compiled, they read the chosen experts in place.
    gate, up = (w.stacked[0][chosen].float() * n.float()).sum(-1).to(n.dtype).chunk(2, -1)  # [k, I]
    inner = gated_by(w.spec.gate, gate, up).float() * gates[0].unsqueeze(-1)
    out = (w.stacked[1][chosen].float() * inner.unsqueeze(1)).sum(-1).sum(0, keepdim=True)  # [1, D]
    if w.shared is not None:
        out = out + _shared(n, w.shared, w)
    return h + out.to(h.dtype), chosen, (ids[0] >= 0).long()


# -- parts


def gated(x: Tensor, w: Mlp, activation: Gate = SILU) -> Tensor:
    """down(activation(gate(x), up(x)))."""
    if len(w) == 3:
        return gated_mlp(x, w, activation)
    gate, up = F.linear(x, w[0]).chunk(2, -1)
    return F.linear(gated_by(activation, gate, up), w[1])


def rotated(q: Tensor, kv: Tensor, a: Heads, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [T, H, n] and [T, H, r], and the latent [T, c] and key [T, r] to cache."""
    s = a.spec
    cos, sin = a.rope[:, positions].unbind(0)  # [T, r/2]
    q_nope, q_pe = q.view(-1, s.num_heads, s.nope_dim + s.rope_dim).split((s.nope_dim, s.rope_dim), -1)
    latent, k_pe = kv.split((s.latent_dim, s.rope_dim), -1)
    q_pe = rotate(q_pe, cos.unsqueeze(1), sin.unsqueeze(1), s.interleaved)
    return q_nope, q_pe, normed(latent, a.norm, s.norm_eps), rotate(k_pe, cos, sin, s.interleaved)


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
    if seen is None:
        weights = scores.softmax(-1)
    else:  # filled twice: the softmax of a token that sees nothing is NaN
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    return torch.bmm(weights, keys[..., : s.latent_dim])


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
    per_expert = torch.bincount(ids.flatten() + 1, minlength=w.spec.num_experts + 1)
    if counts is not None:
        counts += per_expert[1:]
    skipped, *numbers = per_expert.tolist()  # skipped experts, with id -1, come first
    y = _each(n.index_select(0, order[skipped:] // k), numbers, w)
    if skipped:
        y = torch.cat((y.new_zeros(skipped, y.shape[1]), y))
    # Row t sums the outputs that its experts left at these places of y.
    places = order.argsort().view(-1, k)
    out = F.embedding_bag(places, y, mode="sum", per_sample_weights=gates.to(y.dtype)).float()
    if w.spec.identities:
        out += n.float() * identity_weight(ids, gates, w.spec)
    return out if w.shared is None else out + _shared(n, w.shared, w)


def _shared(n: Tensor, mlp: Mlp, w: Experts) -> Tensor:
    return shared_weight(n, w.shared_gate) * gated(n, mlp, w.spec.gate).float()


def _each(tokens: Tensor, numbers: list[int], w: Experts) -> Tensor:
    """tokens [N, D] in order of their expert, of which expert e has numbers[e] -> its output for each."""
    if w.stacked is None:
        parts = zip(tokens.split(numbers), w.experts, strict=True)
        act = w.spec.gate
        return torch.cat([torch.zeros_like(x) if e is None else gated(x, e, act) for x, e in parts])
    gate, up = _products(tokens, numbers, w.stacked[0]).chunk(2, -1)
    return _products(gated_by(w.spec.gate, gate, up), numbers, w.stacked[1])


def _products(x: Tensor, numbers: list[int], matrices: Tensor) -> Tensor:
    """x [N, K] times matrices [E, M, K], of which matrix e gets the next numbers[e] rows -> [N, M]."""
    out = x.new_empty(x.shape[0], matrices.shape[1])
    parts = zip(x.split(numbers), matrices.transpose(1, 2), out.split(numbers), strict=True)
    for rows, matrix, result in parts:
        if rows.shape[0]:
            torch.mm(rows, matrix, out=result)
    return out


log = logging.getLogger(__name__)

COMPILER = "compile layers"  # name of the thread that does
# On CPUs: loops over fewer elements per thread than this are faster on one thread.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.min_chunk_size": 16384}
_COMPILE_AFTER = 32  # single-token steps: a short generation ends before compiled layers repay their time


@dataclass(frozen=True, slots=True)
class CompiledLayer:
    """One token through a layer, compiled."""

    queries: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dense_output: Callable[..., Tensor]
    expert_output: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(slots=True, eq=False)
class Stack:
    """Layers computed in one call."""

    layers: tuple[LayerHandles, ...]
    compilable: bool  # experts are stacked, and no input is rounded
    steps: int = 0  # single-token steps so far
    compiled: CompiledLayer | None = None


class TorchOps(ReferenceOps):
    """Every op on one device; activations are `dtype`.

    The reference's arithmetic, arranged for speed: sequences that decode attend together and experts compute
    all their tokens at once; once a single sequence decodes, its layers are compiled in the background.
    Tested on CPUs only. A new accelerator starts from here, before it has kernels (docs/design/backends.md).
    Legend: see `farthing.ops.api`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> None:
        super().__init__(dtype, quantization)
        self.device = device
        self.name = f"torch/{device} {str(dtype).removeprefix('torch.')}"
        self._here = DeviceCopies(device)
        disabled = os.environ.get("TORCH_COMPILE_DISABLE") == "1"  # torch's own variable
        self.compile_after = None if disabled else _COMPILE_AFTER
        self.compiling: threading.Thread | None = None

    # -- packing

    def _value(self, weight: Weight, mlp: bool = False) -> Tensor:
        return super()._value(weight, mlp).to(self.device)

    def _matrices(self, weights: tuple[Weight, Weight, Weight]) -> Mlp:
        gate, up, down = super()._matrices(weights)
        if not (isinstance(gate, Tensor) and isinstance(up, Tensor) and isinstance(down, Tensor)):
            return gate, up, down
        return torch.cat((gate, up)), down

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Any:
        w = weights()
        experts: list[Mlp | None] = [None if e is None else self._matrices(e()) for e in w.experts]
        shared = None if w.shared is None else self._matrices(w.shared())
        pairs = [e for e in experts if e is not None and len(e) == 2]
        stacked = None
        if len(pairs) == len(experts):
            stacked = torch.stack([e[0] for e in pairs]), torch.stack([e[1] for e in pairs])
            experts = []
        given = (w.bias, w.shared_gate, w.logit_bias, w.expert_scale)
        bias, shared_gate, *found = (None if b is None else b.float().to(self.device) for b in given)
        return Experts(
            spec, w.gate.float().to(self.device), bias, experts, shared, shared_gate, stacked, *found
        )

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Any:
        kv_b, norm = weights()
        heads = self._value(kv_b).view(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        w_uk, w_uv = heads.split((spec.nope_dim, spec.value_dim), dim=1)
        return Heads(
            spec,
            w_uk.contiguous(),
            w_uv.transpose(1, 2).contiguous(),
            norm.to(self.device, self.dtype),
            self._here(rope),
        )

    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> reference.Grouped:
        return reference.pack_grouped(spec, parts, rope, self._here)

    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> Indexer:
        weight, bias = (part.float().to(self.device) for part in norm())
        return Indexer(spec, weight, bias, self._here(rope))

    def pack_delta(self, name: str, spec: DeltaSpec, parts: Callable[[], DeltaParts]) -> Delta:
        return pack_delta(spec, parts(), self._here)

    # -- computing op by op

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, self._here(table)).to(self.dtype)

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return normed(x, self._here(norm.weight), norm.eps)

    def mla(self, q: Tensor, kv: Tensor, heads: Any, place: Place, select: Tensor | None = None) -> Tensor:
        cache, batch = place.cache, place.batch
        if select is None:
            return self._attention(q, kv, heads, place, spans(batch, cache.block_size))
        reads = chosen(select, batch, cache.block_size)
        rank = torch.arange(reads.slots.shape[1], device=q.device)
        seen = (rank < reads.counts[:, None])[:, None]
        plan = [Span(0, q.shape[0], reads.slots.long(), seen)]
        return self._attention(q, kv, heads, Place(in_rows(cache), place.row, batch), plan)

    def gqa(self, qkv: Tensor, heads: reference.Grouped, place: Place) -> Tensor:
        plan = spans(place.batch, place.cache.block_size, heads.spec.window)
        return self._grouped(qkv, heads, place, plan)

    def _grouped(self, qkv: Tensor, g: reference.Grouped, place: Place, plan: list[Span]) -> Tensor:
        cache, row, batch = place.cache, place.row, place.batch
        q, k, v = reference.prepared(qkv, g, batch.positions.long())
        reference.write_heads(cache, row, batch.slots, k, v, g)
        parts = []
        for p in plan:
            keys, read = reference.read_heads(cache, row, g, p.slots)
            parts.append(reference.attend(q[p.start : p.stop], keys, read, p.seen, g))
        return reference.gated_output(torch.cat(parts) if len(parts) > 1 else parts[0], qkv, g)

    def delta(self, x: Tensor, gates: Tensor, delta: Delta, place: Place) -> Tensor:
        return advance(x, gates, delta, place, CHUNK)

    def _attention(self, q: Tensor, kv: Tensor, a: Heads, place: Place, plan: list[Span]) -> Tensor:
        cache, row, batch = place.cache, place.row, place.batch
        q_nope, q_pe, latent, k_pe = rotated(q, kv, a, batch.positions.long())
        write_cache(cache, row, batch.slots, latent, k_pe)
        parts = []
        for p in plan:
            keys = _keys(cache, row, p.slots, a.spec)
            nope, pe = q_nope[p.start : p.stop], q_pe[p.start : p.stop]
            if len(p.slots) == 1 and p.stop - p.start >= a.expand_from:
                parts.append(attend_expanded(nope, pe, keys, p.seen, a, self.dtype))
            else:
                parts.append(values(attend(absorbed(nope, pe, a), keys, p.seen, a.spec), a, self.dtype))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def mlp(self, x: Tensor, weights: reference.Mlp, norm: Norm, residual: bool = True) -> Tensor:
        out = gated(self.rms_norm(x, norm), weights.parts, weights.activation)
        return x + out if residual else out

    def _experts(
        self, x: Tensor | None, n: Tensor, weights: Any, ids: Tensor, gates: Tensor, counts: Tensor | None
    ) -> Tensor:
        out = mixture(n, weights, ids, gates, counts).to(self.dtype)
        return out if x is None else x + out

    # -- computing layers

    def stack(
        self, layers: Sequence[LayerHandles | StreamedHandles], ending: Handle | None = None
    ) -> Stack | None:
        if (plain := plain_layers(layers)) is None:
            return None
        here = tuple(map(self._layer_here, plain))
        return Stack(here, all(map(_compilable, here)))

    def _layer_here(self, layer: LayerHandles) -> LayerHandles:
        def here(norm: Norm) -> Norm:
            return Norm(self._here(norm.weight), norm.eps)

        q_norm = None if layer.q_norm is None else here(layer.q_norm)
        bias = None if layer.o_bias is None else self._here(layer.o_bias)
        return replace(
            layer, norm=here(layer.norm), feed_norm=here(layer.feed_norm), q_norm=q_norm, o_bias=bias
        )

    def run_stack(
        self, h: Tensor, stack: Stack, batch: Batch, cache: LatentCache, counts: Tensor | None,
        span: slice = ALL,
    ) -> Tensor:  # fmt: skip
        window = stack.layers[0].window if stack.layers else None  # of all of them
        plan = spans(batch, cache.block_size, window)
        # A compiled function takes any number of cached tokens except 1, which torch.compile specializes.
        single = len(h) == 1 and plan[0].slots.shape[1] > 1
        if single and stack.compilable and span == ALL:
            if stack.compiled is not None:
                return _one_token(h, stack, stack.compiled, batch, plan[0], cache, counts)
            self._count_step(stack, h)
        for i in range(*span.indices(len(stack.layers))):
            layer = stack.layers[i]
            place = Place(cache, i * layer.rows, batch)
            seen = None if counts is None else counts[i]
            h = self._layer(h, layer, place, seen, plan)
        return h

    def _layer(
        self, h: Tensor, layer: LayerHandles, place: Place, counts: Tensor | None, plan: list[Span]
    ) -> Tensor:
        # The norm is on the device already (`stack`).
        qkv = self.linear(normed(h, layer.norm.weight, layer.norm.eps), layer.qkv_a)
        if isinstance(layer.heads, reference.Grouped):
            mixed = self._grouped(qkv, layer.heads, place, plan)
        else:
            q, kv = qkv[:, : layer.q_width], qkv[:, layer.q_width :]
            if layer.q_b is not None:
                q = self.linear(q, layer.q_b, layer.q_norm)
            mixed = self._attention(q, kv, layer.heads, place, plan)
        h = self.linear(mixed, layer.o, residual=h if layer.o_bias is None else h + layer.o_bias.to(h.dtype))
        if not isinstance(layer.feed, Experts):
            return self.mlp(h, layer.feed, layer.feed_norm)
        experts: Any = layer.feed
        return self.moe(h, experts, layer.feed_norm, counts)

    # -- compiling

    def _count_step(self, stack: Stack, h: Tensor) -> None:
        """Start to compile a stack's layers when enough steps have used it. Meanwhile steps run eagerly."""
        stack.steps += 1
        if stack.steps == self.compile_after:
            example = torch.zeros_like(h)
            self.compiling = threading.Thread(
                target=self._compile,
                args=(stack, example, self.compiling),
                name=COMPILER,
                daemon=True,
            )
            self.compiling.start()

    def _compile(self, stack: Stack, h: Tensor, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        started = time.monotonic()
        log.info("compiling %d layers in the background", len(stack.layers))
        try:
            stack.compiled = compiled_layer(stack.layers, h)
        except Exception as error:  # torch and its compilers raise many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("torch.compile does not work on %s: %s", self.device, reason[0][:200])
        else:
            log.info("compiled %d layers in %.0f s", len(stack.layers), time.monotonic() - started)


def compiled_layer(layers: Sequence[LayerHandles], h: Tensor) -> CompiledLayer:
    """The functions of `torch_step`, compiled for these layers; h [1, D] is an example.

    The number of cached tokens is dynamic, all other shapes are constants. Layers of one shape share code.
    """
    compiled = partial(torch.compile, dynamic=False, options=_OPTIONS)
    code = CompiledLayer(compiled(queries), compiled(dense_output), compiled(expert_output))
    with torch.inference_mode():  # guards distinguish its tensors from others
        position = torch.zeros(1, dtype=torch.int64, device=h.device)
        for layer in layers:
            query, latent, k_pe = code.queries(h, layer, position)
            keys = torch.zeros(1, 24, latent.shape[1] + k_pe.shape[1], device=h.device)
            torch._dynamo.mark_dynamic(keys, 1)  # type: ignore[no-untyped-call]
            output = code.expert_output if isinstance(layer.feed, Experts) else code.dense_output
            output(h, query, keys, layer)
    return code


def _one_token(
    h: Tensor,
    stack: Stack,
    code: CompiledLayer,
    batch: Batch,
    span: Span,
    cache: LatentCache,
    counts: Tensor | None,
) -> Tensor:
    """`TorchOps.run_stack` of one token with compiled functions."""
    positions = batch.positions.long()
    for i, layer in enumerate(stack.layers):
        query, latent, k_pe = code.queries(h, layer, positions)
        write_cache(cache, i, batch.slots, latent, k_pe)
        keys = _keys(cache, i, span.slots, layer.heads.spec)
        if not isinstance(layer.feed, Experts):
            h = code.dense_output(h, query, keys, layer)
            continue
        h, ids, used = code.expert_output(h, query, keys, layer)
        if counts is not None:
            counts[i].scatter_add_(0, ids, used)
    return h


def _keys(cache: LatentCache, layer: int, slots: Tensor, spec: AttentionSpec) -> Tensor:
    scale = None if cache.scale is None else cache.scale[layer].flatten(0, 1)
    return gathered(cache.data[layer].flatten(0, 1), scale, slots, spec.latent_dim)


def _compilable(layer: LayerHandles) -> bool:
    if isinstance(layer.heads, reference.Grouped):
        return False
    matrices = [layer.qkv_a, layer.o, *(() if layer.q_b is None else (layer.q_b,))]
    feed = layer.feed
    if isinstance(feed, Experts) and feed.stacked is None:
        return False
    mlp = feed.shared if isinstance(feed, Experts) else feed.parts
    return all(isinstance(m, Tensor) for m in matrices) and (mlp is None or len(mlp) == 2)


def create(
    dtype: torch.dtype | None,
    threads: int | None,
    quantization: str | None,
    packed: str | None,
    device: str | None = None,
) -> TorchOps:
    """The backend's factory (see `farthing.ops.select`); device None: the accelerator, or else the CPU."""
    if packed is not None:
        raise ValueError(f"packed: got {packed!r} with backend 'torch'; expected None, or backend 'cpu'")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    default = "cpu" if accelerator is None else accelerator.type
    try:
        target = torch.device(device or default)
        torch.ones(1, device=target).item()  # fails on `meta`, which has no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        here = "cpu" if accelerator is None else f"cpu or {default}"
        raise ValueError(f"device: got {device!r}; expected {here}, which this torch can use here") from None
    if threads is not None and target.type == "cpu":
        torch.set_num_threads(threads)
    kind = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
    return TorchOps(target, kind, quantization)
