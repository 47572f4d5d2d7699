"""Scratch memory of the native ops, as the native module reports it for a rank's largest steps.

`farthing._native.Sizes` runs the allocations of each op without memory, so nothing here repeats native code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from farthing.model.heads import GroupedHeads
from farthing.ops.weights import loaded_as
from farthing.planner.footprint import Holder, Stored
from farthing.planner.shard import Serving, Shard

_UNEVEN = 1.125  # rows of routed experts on a rank relative to an even share; an estimate


def workspace_bytes(s: Shard, holder: Holder, serving: Serving, threads: int) -> int | None:
    """Bytes after a full step of one prompt and a full step of decodes; None without the native module."""
    try:
        from farthing import _native
    except ImportError:
        return None
    sizes, budget = _native.Sizes(threads), serving.max_num_batched_tokens
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
    from farthing.ops.cpu.packing import choose

    rounding = loaded_as(holder.quantization, mlp=True)  # an upper bound: 8-bit inputs have fewer groups
    plan = choose(stored.kind, columns, stored.group, rounding)
    return plan.format, plan.group


def _head(sizes: Any, s: Shard, holder: Holder, sequences: int) -> None:
    from farthing.ops.cpu.packing import PackedFormat, choose, for_head

    columns = s.config.hidden_size
    sizes.top_logits(_storage(holder, s.stored, columns), s.vocabulary, columns, sequences, 1)
    rounding = loaded_as(holder.quantization, mlp=False)
    head = for_head(choose(s.stored.kind, columns, s.stored.group, rounding), s.vocabulary, columns)
    if head.format == PackedFormat.Q8_PLANES:
        sizes.greedy((head.format, head.group), s.vocabulary, columns, sequences)


def _attention(sizes: Any, s: Shard, holder: Holder, cache_dtype: str, step: _Step) -> None:
    """Sparse attention reads each token's selected keys as a separate sequence, a few tokens at once."""
    c = s.config

    def linear(n: int, k: int) -> None:
        sizes.linear(_storage(holder, s.stored, k), n, k, step.total)

    linear(s.attention.first_width, c.hidden_size)
    linear(c.hidden_size, s.attention.output_width)
    if isinstance(s.attention, GroupedHeads):
        d, groups = s.attention.head_dim, s.attention.num_key_value_heads
        one = _storage(holder, s.stored, d)
        sizes.mla(one, s.heads, 0, d, d, d, step.sequences, step.tokens, step.keys, groups)
        return
    a = s.attention
    if a.q_lora_rank:
        linear(a.query_width, a.q_lora_rank)
    packed = Stored("int8") if holder.quantization or not s.stored.is_float else s.stored
    widths = (a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank)
    heads = (_storage(holder, packed, a.kv_lora_rank), s.heads, *widths)
    if c.index_topk is None or step.keys <= c.index_topk:
        sizes.mla(*heads, step.sequences, step.tokens, step.keys)
    else:
        from farthing.ops.cpu.backend import SELECTED_AT_ONCE
        from farthing.ops.cpu.indexer import MOST_SCORES

        scored = min(step.total, max(1, MOST_SCORES // step.keys))
        index = (c.index_n_heads, c.index_head_dim, c.index_topk)
        sizes.index(*index, scored, step.keys, cache_dtype != "float32")
        sizes.mla(*heads, min(step.total, SELECTED_AT_ONCE), 1, c.index_topk)


def _feeds(sizes: Any, s: Shard, holder: Holder, tokens: int) -> None:
    c = s.config
    held = _storage(holder, s.stored, c.hidden_size)
    if s.dense:
        sizes.moe(held, c.hidden_size, 0, 0, 0, s.dense, tokens)
    if s.expert:
        rows = tokens * c.num_experts_per_tok
        if s.expert_ranks > 1:
            rows = int(rows * _UNEVEN / s.expert_ranks)
        chosen = (c.router_size, c.num_experts_per_tok)
        sizes.moe(held, c.hidden_size, *chosen, s.expert, s.shared, tokens, rows)
