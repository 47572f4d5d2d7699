"""Experts on the host, everything else on the device (`--experts-on cpu`).

One GPU rarely holds a mixture of experts, whose routed experts are most of the weights and least of the use:
a token passes a few of them. Here the device computes attention, dense layers, routers and shared experts;
the host's kernels compute routed experts where their packed weights lie (a mapped file, if there is one), and
the experts used most have copies on the device.

A layer's step without hot experts: hidden states go to the host, which norms, routes and computes in one call
of its kernels while the device computes the shared expert; the sum comes back. With hot ones the device
routes, and choices and weights go along: the host computes the experts that are not hot, in one call too, and
the device the hot ones. Only hidden states cross the bus, never weights, but for an expert that becomes hot:
it is read and packed in a thread of its own while steps go on without it.

Legend: T tokens; D hidden size; E experts; k experts a token; R chosen (token, expert) pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from farthing.ops.api import (
    CacheDtype,
    Handle,
    HostOps,
    MoEWeights,
    Ops,
    RouterSpec,
)
from farthing.ops.around import OpsAround
from farthing.ops.crossing import Copies, Crossing
from farthing.ops.hot import HotExperts
from farthing.ops.reference import route
from farthing.ops.weights import Weight

DECIDE_EVERY = 16  # steps of a layer between two looks at its hot experts
Gated = tuple[Weight, Weight, Weight]
Pair = tuple[Handle, Handle]  # an expert on the device: gate and up stacked, down


@dataclass(frozen=True, slots=True)
class Rows:
    """Chosen pairs of a step in the order of their experts, then tokens."""

    tokens: NDArray[np.int64]  # [R]
    slots: NDArray[np.int64]  # [R], which of a token's k choices
    parts: dict[int, slice]  # by expert, ascending


@dataclass(slots=True)
class Hot:
    """A layer's experts on the device."""

    books: HotExperts
    handles: dict[int, Pair] = field(default_factory=dict)
    leaving: int | None = None  # out of the books; its weights may still be in use
    coming: int | None = None
    loaded: Future[Pair] | None = None
    steps: int = 0

    def serving(self) -> dict[int, Pair]:
        """What the device computes in the step that begins."""
        return {expert: pair for expert, pair in self.handles.items() if expert != self.leaving}


@dataclass(slots=True)
class HybridMoE:
    """A layer's mixture of experts on both sides."""

    name: str
    spec: RouterSpec
    gate: Tensor  # [E, D] float32, on the device
    bias: Tensor | None  # [E]
    loads: Sequence[Callable[[], Gated] | None]
    routed: Handle  # as the host packs them
    shared: Handle | None  # on the device
    hot: Hot
    norm: Tensor | None = None  # the layer's, on the host


