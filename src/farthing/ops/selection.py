"""Which cached tokens a step reads: all, a window of them, or selected ones.

Sparse attention is expressed as dense attention to a short sequence of the selected positions.
A token that attends to k selected positions reads k rows of the cache. For a paged-attention kernel this is a
separate sequence of k tokens in blocks of one token, whose block table lists the selected slots. So every
backend gathers with its existing kernel and needs no mask.

Legend: T tokens of the step; K maximum positions per token; L cache layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
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


def pieces(start: int, stop: int, position: int, window: int | None) -> Iterator[tuple[slice, range]]:
    """Tokens start … stop of one sequence, the first at `position`, in runs, each with the positions that it
    attends to: one run, or as many as keep those close to a window."""
    step = stop - start if window is None else max(window, _LEAST_RUN)
    for at in range(start, stop, step):
        end, first = min(stop, at + step), 0
        if window is not None:
            first = max(0, position + at - start - window + 1)
        yield slice(at, end), range(first, position + end - start)


_LEAST_RUN = 64  # tokens that attend in one call


def visible(at: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Whether tokens at `positions` attend to cached tokens `at`, which broadcast."""
    seen = at <= positions
    return seen if window is None else seen & (at > positions - window)


@dataclass(frozen=True, slots=True)
class Span:
    """Sequences that attend together: tokens start … stop, one per sequence, or all of one sequence."""

    start: int
    stop: int
    slots: Tensor  # [B, S] int64, cache rows
    # [B, t, S] bool, rows a token attends to; None: those up to its own, and t is 1 or S
    seen: Tensor | None


def spans(batch: Batch, block_size: int, window: int | None = None) -> list[Span]:
    """The batch's sequences; adjacent ones with a single token attend together.

    window: what a token attends to at most; then sequences with several tokens are divided.
    """
    starts, lens = batch.query_start.tolist(), batch.context_lens.tolist()
    offset = torch.arange(max(lens), device=batch.positions.device)
    table = batch.block_table.long()
    if window is not None and window < max(lens):
        return _windowed(batch, block_size, window, offset)

    def span(first: int, last: int) -> Span:
        rows = offset[: max(lens[first:last])]
        slots = table[first:last, rows // block_size] * block_size + rows % block_size
        tokens = starts[last] - starts[first]
        if last - first == 1 and tokens in (1, lens[first]):
            return Span(starts[first], starts[last], slots, None)
        positions = batch.positions[starts[first] : starts[last]].view(last - first, -1, 1)
        return Span(starts[first], starts[last], slots, rows <= positions)

    merged, first = [], 0
    single = [stop - start == 1 for start, stop in pairwise(starts)]
    for b, alone in enumerate(single):
        if not alone or b + 1 == len(single) or not single[b + 1]:
            merged.append(span(first, b + 1))
            first = b + 1
    return merged


def _windowed(batch: Batch, block_size: int, window: int, offset: Tensor) -> list[Span]:
    starts, lens = batch.query_start.tolist(), batch.context_lens.tolist()
    table = batch.block_table.long()
    found, first = [], 0
    for b, (start, stop) in enumerate(pairwise(starts)):
        if stop - start == 1 and b + 1 < len(lens) and starts[b + 2] - stop == 1:
            continue  # it attends together with the next
        if stop - start == 1:
            most = min(window, max(lens[first : b + 1]))
            ends = batch.context_lens[first : b + 1, None].long()
            rows = (ends - window).clamp_min(0) + offset[:most]  # [B, S]
            slots = table[first : b + 1].gather(1, rows // block_size) * block_size + rows % block_size
            found.append(Span(starts[first], stop, slots, (rows < ends).unsqueeze(1)))
        else:
            for tokens, read in pieces(start, stop, lens[b] - (stop - start), window):
                rows = offset[read.start : read.stop]
                slots = table[b, rows // block_size] * block_size + rows % block_size
                seen = visible(rows, batch.positions[tokens, None], window)
                found.append(Span(tokens.start, tokens.stop, slots[None], seen[None]))
        first = b + 1
    return found
