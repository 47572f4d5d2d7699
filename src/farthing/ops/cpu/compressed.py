"""DeepSeek-V4's layers in one native call, and what native code reads of a compressed past.

Legend: T tokens of the step; n streams of D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from farthing import _native
from farthing.ops.api import Batch, LatentCache, StreamedHandles
from farthing.ops.arrays import address, contiguous, empty, row_stride
from farthing.ops.cpu.stack import native_batch, native_cache, native_rows, vector
from farthing.ops.cpu.weights import Streams
from farthing.ops.weights import PeerLost

if TYPE_CHECKING:
    from torch import Tensor


def native_past(cache: LatentCache, window: int, rate: int) -> Any:
    """Native view of what the layers of a rate keep."""
    own, entries, opened, step = cache.of(window).entries[rate], [], 0, 0
    if rate:
        assert cache.open is not None
        kept, rows = cache.open.rows[rate], cache.entries[rate]
        entries, opened, step = [native_cache(rows)], address(kept), row_stride(kept)
        if cache.index is not None and cache.index.data.shape[1:3] == rows.data.shape[1:3]:
            entries.append(native_cache(cache.index))
    return _native.Past(native_cache(own), entries, opened, step, own.num_blocks * own.block_size)


def past_batch(batch: Batch, window: int) -> Any:
    """Native view of a step's index tensors."""
    own, slots = batch.of(window), batch.state_slots
    return _native.PastBatch(
        native_batch(batch), 0 if slots is None else address(slots), address(own.slots),
        address(own.block_table), own.block_table.shape[1],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamedStack:
    """Layers for `run_streamed`; `alive` owns what native code points to."""

    native: Any
    depth: int
    window: int
    rates: tuple[int, ...]  # of the pasts that layers refer to
    width: int  # n D
    ending: Streams | None  # the streams' last sum; None: another stage has it
    vocabulary: int  # of the tables of experts; 0: there are none
    eps: float
    alive: tuple[Any, ...]


def pack_streamed(layers: Sequence[StreamedHandles], ending: Streams | None) -> StreamedStack:
    """Collect the layers' packed parts without copying weights."""
    native, alive = _native.StreamedLayers(), list[Any](layers)
    rates, vocabulary = tuple(sorted({layer.rate for layer in layers})), 0
    for layer in layers:
        norms = [vector(norm.weight) for norm in (layer.norm, layer.q_norm, layer.feed_norm)]
        chosen = None if layer.chosen is None else contiguous(layer.chosen)
        if chosen is not None:
            vocabulary = chosen.shape[0]
        sums = [s and _native.SharedSum(*astuple(s)) for s in (layer.attention_sum, layer.feed_sum)]
        native.add(
            layer.attention_streams.native, layer.feed_streams.native, *map(address, norms),
            layer.first.packed, layer.q.packed, None if layer.index_q is None else layer.index_q.packed,
            [o.packed for o in layer.o_a], layer.o_b.packed, layer.heads.native, layer.feed.native,
            0 if chosen is None else address(chosen), rates.index(layer.rate), layer.row, *sums,
        )  # fmt: skip
        alive += [*norms, chosen]
    if ending is not None:
        native.end(ending.native)
    streams, window = layers[0].attention_streams, layers[0].heads.spec.window
    count = streams.spec.count * streams.width
    return StreamedStack(
        native, len(layers), window, rates, count, ending, vocabulary, layers[0].norm.eps, tuple(alive)
    )


def run_streamed(
    native: Any,
    h: Tensor,
    stack: StreamedStack,
    batch: Batch,
    cache: LatentCache,
    counts: Tensor | None,
    span: slice,
) -> Tensor:
    """h [T, n D] float32 with unit column stride -> [T, n D], or [T, D] after the last of all layers."""
    first, last, _ = span.indices(stack.depth)
    tokens, ends = h.shape[0], stack.ending if last == stack.depth else None
    out = empty(h, tokens, stack.width if ends is None else ends.width)
    ids = None if batch.ids is None else contiguous(batch.ids)
    if stack.vocabulary and ids is None:
        raise ValueError("ids: got None; expected the tokens of the step, by which experts are chosen")
    seen, stride = (0, 0) if counts is None else (address(counts[first:]), row_stride(counts))
    try:
        _native.streamed_layers(
            native, stack.native, first, last, native_rows(h), tokens, 0 if ids is None else address(ids),
            stack.vocabulary, [native_past(cache, stack.window, rate) for rate in stack.rates],
            past_batch(batch, stack.window), stack.eps, seen, stride, native_rows(out),
        )  # fmt: skip
    except _native.PeerLost as error:
        raise PeerLost(*error.args) from error
    return out
