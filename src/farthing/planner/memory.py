"""Memory per rank of a layout, computed before loading: weights, cache, buffers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from farthing.model.config import ModelConfig
from farthing.ops.cutting import Cut
from farthing.parallel.plan import (
    EMBEDDING,
    Layout,
    Place,
    PlanError,
    ShardPlan,
    layer_of,
    representatives,
)
from farthing.planner.buffers import buffers
from farthing.planner.footprint import Holder, Stored, StoredOf
from farthing.planner.shard import Serving

CACHE_ITEM = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
CACHE_SCALES = {"fp8": 8, "int8": 8}  # bytes of scales per token and layer of an 8-bit cache


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
    parameters: tuple[tuple[str, tuple[int, ...], Stored], ...]

    @classmethod
    def of(cls, plan: ShardPlan, stored_of: StoredOf) -> PlannedModel:
        """Build from any plan of the model."""
        kept = representatives(plan.config)
        return cls(plan.config, stored_of, tuple((n, s, stored_of(n)) for n, s, _ in kept))

    @property
    def matrices(self) -> list[tuple[str, Stored]]:
        """The layers' matrices that backends may round."""
        apart = (".gate.weight", ".eh_proj.weight", ".embed_tokens.weight", ".head.weight")
        return [
            (n, s)
            for n, shape, s in self.parameters
            if len(shape) == 2 and layer_of(n) is not None and not n.endswith(apart)
        ]

    @property
    def projections(self) -> Stored:
        """Storage format of the layers' matrices."""
        return next(stored for name, _, stored in self.parameters if name.endswith("o_proj.weight"))


def memory(model: PlannedModel, plan: ShardPlan, holder: Holder, serving: Serving) -> list[RankMemory]:
    """Memory of every rank."""
    return [_rank(model, plan, plan.layout.place(r), holder, serving) for r in range(plan.layout.world)]


def stage_memory(model: PlannedModel, plan: ShardPlan, holder: Holder, serving: Serving) -> list[RankMemory]:
    """Memory of the first rank of every stage: the largest, because it has the shared expert."""
    places = [plan.layout.place(stage * plan.layout.stage_ranks) for stage in range(plan.layout.pp)]
    return [_rank(model, plan, place, holder, serving) for place in places]


def cache_bytes_per_token(plan: ShardPlan, place: Place, cache_dtype: str) -> int:
    """Cache bytes per token in this rank's layers: latents, plus index keys if attention is sparse."""
    c, (latent, index) = plan.config, cache_row_bytes(plan.config, cache_dtype, plan.layout.tp)
    rows = sum(
        c.has_indexer(i)
        for i in range(c.num_hidden_layers + c.num_nextn_predict_layers)
        if plan.holds_layer(i, place)
    )
    return _cache_layers(plan, place) * latent + rows * index


def cache_row_bytes(config: ModelConfig, cache_dtype: str, tp: int) -> tuple[int, int]:
    """Bytes per token and layer on one of tp ranks: of latents, or keys and values, and of the index key;
    scales included."""
    item, scale = CACHE_ITEM[cache_dtype], CACHE_SCALES.get(cache_dtype, 0)
    heads = config.attention.per_rank(tp)
    return heads.cache_rows * (heads.cache_width * item + scale), config.index_head_dim * item + scale // 2


