"""A rank's memory besides weights and cache: tables, shared-memory slots, buffers of its largest step.

Buffers follow what the backends allocate for T tokens at the end of a sequence of max_model_len:
`farthing.ops.reference`, and native/layers.cpp, mla.cpp, moe.cpp and linear.cpp. Only the largest op counts,
because ops reuse the same memory one after another. For the GPU the figures are an estimate.

Legend: T tokens of a step; S tokens of a sequence; D hidden size; H heads of this rank; I intermediate size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from farthing.model.config import ModelConfig
from farthing.ops.cutting import bounds
from farthing.parallel.plan import Layout, Place, ShardPlan
from farthing.parallel.shared import SLOT_BYTES
from farthing.planner.footprint import Holder, Stored

_FLOAT = 4
_TILE_ROWS, _TILE_COLUMNS, _PAIR = 256, 32, 32  # kRowBlock, columns of a sum, kPairColumns
_KEYS, _UNIT = 64, 16  # kKeyBlock, kRows
_UNEVEN = 1.125  # rows of routed experts on a rank relative to an even share; an estimate


@dataclass(frozen=True, slots=True)
class Serving:
    """The load a replica is sized for."""

    cache_tokens: int
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    cache_dtype: str = "bfloat16"
    block_size: int = 16
    redundant_experts: int = 0
    threads: int | None = None  # threads per rank; None: its share of this machine's cores
    experts_on_host: bool = False
    hot_experts: int = 0  # experts per layer cached on the device


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Model sizes of one rank."""

    config: ModelConfig
    heads: int
    dense: int  # I of the dense layers on this rank; 0 if there are none
    expert: int
    shared: int
    stored: Stored  # storage of the projections
    expert_ranks: int  # ranks that share the rows of routed experts

    @property
    def query(self) -> int:
        """Columns of the query."""
        return self.heads * self.config.qk_head_dim

    @property
    def first(self) -> int:
        """Columns of the product that computes the query (or its latent) and the key-value latent."""
        return (self.config.q_lora_rank or self.query) + self.config.cache_width


