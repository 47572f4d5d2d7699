"""`CpuOps`: the ops on top of `farthing._native`. Legend: see `farthing.ops.api`."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from farthing import _native
from farthing.ops.api import (
    AttentionSpec,
    Batch,
    CacheDtype,
    HostOps,
    IndexCache,
    IndexerSpec,
    LatentCache,
    LayerHandles,
    MoEWeights,
    NotFinite,
    RouterSpec,
)
from farthing.ops.cache import CACHE_DTYPES, CACHE_MAX
from farthing.ops.cpu import indexer as indexing
from farthing.ops.cpu.packed_file import PackedFile, write_packed
from farthing.ops.cpu.packing import inputs_of, pack, pack_dense, plan
from farthing.ops.cpu.stack import (
    Stack,
    native_batch,
    native_cache,
    native_reads,
    native_rows,
    pack_stack,
    run_layers,
)
from farthing.ops.reference import largest
from farthing.ops.selection import chosen, in_rows
from farthing.ops.weights import InputRounding, Weight, loaded_as

MOST_FUSED_TOP = 64  # above this, torch sorts the head's logits
SELECTED_AT_ONCE = 32  # tokens per call of sparse attention, which bounds its partial sums
FEW = 16  # up to this many tokens one native lookup is faster than two torch calls


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed projection [n, k]."""

    packed: Any
    n: int
    k: int


@dataclass(slots=True)
class Experts:
    """A packed MoE layer or gated MLP."""

    native: Any
    spec: RouterSpec | None


@dataclass(frozen=True, slots=True)
class Attention:
    """W_UK and W_UV packed per head; owns the tensors that native code points to."""

    native: Any
    spec: AttentionSpec
    alive: tuple[Tensor, ...]


def _rows(x: Tensor) -> Tensor:
    """x as float32 rows with unit column stride."""
    if x.dtype is not torch.float32:
        x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


