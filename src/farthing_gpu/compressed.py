"""DeepSeek-V4's attention to a window and a compressed past on a GPU.

Keys and entries are made by one kernel, because a key is an entry of one token. Attention is that of a single
token in `attention.py`: the rows of a token's window and of its entries are listed first, and read as one
sequence in blocks of one row. The heads of a token share these rows, and in V4-Flash their 64 fill a tile,
so prompts take the same kernel. The host reads nothing back from the device.

Legend: T tokens; H query heads of size d, of which the last r are rotated; K selected entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import IndexCache, LatentCache, Place
from farthing.ops.compressed import Compressed
from farthing.ops.selection import sequences_of
from farthing_gpu.attention import CACHE_KINDS, FLOAT_CACHE, decode, store_part
from farthing_gpu.delta import keep_tail
from farthing_gpu.launch import narrow, widen
from farthing_gpu.route import best

_HEADS = 4  # turned by a program
_POOLED = 8  # rows of a window at a time
_LISTED = 1024  # rows listed by a program
_COLUMNS = 256  # of an open window that a program keeps


@triton.jit
def _turned(x, cos, sin, d, r, BACK: tl.constexpr):
    """x [M, D] with the last r of d columns rotated in adjacent pairs; BACK: by the opposite angle."""
    M: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    angle = tl.arange(0, D // 2) - (d - r) // 2
    here = (angle >= 0) & (angle < r // 2)
    c = tl.load(cos + angle, mask=here, other=1.0)[None, :]
    s = tl.load(sin + angle, mask=here, other=0.0)[None, :]
    if BACK:
        s = -s
    a, b = tl.split(tl.reshape(x, (M, D // 2, 2)))
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), (M, D))


@triton.jit
def _turn_heads(
    x, out, positions, cos, sin, stride_x, stride_o, H, d, r, pitch, eps, BH: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, j = tl.program_id(1) * BH + tl.arange(0, BH)[:, None], tl.arange(0, D)[None, :]
    mask = (h < H) & (j < d)
    y = widen(tl.load(x + token * stride_x + h * pitch + j, mask=mask, other=0.0), tl.float32)
    if UNIT:
        y = y * tl.rsqrt(tl.sum(y * y, 1) / d + eps)[:, None]
    at = tl.load(positions + token).to(tl.int64) * (r // 2)
    y = _turned(y, cos + at, sin + at, d, r, BACK)
    tl.store(out + token * stride_o + h * pitch + j, narrow(y, out.dtype.element_ty), mask=mask)


@triton.jit
def _pooled(
    x, kept, bias, token, position, before, stride_x, columns, d, RATE: tl.constexpr, WINDOWS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[D]: values times the softmax of gates + bias over the last WINDOWS x RATE positions; of those before
    the last RATE the first half of the columns."""
    SIZE: tl.constexpr = WINDOWS * RATE
    j, width = tl.arange(0, D)[None, :], WINDOWS * d
    top = tl.full((D,), float("-inf"), tl.float32)
    total, result = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for start in range(tl.maximum(SIZE - position - 1, 0), SIZE, ROWS):  # nothing is before position 0
        i = start + tl.arange(0, ROWS)
        at = position + 1 - SIZE + i
        used = (i < SIZE)[:, None] & (j < d)
        here, column = (at >= before)[:, None], (i // RATE * d)[:, None] + j
        new = x + (token - position + at)[:, None] * stride_x + column
        old = kept + (at % SIZE)[:, None] * columns + column
        value = widen(tl.load(new, mask=used & here, other=0.0), tl.float32)
        value += tl.load(old, mask=used & (at < before)[:, None], other=0.0)
        gate = widen(tl.load(new + width, mask=used & here, other=0.0), tl.float32)
        gate += tl.load(old + width, mask=used & (at < before)[:, None], other=0.0)
        gate += tl.load(bias + (i % RATE)[:, None] * width + column, mask=used, other=0.0)
        gate = tl.where((i < SIZE)[:, None], gate, float("-inf"))
        most = tl.maximum(top, tl.max(gate, 0))
        shrink, p = tl.exp(top - most), tl.exp(gate - most[None, :])
        total = total * shrink + tl.sum(p, 0)
        result = result * shrink + tl.sum(p * value, 0)
        top = most
    return result / total


@triton.jit
def _write_entries(
    x, kept, bias, norm, cos, sin, slots, sequences, positions, starts, where, data, scale, stride_x, columns,
    stride_w, size, d, r, eps, pitch, RATE: tl.constexpr, WINDOWS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    if (position + 1) % RATE == 0:
        j = tl.arange(0, D)
        if WINDOWS == 0:
            slot = tl.load(where + token)
            y = widen(tl.load(x + token * stride_x + j, mask=j < d, other=0.0), tl.float32)
        else:
            sequence, entry = tl.load(sequences + token), position // RATE
            block = tl.load(where + sequence.to(tl.int64) * stride_w + entry // size)
            slot = block.to(tl.int64) * size + entry % size
            own = kept + tl.load(slots + sequence).to(tl.int64) * (WINDOWS * RATE) * columns
            before = position - (token - tl.load(starts + sequence))
            y = _pooled(x, own, bias, token, position, before, stride_x, columns, d, RATE, WINDOWS, D, ROWS)
        y = y * tl.rsqrt(tl.sum(y * y, 0) / d + eps) * tl.load(norm + j, mask=j < d, other=0.0)
        at = (position + 1 - RATE).to(tl.int64) * (r // 2)
        y = tl.reshape(_turned(tl.reshape(y, (1, D)), cos + at, sin + at, d, r, False), (D,))
        store_part(y, j < d, data + slot * d + j, scale + slot * pitch, KIND)


@triton.jit
def _list_rows(
    sequences, positions, own, past, chosen, rows, last, stride_o, stride_p, stride_c, K, first, width,
    WINDOW: tl.constexpr, OWN: tl.constexpr, SIZE: tl.constexpr, RATE: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position, sequence = tl.load(positions + token), tl.load(sequences + token).to(tl.int64)
    tokens = tl.minimum(position + 1, WINDOW)
    at = position + 1 - tokens + i
    block = tl.load(own + sequence * stride_o + at // OWN, mask=i < tokens, other=0)
    row, count = block * OWN + at % OWN, tokens
    if RATE:
        entry, entries = i - tokens, (position + 1) // RATE
        if CHOSEN:
            entries = tl.minimum(entries, K)
        seen = (entry >= 0) & (entry < entries)
        if CHOSEN:
            entry = tl.maximum(tl.load(chosen + token * stride_c + entry, mask=seen, other=0), 0)
        block = tl.load(past + sequence * stride_p + entry // SIZE, mask=seen, other=0)
        row = tl.where(i < tokens, row, first + block * SIZE + entry % SIZE)
        count += entries
    tl.store(rows + token * width + i, row, mask=i < count)
    if tl.program_id(1) == 0:
        tl.store(last + token, count - 1)


def turn_heads(
    x: Tensor, out: Tensor, positions: Tensor, rope: Tensor, unit: float | None = None, back: bool = False
) -> Tensor:
    """x [T, H, w] to out, with the last columns of each head rotated by rope [2, max_len, r / 2], or back.

    unit: heads are divided by their root mean square, with this epsilon. x and out have the same distance
    between heads, and may be one.
    """
    tokens, heads, d = x.shape
    D = triton.next_power_of_2(d)
    _turn_heads[(tokens, triton.cdiv(heads, _HEADS))](
        x, out, positions, rope[0], rope[1], x.stride(0), out.stride(0), heads, d, 2 * rope.shape[2],
        x.stride(1), unit or 0.0, BH=_HEADS, D=D, UNIT=unit is not None, BACK=back, num_warps=4,
    )  # fmt: skip
    return out


def attend(q: Tensor, x: Tensor, index_q: Tensor | None, a: Compressed, place: Place) -> Tensor:
    """`Ops.compressed` of rows with unit column stride."""
    s, positions = a.spec, place.batch.positions
    sequences = sequences_of(place.batch).to(torch.int32)
    write(x, a, place, sequences)
    query = q.unflatten(1, (s.num_heads, -1))
    query = turn_heads(query, query.new_empty(query.shape), positions, a.rope, s.norm_eps)
    chosen = None if index_q is None else _chosen(index_q, x, a, place, sequences)
    rows, last = _listed(chosen, a, place, sequences)
    tokens = torch.arange(len(q), dtype=torch.int32, device=q.device)
    out = decode(
        query, None, _in_rows(a, place), place.row, rows, tokens, last, s.head_dim**-0.5, sinks=a.parts.sinks
    )
    turned = out[..., s.head_dim - s.rope_dim :]
    turn_heads(turned, turned, positions, a.rope, back=True)
    return out.flatten(1)


def write(x: Tensor, a: Compressed, place: Place, sequences: Tensor) -> None:
    """Cache the keys of x [T, …] as in `Ops.compressed`, the entries of windows that the tokens complete, and
    the tokens of which there will be entries."""
    s, cache, batch = a.spec, place.cache, place.batch
    own = batch.of(s.window)
    _write(x, a, place, sequences, cache.of(s.window).entries[s.rate], a.parts.norm, own.slots)
    if not s.rate:
        return
    assert cache.open is not None
    x, kept, column = x[:, s.head_dim :], cache.open.rows[s.rate][place.row], 0
    for pool, width, to in zip(a.parts.pools, s.pooled, (cache.entries[s.rate], cache.index), strict=False):
        assert to is not None
        part = kept[..., column:], pool.bias
        _write(x[:, column:], a, place, sequences, to, pool.norm, batch.block_table, part)
        column += 2 * width
    keep_tail[(len(x), triton.cdiv(column, _COLUMNS))](
        x, kept, batch.state_slots, sequences, batch.positions, batch.query_start, x.stride(0), column,
        W=s.open_tokens + 1, BLOCK=_COLUMNS,
    )  # fmt: skip


def _write(
    x: Tensor, a: Compressed, place: Place, sequences: Tensor, to: LatentCache | IndexCache, norm: Tensor,
    where: Tensor, pool: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Keys of x to the slots `where`, or entries to the blocks of this table: pool is the open windows' rows
    [slots, open_tokens, …] and the bias of their gates."""
    s, batch, data = a.spec, place.batch, to.data[place.row]
    kept, bias = pool or (x[None], norm)
    width = data.shape[2]
    _write_entries[(len(x),)](
        x, kept, bias, norm, a.rope[0], a.rope[1], batch.state_slots, sequences, batch.positions,
        batch.query_start, where, data, data if to.scale is None else to.scale[place.row], x.stride(0),
        kept.stride(1), where.stride(0), data.shape[1], width, s.rope_dim, s.norm_eps,
        2 if isinstance(to, LatentCache) else 1, RATE=s.rate if pool else 1,
        WINDOWS=s.open_tokens // s.rate if pool else 0, D=triton.next_power_of_2(width), ROWS=_POOLED,
        KIND=CACHE_KINDS.get(data.dtype, FLOAT_CACHE), num_warps=4,
    )  # fmt: skip


def _chosen(index_q: Tensor, x: Tensor, a: Compressed, place: Place, sequences: Tensor) -> Tensor | None:
    """The entries that the indexer selects for each token [T, K] int32, ascending and padded with -1; None if
    no block table can hold more."""
    s, batch, cache, index = a.spec, place.batch, place.cache.index, a.spec.index
    assert index is not None and cache is not None
    if batch.block_table.shape[1] * cache.data.shape[2] <= index.top_k:
        return None
    query = index_q.unflatten(1, (index.num_heads, -1))
    query = turn_heads(query, query.new_empty(query.shape), batch.positions, a.rope)
    w = x[:, -index.num_heads :].float() * (index.num_heads * index.head_dim) ** -0.5
    complete = replace(batch, positions=(batch.positions + 1) // s.rate - 1)  # the last entry of each token
    return best(query, w, cache, place.row, complete, sequences, index.top_k)


def _listed(chosen: Tensor | None, a: Compressed, place: Place, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the cache [T, …] int32 that each token attends to, and the index of its last one [T] int32."""
    s, batch = a.spec, place.batch
    own, kept = batch.of(s.window).block_table, place.cache.of(s.window).entries[s.rate]
    past, first, size, most = own, 0, 1, 0
    if s.rate:
        entries = place.cache.entries[s.rate]
        past, size = batch.block_table, entries.block_size
        most = past.shape[1] * size if chosen is None else chosen.shape[1]
        first = kept.num_blocks * kept.block_size  # entries follow the window's tokens (`Ops.new_past`)
    tokens, width = len(batch.positions), s.window + most
    rows = torch.empty(tokens, width, dtype=torch.int32, device=own.device)
    last = torch.empty(tokens, dtype=torch.int32, device=own.device)
    _list_rows[(tokens, triton.cdiv(width, _LISTED))](
        sequences, batch.positions, own, past, chosen, rows, last, own.stride(0), past.stride(0),
        0 if chosen is None else chosen.stride(0), most, first, width, WINDOW=s.window, OWN=kept.block_size,
        SIZE=size, RATE=s.rate, CHOSEN=chosen is not None, BLOCK=_LISTED, num_warps=4,
    )  # fmt: skip
    return rows, last


def _in_rows(a: Compressed, place: Place) -> LatentCache:
    """The window's tokens and the entries after them, in blocks of one row."""
    own = place.cache.of(a.spec.window).entries[a.spec.rate]
    past = place.cache.entries.get(a.spec.rate)
    rows = own.num_blocks * own.block_size + (0 if past is None else past.num_blocks * past.block_size)

    def whole(x: Tensor) -> Tensor:
        return x.as_strided((x.shape[0], rows, 1, x.shape[3]), (x.stride(0), x.stride(2), x.stride(2), 1))

    return LatentCache(whole(own.data), None if own.scale is None else whole(own.scale))
