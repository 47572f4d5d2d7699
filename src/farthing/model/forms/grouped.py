"""Grouped-query attention (Ainslie et al. 2023): a row of the cache is a value and a key of one group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from farthing.model import fields as checked
from farthing.model.fields import UNSCALED, RopeConfig
from farthing.model.forms.base import Mixer, Workspace, divided
from farthing.model.forms.delta import read_delta
from farthing.model.spec import Share, Tensor, Tensors


@dataclass(frozen=True, slots=True)
class GroupedHeads(Mixer):
    """Grouped-query attention: several query heads share a key and value head. Names follow config.json."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_width: int = field()  # the first elements of a head that are rotated
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
    window: int | None = None
    rope: RopeConfig = UNSCALED
    rotated: bool = True

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
        heads = divided("num_attention_heads", self.num_attention_heads, tp)
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

    @property
    def query_heads(self) -> int:
        return self.num_attention_heads

    @property
    def scaled_keys(self) -> bool:
        return True

    def passed(self, keys: int) -> int:
        return self.first_width + self.output_width

    def reference(self, tokens: int, keys: int, hidden: int, streams: int) -> tuple[int, int]:
        heads, width, read = self.num_attention_heads, self.cache_width, self.head_dim
        own = tokens * (hidden + self.first_width + self.query_width + heads * read)
        cached = tokens * heads * (width + read) + keys * width * self.cache_rows
        return own, cached + 3 * tokens * heads * keys

    def workspace(self, w: Workspace) -> None:
        w.linear(self.first_width, 0)
        w.output(self.output_width, self.num_attention_heads)
        w.attend(self.turning or self.head_dim, self.head_dim, self.num_key_value_heads)

    def gguf(self) -> dict[str, Any]:
        return {
            "attention.head_count": self.num_attention_heads,
            "rope.dimension_count": self.rotary_width,
            "attention.head_count_kv": self.num_key_value_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
        }


def grouped_layers(raw: Mapping[str, Any], hidden: int) -> tuple[Mixer, ...]:
    """The first half of every hidden layer, and of MTP layers, from a config.json with Llama's fields as the
    type sets them. Raises ValueError naming the field.

    `windows` has how many tokens each layer's attend to, `windowed` what else is different with a window, and
    `unrotated` the layers that do not rotate; `recurrent_layers` are Gated DeltaNet.
    """
    common = replace(read_grouped(raw), rope=checked.read_rope(raw))
    own = {**raw, **(raw.get("windowed") or {})}
    narrow = replace(read_grouped(own), rope=checked.read_rope(own))
    windows, still, recurrent = (
        tuple(raw.get(name) or ()) for name in ("windows", "unrotated", "recurrent_layers")
    )
    delta = read_delta(raw) if recurrent else None

    def at(layer: int) -> Mixer:
        if delta is not None and layer in recurrent:
            return delta
        window = (windows[layer] if layer < len(windows) else 0) or None
        return replace(narrow if window else common, window=window, rotated=layer not in still)

    return tuple(map(at, range(hidden + 1)))


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


def _head_size(raw: Mapping[str, Any], heads: int) -> int:
    width = checked.integer(raw, "hidden_size")
    if width % heads or width // heads % 2:
        raise ValueError(
            f"head_dim is missing; expected it, or an even quotient of hidden_size = {width} and "
            f"num_attention_heads = {heads}"
        )
    return width // heads
