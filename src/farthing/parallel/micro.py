"""Micro-batches of a step, so that pipeline stages work in parallel."""

from __future__ import annotations

import itertools

from farthing.lazy import torch
from farthing.ops import Batch

MICRO_ROWS = 64  # smaller micro-batches are bound by reading weights, larger ones by arithmetic


def micro_batches(batch: Batch, most: int) -> list[tuple[slice, Batch]]:
    """Split into at most `most` runs of consecutive rows, each a batch of at least MICRO_ROWS.

    A run may end inside a sequence; the next run reads its keys from the cache.
    """
    tokens = len(batch.positions)
    count = max(1, min(most, tokens // MICRO_ROWS))
    if count == 1:
        return [(slice(0, tokens), batch)]
    edges = [tokens * i // count for i in range(count + 1)]
    return [(slice(a, b), rows_of(batch, a, b)) for a, b in itertools.pairwise(edges)]


def own_sequences(batch: Batch, copies: int, copy: int) -> tuple[torch.Tensor, Batch]:
    """(rows, batch) of the sequences assigned to one of `copies` groups of ranks.

    A sequence is assigned by its first block, which does not change while it runs. A group without sequences
    computes the first row and discards the result, because every group takes part in every layer.
    """
    starts = batch.query_start.tolist()
    lengths = batch.query_start[1:] - batch.query_start[:-1]
    held = (batch.block_table[:, 0] % copies == copy).nonzero()[:, 0]
    if not len(held):
        return torch.zeros(0, dtype=torch.int64), rows_of(batch, 0, 1)
    rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in held.tolist()])
    first = torch.zeros(1, dtype=torch.int32)
    return rows, Batch(
        positions=batch.positions[rows].contiguous(),
        slots=batch.slots[rows].contiguous(),
        query_start=torch.cat((first, lengths[held].cumsum(0).to(torch.int32))),
        context_lens=batch.context_lens[held].contiguous(),
        block_table=batch.block_table[held].contiguous(),
    )


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Rows [start, stop) of a batch, with their sequences."""
    starts = batch.query_start.clamp(start, stop)
    held = (starts[1:] > starts[:-1]).nonzero()[:, 0]
    ends = starts[1:][held].long()
    return Batch(
        positions=batch.positions[start:stop],
        slots=batch.slots[start:stop],
        query_start=torch.cat((starts[held[:1]], starts[1:][held])).sub(start).to(torch.int32),
        context_lens=batch.positions[ends - 1] + 1,
        block_table=batch.block_table[held].contiguous(),
    )
