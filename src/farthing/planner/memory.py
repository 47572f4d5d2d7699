"""Memory per rank of a layout, computed before loading: weights, cache, buffers and scratch memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from farthing.config import CPU_STEP_TOKENS
from farthing.model import CacheKind, ModelConfig, Sizing, cache_kinds
from farthing.model.heads import CompressedHeads, GroupedHeads, Heads, LatentHeads
from farthing.ops.cut import Cut, bounds
from farthing.ops.weights import loaded_as
from farthing.parallel.plan import (
    EMBEDDING,
    MICRO_ROWS,
    Layout,
    Place,
    PlanError,
    ShardPlan,
    layer_of,
    representatives,
    threads_of_rank,
)
from farthing.parallel.shared import SLOT_BYTES
from farthing.planner.footprint import Holder, Stored, StoredOf, held_by_experts


@dataclass(frozen=True, slots=True)
class Serving:
    """The load a replica is sized for."""

    cache_tokens: int
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = CPU_STEP_TOKENS
    cache_dtype: str = "bfloat16"
    block_size: int = 16
    redundant_experts: int = 0
    threads: int | None = None  # threads per rank; None: its share of this machine's cores
    experts_on_host: bool = False
    hot_experts: int = 0  # experts per layer cached on the device


@dataclass(frozen=True, slots=True)
class Shard:
    """The sizes of a model on one rank."""

    config: ModelConfig
    kinds: tuple[Heads, ...]  # of attention, on this rank
    dense: int  # I of the dense layers on this rank; 0 if there are none
    expert: int
    shared: int
    vocabulary: int  # rows of the head
    stored: Stored  # storage of the projections
    expert_ranks: int  # ranks that share the rows of routed experts

    @classmethod
    def of(cls, plan: ShardPlan, place: Place, stored: Stored) -> Shard:
        """stored: storage of the layers' projections."""
        c, layout, layers, head = plan.config, plan.layout, plan.stages[place.stage], plan.vocabulary(place)
        cut = layout.tp if layout.ep == 1 else 1
        own = c.per_rank(layout.tp)
        beside = c.shortcut_experts or c.parallel_mlp
        return cls(
            own,
            tuple(dict.fromkeys(own.heads(i) for i in layers)),
            _width(c.intermediate_size, layout.tp, place.tp)
            if beside or any(not c.is_moe(i) for i in layers)
            else 0,
            _width(c.moe_intermediate_size, cut, place.tp % cut) if any(map(c.is_moe, layers)) else 0,
            _width(c.shared_size, layout.tp, place.tp),
            head.stop - head.start,
            stored,
            layout.ep,
        )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kinds[0].num_attention_heads


def _width(columns: int, parts: int, index: int) -> int:
    """Columns of one of `parts` of an MLP."""
    start, stop = bounds(columns, parts, index)
    return stop - start


_UNEVEN = 1.125  # rows of routed experts on a rank relative to an even share; an estimate


