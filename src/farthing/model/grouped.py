"""Grouped-query attention: query heads share key and value heads (Ainslie et al. 2023).

Legend: T tokens; D hidden size; H query heads; G key-value heads; d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farthing.lazy import np
from farthing.model.config import ModelConfig
from farthing.model.heads import GroupedHeads
from farthing.model.source import WeightSource
from farthing.ops import Batch, GroupedParts, GroupedSpec, LatentCache, Ops
from farthing.ops.arrays import as_float32

if TYPE_CHECKING:
    from torch import Tensor


def grouped_spec(config: ModelConfig, heads: GroupedHeads) -> GroupedSpec:
    """The head layout for the op."""
    return GroupedSpec(
        num_heads=heads.num_attention_heads,
        kv_heads=heads.num_key_value_heads,
        head_dim=heads.head_dim,
        rope_dim=heads.rotary_width,
        scale=heads.scale,
        interleaved=config.rope.interleaved,
        whole_norm=heads.qk_norm == "whole",
    )


class GroupedAttention:
    """One layer's attention with its input norm and residual."""

    query_scale = None
    sparse = False
    q_norm, q_b = None, None

    def __init__(
        self, config: ModelConfig, ops: Ops, weights: WeightSource, layer: int, rope: Tensor
    ) -> None:
        p, d = f"model.layers.{layer}.self_attn.", config.hidden_size
        a = config.attention
        assert isinstance(a, GroupedHeads)
        self.ops, self.eps, self.rows = ops, config.rms_norm_eps, a.cache_rows
        self.norm = as_float32(weights.tensor(f"model.layers.{layer}.input_layernorm.weight", (d,)))
        widths = {"q": a.query_width, "k": a.key_width, "v": a.key_width}
        self.q_width = a.query_width
        self.qkv_a = ops.pack_linear(
            p + "qkv_a", lambda: [weights.weight(f"{p}{n}_proj", (w, d)) for n, w in widths.items()]
        )

        def vector(name: str, width: int) -> Tensor:
            return as_float32(weights.tensor(p + name, (width,)))

        def parts() -> GroupedParts:
            bias = [vector(f"{n}_proj.bias", w) for n, w in widths.items()] if a.qkv_bias else None
            norms = [
                vector(f"{n}_norm.weight", widths[n] if a.qk_norm == "whole" else a.head_dim)
                for n in ("q", "k")
                if a.qk_norm is not None
            ]
            joined = None if bias is None else ops.tensor(np.concatenate([np.asarray(b) for b in bias]))
            return GroupedParts(joined, *norms) if norms else GroupedParts(joined)

        if layer in config.unrotated:
            rope = still(ops, rope)
        self.heads = ops.pack_grouped(grouped_spec(config, a), parts(), rope)
        o_shape = (d, a.output_width)
        self.o = ops.pack_output(
            p + "o_proj", lambda: weights.weight(p + "o_proj", o_shape), a.num_attention_heads
        )
        self.o_bias = vector("o_proj.bias", d) if a.o_bias else None

    def __call__(
        self, h: Tensor, batch: Batch, cache: LatentCache, cache_layer: int, select: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """h [T, D] -> h + attention(norm(h)) [T, D]; writes the tokens' values and keys to the cache.

        Also returns None: every token attends to all before it.
        """
        ops = self.ops
        qkv = ops.linear(h, self.qkv_a, self.norm, self.eps)  # [T, (H + 2 G) d]
        out = ops.gqa(qkv, self.heads, cache, cache_layer * self.rows, batch, self.eps)  # [T, H d]
        if self.o_bias is not None:
            h = h + self.o_bias.to(h)
        return ops.linear(out, self.o, residual=h), None


def still(ops: Ops, rope: Tensor) -> Tensor:
    """A table like `rope` that rotates nothing."""
    table = np.zeros(tuple(rope.shape), np.float32)
    table[0] = 1
    return ops.tensor(table)
