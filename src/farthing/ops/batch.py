"""Index tensors of one step from plain integers."""

from __future__ import annotations

from collections.abc import Sequence

from farthing.lazy import np, torch
from farthing.ops.api import Batch


def make_batch(
    num_new: Sequence[int], num_cached: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int
) -> Batch:
    """The batch that appends num_new[b] >= 1 tokens to sequence b with num_cached[b] cached tokens.

    block_tables[b] lists the blocks of sequence b in order and must reach its last new token.
    """
    new = np.asarray(num_new, np.int64)
    cached = np.asarray(num_cached, np.int64)
    start = np.zeros(len(new) + 1, np.int64)
    np.cumsum(new, out=start[1:])
    width = max(len(table) for table in block_tables)
    table = np.zeros((len(new), width), np.int64)
    for b, blocks in enumerate(block_tables):
        table[b, : len(blocks)] = blocks
    sequence = np.repeat(np.arange(len(new)), new)
    positions = np.arange(start[-1]) - start[sequence] + cached[sequence]
    slots = table[sequence, positions // block_size] * block_size + positions % block_size
    return Batch(
        positions=torch.from_numpy(positions.astype(np.int32)),
        slots=torch.from_numpy(slots),
        query_start=torch.from_numpy(start.astype(np.int32)),
        context_lens=torch.from_numpy((new + cached).astype(np.int32)),
        block_table=torch.from_numpy(table.astype(np.int32)),
    )
