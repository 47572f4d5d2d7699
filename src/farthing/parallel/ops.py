"""A backend whose weights are spread over ranks: the same signatures, with the sums between ranks inside.

The model is written once. What tensor parallelism adds is a sum after each row-parallel product (o_proj,
down_proj) and a gather of the head's logits; what expert parallelism adds is the sum over a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from farthing.ops import AttentionSpec, Batch, LatentCache, MoEWeights, Ops, RouterSpec, Weight
from farthing.ops.api import CacheDtype, Handle
from farthing.parallel.group import Group


class ParallelOps(Ops):
    """`inner` on this rank's slices; `tp` shares heads and vocabulary, `experts` the routed experts."""

    def __init__(self, inner: Ops, tp: Group, experts: Group) -> None:
        self._inner, self._tp, self._experts = inner, tp, experts
        self.name = f"{inner.name}, tp {tp.size}, experts over {experts.size}"
        self.device, self.dtype = inner.device, inner.dtype

    def pack_linear(self, name: str, weights: Callable[[], Sequence[Weight]]) -> Handle:
        return self._inner.pack_linear(name, weights)

    def pack_mlp(self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]]) -> Handle:
        return self._inner.pack_mlp(name, weights)

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Handle:
        return self._inner.pack_moe(name, spec, weights)

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Handle:
        return self._inner.pack_attention(name, spec, weights, rope)

    def new_cache(
        self, layers: int, num_blocks: int, block_size: int, width: int, dtype: CacheDtype
    ) -> LatentCache:
        return self._inner.new_cache(layers, num_blocks, block_size, width, dtype)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        if self._tp.size == 1:
            return self._inner.embed(ids, table)
        local = ids - self._tp.index * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        rows = self._inner.embed(local.where(here, 0), table)
        return self._tp.all_reduce(rows.masked_fill(~here.unsqueeze(1), 0))

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
        """A product with a residual is the row-parallel one: its input is this rank's heads."""
        if residual is None:
            return self._inner.linear(x, weight, norm, eps)
        own = residual if self._tp.index == 0 else None
        return self._tp.all_reduce(self._inner.linear(x, weight, norm, eps, own))

    def mla(
        self,
        q: Tensor,
        kv: Tensor,
        attention: Handle,
        cache: LatentCache,
        layer: int,
        batch: Batch,
        eps: float,
    ) -> Tensor:
        return self._inner.mla(q, kv, attention, cache, layer, batch, eps)

    def mlp(self, x: Tensor, weights: Handle, norm: Tensor, eps: float) -> Tensor:
        if self._tp.size == 1:
            return self._inner.mlp(x, weights, norm, eps)
        return x + self._tp.all_reduce(self._inner.mlp(x.clone(), weights, norm, eps) - x)

    def moe(
        self, x: Tensor, weights: Handle, norm: Tensor, eps: float, counts: Tensor | None = None
    ) -> Tensor:
        if self._experts.size == 1:
            return self._inner.moe(x, weights, norm, eps, counts)
        return x + self._experts.all_reduce(self._inner.moe(x.clone(), weights, norm, eps, counts) - x)

    def reroute(self, weights: Handle, spec: RouterSpec) -> None:
        self._inner.reroute(weights, spec)

    def route(self, n: Tensor, weights: Handle) -> tuple[Tensor, Tensor]:
        return self._inner.route(n, weights)

    def logits(self, x: Tensor, head: Handle, norm: Tensor, eps: float) -> Tensor:
        return torch.cat(self._tp.all_gather(self._inner.logits(x, head, norm, eps)), -1)

    def top_logits(
        self, x: Tensor, head: Handle, norm: Tensor, eps: float, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._tp.size == 1:
            return self._inner.top_logits(x, head, norm, eps, k)
        logits = self.logits(x, head, norm, eps)
        values, ids = logits.sort(stable=True, dim=-1, descending=True)
        return values[:, :k], ids[:, :k], logits.logsumexp(-1)

    def softmax(self, x: Tensor) -> Tensor:
        return self._inner.softmax(x)
