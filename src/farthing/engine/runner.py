"""Runs a model: cache and budgets sized to memory, index tensors from a schedule, hidden states from a step.

Legend: T tokens of the step; B sequences; D hidden size. Index tensors are built with a fixed number of
numpy calls per step; with sixteen small layers Python would otherwise cost as much as the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sized
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from farthing.config import CPU_STEP_TOKENS, GPU_STEP_TOKENS, EngineConfig, check_length, parse_speculate
from farthing.engine.sequence import S, Scheduled, Sequence
from farthing.lazy import torch
from farthing.memory import available_memory, gigabytes
from farthing.model import CacheSizes, ModelConfig, Sizing, cache_kinds
from farthing.ops.api import ALL, Batch, Blocks, CacheDtype, LatentCache, Ops

if TYPE_CHECKING:
    from torch import Tensor


class Layered(Protocol):
    """A model whose layers can be computed a few at a time.

    Legend: T tokens of a step; D hidden size; V vocabulary; L cache layers; E routed experts.
    """

    config: ModelConfig

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> the first layer's input [T, D]."""

    def run_layers(
        self, h: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None, span: slice = ALL
    ) -> Tensor:
        """The layers `span`: h [T, D] -> [T, D]."""


class Model(Protocol):
    """A language model over a paged latent cache."""

    config: ModelConfig
    ops: Ops

    @property
    def mtp(self) -> Sized:
        """The multi-token prediction layers; empty: the model cannot draft."""

    @property
    def layered(self) -> Layered | None:
        """The same model by layers; None if it computes all of them in one go."""

    @property
    def cache_layers(self) -> int:
        """Number of layers that write to the cache, MTP layers included."""

    def new_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        dtype: CacheDtype = "bfloat16",
        windows: Mapping[int, int] | None = None,
        slots: int | None = None,
    ) -> LatentCache:
        """An empty cache. windows: blocks of layers with a window, by its size; slots: of recurrent layers;
        None: as many as num_blocks."""

    def copy_states(self, cache: LatentCache, pairs: list[tuple[int, int]]) -> None:
        """Copy recurrent states: (source, target) slots. Every source is read before a target is written."""

    def forward(self, ids: Tensor, batch: Batch, cache: LatentCache, counts: Tensor | None = None) -> Tensor:
        """ids [T] int64 -> hidden [T, D] before the final norm; adds tokens per expert to counts [L, E]."""

    def first_not_finite(self, ids: Tensor, batch: Batch, cache: LatentCache) -> str | None:
        """The first part of the model whose output has a NaN or an infinity; None: unknown."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] -> logits [n, V] float32."""

    def normed(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] -> [n, D] after the final norm, which the head reads."""

    def top_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [n, D] -> (values [n, k], ids [n, k], logsumexp [n])."""

    def greedy(self, hidden: Tensor) -> list[int]:
        """hidden [n, D] -> the most likely next token per row."""

    def draft(
        self,
        next_ids: Tensor,
        hidden: Tensor,
        batch: Batch,
        cache: LatentCache,
        step: int = 0,
        counts: Tensor | None = None,
    ) -> Tensor:
        """One MTP step: next_ids [T] follow the tokens of `batch`, whose hidden [T, D] is given -> [T, D]."""

    def draft_logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """`logits` of an MTP step's output."""

    def draft_top_logits(self, hidden: Tensor, k: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """`top_logits` of an MTP step's output."""

    def failure(self) -> str | None:
        """Why the model cannot compute any more; None while it can."""

    def close(self) -> None:
        """Release processes that compute parts of the model."""


# Fill in unset options of the configuration: cache size, lengths, budgets.

log = logging.getLogger(__name__)

_CPU_SHARE, _GPU_SHARE = 0.25, 0.85  # of the memory that is free after loading the model


def _length(config: EngineConfig, model: ModelConfig) -> int:
    """max_model_len, by default the model's. Raises ValueError if it is more than that."""
    limit = model.max_position_embeddings
    check_length(config.max_model_len, limit)
    return limit if config.max_model_len is None else config.max_model_len


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the cache, besides `num_blocks`."""

    dtype: CacheDtype
    windows: dict[int, int]  # blocks of layers with a window, by its size
    slots: int  # of recurrent states; 0: the model has none


def resolve(config: EngineConfig, model: Model) -> tuple[EngineConfig, Sizes]:
    """The configuration with every None filled in, and the sizes of the cache that it does not name.

    Raises ValueError where the cache cannot hold max_model_len.
    """
    device = model.ops.device
    if config.block_size % (multiple := model.config.block_tokens):
        rounded = -(-config.block_size // multiple) * multiple
        log.info("blocks have %d tokens, a multiple of this model's %d", rounded, multiple)
        config = replace(config, block_size=rounded)
    dtype = cache_dtype(config, model)
    limit, length = model.config.max_position_embeddings, _length(config, model.config)
    most = CPU_STEP_TOKENS if device.type == "cpu" else GPU_STEP_TOKENS
    budget = config.max_num_batched_tokens or max(config.max_num_seqs, most)
    if budget < config.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens: got {budget}; expected at least max_num_seqs = {config.max_num_seqs}"
        )
    parsed = parse_speculate(config.speculate)
    kinds = cache_kinds(model.config, config.tensor_parallel_size)
    sizing = Sizing(kinds, dtype, config.block_size, budget, 0 if parsed is None else parsed[1])
    config, blocks, sizes = _divide(config, model, sizing, length)
    for kind in kinds[1:]:
        count = sizes.slots if kind.window is None else sizes.windows[kind.window]
        what = f"{count} slots" if kind.state else f"{count} blocks"
        log.info("cache of %d layers with a %s: %s", len(kind.layers), kind.name, what)
    if config.check_memory and device.type == "cpu":
        _check_fits(sizing.used(blocks, sizes) * _copies(config))
    capacity = blocks * config.block_size
    if capacity < length and config.max_model_len is not None:
        raise ValueError(
            f"max_model_len: got {length}, but the KV cache fits {capacity} tokens; expected a smaller "
            f"max_model_len, a larger num_blocks or kv_cache_memory, or a smaller kv_cache_dtype"
        )
    if capacity < length:
        log.warning(
            "KV cache fits %d tokens; lowering max_model_len to %d (model: %d)", capacity, capacity, limit
        )
    resolved = replace(
        config, max_model_len=min(length, capacity), num_blocks=blocks, max_num_batched_tokens=budget
    )
    return resolved, Sizes(dtype, sizes.windows, sizes.slots)


def cache_dtype(config: EngineConfig, model: Model) -> CacheDtype:
    """The cache's dtype; 'auto' is the backend's choice."""
    return model.ops.cache_dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype


def _copies(config: EngineConfig) -> int:
    """Every rank of a stage has its own cache of the stage's layers."""
    return max(config.tensor_parallel_size, config.expert_parallel_size)


def _divide(
    config: EngineConfig, model: Model, sizing: Sizing, length: int
) -> tuple[EngineConfig, int, CacheSizes]:
    """The configuration with as many sequences as fit, the blocks, and the other sizes.

    What running sequences need of windows and states comes first, within a quarter of the memory.
    """
    size, sequences = config.block_size, config.max_num_seqs
    if config.num_blocks is not None:
        kept = sizing.checkpoints(sequences, config.num_blocks)
        return config, config.num_blocks, sizing.sizes(sequences, kept)
    memory = _limit(config, model) // _copies(config)
    while sequences > 1 and sizing.used(0, sizing.sizes(sequences, 0)) > memory // 4:
        sequences -= 1
    if sequences < config.max_num_seqs:
        log.warning(
            "windows and states of %d sequences exceed a quarter of the cache's %s; lowering "
            "max_num_seqs to %d",
            *(config.max_num_seqs, gigabytes(memory), sequences),
        )
        config = replace(config, max_num_seqs=sequences)
    fixed = sizing.used(0, sizing.sizes(sequences, 0))
    kept = sizing.checkpoints_in(sequences, max(0, memory - fixed))
    sizes = sizing.sizes(sequences, kept)
    used, most = sizing.used(0, sizes), sequences * -(-length // size)
    block = sizing.used(1, sizes) - used
    blocks = (memory - used) // block if block else most
    if config.kv_cache_memory is None:
        blocks = max(1, min(most, blocks))
        sizes = sizing.sizes(sequences, min(kept, sizing.checkpoints(sequences, blocks)))
    elif memory - used < block:
        raise ValueError(
            f"kv_cache_memory: got {config.kv_cache_memory} bytes; expected at least one block, "
            f"{(used + block) * _copies(config)} bytes"
        )
    return config, blocks, sizes


def _limit(config: EngineConfig, model: Model) -> int:
    """Bytes of the cache on all ranks."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if model.ops.device.type == "cpu":
        return int(available_memory() * _CPU_SHARE)
    return int(torch.cuda.mem_get_info(model.ops.device)[0] * _GPU_SHARE)


def _windows_of(config: ModelConfig) -> list[int]:
    """The sizes of windows, in the order of kinds."""
    return [kind.window for kind in cache_kinds(config) if kind.window is not None]


def _check_fits(cache: int) -> None:
    if cache > (free := available_memory()):
        raise ValueError(
            f"kv_cache_memory, num_blocks: got a cache of {gigabytes(cache)}; expected at most the "
            f"{gigabytes(free)} that are available, or check_memory False"
        )


_FEW = 16  # up to this many tokens plain Python builds indices faster than numpy


@dataclass(frozen=True, slots=True)
class Step:
    """The tensors of one step and the rows of its results."""

    ids: Tensor  # [T] int64
    batch: Batch
    starts: list[int]  # first row of each sequence, and T at the end
    sampled: Tensor | None  # [n] int64 rows to sample, None: all T


@dataclass(slots=True)
class _Decoding:
    """A step that decoded one token per sequence, with the arrays that its tensors share."""

    seqs: list[Sequence]
    starts: list[int]  # position of each one's token
    ids: NDArray[np.int64]
    positions: NDArray[np.int32]
    slots: NDArray[np.int64]
    lens: NDArray[np.int32]
    step: Step
    window_slots: list[NDArray[np.int64]]


class Runner:
    """Owns the cache and the block table of running sequences.

    A step's tensors hold until the next one is prepared.
    """

    def __init__(self, model: Model, cache: LatentCache, max_num_seqs: int, max_model_len: int) -> None:
        self.model = model
        self.cache = cache
        self.block_size = cache.block_size
        self.device = model.ops.device
        self._tensor = model.ops.tensor
        shape = max_num_seqs, -(-max_model_len // self.block_size)
        self._table = np.zeros(shape, dtype=np.int32)
        self._windows = {size: np.zeros(shape, dtype=np.int32) for size in _windows_of(model.config)}
        self._states = any(kind.state for kind in cache_kinds(model.config))
        self._continues = any(m.states for m in model.config.mixers) and model.ops.continues_states
        self._decoding: _Decoding | None = None
        config = model.config
        shape = (model.cache_layers, config.router_size)
        self.counts = self._tensor(np.zeros(shape, np.int64)) if config.n_routed_experts else None

    def prepare(self, plan: Seq[Scheduled[S]]) -> Step:
        """Index tensors of a plan."""
        if (step := self._next(plan)) is not None:
            return step
        counts = [item.num_tokens for item in plan]
        ids: list[int] = []
        sampled: list[int] = []
        starts = [0]
        for item, count in zip(plan, counts, strict=True):
            tokens = item.seq.tokens
            if item.count == 1:
                ids.append(tokens[item.start])
            else:
                ids += tokens[item.start : item.start + item.count]
            ids += item.drafts
            end = starts[-1] + count
            if item.sample:
                sampled.extend(range(end - 1 - len(item.drafts), end))
            starts.append(end)
        firsts = np.array([item.start for item in plan], dtype=np.int32)
        batch = self._batch([item.seq for item in plan], firsts, counts, starts)
        rows = None if len(sampled) == len(ids) else self._tensor(np.array(sampled, dtype=np.int64))
        numbers = np.array(ids, dtype=np.int64)
        step = Step(self._tensor(numbers), batch, starts, rows)
        self._decoding = None
        if self.device.type == "cpu" and rows is None and len(ids) == len(plan):
            self._decoding = _Decoding(
                [item.seq for item in plan], firsts.tolist(), numbers, np.asarray(batch.positions),
                np.asarray(batch.slots), np.asarray(batch.context_lens), step,
                [np.asarray(own.slots) for own in batch.windows.values()],
            )  # fmt: skip
        return step

    def _next(self, plan: Seq[Scheduled[S]]) -> Step | None:
        """The previous step advanced by one token if the same sequences decode again: a third of the work.

        None where the plan is another one.
        """
        last, size = self._decoding, self.block_size
        if last is None or len(plan) != len(last.seqs):
            return None
        ids: list[int] = []
        slots: list[int] = []
        grown, width = False, last.step.batch.block_table.shape[1]
        for item, seq, start in zip(plan, last.seqs, last.starts, strict=True):
            p = item.start
            if item.seq is not seq or p != start + 1 or item.count != 1 or item.drafts or not item.sample:
                return None
            ids.append(seq.tokens[p])
            slots.append(seq.blocks[p // size] * size + p % size)
            grown = grown or p // size >= width or seq.row_filled < len(seq.blocks)
        last.starts = [p + 1 for p in last.starts]
        last.ids[:] = ids
        last.slots[:] = slots
        last.positions += 1
        last.lens += 1
        for k, own in enumerate(last.window_slots):
            own[:] = [
                seq.held[k].blocks[p // size] * size + p % size
                for seq, p in zip(last.seqs, last.starts, strict=True)
            ]
            grown = grown or any(seq.held[k].filled < len(seq.held[k].blocks) for seq in last.seqs)
        if grown:
            longest, batch = max(last.starts) + 1, last.step.batch
            windows = {
                size: replace(own, block_table=self._window_blocks(k, table, last.seqs, longest))
                for k, ((size, table), own) in enumerate(
                    zip(self._windows.items(), batch.windows.values(), strict=True)
                )
            }
            table = self._blocks(last.seqs, longest)
            last.step = replace(last.step, batch=replace(batch, block_table=table, windows=windows))
        return last.step

    def span(self, seqs: Seq[Sequence], firsts: Seq[int], counts: Seq[int] | None = None) -> Batch:
        """A batch of counts[i] (None: one) tokens of seqs[i] from position firsts[i] on (for drafting)."""
        counts = counts or [1] * len(seqs)
        return self._batch(seqs, np.array(firsts, dtype=np.int32), counts, [0, *accumulate(counts)])

    def forward(self, step: Step) -> Tensor:
        """Hidden states [T, D] before the final norm."""
        return self.model.forward(step.ids, step.batch, self.cache, self.counts)

    def begin(self, step: Step) -> Tensor:
        """The first layer's input [T, D], for `advance`."""
        return self._layered.embed(step.ids)

    def advance(self, step: Step, hidden: Tensor, first: int, last: int) -> Tensor:
        """The layers first .. last - 1 of `forward`: [T, D] -> [T, D]."""
        batch = replace(step.batch, ids=step.ids)
        return self._layered.run_layers(hidden, batch, self.cache, self.counts, slice(first, last))

    @property
    def _layered(self) -> Layered:
        layered = self.model.layered
        assert layered is not None, "the model computes all layers in one go"
        return layered

    def first_not_finite(self, step: Step) -> str:
        """The first layer with a non-finite output, as a suffix for an error; recomputes the step."""
        where = self.model.first_not_finite(step.ids, step.batch, self.cache)
        return "" if where is None else f"; the first output that is not finite is that of {where}"

    def capacity(self, seq: Sequence) -> int:
        """Number of positions that the sequence's blocks can hold."""
        return min(len(seq.blocks) * self.block_size, seq.max_len)

    def tensor(self, values: Seq[int]) -> Tensor:
        """int64 on the model's device."""
        return self._tensor(np.array(values, dtype=np.int64))

    def _batch(
        self, seqs: Seq[Sequence], firsts: NDArray[np.int32], counts: Seq[int], starts: list[int]
    ) -> Batch:
        query_start = np.array(starts, dtype=np.int32)
        lens = firsts + np.array(counts, dtype=np.int32)
        table = self._blocks(seqs, int(lens.max()))
        positions, slots = self._places(seqs, firsts, counts, query_start)
        windows = {
            size: self._window(k, own, seqs, counts, positions, int(lens.max()))
            for k, (size, own) in enumerate(self._windows.items())
        }
        states = sources = None
        if self._states:
            states = self._tensor(np.array([seq.slot for seq in seqs], np.int32))
            before = [(seq.backup, seq.slot) for seq in seqs if seq.backup >= 0]
            if before and self._continues:
                kept = [seq.slot if seq.backup < 0 else seq.backup for seq in seqs]
                sources = self._tensor(np.array(kept, np.int32))
            elif before:
                self.copy_states(before)
        return Batch(
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_start=self._tensor(query_start),
            context_lens=self._tensor(lens),
            block_table=table,
            state_slots=states,
            state_sources=sources,
            windows=windows,
        )

    def copy_states(self, pairs: list[tuple[int, int]]) -> None:
        """Copy recurrent states: (source, target) slots."""
        self.model.copy_states(self.cache, pairs)

    def _window(
        self,
        k: int,
        table: NDArray[np.int32],
        seqs: Seq[Sequence],
        counts: Seq[int],
        positions: NDArray[np.int32],
        longest: int,
    ) -> Blocks:
        """The blocks of the k-th window, and every token's slot in them."""
        blocks = self._window_blocks(k, table, seqs, longest)
        rows = np.repeat(np.array([seq.row for seq in seqs], dtype=np.int64), counts)
        size = self.block_size
        slots = table[rows, positions // size].astype(np.int64) * size + positions % size
        return Blocks(self._tensor(slots), blocks)

    def _window_blocks(self, k: int, table: NDArray[np.int32], seqs: Seq[Sequence], longest: int) -> Tensor:
        """Like `_blocks`, of the k-th window."""
        for seq in seqs:
            held = seq.held[k]
            if held.filled < len(held.blocks):
                table[seq.row, held.filled : len(held.blocks)] = held.blocks[held.filled :]
                held.filled = len(held.blocks)
        rows = np.array([seq.row for seq in seqs], dtype=np.int64)
        return self._tensor(table[:, : -(-longest // self.block_size)].take(rows, axis=0))

    def _blocks(self, seqs: Seq[Sequence], longest: int) -> Tensor:
        """The block table of `seqs`, wide enough for `longest` positions."""
        for seq in seqs:
            filled, blocks = seq.row_filled, seq.blocks
            if filled < len(blocks):
                self._table[seq.row, filled : len(blocks)] = blocks[filled:]
                seq.row_filled = len(blocks)
        rows = np.array([seq.row for seq in seqs], dtype=np.int64)
        return self._tensor(self._table[:, : -(-longest // self.block_size)].take(rows, axis=0))

    def _places(
        self,
        seqs: Seq[Sequence],
        firsts: NDArray[np.int32],
        counts: Seq[int],
        query_start: NDArray[np.int32],
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Position and cache slot of every token."""
        size, total = self.block_size, int(query_start[-1])
        if total <= _FEW:
            place = [
                (p, seq.blocks[p // size] * size + p % size)
                for seq, first, count in zip(seqs, firsts.tolist(), counts, strict=True)
                for p in range(first, first + count)
            ]
            where = [slot for _, slot in place]
            return np.array([p for p, _ in place], dtype=np.int32), np.array(where, dtype=np.int64)
        positions = np.repeat(firsts - query_start[:-1], counts) + np.arange(total, dtype=np.int32)
        rows = np.array([seq.row for seq in seqs], dtype=np.int64)
        blocks = self._table[np.repeat(rows, counts), positions // size].astype(np.int64)
        return positions, blocks * size + positions % size
