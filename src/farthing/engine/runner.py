"""From a plan to tensors to hidden states.

Legend: T tokens of the step; B sequences; D hidden size. Index tensors are built with a handful of numpy
calls whatever the batch: at sixteen small layers Python would otherwise cost as much as the model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farthing.engine.sequence import Scheduled, Sequence
from farthing.model import DeepseekModel
from farthing.ops import Batch, LatentCache
from farthing.parallel.cluster import ParallelModel

_FEW = 16  # tokens up to which plain Python builds indices faster than numpy


@dataclass(frozen=True, slots=True)
class Step:
    """The tensors of one step and where its results stand."""

    ids: Tensor  # [T] int64
    batch: Batch
    starts: list[int]  # first row of each sequence, and T at the end
    sampled: Tensor | None  # [n] int64 rows to sample, None: all T


class Runner:
    """Owns the cache and a table of every running sequence's blocks."""

    def __init__(
        self, model: DeepseekModel | ParallelModel, cache: LatentCache, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.block_size = cache.block_size
        self.device = model.ops.device
        max_blocks = -(-max_model_len // self.block_size)
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        config = model.config
        shape = (model.cache_layers, config.n_routed_experts or 0)
        self.counts = (
            torch.zeros(shape, dtype=torch.int64, device=self.device) if config.n_routed_experts else None
        )

    def prepare(self, plan: Seq[Scheduled]) -> Step:
        """Index tensors of a plan."""
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
        return Step(self._tensor(np.array(ids, dtype=np.int64)), batch, starts, rows)

    def span(self, seqs: Seq[Sequence], firsts: Seq[int], counts: Seq[int] | None = None) -> Batch:
        """A batch of counts[i] (None: one) tokens of seqs[i] from position firsts[i] on (for drafting)."""
        counts = counts or [1] * len(seqs)
        return self._batch(seqs, np.array(firsts, dtype=np.int32), counts, [0, *accumulate(counts)])

    def forward(self, step: Step) -> Tensor:
        """Hidden states [T, D] before the final norm."""
        return self.model.forward(step.ids, step.batch, self.cache, self.counts)

    def capacity(self, seq: Sequence) -> int:
        """Positions that the sequence may write to now."""
        return min(len(seq.blocks) * self.block_size, seq.max_len)

    def tensor(self, values: Seq[int]) -> Tensor:
        """int64 on the model's device."""
        return self._tensor(np.array(values, dtype=np.int64))

    def _batch(
        self, seqs: Seq[Sequence], firsts: NDArray[np.int32], counts: Seq[int], starts: list[int]
    ) -> Batch:
        for seq in seqs:
            filled, blocks = seq.row_filled, seq.blocks
            if filled < len(blocks):
                self._table[seq.row, filled : len(blocks)] = blocks[filled:]
                seq.row_filled = len(blocks)
        rows = np.array([seq.row for seq in seqs], dtype=np.int64)
        query_start = np.array(starts, dtype=np.int32)
        lens = firsts + np.array(counts, dtype=np.int32)
        positions, slots = self._places(seqs, rows, firsts, counts, query_start)
        used = -(-int(lens.max()) // self.block_size)
        return Batch(
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_start=self._tensor(query_start),
            context_lens=self._tensor(lens),
            block_table=self._tensor(self._table[:, :used].take(rows, axis=0)),
        )

    def _places(
        self,
        seqs: Seq[Sequence],
        rows: NDArray[np.int64],
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
        blocks = self._table[np.repeat(rows, counts), positions // size].astype(np.int64)
        return positions, blocks * size + positions % size

    def _tensor(self, array: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
