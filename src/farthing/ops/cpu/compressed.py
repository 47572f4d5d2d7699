"""What native code reads of a compressed past: a layer's cache, and the rows that each token attends to.

Legend: T tokens of the step; K rows that one of them reads; B sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farthing import _native
from farthing.lazy import np
from farthing.ops.api import Place
from farthing.ops.arrays import address, dtype_name, empty, host, like, row_stride
from farthing.ops.cpu.stack import CACHE_TYPES, MOST_SCORES, NO_ROWS, native_batch, native_rows
from farthing.ops.cpu.weights import Compressed
from farthing.ops.selection import Chosen

if TYPE_CHECKING:
    from torch import Tensor


def _cache(data: Tensor, row: int, block_size: int) -> Any:
    step = row_stride(data) * data.itemsize
    return _native.Cache(CACHE_TYPES[dtype_name(data.dtype)], address(data) + row * step, 0, block_size)


def kept_of(heads: Compressed, place: Place) -> tuple[Any, ...]:
    """The last arguments of `_native.CompressedArgs`."""
    s, cache, batch = heads.spec, place.cache, place.batch
    window, own = cache.of(s.window).entries[s.rate], batch.of(s.window)
    entries, opened, slots = [], 0, 0
    if s.rate:
        past = cache.entries[s.rate]
        entries.append(_cache(past, place.row, past.shape[2]))
        if s.index is not None:
            assert cache.index is not None
            entries.append(_cache(cache.index.data, place.row, past.shape[2]))
        assert cache.open is not None and batch.state_slots is not None
        rows = cache.open.rows[s.rate]
        opened = address(rows) + place.row * row_stride(rows) * rows.itemsize
        slots = address(batch.state_slots)
    return (
        _cache(window, place.row, window.shape[2]), entries, opened, slots, native_batch(batch),
        address(own.slots), address(own.block_table), own.block_table.shape[1],
        window.shape[1] * window.shape[2],
    )  # fmt: skip


def native_rows_of(own: Tensor, row: int) -> Any:
    """A layer's rows, those of the window and the entries after them, as blocks of one."""
    return _cache(own, row, 1)


def select_entries(native: Any, index_q: Tensor, x: Tensor, heads: Compressed, place: Place) -> Tensor | None:
    """The entries that each token attends to [T, top_k] int32, ascending and padded with -1; None: all.

    Entries are scored as tokens are by the lightning indexer: entry e is visible to a token that sees more
    than e of them.
    """
    s, batch, cache = heads.spec, place.batch, place.cache
    assert s.index is not None and heads.indexer is not None and cache.index is not None
    longest = int(batch.context_lens.max()) // s.rate
    if longest <= s.index.top_k:
        return None
    tokens = index_q.shape[0]
    out = empty(index_q, tokens, s.index.top_k, dtype="int32")
    last = (host(batch.positions) + 1) // s.rate - 1
    lengths = np.diff(host(batch.query_start))
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    table, keys = batch.block_table, _cache(cache.index.data, place.row, cache.index.data.shape[2])
    w = x[:, -s.index.num_heads :]
    step = max(1, MOST_SCORES // longest)
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        seen, own = np.ascontiguousarray(last[part], np.int32), sequences[part]
        rows = _native.IndexBatch(address(seen), 0, address(own), address(table), table.shape[1])
        _native.index(
            native, heads.indexer.native, native_rows(index_q[part]), NO_ROWS, native_rows(w[part]),
            len(seen), keys, rows, address(out[part]),
        )  # fmt: skip
    return out


def reads_of(heads: Compressed, place: Place, args: Any, select: Tensor | None, tokens: int) -> Chosen:
    """The rows that each token attends to, at most K of them."""
    s, longest = heads.spec, int(place.batch.context_lens.max())
    past = longest // s.rate if s.rate else 0
    selected = 0 if select is None else select.shape[1]
    most = min(s.window, longest) + (selected or past)
    slots, counts = (
        empty(place.batch.positions, *shape, dtype="int32") for shape in ((tokens, most), (tokens,))
    )
    _native.compressed_reads(
        heads.native, args, 0 if select is None else address(select), selected, address(slots), most,
        address(counts),
    )  # fmt: skip
    starts = like(np.arange(tokens + 1, dtype=np.int32), counts)
    return Chosen(counts, slots, starts)
