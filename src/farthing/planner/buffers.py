"""A rank's memory besides weights and cache: tables, shared-memory slots, buffers of its largest step.

Only the largest op counts, because ops reuse the same memory one after another: of `farthing.ops.reference`
for T tokens at the end of a sequence of max_model_len, and of the native ops as they report it
(`farthing.planner.workspace`). For the GPU, and without the native module, the figures are an estimate.

Legend: T tokens of a step; S tokens of a sequence; D hidden size; H heads of this rank; I intermediate size.
"""

from __future__ import annotations

import os

from farthing.model.heads import LatentHeads
from farthing.parallel.plan import Layout, Place, ShardPlan
from farthing.parallel.shared import SLOT_BYTES
from farthing.planner.footprint import Holder, Stored
from farthing.planner.shard import Serving, Shard
from farthing.planner.workspace import workspace_bytes

_FLOAT = 4


def buffers(plan: ShardPlan, place: Place, holder: Holder, serving: Serving, stored: Stored) -> int:
    """Bytes of a rank. stored: storage of the layers' projections."""
    c, layout = plan.config, plan.layout
    rope = _FLOAT * c.max_position_embeddings * c.attention.rotary_width
    table = 4 * serving.max_num_seqs * -(-serving.max_model_len // serving.block_size)
    slots = 2 * SLOT_BYTES * _groups(layout) if layout.world > 1 and holder.backend != "gpu" else 0
    return rope + table * (place.rank == layout.driver) + slots + step(plan, place, holder, serving, stored)


def step(plan: ShardPlan, place: Place, holder: Holder, serving: Serving, stored: Stored) -> int:
    """Bytes of buffers in a full step."""
    shard = Shard.of(plan, place, stored)
    tokens = serving.max_num_batched_tokens
    if holder.backend == "reference":
        return _reference(shard, holder.item, tokens, max(serving.max_model_len, tokens))
    if holder.backend == "cpu":
        threads = serving.threads or max(1, len(os.sched_getaffinity(0)) // plan.layout.world)
        return _cpu(shard, holder, serving, threads)
    return _estimate(shard, holder.item, tokens)


def _reference(s: Shard, item: int, tokens: int, keys: int) -> int:
    """Scores are stored three times (raw, masked, as weights) and dominate everything else."""
    c, a, t = s.config, s.attention, tokens
    # Per query head and token: the query as it meets a cached row, and what it reads.
    width, read = a.cache_width, a.dot_width - a.cache_width if isinstance(a, LatentHeads) else a.head_dim
    attention = item * t * (c.hidden_size + a.first_width + a.query_width + s.heads * read)
    attention += _FLOAT * (
        t * s.heads * (width + read) + keys * width * a.cache_rows + 3 * t * s.heads * keys
    )
    mlp = item * t * (3 * c.hidden_size + 3 * s.dense)
    routed = t * c.num_experts_per_tok if s.expert else 0
    one = min(t, routed)  # all tokens may select the same expert
    moe = item * t * (3 * c.hidden_size + 3 * s.shared) + _FLOAT * t * c.hidden_size
    moe += item * one * (2 * c.hidden_size + 3 * s.expert)
    return max(attention, mlp, moe)


def _cpu(s: Shard, holder: Holder, serving: Serving, threads: int) -> int:
    """Tensors passed between ops, and the workspace of the largest op."""
    workspace = workspace_bytes(s, holder, serving, threads)
    if workspace is None:
        return _estimate(s, holder.item, serving.max_num_batched_tokens)
    c, t = s.config, serving.max_num_batched_tokens
    a = s.attention
    own_query = a.query_width if isinstance(a, LatentHeads) and a.q_lora_rank else 0
    outputs = a.first_width + own_query + a.output_width
    # Of all layers in one call; experts that are added a layer later are held until then.
    held = _FLOAT * t * (outputs + (3 + c.shortcut_experts) * c.hidden_size)
    return held + workspace


def _estimate(s: Shard, item: int, tokens: int) -> int:
    """Hidden states twice, plus the widest tensor of a layer."""
    c = s.config
    a = s.attention
    attention = 2 * a.query_width + a.output_width + 2 * s.heads * a.cache_width
    routed = c.num_experts_per_tok * (c.hidden_size + 3 * s.expert) if s.expert else 0
    return item * tokens * (2 * c.hidden_size + max(attention, 3 * s.dense, routed))


def _groups(layout: Layout) -> int:
    return (layout.stage_ranks > 1) + (1 < layout.tp < layout.stage_ranks) + 2 * (layout.pp > 1)