def buffers(plan: ShardPlan, place: Place, holder: Holder, serving: Serving, stored: Stored) -> int:
    """Bytes of a rank. stored: storage of the layers' projections."""
    c, layout = plan.config, plan.layout
    rope = _FLOAT * c.max_position_embeddings * c.qk_rope_head_dim
    table = 4 * serving.max_num_seqs * -(-serving.max_model_len // serving.block_size)
    slots = 2 * SLOT_BYTES * _groups(layout) if layout.world > 1 and holder.backend != "gpu" else 0
    return rope + table * (place.rank == layout.driver) + slots + step(plan, place, holder, serving, stored)


def step(plan: ShardPlan, place: Place, holder: Holder, serving: Serving, stored: Stored) -> int:
    """Bytes of buffers in a full step."""
    c, layout = plan.config, plan.layout
    layers = plan.stages[place.stage]
    start, stop = bounds(c.intermediate_size, layout.tp, place.tp)
    cut = layout.tp if layout.ep == 1 else 1
    sizes = _Sizes(
        c,
        c.num_attention_heads // layout.tp,
        stop - start if c.shortcut_experts or any(not c.is_moe(i) for i in layers) else 0,
        c.moe_intermediate_size // cut if any(c.is_moe(i) for i in layers) else 0,
        c.shared_size // layout.tp,
        stored,
        layout.ep,
    )
    tokens = serving.max_num_batched_tokens
    if holder.backend == "reference":
        return _reference(sizes, holder.item, tokens, max(serving.max_model_len, tokens))
    if holder.backend == "cpu":
        threads = serving.threads or max(1, len(os.sched_getaffinity(0)) // layout.world)
        return _native(sizes, holder, tokens, threads)
    return _estimate(sizes, holder.item, tokens)


def _reference(s: _Sizes, item: int, tokens: int, keys: int) -> int:
    """Scores are stored three times (raw, masked, as weights) and dominate everything else."""
    c, t = s.config, tokens
    width = c.cache_width
    attention = item * t * (c.hidden_size + s.first + s.query + s.heads * c.kv_lora_rank)
    attention += _FLOAT * (t * s.heads * (width + c.kv_lora_rank) + keys * width + 3 * t * s.heads * keys)
    mlp = item * t * (3 * c.hidden_size + 3 * s.dense)
    routed = t * c.num_experts_per_tok if s.expert else 0
    one = min(t, routed)  # all tokens may select the same expert
    moe = item * t * (3 * c.hidden_size + 3 * s.shared) + _FLOAT * t * c.hidden_size
    moe += item * one * (2 * c.hidden_size + 3 * s.expert)
    return max(attention, mlp, moe)


def _native(s: _Sizes, holder: Holder, tokens: int, threads: int) -> int:
    """Tensors passed between ops, and the workspace pages that any op writes to."""
    c, t = s.config, tokens
    outputs = s.first + (s.query if c.q_lora_rank else 0) + s.heads * c.v_head_dim
    # Of all layers in one call; experts that are added a layer later are held until then.
    held = _FLOAT * t * (outputs + (3 + c.shortcut_experts) * c.hidden_size)
    space = _Workspace()
    for k in (c.hidden_size, c.q_lora_rank, s.heads * c.v_head_dim):
        if k:
            space.op([*_act(holder, s.stored, k, t), 4 * threads * (_stride(k) + _TILE_ROWS * _PAIR)])
    space.op(_attention(s, holder, t, threads))
    if s.dense:
        space.op(_experts(s, holder, t, threads, 0, s.dense))
    if s.expert:
        space.op(_experts(s, holder, t, threads, c.num_experts_per_tok, s.shared))
    return held + space.touched


class _Workspace:
    """Grow-only scratch memory, as in native/linear.cpp: an op fills chunks in order, and a piece that does
    not fit in the rest of a chunk goes to the next one."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, int]] = []  # (size, bytes ever written to)

    @property
    def touched(self) -> int:
        """Resident bytes."""
        return sum(written for _, written in self._chunks)

    def op(self, takes: list[int]) -> None:
        """Run one op that allocates these pieces."""
        at = used = 0
        for nbytes in takes:
            nbytes = _up(nbytes, 64) + 64
            while at < len(self._chunks) and used + nbytes > self._chunks[at][0]:
                at, used = at + 1, 0
            if at == len(self._chunks):
                self._chunks.append((max(nbytes, 8 << 20), 0))
            used += nbytes
            size, written = self._chunks[at]
            self._chunks[at] = (size, max(written, used))


def _attention(s: _Sizes, holder: Holder, t: int, threads: int) -> list[int]:
    """Pieces of mla: inputs of both products, queries, partial sums of units, keys of a thread's block."""
    c = s.config
    latent = _up(c.kv_lora_rank, 32)
    width, rows = latent + _up(c.qk_rope_head_dim, 32), t * s.heads
    held = Stored("int8") if holder.quantization or not s.stored.is_float else s.stored
    units = -(-t // max(1, _UNIT // s.heads)) * -(-s.heads // _UNIT) * _UNIT  # rows, 16 per unit
    return [
        *_act(holder, held, c.qk_nope_head_dim, rows),
        *_act(holder, held, c.kv_lora_rank, rows),
        _FLOAT * rows * width,
        *(_FLOAT * units, _FLOAT * units, _FLOAT * units * latent),
        threads * (6 * _KEYS + 2 * (2 * _UNIT + 4)) * width,
        _FLOAT * threads * (max(c.kv_lora_rank, c.qk_nope_head_dim) + 64 * t),
    ]


def _experts(s: _Sizes, holder: Holder, t: int, threads: int, chosen: int, other: int) -> list[int]:
    """Pieces of moe: `chosen` experts per token, and `other` columns of a shared expert or dense MLP."""
    c, rows = s.config, t * chosen
    if s.expert_ranks > 1:
        rows = int(rows * _UNEVEN / s.expert_ranks)
    takes = [_FLOAT * t * _stride(c.hidden_size)]
    if chosen:
        takes += [_FLOAT * t * _up(c.router_size, 16), 2 * _FLOAT * rows]
        takes += _act(holder, s.stored, c.hidden_size, t) + _act(holder, s.stored, c.hidden_size, rows)
        takes += _act(holder, s.stored, s.expert, rows)
    if other:
        takes += _act(holder, s.stored, c.hidden_size, t) + _act(holder, s.stored, other, t)
    tile = max(_TILE_ROWS * _PAIR, max(rows, t) * _TILE_COLUMNS)
    sums = (2 if chosen else 1) * t * _TILE_COLUMNS
    return [*takes, _FLOAT * threads * tile, _FLOAT * threads * (_TILE_ROWS * 128 + sums)]


def _act(holder: Holder, stored: Stored, k: int, rows: int) -> list[int]:
    """The input [rows, k] of a product in its kernel's format: int8, scales and sums, or float32."""
    held = holder.rounded(stored, k, mlp=True)  # an upper bound: 8-bit inputs have fewer groups
    if held.kind not in ("int8", "int4"):
        return [_FLOAT * rows * _stride(k)]
    groups = -(-k // (held.group if held.kind == "int4" else 128))
    return [rows * _stride(k), _FLOAT * rows * groups, _FLOAT * rows * groups]


def _stride(k: int) -> int:
    return _up(k, 64) + 64


def _estimate(s: _Sizes, item: int, tokens: int) -> int:
    """Hidden states twice, plus the widest tensor of a layer."""
    c = s.config
    attention = s.heads * (2 * c.qk_head_dim + c.v_head_dim + 2 * c.cache_width)
    routed = c.num_experts_per_tok * (c.hidden_size + 3 * s.expert) if s.expert else 0
    return item * tokens * (2 * c.hidden_size + max(attention, 3 * s.dense, routed))


def _groups(layout: Layout) -> int:
    return (layout.stage_ranks > 1) + (1 < layout.tp < layout.stage_ranks) + 2 * (layout.pp > 1)


def _up(x: int, to: int) -> int:
    return -(-x // to) * to
