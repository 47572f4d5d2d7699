"""DeepSeek-V3 (and V2, R1, Kimi-K2, Moonlight) with its multi-token prediction layers, read top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from farthing.lazy import torch
from farthing.model.attention import AnyAttention, attention_of, norm_of
from farthing.model.config import ModelConfig
from farthing.model.forms import Experts
from farthing.model.kinds import cache_place
from farthing.model.source import LayerSource, WeightSource
from farthing.ops import (
    Batch,
    Beside,
    Handle,
    LatentCache,
    LayerHandles,
    MoEWeights,
    Norm,
    Ops,
    Place,
    Weight,
    as_float32,
    folded,
    same,
)
from farthing.ops.arrays import cast

if TYPE_CHECKING:
    from torch import Tensor


Gated = tuple[Weight, Weight, Weight]


class FeedForward:
    """One layer's MLP or mixture of experts, with its norm and residual."""

    def __init__(self, at: LayerSource) -> None:
        config, ops, weights, router = at.config, at.ops, at.weights, at.router
        feed = config.feed(at.layer)
        self.ops = ops
        self.norm = norm_of(config, weights, at.prefix + "post_attention_layernorm")
        p = at.prefix + "mlp"
        dense = gated(weights, p, config.hidden_size, feed.width)
        self.is_moe = router is not None
        self.beside: Handle | None = None  # a dense MLP on the experts' input (`apart`)
        self.parallel: Beside | None = None  # one with its own norms
        if router is None or (experts := feed.experts) is None:
            self.packed = ops.pack_mlp(p, dense, feed.gate)
        else:
            self.packed = ops.pack_moe(p, router, lambda: moe_weights(config, weights, p, experts))
            if feed.delayed:
                self.beside = ops.pack_mlp(f"{p}_beside", dense, feed.gate)
            if feed.parallel:
                outputs = (norm_of(config, weights, f"{p}.{name}") for name in _PARALLEL_NORMS)
                self.parallel = Beside(ops.pack_mlp(f"{p}_beside", dense, feed.gate), self.norm, *outputs)
                self.norm = expert_norm(config, weights, p)
        self.post_norm: Norm | None = None
        if feed.post_norm:
            self.post_norm = norm_of(config, weights, f"{p}.post_mlp_layernorm")
        self.scale = 1.0  # of the layer's output
        if feed.scaled:
            self.scale = float(as_float32(weights.tensor(at.prefix + "layer_scalar", (1,)))[0])

    def __call__(self, h: Tensor, counts: Tensor | None = None) -> Tensor:
        """h [T, D] -> h + feed_forward(norm(h)) [T, D]; adds the tokens per expert to counts [E]."""
        ops = self.ops
        if self.post_norm is None:
            if self.is_moe:
                return ops.moe(h, self.packed, self.norm, counts)
            return ops.mlp(h, self.packed, self.norm)
        if self.is_moe:
            added = ops.moe(h, self.packed, self.norm, counts, residual=False)
        else:
            added = ops.mlp(h, self.packed, self.norm, residual=False)
        if (other := self.parallel) is not None:
            dense = ops.mlp(h, other.mlp, other.input_norm, residual=False)
            added = ops.rms_norm(added, other.feed_norm) + ops.rms_norm(dense, other.norm)
        out = h + ops.rms_norm(added, self.post_norm)
        return out if self.scale == 1.0 else out * self.scale

    def apart(self, h: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h [T, D] -> (h + mlp(norm(h)), experts(norm(h))); the next layer adds the second."""
        experts = self.ops.moe(h, self.packed, self.norm, counts, residual=False)
        return self.ops.mlp(h, self.beside, self.norm), experts


_PARALLEL_NORMS = ("dense_post_norm", "expert_post_norm")  # of a parallel MLP's output, and the experts'
_ALMOST_ZERO = 1e-20


def expert_norm(config: ModelConfig, weights: WeightSource, prefix: str) -> Norm:
    """The norm before experts that have a parallel MLP. No weight is 0: a scaled router divides by them."""
    norm = norm_of(config, weights, f"{prefix}.expert_norm")
    return replace(norm, weight=norm.weight + cast(norm.weight == 0, "float32") * _ALMOST_ZERO)


def router_matrix(config: ModelConfig, weights: WeightSource, prefix: str, experts: Experts) -> Tensor:
    """The router [E, D] float32, for the experts' input. A scaled one reads x / rms(x) times its own scales
    instead of the norm's weight: its columns have the quotient."""
    shape = experts.router.num_experts, config.hidden_size
    gate = as_float32(weights.tensor(f"{prefix}.gate.weight", shape))
    if not experts.scaled:
        return gate
    own = as_float32(weights.tensor(f"{prefix}.gate.input_scale", (config.hidden_size,)))
    columns: Tensor = own * config.hidden_size**-0.5 / expert_norm(config, weights, prefix).weight
    return gate * columns


def gated(weights: WeightSource, prefix: str, d: int, i: int) -> Callable[[], Gated]:
    """A loader of gate [I, D], up [I, D] and down [D, I]."""
    return lambda: folded(
        weights.weight(f"{prefix}.gate_proj", (i, d)),
        weights.weight(f"{prefix}.up_proj", (i, d)),
        weights.weight(f"{prefix}.down_proj", (d, i)),
    )


def moe_weights(config: ModelConfig, weights: WeightSource, prefix: str, experts: Experts) -> MoEWeights:
    """Router and experts of one layer; experts are read one at a time."""
    e, d, i = experts.router.num_experts, config.hidden_size, experts.width
    shared_here = experts.shared > 0 and weights.holds(f"{prefix}.shared_experts")
    return MoEWeights(
        gate=router_matrix(config, weights, prefix, experts),
        bias=as_float32(weights.tensor(f"{prefix}.gate.e_score_correction_bias", (e,)))
        if experts.corrected
        else None,
        experts=[
            gated(weights, f"{prefix}.experts.{j}", d, i)
            if j < experts.count and weights.holds(f"{prefix}.experts.{j}")
            else None
            for j in range(e)
        ],
        shared=gated(weights, f"{prefix}.shared_experts", d, experts.shared) if shared_here else None,
        shared_gate=weights.weight(f"{prefix}.shared_expert_gate", (1, d)).dequantize()
        if experts.shared_gate and shared_here
        else None,
        logit_bias=as_float32(weights.tensor(f"{prefix}.gate.bias", (e,))) if experts.biased else None,
        expert_scale=as_float32(weights.tensor(f"{prefix}.gate.expert_scale", (e,)))
        if experts.scaled
        else None,
    )


def stacked(ops: Ops, layers: Sequence[tuple[AnyAttention, FeedForward]]) -> Handle | None:
    """`Ops.stack` of these layers; None if the backend has none or does not support one of the layers."""
    packed = [_handles(*layer) for layer in layers]
    plain = [h for h in packed if h is not None]
    return ops.stack(plain) if len(plain) == len(packed) else None


def _handles(first: AnyAttention, feed: FeedForward) -> LayerHandles | None:
    found = None if feed.beside is not None else first.handles(feed.norm, feed.packed)
    return found and replace(found, feed_post=feed.post_norm, beside=feed.parallel, scale=feed.scale)


class MTPLayer:
    """Checkpoint layer `layer` >= num_hidden_layers; embedding and head are shared unless they differ.

    Multi-token prediction (DeepSeek-V3 section 2.2): an extra block that predicts the token after next.

    h'_i = Block(eh_proj([enorm(embed(t_{i+1})) ; hnorm(h_i)])) with h_i after the model's final norm; logits
    of t_{i+2} = head(shared_head.norm(h'_i)). Each further step takes shared_head.norm(h') as h.

    Its output is only a draft that the model verifies, so its weights may be rounded more coarsely.

    Legend: T tokens; D hidden size; V vocabulary.
    """

    stack: Handle | None  # the layer in one call, if the backend supports it
    ending: Handle | None = None  # how streams of its output are summed, if it has several

    def __init__(
        self, at: LayerSource, embedding: Any, head: Handle, head_weight: Callable[[], Weight]
    ) -> None:
        """head, head_weight: the model's head, packed and unpacked."""
        config, ops, weights, p = at.config, at.ops.coarse(), at.weights, at.prefix
        self.ops, self.layer = ops, at.layer
        _, self.row = cache_place(config, at.layer)
        self.enorm, self.hnorm, self.norm = (
            norm_of(config, weights, p + name) for name in ("enorm", "hnorm", "shared_head.norm")
        )
        self.build(replace(at, ops=ops))
        self.restack()
        self.embedding, own_head = embedding, False
        shape = (config.vocab_size, config.hidden_size)
        # Released checkpoints contain copies of the main embedding and head: share unless they differ.
        if weights.has(p + "embed_tokens.weight"):
            own = weights.tensor(p + "embed_tokens.weight", shape)
            self.embedding = embedding if same(own, embedding) else own
        if weights.has(p + "shared_head.head.weight"):
            own = weights.tensor(p + "shared_head.head.weight", shape)
            main = "model.embed_tokens.weight" if config.head.tie_word_embeddings else "lm_head.weight"
            if own_head := not same(own, weights.tensor(main, shape)):
                head_weight = partial(Weight, "dense", own)
        if own_head or (ops is not at.ops and not config.head.rounded_head):
            head = ops.pack_head(p + "shared_head.head", head_weight)
        self.head = head

    def build(self, at: LayerSource) -> None:
        """Pack the block, and what joins its two inputs."""
        name, d = at.prefix + "eh_proj", at.config.hidden_size
        self.eh_proj = at.ops.pack_linear(name, lambda: [at.weights.weight(name, (d, 2 * d))])
        self.attention: Any = attention_of(at)
        self.feed_forward = FeedForward(at)

    def restack(self) -> None:
        """Rebuild the fused layer as currently packed, for backends that run it in one call."""
        self.stack = stacked(self.ops, [(self.attention, self.feed_forward)])

    def reads(self, hidden: Tensor, norm: Norm) -> Tensor:
        """hidden [T, D] of the step before, and the norm before its head -> h of this one."""
        return self.ops.rms_norm(hidden, norm)

    def __call__(
        self,
        next_ids: Tensor,
        h: Tensor,
        batch: Batch,
        cache: LatentCache,
        counts: Tensor | None = None,
    ) -> Tensor:
        """next_ids [T] = the token after each position, h [T, D] (normed) -> h' [T, D] before its norm."""
        ops = self.ops
        e = ops.rms_norm(ops.embed(next_ids, self.embedding), self.enorm)
        x = ops.linear(torch.cat((e, ops.rms_norm(h, self.hnorm)), -1), self.eh_proj)
        if self.stack is not None:
            first = self.row
            scale = None if cache.scale is None else cache.scale[first:]
            own, seen = LatentCache(cache.data[first:], scale), None if counts is None else counts[None]
            return ops.run_stack(x, self.stack, batch, own, seen)
        x, _ = self.attention(x, Place(cache, self.row, batch))
        return self.feed_forward(x, counts)
