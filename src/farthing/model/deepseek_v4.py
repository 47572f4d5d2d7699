"""DeepSeek-V4, read top to bottom: a residual of several streams, attention to a window and a compressed
past, and experts that the first layers look up by the token.

Legend: T tokens; D hidden size; n streams; H query heads of size d; g groups of heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.shards import CheckpointError
from farthing.model.attention import norm_of
from farthing.model.config import ModelConfig
from farthing.model.decoder import DecoderModel
from farthing.model.deepseek import FeedForward, MTPLayer
from farthing.model.forms import CompressedHeads
from farthing.model.kinds import cache_kinds, cache_place
from farthing.model.source import LayerSource, WeightSource
from farthing.ops import (
    Batch,
    CacheDtype,
    CompressedParts,
    CompressedSpec,
    Cut,
    Handle,
    IndexCache,
    IndexerSpec,
    LatentCache,
    Norm,
    OpenCache,
    Ops,
    Place,
    PoolParts,
    StreamedHandles,
    StreamParts,
    Weight,
    as_float32,
    as_int64,
    beside,
    cut_weight,
    dtype_name,
)

if TYPE_CHECKING:
    from torch import Tensor


def streams_of(config: ModelConfig, ops: Ops, weights: WeightSource, p: str, ends: bool = False) -> Handle:
    """Hyper-connections (section 2.2): how the streams are summed for a half of a layer, and how its output
    is added to each of them while they mix. p: prefix of the names; ends: they are summed a last time."""
    spec, d = config.streams, config.hidden_size
    assert spec is not None
    n = spec.count
    rows = n if ends else n * (n + 2)
    shapes = {"fn": (rows, n * d), "base": (rows,), "scale": (1 if ends else 3,)}

    def parts() -> StreamParts:
        return StreamParts(*(as_float32(weights.tensor(p + name, shape)) for name, shape in shapes.items()))

    return ops.pack_streams(p.rstrip("._"), spec, d, parts)


class CompressedAttention:
    """The first half of a layer (section 2.3)."""

    def __init__(self, at: LayerSource) -> None:
        config, ops, weights, layer = at.config, at.ops, at.weights, at.layer
        p, d, a = at.prefix + "self_attn.", config.hidden_size, config.mixer(layer)
        assert isinstance(a, CompressedHeads)
        self.ops = ops
        self.streams = streams_of(config, ops, weights, at.prefix + "attn_hc.")
        self.norm = norm_of(config, weights, at.prefix + "input_layernorm")
        pools, index = [p + "compressor."] if a.rate else [], a.index
        if index is not None:
            pools.append(p + "compressor.indexer.")
        modules = [p + "q_a_proj", p + "kv_proj"]
        modules += [pool + name for pool in pools for name in ("kv_proj", "gate_proj")]
        modules += [pools[1] + "scorer.weights_proj"] if index is not None else []
        widths = a.q_lora_rank, a.head_dim, *a.pooled
        # One product over the hidden state computes the queries' latent and all that is kept of a token.
        self.first = ops.pack_linear(
            p + "first",
            lambda: [weights.weight(m, (width, d)) for m, width in zip(modules, widths, strict=True)],
        )
        self.latent = a.q_lora_rank
        self.q_norm = norm_of(config, weights, p + "q_a_norm", a.q_lora_rank)
        q_shape = a.query_width, a.q_lora_rank
        self.q = ops.pack_linear(p + "q_b_proj", lambda: [weights.weight(p + "q_b_proj", q_shape)])
        self.index_q = None
        if index is not None:
            i_shape = index.heads * index.width, a.q_lora_rank
            self.index_q = ops.pack_linear(
                pools[1] + "q_b_proj", lambda: [weights.weight(pools[1] + "q_b_proj", i_shape)]
            )
        self.heads = ops.pack_compressed(
            p + "heads",
            compressed_spec(config, a),
            lambda: _parts(a, weights, p, pools),
            at.rope,
        )
        group = a.query_width // a.o_groups
        self.ends = list(accumulate([group] * a.o_groups, initial=0))
        self.o_a = [
            ops.pack_linear(f"{p}o_a_proj.{g}", lambda rows=rows: [_group(weights, p, a, rows)])  # type: ignore[misc]
            for g, rows in enumerate(pairwise(range(0, a.output_width + 1, a.o_lora_rank)))
        ]
        o_shape = d, a.output_width
        self.rate, self.row = a.rate, cache_place(config, layer)[1]
        self.o_b = ops.pack_linear(p + "o_b_proj", lambda: [weights.weight(p + "o_b_proj", o_shape)])

    def __call__(self, x: Tensor, place: Place, select: Tensor | None = None) -> tuple[Tensor, None]:
        """x [T, n D] -> [T, n D]; writes what is kept of the tokens to the cache."""
        ops = self.ops
        u, mix = ops.collapse(x, self.streams)
        first = ops.linear(u, self.first, self.norm)
        latent, kept = first[:, : self.latent], first[:, self.latent :]
        q = ops.linear(latent, self.q, self.q_norm)
        index_q = None if self.index_q is None else ops.linear(latent, self.index_q, self.q_norm)
        out = ops.compressed(q, kept, index_q, self.heads, place)
        parts = [ops.linear(out[:, a:b], o) for (a, b), o in zip(pairwise(self.ends), self.o_a, strict=True)]
        y = ops.linear(beside(parts), self.o_b, residual=u * 0)  # ranks sum products with a residual
        return ops.spread(x, y, mix, self.streams), None

    def handles(self, feed: StreamedFeedForward) -> StreamedHandles:
        """The layer for `Ops.stack`."""
        return StreamedHandles(
            self.streams, self.norm, self.first, self.q_norm, self.q, self.index_q, self.heads, self.o_a,
            self.o_b, feed.streams, feed.norm, feed.packed, feed.table, self.rate, self.row,
        )  # fmt: skip


def _group(weights: WeightSource, p: str, a: CompressedHeads, rows: tuple[int, int]) -> Weight:
    """A group's rows of o_a_proj."""
    shape = a.output_width, a.query_width // a.o_groups
    return cut_weight(weights.weight(p + "o_a_proj", shape), Cut(0, *rows))


