"""Multi-head latent attention (DeepSeek-V2 section 2.1): a row of the cache is a latent and a rotary key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from farthing.model import fields as checked
from farthing.model.fields import UNSCALED, QueryScaling, RopeConfig, wrong
from farthing.model.forms.base import Index, Mixer, Workspace, divided
from farthing.model.spec import Share, Tensor, Tensors


@dataclass(frozen=True, slots=True)
class LatentHeads(Mixer):
    """Field names follow config.json."""

    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    query_latent_scale: float = 1.0  # scale of the normed query latent; the next field: of the KV latent
    latent_scale: float = 1.0
    index: Index | None = None  # sparse attention (V3.2); None: to all cached tokens
    rope: RopeConfig = UNSCALED
    query_scaling: QueryScaling | None = None

    @property
    def cache_rows(self) -> int:
        return 1

    @property
    def cache_width(self) -> int:
        """Latent and rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def query_heads(self) -> int:
        return self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: nope + rotary."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def query_width(self) -> int:
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
        """Scores over latent and rotary key, then values."""
        return 2 * self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded_width(self) -> int:
        """Of keys and values of every head, to which latents are expanded in a prompt."""
        return self.qk_head_dim + self.v_head_dim

    def per_rank(self, tp: int) -> LatentHeads:
        """All ranks cache the latents."""
        return replace(self, num_attention_heads=divided("num_attention_heads", self.num_attention_heads, tp))

    def keys_read(self, context: int, dense: bool = False) -> int:
        return min(context, context if dense or self.index is None else self.index.top_k)

    @property
    def independent(self) -> bool:
        return self.index is None and self.query_scaling is None

    def selecting(self, top_k: int | None) -> LatentHeads:
        index = None if self.index is None or top_k is None else replace(self.index, top_k=top_k)
        return replace(self, index=index)

    def prompt_keys(self, past: float, new: float) -> tuple[float, float]:
        """Sparse attention also scores the index keys of every token behind the first `top_k`, then either
        masks expanded heads or reads the selected keys in absorbed form, whichever is faster."""
        seen = int(past + new / 2)
        if self.index is None or past + new <= self.index.top_k:
            return self.keys_read(seen) * self.expanded_width, self.keys_scanned(seen)
        top_k = self.index.top_k
        first = max(top_k - past, 0)  # new tokens that select nothing
        attended = (first * (past + first / 2) + (new - first) * top_k) / new
        scanned = (new - first) * (past + (first + new) / 2) / new
        dense = self.keys_read(seen, dense=True) * self.expanded_width
        return min(dense, attended * self.dot_width), 0 if self.index.shared else scanned

    def keys_scanned(self, context: int) -> int:
        index = self.index
        return context if index is not None and not index.shared and context > index.top_k else 0

    def passed(self, keys: int) -> int:
        return self.first_width + (self.query_width if self.q_lora_rank else 0) + self.output_width

    def reference(self, tokens: int, keys: int, hidden: int, streams: int) -> tuple[int, int]:
        heads, width = self.num_attention_heads, self.cache_width
        # Per query head and token: the query as it meets a cached row, and what it reads.
        read = self.dot_width - width
        own = tokens * (hidden + self.first_width + self.query_width + heads * read)
        return own, tokens * heads * (width + read) + keys * width + 3 * tokens * heads * keys

    def workspace(self, w: Workspace) -> None:
        w.linear(self.first_width, 0)
        w.output(self.output_width, self.num_attention_heads)
        if self.q_lora_rank:
            w.linear(self.query_width, self.q_lora_rank)
        sizes = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank
        index = self.index if self.index is not None and w.keys > self.index.top_k else None
        if index is not None:
            w.score(index.heads, index.width, index.top_k, w.keys)
        w.attend_latents(*sizes, None if index is None else index.top_k)

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
        if self.index is not None and not self.index.shared:
            yield from _indexer(self.index, p + "indexer.", d, self.q_lora_rank or 0)

    def check(self) -> None:
        """Raise ValueError for sizes that no model has."""
        for name in _LATENT_SIZES:
            checked.in_range(name, getattr(self, name), 1)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: got {self.qk_rope_head_dim}; expected an even number")
        if self.index is not None:
            self._check_index(self.index)

    def _check_index(self, index: Index) -> None:
        for name, value in zip(_INDEX_SIZES, (index.heads, index.width, index.top_k), strict=True):
            if value < 1:
                raise ValueError(f"{name}: got {value!r}; expected a positive integer")
        if index.width < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim: got {index.width}; "
                f"expected at least qk_rope_head_dim = {self.qk_rope_head_dim}"
            )
        if not self.q_lora_rank:
            raise ValueError("q_lora_rank is absent; expected a positive integer where index_topk is set")

    def gguf(self) -> dict[str, Any]:
        return {
            "attention.head_count": self.num_attention_heads,
            "rope.dimension_count": self.rotary_width,
            "attention.q_lora_rank": self.q_lora_rank or 0,
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": self.kv_lora_rank,
            "attention.key_length": self.cache_width,
            "attention.value_length": self.kv_lora_rank,
            "attention.key_length_mla": self.qk_head_dim,
            "attention.value_length_mla": self.v_head_dim,
        }


