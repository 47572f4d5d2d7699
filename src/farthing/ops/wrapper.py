"""A backend that wraps another and forwards every op it does not override.

`stack` and `greedy` keep their defaults: the inner backend's fused versions would bypass overridden ops.
`moe`, its packing and its routing are left to each wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from farthing.ops.api import (
    AttentionSpec,
    Batch,
    CacheDtype,
    GroupedParts,
    GroupedSpec,
    Handle,
    IndexCache,
    IndexerSpec,
    LatentCache,
    Ops,
)
from farthing.ops.sampling import Filters
from farthing.ops.weights import Weight


class OpsWrapper(Ops):
    """Forwards to `inner`."""

    def __init__(self, inner: Ops, name: str) -> None:
        self._inner, self.name = inner, name
        self.device, self.dtype = inner.device, inner.dtype

    @property
    def cache_dtype(self) -> CacheDtype:
        """The inner backend's choice."""
        return self._inner.cache_dtype

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]]) -> Handle:
        return self._inner.pack_linear(name, weights)

    def pack_head(self, name: str, weight: Callable[[], Weight]) -> Handle:
        return self._inner.pack_head(name, weight)

    def pack_output(self, name: str, weight: Callable[[], Weight], heads: int) -> Handle:
        return self._inner.pack_output(name, weight, heads)

    def pack_mlp(self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]]) -> Handle:
        return self._inner.pack_mlp(name, weights)

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Handle:
        return self._inner.pack_attention(name, spec, weights, rope)

    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> Handle:
        return self._inner.pack_grouped(spec, parts, rope)

    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> Handle:
        return self._inner.pack_indexer(name, spec, norm, rope)

    def new_index_cache(self, like: LatentCache, rows: int, width: int) -> IndexCache:
        return self._inner.new_index_cache(like, rows, width)

    def new_cache(
        self, layers: int, num_blocks: int, block_size: int, width: int, dtype: CacheDtype
    ) -> LatentCache:
        return self._inner.new_cache(layers, num_blocks, block_size, width, dtype)

    def forget(self, prefix: str) -> None:
        self._inner.forget(prefix)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return self._inner.embed(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._inner.rms_norm(x, weight, eps)

    def linear(
        self,
        x: Tensor,
        weight: Handle,
        norm: Tensor | None = None,
        eps: float = 1e-6,
        residual: Tensor | None = None,
    ) -> Tensor:
        return self._inner.linear(x, weight, norm, eps, residual)

    def mla(
        self,
        q: Tensor,
        kv: Tensor,
        attention: Handle,
        cache: LatentCache,
        layer: int,
        batch: Batch,
        eps: float,
        select: Tensor | None = None,
    ) -> Tensor:
        return self._inner.mla(q, kv, attention, cache, layer, batch, eps, select)

    def gqa(
        self, qkv: Tensor, heads: Handle, cache: LatentCache, row: int, batch: Batch, eps: float
    ) -> Tensor:
        return self._inner.gqa(qkv, heads, cache, row, batch, eps)

    def index(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        indexer: Handle,
        cache: LatentCache,
        row: int,
        batch: Batch,
    ) -> Tensor | None:
        return self._inner.index(q, k, w, indexer, cache, row, batch)

    def mlp(self, x: Tensor, weights: Handle, norm: Tensor, eps: float, residual: bool = True) -> Tensor:
        return self._inner.mlp(x, weights, norm, eps, residual)

    def logits(self, x: Tensor, head: Handle, norm: Tensor, eps: float) -> Tensor:
        return self._inner.logits(x, head, norm, eps)

    def top_logits(
        self, x: Tensor, head: Handle, norm: Tensor, eps: float, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._inner.top_logits(x, head, norm, eps, k)

    def sample(self, logits: Tensor, uniform: Tensor, filters: Filters | None = None) -> Tensor:
        return self._inner.sample(logits, uniform, filters)
