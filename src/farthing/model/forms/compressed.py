"""Attention to a window and a compressed past (DeepSeek-V4 section 2.3): a key is its own value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from farthing.model import fields as checked
from farthing.model.fields import UNSCALED, RopeConfig
from farthing.model.forms.base import Index, Mixer, Workspace
from farthing.model.spec import Share, Tensor, Tensors


@dataclass(frozen=True, slots=True)
class CompressedHeads(Mixer):
    """The sizes of one layer. Field names follow config.json."""

    num_attention_heads: int
    head_dim: int
    rotary_width: int = field()  # the last elements of a head that are rotated
    q_lora_rank: int
    o_groups: int  # of heads, each with a projection to o_lora_rank columns of its own
    o_lora_rank: int
    window: int = field()
    rate: int  # how many tokens become an entry; 0: a window alone
    index: Index | None = field()  # of entries, which pool the tokens of two windows then
    rope: RopeConfig = UNSCALED

    num_key_value_heads: ClassVar[int] = 1

    @property
    def cache_rows(self) -> int:
        return 1

    @property
    def query_heads(self) -> int:
        return self.num_attention_heads

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
        """Columns of the product that computes the queries' latent, keys, and what entries are made of."""
        return self.q_lora_rank + self.head_dim + sum(self.pooled)

    @property
    def pooled(self) -> tuple[int, ...]:
        """Columns of that product besides the queries' latent and the key: values and gates of attention's
        pool, then of the indexer's, and its weights."""
        d, index = self.head_dim, self.index
        if not self.rate:
            return ()
        return (d, d) if index is None else (2 * d,) * 2 + (2 * index.width,) * 2 + (index.heads,)

    @property
    def entry_tokens(self) -> int:
        return self.rate or 1

    def selecting(self, top_k: int | None) -> CompressedHeads:
        index = None if self.index is None or top_k is None else replace(self.index, top_k=top_k)
        return replace(self, index=index)

    @property
    def open_tokens(self) -> tuple[int, int]:
        """Shape of what is kept of the tokens of which there will be an entry."""
        if self.index is None:
            return self.rate, sum(self.pooled)
        return 2 * self.rate, sum(self.pooled) - self.index.heads

    def keys_read(self, context: int, dense: bool = False) -> int:
        """Rows of the cache that the last token of a sequence reads."""
        past = context // self.rate if self.rate else 0
        most = past if dense or self.index is None else self.index.top_k
        return min(context, self.window) + min(past, most)

    def keys_scanned(self, context: int) -> int:
        entries = context // self.rate if self.index is not None else 0
        return entries if self.index is not None and entries > self.index.top_k else 0

    @property
    def output_width(self) -> int:
        """Columns of o_b_proj."""
        return self.o_groups * self.o_lora_rank

    @property
    def dot_width(self) -> int:
        """Multiplications per query head and cached key."""
        return 2 * self.head_dim

    def per_rank(self, tp: int) -> CompressedHeads:
        """With a rank's groups of heads; entries and their indexer are the same on all. Raises ValueError."""
        if self.o_groups % tp:
            raise ValueError(f"tp: got {tp}; expected a divisor of o_groups = {self.o_groups}")
        return replace(self, num_attention_heads=self.num_attention_heads // tp, o_groups=self.o_groups // tp)

    def tensors(self, p: str, d: int) -> Tensors:
        h, first, by_group = self.head_dim, p + "first", Share(0, self.o_groups)
        yield Tensor(p + "q_a_proj.weight", (self.q_lora_rank, d), "matrix", reads=first)
        yield Tensor(p + "q_a_norm.weight", (self.q_lora_rank,), "norm")
        yield Tensor(p + "q_b_proj.weight", (self.query_width, self.q_lora_rank), "matrix", by_group)
        yield Tensor(p + "kv_proj.weight", (h, d), "matrix", reads=first)
        yield Tensor(p + "kv_norm.weight", (h,), "norm")
        yield Tensor(p + "sinks", (self.num_attention_heads,), share=by_group)
        if self.rate:
            yield from _pool(p + "compressor.", d, h, self.rate, self.index is not None)
        if (index := self.index) is not None:
            q = p + "compressor.indexer."
            yield from _pool(q, d, index.width, self.rate, True)
            yield Tensor(q + "q_b_proj.weight", (index.heads * index.width, self.q_lora_rank), "matrix")
            yield Tensor(q + "scorer.weights_proj.weight", (index.heads, d), "linear")
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
        widths = {"head_dim": self.head_dim} | (
            {} if self.index is None else {"index_head_dim": self.index.width}
        )
        for name, width in widths.items():
            if self.rotary_width % 2 or not 2 <= self.rotary_width <= width:
                raise ValueError(
                    f"qk_rope_head_dim: got {self.rotary_width}; expected an even number of at least 2 and "
                    f"at most {name} = {width}"
                )

    def passed(self, keys: int) -> int:
        """Attention's queries and outputs, an indexer's, and rows to read."""
        index = 0 if self.index is None else self.index.heads * self.index.width
        return self.first_width + 2 * self.query_width + index + self.output_width + self.keys_read(keys)

    def reference(self, tokens: int, keys: int, hidden: int, streams: int) -> tuple[int, int]:
        """A window and every entry are read; the sink has a column of the weights."""
        index = 0 if self.index is None else 2 * self.index.heads * self.index.width
        columns = streams + hidden + self.first_width + 3 * self.query_width + index
        read = min(keys, tokens + self.window - 1) + (keys // self.rate if self.rate else 0)
        masks, scores = tokens * read // 2, tokens * self.num_attention_heads * (3 * read + 2)
        return tokens * columns, scores + read * self.head_dim + masks

    def workspace(self, w: Workspace) -> None:
        """Each token reads a window and entries as a separate sequence, a few tokens at once."""
        w.linear(self.first_width, 0)
        w.output(self.output_width, 1)
        w.linear(self.query_width, self.q_lora_rank)
        w.linear(self.o_lora_rank, self.query_width // self.o_groups)
        if self.index is not None and (entries := w.keys // self.rate) > self.index.top_k:
            w.score(self.index.heads, self.index.width, self.index.top_k, entries)
        w.attend_rows(self.head_dim, min(w.keys, self.keys_read(w.keys)))


def _pool(p: str, d: int, width: int, rate: int, overlapped: bool) -> Tensors:
    columns = 2 * width if overlapped else width
    yield Tensor(p + "kv_proj.weight", (columns, d), "linear")
    yield Tensor(p + "gate_proj.weight", (columns, d), "linear")
    yield Tensor(p + "position_bias", (rate, columns), "bias")
    yield Tensor(p + "kv_norm.weight", (width,), "norm")


_SIZES = (
    "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window",
    "index_n_heads", "index_head_dim",
)  # fmt: skip


def compressed_layers(raw: Mapping[str, Any], hidden: int) -> tuple[Mixer, ...]:
    """The first half of every hidden layer, and of MTP layers, which have a window alone, from a config.json
    with DeepSeek-V4's fields, and `rates`, `indexed` and `window_rope` as the type sets them.

    Raises ValueError naming the field.
    """
    common, rope, alone = read_compressed(raw), checked.read_rope(raw), raw["window_rope"]

    def at(rate: int) -> Mixer:
        index = common.index if rate == common.rate else None
        return replace(common, rate=rate, index=index, rope=rope if rate else alone)

    return tuple(map(at, [*raw["rates"][:hidden], 0]))


def read_compressed(raw: Mapping[str, Any]) -> CompressedHeads:
    """Of the layers with an indexer, from a config.json with DeepSeek-V4's fields, and `indexed`, their rate,
    as the type sets it. Raises ValueError naming the field."""
    sizes: Any = {name: checked.integer(raw, name) for name in _SIZES}
    top_k = checked.integer({"index_topk": raw["indexer"]}, "index_topk")
    index = Index(sizes.pop("index_n_heads"), sizes.pop("index_head_dim"), top_k, interleaved=True)
    return CompressedHeads(
        window=sizes.pop("sliding_window"),
        **sizes,
        rotary_width=checked.integer(raw, "qk_rope_head_dim"),
        rate=raw["indexed"],
        index=index,
    )
