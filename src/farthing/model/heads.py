"""The two forms of attention heads, and what other modules need to know of them: columns, cache rows.

Latent attention (DeepSeek-V2 section 2.1) caches one row per token and layer: the latent and a rotary key.
Grouped-query attention caches one row per token, layer and key-value head: the value and the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

from farthing.model import fields as checked
from farthing.model.fields import RopeConfig, wrong
from farthing.model.spec import Share, Tensor, Tensors
from farthing.ops.specs import DeltaSpec


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """Multi-head latent attention. Field names follow config.json."""

    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    query_latent_scale: float = 1.0  # scale of the normed query latent; the next field: of the KV latent
    latent_scale: float = 1.0

    @property
    def cache_rows(self) -> int:
        """Rows of the cache per layer."""
        return 1

    @property
    def cache_width(self) -> int:
        """Values per row and token: latent + rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rotary_width(self) -> int:
        """Elements of a query that are rotated."""
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: nope + rotary."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def query_width(self) -> int:
        """Columns of all queries."""
        return self.num_attention_heads * self.qk_head_dim

    @property
    def first_width(self) -> int:
        """Columns of the product that computes the query (or its latent) and what is cached."""
        return (self.q_lora_rank or self.query_width) + self.cache_width

    @property
    def output_width(self) -> int:
        """Columns of o_proj."""
        return self.num_attention_heads * self.v_head_dim

    @property
    def dot_width(self) -> int:
        """Multiplications per query head and cached token: scores over latent and rotary key, then values."""
        return 2 * self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded_width(self) -> int:
        """The same in a prompt, where latents are expanded to the keys and values of every head."""
        return self.qk_head_dim + self.v_head_dim

    def per_rank(self, tp: int) -> LatentHeads:
        """The heads of one of `tp` ranks; all of them cache the latents. Raises ValueError."""
        return replace(
            self, num_attention_heads=_divided("num_attention_heads", self.num_attention_heads, tp)
        )

    def tensors(self, p: str, d: int) -> Tensors:
        """The parameters; p: prefix of the module, d: hidden size."""
        first, by_head = p + "qkv_a", Share(0, self.num_attention_heads)
        if self.q_lora_rank:
            yield Tensor(p + "q_a_proj.weight", (self.q_lora_rank, d), "matrix", reads=first)
            yield Tensor(p + "q_a_layernorm.weight", (self.q_lora_rank,), "norm")
            yield Tensor(p + "q_b_proj.weight", (self.query_width, self.q_lora_rank), "matrix", by_head)
        else:
            yield Tensor(p + "q_proj.weight", (self.query_width, d), "matrix", by_head, first)
        yield Tensor(p + "kv_a_proj_with_mqa.weight", (self.cache_width, d), "matrix", reads=first)
        yield Tensor(p + "kv_a_layernorm.weight", (self.kv_lora_rank,), "norm")
        expanded = self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        yield Tensor(p + "kv_b_proj.weight", (expanded, self.kv_lora_rank), "heads", by_head)
        o_share = Share(1, self.num_attention_heads)
        yield Tensor(p + "o_proj.weight", (d, self.output_width), "matrix", o_share)

    def check(self) -> None:
        """Raise ValueError for sizes that no model has."""
        for name in _LATENT_SIZES:
            checked.in_range(name, getattr(self, name), 1)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: got {self.qk_rope_head_dim}; expected an even number")


