"""Experts on the host, everything else on the device (`--experts-on cpu`).

Routed experts hold most of the weights but each token uses only a few, so a single GPU rarely fits them
all. The device computes attention, dense layers, routers and shared experts. The host's kernels compute
routed experts directly from their packed weights (a mapped file where available). The most used ("hot")
experts also have copies on the device.

Without hot experts, hidden states go to the host, which normalizes, routes and computes in one kernel call
while the device computes the shared expert; the sum comes back. With hot experts the device routes and
sends expert ids and gate weights along: the host computes the cold experts in one call and the device the
hot ones. Only hidden states cross the bus. The exception is an expert that becomes hot: a background
thread reads and packs it while steps continue without it.

Legend: T tokens; D hidden size; E experts; k experts per token; R chosen (token, expert) pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from farthing.ops.api import Handle, HostOps, Norm, Ops
from farthing.ops.reference import gated_by, route, scaled_choice, shared_weight
from farthing.ops.specs import Gate, MoEWeights, RouterSpec
from farthing.ops.weights import Weight

Method = TypeVar("Method", bound=Callable[..., Any])


def forwarded(method: Method) -> Method:
    """The wrapped backend's method of this name, found without a call of its own."""
    return cast(Method, property(attrgetter(f"_inner.{method.__name__}")))


class OpsWrapper(Ops):
    """A backend that forwards to `inner` what a subclass does not override.

    `stack` and `greedy` keep their defaults: the inner backend's fused versions would bypass overridden ops.
    `moe`, its packing and its routing are left to each wrapper.
    """

    def __init__(self, inner: Ops, name: str) -> None:
        self._inner, self.name = inner, name
        self.device, self.dtype, self.cache_dtype = inner.device, inner.dtype, inner.cache_dtype

    pack_linear = forwarded(Ops.pack_linear)
    pack_table = forwarded(Ops.pack_table)
    pack_head = forwarded(Ops.pack_head)
    pack_mlp = forwarded(Ops.pack_mlp)
    pack_attention = forwarded(Ops.pack_attention)
    pack_grouped = forwarded(Ops.pack_grouped)
    pack_indexer = forwarded(Ops.pack_indexer)
    new_cache = forwarded(Ops.new_cache)
    zeros = forwarded(Ops.zeros)
    pack_delta = forwarded(Ops.pack_delta)
    pack_compressed = forwarded(Ops.pack_compressed)
    pack_streams = forwarded(Ops.pack_streams)
    compressed = forwarded(Ops.compressed)
    collapse = forwarded(Ops.collapse)
    spread = forwarded(Ops.spread)
    forget = forwarded(Ops.forget)
    embed = forwarded(Ops.embed)
    rms_norm = forwarded(Ops.rms_norm)
    linear = forwarded(Ops.linear)
    mla = forwarded(Ops.mla)
    gqa = forwarded(Ops.gqa)
    delta = forwarded(Ops.delta)
    index = forwarded(Ops.index)
    mlp = forwarded(Ops.mlp)
    logits = forwarded(Ops.logits)
    top_logits = forwarded(Ops.top_logits)
    sample = forwarded(Ops.sample)


def shared_output(
    ops: Ops, x: Tensor, mlp: Handle, gate: Tensor | None, norm: Norm, residual: bool = True
) -> Tensor:
    """`Ops.mlp` of a shared expert that may have a gate [1, D]."""
    if gate is None:
        return ops.mlp(x, mlp, norm) if residual else ops.mlp(x, mlp, norm, residual=False)
    out = ops.mlp(x, mlp, norm, residual=False).float() * shared_weight(ops.rms_norm(x, norm), gate)
    return x + out.to(x.dtype) if residual else out.to(x.dtype)


MARGIN = 1.25
HALF_LIFE = 256  # steps after which a token counts half
_RESCALE = 1e12


