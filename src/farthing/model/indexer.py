"""Key selection for sparse attention: the lightning indexer (DeepSeek-V3.2-Exp section 2.1).

Legend: T tokens; D hidden size; q the query latent; H index heads of size d; K selected positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farthing.model.config import ModelConfig
from farthing.model.source import WeightSource
from farthing.ops import Batch, IndexerSpec, LatentCache, Ops

if TYPE_CHECKING:
    from torch import Tensor


def indexer_spec(config: ModelConfig) -> IndexerSpec:
    """The indexer layout for the op."""
    assert config.index_topk is not None
    return IndexerSpec(
        num_heads=config.index_n_heads,
        head_dim=config.index_head_dim,
        rope_dim=config.latent.qk_rope_head_dim,
        top_k=config.index_topk,
        interleaved=config.index_rope_interleaved,
    )


class Indexer:
    """One layer's indexer, over the normed hidden state and query latent of its layer's attention."""

    def __init__(
        self, config: ModelConfig, ops: Ops, weights: WeightSource, layer: int, rope: Tensor
    ) -> None:
        p, c, d = f"model.layers.{layer}.self_attn.indexer.", config, config.hidden_size
        assert c.latent.q_lora_rank is not None
        self.ops, self.eps = ops, c.rms_norm_eps
        self.row = sum(map(c.has_indexer, range(layer)))  # row in the index cache
        q_shape = (c.index_n_heads * c.index_head_dim, c.latent.q_lora_rank)
        self.q = ops.pack_linear(p + "wq_b", lambda: [weights.weight(p + "wq_b", q_shape)])
        self.k = ops.pack_linear(p + "wk", lambda: [weights.weight(p + "wk", (c.index_head_dim, d))])
        self.w = ops.pack_linear(
            p + "weights_proj", lambda: [weights.weight(p + "weights_proj", (c.index_n_heads, d))]
        )
        shape = (c.index_head_dim,)
        self.keys = ops.pack_indexer(
            p + "k_norm",
            indexer_spec(c),
            lambda: (weights.tensor(p + "k_norm.weight", shape), weights.tensor(p + "k_norm.bias", shape)),
            rope,
        )

    def __call__(
        self, h: Tensor, norm: Tensor, latent: Tensor, latent_norm: Tensor, batch: Batch, cache: LatentCache
    ) -> Tensor | None:
        """h [T, D] and the query latent [T, q], each with its input norm -> positions [T, K] or None
        (`Ops.index`)."""
        ops = self.ops
        q = ops.linear(latent, self.q, latent_norm, self.eps)
        k, w = ops.linear(h, self.k, norm, self.eps), ops.linear(h, self.w, norm, self.eps)
        return ops.index(q, k, w, self.keys, cache, self.row, batch)
