"""Multi-head latent attention, its rotary embedding, and the indexer that selects keys (V3.2).

Legend: T tokens; D hidden size; H heads; n, r, v the nope, rotary and value head sizes; c the KV latent;
q the query latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.shards import CheckpointError
from farthing.lazy import np
from farthing.model.config import ModelConfig, RopeConfig
from farthing.model.delta import GatedDelta
from farthing.model.forms import DeltaHeads, GroupedHeads, LatentHeads, Mixer
from farthing.model.source import LayerSource, WeightSource
from farthing.ops import (
    AttentionSpec,
    Cut,
    GroupedParts,
    GroupedSpec,
    Handle,
    IndexerSpec,
    LayerHandles,
    Norm,
    Ops,
    Place,
    Weight,
    cut_weight,
)
from farthing.ops.arrays import as_float32, host

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def norm_of(
    config: ModelConfig, weights: WeightSource, name: str, width: int | None = None, scale: float = 1.0
) -> Norm:
    """A norm of the checkpoint, its weight times `scale`; width None: the hidden size."""
    weight = as_float32(weights.tensor(f"{name}.weight", (width or config.hidden_size,)))
    weight = weight + config.norm_offset if config.norm_offset else weight
    return Norm(weight if scale == 1.0 else weight * scale, config.rms_norm_eps)


class RopeTable:
    """(cos, sin) of a layer's positions and every pair, float32 [2, length, r/2], computed from the first on.

    Rotary position embedding: plain, or extended, as with YaRN (Peng et al. 2023, sections 3.2-3.4).

    Legend: r rotary head size.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        mixer = config.mixer(layer)
        rope, width = mixer.rope, mixer.rotary_width
        self._turns = frequencies(rope, width)
        self._magnitude = 1.0
        if not mixer.rotated:
            self._turns = np.zeros_like(self._turns)
        elif rope.factor is not None and rope.kind == "yarn":
            self._magnitude = _cos_sin_factor(rope)
        self.values = np.empty((2, config.max_position_embeddings, width // 2), np.float32)
        self._reached = 0

    def reach(self, length: int) -> int:
        """Compute at least so many positions, whole blocks; returns how many there are now."""
        end = min(-(-length // _ROPE_BLOCK) * _ROPE_BLOCK, self.values.shape[1])
        while (start := self._reached) < end:
            self._reached = stop = min(start + _ROPE_BLOCK, end)
            angles = np.arange(start, stop, dtype=np.float32)[:, None] * self._turns
            np.cos(angles, out=self.values[0, start:stop])
            np.sin(angles, out=self.values[1, start:stop])
            self.values[:, start:stop] *= np.float32(self._magnitude)
        return self._reached

    def whole(self) -> NDArray[np.float32]:
        """All positions."""
        self.reach(self.values.shape[1])
        return self.values


_ROPE_BLOCK = 4096  # positions


def frequencies(rope: RopeConfig, dim: int) -> NDArray[np.float32]:
    """Radians per position of every pair, float32 [r/2], between theta_i and theta_i / factor."""
    # Powers in float64, rounded once: an error of a frequency grows with the position.
    powers = rope.theta ** (np.arange(0, dim, 2) / dim)
    theta: NDArray[np.float32] = np.float32(1) / powers.astype(np.float32)
    if rope.factor is None:
        return theta
    if rope.kind == "linear":
        return theta / np.float32(rope.factor)
    if rope.kind == "proportional":
        theta[int(rope.turning * dim // 2) :] = 0
        return theta / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, theta)

    def pair_that_turns(rotations: float) -> float:
        return (
            dim
            * math.log(rope.original_max_position / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = np.float32(high - low or 0.001)  # below 0 of a very short original context: no pair is scaled
    ramp = ((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / width).clip(0, 1)
    mixed: NDArray[np.float32] = theta * (1 - ramp) + theta / np.float32(rope.factor) * ramp
    return mixed


def _llama3(rope: RopeConfig, theta: NDArray[np.float32]) -> NDArray[np.float32]:
    """By the turns of a pair within the original context: few are scaled by the factor, many are not."""
    assert rope.factor is not None
    low, high = rope.low_frequency, rope.high_frequency
    turns = np.float32(rope.original_max_position) / (np.float32(2 * math.pi) / theta)
    ramp = ((turns - np.float32(low)) / np.float32(high - low)).clip(0, 1).astype(np.float32)
    mixed: NDArray[np.float32] = (1 - ramp) * theta / np.float32(rope.factor) + ramp * theta
    return mixed


def score_scale(config: ModelConfig) -> float:
    """Latent attention: (nope + r)^-1/2, times m(mscale_all_dim)^2 under YaRN (V3: 0.135234)."""
    scale = float(config.latent.qk_head_dim**-0.5)
    rope = config.rope
    if rope.factor is not None and rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, a: float) -> float:
    return 0.1 * a * math.log(factor) + 1.0 if factor > 1 else 1.0


def _cos_sin_factor(rope: RopeConfig) -> float:
    assert rope.factor is not None
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


# Of values and keys, by compressed-tensors and by ModelOpt.
CACHE_SCALES = (("v_scale", "k_scale"), ("v_proj.v_scale", "k_proj.k_scale"))


def cache_scales(weights: WeightSource, p: str) -> tuple[float, float] | None:
    """Calibrated scales of values and keys; None: there are none, or several for the heads of a layer."""
    names = next((own for own in CACHE_SCALES if all(weights.has(p + name) for name in own)), None)
    if names is None:
        return None
    found = [host(as_float32(weights.tensor(p + name))).reshape(-1) for name in names]
    if any(len(each) != 1 for each in found):
        return None
    value, key = (float(each[0]) for each in found)
    if not (0 < value < math.inf and 0 < key < math.inf):
        raise CheckpointError(f"{p}{names[1]}: got {key}, {names[0]}: got {value}; expected numbers above 0")
    return value, key


def grouped_spec(
    config: ModelConfig, heads: GroupedHeads, scales: tuple[float, float] | None = None
) -> GroupedSpec:
    """The head layout for the op; scales: `cache_scales`.

    Grouped-query attention: query heads share key and value heads (Ainslie et al. 2023).

    Legend: T tokens; D hidden size; H query heads; G key-value heads; d head size.
    """
    return GroupedSpec(
        num_heads=heads.num_attention_heads,
        kv_heads=heads.num_key_value_heads,
        head_dim=heads.head_dim,
        rope_dim=heads.rotary_width,
        scale=heads.scale,
        turning=heads.turning,
        gated=heads.output_gate,
        interleaved=heads.rope.interleaved,
        whole_norm=heads.qk_norm == "whole",
        norm_eps=config.rms_norm_eps,
        window=heads.window,
        cache_scales=scales,
    )


class GroupedAttention:
    """One layer's attention with its input norm and residual."""

    def __init__(self, at: LayerSource, a: GroupedHeads) -> None:
        config, ops, weights = at.config, at.ops, at.weights
        p, d = at.prefix + "self_attn.", config.hidden_size
        self.ops, self.rows, self.window = ops, a.cache_rows, a.window
        self.norm = norm_of(config, weights, at.prefix + "input_layernorm")
        widths = {"q": a.query_width, "k": a.key_width, "v": a.key_width}
        self.q_width = a.query_width
        rows = widths | {"q": widths["q"] * (2 if a.output_gate else 1)}

        def matrices() -> list[Weight]:
            stored = ("q", "k", "k" if a.shared_kv else "v")
            q, k, v = (weights.weight(f"{p}{n}_proj", (rows[n], d)) for n in stored)
            if not a.output_gate:
                return [q, k, v]
            query, gate = ([cut_weight(q, Cut(0, *ends)) for ends in each] for each in _gated_rows(a))
            return [*query, k, v, *gate]

        self.qkv_a = ops.pack_linear(p + "qkv_a", matrices)

        def vector(name: str, width: int) -> Tensor:
            return as_float32(weights.tensor(p + name, (width,)))

        def parts() -> GroupedParts:
            q_norm, k_norm = (
                None
                if a.qk_norm is None
                else vector(f"{n}_norm.weight", widths[n] if a.qk_norm == "whole" else a.head_dim)
                + config.norm_offset
                for n in ("q", "k")
            )
            sinks = vector("sinks", a.num_attention_heads) if a.sinks else None
            ones = ops.tensor(np.ones(a.head_dim, np.float32)) if a.value_norm else None
            if not a.qkv_bias:
                return GroupedParts(None, q_norm, k_norm, sinks, ones)
            bias = [host(vector(f"{n}_proj.bias", w)) for n, w in rows.items()]
            if a.output_gate:
                query, gate = (np.concatenate([bias[0][slice(*e)] for e in each]) for each in _gated_rows(a))
                bias = [query, *bias[1:], gate]
            return GroupedParts(ops.tensor(np.concatenate(bias)), q_norm, k_norm, sinks, ones)

        spec = grouped_spec(config, a, cache_scales(weights, p))
        self.heads = ops.pack_grouped(spec, parts(), at.rope)
        o_shape = (d, a.output_width)
        self.o = ops.pack_linear(
            p + "o_proj", lambda: [weights.weight(p + "o_proj", o_shape)], a.num_attention_heads
        )
        self.o_bias = vector("o_proj.bias", d) if a.o_bias else None
        self.post_norm = norm_of(config, weights, p + "post_norm") if config.post_norms else None

    def __call__(self, h: Tensor, place: Place, select: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """h [T, D] -> h + attention(norm(h)) [T, D]; writes the tokens' values and keys to the cache.

        Also returns None: no token selects what it attends to.
        """
        ops = self.ops
        qkv = ops.linear(h, self.qkv_a, self.norm)  # [T, (H + 2 G) d], then gates [T, H d]
        out = ops.gqa(qkv, self.heads, place)  # [T, H d]
        if self.o_bias is not None:
            bias: Any = self.o_bias
            if not isinstance(bias, np.ndarray):  # arrays are float32, as h is
                bias = bias.to(h)
            h = h + bias
        if self.post_norm is None:
            return ops.linear(out, self.o, residual=h), None
        # Ranks sum their products where there is a residual.
        out = ops.linear(out, self.o, residual=h * 0)
        return h + ops.rms_norm(out, self.post_norm), None

    def handles(self, feed_norm: Norm, feed: Handle) -> LayerHandles:
        """Of the layer, for `Ops.stack`."""
        return LayerHandles(
            self.norm, self.qkv_a, self.q_width, None, None, self.heads, self.o, feed_norm, feed,
            o_bias=self.o_bias, rows=self.rows, window=self.window, attention_post=self.post_norm,
        )  # fmt: skip


def _gated_rows(a: GroupedHeads) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows of each head's query and of its gate, which follows it in q_proj."""
    d = a.head_dim
    starts = range(0, 2 * a.query_width, 2 * d)
    return [(at, at + d) for at in starts], [(at + d, at + 2 * d) for at in starts]


def indexer_spec(heads: LatentHeads) -> IndexerSpec:
    """The indexer layout for the op.

    Key selection for sparse attention: the lightning indexer (DeepSeek-V3.2-Exp section 2.1).

    Legend: T tokens; D hidden size; q the query latent; H index heads of size d; K selected positions.
    """
    index = heads.index
    assert index is not None
    return IndexerSpec(index.heads, index.width, heads.qk_rope_head_dim, index.top_k, index.interleaved)


class Indexer:
    """One layer's indexer, over the normed hidden state and query latent of its layer's attention."""

    def __init__(self, at: LayerSource, heads: LatentHeads) -> None:
        c, ops, weights, index = at.config, at.ops, at.weights, heads.index
        p, d = at.prefix + "self_attn.indexer.", c.hidden_size
        assert index is not None and heads.q_lora_rank is not None
        self.ops = ops
        self.row = sum(map(c.has_indexer, range(at.layer)))  # row in the index cache
        q_shape = (index.heads * index.width, heads.q_lora_rank)
        self.q = ops.pack_linear(p + "wq_b", lambda: [weights.weight(p + "wq_b", q_shape)])
        self.k = ops.pack_linear(p + "wk", lambda: [weights.weight(p + "wk", (index.width, d))])
        self.w = ops.pack_linear(
            p + "weights_proj", lambda: [weights.weight(p + "weights_proj", (index.heads, d))]
        )
        shape = (index.width,)
        self.keys = ops.pack_indexer(
            p + "k_norm",
            indexer_spec(heads),
            lambda: (weights.tensor(p + "k_norm.weight", shape), weights.tensor(p + "k_norm.bias", shape)),
            at.rope,
        )

    def __call__(
        self, h: Tensor, norm: Norm, latent: Tensor, latent_norm: Norm, place: Place
    ) -> Tensor | None:
        """h [T, D] and the query latent [T, q], each with its input norm -> positions [T, K] or None
        (`Ops.index`)."""
        ops = self.ops
        q = ops.linear(latent, self.q, latent_norm)
        k, w = ops.linear(h, self.k, norm), ops.linear(h, self.w, norm)
        return ops.index(q, k, w, self.keys, Place(place.cache, self.row, place.batch))


LATENT_EPS = 1e-6  # transformers' norms of latents have it, whatever rms_norm_eps is


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
        norm_eps=LATENT_EPS,
    )


def query_scale(config: ModelConfig, ops: Ops) -> Tensor | None:
    """The query scale of every position, float32 [max_len]; None if all are 1."""
    s = config.attention.query_scaling
    if s is None:
        return None
    periods = np.arange(config.max_position_embeddings) // s.original_max_position
    return ops.tensor(1 + np.float32(s.beta) * np.log1p(periods.astype(np.float32)))


class LatentAttention:
    """One layer's attention with its input norm and residual."""

    def __init__(self, at: LayerSource, a: LatentHeads) -> None:
        c, ops, weights = at.config, at.ops, at.weights
        p, d, heads = at.prefix + "self_attn.", c.hidden_size, a.num_attention_heads
        self.ops = ops
        self.norm = norm_of(c, weights, at.prefix + "input_layernorm")
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
            q_norm = norm_of(c, weights, p + "q_a_layernorm", a.q_lora_rank, a.query_latent_scale)
            self.q_norm = replace(q_norm, eps=LATENT_EPS)
            q_shape = (heads * a.qk_head_dim, a.q_lora_rank)
            self.q_b = ops.pack_linear(p + "q_b_proj", lambda: [weights.weight(p + "q_b_proj", q_shape)])
        self.sparse = a.index is not None
        self.indexer = Indexer(at, a) if c.has_indexer(at.layer) else None
        kv_shape = (heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)
        kv_norm = as_float32(weights.tensor(p + "kv_a_layernorm.weight", (a.kv_lora_rank,))) * a.latent_scale
        self.query_scale = query_scale(c, ops)
        self.heads = ops.pack_attention(
            p + "kv_b_proj",
            attention_spec(c),
            lambda: (weights.weight(p + "kv_b_proj", kv_shape), kv_norm),
            at.rope,
        )
        o_shape = (d, heads * a.v_head_dim)
        self.o = ops.pack_linear(p + "o_proj", lambda: [weights.weight(p + "o_proj", o_shape)], heads)

    def __call__(self, h: Tensor, place: Place, select: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """h [T, D] -> h + attention(norm(h)) [T, D]; writes the tokens' (latent, k_pe) to the cache.

        Also returns the positions [T, K] it attended to; None for all of them. A layer with an indexer
        selects them; a layer without uses `select`, the selection of the previous layer.
        """
        ops = self.ops
        qkv = ops.linear(h, self.qkv_a, self.norm)  # [T, q + c + r]
        q, kv = qkv[:, : self.q_width], qkv[:, self.q_width :]
        if self.indexer is not None:
            assert self.q_norm is not None
            select = self.indexer(h, self.norm, q, self.q_norm, place)
        if self.q_b is not None:
            q = ops.linear(q, self.q_b, self.q_norm)  # [T, H (n + r)]
        if self.query_scale is not None:
            q = q * self.query_scale[place.batch.positions.long()].unsqueeze(1).to(q.dtype)
        out = ops.mla(q, kv, self.heads, place, select)  # [T, H v]
        return ops.linear(out, self.o, residual=h), select

    def handles(self, feed_norm: Norm, feed: Handle) -> LayerHandles | None:
        """Of the layer, for `Ops.stack`; None for what a stack does not compute: scaled queries, attention to
        what an indexer selects."""
        if self.query_scale is not None or self.sparse:
            return None
        return LayerHandles(
            self.norm, self.qkv_a, self.q_width, self.q_norm, self.q_b, self.heads, self.o, feed_norm, feed
        )


AnyAttention = LatentAttention | GroupedAttention | GatedDelta
COMPUTED_BY: dict[type[Mixer], Callable[[LayerSource, Any], AnyAttention]] = {
    LatentHeads: LatentAttention,
    GroupedHeads: GroupedAttention,
    DeltaHeads: lambda at, heads: GatedDelta(
        at, heads, norm_of(at.config, at.weights, at.prefix + "input_layernorm")
    ),
}


def attention_of(at: LayerSource) -> AnyAttention:
    """A layer's first half, in its form."""
    mixer = at.config.mixer(at.layer)
    return COMPUTED_BY[type(mixer)](at, mixer)
