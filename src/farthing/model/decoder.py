"""A decoder of any type in `farthing.model.types`, read top to bottom: DeepSeek-V3 and all that resemble it.

Legend: T tokens of the step; D hidden size; V vocabulary; L cache layers; E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from farthing.model.attention import RopeTable, attention_of, norm_of
from farthing.model.config import ModelConfig
from farthing.model.deepseek import FeedForward, MTPLayer, stacked
from farthing.model.kinds import CacheKind, cache_kinds, cache_place
from farthing.model.source import LayerSource, WeightSource
from farthing.ops import (
    ALL,
    Batch,
    CacheDtype,
    Handle,
    IndexCache,
    LatentCache,
    Ops,
    Place,
    RouterSpec,
    StateCache,
    Weight,
    all_finite,
    copy_slots,
)

if TYPE_CHECKING:
    from torch import Tensor


EMBEDDING = "model.embed_tokens"


def table_of(config: ModelConfig, ops: Ops, weights: WeightSource, head: Handle | None = None) -> Any:
    """The embedding for `Ops.embed`; head: the packed head, if it has the same weights."""
    shape = (config.vocab_size, config.hidden_size)
    return ops.pack_table(EMBEDDING, lambda: weights.weight(EMBEDDING, shape), head)


class Rotations:
    """The rotation tables of all layers, MTP layers included, on a device; layers share them.

    In memory of the host they are computed as far as steps reach: a table of a million positions of 64
    elements takes 256 MB, and pages that nothing was written to take none.
    """

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        """ops: whose device reads them; None: nothing does."""
        layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
        mixers = [config.mixer(i) for i in layers]
        keys = [(m.rotated, m.rope, m.rotary_width) for m in mixers]
        self._own = {key: RopeTable(config, layer) for key, layer in zip(keys, layers, strict=True)}
        self.length, self.reached = config.max_position_embeddings, 0
        if ops is not None and ops.device.type != "cpu":
            self._fill(self.length)
        here = {key: own.values if ops is None else ops.tensor(own.values) for key, own in self._own.items()}
        self.tables: list[Any] = [here[key] for key in keys]

    def reach(self, batch: Batch) -> None:
        """Compute what a step reads."""
        if self.reached < self.length and (longest := int(batch.context_lens.max())) > self.reached:
            self._fill(longest)

    def _fill(self, length: int) -> None:
        for own in self._own.values():
            self.reached = own.reach(length)


class DecoderModel:
    """The model over a backend. Weights are read once, in the order of the forward pass."""

    embedding: Any  # of `table_of`
    stack: Handle | None  # all layers in one call, if the backend supports it
    draft_layer: ClassVar[type[MTPLayer]] = MTPLayer

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        weights: WeightSource,
        routers: list[RouterSpec | None] | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        """first, last: whether the embedding, and the norm and head, belong to this pipeline stage."""
        self.config, self.ops = config, ops
        shape = (config.vocab_size, config.hidden_size)
        self.rotations = Rotations(config, ops)
        ropes = self.rotations.tables
        routers = routers or routers_of(config)
        hidden = range(config.num_hidden_layers)

        def at(layer: int) -> LayerSource:
            return LayerSource(config, ops, weights, layer, routers[layer], ropes[layer])

        self.layers = [self.build_layer(at(i)) for i in hidden]
        self.places = [cache_place(config, i) for i in hidden]
        self.windows = {window for window, _ in self.places}
        self.mtp: list[MTPLayer] = []
        self.ending = self.build_ending(config, ops, weights) if last else None
        self.restack()
        if not last:
            self.embedding = table_of(config, ops, weights) if first else None
            return
        # Logits are scaled by the norm before the head.
        norm = norm_of(config, weights, "model.norm", scale=config.head.logit_scale)
        self.norm = replace(norm, cap=config.head.logit_cap or 0.0)

        def head() -> Weight:
            if config.head.tie_word_embeddings:
                return weights.weight(EMBEDDING, shape)
            return weights.weight("lm_head", shape)

        self.head = head_ops(config, ops).pack_head("lm_head", head)
        tied = config.head.tie_word_embeddings
        if first or tied or config.num_nextn_predict_layers:
            self.embedding = table_of(config, ops, weights, self.head if tied else None)
        self.mtp = [
            self.draft_layer(at(i), self.embedding, self.head, head)
            for i in range(len(hidden), self.cache_layers)
        ]

    @classmethod
    def build_layer(cls, at: LayerSource) -> tuple[Any, Any]:
        """A layer's attention, or what it has instead, and its feed-forward half."""
        return attention_of(at), FeedForward(at)

    @classmethod
    def build_ending(cls, config: ModelConfig, ops: Ops, weights: WeightSource) -> Handle | None:
        """What is between the last layer and the norm before the head, if this type has something there."""
        return None

    def unstack(self) -> None:
        """Release the fused stack; layers run op by op until `restack`."""
        self.stack = None
        for mtp in self.mtp:
            mtp.stack = None

    def restack(self) -> None:
        """Rebuild the fused stack from the layers as currently packed."""
        self.stack = stacked(self.ops, self.layers)
        for mtp in self.mtp:
            mtp.restack()

    @property
    def cache_layers(self) -> int:
        """Number of layers that write to the cache: hidden layers, then MTP layers."""
        return self.config.num_hidden_layers + self.config.num_nextn_predict_layers

    def reroute(self, routers: Sequence[RouterSpec | None]) -> None:
        """Change the routing rule of every layer (hidden, then MTP), as `routers_of` orders them."""
        blocks = [feed_forward for _, feed_forward in self.layers] + [m.feed_forward for m in self.mtp]
        for block, spec in zip(blocks, routers, strict=True):
            if spec is not None:
                self.ops.reroute(block.packed, spec)

    def new_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        dtype: CacheDtype = "bfloat16",
        windows: Mapping[int, int] | None = None,
        slots: int | None = None,
    ) -> LatentCache:
        """An empty paged cache for this model, MTP layers included.

        windows: blocks of the layers with a window, by its size; None: num_blocks. slots: of recurrent
        states; None: num_blocks, so that a sequence can have that of its first block.
        """
        return self.cache_of(self.config, self.ops, num_blocks, block_size, dtype, windows, slots)

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
        """`new_cache` of a model with this config."""
        first, *others = cache_kinds(config)

        def paged(kind: CacheKind, blocks: int) -> LatentCache:
            return ops.new_cache(len(kind.layers) * kind.rows, blocks, block_size, kind.width, dtype)

        cache = paged(first, num_blocks)
        for kind in others:
            if kind.window is not None:
                blocks = num_blocks if windows is None else windows[kind.window]
                cache.windows[kind.window] = paged(kind, blocks)
            elif kind.state:
                spec = config.mixer(kind.layers[0]).spec  # type: ignore[attr-defined]
                states = num_blocks if slots is None else slots
                cache.state = StateCache.new(ops, len(kind.layers), states, spec)
        if first.index_rows:
            cache.index = IndexCache.new(ops, cache, first.index_rows, first.index_width)
        return cache

    def copy_states(self, cache: LatentCache, pairs: list[tuple[int, int]]) -> None:
        """Copy what slots hold: (source, target)."""
        kept = cache.state or cache.open
        assert kept is not None
        for tensor in kept.tensors():
            copy_slots(tensor, pairs)

    def forward(self, ids: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None) -> Tensor:
        """ids [T] int64 -> hidden [T, D] before the final norm.

        counts [L, E] int64, if given, is increased by the tokens each expert of each layer saw.
        """
        return self.run_layers(self.embed(ids), batch, cache, counts)

    @property
    def layered(self) -> DecoderModel | None:
        """This model if `run_layers` can compute some of its layers, as with a stack; else None."""
        return None if self.stack is None else self

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> the first layer's input [T, D]."""
        h = self.ops.embed(ids, self.embedding)
        return h if self.config.embedding_scale == 1.0 else h * self.config.embedding_scale

    def run_layers(
        self,
        h: Tensor,
        batch: Batch,
        cache: LatentCache,
        counts: Tensor | None = None,
        span: slice = ALL,
    ) -> Tensor:
        """Run only the layers: h [T, D] -> [T, D]; the entry point of pipeline stages.

        Backends that support it run all layers in one call, with the same result as the loop.
        span: a part of the layers; only if `layered`.
        """
        tables = self.rotations
        if tables.reached < tables.length and int(batch.context_lens.max()) > tables.reached:
            tables.reach(batch)
        if self.stack is not None:
            if len(self.windows) == 1:  # else the stack knows which layers have which
                (window,) = self.windows
                if window is not None:
                    batch, cache = batch.of(window), cache.of(window)
            return self.ops.run_stack(h, self.stack, batch, cache, counts, span)
        if span != ALL:
            raise ValueError(f"span: got {span}; expected every layer of a model without a stack")
        for _, out, _ in self._halves(h, batch, cache, counts):
            h = out
        return self.end(h)

    def _halves(
        self, h: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, output, what the next layer adds to it) of each half of each layer in turn."""
        select: Tensor | None = None  # the cached positions that sparse attention reads
        owed: Tensor | None = None  # output of the previous layer's experts that is not yet added
        places = self._places(batch, cache)
        for i, (attention, feed_forward) in enumerate(self.layers):
            h, select = attention(h, places[i], select)
            yield f"layer {i}'s attention (model.layers.{i}.self_attn)", h, owed
            h, owed = _feed(feed_forward, h, owed, None if counts is None else counts[i])
            yield f"layer {i}'s {'experts' if feed_forward.is_moe else 'MLP'} (model.layers.{i}.mlp)", h, owed

    def end(self, h: Tensor) -> Tensor:
        """The last layer's output -> hidden [T, D] before the norm."""
        return h

    def _places(self, batch: Batch, cache: LatentCache) -> list[Place]:
        """Where each layer writes and reads in a step."""
        own = {window: (cache.of(window), batch.of(window)) for window in self.windows}
        return [Place(own[window][0], row, own[window][1]) for window, row in self.places]

    def first_not_finite(self, ids: Tensor, batch: Batch, cache: LatentCache) -> str | None:
        """The first part of the model whose output has a NaN or an infinity, for the tokens of a step that
        was computed before; None if all are finite. Layer by layer, so slower than `forward`."""
        self.rotations.reach(batch)
        out = embedded = self.embed(ids)
        if not all_finite(embedded):
            return "the embedding (model.embed_tokens)"
        for name, out, owed in self._halves(embedded, replace(batch, ids=ids), cache):
            if not (all_finite(out) and (owed is None or all_finite(owed))):
                return name
        return None if all_finite(self.logits(self.end(out))) else "the head (model.norm, lm_head)"

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] of `forward` -> logits [n, V] float32."""
        return self.ops.logits(self.summed(hidden), self.head, self.norm)

    def normed(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] of `forward` -> [n, D], which the head reads."""
        return self.ops.rms_norm(self.summed(hidden), self.norm)

    def top_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values [n, k], ids [n, k], logsumexp [n]) of the next token, without writing out all logits."""
        return self.ops.top_logits(self.summed(hidden), self.head, self.norm, k)

    def greedy(self, hidden: Tensor) -> list[int]:
        """The most likely next token per row of hidden [n, D]."""
        return self.ops.greedy(self.summed(hidden), self.head, self.norm)

    def draft(
        self,
        next_ids: Tensor,
        hidden: Tensor,
        batch: Batch,
        cache: LatentCache,
        step: int = 0,
        counts: Tensor | None = None,
    ) -> Tensor:
        """One MTP step: next_ids [T] follow the tokens of `batch`, whose hidden [T, D] is given -> h' [T, D].

        step 0 takes `forward`'s hidden, step s > 0 the h' of step s - 1. Steps beyond the number of MTP
        layers reuse the last one.
        """
        self.rotations.reach(batch)
        mtp = self.drafting(step)
        h = mtp.reads(hidden, self.norm if step == 0 else self.drafting(step - 1).norm)
        return mtp(next_ids, h, batch, cache, None if counts is None else counts[mtp.layer])

    def drafting(self, step: int) -> MTPLayer:
        """The MTP layer of a step of `draft`."""
        return self.mtp[min(step, len(self.mtp) - 1)]

    def draft_logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """h' [n, D] of `draft` -> logits [n, V] float32 of the token after next_ids."""
        mtp = self.drafting(step)
        return self.ops.logits(self.summed(hidden, step), mtp.head, mtp.norm)

    def draft_top_logits(self, hidden: Tensor, k: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Like `top_logits`, for a draft."""
        mtp = self.drafting(step)
        return self.ops.top_logits(self.summed(hidden, step), mtp.head, mtp.norm, k)

    def summed(self, hidden: Tensor, step: int | None = None) -> Tensor:
        """hidden of `forward`, or of `draft` if a step is given -> [n, D], which the head's norm reads."""
        return hidden

    def failure(self) -> str | None:
        """Always None: a model in this process fails by raising."""
        return None

    def close(self) -> None:
        """Does nothing: there is nothing to release."""


def head_ops(config: ModelConfig, ops: Ops) -> Ops:
    """The backend that packs the head."""
    return ops.coarse() if config.head.rounded_head else ops


def _feed(
    feed_forward: FeedForward, h: Tensor, owed: Tensor | None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(h, output of the experts that the next layer adds); owed: that of the previous layer."""
    if feed_forward.beside is not None:
        return feed_forward.apart(h, counts)
    h = feed_forward(h, counts)
    return h if owed is None else h + owed, None


def routers_of(config: ModelConfig) -> list[RouterSpec | None]:
    """The router of every layer (hidden, then MTP); None for dense layers."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = (config.feed(i).experts for i in range(layers))
    return [e.router if e else None for e in experts]
