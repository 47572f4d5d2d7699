"""Multi-head latent attention (DeepSeek-V2 section 2.1, DeepSeek-V3 section 2.1.1).

Legend: T tokens; D hidden size; H heads; n, r, v the nope, rotary and value head sizes; c the KV latent;
q the query latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farthing.lazy import np
from farthing.model.config import LatentHeads, ModelConfig
from farthing.model.grouped import GroupedAttention
from farthing.model.indexer import Indexer
from farthing.model.rope import score_scale
from farthing.model.source import WeightSource
from farthing.ops import AttentionSpec, Batch, LatentCache, Ops
from farthing.ops.arrays import as_float32

if TYPE_CHECKING:
    from torch import Tensor


def attention_spec(config: ModelConfig) -> AttentionSpec:
    """The head layout for the op."""
    a = config.latent
    return AttentionSpec(
        num_heads=a.num_attention_heads,
        nope_dim=a.qk_nope_head_dim,
        rope_dim=a.qk_rope_head_dim,
        value_dim=a.v_head_dim,
        latent_dim=a.kv_lora_rank,
        scale=score_scale(config),
        interleaved=config.rope.interleaved,
    )


def query_scale(config: ModelConfig, ops: Ops) -> Tensor | None:
    """The query scale of every position, float32 [max_len]; None if all are 1."""
    s = config.query_scaling
    if s is None:
        return None
    periods = np.arange(config.max_position_embeddings) // s.original_max_position
    return ops.tensor(1 + np.float32(s.beta) * np.log1p(periods.astype(np.float32)))


class LatentAttention:
    """One layer's attention with its input norm and residual."""

    rows = 1  # of the cache
    o_bias: Tensor | None = None

    def __init__(
        self, config: ModelConfig, ops: Ops, weights: WeightSource, layer: int, rope: Tensor
    ) -> None:
        p = f"model.layers.{layer}.self_attn."
        c, a, d = config, config.latent, config.hidden_size
        heads = a.num_attention_heads
        self.ops, self.eps = ops, config.rms_norm_eps
        self.norm = as_float32(weights.tensor(f"model.layers.{layer}.input_layernorm.weight", (d,)))
        self.q_width = a.q_lora_rank or heads * a.qk_head_dim
        first = "q_a_proj" if a.q_lora_rank else "q_proj"
        # One product over the hidden state computes the query (or its latent) and the key-value latent.
        self.qkv_a = ops.pack_linear(
            p + "qkv_a",
            lambda: [
                weights.weight(p + first, (self.q_width, d)),
                weights.weight(p + "kv_a_proj_with_mqa", (a.cache_width, d)),
            ],
        )
        self.q_norm, self.q_b = None, None
        if a.q_lora_rank:
            self.q_norm = as_float32(weights.tensor(p + "q_a_layernorm.weight", (a.q_lora_rank,)))
            self.q_norm = self.q_norm * a.query_latent_scale
            q_shape = (heads * a.qk_head_dim, a.q_lora_rank)
            self.q_b = ops.pack_linear(p + "q_b_proj", lambda: [weights.weight(p + "q_b_proj", q_shape)])
        self.sparse = c.index_topk is not None
        self.indexer = Indexer(c, ops, weights, layer, rope) if c.has_indexer(layer) else None
        kv_shape = (heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)
        kv_norm = as_float32(weights.tensor(p + "kv_a_layernorm.weight", (a.kv_lora_rank,))) * a.latent_scale
        self.query_scale = query_scale(c, ops)
        self.heads = ops.pack_attention(
            p + "kv_b_proj",
            attention_spec(c),
            lambda: (weights.weight(p + "kv_b_proj", kv_shape), kv_norm),
            rope,
        )
        o_shape = (d, heads * a.v_head_dim)
        self.o = ops.pack_output(p + "o_proj", lambda: weights.weight(p + "o_proj", o_shape), heads)

    def __call__(
        self, h: Tensor, batch: Batch, cache: LatentCache, cache_layer: int, select: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """h [T, D] -> h + attention(norm(h)) [T, D]; writes the tokens' (latent, k_pe) to the cache.

        Also returns the positions [T, K] it attended to; None for all of them. A layer with an indexer
        selects them; a layer without uses `select`, the selection of the previous layer.
        """
        ops = self.ops
        qkv = ops.linear(h, self.qkv_a, self.norm, self.eps)  # [T, q + c + r]
        q, kv = qkv[:, : self.q_width], qkv[:, self.q_width :]
        if self.indexer is not None:
            assert self.q_norm is not None
            select = self.indexer(h, self.norm, q, self.q_norm, batch, cache)
        if self.q_b is not None:
            q = ops.linear(q, self.q_b, self.q_norm, self.eps)  # [T, H (n + r)]
        if self.query_scale is not None:
            q = q * self.query_scale[batch.positions.long()].unsqueeze(1).to(q.dtype)
        out = ops.mla(q, kv, self.heads, cache, cache_layer, batch, self.eps, select)  # [T, H v]
        return ops.linear(out, self.o, residual=h), select


AnyAttention = LatentAttention | GroupedAttention


def attention_of(
    config: ModelConfig, ops: Ops, weights: WeightSource, layer: int, rope: Tensor
) -> AnyAttention:
    """A layer's attention in the form that the model has."""
    form = LatentAttention if isinstance(config.attention, LatentHeads) else GroupedAttention
    return form(config, ops, weights, layer, rope)
