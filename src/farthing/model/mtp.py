"""Multi-token prediction (DeepSeek-V3 section 2.2): an extra block that predicts the token after next.

h'_i = Block(eh_proj([enorm(embed(t_{i+1})) ; hnorm(h_i)])) with h_i after the model's final norm;
logits of t_{i+2} = head(shared_head.norm(h'_i)). Each further step takes shared_head.norm(h') as h.

Its output is only a draft that the model verifies, so its weights may be rounded more coarsely.

Legend: T tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from farthing.lazy import torch
from farthing.model.attention import attention_of
from farthing.model.config import ModelConfig
from farthing.model.moe import FeedForward
from farthing.model.source import WeightSource
from farthing.model.stack import stacked
from farthing.ops import Batch, LatentCache, Ops, RouterSpec
from farthing.ops.api import Handle
from farthing.ops.arrays import as_float32, same
from farthing.ops.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


class MTPLayer:
    """Checkpoint layer `layer` >= num_hidden_layers; embedding and head are shared unless they differ."""

    stack: Handle | None  # the layer in one call, if the backend supports it

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        weights: WeightSource,
        layer: int,
        rope: Tensor,
        router: RouterSpec | None,
        embedding: Tensor,
        head: Handle,
        head_weight: Callable[[], Weight],
    ) -> None:
        """head, head_weight: the model's head, packed and unpacked."""
        ops, exact = ops.coarse(), ops
        p, d = f"model.layers.{layer}.", config.hidden_size
        self.ops, self.eps, self.layer = ops, config.rms_norm_eps, layer
        self.enorm = as_float32(weights.tensor(p + "enorm.weight", (d,)))
        self.hnorm = as_float32(weights.tensor(p + "hnorm.weight", (d,)))
        self.norm = as_float32(weights.tensor(p + "shared_head.norm.weight", (d,)))
        self.eh_proj = ops.pack_linear(p + "eh_proj", lambda: [weights.weight(p + "eh_proj", (d, 2 * d))])
        self.attention = attention_of(config, ops, weights, layer, rope)
        self.feed_forward = FeedForward(config, ops, weights, layer, router)
        self.restack()
        self.embedding, own_head = embedding, False
        shape = (config.vocab_size, d)
        # Released checkpoints contain copies of the main embedding and head: share unless they differ.
        if weights.has(p + "embed_tokens.weight"):
            own = weights.tensor(p + "embed_tokens.weight", shape)
            self.embedding = embedding if same(own, embedding) else own
        if weights.has(p + "shared_head.head.weight"):
            own = weights.tensor(p + "shared_head.head.weight", shape)
            main = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            if own_head := not same(own, weights.tensor(main, shape)):
                head_weight = partial(Weight, "dense", own)
        if own_head or ops is not exact:
            head = ops.pack_head(p + "shared_head.head", head_weight)
        self.head = head

    def restack(self) -> None:
        """Rebuild the fused layer as currently packed, for backends that run it in one call."""
        self.stack = stacked(self.ops, [(self.attention, self.feed_forward)])

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
        e = ops.rms_norm(ops.embed(next_ids, self.embedding), self.enorm, self.eps)
        x = ops.linear(torch.cat((e, ops.rms_norm(h, self.hnorm, self.eps)), -1), self.eh_proj)
        if self.stack is not None:
            first = self.layer * self.attention.rows
            scale = None if cache.scale is None else cache.scale[first:]
            own, seen = LatentCache(cache.data[first:], scale), None if counts is None else counts[None]
            return ops.run_stack(x, self.stack, batch, own, self.eps, seen)
        x, _ = self.attention(x, batch, cache, self.layer)
        return self.feed_forward(x, counts)