def workspace_bytes(s: Shard, holder: Holder, serving: Serving, threads: int) -> int | None:
    """Bytes after a full step of one prompt and a full step of decodes; None without the native module.

    `farthing._native.Sizes` runs the allocations of each op without memory, so nothing here repeats native
    code.
    """
    try:
        from farthing import _native
        from farthing.ops.cpu.stack import cache_type
    except ImportError:
        return None
    sizes = _native.Sizes(threads, cache_type(serving.cache_dtype))
    budget = serving.max_num_batched_tokens
    sequences = min(serving.max_num_seqs, budget)
    each = max(1, min(serving.max_model_len, serving.cache_tokens // sequences))
    for step in (_Step(1, budget, max(serving.max_model_len, budget)), _Step(sequences, 1, each)):
        _attention(sizes, s, holder, serving.cache_dtype, step)
        _feeds(sizes, s, holder, step.total)
        _head(sizes, s, holder, step.sequences)
    return int(sizes.workspace_bytes)


@dataclass(frozen=True, slots=True)
class _Step:
    sequences: int
    tokens: int  # per sequence
    keys: int  # that the last token of each sequence sees

    @property
    def total(self) -> int:
        """Tokens of the step."""
        return self.sequences * self.tokens


def _storage(holder: Holder, stored: Stored, columns: int) -> tuple[Any, int]:
    """The packed format and group of a matrix."""
    from farthing.ops.cpu.formats import choose

    rounding = loaded_as(holder.quantization, mlp=True)  # an upper bound: 8-bit inputs have fewer groups
    plan = choose(stored.kind, columns, stored.group, rounding)
    return plan.format, plan.group


def _head(sizes: Any, s: Shard, holder: Holder, sequences: int) -> None:
    from farthing.ops.cpu.formats import PackedFormat, choose, for_head

    columns = s.config.hidden_size
    sizes.top_logits(_storage(holder, s.stored, columns), s.vocabulary, columns, sequences, 1)
    rounding = loaded_as(holder.quantization, mlp=False)
    head = for_head(choose(s.stored.kind, columns, s.stored.group, rounding), s.vocabulary, columns)
    if head.format == PackedFormat.Q8_PLANES:
        sizes.greedy((head.format, head.group), s.vocabulary, columns, sequences)


def _attention(sizes: Any, s: Shard, holder: Holder, cache_dtype: str, step: _Step) -> None:
    """Each kind of heads, and recurrent layers."""
    c = s.config

    def linear(n: int, k: int) -> None:
        sizes.linear(_storage(holder, s.stored, k), n, k, step.total)

    def output(columns: int, heads: int) -> None:
        halved = holder.halves > 1 and heads % holder.halves == 0
        k = columns // holder.halves if halved else columns
        sizes.linear(_storage(holder, s.stored, k), c.hidden_size, k, step.total, halved)

    if c.recurrent is not None:
        spec = c.recurrent.spec
        linear(spec.channels + spec.values, c.hidden_size)
        output(spec.values, spec.value_heads)
    for heads in s.kinds:
        linear(heads.first_width, c.hidden_size)
        output(heads.output_width, 1 if isinstance(heads, CompressedHeads) else s.heads)
        if isinstance(heads, GroupedHeads):
            d, groups = heads.head_dim, heads.num_key_value_heads
            one, key = _storage(holder, s.stored, d), heads.turning or d
            sizes.mla(one, s.heads, 0, key, d, d, step.sequences, step.tokens, step.keys, groups)
        elif isinstance(heads, CompressedHeads):
            linear(heads.query_width, heads.q_lora_rank)
            linear(heads.o_lora_rank, heads.query_width // heads.o_groups)
            _past(sizes, s, heads, holder, cache_dtype, step)
        else:
            _latent_attention(sizes, s, heads, holder, cache_dtype, step)


def _past(sizes: Any, s: Shard, a: CompressedHeads, holder: Holder, cache_dtype: str, step: _Step) -> None:
    """Each token reads a window and entries as a separate sequence, a few tokens at once."""
    entries = step.keys // a.indexed
    if a.indexed in a.rates and entries > a.index_topk:
        scored = _scored_at_once(step, entries)
        index = a.index_n_heads, a.index_head_dim, a.index_topk
        sizes.index(*index, scored, entries, cache_dtype != "float32")
    d, keys = a.head_dim, min(step.keys, a.most_keys(step.keys))
    one, at_once = _storage(holder, s.stored, d), min(step.total, _selected_at_once())
    sizes.mla(one, s.heads, 0, d, d, d, at_once, 1, keys, 1)


def _scored_at_once(step: _Step, keys: int) -> int:
    from farthing.ops.cpu.stack import MOST_SCORES

    return min(step.total, max(1, MOST_SCORES // keys))


def _selected_at_once() -> int:
    from farthing.ops.cpu.backend import SELECTED_AT_ONCE

    return SELECTED_AT_ONCE


def _latent_attention(
    sizes: Any, s: Shard, a: LatentHeads, holder: Holder, cache_dtype: str, step: _Step
) -> None:
    """Sparse attention reads each token's selected keys as a separate sequence, a few tokens at once."""
    c = s.config
    if a.q_lora_rank:
        sizes.linear(_storage(holder, s.stored, a.q_lora_rank), a.query_width, a.q_lora_rank, step.total)
    packed = Stored("int8") if holder.quantization or not s.stored.is_float else s.stored
    widths = (a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank)
    heads = (_storage(holder, packed, a.kv_lora_rank), s.heads, *widths)
    if c.index_topk is None or step.keys <= c.index_topk:
        sizes.mla(*heads, step.sequences, step.tokens, step.keys)
    else:
        scored = _scored_at_once(step, step.keys)
        index = (c.index_n_heads, c.index_head_dim, c.index_topk)
        sizes.index(*index, scored, step.keys, cache_dtype != "float32")
        sizes.mla(*heads, min(step.total, _selected_at_once()), 1, c.index_topk)


def _feeds(sizes: Any, s: Shard, holder: Holder, tokens: int) -> None:
    c = s.config
    storage = _storage(holder, s.stored, c.hidden_size)

    def parts(width: int) -> list[tuple[tuple[Any, int], int]]:
        own = [_width(width, holder.halves, i) for i in range(holder.halves)] if width else []
        return [(_storage(holder, s.stored, columns), columns) for columns in own]

    if s.dense:
        sizes.moe(storage, c.hidden_size, 0, 0, [], parts(s.dense), tokens)
    if s.expert:
        rows = tokens * c.num_experts_per_tok
        if s.expert_ranks > 1:
            rows = int(rows * _UNEVEN / s.expert_ranks)
        chosen = (c.router_size, c.num_experts_per_tok)
        sizes.moe(storage, c.hidden_size, *chosen, parts(s.expert), parts(s.shared), tokens, rows)


_FLOAT = 4


def buffers(plan: ShardPlan, place: Place, holder: Holder, serving: Serving, stored: Stored) -> int:
    """Bytes of a rank. stored: storage of the layers' projections.

    Only the largest op counts, because ops reuse the same memory one after another: of
    `farthing.ops.reference` for T tokens at the end of a sequence of max_model_len, and of the native ops as
    they report it (`farthing.planner.memory`). For the GPU, and without the native module, the figures are an
    estimate.

    Legend: T tokens of a step; S tokens of a sequence; D hidden size; H heads of this rank; I intermediate
    size.
    """
    c, layout = plan.config, plan.layout
    tables = {(c.rope_of(i), c.heads(i).rotary_width) for i in _layers(plan, place)}
    positions = c.max_position_embeddings
    if holder.backend != "gpu":
        positions = min(positions, serving.max_model_len)
    rope = _FLOAT * positions * sum(width for _, width in tables)
    table = 4 * serving.max_num_seqs * -(-serving.max_model_len // serving.block_size)
    slots = 2 * SLOT_BYTES * _groups(layout) if layout.world > 1 and holder.backend != "gpu" else 0
    return rope + table * (place.rank == layout.driver) + slots + step(plan, place, holder, serving, stored)


def step(plan: ShardPlan, place: Place, holder: Holder, serving: Serving, stored: Stored) -> int:
    """Bytes of buffers in a full step."""
    shard = Shard.of(plan, place, stored)
    whole = serving.max_num_batched_tokens
    c, layout = plan.config, plan.layout
    parts = 1 if layout.dp_attention else max(1, min(layout.pp, whole // MICRO_ROWS))
    tokens = -(-whole // parts)
    bound = _computing(shard, plan, holder, replace(serving, max_num_batched_tokens=tokens))
    if layout.world == 1 or (parts == 1 and holder.backend == "cpu"):
        return bound
    # Stages compute a part of the step at a time. They keep its embeddings, a part's input that they receive,
    # and the outputs of all parts, which are joined at the end.
    ends = place.stage == layout.pp - 1 and not c.num_nextn_predict_layers
    width, out = c.state_width, c.hidden_size if ends else c.state_width
    own = tokens * width
    kept = whole * width + (whole - tokens) * out + own * (place.stage > 0)
    if holder.backend != "cpu":
        return bound + holder.item * kept
    # `bound` has a part's input and output, of which what native code keeps remains at the end.
    return bound + _FLOAT * max(kept - own, whole * (width + 2 * out) - 2 * own)


def _computing(shard: Shard, plan: ShardPlan, holder: Holder, serving: Serving) -> int:
    """Bytes of buffers while layers compute."""
    tokens = serving.max_num_batched_tokens
    if holder.backend == "reference":
        return _reference(shard, holder.item, tokens, max(serving.max_model_len, tokens))
    if holder.backend == "cpu":
        threads = threads_of_rank(serving.threads, plan.layout.world)
        return _cpu(shard, holder, serving, threads)
    return _estimate(shard, holder.item, tokens)


def _reference(s: Shard, item: int, tokens: int, keys: int) -> int:
    """Scores are stored three times (raw, masked, as weights) and dominate everything else."""
    c, t = s.config, tokens

    def attention(a: Heads) -> int:
        if isinstance(a, CompressedHeads):
            return _reference_past(s, a, item, t, keys)
        # Per query head and token: the query as it meets a cached row, and what it reads.
        width, read = a.cache_width, a.dot_width - a.cache_width if isinstance(a, LatentHeads) else a.head_dim
        activations = item * t * (c.hidden_size + a.first_width + a.query_width + s.heads * read)
        cached = t * s.heads * (width + read) + keys * width * a.cache_rows
        return activations + _FLOAT * (cached + 3 * t * s.heads * keys)

    mlp = item * t * (3 * c.hidden_size + 3 * s.dense)
    routed = t * c.num_experts_per_tok if s.expert else 0
    one = min(t, routed)  # all tokens may select the same expert
    moe = item * t * (3 * c.hidden_size + 3 * s.shared) + _FLOAT * t * c.hidden_size
    moe += item * one * (2 * c.hidden_size + 3 * s.expert)
    return max(*map(attention, s.kinds), mlp, moe)


def _reference_past(s: Shard, a: CompressedHeads, item: int, tokens: int, keys: int) -> int:
    """A window and every entry are read; the sink has a column of the weights."""
    c = s.config
    index = 2 * a.index_n_heads * a.index_head_dim if a.indexed in a.rates else 0
    columns = c.state_width + c.hidden_size + c.mixed_width + a.first_width + 3 * a.query_width + index
    past = max((keys // rate for rate in a.rates if rate), default=0)
    read = min(keys, tokens + a.sliding_window - 1) + past
    masks, scores = 2 * tokens * read, tokens * a.num_attention_heads * (3 * read + 2)
    return item * tokens * columns + _FLOAT * (scores + read * a.head_dim) + masks


def _cpu(s: Shard, holder: Holder, serving: Serving, threads: int) -> int:
    """Tensors passed between ops, and the workspace of the largest op."""
    workspace = workspace_bytes(s, holder, serving, threads)
    if workspace is None:
        return _estimate(s, holder.item, serving.max_num_batched_tokens)
    c, t = s.config, serving.max_num_batched_tokens

    def outputs_of(a: Heads) -> int:
        if isinstance(a, CompressedHeads):  # attention's queries and outputs, an indexer's, and rows to read
            index = a.index_n_heads * a.index_head_dim if a.indexed in a.rates else 0
            rows = a.most_keys(max(serving.max_model_len, t))
            return a.first_width + 2 * a.query_width + index + a.output_width + rows
        own_query = a.query_width if isinstance(a, LatentHeads) and a.q_lora_rank else 0
        return a.first_width + own_query + a.output_width

    outputs = max(map(outputs_of, s.kinds))
    if c.recurrent is not None:
        outputs = max(outputs, c.recurrent.spec.channels + 2 * c.recurrent.spec.values)
    # Of all layers in one call; experts that are added a layer later are held until then.
    hidden = (3 + (c.shortcut_experts or c.parallel_mlp)) * c.hidden_size
    if c.streams is not None:  # before the layers and after each of them
        hidden += 2 * c.state_width + c.mixed_width
    buffers = _FLOAT * t * (outputs + hidden)
    return buffers + workspace


def _estimate(s: Shard, item: int, tokens: int) -> int:
    """Hidden states twice, plus the widest tensor of a layer."""
    c = s.config
    attention = max(2 * a.query_width + a.output_width + 2 * s.heads * a.cache_width for a in s.kinds)
    routed = c.num_experts_per_tok * (c.hidden_size + 3 * s.expert) if s.expert else 0
    return item * tokens * (2 * c.hidden_size + max(attention, 3 * s.dense, routed))


def _groups(layout: Layout) -> int:
    return (layout.stage_ranks > 1) + (1 < layout.tp < layout.stage_ranks) + 2 * (layout.pp > 1)


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
    # of matrices of experts that differ: the share of each format
    mixed: Mapping[str, Mapping[Stored, float]]

    @classmethod
    def of(cls, plan: ShardPlan, stored_of: StoredOf) -> PlannedModel:
        """Build from any plan of the model."""
        kept = representatives(plan.config)
        parameters = tuple((n, s, stored_of(n)) for n, s, _ in kept)
        counts = {
            n: held_by_experts(n, stored_of, count) for n, s, count in kept if count > 1 and len(s) == 2
        }
        mixed = {n: shares for n, shares in counts.items() if shares.keys() != {stored_of(n)}}
        return cls(plan.config, stored_of, parameters, mixed)

    def formats(self, name: str, stored: Stored) -> Mapping[Stored, float]:
        """The share of each format of a parameter, or of what it represents."""
        return self.mixed.get(name, {stored: 1.0})

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
        return next(
            stored
            for name, _, stored in self.parameters
            if name.endswith(("o_proj.weight", "o_b_proj.weight"))
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
    c, layers = plan.config, _layers(plan, place)
    first, *others = (kind.held_by(layers) for kind in cache_kinds(c, plan.layout.tp))
    return replace(first, index_rows=sum(map(c.has_indexer, layers))), *others


def _layers(plan: ShardPlan, place: Place) -> set[int]:
    """This rank's layers, MTP layers included."""
    layers = range(plan.config.num_hidden_layers + plan.config.num_nextn_predict_layers)
    return {i for i in layers if plan.holds_layer(i, place)}


def cache_row_bytes(config: ModelConfig, layer: int, cache_dtype: str, tp: int) -> tuple[int, int]:
    """Bytes per token of a layer on one of tp ranks: of latents, or keys and values, and of the index key;
    scales included."""
    heads = config.heads(layer).per_rank(tp)
    rows = CacheKind((0,), heads.cache_rows, heads.cache_width)
    index = CacheKind((), index_rows=1, index_width=config.index_sizes[1])
    return rows.token_bytes(cache_dtype), index.token_bytes(cache_dtype)


def experts_per_rank(config: ModelConfig, layout: Layout, redundant: int) -> int:
    """Routed experts per layer on a rank, redundant copies included."""
    return -(-((config.n_routed_experts or 0) + redundant) // layout.ep)


def shares_by_format(model: PlannedModel, holder: Holder) -> dict[str, float]:
    """Share of the parameters in each format that the backend holds, largest first."""
    counts: dict[str, float] = {}
    multiplicity = {name: n for name, _, n in representatives(model.config)}
    for name, shape, stored in model.parameters:
        matrix = len(shape) == 2 and name != EMBEDDING
        for each, share in model.formats(name, stored).items():
            kind = holder.rounded(each, shape[1], ".mlp." in name).kind if matrix else each.kind
            counts[kind] = counts.get(kind, 0) + share * prod(shape) * multiplicity[name]
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
        round(share * _experts(name, shape, each, plan, place, holder, experts))
        for name, shape, stored in model.parameters
        if ".experts." in name
        for each, share in model.formats(name, stored).items()
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
            tied, head = plan.config.tie_word_embeddings, _head_stored(plan.config, holder, stored)
            if not (tied and holder.backend == "cpu" and (holder.quantization or not head.is_float)):
                total += prod(local) * _item(stored)  # embeddings are read in their stored format
            if tied:
                total += holder.matrix(local[0], local[1], head)
        elif name == "lm_head.weight":
            total += held_bytes(name, local, _head_stored(plan.config, holder, stored), plan, holder)
        else:
            total += held_bytes(name, local, stored, plan, holder)
    if holder.backend == "cpu" and plan.layout.world == 1 and plan.config.num_nextn_predict_layers:
        # A single rank uses a separate int8 head for drafts.
        c = plan.config
        rounded = holder.quantization or c.rounded_head
        total += 0 if rounded else holder.matrix(c.vocab_size, c.hidden_size, Stored("int8"))
    return total


def _head_stored(config: ModelConfig, holder: Holder, stored: Stored) -> Stored:
    return Stored("int8") if config.rounded_head and holder.backend == "cpu" else stored


def _experts(
    name: str,
    shape: tuple[int, ...],
    stored: Stored,
    plan: ShardPlan,
    place: Place,
    holder: Holder,
    experts: int,
) -> int:
    """Bytes of one matrix or bias over all experts of a layer on this rank."""
    if not plan.holds_layer(layer_of(name) or 0, place):
        return 0
    local = local_shape(shape, plan.cut(name, place) or Cut(None)) if plan.layout.ep == 1 else shape
    if len(local) == 1:  # a bias
        return 4 * local[0] * experts
    return _packed_bytes(name, local, stored, plan, holder) * experts


def held_bytes(name: str, local: tuple[int, ...], stored: Stored, plan: ShardPlan, holder: Holder) -> int:
    """Bytes of this rank's part of a parameter, as the backend holds it."""
    if len(local) != 2:
        return 4 * prod(local)
    if name.endswith(".gate.weight"):
        return holder.gate(local[0], local[1], stored)
    if name.endswith("kv_b_proj.weight"):
        a = plan.config.latent
        heads = local[0] // (a.qk_nope_head_dim + a.v_head_dim)
        return holder.heads(heads, a.qk_nope_head_dim, a.v_head_dim, a.kv_lora_rank, stored)
    return _packed_bytes(name, local, stored, plan, holder)


def _packed_bytes(name: str, local: tuple[int, ...], stored: Stored, plan: ShardPlan, holder: Holder) -> int:
    """Bytes of a projection, of each of its halves if the backend sums those apart."""
    n, k = local
    module, count, mlp = name.split(".")[-2], holder.halves, ".mlp." in name
    shapes = [(n, k)]
    if count > 1 and module == "down_proj":
        shapes = [(n, _width(k, count, i)) for i in range(count)]
    elif count > 1 and module in ("gate_proj", "up_proj"):
        shapes = [(_width(n, count, i), k) for i in range(count)]
    elif count > 1 and module in ("o_proj", "out_proj") and _heads(name, plan) % count == 0:
        shapes = [(n, k // count)] * count
    return sum(holder.matrix(*shape, stored, mlp=mlp) for shape in shapes)


def _heads(name: str, plan: ShardPlan) -> int:
    """Heads of a layer's attention or recurrence on a rank."""
    config = plan.config.per_rank(plan.layout.tp)
    if ".linear_attn." in name and config.recurrent is not None:
        return config.recurrent.spec.value_heads
    return config.num_attention_heads


def local_shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The shape of this rank's part."""
    return tuple(cut.size if dim == cut.dim else size for dim, size in enumerate(shape))


def _item(stored: Stored) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(stored.kind, 1)