_LATENT_SIZES = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, slots=True)
class GroupedHeads:
    """Grouped-query attention: several query heads share a key and value head. Names follow config.json."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_width: int  # the first elements of a head that are rotated
    score_scale: float | None = None  # None: head_dim^-0.5
    # RMSNorm of queries and keys before rotation: of each head, or of all heads together
    qk_norm: Literal["head", "whole"] | None = None
    output_gate: bool = False  # q_proj has a gate behind each query head; attention's output x sigmoid(gate)
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False  # each query head has a score without a value in its softmax
    value_norm: bool = False  # RMSNorm of values, without a weight
    shared_kv: bool = False  # values are what keys are before their norm and rotation
    turning: int | None = None  # elements of a key that are more than its value times weights; None: all

    @property
    def cache_rows(self) -> int:
        """Rows of the cache per layer."""
        return self.num_key_value_heads

    @property
    def cache_width(self) -> int:
        """Values per row and token: value + key, or what turns of the key."""
        return self.head_dim + (self.turning or self.head_dim)

    @property
    def query_width(self) -> int:
        """Columns of all queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Columns of all keys, and of all values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def first_width(self) -> int:
        """Columns of the product that computes queries, keys, values and output gates."""
        return (2 if self.output_gate else 1) * self.query_width + 2 * self.key_width

    @property
    def output_width(self) -> int:
        """Columns of o_proj."""
        return self.query_width

    @property
    def dot_width(self) -> int:
        """Multiplications per query head and cached token."""
        return 2 * self.head_dim + (self.turning or 0)

    @property
    def expanded_width(self) -> int:
        """The same in a prompt."""
        return self.dot_width

    @property
    def scale(self) -> float:
        """Scale of the scores."""
        return float(self.head_dim**-0.5) if self.score_scale is None else self.score_scale

    def per_rank(self, tp: int) -> GroupedHeads:
        """The heads of one of `tp` ranks. Ranks beyond the number of key-value heads share those.

        Raises ValueError.
        """
        groups = self.num_key_value_heads
        if groups % tp and tp % groups:
            raise ValueError(
                f"tp: got {tp}; expected a divisor or multiple of num_key_value_heads = {groups}"
            )
        heads = _divided("num_attention_heads", self.num_attention_heads, tp)
        return replace(self, num_attention_heads=heads, num_key_value_heads=max(1, groups // tp))

    def tensors(self, p: str, d: int) -> Tensors:
        """The parameters; p: prefix of the module, d: hidden size."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        keys = self.key_width, groups
        widths = {"q": (self.query_width, heads), "k": keys, "v": keys}
        for name, (width, units) in widths.items():
            if name == "v" and self.shared_kv:
                continue
            rows, share = 2 * width if name == "q" and self.output_gate else width, Share(0, units)
            yield Tensor(f"{p}{name}_proj.weight", (rows, d), "matrix", share, p + "qkv_a")
            if self.qkv_bias:
                yield Tensor(f"{p}{name}_proj.bias", (rows,), "bias", share)
        for name in ("q", "k") if self.qk_norm is not None else ():
            width, units = widths[name]
            if self.qk_norm == "whole":
                yield Tensor(f"{p}{name}_norm.weight", (width,), "norm", Share(0, units))
            else:
                yield Tensor(f"{p}{name}_norm.weight", (self.head_dim,), "norm")
        if self.sinks:
            yield Tensor(p + "sinks", (heads,), share=Share(0, heads))
        yield Tensor(p + "o_proj.weight", (d, self.output_width), "matrix", Share(1, heads))
        if self.o_bias:  # added once, after the ranks' sum
            yield Tensor(p + "o_proj.bias", (d,), "bias")

    def check(self) -> None:
        """Raise ValueError for sizes that no model has."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}; expected a divisor of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if not 2 <= self.rotary_width <= self.head_dim or self.rotary_width % 2:
            raise ValueError(
                f"partial_rotary_factor: {self.rotary_width} of {self.head_dim} elements of a head are "
                "rotated; expected an even number of at least 2 and at most head_dim"
            )


@dataclass(frozen=True, slots=True)
class DeltaHeads:
    """The heads of Gated DeltaNet, in recurrent layers."""

    spec: DeltaSpec
    fused: bool = False  # projections are stored key head by key head, as in Qwen3-Next

    def tensors(self, p: str, d: int) -> Tensors:
        """The parameters; p: prefix of the module, d: hidden size."""
        s, by_head, reads = self.spec, Share(0, self.spec.key_heads), p + "qkvz"
        keys = s.key_heads * s.key_dim
        mixed = Share(0, s.key_heads, (keys, keys, s.values))  # queries, keys and values one after another
        if self.fused:
            yield Tensor(p + "in_proj_qkvz.weight", (s.channels + s.values, d), "matrix", by_head, reads)
            yield Tensor(p + "in_proj_ba.weight", (2 * s.value_heads, d), "linear", by_head)
        else:
            yield Tensor(p + "in_proj_qkv.weight", (s.channels, d), "matrix", mixed, reads)
            yield Tensor(p + "in_proj_z.weight", (s.values, d), "matrix", by_head, reads)
            yield Tensor(p + "in_proj_b.weight", (s.value_heads, d), "linear", by_head)
            yield Tensor(p + "in_proj_a.weight", (s.value_heads, d), "linear", by_head)
        yield Tensor(p + "conv1d.weight", (s.channels, 1, s.width), share=mixed)
        yield Tensor(p + "dt_bias", (s.value_heads,), "bias", by_head)
        yield Tensor(p + "A_log", (s.value_heads,), "bias", by_head)
        yield Tensor(p + "norm.weight", (s.value_dim,), "scale")
        yield Tensor(p + "out_proj.weight", (d, s.values), "matrix", Share(1, s.value_heads))

    def per_rank(self, tp: int) -> DeltaHeads:
        """The heads of one of `tp` ranks. Raises ValueError."""
        keys = _divided("linear_num_key_heads", self.spec.key_heads, tp)
        return replace(self, spec=replace(self.spec, key_heads=keys, value_heads=self.spec.value_heads // tp))

    @property
    def state(self) -> tuple[tuple[int, ...], ...]:
        """Shapes per layer and sequence, float32: of the state, and of the convolution's tail."""
        return self.spec.state

    @property
    def state_bytes(self) -> int:
        """Bytes per layer and sequence."""
        return 4 * sum(map(prod, self.state))


@dataclass(frozen=True, slots=True)
class CompressedHeads:
    """Attention to a window and a compressed past (DeepSeek-V4). Field names follow config.json."""

    num_attention_heads: int
    head_dim: int
    rotary_width: int  # the last elements of a head that are rotated
    q_lora_rank: int
    o_groups: int  # of heads, each with a projection to o_lora_rank columns of its own
    o_lora_rank: int
    sliding_window: int
    rates: tuple[int, ...]  # of a layer, MTP too: how many tokens become an entry; 0: a window alone
    indexed: int  # the rate whose layers select entries, which pool the tokens of two windows
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    window_rope: RopeConfig  # of layers with a window alone

    cache_rows: ClassVar[int] = 1
    num_key_value_heads: ClassVar[int] = 1

    @property
    def cache_width(self) -> int:
        """Values per row and token: a head is key and value."""
        return self.head_dim

    @property
    def query_width(self) -> int:
        """Columns of all queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def first_width(self) -> int:
        """Columns of the product that computes the queries' latent, keys, and what entries are made of, in
        the layer with most of them."""
        return max(self.q_lora_rank + self.head_dim + sum(self.pooled(i)) for i in range(len(self.rates)))

    def pooled(self, layer: int) -> tuple[int, ...]:
        """Columns that a layer's product has besides the queries' latent and the key: values and gates of
        attention's pool, then of the indexer's, and its weights."""
        rate, d, i = self.rates[layer], self.head_dim, self.index_head_dim
        if not rate:
            return ()
        return (2 * d,) * 2 + (2 * i,) * 2 + (self.index_n_heads,) if rate == self.indexed else (d, d)

    def most_keys(self, length: int) -> int:
        """Rows of the cache that the last token of a sequence reads in a layer."""
        past = [
            length // r if r != self.indexed else min(length // r, self.index_topk) for r in self.rates if r
        ]
        return min(length, self.sliding_window) + max(past, default=0)

    @property
    def output_width(self) -> int:
        """Columns of o_b_proj."""
        return self.o_groups * self.o_lora_rank

    @property
    def dot_width(self) -> int:
        """Multiplications per query head and cached key."""
        return 2 * self.head_dim

    @property
    def expanded_width(self) -> int:
        """The same in a prompt."""
        return 2 * self.head_dim

    def per_rank(self, tp: int) -> CompressedHeads:
        """With a rank's groups of heads; entries and their indexer are the same on all. Raises ValueError."""
        if self.o_groups % tp:
            raise ValueError(f"tp: got {tp}; expected a divisor of o_groups = {self.o_groups}")
        return replace(self, num_attention_heads=self.num_attention_heads // tp, o_groups=self.o_groups // tp)

    def part(self, layers: range, drafts: int = 0) -> CompressedHeads:
        """Of some layers alone, and of MTP layers, which have a window alone."""
        return replace(self, rates=(*(self.rates[i] for i in layers), *[0] * drafts))

    def at(self, layer: int) -> CompressedHeads:
        """Of one layer alone."""
        return self.part(range(layer, layer + 1))

    def tensors(self, p: str, d: int) -> Tensors:
        """A layer's parameters (`at`); p: prefix of the module, d: hidden size."""
        (rate,), h, first, by_group = self.rates, self.head_dim, p + "first", Share(0, self.o_groups)
        yield Tensor(p + "q_a_proj.weight", (self.q_lora_rank, d), "matrix", reads=first)
        yield Tensor(p + "q_a_norm.weight", (self.q_lora_rank,), "norm")
        yield Tensor(p + "q_b_proj.weight", (self.query_width, self.q_lora_rank), "matrix", by_group)
        yield Tensor(p + "kv_proj.weight", (h, d), "matrix", reads=first)
        yield Tensor(p + "kv_norm.weight", (h,), "norm")
        yield Tensor(p + "sinks", (self.num_attention_heads,), share=by_group)
        if rate:
            yield from _pool(p + "compressor.", d, h, rate, rate == self.indexed)
        if rate == self.indexed:
            q = p + "compressor.indexer."
            yield from _pool(q, d, self.index_head_dim, rate, True)
            rows = self.index_n_heads * self.index_head_dim
            yield Tensor(q + "q_b_proj.weight", (rows, self.q_lora_rank), "matrix")
            yield Tensor(q + "scorer.weights_proj.weight", (self.index_n_heads, d), "linear")
        group = self.query_width // self.o_groups
        yield Tensor(p + "o_a_proj.weight", (self.output_width, group), "matrix", by_group)
        columns = Share(1, widths=(self.output_width,))  # of groups, each mixed: no heads to sum apart
        yield Tensor(p + "o_b_proj.weight", (d, self.output_width), "matrix", columns)

    def check(self) -> None:
        """Raise ValueError for sizes that no model has."""
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"o_groups: got {self.o_groups}; expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}"
            )
        for name, width in (("head_dim", self.head_dim), ("index_head_dim", self.index_head_dim)):
            if self.rotary_width % 2 or not 2 <= self.rotary_width <= width:
                raise ValueError(
                    f"qk_rope_head_dim: got {self.rotary_width}; expected an even number of at least 2 and "
                    f"at most {name} = {width}"
                )


def _pool(p: str, d: int, width: int, rate: int, overlapped: bool) -> Tensors:
    columns = 2 * width if overlapped else width
    yield Tensor(p + "kv_proj.weight", (columns, d), "linear")
    yield Tensor(p + "gate_proj.weight", (columns, d), "linear")
    yield Tensor(p + "position_bias", (rate, columns), "bias")
    yield Tensor(p + "kv_norm.weight", (width,), "norm")


Heads = LatentHeads | GroupedHeads | CompressedHeads


def _divided(name: str, count: int, tp: int) -> int:
    if count % tp:
        raise ValueError(f"tp: got {tp}; expected a divisor of {name} = {count}")
    return count // tp


def read_latent(raw: Mapping[str, Any]) -> LatentHeads:
    """From a config.json with V3's fields. Raises ValueError naming the field."""
    if raw.get("attention_bias") not in (None, False):
        raise wrong("attention_bias", raw["attention_bias"], "false: matrices have no bias")
    sizes = {name: checked.integer(raw, name) for name in _LATENT_SIZES}
    rank = raw.get("q_lora_rank")
    query, latent = (
        checked.number(name, raw.get(name, 1.0), above=0.0) for name in ("query_latent_scale", "latent_scale")
    )
    return LatentHeads(
        **sizes,
        q_lora_rank=None if rank is None else checked.in_range("q_lora_rank", rank, 1),
        query_latent_scale=query,
        latent_scale=latent,
    )


def read_grouped(raw: Mapping[str, Any]) -> GroupedHeads:
    """From a config.json with Llama's fields, and those of `GroupedHeads` and `partial_rotary_factor` as the
    type sets them.

    Raises ValueError naming the field.
    """
    heads = checked.integer(raw, "num_attention_heads")
    size = _head_size(raw, heads) if raw.get("head_dim") is None else checked.integer(raw, "head_dim")
    groups = heads if raw.get("num_key_value_heads") is None else checked.integer(raw, "num_key_value_heads")
    partial = raw.get("partial_rotary_factor")
    share = 1.0 if partial is None else checked.number("partial_rotary_factor", partial, above=0.0)
    bias = checked.flag("attention_bias", raw.get("attention_bias") or False)
    scale = raw.get("attention_multiplier")
    shared, turning = raw.get("shared_kv", False), None
    if shared and raw.get("value_norm") and raw.get("qk_norm") == "head":
        rope = checked.read_rope(raw)
        turning = 2 * int(rope.turning * size // 2) if rope.kind == "proportional" else None
    return GroupedHeads(
        heads,
        groups,
        size,
        int(size * share),
        score_scale=None if scale is None else checked.number("attention_multiplier", scale, above=0.0),
        qk_norm=raw.get("qk_norm"),
        output_gate=raw.get("output_gate", False),
        qkv_bias=bias,
        o_bias=bias and raw.get("o_bias", True),
        sinks=raw.get("sinks", False),
        value_norm=raw.get("value_norm", False),
        shared_kv=shared,
        turning=turning if turning and turning < size else None,
    )


_DELTA_SIZES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
MOST_WIDTH = 8  # tokens under a convolution


def read_delta(raw: Mapping[str, Any]) -> DeltaHeads:
    """From a config.json with Qwen3-Next's fields, and `fused` as the type sets it.

    Raises ValueError naming the field.
    """
    keys, values, key_dim, value_dim, width = (checked.integer(raw, name) for name in _DELTA_SIZES)
    if values % keys:
        raise wrong("linear_num_value_heads", values, f"a multiple of linear_num_key_heads = {keys}")
    checked.in_range("linear_conv_kernel_dim", width, 2, MOST_WIDTH)
    eps = checked.number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), above=0.0)
    return DeltaHeads(DeltaSpec(keys, values, key_dim, value_dim, width, eps), raw["fused"])


_COMPRESSED_SIZES = (
    "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window",
    "index_n_heads", "index_head_dim",
)  # fmt: skip


def read_compressed(raw: Mapping[str, Any]) -> CompressedHeads:
    """From a config.json with DeepSeek-V4's fields, and `rates`, `indexed` and `window_rope` as the type sets
    them. Raises ValueError naming the field."""
    sizes = {name: checked.integer(raw, name) for name in _COMPRESSED_SIZES}
    return CompressedHeads(
        **sizes,
        index_topk=checked.integer({"index_topk": raw["indexer"]}, "index_topk"),
        rotary_width=checked.integer(raw, "qk_rope_head_dim"),
        rates=tuple(raw["rates"]),
        indexed=raw["indexed"],
        window_rope=raw["window_rope"],
    )


def _head_size(raw: Mapping[str, Any], heads: int) -> int:
    width = checked.integer(raw, "hidden_size")
    if width % heads or width // heads % 2:
        raise ValueError(
            f"head_dim is missing; expected it, or an even quotient of hidden_size = {width} and "
            f"num_attention_heads = {heads}"
        )
    return width // heads
