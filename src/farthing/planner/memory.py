"""Memory per rank of a layout, computed before loading: weights and cache, with what a step needs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from farthing.model import CacheKind, ModelConfig, Sizing, cache_kinds, layer_of
from farthing.model.spec import FEED, ROUNDED, Tensor
from farthing.ops.cut import Cut, share_of
from farthing.parallel.plan import Layout, Place, PlanError, ShardPlan, representatives
from farthing.planner.buffers import Serving, buffers
from farthing.planner.footprint import Holder, Stored, StoredOf, held_by_experts


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank."""

    rank: int
    stage: int
    layers: tuple[int, int]  # first and last + 1 of the hidden layers
    experts: int  # routed experts per layer
    weights: int
    cache: int
    buffers: int
    host: int = 0  # host memory, if experts are kept there

    @property
    def total(self) -> int:
        """Total bytes on the rank's device."""
        return self.weights + self.cache + self.buffers


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model to plan for: its parameters, with one expert per layer representing all of them."""

    config: ModelConfig
    stored_of: StoredOf
    parameters: tuple[tuple[Tensor, Stored], ...]
    # of matrices of experts that differ: the share of each format
    mixed: Mapping[str, Mapping[Stored, float]]

    @classmethod
    def of(cls, plan: ShardPlan, stored_of: StoredOf) -> PlannedModel:
        """Build from any plan of the model."""
        kept = representatives(plan.config)
        parameters = tuple((tensor, stored_of(tensor.name)) for tensor, _ in kept)
        counts = {
            t.name: held_by_experts(t.name, stored_of, count)
            for t, count in kept
            if count > 1 and len(t.shape) == 2
        }
        mixed = {n: shares for n, shares in counts.items() if shares.keys() != {stored_of(n)}}
        return cls(plan.config, stored_of, parameters, mixed)

    def formats(self, name: str, stored: Stored) -> Mapping[Stored, float]:
        """The share of each format of a parameter, or of what it represents."""
        return self.mixed.get(name, {stored: 1.0})

    @property
    def matrices(self) -> list[tuple[Tensor, Stored]]:
        """The layers' matrices that backends may round."""
        return [(t, stored) for t, stored in self.parameters if t.role in ROUNDED]

    @property
    def projections(self) -> Stored:
        """Storage format of the layers' matrices."""
        return next(
            stored for t, stored in self.parameters if t.part == "mixer" and t.share and t.share.dim == 1
        )


def memory(model: PlannedModel, plan: ShardPlan, holder: Holder, serving: Serving) -> list[RankMemory]:
    """Memory of every rank."""
    return [_rank(model, plan, plan.layout.place(r), holder, serving) for r in range(plan.layout.world)]


def stage_memory(model: PlannedModel, plan: ShardPlan, holder: Holder, serving: Serving) -> list[RankMemory]:
    """Memory of the first rank of every stage: the largest, because it has the shared expert."""
    places = [plan.layout.place(stage * plan.layout.stage_ranks) for stage in range(plan.layout.pp)]
    return [_rank(model, plan, place, holder, serving) for place in places]


def cache_bytes_per_token(plan: ShardPlan, place: Place, serving: Serving) -> int:
    """Cache bytes that another token takes on this rank."""
    return _sizing(plan, place, serving).token_bytes