class ExpertCache:
    """Cache state of one layer: `resident` experts are on the device, `loading` ones are in flight.

    Use is counted in tokens and decays exponentially, so the set follows the traffic. An expert replaces
    another only if it is used clearly more (MARGIN), because a replacement transfers the expert's weights.
    """

    def __init__(self, capacity: int, half_life: float = HALF_LIFE) -> None:
        """capacity: maximum number of resident and loading experts together."""
        self.capacity = capacity
        self.resident: set[int] = set()
        self.loading: set[int] = set()
        self._growth = 2.0 ** (1 / half_life)
        self._weight = 1.0  # weight of a token in the current step; grows so that earlier counts decay
        self._use: dict[int, float] = {}

    def record(self, tokens: Mapping[int, int]) -> None:
        """Count one step's tokens per expert."""
        self._weight *= self._growth
        if self._weight > _RESCALE:
            self._use = {expert: use / self._weight for expert, use in self._use.items()}
            self._weight = 1.0
        for expert, count in tokens.items():
            self._use[expert] = self._use.get(expert, 0.0) + count * self._weight

    def use(self, expert: int) -> float:
        """Decayed token count."""
        return self._use.get(expert, 0.0) / self._weight

    def decide(self) -> tuple[int | None, int] | None:
        """(expert to evict or None, expert to load), or None if no replacement is worth a transfer.

        The evicted expert leaves `resident` at once; `loaded` completes the load of the other.
        """
        outside = [e for e in self._use if e not in self.resident and e not in self.loading]
        if not outside or self.capacity == 0:
            return None
        best = max(outside, key=lambda e: (self._use[e], -e))
        evicted = None
        if len(self.resident) + len(self.loading) >= self.capacity:
            if not self.resident:
                return None
            evicted = min(self.resident, key=lambda e: (self.use(e), e))
            if self.use(best) <= MARGIN * self.use(evicted):
                return None
            self.resident.remove(evicted)
        self.loading.add(best)
        return evicted, best

    def loaded(self, expert: int) -> None:
        """The expert's weights are on the device."""
        self.loading.remove(expert)
        self.resident.add(expert)


@dataclass(frozen=True, slots=True)
class HostCopies:
    """One step's tensors on the host."""

    tensors: Mapping[str, Tensor]
    done: Any = None  # a CUDA event

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, after waiting for its copy."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensors[name]


class HostTransfer:
    """Pinned memory and asynchronous copies on CUDA; plain clones on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._pinned: dict[str, Tensor] = {}
        self._side: Any = None

    def to_host(self, **tensors: Tensor) -> HostCopies:
        """Queue copies to the host. They precede whatever the device computes next."""
        if not self._cuda:  # the device may overwrite the tensors while the host reads
            return HostCopies({name: t.clone() for name, t in tensors.items()})
        copies = {name: self._buffer(name, t).copy_(t, non_blocking=True) for name, t in tensors.items()}
        done = torch.cuda.Event()
        done.record()
        return HostCopies(copies, done)

    def to_device(self, x: Tensor) -> Tensor:
        """Copy to the device. A later `to_host` has already waited for the previous use of the buffer."""
        if not self._cuda:
            return x
        return self._buffer("to_device", x).copy_(x).to(self._device, non_blocking=True)

    def indices(self, rows: NDArray[np.int64]) -> Tensor:
        """Row indices on the device."""
        return torch.from_numpy(rows).to(self._device, non_blocking=True)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run copies of weights on a separate stream; they are complete when the block ends."""
        if not self._cuda:
            yield
            return
        self._side = self._side or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._side):
            yield
        self._side.synchronize()

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """A pinned buffer with the tensor's shape, reused across calls and grown when too small."""
        buffer = self._pinned.get(name)
        if buffer is None or buffer.numel() < like.numel() or buffer.dtype != like.dtype:
            buffer = self._pinned[name] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
        return buffer[: like.numel()].view(like.shape)


DECIDE_EVERY = 16  # steps between two reviews of a layer's hot experts
Gated = tuple[Weight, Weight, Weight]


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's chosen pairs, ordered by expert, then token."""

    tokens: NDArray[np.int64]  # [R]
    slots: NDArray[np.int64]  # [R], index among a token's k choices
    parts: dict[int, slice]  # by expert, ascending


@dataclass(frozen=True, slots=True)
class HotExpert:
    """An expert on the device."""

    gate_up: Handle
    down: Handle
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __call__(self, ops: Ops, x: Tensor, activation: Gate) -> Tensor:
        """Its output [T, D] for normed inputs."""
        both = ops.linear(x, self.gate_up)
        gate, up = (both if self.gate_up_bias is None else both + self.gate_up_bias).chunk(2, -1)
        y = ops.linear(gated_by(activation, gate, up), self.down)
        return y if self.down_bias is None else y + self.down_bias


@dataclass(slots=True)
class HotExperts:
    """A layer's experts on the device."""

    cache: ExpertCache
    handles: dict[int, HotExpert] = field(default_factory=dict)
    evicted: int | None = None  # no longer resident; its weights may still be in use
    loading: int | None = None
    load: Future[HotExpert] | None = None
    steps: int = 0

    def serving(self) -> dict[int, HotExpert]:
        """The experts the device computes in the next step."""
        return {expert: pair for expert, pair in self.handles.items() if expert != self.evicted}