class CpuOps(HostOps):
    """Native ops; activations are float32, and int8 inside projections with integer weights."""

    cache_dtype: CacheDtype = "float32"
    sums_in_stack = True

    def __init__(
        self,
        threads: int,
        quantization: str | None = None,
        packed: str | None = None,
        isa: str = "auto",
        topology: str = "",
    ) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._native = _native.Backend(threads, isa, topology)
        self.name = f"cpu/{self._native.isa}, {threads} thread{'s' if threads > 1 else ''}"
        self._file = PackedFile(packed) if packed else None
        if self._file and quantization not in (None, self._file.quantization):
            raise ValueError(
                f"quantization {quantization!r} is not what {packed!r} was packed with "
                f"({self._file.quantization!r}); leave it out or pack again"
            )
        self._quantization = self._file.quantization if self._file else quantization
        self.packed_from = self._file.source if self._file else None
        if self._file:
            self._file.check_in_background()
        self._blobs: dict[str, Any] = {}
        self._inputs: dict[str, InputRounding] = {}  # for matrices whose checkpoint specifies it

    def verify_packed(self) -> None:
        if self._file is not None:
            self._file.verify()

    # -- packing

    def coarse(self) -> Self:
        if self._quantization is not None:
            return self
        other = copy(self)
        other._quantization = "int8"
        return other

    def _keep(self, name: str, blob: Any) -> Any:
        if name in self._blobs:
            raise ValueError(f"weight name {name!r} was packed twice; expected every name once")
        self._blobs[name] = blob
        return blob

    def forget(self, prefix: str) -> None:
        for name in [n for n in self._blobs if n.startswith(prefix)]:
            del self._blobs[name]

    def _stored(self, name: str) -> Any | None:
        """The packed matrix of that name from the file, if present."""
        if self._file is None or name not in self._file:
            return None
        try:
            packed = self._native.view(*self._file.matrix(name))
        except ValueError as error:
            raise ValueError(f"packed file {str(self._file.path)!r}: {name!r}: {error}") from None
        return self._keep(name, self._round_inputs(name, packed, self._file.inputs(name)))

    def _pack(self, name: str, weights: Sequence[Weight], interleave: bool = False, mlp: bool = False) -> Any:
        target = plan(weights, loaded_as(self._quantization, mlp))
        packed = pack(self._native, weights, target, interleave)
        return self._keep(name, self._round_inputs(name, packed, inputs_of(weights)))

    def _round_inputs(self, name: str, packed: Any, inputs: InputRounding | None) -> Any:
        if inputs is not None:
            self._inputs[name] = inputs
            if inputs.scale is None:
                packed.round_inputs(inputs.top, inputs.clip)
            else:
                packed.fix_input_scale(inputs.scale)
        return packed

    def _tensor(self, name: str, value: Callable[[], Tensor]) -> Tensor:
        if self._file is not None and name in self._file:
            return self._keep(name, self._file.tensor(name))  # type: ignore[no-any-return]
        return self._keep(name, value().float().contiguous())  # type: ignore[no-any-return]

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]]) -> Linear:
        packed = self._stored(name)
        if packed is None:
            packed = self._pack(name, weights())
        return Linear(packed, *packed.shape)

    def _mlp(self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]]) -> tuple[Any, Any]:
        gate_up, down = self._stored(f"{name}.gate_up"), self._stored(f"{name}.down")
        if gate_up is None or down is None:
            w_gate, w_up, w_down = weights()
            gate_up = self._pack(f"{name}.gate_up", [w_gate, w_up], interleave=True, mlp=True)
            down = self._pack(f"{name}.down", [w_down], mlp=True)
        return gate_up, down

    def pack_mlp(self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]]) -> Experts:
        native = _native.Moe(_native.Router(), None, True)
        native.add(*self._mlp(name, weights))
        return Experts(native, None)

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Experts:
        stored = self._file is not None and f"{name}.gate" in self._file
        w = None if stored else weights()
        if spec.num_experts > _native.MOST_EXPERTS:
            raise ValueError(
                f"num_experts {spec.num_experts} of {name!r} is not served; "
                f"expected at most {_native.MOST_EXPERTS}"
            )
        gate = (
            self._stored(f"{name}.gate")
            if w is None
            else self._keep(f"{name}.gate", pack_dense(self._native, w.gate, False))
        )
        router = _router(spec)
        has_bias = (
            f"{name}.bias" in self._file if w is None and self._file else w is not None and w.bias is not None
        )
        if has_bias:
            router.bias = self._tensor(f"{name}.bias", lambda: w.bias).tolist()  # type: ignore[union-attr, arg-type, return-value]
        shared = (
            f"{name}.shared.down" in self._file
            if w is None and self._file
            else w is not None and w.shared is not None
        )
        shared = shared and not self.routed_only
        native = _native.Moe(router, gate, shared)
        first = None
        loads = self._stored_experts(name, spec.num_experts) if w is None else w.experts
        if None in loads:
            self._keep(f"{name}.held", torch.tensor([e for e, load in enumerate(loads) if load is not None]))
        for e, expert in enumerate(loads):
            if expert is None:  # on another rank, or an identity
                native.add(None, None)
                continue
            gate_up, down = self._mlp(f"{name}.experts.{e}", expert)
            kinds = [(m.format, m.group) for m in (gate_up, down)]
            first = first or kinds
            if kinds != first:
                raise ValueError(
                    f"expert {e} of {name!r} is packed as {kinds}, the first as {first}; expected one format"
                )
            native.add(gate_up, down)
        if first is None:
            raise ValueError(f"no expert of {name!r} is on this rank; expected at least one a rank")
        if shared:
            load = _missing if w is None or w.shared is None else w.shared
            native.add(*self._mlp(f"{name}.shared", load))
        return Experts(native, spec)

    def _stored_experts(self, name: str, count: int) -> list[Callable[[], Any] | None]:
        """Experts in a packed file: all of them, or those of one rank."""
        assert self._file is not None
        if f"{name}.held" not in self._file:
            return [_missing] * count
        held = set(self._file.tensor(f"{name}.held").tolist())
        return [_missing if e in held else None for e in range(count)]

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Attention:
        if self._file is not None and f"{name}.norm" in self._file:
            norm = self._tensor(f"{name}.norm", _missing)
            heads = [
                (self._stored(f"{name}.uk.{h}"), self._stored(f"{name}.uv.{h}"))
                for h in range(spec.num_heads)
            ]
        else:
            kv_b, kv_norm = weights()
            norm = self._tensor(f"{name}.norm", lambda: kv_norm)
            heads = self._pack_heads(name, spec, kv_b)
        rope = rope.float().contiguous()
        native = _native.Attention(
            spec.num_heads, spec.nope_dim, spec.rope_dim, spec.value_dim, spec.latent_dim, spec.scale,
            spec.interleaved, norm.data_ptr(), rope[0].data_ptr(), rope[1].data_ptr(),
        )  # fmt: skip
        for uk, uv in heads:
            native.add(uk, uv)
        return Attention(native, spec, (norm, rope))

    def _pack_heads(self, name: str, spec: AttentionSpec, kv_b: Weight) -> list[tuple[Any, Any]]:
        """W_UK transposed [c, n] and W_UV [v, c] per head; int8 if weights are rounded at all."""
        quantized = self._quantization is not None or kv_b.format != "dense" or kv_b.rounded
        dense = kv_b.data if kv_b.format == "dense" else kv_b.dequantize()
        heads = dense.view(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        w_uk, w_uv = heads.split((spec.nope_dim, spec.value_dim), dim=1)
        return [
            (
                self._keep(f"{name}.uk.{h}", pack_dense(self._native, w_uk[h].t().contiguous(), quantized)),
                self._keep(f"{name}.uv.{h}", pack_dense(self._native, w_uv[h].contiguous(), quantized)),
            )
            for h in range(spec.num_heads)
        ]

    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> indexing.Indexer:
        weight = self._tensor(f"{name}.weight", lambda: norm()[0])
        bias = self._tensor(f"{name}.bias", lambda: norm()[1])
        return indexing.pack(spec, weight, bias, rope.float().contiguous())

    def save_packed(self, path: str) -> None:
        write_packed(path, self._quantization, self._blobs.items(), self.source, self._inputs)

    def new_cache(
        self, layers: int, num_blocks: int, block_size: int, width: int, dtype: CacheDtype
    ) -> LatentCache:
        shape, kind = (layers, num_blocks, block_size), CACHE_DTYPES[dtype]
        scale = torch.ones(*shape, 2) if kind in CACHE_MAX else None
        return LatentCache(_lazy(kind, *shape, width), scale)

    def new_index_cache(self, like: LatentCache, rows: int, width: int) -> IndexCache:
        shape = (rows, *like.data.shape[1:3])
        scale = None if like.scale is None else torch.ones(*shape)
        return IndexCache(_lazy(like.data.dtype, *shape, width), scale)

    # -- computing: native code receives addresses and strides; nothing is copied

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        if ids.shape[0] > FEW or table.dtype not in (torch.bfloat16, torch.float32):
            return table[ids].float()
        ids, out = ids.contiguous(), torch.empty(ids.shape[0], table.shape[1])
        self._native.embed(
            table.data_ptr(), table.dtype is torch.bfloat16, table.stride(0), table.shape[0], ids.data_ptr(),
            ids.shape[0], table.shape[1], out.data_ptr(),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = _rows(x), _vector(weight)
        tokens, k = x.shape
        out = torch.empty(tokens, k)
        self._native.rms_norm(native_rows(x), tokens, k, weight.data_ptr(), eps, native_rows(out))
        return out

    def linear(
        self,
        x: Tensor,
        weight: Linear,
        norm: Tensor | None = None,
        eps: float = 1e-6,
        residual: Tensor | None = None,
    ) -> Tensor:
        x = _rows(x)
        tokens = x.shape[0]
        if x.shape[1] != weight.k:
            raise ValueError(f"x has {x.shape[1]} columns; expected {weight.k}, the weight's")
        norm = None if norm is None else _vector(norm)
        residual = None if residual is None else _rows(residual)
        out = torch.empty(tokens, weight.n)
        self._native.linear(
            weight.packed, native_rows(x), tokens, 0 if norm is None else norm.data_ptr(), eps,
            native_rows(residual), native_rows(out),
        )  # fmt: skip
        return out

    def mla(
        self,
        q: Tensor,
        kv: Tensor,
        attention: Attention,
        cache: LatentCache,
        layer: int,
        batch: Batch,
        eps: float,
        select: Tensor | None = None,
    ) -> Tensor:
        q, kv, s = _rows(q), _rows(kv), attention.spec
        tokens = q.shape[0]
        out = torch.empty(tokens, s.num_heads * s.value_dim)
        if select is None:
            self._mla(q, kv, attention, cache, layer, native_batch(batch), eps, out)
            return out
        reads, rows = chosen(select, batch, cache.block_size), in_rows(cache)
        for at in range(0, tokens, SELECTED_AT_ONCE):
            part = slice(at, at + SELECTED_AT_ONCE)
            self._mla(
                q[part], kv[part], attention, rows, layer, native_reads(batch, part, reads), eps, out[part]
            )
        return out

    def _mla(
        self, q: Tensor, kv: Tensor, attention: Attention, cache: LatentCache, layer: int, batch: Any,
        eps: float, out: Tensor,
    ) -> None:  # fmt: skip
        """batch: the native batch struct."""
        self._native.mla(
            attention.native, native_rows(q), native_rows(kv), q.shape[0], native_cache(cache, layer), batch,
            eps, native_rows(out),
        )  # fmt: skip

    def index(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        indexer: indexing.Indexer,
        cache: LatentCache,
        row: int,
        batch: Batch,
    ) -> Tensor | None:
        assert cache.index is not None
        return indexing.index(self._native, _rows(q), _rows(k), _rows(w), indexer, cache.index, row, batch)

    def _experts(
        self,
        x: Tensor,
        weights: Experts,
        norm: Tensor,
        eps: float,
        counts: int = 0,
        ids: int = 0,
        gates: int = 0,
        residual: bool = True,
    ) -> Tensor:
        """counts, ids and gates are addresses, 0 for none."""
        x, norm = _rows(x), _vector(norm)
        tokens, hidden = x.shape
        out = torch.empty(tokens, hidden)
        self._native.moe(
            weights.native, native_rows(x), tokens, norm.data_ptr(), eps, native_rows(out), counts, ids,
            gates, residual,
        )  # fmt: skip
        return out

    def stack(self, layers: Sequence[LayerHandles]) -> Stack:
        return pack_stack(layers)

    def run_stack(
        self, h: Tensor, stack: Stack, batch: Batch, cache: LatentCache, eps: float, counts: Tensor | None
    ) -> Tensor:
        if self._file is not None:
            self._file.raise_damage()
        return run_layers(self._native, _rows(h), stack, batch, cache, eps, counts)

    def mlp(self, x: Tensor, weights: Experts, norm: Tensor, eps: float) -> Tensor:
        return self._experts(x, weights, norm, eps)

    def moe(
        self,
        x: Tensor,
        weights: Experts,
        norm: Tensor,
        eps: float,
        counts: Tensor | None = None,
        residual: bool = True,
    ) -> Tensor:
        seen = 0 if counts is None else counts.data_ptr()
        return self._experts(x, weights, norm, eps, seen, residual=residual)

    def moe_chosen(
        self, x: Tensor, weights: Experts, norm: Tensor, eps: float, ids: Tensor, gates: Tensor
    ) -> Tensor:
        assert weights.spec is not None
        if ids.shape != (x.shape[0], weights.spec.top_k) or gates.shape != ids.shape:
            raise ValueError(
                f"ids {list(ids.shape)} and gates {list(gates.shape)} do not fit; "
                f"expected [{x.shape[0]}, {weights.spec.top_k}], rows and experts a token"
            )
        ids, gates = ids.long().contiguous(), gates.float().contiguous()
        return self._experts(x, weights, norm, eps, ids=ids.data_ptr(), gates=gates.data_ptr())

    def reroute(self, weights: Experts, spec: RouterSpec) -> None:
        router = _router(spec)
        router.bias = weights.native.router.bias
        weights.native.router = router
        weights.spec = spec

    def route(self, n: Tensor, weights: Experts) -> tuple[Tensor, Tensor]:
        assert weights.spec is not None
        n = _rows(n)
        tokens, k = n.shape[0], weights.spec.top_k
        ids, gates = torch.empty(tokens, k, dtype=torch.int64), torch.empty(tokens, k)
        self._native.route(weights.native, native_rows(n), tokens, ids.data_ptr(), gates.data_ptr())
        return ids, gates

    def logits(self, x: Tensor, head: Linear, norm: Tensor, eps: float) -> Tensor:
        return self.linear(x, head, norm, eps)

    def top_logits(
        self, x: Tensor, head: Linear, norm: Tensor, eps: float, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if k > MOST_FUSED_TOP:
            return largest(self.logits(x, head, norm, eps), k)
        x, norm = _rows(x), _vector(norm)
        tokens = x.shape[0]
        values, ids = torch.empty(tokens, k), torch.empty(tokens, k, dtype=torch.int64)
        logsumexp = torch.empty(tokens)
        with _not_finite():
            self._native.top_logits(
                head.packed, native_rows(x), tokens, norm.data_ptr(), eps, k,
                values.data_ptr(), ids.data_ptr(), logsumexp.data_ptr(),
            )  # fmt: skip
        return values, ids, logsumexp

    def greedy(self, x: Tensor, head: Linear, norm: Tensor, eps: float) -> list[int]:
        x, norm = _rows(x), _vector(norm)
        with _not_finite():
            best: list[int] = self._native.greedy(
                head.packed, native_rows(x), x.shape[0], norm.data_ptr(), eps
            )
        return best

    def softmax(self, x: Tensor) -> Tensor:
        x = _rows(x)
        rows, n = x.shape
        out = torch.empty(rows, n)
        self._native.softmax(native_rows(x), rows, n, native_rows(out))
        return out


def _lazy(dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros in small pages that are allocated on first write: torch would write all of them now, and numpy
    would request huge pages, of which each layer's last would be mostly empty."""
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


@contextmanager
def _not_finite() -> Iterator[None]:
    try:
        yield
    except _native.NotFinite as error:
        raise NotFinite(*error.args) from None


def _missing() -> Any:
    raise ValueError("the packed file lacks a part of this layer; pack the model again")


def _router(spec: RouterSpec) -> Any:
    router = _native.Router()
    router.experts, router.top_k = spec.num_experts, spec.top_k
    router.identities = spec.identities
    router.groups, router.top_k_groups = spec.num_groups, spec.top_k_groups
    router.sigmoid, router.top2_sum = spec.scoring == "sigmoid", spec.group_score == "top2_sum"
    router.normalize, router.scale = spec.normalize, spec.scale
    router.mass = -1.0 if spec.mass is None else spec.mass
    router.min_experts = spec.min_experts
    return router
