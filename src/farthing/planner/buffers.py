"""Memory of a rank's steps besides weights and cache: tensors between ops, and scratch memory of ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from farthing.config import CPU_STEP_TOKENS
from farthing.model import ModelConfig
from farthing.model.heads import CompressedHeads, GroupedHeads, Heads, LatentHeads
from farthing.ops.cut import share_of
from farthing.ops.weights import loaded_as
from farthing.parallel.plan import MICRO_ROWS, Layout, Place, ShardPlan, threads_of_rank
from farthing.parallel.shared import SLOT_BYTES
from farthing.planner.footprint import Holder, Stored


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
    exact: bool = False  # CPU kernels take inputs of integer matrices as two integers


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
            share_of(c.intermediate_size, layout.tp, place.tp)
            if beside or any(not c.is_moe(i) for i in layers)
            else 0,
            share_of(c.moe_intermediate_size, cut, place.tp % cut) if any(map(c.is_moe, layers)) else 0,
            share_of(c.shared_size, layout.tp, place.tp),
            head.stop - head.start,
            stored,
            layout.ep,
        )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kinds[0].num_attention_heads


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
    sizes = _native.Sizes(
        threads, cache_type(serving.cache_dtype), holder.halves is not None, input_terms=1 + serving.exact
    )
    budget = serving.max_num_batched_tokens
    sequences = min(serving.max_num_seqs, budget)
    each = max(1, min(serving.max_model_len, serving.cache_tokens // sequences))
    for step in (_Step(1, budget, max(serving.max_model_len, budget)), _Step(sequences, 1, each)):
        _attention(sizes, s, holder, step)
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


def _attention(sizes: Any, s: Shard, holder: Holder, step: _Step) -> None:
    """Each kind of heads, and recurrent layers."""
    c = s.config

    def linear(n: int, k: int) -> None:
        sizes.linear(_storage(holder, s.stored, k), n, k, step.total)

    def output(columns: int, heads: int) -> None:
        halved = holder.parts > 1 and heads % holder.parts == 0
        k = columns // holder.parts if halved else columns
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
            _past(sizes, s, heads, holder, step)
        else:
            _latent_attention(sizes, s, heads, holder, step)


def _past(sizes: Any, s: Shard, a: CompressedHeads, holder: Holder, step: _Step) -> None:
    """Each token reads a window and entries as a separate sequence, a few tokens at once."""
    entries = step.keys // a.indexed
    if a.indexed in a.rates and entries > a.index_topk:
        scored = _scored_at_once(step, entries)
        index = a.index_n_heads, a.index_head_dim, a.index_topk
        sizes.index(*index, scored, entries)
    d, keys = a.head_dim, min(step.keys, a.most_keys(step.keys))
    one, at_once = _storage(holder, s.stored, d), min(step.total, _selected_at_once())
    sizes.mla(one, s.heads, 0, d, d, d, at_once, 1, keys, 1)


def _scored_at_once(step: _Step, keys: int) -> int:
    from farthing.ops.cpu.stack import MOST_SCORES

    return min(step.total, max(1, MOST_SCORES // keys))


def _selected_at_once() -> int:
    from farthing.ops.cpu.backend import SELECTED_AT_ONCE

    return SELECTED_AT_ONCE


def _latent_attention(sizes: Any, s: Shard, a: LatentHeads, holder: Holder, step: _Step) -> None:
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
        sizes.index(*index, scored, step.keys)
        sizes.mla(*heads, min(step.total, _selected_at_once()), 1, c.index_topk)


def _feeds(sizes: Any, s: Shard, holder: Holder, tokens: int) -> None:
    c = s.config
    storage = _storage(holder, s.stored, c.hidden_size)

    def parts(width: int) -> list[tuple[tuple[Any, int], int]]:
        own = [share_of(width, holder.parts, i) for i in range(holder.parts)] if width else []
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
    they report it (`workspace_bytes`). For the GPU, and without the native module, the figures are an
    estimate.

    Legend: T tokens of a step; S tokens of a sequence; D hidden size; H heads of this rank; I intermediate
    size.
    """
    c, layout = plan.config, plan.layout
    tables = {(c.rope_of(i), c.heads(i).rotary_width) for i in plan.layers_of(place)}
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