@dataclass(slots=True)
class HybridMoE:
    """One layer's mixture of experts on host and device."""

    name: str
    spec: RouterSpec
    gate: Tensor  # [E, D] float32, on the device
    bias: Tensor | None  # [E]
    logit_bias: Tensor | None  # [E]
    expert_scale: Tensor | None  # [E]
    loads: Sequence[Callable[[], Gated] | None]
    routed: Handle  # packed by the host
    shared: Handle | None  # on the device
    shared_gate: Tensor | None
    hot: HotExperts
    norm: Norm | None = None  # the layer's, on the host


class HybridOps(OpsWrapper):
    """Routed experts on `host`, everything else on `device`. Each keeps its own weight format."""

    def __init__(self, device: Ops, host: Ops, hot_experts: int = 0) -> None:
        """hot_experts: maximum number of device copies per layer."""
        if not isinstance(host, HostOps):
            raise ValueError(f"experts on {host.name!r} are not supported; expected a CPU backend")
        hot = f", {hot_experts} hot" if hot_experts else ""
        super().__init__(device, f"{device.name}; experts on {host.name}{hot}")
        self._host: HostOps = host
        self._capacity = hot_experts
        self.packed_from = host.packed_from
        host.routed_only = True
        self._transfer = HostTransfer(self.device)
        self._computing = ThreadPoolExecutor(1, "farthing-experts")
        self._loading = ThreadPoolExecutor(1, "farthing-hot")

    def check_placement(self) -> None:
        self._host.check_placement()

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
        given = (w.bias, w.logit_bias, w.expert_scale)
        bias, logit_bias, scale = (None if b is None else b.float().to(self.device) for b in given)
        return HybridMoE(
            name,
            spec,
            w.gate.float().to(self.device),
            bias,
            logit_bias,
            scale,
            w.experts,
            self._host.pack_moe(name, spec, lambda: replace(w, shared=None, shared_gate=None)),
            None if w.shared is None else self._inner.pack_mlp(f"{name}.shared_experts", w.shared, spec.gate),
            None if w.shared_gate is None else w.shared_gate.float().to(self.device),
            HotExperts(ExpertCache(min(self._capacity, spec.num_experts - spec.identities))),
        )

    def moe(
        self, x: Tensor, weights: HybridMoE, norm: Norm, counts: Tensor | None = None, residual: bool = True,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if chosen is not None:
            y = self._among_chosen(x, weights, norm, chosen, counts)
            return x + y if residual else y
        if not residual:
            return self.moe(x.clone(), weights, norm, counts) - x
        host_norm = weights.norm = weights.norm or Norm(norm.weight.cpu(), norm.eps)
        if not self._capacity:
            seen = None if counts is None else torch.zeros(len(counts), dtype=torch.int64)
            computed = self._begin(self._all, self._transfer.to_host(x=x), weights.routed, host_norm, seen)
            out = self._shared(x, weights, norm)
            routed = self._transfer.to_device(computed())
            if counts is not None and seen is not None:
                counts += seen.to(self.device)
            return (out + routed).to(self.dtype)  # summed in float32, rounded once
        n = self._inner.rms_norm(x, norm)
        ids, gates = self.route(n, weights)
        if counts is not None:
            seen = ids.flatten()
            counts.scatter_add_(0, seen.clamp_min(0), (seen >= 0).to(counts.dtype))
        here, hot = self._transfer.to_host(x=x, ids=ids, gates=gates), weights.hot.serving()
        computed = self._begin(self._cold, here, weights.routed, host_norm, hot)
        out = self._shared(x, weights, norm)
        rows = rows_of(here["ids"].numpy())
        self._follow(weights, rows)
        out = out + self._on_device(n, gates, rows, hot, weights.spec.gate)
        return (out + self._transfer.to_device(computed())).to(self.dtype)

    def _among_chosen(
        self, x: Tensor, weights: HybridMoE, norm: Norm, chosen: Tensor, counts: Tensor | None
    ) -> Tensor:
        """Experts that tokens choose are used alike, so none of them is copied to the device."""
        host_norm = weights.norm = weights.norm or Norm(norm.weight.cpu(), norm.eps)
        here = self._transfer.to_host(x=x, ids=chosen)
        computed = self._begin(self._among, here, weights.routed, host_norm)
        if counts is not None:
            counts += torch.bincount(chosen.flatten(), minlength=len(counts)).to(counts)
        out = torch.zeros_like(x)
        if weights.shared is not None:
            out = shared_output(self._inner, x, weights.shared, weights.shared_gate, norm, residual=False)
        return (out + self._transfer.to_device(computed())).to(self.dtype)

    def _shared(self, x: Tensor, weights: HybridMoE, norm: Norm) -> Tensor:
        """x and the shared expert. x may be overwritten."""
        if weights.shared is None:
            return x
        return shared_output(self._inner, x, weights.shared, weights.shared_gate, norm)

    def _begin(self, compute: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
        """Start the host's part; call the returned function for its result after queueing the device's part.

        CUDA kernels run asynchronously, so this thread computes the host's part once they are queued. If the
        device is itself a CPU, the host's part runs in a thread.
        """
        if self.device.type == "cuda":
            return partial(compute, *arguments)
        return self._computing.submit(compute, *arguments).result

    @torch.inference_mode()
    def _all(self, here: HostCopies, routed: Handle, norm: Norm, seen: Tensor | None) -> Tensor:
        """The sum of all routed experts [T, D] float32; their token counts are added to seen [E]."""
        x = here["x"].float()
        return self._host.moe(x.clone(), routed, norm, seen).float() - x

    @torch.inference_mode()
    def _among(self, here: HostCopies, routed: Handle, norm: Norm) -> Tensor:
        """The sum of the experts that tokens chose [T, D] float32."""
        return self._host.moe(here["x"].float(), routed, norm, None, False, here["ids"]).float()

    @torch.inference_mode()
    def _cold(self, here: HostCopies, routed: Handle, norm: Norm, hot: Collection[int]) -> Tensor:
        """The sum of the experts that are not hot [T, D] float32."""
        x, ids = here["x"].float(), here["ids"]
        cold = ids.masked_fill(torch.isin(ids, torch.tensor(list(hot), dtype=ids.dtype)), -1)
        return self._host.moe_chosen(x.clone(), routed, norm, cold, here["gates"]).float() - x

    def _on_device(
        self, n: Tensor, gates: Tensor, rows: Rows, hot: Mapping[int, HotExpert], activation: Gate
    ) -> Tensor:
        """The sum of the hot experts [T, D] float32."""
        out = torch.zeros_like(n, dtype=torch.float32)
        chosen = [(hot[expert], part) for expert, part in rows.parts.items() if expert in hot]
        if not chosen:
            return out
        tokens, slots = self._transfer.indices(rows.tokens), self._transfer.indices(rows.slots)
        weight = gates[tokens, slots, None]
        for expert, part in chosen:
            # One expert at a time: a sum over all rows at once would have no fixed order on a GPU.
            y = expert(self._inner, n[tokens[part]], activation)
            out.index_add_(0, tokens[part], y.float() * weight[part])
        return out

    def reroute(self, weights: HybridMoE, spec: RouterSpec) -> None:
        weights.spec = spec
        self._host.reroute(weights.routed, spec)

    def route(self, n: Tensor, weights: HybridMoE) -> tuple[Tensor, Tensor]:
        """Route in plain torch on the device, so that both sides use the same choice."""
        logits = F.linear(n.float(), weights.gate, weights.logit_bias)
        return scaled_choice(*route(logits, weights.bias, weights.spec), weights.expert_scale)

    # -- hot experts

    def _follow(self, weights: HybridMoE, rows: Rows) -> None:
        """Count a step, adopt an expert that has finished loading, start loading another.

        The copies to the host have completed, and with them everything the device computed earlier: weights
        evicted in a previous step are no longer in use.
        """
        hot = weights.hot
        seen = {e: part.stop - part.start for e, part in rows.parts.items() if weights.loads[e] is not None}
        hot.cache.record(seen)
        hot.steps += 1
        if hot.loading is None:
            if hot.steps % DECIDE_EVERY == 0 and (swap := hot.cache.decide()):
                hot.evicted, hot.loading = swap
        elif hot.load is None:
            if hot.evicted is not None:
                del hot.handles[hot.evicted]
                self._inner.forget(f"{weights.name}.hot.{hot.evicted}.")
                hot.evicted = None
            hot.load = self._loading.submit(self._load, weights, hot.loading)
        elif hot.load.done():
            hot.handles[hot.loading] = hot.load.result()
            hot.cache.loaded(hot.loading)
            hot.loading = hot.load = None

    def _load(self, weights: HybridMoE, expert: int) -> HotExpert:
        load, name = weights.loads[expert], f"{weights.name}.hot.{expert}"
        assert load is not None
        with torch.inference_mode(), self._transfer.side_stream():
            gate, up, down = load()
            biases = None if gate.bias is None or up.bias is None else torch.cat((gate.bias, up.bias))
            return HotExpert(
                self._inner.pack_linear(f"{name}.gate_up", lambda: [gate, up]),
                self._inner.pack_linear(f"{name}.down", lambda: [down]),
                *(None if b is None else b.to(self.device, self.dtype) for b in (biases, down.bias)),
            )

    def settle(self) -> None:
        """Wait for experts that are loading; the next step of their layer uses them."""
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
