"""Builds index tensors from a schedule and computes hidden states.

Legend: T tokens of the step; B sequences; D hidden size. Index tensors are built with a fixed number of
numpy calls per step; with sixteen small layers Python would otherwise cost as much as the model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from farthing.engine.model import Layered, Model
from farthing.engine.sequence import S, Scheduled, Sequence
from farthing.ops import Batch, LatentCache

if TYPE_CHECKING:
    from torch import Tensor

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
        max_blocks = -(-max_model_len // self.block_size)
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
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
        if grown:
            table = self._blocks(last.seqs, max(last.starts) + 1)
            last.step = replace(last.step, batch=replace(last.step.batch, block_table=table))
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
        return self._layered.run_layers(hidden, step.batch, self.cache, self.counts, slice(first, last))

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
        return Batch(
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_start=self._tensor(query_start),
            context_lens=self._tensor(lens),
            block_table=table,
        )

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
