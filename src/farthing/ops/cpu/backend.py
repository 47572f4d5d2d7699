"""`CpuOps`: the ops on top of `farthing._native`, with or without torch. Legend: see `farthing.ops.api`.

Native code receives addresses and strides; nothing is copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from farthing import _native
from farthing.lazy import torch
from farthing.ops import arrays
from farthing.ops.api import (
    ALL,
    Batch,
    CacheDtype,
    LatentCache,
    LayerHandles,
    Norm,
    NotFinite,
    Place,
    StreamedHandles,
)
from farthing.ops.arrays import (
    address,
    as_float32,
    contiguous,
    dtype_name,
    empty,
    largest,
    logsumexp,
    numpy_dtype,
    row_stride,
)
from farthing.ops.cpu import stack as indexing
from farthing.ops.cpu.compressed import StreamedStack, native_past, pack_streamed, past_batch, run_streamed
from farthing.ops.cpu.stack import (
    NO_ROWS,
    Stack,
    native_batch,
    native_cache,
    native_reads,
    native_rows,
    native_state,
    pack_stack,
    run_layers,
    vector,
)
from farthing.ops.cpu.weights import (
    Compressed,
    Experts,
    Heads,
    Linear,
    PackingOps,
    Streams,
    router_of,
)
from farthing.ops.sampling import CANDIDATES, Filters
from farthing.ops.selection import chosen, in_rows
from farthing.ops.specs import RouterSpec

if TYPE_CHECKING:
    from torch import Tensor


Floats = NDArray[np.floating[Any]]
_GROUP = 128  # number of weights summed together


def sample(logits: Floats, uniform: Floats, filters: Filters | None = None) -> NDArray[np.int64]:
    """See `Ops.sample`.

    Legend: n rows; V vocabulary; K candidates per row.
    """
    if filters is None:
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return invert(weights, uniform)
    vocabulary = logits.shape[1]
    width = min(vocabulary, CANDIDATES)
    tokens, whole = _sample_among(logits, uniform, filters, width)
    if width < vocabulary and not whole.all():
        rows: Any = np.flatnonzero(~whole)
        tokens[rows] = _sample_among(logits[rows], uniform[rows], filters.at(rows), vocabulary)[0]
    return tokens


def _sample_among(
    logits: Floats, uniform: Floats, filters: Filters, width: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """See `farthing.ops.sampling._sample_among`."""
    vocabulary = logits.shape[1]
    top_k, top_p, min_p = (np.asarray(f) for f in (filters.top_k, filters.top_p, filters.min_p))
    total = np.asarray(logsumexp(logits))  # type: ignore[arg-type]
    values, ids = (np.asarray(a) for a in largest(logits, width))  # type: ignore[arg-type]
    probs = np.exp(values - total)
    by_min_p = probs >= min_p[:, None] * probs[:, :1]
    kept = probs * (by_min_p & (np.arange(width) < top_k[:, None]))
    open_end = (top_k >= vocabulary) & (min_p == 0)
    enough = open_end & (probs.sum(-1, dtype=np.float64) >= top_p) & (top_p < 1)
    whole = (top_k <= width) | ~by_min_p[:, -1] | enough
    mass = np.where(open_end, 1.0, kept.sum(-1, dtype=np.float64))
    before = kept.cumsum(-1, dtype=np.float64) - kept  # float32 would drift by more than a token
    kept = kept * (before < (top_p * mass)[:, None])
    return ids[np.arange(len(ids)), invert(kept, uniform)], whole


def invert(weights: Floats, u: Floats) -> NDArray[np.int64]:
    """See `farthing.ops.sampling.invert`: sums over groups first, then within the selected group."""
    rows, width = weights.shape
    tokens = np.empty(rows, np.int64)
    for row in range(rows):
        w, at = weights[row], 0
        if width <= _GROUP:
            target = u[row] * w.sum(dtype=np.float64)
        else:
            mass = np.add.reduceat(w, np.arange(0, width, _GROUP)).cumsum(dtype=np.float64)
            target = u[row] * mass[-1]
            group = min(int(mass.searchsorted(target, "right")), len(mass) - 1)
            target -= mass[group - 1] if group else 0.0
            at = group * _GROUP
            w = w[at : at + _GROUP]
        cdf = w.cumsum(dtype=np.float64)
        # Rounding may move the target past the end; then take the last nonzero weight.
        last = int(cdf.searchsorted(cdf[-1], "left"))
        tokens[row] = at + min(int(cdf.searchsorted(target, "right")), last)
    return tokens


MOST_FUSED_TOP = 64  # above this, torch sorts the head's logits
SELECTED_AT_ONCE = 32  # tokens per call of sparse attention, which bounds its partial sums
FEW = 16  # up to this many tokens one native lookup is faster than two torch calls


def _rows(x: Tensor) -> Tensor:
    """x as float32 rows with unit column stride."""
    x_: Any = as_float32(x)
    if isinstance(x_, np.ndarray):
        return x_ if x_.strides[1] == x_.itemsize else np.ascontiguousarray(x_)  # type: ignore[return-value]
    return x_ if x_.stride(1) == 1 else x_.contiguous()  # type: ignore[no-any-return]


class CpuOps(PackingOps):
    """Native ops; activations are float32, and int8 inside projections with integer weights."""

    cache_dtype: CacheDtype = "float32"
    sums_in_stack = True
    continues_states = True

    def zeros(self, dtype: str, *shape: int) -> Tensor:
        """Zeros in small pages that are allocated on first write. torch would write all of them now, and
        numpy would request huge pages, and each layer's last one would be mostly empty."""
        kind = numpy_dtype(dtype)
        if not prod(shape):  # a model whose layers all have windows
            zeros = np.zeros(shape, kind)
            return zeros if self.arrays else torch.zeros(shape, dtype=getattr(torch, dtype))  # type: ignore[return-value]
        memory = mmap.mmap(-1, prod(shape) * kind.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self.arrays:
            return np.frombuffer(memory, kind).reshape(shape)  # type: ignore[return-value]
        return torch.frombuffer(memory, dtype=getattr(torch, dtype)).view(*shape)

    def embed(self, ids: Tensor, table: Any) -> Tensor:
        if isinstance(table, Linear):
            ids, out = contiguous(ids), empty(ids, ids.shape[0], table.k)
            table.packed.read_rows(address(ids), ids.shape[0], address(out))
            return out
        kind, many = dtype_name(table.dtype), ids.shape[0] > FEW and not self.arrays
        if many or kind not in ("bfloat16", "float32"):
            return as_float32(table[ids])
        ids, out = contiguous(ids), empty(table, ids.shape[0], table.shape[1])
        self._native.embed(
            address(table), kind == "bfloat16", row_stride(table), table.shape[0], address(ids),
            ids.shape[0], table.shape[1], address(out),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        x, weight = _rows(x), vector(norm.weight)
        tokens, k = x.shape
        out = empty(x, tokens, k)
        self._native.rms_norm(native_rows(x), tokens, k, address(weight), norm.eps, native_rows(out))
        return out

    def linear(
        self, x: Tensor, weight: Linear, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        x = _rows(x)
        tokens = x.shape[0]
        if x.shape[1] != weight.k:
            raise ValueError(f"x has {x.shape[1]} columns; expected {weight.k}, the weight's")
        scale, eps = (None, 0.0) if norm is None else (vector(norm.weight), norm.eps)
        added = NO_ROWS if residual is None else native_rows(_rows(residual))
        out = empty(x, tokens, weight.n)
        self._native.linear(
            weight.packed, native_rows(x), tokens, 0 if scale is None else address(scale), eps,
            added, native_rows(out), weight.rest,
        )  # fmt: skip
        return out

    def mla(self, q: Tensor, kv: Tensor, heads: Heads, place: Place, select: Tensor | None = None) -> Tensor:
        q, kv = _rows(q), _rows(kv)
        tokens, batch = q.shape[0], place.batch
        out = empty(q, tokens, heads.width)
        if select is None:
            self._mla(q, kv, heads, place.cache, place.row, native_batch(batch), out)
            return out
        reads, rows = chosen(select, batch, place.cache.block_size), in_rows(place.cache)
        for at in range(0, tokens, SELECTED_AT_ONCE):
            part = slice(at, at + SELECTED_AT_ONCE)
            own = native_reads(batch, part, reads)
            self._mla(q[part], kv[part], heads, rows, place.row, own, out[part])
        return out

    def gqa(self, qkv: Tensor, heads: Heads, place: Place) -> Tensor:
        qkv = _rows(qkv)
        out = empty(qkv, qkv.shape[0], heads.width)
        q, kv = qkv[:, : out.shape[1]], qkv[:, out.shape[1] :]
        self._mla(q, kv, heads, place.cache, place.row, native_batch(place.batch), out)
        return out

    def delta(self, x: Tensor, gates: Tensor, delta: Heads, place: Place) -> Tensor:
        x, gates = _rows(x), _rows(gates)
        tokens = x.shape[0]
        out = empty(x, tokens, delta.width)
        _native.delta(
            self._native, delta.native, native_rows(x), native_rows(gates), tokens,
            native_state(place), native_batch(place.batch), delta.eps, native_rows(out),
        )  # fmt: skip
        return out

    def compressed(
        self, q: Tensor, x: Tensor, index_q: Tensor | None, heads: Compressed, place: Place
    ) -> Tensor:
        q, x = _rows(q), _rows(x)
        index_rows = NO_ROWS if index_q is None else native_rows(_rows(index_q))
        tokens = q.shape[0]
        out = empty(q, tokens, heads.spec.num_heads * heads.spec.head_dim)
        _native.compressed(
            self._native, heads.native, native_rows(q), native_rows(x), index_rows, tokens,
            native_past(place.cache, heads.spec.window, heads.spec.rate), place.row,
            past_batch(place.batch, heads.spec.window), native_rows(out),
        )  # fmt: skip
        return out

    def collapse(self, x: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        x = _rows(x)
        tokens = x.shape[0]
        out, mix = empty(x, tokens, streams.width), empty(x, tokens, streams.mixed)
        rows = native_rows(x), NO_ROWS, native_rows(mix)
        _native.streams(self._native, streams.native, *rows, tokens, native_rows(out))
        return out, mix

    def spread(self, x: Tensor, y: Tensor, mix: Tensor, streams: Streams) -> Tensor:
        x, y = _rows(x), _rows(y)
        rows = (native_rows(each) for each in (x, y, mix))
        _native.streams(self._native, streams.native, *rows, x.shape[0], NO_ROWS)
        return x

    def _mla(
        self, q: Tensor, kv: Tensor, heads: Heads, cache: LatentCache, row: int, batch: Any, out: Tensor
    ) -> None:
        """batch: the native batch struct."""
        self._native.mla(
            heads.native, native_rows(q), native_rows(kv), q.shape[0], native_cache(cache, row), batch,
            heads.eps, native_rows(out),
        )  # fmt: skip

    def index(
        self, q: Tensor, k: Tensor, w: Tensor, indexer: indexing.Indexer, place: Place
    ) -> Tensor | None:
        return indexing.index(self._native, _rows(q), _rows(k), _rows(w), indexer, place)

    def _experts(
        self,
        x: Tensor,
        weights: Experts,
        norm: Norm,
        counts: int = 0,
        ids: int = 0,
        gates: int = 0,
        residual: bool = True,
    ) -> Tensor:
        """counts, ids and gates are addresses, 0 for none."""
        if self._file is not None:  # the background check may have found damage
            self._file.raise_damage()
        x, scale = _rows(x), vector(norm.weight)
        tokens, hidden = x.shape
        out = empty(x, tokens, hidden)
        self._native.moe(
            weights.native, native_rows(x), tokens, address(scale), norm.eps, native_rows(out), counts, ids,
            gates, residual,
        )  # fmt: skip
        return out

    def stack(
        self, layers: Sequence[LayerHandles | StreamedHandles], ending: Streams | None = None
    ) -> Stack | StreamedStack:
        streamed = [layer for layer in layers if isinstance(layer, StreamedHandles)]
        if streamed:
            return pack_streamed(streamed, ending)
        return pack_stack([layer for layer in layers if isinstance(layer, LayerHandles)])

    def run_stack(
        self, h: Tensor, stack: Stack | StreamedStack, batch: Batch, cache: LatentCache,
        counts: Tensor | None, span: slice = ALL,
    ) -> Tensor:  # fmt: skip
        if self._file is not None:  # the background check may have found damage
            self._file.raise_damage()
        if isinstance(stack, StreamedStack):
            return run_streamed(self._native, _rows(h), stack, batch, cache, counts, span)
        return run_layers(self._native, _rows(h), stack, batch, cache, counts, span)

    def mlp(self, x: Tensor, weights: Experts, norm: Norm, residual: bool = True) -> Tensor:
        return self._experts(x, weights, norm, residual=residual)

    def moe(
        self, x: Tensor, weights: Experts, norm: Norm, counts: Tensor | None = None, residual: bool = True,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        seen = 0 if counts is None else address(counts)
        ids = None if chosen is None else contiguous(chosen)
        return self._experts(x, weights, norm, seen, 0 if ids is None else address(ids), residual=residual)

    def moe_chosen(self, x: Tensor, weights: Experts, norm: Norm, ids: Tensor, gates: Tensor) -> Tensor:
        assert weights.spec is not None
        if ids.shape != (x.shape[0], weights.spec.top_k) or gates.shape != ids.shape:
            raise ValueError(
                f"ids {list(ids.shape)} and gates {list(gates.shape)} do not match; "
                f"expected [{x.shape[0]}, {weights.spec.top_k}], rows and experts per token"
            )
        ids, gates = ids.long().contiguous(), gates.float().contiguous()
        return self._experts(x, weights, norm, ids=address(ids), gates=address(gates))

    def reroute(self, weights: Experts, spec: RouterSpec) -> None:
        router = router_of(spec)
        router.bias = weights.native.router.bias
        router.logit_bias = weights.native.router.logit_bias
        router.expert_scale = weights.native.router.expert_scale
        weights.native.router = router
        weights.spec = spec

    def route(self, n: Tensor, weights: Experts) -> tuple[Tensor, Tensor]:
        assert weights.spec is not None
        n = _rows(n)
        tokens, k = n.shape[0], weights.spec.top_k
        ids, gates = empty(n, tokens, k, dtype="int64"), empty(n, tokens, k)
        self._native.route(weights.native, native_rows(n), tokens, address(ids), address(gates))
        return ids, gates

    def logits(self, x: Tensor, head: Linear, norm: Norm) -> Tensor:
        logits = self.linear(x, head, norm)
        if norm.cap:
            z: Any = arrays.host(logits)
            np.multiply(np.tanh(z / np.float32(norm.cap)), np.float32(norm.cap), out=z)
        return logits

    def top_logits(self, x: Tensor, head: Linear, norm: Norm, k: int) -> tuple[Tensor, Tensor, Tensor]:
        k = min(k, head.n)
        if k > MOST_FUSED_TOP:
            return _sorted(self.logits(x, head, norm), k)
        x, scale = _rows(x), vector(norm.weight)
        tokens = x.shape[0]
        values, ids = empty(x, tokens, k), empty(x, tokens, k, dtype="int64")
        logsumexp = empty(x, tokens)
        with _not_finite():
            self._native.top_logits(
                head.packed, native_rows(x), tokens, address(scale), norm.eps, norm.cap, k,
                address(values), address(ids), address(logsumexp),
            )  # fmt: skip
        return values, ids, logsumexp

    def greedy(self, x: Tensor, head: Linear, norm: Norm) -> list[int]:
        x, scale = _rows(x), vector(norm.weight)
        with _not_finite():
            best: list[int] = self._native.greedy(
                head.packed, native_rows(x), x.shape[0], address(scale), norm.eps
            )
        return best

    def sample(self, logits: Tensor, uniform: Tensor, filters: Filters | None = None) -> Tensor:
        if self.arrays:
            drawn: Any = sample(np.asarray(logits), np.asarray(uniform), filters)
            return drawn  # type: ignore[no-any-return]
        return super().sample(logits, uniform, filters)


def _sorted(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V] -> (values [T, k], ids [T, k], logsumexp [T]); ties in order of id."""
    z: Any = logits
    if isinstance(z, np.ndarray):
        ids = np.argsort(-z, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(z, ids, 1), ids, arrays.logsumexp(z)[:, 0]  # type: ignore[return-value, arg-type]
    from farthing.ops.reference import largest

    return largest(logits, k)


@contextmanager
def _not_finite() -> Iterator[None]:
    try:
        yield
    except _native.NotFinite as error:
        raise NotFinite(*error.args) from None
