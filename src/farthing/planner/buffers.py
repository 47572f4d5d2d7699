"""Memory of a rank's steps besides weights and cache: tensors between ops, and scratch memory of ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from farthing.config import CPU_STEP_TOKENS
from farthing.model import ModelConfig
from farthing.model.forms import Mixer
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
    kinds: tuple[Mixer, ...]  # first halves of layers, on this rank
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
        feeds = [c.feed(i) for i in layers]
        experts = next((feed.experts for feed in feeds if feed.experts), None)
        return cls(
            own,
            tuple(dict.fromkeys(own.mixer(i) for i in layers)),
            share_of(max(feed.width for feed in feeds), layout.tp, place.tp),
            share_of(experts.width, cut, place.tp % cut) if experts else 0,
            share_of(c.shared_size, layout.tp, place.tp),
            head.stop - head.start,
            stored,
            layout.ep,
        )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.config.num_attention_heads


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
        counted = _Counted(sizes, s, holder, step)
        for mixer in s.kinds:
            mixer.workspace(counted)
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


@dataclass(slots=True)
class _Counted:
    """The workspace of a form's ops, as the native module reports it (`farthing.model.forms.Workspace`)."""

    sizes: Any
    shard: Shard
    holder: Holder
    step: _Step

    @property
    def tokens(self) -> int:
        return self.step.total

    @property
    def keys(self) -> int:
        return self.step.keys

    def storage(self, columns: int) -> tuple[Any, int]:
        return _storage(self.holder, self.shard.stored, columns)

    def linear(self, rows: int, columns: int) -> None:
        """columns 0: the hidden size."""
        k = columns or self.shard.config.hidden_size
        self.sizes.linear(self.storage(k), rows, k, self.tokens)

    def output(self, columns: int, heads: int) -> None:
        parts = self.holder.parts
        halved = parts > 1 and heads % parts == 0
        k = columns // parts if halved else columns
        self.sizes.linear(self.storage(k), self.shard.config.hidden_size, k, self.tokens, halved)

    def attend(self, key: int, value: int, groups: int) -> None:
        step = self.step
        shape = self.shard.heads, 0, key, value, value, step.sequences, step.tokens, step.keys
        self.sizes.mla(self.storage(value), *shape, groups)

    def attend_rows(self, width: int, keys: int) -> None:
        at_once = min(self.tokens, _selected_at_once())
        self.sizes.mla(self.storage(width), self.shard.heads, 0, width, width, width, at_once, 1, keys, 1)

    def attend_latents(self, nope: int, rope: int, value: int, latent: int, most: int | None) -> None:
        stored, step = self.shard.stored, self.step
        packed = Stored("int8") if self.holder.quantization or not stored.is_float else stored
        heads = _storage(self.holder, packed, latent), self.shard.heads, nope, rope, value, latent
        if most is None:
            self.sizes.mla(*heads, step.sequences, step.tokens, step.keys)
        else:
            self.sizes.mla(*heads, min(self.tokens, _selected_at_once()), 1, most)

    def score(self, heads: int, width: int, selected: int, keys: int) -> None:
        from farthing.ops.cpu.stack import MOST_SCORES

        self.sizes.index(heads, width, selected, min(self.tokens, max(1, MOST_SCORES // keys)), keys)


def _selected_at_once() -> int:
    from farthing.ops.cpu.backend import SELECTED_AT_ONCE

    return SELECTED_AT_ONCE


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
    tables = {(m.rope, m.rotary_width) for m in map(c.mixer, plan.layers_of(place))}
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

    def attention(a: Mixer) -> int:
        own, floats = a.reference(t, keys, c.hidden_size, c.state_width + c.mixed_width)
        return item * own + _FLOAT * floats

    mlp = item * t * (3 * c.hidden_size + 3 * s.dense)
    routed = t * c.num_experts_per_tok if s.expert else 0
    one = min(t, routed)  # all tokens may select the same expert
    moe = item * t * (3 * c.hidden_size + 3 * s.shared) + _FLOAT * t * c.hidden_size
    moe += item * one * (2 * c.hidden_size + 3 * s.expert)
    return max(*map(attention, s.kinds), mlp, moe)


def _cpu(s: Shard, holder: Holder, serving: Serving, threads: int) -> int:
    """Tensors passed between ops, and the workspace of the largest op."""
    workspace = workspace_bytes(s, holder, serving, threads)
    if workspace is None:
        return _estimate(s, holder.item, serving.max_num_batched_tokens)
    c, t = s.config, serving.max_num_batched_tokens

    outputs = max(a.passed(max(serving.max_model_len, t)) for a in s.kinds)
    # Of all layers in one call; experts that are added a layer later are held until then.
    hidden = (3 + any(feed.both for feed in c.feeds)) * c.hidden_size
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
