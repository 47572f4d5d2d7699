"""The torch backend: every op on any device torch runs on (`--backend torch --device xpu`).

The reference's arithmetic, arranged for speed: sequences that decode attend together and experts compute all
their tokens at once; once a single sequence decodes, its layers are compiled in the background. Tested on
CPUs only. A new accelerator starts from here, before it has kernels (docs/design/backends.md).
Legend: see `farthing.ops.api`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops import grouped
from farthing.ops.api import (
    ALL,
    AttentionSpec,
    Batch,
    GroupedParts,
    GroupedSpec,
    IndexerSpec,
    LatentCache,
    LayerHandles,
    MoEWeights,
    RouterSpec,
)
from farthing.ops.cache import write_cache
from farthing.ops.copies import DeviceCopies
from farthing.ops.indexer import Indexer
from farthing.ops.reference import ReferenceOps
from farthing.ops.selection import chosen, in_rows
from farthing.ops.torch_step import (
    Experts,
    Heads,
    Mlp,
    Span,
    absorbed,
    attend,
    attend_expanded,
    dense_output,
    expert_output,
    gated,
    gathered,
    mixture,
    normed,
    queries,
    rotated,
    spans,
    values,
)
from farthing.ops.weights import Weight

log = logging.getLogger(__name__)

COMPILER = "compile layers"  # name of the thread that does
# On CPUs: loops over fewer elements per thread than this are faster on one thread.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.min_chunk_size": 16384}
_COMPILE_AFTER = 32  # single-token steps: a short generation ends before compiled layers repay their time


@dataclass(frozen=True, slots=True)
class Step:
    """One token through a layer, compiled."""

    queries: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dense_output: Callable[..., Tensor]
    expert_output: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(slots=True, eq=False)
class Stack:
    """Layers computed in one call."""

    layers: tuple[LayerHandles, ...]
    compilable: bool  # experts are stacked, and no input is rounded
    steps: int = 0  # single-token steps so far
    compiled: Step | None = None


class TorchOps(ReferenceOps):
    """Every op on one device; activations are `dtype`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> None:
        super().__init__(dtype, quantization)
        self.device = device
        self.name = f"torch/{device} {str(dtype).removeprefix('torch.')}"
        self._here = DeviceCopies(device)
        disabled = os.environ.get("TORCH_COMPILE_DISABLE") == "1"  # torch's own variable
        self.compile_after = None if disabled else _COMPILE_AFTER
        self.compiling: threading.Thread | None = None

    # -- packing

    def _value(self, weight: Weight, mlp: bool = False) -> Tensor:
        return super()._value(weight, mlp).to(self.device)

    def pack_mlp(self, name: str, weights: Callable[[], tuple[Weight, Weight, Weight]]) -> Any:
        gate, up, down = super().pack_mlp(name, weights)
        if not (isinstance(gate, Tensor) and isinstance(up, Tensor) and isinstance(down, Tensor)):
            return gate, up, down
        return torch.cat((gate, up)), down

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> Any:
        w = weights()
        experts: list[Mlp | None] = [None if e is None else self.pack_mlp(name, e) for e in w.experts]
        shared = None if w.shared is None else self.pack_mlp(name, w.shared)
        pairs = [e for e in experts if e is not None and len(e) == 2]
        stacked = None
        if len(pairs) == len(experts):
            stacked = torch.stack([e[0] for e in pairs]), torch.stack([e[1] for e in pairs])
            experts = []
        bias = None if w.bias is None else w.bias.float().to(self.device)
        return Experts(spec, w.gate.float().to(self.device), bias, experts, shared, stacked)

    def pack_attention(
        self, name: str, spec: AttentionSpec, weights: Callable[[], tuple[Weight, Tensor]], rope: Tensor
    ) -> Any:
        kv_b, norm = weights()
        heads = self._value(kv_b).view(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        w_uk, w_uv = heads.split((spec.nope_dim, spec.value_dim), dim=1)
        return Heads(
            spec,
            w_uk.contiguous(),
            w_uv.transpose(1, 2).contiguous(),
            norm.to(self.device, self.dtype),
            self._here(rope),
        )

    def pack_grouped(self, spec: GroupedSpec, parts: GroupedParts, rope: Tensor) -> grouped.Grouped:
        return grouped.pack_grouped(spec, parts, rope, self._here)

    def pack_indexer(
        self, name: str, spec: IndexerSpec, norm: Callable[[], tuple[Tensor, Tensor]], rope: Tensor
    ) -> Indexer:
        weight, bias = (part.float().to(self.device) for part in norm())
        return Indexer(spec, weight, bias, self._here(rope))

    # -- computing op by op

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, self._here(table)).to(self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return normed(x, self._here(weight), eps)

    def mla(
        self,
        q: Tensor,
        kv: Tensor,
        attention: Any,
        cache: LatentCache,
        layer: int,
        batch: Batch,
        eps: float,
        select: Tensor | None = None,
    ) -> Tensor:
        if select is None:
            return self._attention(q, kv, attention, cache, layer, batch, eps, spans(batch, cache.block_size))
        reads = chosen(select, batch, cache.block_size)
        rank = torch.arange(reads.slots.shape[1], device=q.device)
        seen = (rank < reads.counts[:, None])[:, None]
        plan = [Span(0, q.shape[0], reads.slots.long(), seen)]
        return self._attention(q, kv, attention, in_rows(cache), layer, batch, eps, plan)

    def gqa(
        self, qkv: Tensor, heads: grouped.Grouped, cache: LatentCache, row: int, batch: Batch, eps: float
    ) -> Tensor:
        return self._grouped(qkv, heads, cache, row, batch, eps, spans(batch, cache.block_size))

    def _grouped(
        self, qkv: Tensor, g: grouped.Grouped, cache: LatentCache, row: int, batch: Batch, eps: float,
        plan: list[Span],
    ) -> Tensor:  # fmt: skip
        q, k, v = grouped.prepared(qkv, g, batch.positions.long(), eps)
        grouped.write_heads(cache, row, batch.slots, k, v)
        parts = []
        for p in plan:
            keys, read = grouped.read_heads(cache, row, g.spec.kv_heads, p.slots)
            parts.append(grouped.attend(q[p.start : p.stop], keys, read, p.seen, g.spec))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attention(
        self, q: Tensor, kv: Tensor, a: Heads, cache: LatentCache, layer: int, batch: Batch, eps: float,
        plan: list[Span],
    ) -> Tensor:  # fmt: skip
        q_nope, q_pe, latent, k_pe = rotated(q, kv, a, batch.positions.long(), eps)
        write_cache(cache, layer, batch.slots, latent, k_pe)
        parts = []
        for p in plan:
            keys = _keys(cache, layer, p.slots, a.spec)
            nope, pe = q_nope[p.start : p.stop], q_pe[p.start : p.stop]
            if len(p.slots) == 1 and p.stop - p.start >= a.expand_from:
                parts.append(attend_expanded(nope, pe, keys, p.seen, a, self.dtype))
            else:
                parts.append(values(attend(absorbed(nope, pe, a), keys, p.seen, a.spec), a, self.dtype))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def mlp(self, x: Tensor, weights: Mlp, norm: Tensor, eps: float, residual: bool = True) -> Tensor:
        out = gated(self.rms_norm(x, norm, eps), weights)
        return x + out if residual else out

    def _experts(
        self, x: Tensor | None, n: Tensor, weights: Any, ids: Tensor, gates: Tensor, counts: Tensor | None
    ) -> Tensor:
        out = mixture(n, weights, ids, gates, counts).to(self.dtype)
        return out if x is None else x + out

    # -- computing layers

    def stack(self, layers: Sequence[LayerHandles]) -> Stack:
        found = tuple(map(self._layer_here, layers))
        return Stack(found, all(map(_compilable, found)))

    def _layer_here(self, layer: LayerHandles) -> LayerHandles:
        q_norm = None if layer.q_norm is None else self._here(layer.q_norm)
        norm, feed_norm = self._here(layer.norm), self._here(layer.feed_norm)
        bias = None if layer.o_bias is None else self._here(layer.o_bias)
        return replace(layer, norm=norm, feed_norm=feed_norm, q_norm=q_norm, o_bias=bias)

    def run_stack(
        self, h: Tensor, stack: Stack, batch: Batch, cache: LatentCache, eps: float, counts: Tensor | None,
        span: slice = ALL,
    ) -> Tensor:  # fmt: skip
        plan = spans(batch, cache.block_size)
        # A compiled function takes any number of cached tokens except 1, which torch.compile specializes.
        single = len(h) == 1 and plan[0].slots.shape[1] > 1
        if single and stack.compilable and span == ALL:
            if stack.compiled is not None:
                return _one_token(h, stack, stack.compiled, batch, plan[0], cache, eps, counts)
            self._count_step(stack, h, eps)
        for i in range(*span.indices(len(stack.layers))):
            h = self._layer(
                h, stack.layers[i], batch, cache, i, eps, None if counts is None else counts[i], plan
            )
        return h

    def _layer(
        self, h: Tensor, layer: LayerHandles, batch: Batch, cache: LatentCache, index: int, eps: float,
        counts: Tensor | None, plan: list[Span],
    ) -> Tensor:  # fmt: skip
        qkv = self.linear(h, layer.qkv_a, layer.norm, eps)
        if isinstance(layer.heads, grouped.Grouped):
            mixed = self._grouped(qkv, layer.heads, cache, index * layer.rows, batch, eps, plan)
        else:
            q, kv = qkv[:, : layer.q_width], qkv[:, layer.q_width :]
            if layer.q_b is not None:
                q = self.linear(q, layer.q_b, layer.q_norm, eps)
            mixed = self._attention(q, kv, layer.heads, cache, index, batch, eps, plan)
        h = self.linear(mixed, layer.o, residual=h if layer.o_bias is None else h + layer.o_bias.to(h.dtype))
        if not isinstance(layer.feed, Experts):
            return self.mlp(h, layer.feed, layer.feed_norm, eps)
        experts: Any = layer.feed
        return self.moe(h, experts, layer.feed_norm, eps, counts)

    # -- compiling

    def _count_step(self, stack: Stack, h: Tensor, eps: float) -> None:
        """Start to compile a stack's layers when enough steps have used it. Meanwhile steps run eagerly."""
        stack.steps += 1
        if stack.steps == self.compile_after:
            example = torch.zeros_like(h)
            self.compiling = threading.Thread(
                target=self._compile,
                args=(stack, example, eps, self.compiling),
                name=COMPILER,
                daemon=True,
            )
            self.compiling.start()

    def _compile(self, stack: Stack, h: Tensor, eps: float, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        started = time.monotonic()
        log.info("compiling %d layers in the background", len(stack.layers))
        try:
            stack.compiled = compiled_step(stack.layers, h, eps)
        except Exception as error:  # torch and its compilers raise many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("torch.compile does not work on %s: %s", self.device, reason[0][:200])
        else:
            log.info("compiled %d layers in %.0f s", len(stack.layers), time.monotonic() - started)


def compiled_step(layers: Sequence[LayerHandles], h: Tensor, eps: float) -> Step:
    """The functions of `torch_step`, compiled for these layers; h [1, D] is an example.

    The number of cached tokens is dynamic, all other shapes are constants. Layers of one shape share code.
    """
    compiled = partial(torch.compile, dynamic=False, options=_OPTIONS)
    step = Step(compiled(queries), compiled(dense_output), compiled(expert_output))
    with torch.inference_mode():  # guards distinguish its tensors from others
        position = torch.zeros(1, dtype=torch.int64, device=h.device)
        for layer in layers:
            query, latent, k_pe = step.queries(h, layer, position, eps)
            keys = torch.zeros(1, 24, latent.shape[1] + k_pe.shape[1], device=h.device)
            torch._dynamo.mark_dynamic(keys, 1)  # type: ignore[no-untyped-call]
            output = step.expert_output if isinstance(layer.feed, Experts) else step.dense_output
            output(h, query, keys, layer, eps)
    return step


def _one_token(
    h: Tensor, stack: Stack, step: Step, batch: Batch, span: Span, cache: LatentCache, eps: float,
    counts: Tensor | None,
) -> Tensor:  # fmt: skip
    """`TorchOps.run_stack` of one token with compiled functions."""
    positions = batch.positions.long()
    for i, layer in enumerate(stack.layers):
        query, latent, k_pe = step.queries(h, layer, positions, eps)
        write_cache(cache, i, batch.slots, latent, k_pe)
        keys = _keys(cache, i, span.slots, layer.heads.spec)
        if not isinstance(layer.feed, Experts):
            h = step.dense_output(h, query, keys, layer, eps)
            continue
        h, ids, used = step.expert_output(h, query, keys, layer, eps)
        if counts is not None:
            counts[i].scatter_add_(0, ids, used)
    return h


def _keys(cache: LatentCache, layer: int, slots: Tensor, spec: AttentionSpec) -> Tensor:
    scale = None if cache.scale is None else cache.scale[layer].flatten(0, 1)
    return gathered(cache.data[layer].flatten(0, 1), scale, slots, spec.latent_dim)


def _compilable(layer: LayerHandles) -> bool:
    if isinstance(layer.heads, grouped.Grouped):
        return False
    matrices = [layer.qkv_a, layer.o, *(() if layer.q_b is None else (layer.q_b,))]
    feed = layer.feed
    if isinstance(feed, Experts) and feed.stacked is None:
        return False
    mlp = feed.shared if isinstance(feed, Experts) else feed
    return all(isinstance(m, Tensor) for m in matrices) and (mlp is None or len(mlp) == 2)


def create(
    dtype: torch.dtype | None,
    threads: int | None,
    quantization: str | None,
    packed: str | None,
    device: str | None = None,
) -> TorchOps:
    """The backend's factory (see `farthing.ops.select`); device None: the accelerator, or else the CPU."""
    if packed is not None:
        raise ValueError(f"packed: got {packed!r} with backend 'torch'; expected None, or backend 'cpu'")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    default = "cpu" if accelerator is None else accelerator.type
    try:
        found = torch.device(device or default)
        torch.ones(1, device=found).item()  # fails on `meta`, which has no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        here = "cpu" if accelerator is None else f"cpu or {default}"
        raise ValueError(f"device: got {device!r}; expected {here}, which this torch can use here") from None
    if threads is not None and found.type == "cpu":
        torch.set_num_threads(threads)
    kind = dtype or (torch.float32 if found.type == "cpu" else torch.bfloat16)
    return TorchOps(found, kind, quantization)