def _indexer(index: Index, p: str, d: int, latent: int) -> Tensors:
    yield Tensor(p + "wq_b.weight", (index.heads * index.width, latent), "index")
    yield Tensor(p + "wk.weight", (index.width, d), "index")
    yield Tensor(p + "k_norm.weight", (index.width,), "norm")
    yield Tensor(p + "k_norm.bias", (index.width,), "bias")
    yield Tensor(p + "weights_proj.weight", (index.heads, d), "linear")


_LATENT_SIZES = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_topk")


def latent_layers(raw: Mapping[str, Any], hidden: int) -> tuple[Mixer, ...]:
    """The first half of every hidden layer, and of MTP layers, from a config.json with V3's fields;
    `indexer_types` tells layers apart. Raises ValueError naming the field."""
    common, kinds = (
        replace(read_latent(raw), rope=checked.read_rope(raw)),
        tuple(raw.get("indexer_types") or ()),
    )
    if unknown := {*kinds} - {"full", "shared"}:
        raise ValueError(f"indexer_types has {sorted(unknown)[0]!r}; expected 'full' or 'shared'")
    if common.index is None:
        return (common,) * (hidden + 1)
    if kinds[:1] == ("shared",):
        raise ValueError(
            "indexer_types[0]: got 'shared'; expected 'full': no earlier layer selects keys to share"
        )
    sharing = replace(common, index=replace(common.index, shared=True))
    return tuple(sharing if kinds[i : i + 1] == ("shared",) else common for i in range(hidden + 1))


def read_latent(raw: Mapping[str, Any]) -> LatentHeads:
    """From a config.json with V3's fields. Raises ValueError naming the field."""
    if raw.get("attention_bias") not in (None, False):
        raise wrong("attention_bias", raw["attention_bias"], "false: matrices have no bias")
    sizes: Any = {name: checked.integer(raw, name) for name in _LATENT_SIZES}
    rank = raw.get("q_lora_rank")
    query, latent = (
        checked.number(name, raw.get(name, 1.0), above=0.0) for name in ("query_latent_scale", "latent_scale")
    )
    top_k, index = raw.get("index_topk"), None
    if top_k is not None:
        heads, width = (checked.in_range(name, raw.get(name, 0), 0) for name in _INDEX_SIZES[:2])
        turns = checked.flag("index_rope_interleaved", raw.get("index_rope_interleaved", False))
        index = Index(heads, width, checked.in_range("index_topk", top_k, 0), turns)
    return LatentHeads(
        **sizes,
        index=index,
        q_lora_rank=None if rank is None else checked.in_range("q_lora_rank", rank, 1),
        query_latent_scale=query,
        latent_scale=latent,
        query_scaling=checked.read_query_scaling(raw),
    )