class HybridOps(OpsAround):
    """`device` for everything but routed experts, which `host` computes. Both keep their own formats."""

    def __init__(self, device: Ops, host: Ops, hot_experts: int = 0) -> None:
        """hot_experts: copies on the device in every layer, at most."""
        if not isinstance(host, HostOps):
            raise ValueError(f"experts are on {host.name!r}; expected a backend of the CPU")
        hot = f", {hot_experts} hot" if hot_experts else ""
        super().__init__(device, f"{device.name}; experts on {host.name}{hot}")
        self._host: HostOps = host
        self._capacity = hot_experts
        self.packed_from = host.packed_from
        host.routed_only = True
        self._crossing = Crossing(self.device)
        self._computing = ThreadPoolExecutor(1, "farthing-experts")
        self._loading = ThreadPoolExecutor(1, "farthing-hot")

    @property
    def cache_dtype(self) -> CacheDtype:
        return self._inner.cache_dtype

    def coarse(self) -> Self:
        device, host = self._inner.coarse(), self._host.coarse()
        if device is self._inner and host is self._host:
            return self
        other = copy(self)
        other._inner, other._host = device, host
        return other

    # -- the mixture of experts

    def pack_moe(self, name: str, spec: RouterSpec, weights: Callable[[], MoEWeights]) -> HybridMoE:
        w = weights()
        return HybridMoE(
            name,
            spec,
            w.gate.float().to(self.device),
            None if w.bias is None else w.bias.float().to(self.device),
            w.experts,
            self._host.pack_moe(name, spec, lambda: replace(w, shared=None)),
            None if w.shared is None else self._inner.pack_mlp(f"{name}.shared_experts", w.shared),
            Hot(HotExperts(min(self._capacity, spec.num_experts))),
        )

    def moe(
        self, x: Tensor, weights: HybridMoE, norm: Tensor, eps: float, counts: Tensor | None = None
    ) -> Tensor:
        host_norm = weights.norm = norm.cpu() if weights.norm is None else weights.norm
        if not self._capacity:
            seen = None if counts is None else torch.zeros(len(counts), dtype=torch.int64)
            computed = self._begin(self._all, self._crossing.down(x=x), weights.routed, host_norm, eps, seen)
            out = self._shared(x, weights, norm, eps)
            routed = self._crossing.up(computed())
            if counts is not None and seen is not None:
                counts += seen.to(self.device)
            return (out + routed).to(self.dtype)  # summed in float32, rounded once
        n = self._inner.rms_norm(x, norm, eps)
        ids, gates = self.route(n, weights)
        if counts is not None:
            chosen = ids.flatten()
            counts.scatter_add_(0, chosen.clamp_min(0), (chosen >= 0).to(counts.dtype))
        here, hot = self._crossing.down(x=x, ids=ids, gates=gates), weights.hot.serving()
        computed = self._begin(self._cold, here, weights.routed, host_norm, eps, hot)
        out = self._shared(x, weights, norm, eps)
        rows = rows_of(here["ids"].numpy())
        self._follow(weights, rows)
        out = out + self._on_device(n, gates, rows, hot)
        return (out + self._crossing.up(computed())).to(self.dtype)

    def _shared(self, x: Tensor, weights: HybridMoE, norm: Tensor, eps: float) -> Tensor:
        """x and the shared expert. x may be overwritten."""
        return x if weights.shared is None else self._inner.mlp(x, weights.shared, norm, eps)

    def _begin(self, compute: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
        """The host's part. Its result is asked for when the device has been given its own.

        CUDA works by itself once it has been told what to do, so this thread is free then. A CPU as the
        device does not: the host's part gets a thread.
        """
        if self.device.type == "cuda":
            return partial(compute, *arguments)
        return self._computing.submit(compute, *arguments).result

    @torch.inference_mode()
    def _all(self, here: Copies, routed: Handle, norm: Tensor, eps: float, seen: Tensor | None) -> Tensor:
        """The sum of all routed experts [T, D] float32; seen [E] gains their tokens."""
        x = here["x"].float()
        return self._host.moe(x.clone(), routed, norm, eps, seen).float() - x

    @torch.inference_mode()
    def _cold(self, here: Copies, routed: Handle, norm: Tensor, eps: float, hot: Collection[int]) -> Tensor:
        """The sum of the experts that are not hot [T, D] float32."""
        x, ids = here["x"].float(), here["ids"]
        cold = ids.masked_fill(torch.isin(ids, torch.tensor(list(hot), dtype=ids.dtype)), -1)
        return self._host.moe_chosen(x.clone(), routed, norm, eps, cold, here["gates"]).float() - x

    def _on_device(self, n: Tensor, gates: Tensor, rows: Rows, hot: Mapping[int, Pair]) -> Tensor:
        """The sum of the hot experts [T, D] float32."""
        out = torch.zeros_like(n, dtype=torch.float32)
        chosen = [(hot[expert], part) for expert, part in rows.parts.items() if expert in hot]
        if not chosen:
            return out
        tokens, slots = self._crossing.index(rows.tokens), self._crossing.index(rows.slots)
        weight = gates[tokens, slots, None]
        for (gate_up, down), part in chosen:
            # One expert at a time: a sum over all rows at once would have no fixed order on a GPU.
            gate, up = self._inner.linear(n[tokens[part]], gate_up).chunk(2, -1)
            y = self._inner.linear(F.silu(gate) * up, down)
            out.index_add_(0, tokens[part], y.float() * weight[part])
        return out

    def reroute(self, weights: HybridMoE, spec: RouterSpec) -> None:
        weights.spec = spec
        self._host.reroute(weights.routed, spec)

    def route(self, n: Tensor, weights: HybridMoE) -> tuple[Tensor, Tensor]:
        """In plain torch on the device: both sides follow one choice."""
        return route(F.linear(n.float(), weights.gate), weights.bias, weights.spec)

    # -- hot experts

    def _follow(self, weights: HybridMoE, rows: Rows) -> None:
        """Count a step, take in an expert that has arrived, send for another.

        The copies to the host are done, and so is all that the device computed before them: weights that left
        in an earlier step are not in use any more.
        """
        hot = weights.hot
        hot.books.record({expert: part.stop - part.start for expert, part in rows.parts.items()})
        hot.steps += 1
        if hot.coming is None:
            if hot.steps % DECIDE_EVERY == 0 and (swap := hot.books.decide()):
                hot.leaving, hot.coming = swap
        elif hot.loaded is None:
            if hot.leaving is not None:
                del hot.handles[hot.leaving]
                self._inner.forget(f"{weights.name}.hot.{hot.leaving}.")
                hot.leaving = None
            hot.loaded = self._loading.submit(self._load, weights, hot.coming)
        elif hot.loaded.done():
            hot.handles[hot.coming] = hot.loaded.result()
            hot.books.arrived(hot.coming)
            hot.coming = hot.loaded = None

    def _load(self, weights: HybridMoE, expert: int) -> Pair:
        load, name = weights.loads[expert], f"{weights.name}.hot.{expert}"
        assert load is not None
        with torch.inference_mode(), self._crossing.beside():
            gate, up, down = load()
            return (
                self._inner.pack_linear(f"{name}.gate_up", lambda: [gate, up]),
                self._inner.pack_linear(f"{name}.down", lambda: [down]),
            )

    def settle(self) -> None:
        """Wait for experts on their way to the device; the next step of their layer takes them in."""
        self._loading.submit(int).result()

    def forget(self, prefix: str) -> None:
        super().forget(prefix)
        self._host.forget(prefix)


def rows_of(ids: NDArray[np.int64]) -> Rows:
    """ids [T, k], -1 for none."""
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.searchsorted(flat[order], 0) :]
    experts = flat[order]
    starts = np.flatnonzero(np.diff(experts, prepend=-1)).tolist()
    tokens, slots = np.divmod(order, ids.shape[1])
    edges = itertools.pairwise([*starts, len(order)])
    return Rows(tokens, slots, {e: slice(*at) for e, at in zip(experts[starts].tolist(), edges, strict=True)})
