"""Sparse attention expressed as dense attention to a short sequence of the selected positions.

A token that attends to k selected positions reads k rows of the cache. For a paged-attention kernel this is a
separate sequence of k tokens in blocks of one token, whose block table lists the selected slots. So every
backend gathers with its existing kernel and needs no mask.

Legend: T tokens of the step; K maximum positions per token; L cache layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from farthing.lazy import torch
from farthing.ops.api import Batch, LatentCache

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """Cache rows read by a step: token t, as sequence t, reads slots[t, :counts[t]]."""

    counts: Tensor  # [T] int32; 0: the token attends to nothing
    slots: Tensor  # [T, K] int32, arbitrary after a token's last one
    starts: Tensor  # [T + 1] int32: 0 … T, as `Batch.query_start`


def chosen(select: Tensor, batch: Batch, block_size: int) -> Chosen:
    """select [T, K] int32: each token's positions in ascending order, then -1."""
    tokens = select.shape[0]
    device = select.device
    sequence = sequences_of(batch)
    counts = (select >= 0).sum(-1, dtype=torch.int32)
    at = select.clamp_min(0).long()
    blocks = batch.block_table[sequence.unsqueeze(1), at // block_size]
    slots = blocks * block_size + (at % block_size).to(torch.int32)
    return Chosen(counts, slots, torch.arange(tokens + 1, dtype=torch.int32, device=device))


def sequences_of(batch: Batch) -> Tensor:
    """[T] int64: the sequence of each token."""
    lengths = batch.query_start.long().diff()
    order = torch.arange(len(lengths), device=lengths.device)
    return order.repeat_interleave(lengths, output_size=batch.positions.shape[0])


def in_rows(cache: LatentCache) -> LatentCache:
    """A view of the cache in blocks of one token."""
    layers, blocks, size, width = cache.data.shape
    scale = None if cache.scale is None else cache.scale.view(layers, blocks * size, 1, 2)
    return LatentCache(cache.data.view(layers, blocks * size, 1, width), scale)
