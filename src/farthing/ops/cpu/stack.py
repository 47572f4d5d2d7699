"""All layers of a model in one native call, so that Python overhead does not grow with depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from farthing import _native
from farthing.lazy import torch
from farthing.ops.api import CACHE_DTYPES, Batch, IndexCache, LatentCache, LayerHandles, Place
from farthing.ops.arrays import address, as_float32, contiguous, dtype_name, empty, row_stride
from farthing.ops.selection import Chosen, sequences_of
from farthing.ops.specs import IndexerSpec
from farthing.ops.weights import PeerLost

if TYPE_CHECKING:
    from torch import Tensor


_CACHE_TYPES = {  # by the dtype of the tensor
    "float32": _native.CacheType.F32,
    "bfloat16": _native.CacheType.BF16,
    "float8_e4m3fn": _native.CacheType.FP8,
    "int8": _native.CacheType.INT8,
}


def cache_type(dtype: str) -> Any:
    """The native type of a cache."""
    return _CACHE_TYPES[CACHE_DTYPES[dtype]]


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers for `run_layers`; `alive` owns the tensors that native code points to."""

    native: Any
    depth: int  # number of layers
    windows: tuple[int | None, ...]  # each once; those of layers that share a cache
    recurrent: bool  # whether some layers are
    eps: float  # of every norm, but for those within attention
    alive: tuple[Any, ...]


def pack_stack(layers: Sequence[LayerHandles]) -> Stack:
    """Collect the layers' packed parts without copying weights."""
    native = _native.Layers()
    alive: list[Any] = []
    windows = tuple(dict.fromkeys(layer.window for layer in layers))
    for layer in layers:
        kind = windows.index(layer.window)
        sums = [s and _native.SharedSum(*astuple(s)) for s in (layer.attention_sum, layer.feed_sum)]
        if layer.gates is not None:
            norm, feed_norm = vector(layer.norm.weight), vector(layer.feed_norm.weight)
            native.add_recurrent(
                address(norm), layer.qkv_a.packed, layer.gates.packed, layer.heads.native, layer.o.packed,
                layer.o.rest, address(feed_norm), layer.feed.native, *sums, kind,
            )  # fmt: skip
            alive += [norm, feed_norm, layer.heads, layer.feed]
            continue
        norms = (layer.norm, layer.q_norm, layer.feed_norm)
        own = (*(None if norm is None else norm.weight for norm in norms), layer.o_bias)
        vectors = [None if w is None else vector(w) for w in own]
        norm_at, q_norm, feed_norm_at, o_bias = (0 if w is None else address(w) for w in vectors)
        q_b = None if layer.q_b is None else layer.q_b.packed
        native.add(
            norm_at, layer.qkv_a.packed, layer.q_width, q_norm, q_b, layer.heads.native, layer.o.packed,
            layer.o.rest, feed_norm_at, layer.feed.native, *sums, o_bias, layer.heads.eps, kind,
        )  # fmt: skip
        alive += [*vectors, layer.heads, layer.feed]
        if layer.is_special:
            alive += add_post(native, layer)
    eps = layers[0].norm.eps if layers else 0.0
    recurrent = any(layer.gates is not None for layer in layers)
    return Stack(native, len(layers), windows, recurrent, eps, tuple(alive))


def add_post(native: Any, layer: LayerHandles) -> list[Any]:
    """Add what follows attention and feed to the last layer; returns what owns the numbers."""
    beside = layer.beside
    rows = () if beside is None else (beside.input_norm, beside.norm, beside.feed_norm)
    norms = [None if n is None else vector(n.weight) for n in (layer.attention_post, layer.feed_post, *rows)]
    at = [0 if n is None else address(n) for n in norms] + [0] * (3 - len(rows))
    native.post(*at[:2], None if beside is None else beside.mlp.native, *at[2:], layer.scale)
    return [*norms, beside]


def vector(x: Tensor) -> Tensor:
    """x as contiguous float32."""
    return contiguous(as_float32(x))


NO_ROWS = _native.Rows(0, 0)


def native_rows(x: Tensor) -> Any:
    """Native view of a float32 tensor with unit column stride."""
    return _native.Rows(address(x), row_stride(x))


def native_cache(cache: LatentCache | IndexCache, layer: int = 0) -> Any:
    """Native view of a cache, starting at one layer (or row of an index cache)."""
    data, scale = cache.data, cache.scale
    layer_bytes = row_stride(data) * data.itemsize
    layer_scales = 0 if scale is None else row_stride(scale)
    return _native.Cache(
        _CACHE_TYPES[dtype_name(data.dtype)],
        address(data) + layer * layer_bytes,
        0 if scale is None else address(scale) + layer * layer_scales * scale.itemsize,
        data.shape[2],
        layer_bytes,
        layer_scales,
    )