def experts_per_rank(config: ModelConfig, layout: Layout, redundant: int) -> int:
    """Routed experts per layer on a rank, redundant copies included."""
    return -(-((config.n_routed_experts or 0) + redundant) // layout.ep)


def shares_by_format(model: PlannedModel, holder: Holder) -> dict[str, float]:
    """Share of the parameters in each format that the backend holds, largest first."""
    counts: dict[str, int] = {}
    multiplicity = {name: n for name, _, n in representatives(model.config)}
    for name, shape, stored in model.parameters:
        matrix = len(shape) == 2 and name != EMBEDDING
        kind = holder.rounded(stored, shape[1], ".mlp." in name).kind if matrix else stored.kind
        counts[kind] = counts.get(kind, 0) + prod(shape) * multiplicity[name]
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
    held = experts_per_rank(config, layout, serving.redundant_experts)
    host = 0
    if serving.experts_on_host:
        rounding = Holder("cpu", 4, holder.quantization)
        host = _all_experts(model, plan, place, rounding, held)
        holder, held = replace(holder, quantization=None), min(serving.hot_experts, held)
    blocks = -(-serving.cache_tokens // serving.block_size)
    per_token = cache_bytes_per_token(plan, place, serving.cache_dtype)
    return RankMemory(
        rank=place.rank,
        stage=place.stage,
        layers=(stage.start, stage.stop),
        experts=held,
        weights=_weights(model, plan, place, holder, held),
        cache=blocks * serving.block_size * per_token,
        buffers=buffers(plan, place, holder, serving, model.projections),
        host=host,
    )


def _all_experts(model: PlannedModel, plan: ShardPlan, place: Place, holder: Holder, experts: int) -> int:
    """Weight bytes of every layer on this rank."""
    return sum(
        _experts(name, shape, stored, plan, place, holder, experts)
        for name, shape, stored in model.parameters
        if ".experts." in name
    )


def _weights(model: PlannedModel, plan: ShardPlan, place: Place, holder: Holder, experts: int) -> int:
    total = _all_experts(model, plan, place, holder, experts)
    for name, shape, stored in model.parameters:
        if ".experts." in name:
            continue
        cut = plan.cut(name, place)
        if cut is None:
            continue
        local = local_shape(shape, cut)
        if name == EMBEDDING:
            total += prod(local) * _item(stored)  # embeddings are read in their stored format
            if plan.config.tie_word_embeddings:
                total += holder.matrix(local[0], local[1], stored)
        else:
            total += held_bytes(name, local, stored, plan, holder)
    if holder.backend == "cpu" and plan.layout.world == 1 and plan.config.num_nextn_predict_layers:
        # A single rank uses a separate int8 head for drafts.
        c = plan.config
        total += 0 if holder.quantization else holder.matrix(c.vocab_size, c.hidden_size, Stored("int8"))
    return total


def _experts(
    name: str,
    shape: tuple[int, ...],
    stored: Stored,
    plan: ShardPlan,
    place: Place,
    holder: Holder,
    experts: int,
) -> int:
    """Bytes of one matrix over all experts of a layer on this rank."""
    if not plan.holds_layer(layer_of(name) or 0, place):
        return 0
    if plan.layout.ep == 1:
        cut = plan.cut(name, place)
        n, k = local_shape(shape, cut or Cut(None))
    else:
        n, k = shape
    absent = holder.backend == "cpu" and plan.layout.ep > 1  # one block of zeros replaces the others
    return holder.matrix(n, k, stored, mlp=True) * (experts + absent)


def held_bytes(name: str, local: tuple[int, ...], stored: Stored, plan: ShardPlan, holder: Holder) -> int:
    """Bytes of this rank's part of a parameter, as the backend holds it."""
    if len(local) == 1:
        return 4 * local[0]
    if name.endswith(".gate.weight"):
        return holder.gate(local[0], local[1], stored)
    if name.endswith("kv_b_proj.weight"):
        a = plan.config.latent
        heads = local[0] // (a.qk_nope_head_dim + a.v_head_dim)
        return holder.heads(heads, a.qk_nope_head_dim, a.v_head_dim, a.kv_lora_rank, stored)
    return holder.matrix(local[0], local[1], stored, mlp=".mlp." in name)


def _cache_layers(plan: ShardPlan, place: Place) -> int:
    last = place.stage == plan.layout.pp - 1
    return len(plan.stages[place.stage]) + (plan.config.num_nextn_predict_layers if last else 0)


def local_shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The shape of this rank's part."""
    return tuple(cut.stop - cut.start if dim == cut.dim else size for dim, size in enumerate(shape))


def _item(stored: Stored) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(stored.kind, 1)