def cache_bytes(plan: ShardPlan, place: Place, serving: Serving) -> int:
    """Cache bytes of this rank: blocks that keep every token, then windows and states of all sequences."""
    sizing, sequences = _sizing(plan, place, serving), serving.max_num_seqs
    blocks = -(-serving.cache_tokens // serving.block_size)
    return sizing.used(blocks, sizing.sizes(sequences, sizing.checkpoints(sequences, blocks)))


def _sizing(plan: ShardPlan, place: Place, serving: Serving) -> Sizing:
    kinds = _kinds(plan, place)
    return Sizing(kinds, serving.cache_dtype, serving.block_size, serving.max_num_batched_tokens)


def _kinds(plan: ShardPlan, place: Place) -> tuple[CacheKind, ...]:
    """What this rank's layers keep."""
    c, layers = plan.config, plan.layers_of(place)
    first, *others = (kind.held_by(layers) for kind in cache_kinds(c, plan.layout.tp))
    return replace(first, index_rows=sum(map(c.has_indexer, layers))), *others


def cache_row_bytes(config: ModelConfig, layer: int, cache_dtype: str, tp: int) -> tuple[int, int]:
    """Bytes per token of a layer on one of tp ranks: of latents, or keys and values, and of the index key;
    scales included."""
    mixer = config.mixer(layer).per_rank(tp)
    rows = CacheKind((0,), mixer.cache_rows, mixer.cache_width)
    index = CacheKind((), index_rows=1, index_width=mixer.index.width) if mixer.index else CacheKind(())
    return rows.token_bytes(cache_dtype), index.token_bytes(cache_dtype)


def experts_per_rank(config: ModelConfig, layout: Layout, redundant: int) -> int:
    """Routed experts per layer on a rank, redundant copies included."""
    return -(-(config.n_routed_experts + redundant) // layout.ep)


def shares_by_format(model: PlannedModel, holder: Holder) -> dict[str, float]:
    """Share of the parameters in each format that the backend holds, largest first."""
    counts: dict[str, float] = {}
    multiplicity = {tensor.name: n for tensor, n in representatives(model.config)}
    for t, stored in model.parameters:
        matrix = len(t.shape) == 2 and t.role != "embedding"
        for each, share in model.formats(t.name, stored).items():
            kind = holder.rounded(each, t.shape[1], t.part in FEED).kind if matrix else each.kind
            counts[kind] = counts.get(kind, 0) + share * prod(t.shape) * multiplicity[t.name]
    total = sum(counts.values())
    return {kind: n / total for kind, n in sorted(counts.items(), key=lambda item: -item[1])}


def fitting_layouts(
    model: PlannedModel, holder: Holder, serving: Serving, limit: int, most: int = 64
) -> Iterator[Layout]:
    """Layouts of at most `most` ranks whose largest rank fits in `limit` bytes, fewest ranks first.

    Tensor and expert parallelism come before pipelines, because they reduce latency and stages do not. With
    experts on the host there is at most one layout, of one rank.
    """
    most = 1 if serving.experts_on_host else most
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]
    layouts = [
        Layout(tp, pp, ep)
        for tp in sizes
        for ep in (sizes if model.config.n_routed_experts else [1])
        for pp in sizes
        if tp <= 8 and (ep == 1 or ep % tp == 0) and max(tp, ep) * pp <= most
        if not serving.redundant_experts or (ep > 1 and serving.redundant_experts % ep == 0)
    ]
    for layout in sorted(layouts, key=lambda x: (x.world, x.pp, -x.tp)):
        try:
            plan = ShardPlan.build(model.config, layout)
        except PlanError:
            continue
        if max(r.total for r in stage_memory(model, plan, holder, serving)) <= limit:
            yield layout


def smaller_options(model: PlannedModel, holder: Holder, serving: Serving, limit: int) -> str | None:
    """The options of least change with which one rank fits in `limit` bytes: rounded weights, then fewer
    sequences at a time, then a shorter context. None if there are none."""
    plan = ShardPlan.build(model.config, Layout())
    asked, most = holder.quantization, serving.max_num_seqs
    formats = [asked] if asked else [None, "int8", "int4"]
    chosen = serving.cache_tokens != serving.max_model_len  # a cache of the user's own size
    lengths = [serving.max_model_len >> n for n in range(1 if chosen else 6)]
    for length, quantization in product(lengths, formats):
        held = replace(holder, quantization=quantization)
        if quantization and not any(held.rounds(stored) for _, stored in model.matrices):
            continue
        for sequences in sorted({min(most, n) for n in (most, 32, 16, 8, 4, 2, 1)}, reverse=True):
            tokens = min(serving.cache_tokens, length)
            fewer = replace(serving, max_num_seqs=sequences, max_model_len=length, cache_tokens=tokens)
            if max(rank.total for rank in memory(model, plan, held, fewer)) <= limit:
                said = [] if quantization == asked else [f"--quantization {quantization}"]
                said += [f"--max-num-seqs {sequences}"] if sequences < most else []
                said += [f"--max-model-len {length}"] if length < lengths[0] else []
                return " ".join(said)
    return None


def most_hot_experts(model: PlannedModel, holder: Holder, serving: Serving, limit: int) -> int | None:
    """The most cached experts per layer, fewer than `serving` requests, that fit in `limit` bytes with
    everything else; None if even zero does not fit.
    """
    plan = ShardPlan.build(model.config, Layout())
    asked = serving.hot_experts if serving.experts_on_host else 0

    def too_much(hot: int) -> bool:
        return memory(model, plan, holder, replace(serving, hot_experts=hot))[0].total > limit

    fitting = bisect_left(range(asked), True, key=too_much)
    return fitting - 1 if fitting else None


def _rank(model: PlannedModel, plan: ShardPlan, place: Place, holder: Holder, serving: Serving) -> RankMemory:
    config, layout = plan.config, plan.layout
    stage = plan.stages[place.stage]
    experts = experts_per_rank(config, layout, serving.redundant_experts)
    host = 0
    if serving.experts_on_host:
        rounding = Holder("cpu", 4, holder.quantization)
        host = _all_experts(model, plan, place, rounding, experts)
        holder, experts = replace(holder, quantization=None), min(serving.hot_experts, experts)
    return RankMemory(
        rank=place.rank,
        stage=place.stage,
        layers=(stage.start, stage.stop),
        experts=experts,
        weights=_weights(model, plan, place, holder, experts),
        cache=cache_bytes(plan, place, serving),
        buffers=buffers(plan, place, holder, serving, model.projections),
        host=host,
    )


def _all_experts(model: PlannedModel, plan: ShardPlan, place: Place, holder: Holder, experts: int) -> int:
    """Weight bytes of every layer on this rank."""
    return sum(
        round(share * _experts(tensor, each, plan, place, holder, experts))
        for tensor, stored in model.parameters
        if tensor.expert is not None
        for each, share in model.formats(tensor.name, stored).items()
    )


def _weights(model: PlannedModel, plan: ShardPlan, place: Place, holder: Holder, experts: int) -> int:
    total = _all_experts(model, plan, place, holder, experts)
    for tensor, stored in model.parameters:
        cut = None if tensor.expert is not None else plan.cut(tensor.name, place)
        if cut is None:
            continue
        local = local_shape(tensor.shape, cut)
        if tensor.role == "embedding":
            tied, head = plan.config.head.tie_word_embeddings, _head_stored(plan.config, holder, stored)
            if not (tied and holder.backend == "cpu" and (holder.quantization or not head.is_float)):
                total += prod(local) * _item(stored)  # embeddings are read in their stored format
            if tied:
                total += holder.matrix(local[0], local[1], head)
        elif tensor.role == "head":
            total += held_bytes(tensor, local, _head_stored(plan.config, holder, stored), plan, holder)
        else:
            total += held_bytes(tensor, local, stored, plan, holder)
    if holder.backend == "cpu" and plan.layout.world == 1 and plan.config.num_nextn_predict_layers:
        # A single rank uses a separate int8 head for drafts.
        c = plan.config
        rounded = holder.quantization or c.head.rounded_head
        total += 0 if rounded else holder.matrix(c.vocab_size, c.hidden_size, Stored("int8"))
    return total


def _head_stored(config: ModelConfig, holder: Holder, stored: Stored) -> Stored:
    return Stored("int8") if config.head.rounded_head and holder.backend == "cpu" else stored


def _experts(
    tensor: Tensor, stored: Stored, plan: ShardPlan, place: Place, holder: Holder, experts: int
) -> int:
    """Bytes of one matrix or bias over all experts of a layer on this rank."""
    if not plan.holds_layer(layer_of(tensor.name) or 0, place):
        return 0
    local = local_shape(tensor.shape, tensor.cut(plan.layout.tp if plan.layout.ep == 1 else 1, place.tp))
    if len(local) == 1:  # a bias
        return 4 * local[0] * experts
    return _packed_bytes(tensor, local, stored, plan, holder) * experts


def held_bytes(
    tensor: Tensor, local: tuple[int, ...], stored: Stored, plan: ShardPlan, holder: Holder
) -> int:
    """Bytes of this rank's part of a parameter, as the backend holds it."""
    if len(local) != 2:
        return 4 * prod(local)
    if tensor.role == "router":
        return holder.gate(local[0], local[1], stored)
    if tensor.role == "heads":
        a = plan.config.latent
        heads = local[0] // (a.qk_nope_head_dim + a.v_head_dim)
        return holder.heads(heads, a.qk_nope_head_dim, a.v_head_dim, a.kv_lora_rank, stored)
    return _packed_bytes(tensor, local, stored, plan, holder)


def _packed_bytes(
    tensor: Tensor, local: tuple[int, ...], stored: Stored, plan: ShardPlan, holder: Holder
) -> int:
    """Bytes of a projection, of each of its halves if the backend sums those apart."""
    (n, k), share, count = local, tensor.share, holder.parts
    shapes = [(n, k)]
    if count > 1 and share is not None and tensor.part in FEED:
        parts = [share_of(local[share.dim], count, i) for i in range(count)]
        shapes = [(n, part) if share.dim else (part, k) for part in parts]
    elif share is not None and share.dim == 1 and share.heads and not share.heads // plan.layout.tp % count:
        shapes = [(n, k // count)] * count
    return sum(holder.matrix(*shape, stored, mlp=tensor.part in FEED) for shape in shapes)


def local_shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The shape of this rank's part."""
    return tuple(cut.size if dim == cut.dim else size for dim, size in enumerate(shape))


def _item(stored: Stored) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(stored.kind, 1)