def native_batch(batch: Batch, window: int | None = None) -> Any:
    """Native view of a step's index tensors, for layers with this window."""
    blocks = batch if window is None or not batch.windows else batch.windows[window]
    return _native.Batch(
        address(batch.positions),
        address(blocks.slots),
        address(batch.query_start),
        address(batch.context_lens),
        address(blocks.block_table),
        *blocks.block_table.shape,
    )


def native_state(place: Place) -> Any:
    """Native view of recurrent states, starting at a layer, with the batch's slots."""
    slots, state = place.batch.state_slots, place.cache.state
    if slots is None or state is None:
        raise ValueError("state_slots: got None; expected a slot per sequence, and a cache that has them")
    steps = [row_stride(each) for each in state.tensors()]
    starts = (
        address(each) + place.row * step * each.itemsize
        for each, step in zip(state.tensors(), steps, strict=True)
    )
    sources = slots if place.batch.state_sources is None else place.batch.state_sources
    return _native.DeltaState(*starts, *steps, address(slots), address(sources))


def native_reads(batch: Batch, part: slice, reads: Chosen) -> Any:
    """Tokens `part` of a batch, each as a separate sequence that reads selected cache rows."""
    counts, slots, positions = reads.counts[part], reads.slots[part], batch.positions[part]
    return _native.Batch(
        address(positions),
        address(batch.slots[part]),
        address(reads.starts),
        address(counts),
        address(slots),
        *slots.shape,
        address(counts),
    )


def run_layers(
    native: Any,
    h: Tensor,
    stack: Stack,
    batch: Batch,
    cache: LatentCache,
    counts: Tensor | None,
    span: slice,
) -> Tensor:
    """h [T, D] float32 with unit column stride -> [T, D], a new tensor; span: the layers."""
    tokens, hidden = h.shape
    first, last, _ = span.indices(stack.depth)
    out = empty(h, tokens, hidden)
    if first == last:
        return out
    seen, stride = (0, 0) if counts is None else (address(counts[first:]), row_stride(counts))
    try:
        native.layers(
            stack.native, first, last, native_rows(h), tokens,
            [native_cache(cache.of(w) if cache.windows else cache) for w in stack.windows],
            [native_batch(batch, window) for window in stack.windows],
            stack.eps, seen, stride, native_rows(out),
            native_state(Place(cache, 0, batch)) if stack.recurrent else None,
        )  # fmt: skip
    except _native.PeerLost as error:
        raise PeerLost(*error.args) from error
    return out


# The native lightning indexer. Legend: see `farthing.ops.indexer`.

MOST_SCORES = 1 << 22  # scores in memory at once; larger steps are scored in parts


@dataclass(frozen=True, slots=True)
class Indexer:
    """A packed indexer; owns the tensors that native code points to."""

    native: Any
    spec: IndexerSpec
    alive: tuple[Tensor, ...]


def pack(spec: IndexerSpec, norm: Tensor, bias: Tensor, rope: Tensor) -> Indexer:
    """norm, bias [d] and rope [2, max_len, r/2], float32 and contiguous."""
    native = _native.Indexer(
        spec.num_heads, spec.head_dim, spec.rope_dim, spec.top_k, spec.norm_eps, spec.interleaved,
        address(norm), address(bias), address(rope[0]), address(rope[1]),
    )  # fmt: skip
    return Indexer(native, spec, (norm, bias, rope))


def index(native: Any, q: Tensor, k: Tensor, w: Tensor, indexer: Indexer, place: Place) -> Tensor | None:
    """`Ops.index` of float32 rows with unit column stride."""
    cache, batch = place.cache.index, place.batch
    assert cache is not None
    tokens, longest = q.shape[0], int(batch.context_lens.max())
    scored = longest > indexer.spec.top_k
    out = torch.empty(tokens, indexer.spec.top_k, dtype=torch.int32) if scored else None
    sequences, keys = sequences_of(batch).to(torch.int32), native_cache(cache, place.row)
    step = max(1, MOST_SCORES // longest) if scored else tokens
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        rows = _native.IndexBatch(
            batch.positions[part].data_ptr(),
            batch.slots[part].data_ptr(),
            sequences[part].data_ptr(),
            batch.block_table.data_ptr(),
            batch.block_table.shape[1],
        )
        inputs = (native_rows(x[part]) for x in (q, k, w))
        to = 0 if out is None else out[part].data_ptr()
        _native.index(native, indexer.native, *inputs, min(step, tokens - at), keys, rows, to)
    return out
