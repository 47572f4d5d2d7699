"""Memory a rank of a layout takes, before anything is loaded: weights, cache, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from farthing.model.config import ModelConfig
from farthing.parallel.footprint import Holder, Stored, StoredOf
from farthing.parallel.plan import (
    EMBEDDING,
    Cut,
    Layout,
    Place,
    PlanError,
    ShardPlan,
    layer_of,
    representatives,
)
from farthing.parallel.shared import SLOT_BYTES

CACHE_ITEM = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
CACHE_SCALES = {"fp8": 8, "int8": 8}  # bytes a token a layer beside an 8-bit cache


@dataclass(frozen=True, slots=True)
class Serving:
    """What a replica is asked to hold at once."""

    cache_tokens: int
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    cache_dtype: str = "bfloat16"
    block_size: int = 16
    redundant_experts: int = 0


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank."""

    rank: int
    stage: int
    layers: tuple[int, int]  # first and last + 1 of the hidden layers
    experts: int  # routed experts of a layer
    weights: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.buffers


@dataclass(frozen=True, slots=True)
class Model:
    """A model to plan for: its parameters with one expert of each layer standing for all of them."""

    config: ModelConfig
    stored_of: StoredOf
    parameters: tuple[tuple[str, tuple[int, ...], Stored], ...]

    @classmethod
    def of(cls, plan: ShardPlan, stored_of: StoredOf) -> Model:
        """From any plan of the model."""
        kept = representatives(plan.config)
        return cls(plan.config, stored_of, tuple((n, s, stored_of(n)) for n, s, _ in kept))


def memory(model: Model, plan: ShardPlan, holder: Holder, serving: Serving) -> list[RankMemory]:
    """Every rank's bytes."""
    return [_rank(model, plan, plan.layout.place(r), holder, serving) for r in range(plan.layout.world)]


def cache_bytes_per_token(plan: ShardPlan, place: Place, cache_dtype: str) -> int:
    """Of one token in this rank's layers."""
    return _cache_layers(plan, place) * (
        plan.config.cache_width * CACHE_ITEM[cache_dtype] + CACHE_SCALES.get(cache_dtype, 0)
    )


def fitting_layouts(
    model: Model, holder: Holder, serving: Serving, limit: int, most: int = 64
) -> Iterator[Layout]:
    """Layouts of at most `most` ranks whose largest rank fits `limit` bytes, fewest ranks first.

    Tensor and expert parallelism before pipelines: they shorten a token's way, stages do not.
    """
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]
    layouts = [
        Layout(tp, pp, ep)
        for tp in sizes
        for ep in (sizes if model.config.n_routed_experts else [1])
        for pp in sizes
        if tp <= 8 and (ep == 1 or ep % tp == 0) and max(tp, ep) * pp <= most
    ]
    for layout in sorted(layouts, key=lambda x: (x.world, x.pp, -x.tp)):
        try:
            plan = ShardPlan.build(model.config, layout)
        except PlanError:
            continue
        # The first rank of a stage is its largest: it has the shared expert.
        ranks = [layout.place(stage * layout.stage_ranks) for stage in range(layout.pp)]
        if max(_rank(model, plan, place, holder, serving).total for place in ranks) <= limit:
            yield layout


def _rank(model: Model, plan: ShardPlan, place: Place, holder: Holder, serving: Serving) -> RankMemory:
    config, layout = plan.config, plan.layout
    stage = plan.stages[place.stage]
    held = (config.n_routed_experts or 0) // layout.ep + serving.redundant_experts // layout.ep
    blocks = -(-serving.cache_tokens // serving.block_size)
    per_token = cache_bytes_per_token(plan, place, serving.cache_dtype)
    return RankMemory(
        rank=place.rank,
        stage=place.stage,
        layers=(stage.start, stage.stop),
        experts=held,
        weights=_weights(model, plan, place, holder, held),
        cache=blocks * serving.block_size * per_token,
        buffers=_buffers(plan, place, holder, serving),
    )


def _weights(model: Model, plan: ShardPlan, place: Place, holder: Holder, experts: int) -> int:
    total = 0
    for name, shape, stored in model.parameters:
        if ".experts." in name:
            total += _experts(name, shape, stored, plan, place, holder, experts)
            continue
        cut = plan.cut(name, place)
        if cut is None:
            continue
        local = _local(shape, cut)
        if name == EMBEDDING:
            total += prod(local) * _item(stored)  # looked up as stored
            if plan.config.tie_word_embeddings:
                total += holder.matrix(local[0], local[1], stored)
        else:
            total += _held(name, local, stored, plan, holder)
    if holder.backend == "cpu" and plan.layout.world == 1 and plan.config.num_nextn_predict_layers:
        # One rank gives its drafts a head of their own in int8.
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
    """One matrix of all experts of a layer on this rank."""
    if not plan.holds_layer(layer_of(name) or 0, place):
        return 0
    if plan.layout.ep == 1:
        cut = plan.cut(name, place)
        n, k = _local(shape, cut or Cut(None))
    else:
        n, k = shape
    absent = holder.backend == "cpu" and plan.layout.ep > 1  # a block of zeros stands in for the others
    return holder.matrix(n, k, stored) * (experts + absent)


def _held(name: str, local: tuple[int, ...], stored: Stored, plan: ShardPlan, holder: Holder) -> int:
    if len(local) == 1:
        return 4 * local[0]
    if name.endswith(".gate.weight"):
        return holder.gate(local[0], local[1], stored)
    if name.endswith("kv_b_proj.weight"):
        c = plan.config
        heads = local[0] // (c.qk_nope_head_dim + c.v_head_dim)
        return holder.heads(heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank, stored)
    return holder.matrix(local[0], local[1], stored)


def _buffers(plan: ShardPlan, place: Place, holder: Holder, serving: Serving) -> int:
    """Rotary table, block tables, slots of shared memory, and the activations of a full step."""
    c, layout = plan.config, plan.layout
    rope = 4 * c.max_position_embeddings * c.qk_rope_head_dim
    table = 4 * serving.max_num_seqs * -(-serving.max_model_len // serving.block_size)
    slots = 2 * SLOT_BYTES * _groups(layout) if layout.world > 1 and holder.backend != "gpu" else 0
    return rope + table * (place.rank == layout.driver) + slots + activations(plan, holder, serving)


def activations(plan: ShardPlan, holder: Holder, serving: Serving) -> int:
    """Of a full step, an estimate: hidden states twice, and the widest of a layer's tensors."""
    c, tp = plan.config, plan.layout.tp
    heads = c.num_attention_heads // tp
    attention = heads * (2 * c.qk_head_dim + c.v_head_dim + 2 * c.cache_width)
    mlp = 3 * c.intermediate_size // tp
    routed = c.num_experts_per_tok * (c.hidden_size + 3 * c.moe_intermediate_size)
    return holder.item * serving.max_num_batched_tokens * (2 * c.hidden_size + max(attention, mlp, routed))


def _groups(layout: Layout) -> int:
    return (layout.stage_ranks > 1) + (1 < layout.tp < layout.stage_ranks) + 2 * (layout.pp > 1)


def _cache_layers(plan: ShardPlan, place: Place) -> int:
    last = place.stage == plan.layout.pp - 1
    return len(plan.stages[place.stage]) + (plan.config.num_nextn_predict_layers if last else 0)


def _local(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    return tuple(cut.stop - cut.start if dim == cut.dim else size for dim, size in enumerate(shape))


def _item(stored: Stored) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(stored.kind, 1)