def compressed_spec(config: ModelConfig, a: CompressedHeads) -> CompressedSpec:
    """The head layout for the op."""
    index = None
    if a.index is not None:
        index = IndexerSpec(a.index.heads, a.index.width, a.rotary_width, a.index.top_k, a.index.interleaved)
    return CompressedSpec(
        num_heads=a.num_attention_heads,
        head_dim=a.head_dim,
        rope_dim=a.rotary_width,
        window=a.window,
        rate=a.rate,
        index=index,
        norm_eps=config.rms_norm_eps,
    )


def _parts(a: CompressedHeads, weights: WeightSource, p: str, pools: list[str]) -> CompressedParts:
    def vector(name: str, *shape: int) -> Tensor:
        return as_float32(weights.tensor(name, shape))

    columns = a.pooled[::2]  # of the values of each pool
    dims = a.head_dim, a.index.width if a.index else 0
    return CompressedParts(
        vector(p + "kv_norm.weight", a.head_dim),
        vector(p + "sinks", a.num_attention_heads),
        tuple(
            PoolParts(vector(pool + "position_bias", a.rate, width), vector(pool + "kv_norm.weight", dim))
            for pool, width, dim in zip(pools, columns, dims, strict=False)
        ),
    )


class StreamedFeedForward(FeedForward):
    """The second half of a layer: experts, which hashed layers look up by the token (section 2.1)."""

    def __init__(self, at: LayerSource) -> None:
        super().__init__(at)
        config = at.config
        self.streams = streams_of(config, at.ops, at.weights, at.prefix + "ffn_hc.")
        self.table: Tensor | None = None
        experts = config.feed(at.layer).experts
        if experts is not None and experts.hashed:
            shape = config.vocab_size, experts.router.top_k
            name = at.prefix + "mlp.gate.tid2eid"
            table = at.weights.tensor(name, shape)
            if "int" not in (dtype := dtype_name(table.dtype)):
                raise CheckpointError(f"{name}: found {dtype}; expected integers, such as int64")
            self.table = as_int64(table)
            least, most = int(self.table.min()), int(self.table.max())
            if least < 0 or most >= experts.count:
                raise CheckpointError(
                    f"{name}: found experts {least} to {most}; expected 0 to {experts.count - 1}"
                )

    def __call__(self, x: Tensor, counts: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """x [T, n D] -> [T, n D]; ids [T] int64, of a hashed layer."""
        u, mix = self.ops.collapse(x, self.streams)
        chosen = None if self.table is None else self.table[ids]
        y = self.ops.moe(u, self.packed, self.norm, counts, False, chosen)
        return self.ops.spread(x, y, mix, self.streams)


class StreamedDraft(MTPLayer):
    """An MTP layer, which reads all streams of the model: h_i stays in streams, each normed and projected for
    itself, and the projected embedding of the next token is added to all of them. It has a window alone."""

    def build(self, at: LayerSource) -> None:
        """As in `MTPLayer`."""
        p, d = at.prefix, at.config.hidden_size
        self.e_proj, self.h_proj = (
            at.ops.pack_linear(p + name, lambda name=name: [at.weights.weight(p + name, (d, d))])  # type: ignore[misc]
            for name in ("e_proj", "h_proj")
        )
        self.attention, self.feed_forward = DeepseekV4.build_layer(at)
        self.ending = streams_of(at.config, at.ops, at.weights, p + "hc_head.hc_", ends=True)

    def reads(self, hidden: Tensor, norm: Norm) -> Tensor:
        """The streams as they are."""
        return hidden

    def restack(self) -> None:
        """As in `MTPLayer`."""
        self.stack = self.ops.stack([self.attention.handles(self.feed_forward)])

    def __call__(
        self,
        next_ids: Tensor,
        h: Tensor,
        batch: Batch,
        cache: LatentCache,
        counts: Tensor | None = None,
    ) -> Tensor:
        """next_ids [T] = the token after each position, h [T, n D] -> h' [T, n D]."""
        ops, tokens = self.ops, len(next_ids)
        e = ops.linear(ops.embed(next_ids, self.embedding), self.e_proj, self.enorm)
        x = ops.linear(h.reshape(-1, e.shape[1]), self.h_proj, self.hnorm).reshape(tokens, -1, e.shape[1])
        x = (x + e.unsqueeze(1)).flatten(1)
        if self.stack is not None:
            return ops.run_stack(x, self.stack, batch, cache, None if counts is None else counts[None])
        x, _ = self.attention(x, Place(cache, self.row, batch))
        return self.feed_forward(x, counts)


class DeepseekV4(DecoderModel):
    """The model over a backend. Where an MTP layer reads the streams, `forward` leaves them apart, and their
    last sum belongs to the head."""

    draft_layer = StreamedDraft

    @classmethod
    def build_layer(cls, at: LayerSource) -> tuple[Any, Any]:
        """As in `DecoderModel`."""
        return CompressedAttention(at), StreamedFeedForward(at)

    @classmethod
    def build_ending(cls, config: ModelConfig, ops: Ops, weights: WeightSource) -> Handle | None:
        """The streams' last sum, which the last stage has."""
        if not weights.holds("model.hc_head"):
            return None
        return streams_of(config, ops, weights, "model.hc_head.hc_", ends=True)

    def restack(self) -> None:
        """As in `DecoderModel`."""
        layers = [a.handles(feed) for a, feed in self.layers]
        ending = None if self._apart else self.ending
        self.stack = self.ops.stack(layers, ending) if layers else None
        for mtp in self.mtp:
            mtp.restack()

    @classmethod
    def cache_of(
        cls,
        config: ModelConfig,
        ops: Ops,
        num_blocks: int,
        block_size: int,
        dtype: CacheDtype,
        windows: Mapping[int, int] | None = None,
        slots: int | None = None,
    ) -> LatentCache:
        """As in `DecoderModel`, with entries in the blocks that keep all tokens."""
        past, window, *opened = cache_kinds(config)
        assert window.window is not None
        if block_size % config.block_tokens:
            raise ValueError(
                f"block_size: got {block_size}; expected a multiple of {config.block_tokens}, so that "
                "entries do not cross the edges of blocks"
            )
        blocks = num_blocks if windows is None else windows[window.window]
        cache = ops.new_cache(0, num_blocks, block_size, past.width, dtype)
        own = cache.windows[window.window] = ops.new_cache(0, blocks, block_size, past.width, dtype)
        entries = {e.past: e for e in past.entries}
        for kept in window.entries:
            e = entries.get(kept.past)
            shape = (num_blocks, block_size // e.rate) if e else (0, 0)
            found = new_past(ops, len(kept.layers), shape, (blocks, block_size), kept.width, dtype)
            if e:
                cache.entries[e.past] = found[0]
            own.entries[kept.past] = found[1]
            if e and e.index_width:
                cache.index = IndexCache.new(ops, found[0], len(e.layers), e.index_width)
        count = num_blocks if slots is None else slots
        shapes = [each for kind in opened for each in kind.state]
        rates = {layer: e.past for e in past.entries for layer in e.layers}
        if shapes:
            rows = {rates[e.layers[0]]: ops.zeros("float32", len(e.layers), count, *e.shape) for e in shapes}
            cache.open = OpenCache(rows)
        return cache

    def forward(self, ids: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None) -> Tensor:
        """ids [T] int64 -> hidden [T, D] before the final norm."""
        return self.run_layers(self.embed(ids), replace(batch, ids=ids), cache, counts)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> the embedding in every stream [T, n D]."""
        assert self.config.streams is not None
        h = super().embed(ids)
        return beside([h] * self.config.streams.count)

    def _halves(
        self, h: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor, None]]:
        """As in `DecoderModel`: h [T, n D]."""
        places = self._places(batch, cache)
        for i, (attention, feed_forward) in enumerate(self.layers):
            h, _ = attention(h, places[i])
            yield f"layer {i}'s attention (model.layers.{i}.self_attn)", h, None
            h = feed_forward(h, None if counts is None else counts[i], batch.ids)
            yield f"layer {i}'s experts (model.layers.{i}.mlp)", h, None

    def end(self, h: Tensor) -> Tensor:
        """The streams' last sum [T, D]; on an earlier stage, and before an MTP layer, the streams."""
        return h if self.ending is None or self._apart else self.ops.collapse(h, self.ending)[0]

    @property
    def _apart(self) -> bool:
        """Whether `forward` leaves the streams apart, for MTP layers to read."""
        return self.config.num_nextn_predict_layers > 0

    def summed(self, hidden: Tensor, step: int | None = None) -> Tensor:
        """As in `DecoderModel`: the streams' last sum."""
        if step is not None:
            return self.ops.collapse(hidden, self.drafting(step).ending)[0]
        return self.ops.collapse(hidden, self.ending)[0] if self._apart else hidden


def new_past(
    ops: Ops, rows: int, entries: tuple[int, int], tokens: tuple[int, int], width: int, dtype: CacheDtype
) -> tuple[LatentCache, LatentCache]:
    """Empty entries and window of layers with a compressed past, each in so many blocks of so many.

    Both are in one memory, so that a layer's rows have one numbering: those of the window come first.
    """
    own, past = tokens[0] * tokens[1], entries[0] * entries[1]
    whole = ops.new_cache(rows, 1, own + past, width, dtype)

    def part(at: slice, shape: tuple[int, int]) -> LatentCache:
        data, scale = (
            None if each is None else each[:, 0, at].reshape(rows, *shape, each.shape[-1])
            for each in (whole.data, whole.scale)
        )
        assert data is not None
        return LatentCache(data, scale)

    return part(slice(own, None), entries), part(slice(0, own), tokens)
